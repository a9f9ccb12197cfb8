"""What a run's folder tells about the run: curves, pictures, checkpoints, options, launches. It is only read.

Everything comes from files that a run has anyway, and from `log/status.json`, where it says what no other file holds.
A folder of an earlier version, without that file, gives the same facts but the resume command and who set an option.
"""

from __future__ import annotations

import base64
import contextlib
import csv
import io
import json
import math
import re
import time
from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch.nn.functional as F

from checkpoint import CheckpointSet, Layout, find_sets, models_of, retained
from data.image_files import encode, picture_in
from options import flatten
from runtime.history import History

MOST_POINTS = 2000  # of a curve on the page; of more rows each stretch gives its lowest and its highest
NEWEST_VALIDATIONS = 20  # whose pictures are shown,
PICTURES_EACH = 4  # of each so many,
PICTURE_BYTES = 3_000_000  # and all together no more than these: base64 makes 4 MB of them
AS_IT_IS = 100_000  # bytes of a picture that is not made smaller
PICTURE_WIDTH = 1280  # pixels of one that is
VERIFY_BYTES = 64_000_000  # of checkpoints read through at one rewriting while a run trains: some 0.05 s
LOG_LINES, LOG_BYTES = 40, 8192  # of the end of train.log

PICTURE = re.compile(r"(\d+)_(.+)\.png")
SHEET = re.compile(r"epoch_(\d+)")  # LGT's contact sheets lie in inference/epoch_0004/
LAUNCH = re.compile(r"(?:start    at|resume   from .*:) iteration (\d+) ")
END = re.compile(r"(stopped  by (\w+) after iteration (\d+))|finished (\d+) iterations")


class Table:
    """The columns of a CSV file of numbers; where it has grown, only what is new is read."""

    def __init__(self, path: Path):
        self.path, self.header, self.end = path, b"", 0
        self.columns: dict[str, array] = {}

    def read(self) -> dict[str, np.ndarray]:
        """Column -> values (float64), one for each row. An empty cell is NaN; what is not finite is infinite."""
        try:
            with open(self.path, "rb") as file:
                header = file.readline()
                if header != self.header or file.seek(0, io.SEEK_END) < self.end:
                    names = next(csv.reader([header.decode()]), [])
                    self.header, self.end, self.columns = header, len(header), {name: array("d") for name in names}
                file.seek(self.end)
                text = file.read()
        except FileNotFoundError:
            return {}
        whole = text[: text.rfind(b"\n") + 1]  # the last row may still be under way
        self.end += len(whole)
        for row in csv.reader(io.StringIO(whole.decode())):
            for column, cell in zip(self.columns.values(), row + [""] * (len(self.columns) - len(row))):
                column.append(_value(cell))
        return {name: np.array(column) for name, column in self.columns.items()}


def _value(cell: str) -> float:
    try:
        value = float(cell)
    except ValueError:
        return math.nan
    return value if math.isfinite(value) else math.inf


def curve(x: np.ndarray, y: np.ndarray, most: int = MOST_POINTS) -> dict[str, Any]:
    """The points of a column to be drawn: all of them, or of each stretch the lowest and the highest.

    Args: x: iterations (N). y: values (N) as `Table.read` gives them.
    Returns: x and y, real rows only, None where a value was not finite; of a thinned curve also `mean`, for smoothing:
    the middle iteration and the mean of each stretch; rows: how many there are; finite, low, high: over all of them.
    """
    there = ~np.isnan(y)
    x, y = x[there], y[there]
    finite = np.isfinite(y)
    found = {"rows": len(y), "broken": int((~finite).sum())}
    if finite.any():
        low, high = np.where(finite, y, np.inf).argmin(), np.where(finite, y, -np.inf).argmax()
        found |= {"low": [int(x[low]), float(y[low])], "high": [int(x[high]), float(y[high])]}
    kept = np.arange(len(y))
    if len(y) > most:
        length = math.ceil(2 * len(y) / most)
        padding = (0, -len(y) % length)
        shape = (-1, length)
        start = np.arange(0, len(y), length)
        good = np.pad(finite, padding).reshape(shape)
        values = np.where(good, np.pad(y, padding).reshape(shape), 0.0)
        low = start + np.where(good, values, np.inf).argmin(1)
        high = start + np.where(good, values, -np.inf).argmax(1)
        broken = np.flatnonzero(~finite)
        kept = np.unique(np.concatenate([low, high, broken[:: 1 + len(broken) // 100], [0, len(y) - 1]]))
        any_good = good.any(1)
        means = values.sum(1)[any_good] / good.sum(1)[any_good]
        middle = x[np.minimum(start + length // 2, len(y) - 1)][any_good]
        found["mean"] = {"x": middle.astype(int).tolist(), "y": means.tolist()}
    found |= {"x": x[kept].astype(int).tolist(), "y": [v if math.isfinite(v) else None for v in y[kept].tolist()]}
    return found


class RunFolder:
    """A run's folder. What was read once, unchanged since, is not read again.

    Args: folder: the run's. models: where its checkpoints lie; None: in `models` below it, or there.
    """

    def __init__(self, folder: Path, models: Path | None = None):
        self.folder, self.models = folder, models or models_of(folder)
        self.log = folder / "log"
        self.tables = {name: Table(self.log / f"{name}.csv") for name in ("train", "test")}
        self.shown: dict[tuple, str] = {}  # pictures as they are embedded
        self.checked: dict[tuple, tuple[float, str | None]] = {}  # when a set was read through, and what was wrong

    def status(self) -> dict[str, Any]:
        """`log/status.json`, or what the log says where there is none."""
        with contextlib.suppress(OSError, ValueError):
            found = json.loads((self.log / "status.json").read_text(encoding="utf-8"))
            if isinstance(found, dict) and isinstance(found.get("launches"), list):
                return found
        return self._status_of_log()

    def _status_of_log(self) -> dict[str, Any]:
        """State and launches of a run that wrote no status, by the lines of its log."""
        launches: list[dict] = []
        with contextlib.suppress(OSError), open(self.log / "train.log", encoding="utf-8", errors="replace") as file:
            for line in file:
                when, text = line[:19], line[20:]
                if match := LAUNCH.match(text):
                    launches = begin_launch(launches, int(match[1]), _seconds(when))
                elif launches and (match := END.match(text)):
                    launches[-1] |= {"ended": _seconds(when), "state": "interrupted" if match[1] else "finished",
                                     "reason": f"by {match[2]}" if match[1] else None,
                                     "until": int(match[3] or match[4])}
        last = launches[-1] if launches else {}
        return {"launches": launches, "state": last.get("state", "unknown"), "reason": last.get("reason")}

    def options(self) -> dict[str, Any]:
        """The options of the newest launch, as {"a.b": value}."""
        records = sorted(self.folder.glob("options/*.json"), key=lambda path: path.stem[-13:])  # ..._yymmdd_HHMMSS
        for path in reversed(records):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                return flatten(json.loads(path.read_text(encoding="utf-8")))
        return {}

    def log_end(self) -> list[str]:
        """The last lines of the log."""
        try:
            with open(self.log / "train.log", "rb") as file:
                size = file.seek(0, io.SEEK_END)
                file.seek(max(0, size - LOG_BYTES))
                lines = file.read().decode(errors="replace").splitlines()
        except OSError:
            return []
        return lines[1 if size > LOG_BYTES else 0 :][-LOG_LINES:]

    def facts(self, status: Mapping[str, Any] | None = None, verify_bytes: float = VERIFY_BYTES) -> dict[str, Any]:
        """All that the page shows of the run, plain values.

        Args: status: instead of the one in the folder. verify_bytes: of checkpoints read through now, the newest first.
        """
        status, flat = dict(status or self.status()), self.options()
        tables = {name: table.read() for name, table in self.tables.items()}
        sets = find_sets(self.models)
        newest_row = max((int(t["iteration"][-1]) for t in tables.values() if len(t.get("iteration", ()))), default=0)
        iteration = status["iteration"] = max([status.get("iteration") or 0, newest_row,  # a killed one came further
                                               *(s.iteration or 0 for s in sets if "iteration" not in status)])
        status.setdefault("total", flat.get("train.total_iter"))
        status.setdefault("task", flat.get("task"))
        best = best_row(tables["test"], status.get("metric"))
        return {**status, "folder": str(self.folder), "best": best, "log": self.log_end(),
                "curves": {name: curves(table) for name, table in tables.items()},
                "checkpoints": self.checkpoints(sets, flat, best, verify_bytes),
                "archives": [p.name for p in sorted(self.models.parent.glob(f"{self.models.name}_2*_*")) if p.is_dir()],
                "pictures": self.pictures(iteration),
                "options": [[key, value, status.get("origins", {}).get(key)] for key, value in flat.items()]}

    # ------------------------------------------------ checkpoints

    def checkpoints(self, sets: list[CheckpointSet], flat: Mapping[str, Any], best: Mapping | None,
                    verify_bytes: float) -> list[dict[str, Any]]:
        """The checkpoint table, newest first."""
        names = {key: flat.get(f"checkpoint.{key}") for key in ("best", "layout")}
        links = {Layout(names["layout"] or "split", best=names["best"]).link_name("best")} if names["best"] else set()
        linked = next((s.iteration for s in sets if any(path.name in links for path in s.names)), None)
        best_at = best["iteration"] if best else linked
        kept = retained(sets, flat.get("checkpoint.keep_last_n"), best_at)
        rows: dict[int, dict[str, Any]] = {}
        for found in reversed(sets):
            size = sum(path.stat().st_size for path in found.files.values() if path.exists())
            if found.iteration in rows:
                continue  # a copy of it, where hard links fail
            record = found.record or {}
            checked, fault = self.verify(found, size <= verify_bytes)
            verify_bytes -= size
            rows[found.iteration] = {
                "iteration": found.iteration, "epoch": record.get("epoch"), "metric": record.get("metric"),
                "size": size, "saved": record.get("timestamp"), "checked": checked, "fault": fault,
                "best": found.iteration == best_at,
                "file": found.path.name, "reason": record.get("reason"), "committed": found.committed,
                "kept": ", ".join(kept.get(found.iteration, ["until the next regular one"]))}
        return list(rows.values())

    def verify(self, found: CheckpointSet, now: bool) -> tuple[float | None, str | None]:
        """When a set was read through (None: not yet) and what is wrong with it."""
        key = tuple((path.name, path.stat().st_size, path.stat().st_mtime_ns)
                    for path in found.files.values() if path.exists())
        if key not in self.checked and now:
            self.checked[key] = time.time(), found.fault()
        return self.checked.get(key, (None, None))

    # ------------------------------------------------ pictures

    def pictures(self, iteration: int) -> list[dict[str, Any]]:
        """The newest validations' pictures, oldest first, as data URIs within the bounds above."""
        named: dict[tuple[str, int], list[tuple[str, Path]]] = {}
        for path in sorted((self.folder / "images").glob("*.png")):
            if (match := PICTURE.fullmatch(path.name)) and int(match[1]) <= iteration:  # later ones: of a run put away
                named.setdefault(("iteration", int(match[1])), []).append((match[2], path))
        if not named:
            for path in self.models.parent.glob("inference/*/sheet.jpg"):
                if match := SHEET.fullmatch(path.parent.name):
                    named["epoch", int(match[1])] = [("contact sheet", path)]
        found, left, kept = [], PICTURE_BYTES, {}
        for when in sorted(named, reverse=True)[:NEWEST_VALIDATIONS]:
            shown = []
            for name, path in named[when][:PICTURES_EACH]:
                facts = path.stat()
                key = path, facts.st_size, facts.st_mtime_ns
                with contextlib.suppress(ValueError, OSError):  # damaged, or gone
                    kept[key] = self.shown.get(key) or data_uri(path)
                    shown.append({"name": name, "source": kept[key]})
            left -= sum(len(one["source"]) * 3 // 4 for one in shown)
            if left < 0 and found:
                break
            found.append({"when": "{} {:,}".format(*when), "shown": shown, "more": len(named[when]) - len(shown)})
        self.shown = kept
        return found[::-1]


def data_uri(path: Path) -> str:
    """A picture to be embedded, made smaller where it is large. Raises ValueError, OSError where it is not one."""
    content, kind = path.read_bytes(), "jpeg" if path.suffix == ".jpg" else "png"
    image = picture_in(content, str(path))  # (3, H, W)
    if len(content) > AS_IT_IS:
        if image.shape[2] > PICTURE_WIDTH:
            size = max(1, round(image.shape[1] * PICTURE_WIDTH / image.shape[2])), PICTURE_WIDTH
            image = F.interpolate(image[None].float(), size, mode="area")[0].round().byte()
        content, kind = encode(image, "jpeg", quality=85), "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


# ---------------------------------------------------------------- curves and launches


def curves(columns: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Of every column but the iteration that holds numbers."""
    x = columns.get("iteration", np.zeros(0))
    if np.isnan(x).any() or np.isinf(x).any():  # rows that nobody can place
        columns = {name: values[np.isfinite(x)] for name, values in columns.items()}
        x = columns["iteration"]
    return {name: found for name, values in columns.items()
            if name not in ("iteration", "epoch") and (found := curve(x, values))["rows"]}


def best_row(columns: Mapping[str, np.ndarray], metric: Any) -> dict[str, Any] | None:
    """The validation with the best metric: which iteration, and every metric's value there."""
    if not metric or not len(columns.get("iteration", ())):
        return None
    history = History(*metric, rows=[dict(zip(columns, map(float, row))) for row in zip(*columns.values())])
    if (row := history.best_row) is None:
        return None
    return {"column": history.column(row), "mode": history.mode, "iteration": int(row["iteration"]),
            "value": history.value(row),
            "metrics": {key: value for key, value in row.items() if key != "iteration" and math.isfinite(value)}}


def begin_launch(launches: list[dict], iteration: int, began: float, **facts: Any) -> list[dict]:
    """The launches that led to where the run stands, with one more: those that it went back behind are dropped."""
    return [*(launch for launch in launches if launch["iteration"] < iteration or launch["iteration"] == iteration > 0),
            {"iteration": iteration, "began": began, **facts}]


def _seconds(text: str) -> float | None:
    try:
        return time.mktime(time.strptime(text, "%Y-%m-%d %H:%M:%S"))
    except ValueError:
        return None
