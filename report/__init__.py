"""The report of a run: one page, `log/report.html`, that a browser opens without a server and without a network.

    python -m report RUN                  the page of a run that ended, anywhere; every checkpoint is read through
    python -m report RUN RUN --out FILE   several, their curves over each other, their options side by side

A run in stages, each in a folder of its own below the run's, counts as several.

A run that trains rewrites its page at each validation and when it ends, however it ends; the page's text is built in
the browser from the facts that are embedded in it.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
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
from storage.files import is_locked

HERE = Path(__file__).parent
PATIENCE = 300.0  # seconds past the expected rewriting after which a page says that the run may have died


def write_page(path: Path, runs: list[Mapping[str, Any]]) -> None:
    """Write the page of one run, or of several side by side: it is the old one until it is the whole new one."""
    style, script = ((HERE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    # "<" can't end the element that holds the facts, and only our own style and script are ever used: see the policy
    facts = _json({"written": time.time(), "runs": runs}).replace("<", "\\u003c")
    filled = {"STYLE_HASH": _hash(style), "SCRIPT_HASH": _hash(script), "STYLE": style, "SCRIPT": script,
              "FACTS": facts}
    head, *parts = (HERE / "page.html").read_text(encoding="utf-8").split("{{")
    text = head + "".join(filled[name] + rest for name, rest in (part.split("}}", 1) for part in parts))
    replace(path, text)


def _json(facts: Any) -> str:
    """As JSON that a browser reads: it knows no NaN, which is the text "NaN" there."""
    try:
        return json.dumps(facts, allow_nan=False)
    except ValueError:
        return json.dumps(json.loads(json.dumps(facts), parse_constant=str))


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def replace(path: Path, text: str) -> None:
    """A text file that is the old one or the whole new one; nothing is left of one that the disk refuses."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def machine() -> dict[str, Any]:
    """Where a run runs and with what."""
    return {"host": socket.gethostname(), "system": platform.platform(), "processor": f"{os.cpu_count()} CPU cores",
            "python": platform.python_version(), **determinism.environment()}


class RunReport:
    """Keeps `log/status.json` and `log/report.html` of the run that this process trains; leaving it says how it ended.

    A report that can't be written is a warning line, once, and nothing else: training goes on.

    Args:
        folder: the run's. models: where its checkpoints lie. say: takes the warning.
        now: what changes: iteration, and baseline, how metrics of what a result has to beat end.
        about: what does not: task, total (iterations), command (which resumes the run), metric (its name and "max" or
        "min", which say what is best), origins (who set which option).
    """

    def __init__(self, folder: Path, models: Path, say: Callable[[str], None], now: Callable[[], Mapping[str, Any]],
                 **about: Any):
        self.say, self.now, self.warned = say, now, False
        self.run = RunFolder(folder, models)
        self.began = self.wrote = time.time()
        self.start = now()["iteration"]
        mine = {"host": socket.gethostname(), "pid": os.getpid()}
        self.status = {"version": 1, "state": "running", "reason": None, **about, **mine,
                       "cwd": os.getcwd(), "machine": machine(), "patience": None}
        before = self._tried(self.run.status) or {}
        launches = before.get("launches", [])
        if launches and "ended" not in launches[-1]:
            launches[-1] |= {"state": "killed", "until": before.get("iteration")}
        self.status["baseline"] = before.get("baseline")
        self.status["launches"] = begin_launch(launches, self.start, self.began, **mine)

    def __enter__(self) -> RunReport:
        self.write()
        return self

    def write(self) -> None:
        """Rewrite status and page."""
        self._tried(self._write)

    def end(self, state: str, reason: str | None = None) -> None:
        """The last rewriting: "finished", "interrupted" or "failed", and why."""
        self.status |= {"state": state, "reason": reason}
        self.status["launches"][-1] |= {"state": state, "reason": reason, "ended": time.time(),
                                        "until": self.now()["iteration"]}
        self.write()

    def __exit__(self, kind, error, trace) -> None:
        if error is not None:
            said = str(error).strip().splitlines()
            self.end("failed", f"{kind.__name__}: {said[0]}" if said else kind.__name__)

    def _write(self) -> None:
        here, clock = self.now(), time.time()
        speed = (here["iteration"] - self.start) / max(clock - self.began, 1e-3)  # with validations: they will be again
        self.status |= {"iteration": here["iteration"], "baseline": here["baseline"] or self.status["baseline"],
                        "written": clock, "speed": speed, "patience": PATIENCE + 2 * (clock - self.wrote)}
        self.wrote = clock
        replace(self.run.log / "status.json", json.dumps(self.status, indent=1) + "\n")
        write_page(self.run.log / "report.html", [self.run.facts(self.status)])

    def _tried(self, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except Exception as error:  # whatever a report meets, no step is lost for it
            if not self.warned:
                self.say(f"warning  the report was not written: {type(error).__name__}: {error}")
            self.warned = True


# ---------------------------------------------------------------- of runs that others trained


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m report", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder, e.g. experiments/train_vrt")
    parser.add_argument("--out", type=Path, metavar="FILE",
                        help="default: log/report.html of the run; of several, comparison.html here")
    args = parser.parse_args(argv)
    folders = [one for folder in args.runs for one in stages_of(folder)]
    out = args.out or (folders[0] / "log/report.html" if len(folders) == 1 else Path("comparison.html"))
    try:
        write_page(out, [read(folder) for folder in folders])
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(out)
    return 0


def stages_of(folder: Path) -> list[Path]:
    """The folder, or those of the stages in it, in the order in which they were begun."""
    if (folder / "log").is_dir():
        return [folder]
    stages = [path.parent for path in folder.glob("*/log") if path.is_dir()]
    begun = {stage: min((path.stem[-13:] for path in stage.glob("options/*.json")), default="") for stage in stages}
    return sorted(stages, key=begun.get) or [folder]


def read(folder: Path) -> dict[str, Any]:
    """The facts of a run that another process trains or trained. Raises ValueError when there is none."""
    if not (folder / "log").is_dir():
        raise ValueError(f"{folder}: is no run's folder: there is no log in it; give one like experiments/train_vrt")
    run = RunFolder(folder)
    status = run.status()
    if status.get("state") == "running" and status.get("host") == socket.gethostname() and not is_locked(folder):
        status |= {"state": "killed", "reason": f"process {status.get('pid')} ended without a word"}
        status["launches"][-1]["state"] = "killed"
    return run.facts(status, verify_bytes=float("inf"))
