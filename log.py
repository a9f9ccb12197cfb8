"""What a run says: lines on the console and in `log/train.log`, a live progress line, CSV files, pictures."""

from __future__ import annotations

import csv
import io
import shutil
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torchvision.io import encode_jpeg, encode_png
from torchvision.utils import make_grid

from durable import save_file


class RunLog:
    """Everything that one run prints and records, in the run's `log` folder.

    Args:
        folder: where the files go; None before the run has a folder: console only, lines are kept for the file.
        stream: the console; a live progress line is drawn only if it is a terminal.
    """

    def __init__(self, stream=None):
        self.stream = stream or sys.stdout
        self.live = self.stream.isatty()
        self.file, self.early, self.folder = None, [], None
        self.tables: dict[str, CsvTable] = {}
        self.drawn = 0  # width of the progress line on the screen

    def open(self, folder: Path, iteration: int) -> None:
        """Begin to write files; rows of the tables past the iteration that the run goes on from are dropped."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.file = open(folder / "train.log", "a", encoding="utf-8")
        for path in folder.glob("*.csv"):
            self.tables[path.stem] = CsvTable(path, iteration)
        early, self.early = self.early, []
        for text in early:
            self._record(text)

    def line(self, text: str) -> None:
        """A line for the reader and the file."""
        self._wipe()
        print(text, file=self.stream, flush=True)
        self._record(text)

    def _record(self, text: str) -> None:
        if self.file is None:
            self.early.append(text)
        else:
            self.file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
            self.file.flush()

    def progress(self, text: str) -> None:
        """Redraw the live line, cut to the window's width; nothing where there is no terminal."""
        if self.live:
            text = text[: shutil.get_terminal_size().columns - 1]
            print("\r" + text.ljust(self.drawn), end="", file=self.stream, flush=True)
            self.drawn = len(text)

    def _wipe(self) -> None:
        if self.drawn:
            print("\r" + " " * self.drawn + "\r", end="", file=self.stream)
            self.drawn = 0

    def row(self, table: str, values: Mapping[str, Any]) -> None:
        """A row of `log/<table>.csv`; `values` has an iteration."""
        if table not in self.tables:
            self.tables[table] = CsvTable(self.folder / f"{table}.csv", iteration=0)
        self.tables[table].append(values)

    def close(self) -> None:
        self._wipe()
        if self.file:
            self.file.close()


class CsvTable:
    """A CSV file (RFC 4180) with an `iteration` column that can be cut back and gains columns when they come up."""

    def __init__(self, path: Path, iteration: int):
        self.path, self.columns = path, []
        if path.exists():
            with open(path, newline="", encoding="utf-8") as file:
                text = file.read()
            whole = text[: text.rfind("\n") + 1]  # a row that a kill tore has no line end
            rows = list(csv.DictReader(io.StringIO(whole)))
            kept = [r for r in rows if (r.get("iteration") or "").isdigit() and int(r["iteration"]) <= iteration]
            self.columns = list(rows[0]) if rows else []
            self._rewrite(kept)

    def append(self, values: Mapping[str, Any]) -> None:
        new = [key for key in values if key not in self.columns]
        if new:
            with open(self.path, "a+", newline="", encoding="utf-8") as file:
                file.seek(0)
                rows = list(csv.DictReader(file))
            self.columns += new
            self._rewrite(rows)
        with open(self.path, "a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self.columns, restval="").writerow(values)

    def _rewrite(self, rows: Iterable[Mapping[str, Any]]) -> None:
        write_table(self.path, self.columns, rows)


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a whole CSV file, complete or not at all; what a row lacks stays empty."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, restval="")
    writer.writeheader()
    writer.writerows(rows)
    save_file(path, text.getvalue().encode())


class Pace:
    """Steps per second and time left, counted from where this launch began."""

    def __init__(self, start: int, total: int):
        self.start, self.total, self.began = start, total, time.monotonic()
        self.paused = 0.0

    def describe(self, iteration: int) -> str:
        spent = time.monotonic() - self.began - self.paused
        rate = (iteration - self.start) / spent if spent > 0 else 0.0
        if rate <= 0:
            return "-- it/s"
        speed = f"{rate:.2f} it/s" if rate >= 1 else f"{1 / rate:.2f} s/it"
        return f"{speed}, {duration((self.total - iteration) / rate)} left"


def duration(seconds: float) -> str:
    """'1d 02:03:04', '2:03:04' or '03:04'."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d {hour:02d}:{minute:02d}:{second:02d}"
    return f"{hour}:{minute:02d}:{second:02d}" if hour else f"{minute:02d}:{second:02d}"


def number(value: float) -> str:
    """A figure short enough for a line and exact enough to compare."""
    return f"{value:.4e}" if value and (abs(value) < 1e-3 or abs(value) >= 1e5) else f"{value:.4f}"


def save_pictures(path: Path, pictures: list[Tensor]) -> None:
    """Write images (C, H, W) in [0, 1] of equal size side by side as one PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [picture.detach().float().cpu().clamp(0, 1) for picture in pictures]
    write_picture(path, make_grid(images, nrow=len(images), padding=4, pad_value=1))


def write_picture(path: Path, picture: Tensor) -> None:
    """Write an image (C, H, W) in [0, 1] as a PNG, or a JPEG by its name, that is complete or not there."""
    image = (picture.detach().float().cpu().clamp(0, 1) * 255).round().byte()
    encoded = encode_jpeg(image, quality=95) if path.suffix == ".jpg" else encode_png(image)
    save_file(path, encoded.numpy().tobytes())


if __name__ == "__main__":
    if sys.argv[1:2] != ["report"]:
        sys.exit("usage: python -m log report RUN [RUN ...]")
    from report import main

    sys.exit(main(sys.argv[2:]))
