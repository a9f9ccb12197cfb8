"""Collect what a report shows from a run's folder: curves, pictures, checkpoints, options, launches.

The folder is only read. Most facts are in files that every run writes; `log/status.json` holds the rest: state,
launches, the command that resumes, and who set which option.
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

from checkpoint import CheckpointSet, find_sets, models_of, retained
from data.image_files import encode, picture_in
from options import flatten
from runtime.history import History

MOST_POINTS = 2000  # of a curve on the page; a longer one shows the minimum and maximum of each stretch
NEWEST_VALIDATIONS = 20  # validations whose pictures are shown
PICTURES_EACH = 4  # pictures of each validation
PICTURE_BYTES = 3_000_000  # all pictures together; base64 makes 4 MB of them
AS_IT_IS = 100_000  # a picture file of more bytes is encoded again, as JPEG
PICTURE_WIDTH = 1280  # pixels; a wider picture is shrunk then
VERIFY_BYTES = 64_000_000  # of checkpoints verified at one update while a run trains: some 0.05 s
LOG_LINES, LOG_BYTES = 40, 8192  # of the end of train.log

PICTURE = re.compile(r"(\d+)_(.+)\.png")
SHEET = re.compile(r"epoch_(\d+)")  # LGT's contact sheets lie in inference/epoch_0004/


class Table:
    """The columns of a CSV file of numbers; of a file that grew, only the new rows are read."""

    def __init__(self, path: Path):
        self.path, self.header, self.end = path, b"", 0
        self.columns: dict[str, array] = {}

    def read(self) -> dict[str, np.ndarray]:
        """Return column -> values (float64), one per row: an empty cell is NaN, a value that is not finite infinite."""
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
        whole = text[: text.rfind(b"\n") + 1]  # the last row may be incomplete
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
    """Choose the points of a column to draw: all of them, or the minimum and maximum of each stretch.

    Args: x: iterations (N). y: values (N) as `Table.read` returns them. most: points, about, of a thinned curve.
    Returns:
        x, y: points that are rows of the table; y is None where a value was not finite.
        rows, broken: number of rows, and of values that are not finite.
        low, high: [iteration, value] of the minimum and maximum of all rows.
        mean: of a thinned curve, for smoothing: x, y of the middle iteration and the mean of each stretch.
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
    """A run's folder, read with a cache: a file that did not change is not read again.

    Args: folder: the run's folder. models: the folder of its checkpoints; None: `models` in it, or itself.
    """

    def __init__(self, folder: Path, models: Path | None = None):
        self.folder, self.models = folder, models or models_of(folder)
        self.log = folder / "log"
        self.tables = {name: Table(self.log / f"{name}.csv") for name in ("train", "test")}
        self.shown: dict[tuple, str] = {}  # data URIs of pictures
        self.checked: dict[tuple, tuple[float, str | None]] = {}  # when a set was verified, and its fault

    def status(self) -> dict[str, Any]:
        """Read `log/status.json`. Without it the state is unknown."""
        with contextlib.suppress(OSError, ValueError):
            found = json.loads((self.log / "status.json").read_text(encoding="utf-8"))
            if isinstance(found, dict) and isinstance(found.get("launches"), list):
                return found
        return {"launches": [], "state": "unknown", "reason": None}

    def options(self) -> dict[str, Any]:
        """Read the options of the newest launch, as {"a.b": value}."""
        records = sorted(self.folder.glob("options/*.json"), key=lambda path: path.stem[-13:])  # ..._yymmdd_HHMMSS
        for path in reversed(records):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                return flatten(json.loads(path.read_text(encoding="utf-8")))
        return {}

    def log_end(self) -> list[str]:
        """Read the last lines of the log."""
        with contextlib.suppress(OSError), open(self.log / "train.log", "rb") as file:
            file.seek(max(0, file.seek(0, io.SEEK_END) - LOG_BYTES))
            return file.read().decode(errors="replace").splitlines()[-LOG_LINES:]
        return []

    def facts(self, status: Mapping[str, Any] | None = None, verify_bytes: float = VERIFY_BYTES) -> dict[str, Any]:
        """Collect everything that the page shows of the run, as plain values.

        Args: status: replaces the one in the folder. verify_bytes: of checkpoints to verify now, the newest first.
        """
        status, flat = dict(status or self.status()), self.options()
        tables = {name: table.read() for name, table in self.tables.items()}
        sets = find_sets(self.models)
        newest_row = max((int(t["iteration"][-1]) for t in tables.values() if len(t.get("iteration", ()))), default=0)
        newest_set = 0 if "iteration" in status else max((s.iteration or 0 for s in sets), default=0)
        iteration = max(status.get("iteration") or 0, newest_row, newest_set)  # a killed run may be past its status
        status["iteration"] = iteration
        status.setdefault("total", flat.get("train.total_iter"))
        status.setdefault("task", flat.get("task"))
        best = best_row(tables["test"], status.get("metric"))
        return {**status, "folder": str(self.folder), "best": best, "log": self.log_end(),
                "curves": {name: curves(table) for name, table in tables.items()},
                "checkpoints": self.checkpoints(sets, flat.get("checkpoint.keep_last_n"), best, verify_bytes),
                "archives": [p.name for p in sorted(self.models.parent.glob(f"{self.models.name}_2*_*")) if p.is_dir()],
                "pictures": self.pictures(iteration),
                "options": [[key, value, status.get("origins", {}).get(key)] for key, value in flat.items()]}

    # ------------------------------------------------ checkpoints

    def checkpoints(self, sets: list[CheckpointSet], keep_last_n: int | None, best: Mapping | None,
                    verify_bytes: float) -> list[dict[str, Any]]:
        """List the checkpoints, newest first."""
        best_at = best["iteration"] if best else None
        kept = retained(sets, keep_last_n, best_at)
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
        """Return when a set was verified (None: not yet) and its fault; verify it if `now`."""
        key = tuple((path.name, path.stat().st_size, path.stat().st_mtime_ns)
                    for path in found.files.values() if path.exists())
        if key not in self.checked and now:
            self.checked[key] = time.time(), found.fault()
        return self.checked.get(key, (None, None))

    # ------------------------------------------------ pictures

    def pictures(self, iteration: int) -> list[dict[str, Any]]:
        """Return the newest validations' pictures, oldest first, as data URIs within the limits above."""
        named: dict[tuple[str, int], list[tuple[str, Path]]] = {}
        for path in sorted((self.folder / "images").glob("*.png")):  # those of later iterations are of an archived run
            if (match := PICTURE.fullmatch(path.name)) and int(match[1]) <= iteration:
                named.setdefault(("iteration", int(match[1])), []).append((match[2], path))
        if not named:
            for path in self.folder.glob("inference/*/sheet.jpg"):
                if match := SHEET.fullmatch(path.parent.name):
                    named["epoch", int(match[1])] = [("contact sheet", path)]
        found, left, kept = [], PICTURE_BYTES, {}
        for when in sorted(named, reverse=True)[:NEWEST_VALIDATIONS]:
            shown = []
            for name, path in named[when][:PICTURES_EACH]:
                facts = path.stat()
                key = path, facts.st_size, facts.st_mtime_ns
                with contextlib.suppress(ValueError, OSError):  # damaged or removed
                    kept[key] = self.shown.get(key) or data_uri(path)
                    shown.append({"name": name, "source": kept[key]})
            left -= sum(len(one["source"]) * 3 // 4 for one in shown)
            if left < 0 and found:
                break
            found.append({"when": "{} {:,}".format(*when), "shown": shown, "more": len(named[when]) - len(shown)})
        self.shown = kept
        return found[::-1]


def data_uri(path: Path) -> str:
    """Encode a picture file for the page, smaller if it is large. Raises ValueError, OSError if it is not a picture."""
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
    """Return the curve of every column with numbers, except iteration, epoch and steps."""
    x = columns.get("iteration", np.zeros(0))
    if np.isnan(x).any() or np.isinf(x).any():  # rows without a position
        columns = {name: values[np.isfinite(x)] for name, values in columns.items()}
        x = columns["iteration"]
    return {name: found for name, values in columns.items()
            if name not in ("iteration", "epoch", "steps") and (found := curve(x, values))["rows"]}


def best_row(columns: Mapping[str, np.ndarray], metric: Any) -> dict[str, Any] | None:
    """Return the best validation's iteration and all its metrics. Args: metric: name and "max" or "min"."""
    if not metric or not len(columns.get("iteration", ())):
        return None
    history = History(*metric, rows=[dict(zip(columns, map(float, row))) for row in zip(*columns.values())])
    if (row := history.best_row) is None:
        return None
    return {"column": history.column(row), "mode": history.mode, "iteration": int(row["iteration"]),
            "value": history.value(row),
            "metrics": {key: value for key, value in row.items() if key != "iteration" and math.isfinite(value)}}


def begin_launch(launches: list[dict], iteration: int, began: float, **facts: Any) -> list[dict]:
    """Append a launch; drop those that began later than the iteration it resumes from."""
    return [*(launch for launch in launches if launch["iteration"] < iteration or launch["iteration"] == iteration > 0),
            {"iteration": iteration, "began": began, **facts}]
