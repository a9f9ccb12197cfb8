"""What a run says: lines on the console and in `log/train.log`, a progress line, CSV files, pictures, TensorBoard."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import re
import sys
import time
import traceback
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from data.image_files import encode
from durable import save_file
from options import OptionError

ERASE = "\r\x1b[K"  # to the beginning of the line, and nothing right of it
YELLOW, GREEN, RED = "33", "32", "31"
COLOURS = {"warning": YELLOW, "absent": YELLOW, "machine": YELLOW, "stopped": YELLOW, "warn": YELLOW, "finished": GREEN,
           "done": GREEN, "ok": GREEN, "fail": RED, "error:": RED}  # by a line's first word
MOST_UNWRITTEN = 10_000  # lines that wait for a file that cannot be written
# printed also by a quiet run
LOUD = {"warning", "absent", "fault", "machine", "stopped", "finished", "done", "metrics", "ok", "warn", "fail"}


@contextlib.contextmanager
def tolerated(path: Path, warn: Callable[[str], Any]) -> Iterator[None]:
    """Inside, a file that cannot be written is a warning: training is worth more than what is written about it."""
    try:
        yield
    except OSError as error:
        warn(f"{path} can't be written: {error.strerror or error}")


class RunLog:
    """Everything that one run prints and records, in the run's `log` folder.

    Each line is written at once, so that lines of several processes don't mix. Nothing here ends a run: a console that
    is gone is done without, and what a full disk refuses is kept and tried again at the next line or row.

    Args:
        stream: the console; the live progress line and colours are drawn only if it is a terminal.
        quiet: print only warnings and how it ended; the files get everything.
        tensorboard: record also for TensorBoard. Raises: OptionError when it is not installed.
    """

    def __init__(self, stream=None, quiet: bool = False, tensorboard: bool = False):
        self.stream = stream or sys.stdout or open(os.devnull, "w")  # no stdout at all: closed by who started us
        if hasattr(self.stream, "reconfigure"):
            self.stream.reconfigure(errors="backslashreplace")  # a file's name may be in no encoding of the console
        self.quiet = quiet
        self.live = not quiet and is_terminal(self.stream)
        self.drawn = False  # whether the progress line is on the screen
        self.file, self.folder = None, None
        self.unwritten: list[str] = []  # lines that the file has not got
        self.rows: dict[str, list[Mapping]] = {}  # rows that a table has not got
        self.tables: dict[str, CsvTable] = {}
        self.refused: set[str] = set()  # files that a warning was printed of
        self.writer_class = summary_writer() if tensorboard else None
        self.board: Board | None = None

    def open(self, folder: Path, iteration: int, settings: Mapping[str, Any] | None = None,
             tables: Mapping[str, Sequence[Mapping[str, Any]]] | None = None) -> None:
        """Begin to write files; rows of the tables past the iteration that the run resumes from are dropped.

        What cannot be written is warned of and done without, or tried again with the next line.

        Args: settings: the options as {"a.b": value}, for TensorBoard. tables: rows that a table is to begin with,
            instead of those of its file.
        """
        self.folder = folder
        with tolerated(folder, self.warn):
            folder.mkdir(parents=True, exist_ok=True)
        for name, rows in (tables or {}).items():
            path = folder / f"{name}.csv"
            with tolerated(path, self.warn):
                if columns := list(dict.fromkeys(key for row in rows for key in row)):
                    write_table(path, columns, rows)
                else:
                    path.unlink(missing_ok=True)
        for path in sorted(folder.glob("*.csv")):
            with tolerated(path, self.warn):
                self.tables[path.stem] = CsvTable(path, iteration)
        if self.writer_class:
            self._draw(lambda _: None, lambda: Board(self.writer_class(str(folder / "tensorboard"),
                                                                       purge_step=iteration + 1), settings or {}))
        self._record(None)

    def _open_file(self) -> None:
        self.file = open(self.folder / "train.log", "a+b", buffering=0)
        if self.file.tell():
            self.file.seek(-1, os.SEEK_END)
            self.unwritten[:0] = [] if self.file.read() == b"\n" else ["\n"]  # a kill tore the last line

    def line(self, text: str) -> None:
        """A line for the reader and the file."""
        text = printable(text)
        word = text.split(" ", 1)[0]
        if not self.quiet or word in LOUD:
            self._print(status(word, self.stream) + text[len(word):])
        self._record(text)

    def warn(self, text: str) -> None:
        """A line that also a quiet run prints."""
        self.line(f"warning  {text}")

    def _print(self, text: str) -> None:
        self._say(f"{ERASE if self.drawn else ''}{text}\n")
        self.drawn = False

    def _say(self, text: str) -> None:
        try:
            self.stream.write(text)
            self.stream.flush()
        except OSError:  # its reader has left: the run goes on, and the file has everything
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
            self.live = False

    def _record(self, text: str | None) -> None:
        if text is not None:
            self.unwritten.append(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
            del self.unwritten[:-MOST_UNWRITTEN]
        if self.folder is None:
            return
        try:
            if self.file is None:
                self._open_file()
            append(self.file, "".join(self.unwritten).encode(errors="backslashreplace"))
            self.unwritten.clear()
        except OSError as error:
            self._refused("train.log", error)

    def _refused(self, name: str, error: OSError) -> None:
        if name not in self.refused:  # once a launch
            self.refused.add(name)
            self._print(f"warning  {self.folder / name} can't be written: {error.strerror}; the next line tries again")

    def record_traceback(self, error: BaseException) -> None:
        """The place of a fault in the code, for the reader and the file."""
        for text in traceback.format_exception(error):
            for line in text.rstrip().splitlines():
                self.line(f"fault    {line}")

    def progress(self, text: str) -> None:
        """Redraw the live line, cut to the window's width as it is now; nothing where there is no terminal."""
        if self.live:
            self._say(ERASE + cut(printable(text), width_of(self.stream) - 1))
            self.drawn = True

    def row(self, table: str, values: Mapping[str, Any]) -> None:
        """A row of `log/<table>.csv`; `values` has an iteration."""
        waiting = self.rows.setdefault(table, [])
        waiting.append(dict(values))
        try:
            if table not in self.tables:
                self.tables[table] = CsvTable(self.folder / f"{table}.csv", iteration=0)
            while waiting:
                self.tables[table].append(waiting[0])
                waiting.pop(0)
        except OSError as error:
            self._refused(f"{table}.csv", error)
        self._draw(lambda board: board.row(table, values))

    def pictures(self, path: Path, pictures: Sequence[Tensor], tag: str, iteration: int | None) -> None:
        """Images (C, H, W) in [0, 1] of equal size, side by side: a PNG at `path`, and under `tag` for TensorBoard."""
        with tolerated(path, self._warn_once):
            picture = save_pictures(path, pictures)
            self._draw(lambda board: board.picture(tag, picture, iteration))

    def _warn_once(self, text: str) -> None:
        if "pictures" not in self.refused:
            self.refused.add("pictures")
            self.warn(f"{text}; training continues without such pictures")

    def _draw(self, what: Callable[[Board], None], make: Callable[[], Board] | None = None) -> None:
        try:
            self.board = make() if make else self.board
            if self.board:
                what(self.board)
        except OSError as error:
            self.board = None
            self.warn(f"TensorBoard gets no more of this launch: {error}; the CSV files do")

    def close(self) -> None:
        """The screen is left clean, files closed; to be called at the end of every launch."""
        if self.drawn:
            self._say(ERASE)
            self.drawn = False
        self._draw(lambda board: board.close())
        if self.file:
            self.file.close()


# ---------------------------------------------------------------- the terminal


def is_terminal(stream) -> bool:
    """Whether a line there can be drawn over."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def status(word: str, stream) -> str:
    """A line's first word, in its colour where that helps: on a terminal, unless NO_COLOR is set (no-color.org)."""
    if word not in COLOURS or not is_terminal(stream) or os.environ.get("NO_COLOR"):
        return word
    return f"\x1b[{COLOURS[word]}m{word}\x1b[0m"


def width_of(stream) -> int:
    """Columns of the window, now."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except OSError:
        return 80


def printable(text: str) -> str:
    """`text` in one line: control characters, as a file's name may have, as question marks."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", "?", text)


def cut(text: str, columns: int) -> str:
    """As much of `text` as fits; Chinese and the like take two columns a character, accents none."""
    used = 0
    for i, letter in enumerate(text):
        used += 0 if unicodedata.combining(letter) else 2 if unicodedata.east_asian_width(letter) in "WF" else 1
        if used > columns:
            return text[:i]
    return text


# ---------------------------------------------------------------- files


def append(file: BinaryIO, text: bytes) -> None:
    """All of `text` at the end of an unbuffered file, or nothing of it. Raises: OSError as the disk says."""
    end = file.seek(0, os.SEEK_END)
    try:
        while text:
            text = text[file.write(text):]
    except OSError:
        file.truncate(end)
        raise


class CsvTable:
    """A CSV file (RFC 4180) with an `iteration` column that can be cut back and gains columns when they come up."""

    def __init__(self, path: Path, iteration: int):
        self.path, self.columns = path, []
        if path.exists():
            self.columns, rows = self._read()
            if "iteration" in self.columns:
                write_table(path, self.columns, [row for row in rows if int(row["iteration"]) <= iteration])
            else:  # none of ours, or another program saved it in its own way: kept, not used
                self.columns = []
                os.replace(path, path.with_suffix(".csv.old"))

    def append(self, values: Mapping[str, Any]) -> None:
        """One more row, whole or not at all. Raises: OSError."""
        if new := [key for key in values if key not in self.columns]:
            write_table(self.path, self.columns + new, self._read()[1] if self.columns else [])
            self.columns += new
        with open(self.path, "ab", buffering=0) as file:
            append(file, csv_text(self.columns, [values]))

    def _read(self) -> tuple[list[str], list[dict[str, str]]]:
        """Columns and rows, without those that a kill or a power cut tore."""
        text = self.path.read_bytes().decode("utf-8-sig", errors="surrogateescape")
        whole = [line for line in text.split("\n")[:-1] if "\0" not in line]
        columns, *rows = list(csv.reader(whole)) or [[]]
        rows = [dict(zip(columns, row)) for row in rows if len(row) == len(columns)]
        return columns, [row for row in rows if row.get("iteration", "").isdecimal()]


def csv_text(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> bytes:
    text = io.StringIO(newline="")
    csv.DictWriter(text, columns, restval="").writerows(rows)
    return text.getvalue().encode(errors="surrogateescape")  # a column may be a folder's name, in any bytes


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a whole CSV file, complete or not at all; what a row lacks stays empty."""
    text = csv_text(columns, [dict(zip(columns, columns)), *rows])
    if not path.exists() or path.read_bytes() != text:  # a full disk may still take what is no change
        save_file(path, text)


# ---------------------------------------------------------------- TensorBoard


def summary_writer() -> type:
    """TensorBoard's writer. Raises: OptionError when it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise OptionError("log.tensorboard: TensorBoard is not installed; pip install 'perdure[tensorboard]', or leave "
                          "it out: log/*.csv has the same figures") from None
    return SummaryWriter


class Board:
    """The tables once more for TensorBoard, as `<table>/<column>`, with pictures and the options as hparams.

    Args:
        writer: a SummaryWriter that purges what the run repeats. settings: the options as {"a.b": value}.
    """

    def __init__(self, writer, settings: Mapping[str, Any]):
        self.writer, self.settings = writer, settings

    def row(self, table: str, values: Mapping[str, Any]) -> None:
        figures = {f"{table}/{key}": value for key, value in values.items()
                   if key != "iteration" and isinstance(value, (int, float))}
        for tag, value in figures.items():
            self.writer.add_scalar(tag, value, values["iteration"])
        if table == "test":
            self.tell_settings(figures)
        self.writer.flush()  # a kill may come at any time, and what lies before a checkpoint is not trained again

    def tell_settings(self, metrics: Mapping[str, float]) -> None:
        """The hparams, once; TensorBoard wants to know with them which metrics there are."""
        from torch.utils.tensorboard.summary import hparams

        settings = {key: value if isinstance(value, (bool, int, float, str)) else json.dumps(value)
                    for key, value in self.settings.items() if value is not None}
        for summary in hparams(settings, dict(metrics)) if settings else ():
            self.writer.file_writer.add_summary(summary)
        self.settings = {}

    def picture(self, tag: str, picture: Tensor, iteration: int | None) -> None:
        self.writer.add_image(tag, picture, iteration)

    def close(self) -> None:
        self.tell_settings({})
        self.writer.close()


# ---------------------------------------------------------------- figures and pictures


class Pace:
    """Steps per second and time left, counted from where this launch began.

    `paused` holds the seconds of validations: they are no steps, but the time left has its share of them.
    """

    def __init__(self, start: int, total: int):
        self.start, self.total, self.began = start, total, time.monotonic()
        self.paused = 0.0

    def describe(self, iteration: int) -> str:
        spent, done = time.monotonic() - self.began, iteration - self.start
        if done <= 0 or spent <= self.paused:
            return "-- it/s"
        rate = done / (spent - self.paused)
        speed = f"{rate:.2f} it/s" if rate >= 1 else f"{1 / rate:.2f} s/it"
        return f"{speed}, {duration((self.total - iteration) * spent / done)} left"


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


def save_pictures(path: Path, pictures: Sequence[Tensor]) -> Tensor:
    """Write images (C, H, W) in [0, 1] of equal size side by side as one PNG. Returns that (C, H, W)."""
    from torchvision.utils import make_grid  # takes longer to import than torch; not all commands draw

    path.parent.mkdir(parents=True, exist_ok=True)
    images = [picture.detach().float().cpu().clamp(0, 1) for picture in pictures]
    picture = make_grid(images, nrow=len(images), padding=4, pad_value=1)
    write_picture(path, picture)
    return picture


def write_picture(path: Path, picture: Tensor) -> None:
    """Write an image (C, H, W) in [0, 1] as a PNG, or a JPEG by its name, that is complete or not there."""
    image = (picture.detach().float().cpu().clamp(0, 1) * 255).round().byte()
    save_file(path, encode(image, "jpeg" if path.suffix == ".jpg" else "png"))


if __name__ == "__main__":
    if sys.argv[1:2] != ["report"]:
        sys.exit("usage: python -m log report RUN [RUN ...]")
    import signal

    from report import main

    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # end quietly when piped into head
    sys.exit(main(sys.argv[2:]))
