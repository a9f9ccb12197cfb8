"""Write the report of a run: one page, `log/report.html`, that a browser opens without a server or a network.

    python -m report RUN                  the page of a run that ended; every checkpoint is verified
    python -m report RUN RUN --out FILE   several runs: curves in one chart, options side by side

A run with stages counts as several runs, one for each stage's folder.

A run that trains rewrites its page at each validation and at its end. Facts are embedded in the page as JSON; its
script draws them in the browser.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import os
import platform
import socket
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from report.facts import RunFolder, begin_launch
from runtime import determinism
from storage.files import is_locked, removed_on_failure

HERE = Path(__file__).parent
PATIENCE = 300.0  # seconds past the expected update after which a page warns that the run may have died


def write_page(path: Path, runs: list[Mapping[str, Any]]) -> None:
    """Write the page of one run or of several, atomically."""
    style, script = ((HERE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    # "<" is escaped so that no fact ends the element; the page's security policy allows this style and script only
    facts = _json({"written": time.time(), "runs": runs}).replace("<", "\\u003c")
    text = (HERE / "page.html").read_text(encoding="utf-8")
    for name, value in (("STYLE_HASH", _hash(style)), ("SCRIPT_HASH", _hash(script)), ("STYLE", style),
                        ("SCRIPT", script), ("FACTS", facts)):  # facts last: they may hold anything
        text = text.replace("{{" + name + "}}", value)
    replace(path, text)


def _json(facts: Any) -> str:
    """Return JSON as browsers read it: NaN, which it does not have, becomes the text "NaN"."""
    try:
        return json.dumps(facts, allow_nan=False)
    except ValueError:
        return json.dumps(json.loads(json.dumps(facts), parse_constant=str))


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def replace(path: Path, text: str) -> None:
    """Replace a text file atomically. It is not forced to the disk: a page is not worth an fsync. Raises OSError."""
    temporary = path.with_name(f"{path.name}.tmp")
    with removed_on_failure(temporary):
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)


def machine() -> dict[str, Any]:
    """Describe the host, its processor and the versions."""
    return {"host": socket.gethostname(), "system": platform.platform(), "processor": f"{os.cpu_count()} CPU cores",
            "python": platform.python_version(), **determinism.environment()}


class RunReport:
    """Keeps `log/status.json` and `log/report.html` of the run that this process trains up to date.

    A report that cannot be written is one warning line; training continues. As a context manager it records an
    exception as the run's end.

    Args:
        folder: the run's folder.
        models: the folder of its checkpoints.
        say: prints the warning.
        now: returns what changes: iteration, and baseline, the suffix of metrics that a result has to beat, after_save,
            the last result of that command.
        about: what does not change: task, total (iterations), command (which resumes the run), metric (name and "max"
            or "min"; it decides which validation is best), origins (option key -> the file or flag that set it).
    """

    def __init__(self, folder: Path, models: Path, say: Callable[[str], None], now: Callable[[], Mapping[str, Any]],
                 **about: Any):
        self.say, self.now, self.warned = say, now, False
        self.run = RunFolder(folder, models)
        self.began = self.wrote = time.time()
        self.start = now()["iteration"]
        process = {"host": socket.gethostname(), "pid": os.getpid()}
        self.status = {"version": 1, "state": "running", "reason": None, **about, **process,
                       "cwd": os.getcwd(), "machine": machine(), "patience": None}
        before = self._tried(self.run.status) or {}
        launches = before.get("launches", [])
        if launches and "ended" not in launches[-1]:
            launches[-1] |= {"state": "killed", "until": before.get("iteration")}
        self.status["baseline"] = before.get("baseline")
        self.status["launches"] = begin_launch(launches, self.start, self.began, **process)

    def __enter__(self) -> RunReport:
        self.write()
        return self

    def write(self) -> None:
        """Update status and page."""
        self._tried(self._write)

    def end(self, state: str, reason: str | None = None) -> None:
        """Record how the run ended: "finished", "interrupted" or "failed", and the reason."""
        self.status |= {"state": state, "reason": reason}
        self.status["launches"][-1] |= {"state": state, "reason": reason, "ended": time.time(),
                                        "until": self.now()["iteration"]}
        self.write()

    def __exit__(self, kind, error, trace) -> None:
        if error is not None:
            lines = str(error).strip().splitlines()
            self.end("failed", f"{kind.__name__}: {lines[0]}" if lines else kind.__name__)

    def _write(self) -> None:
        here, clock = self.now(), time.time()
        speed = (here["iteration"] - self.start) / max(clock - self.began, 1e-3)  # validations and saves included
        self.status |= {"iteration": here["iteration"], "baseline": here["baseline"] or self.status["baseline"],
                        "after_save": here.get("after_save"),
                        "written": clock, "speed": speed, "patience": PATIENCE + 2 * (clock - self.wrote)}
        self.wrote = clock
        replace(self.run.log / "status.json", json.dumps(self.status, indent=1) + "\n")
        write_page(self.run.log / "report.html", [self.run.facts(self.status)])

    def _tried(self, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except Exception as error:  # no failure of a report may cost a step
            if not self.warned:
                self.say(f"warning  the report was not written: {type(error).__name__}: {error}")
            self.warned = True


# ---------------------------------------------------------------- runs of other processes


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m report", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder, e.g. experiments/train_vrt")
    parser.add_argument("--out", type=Path, metavar="FILE",
                        help="default: log/report.html of the run; of several, comparison.html beside them")
    args = parser.parse_args(argv)
    folders = [one for folder in args.runs for one in stages_of(folder)]
    shared = os.path.commonpath([folder.resolve() for folder in folders])
    out = args.out or (folders[0] / "log/report.html" if len(folders) == 1 else
                       Path(os.path.relpath(shared), "comparison.html"))
    try:
        if out.is_dir() and args.out:
            raise ValueError(f"--out {out}: is a folder; name a file, e.g. {out / 'report.html'}")
        write_page(out, [read(folder) for folder in folders])
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(out)
    return 0


def stages_of(folder: Path) -> list[Path]:
    """Return the run's folder, or the folders of its stages in the order in which they were started."""
    if (folder / "log").is_dir():
        return [folder]
    stages = [path.parent for path in folder.glob("*/log") if path.is_dir()]
    return sorted(stages, key=lambda stage: min((path.stem[-13:] for path in stage.glob("options/*.json")),
                                                default="")) or [folder]


def read(folder: Path) -> dict[str, Any]:
    """Collect the facts of a run that another process trains or trained. Raises ValueError if there is none."""
    if not (folder / "log").is_dir():
        raise ValueError(f"{folder}: is not a run's folder (no log in it); give one such as experiments/train_vrt")
    run = RunFolder(folder)
    status = run.status()
    if status.get("state") == "running" and status.get("host") == socket.gethostname() and not is_locked(folder):
        status |= {"state": "killed", "reason": f"process {status.get('pid')} ended without recording why"}
        status["launches"][-1]["state"] = "killed"
    return run.facts(status, verify_bytes=float("inf"))
