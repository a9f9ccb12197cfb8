"""Lines on the console and in `log/train.log`, a progress line, CSV files, pictures, TensorBoard."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from log.pictures import save_pictures
from log.tables import CsvTable, append, write_table
from log.tensorboard import Board, summary_writer
from log.terminal import ERASE, is_terminal, printable, status, width_of
from log.wandb import WandbBoard, wandb_module

MAX_UNWRITTEN = 10_000  # lines kept for a file that cannot be written
# first words of the lines that a quiet run prints, too
LOUD = {"warning", "absent", "fault", "machine", "stopped", "finished", "done", "metrics", "ok", "warn", "fail"}


@contextlib.contextmanager
def warn_on_write_error(path: Path, warn: Callable[[str], Any]) -> Iterator[None]:
    """Turn an OSError of the block into a warning, so that a log that cannot be written does not end the training."""
    try:
        yield
    except OSError as error:
        warn(f"{path} can't be written: {error.strerror or error}")


class RunLog:
    """Prints the lines of one run and records them in its `log` folder.

    Each line is written in one call, so that lines of several processes don't mix. No error here ends a run: output to
    a closed console is dropped, and what a full disk does not take is written with the next line or row.

    Args:
        stream: the console; the progress line and colours are drawn only if it is a terminal.
        quiet: print only warnings, errors and the last line; the files get every line.
        tensorboard, wandb: record for TensorBoard, for Weights & Biases, too.
    Raises: OptionError when one of these is not installed.
    """

    def __init__(self, stream=None, quiet: bool = False, tensorboard: bool = False, wandb: bool = False):
        self.stream = stream or sys.stdout or open(os.devnull, "w")  # None: the parent process closed it
        if hasattr(self.stream, "reconfigure"):
            self.stream.reconfigure(errors="backslashreplace")  # for names of files that the console can't encode
        self.quiet = quiet
        self.live = not quiet and is_terminal(self.stream)
        self.drawn = False  # whether the progress line is on the screen
        self.file, self.folder = None, None
        self.lock = threading.Lock()  # the thread of runtime/watchdog.py prints lines, too
        self.unwritten: list[str] = []  # lines that are not in the file yet
        self.rows: dict[str, list[Mapping]] = {}  # rows that are not in their table yet
        self.tables: dict[str, CsvTable] = {}
        self.failed: set[str] = set()  # files for which a warning was printed
        self.makers = [partial(Board, summary_writer())] if tensorboard else []
        self.makers += [partial(WandbBoard, wandb_module())] if wandb else []
        self.boards: list[Board | WandbBoard] = []

    def open(self, folder: Path, iteration: int, settings: Mapping[str, Any] | None = None,
             tables: Mapping[str, Sequence[Mapping[str, Any]]] | None = None) -> None:
        """Open the files, and drop the rows of tables past the iteration that the run resumes from.

        Args: settings: the options as {"a.b": value}, for TensorBoard. tables: first rows of a table, instead of those
            in its file.
        """
        self.folder = folder
        with warn_on_write_error(folder, self.warn):
            folder.mkdir(parents=True, exist_ok=True)
        for name, rows in (tables or {}).items():
            path = folder / f"{name}.csv"
            with warn_on_write_error(path, self.warn):
                if columns := list(dict.fromkeys(key for row in rows for key in row)):
                    write_table(path, columns, rows)
                else:
                    path.unlink(missing_ok=True)
        for path in sorted(folder.glob("*.csv")):
            with warn_on_write_error(path, self.warn):
                self.tables[path.stem] = CsvTable(path, iteration)
        for make in self.makers:
            try:
                self.boards.append(make(folder, iteration, settings or {}))
            except OSError as error:
                self.warn(f"{make.func.name} gets no rows of this launch: {error}; the CSV files have them")
        self._record(None)

    def _open_file(self) -> None:
        self.file = open(self.folder / "train.log", "a+b", buffering=0)
        if self.file.tell():
            self.file.seek(-1, os.SEEK_END)
            self.unwritten[:0] = [] if self.file.read() == b"\n" else ["\n"]  # a kill cut the last line off

    def line(self, text: str) -> None:
        """Print a line and record it in the file."""
        text = printable(text)
        word = text.split(" ", 1)[0]
        with self.lock:
            if not self.quiet or word in LOUD:
                self._print(status(word, self.stream) + text[len(word):])
            self._record(text)

    def warn(self, text: str) -> None:
        """Print and record a warning, also in a quiet run."""
        self.line(f"warning  {text}")

    def _print(self, text: str) -> None:
        self._write(f"{ERASE if self.drawn else ''}{text}\n")
        self.drawn = False

    def _write(self, text: str) -> None:
        try:
            self.stream.write(text)
            self.stream.flush()
        except OSError:  # the console is closed; the file gets every line
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
            self.live = False

    def _record(self, text: str | None) -> None:
        if text is not None:
            self.unwritten.append(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
            del self.unwritten[:-MAX_UNWRITTEN]
        if self.folder is None:
            return
        try:
            if self.file is None:
                self._open_file()
            append(self.file, "".join(self.unwritten).encode(errors="backslashreplace"))
            self.unwritten.clear()
        except OSError as error:
            self._warn_of("train.log", error)

    def _warn_of(self, name: str, error: OSError) -> None:
        if name not in self.failed:  # once a launch
            self.failed.add(name)
            self._print(f"warning  {self.folder / name} can't be written: {error.strerror}; the next line tries again")

    def record_traceback(self, error: BaseException) -> None:
        """Print and record the traceback of an error."""
        for text in traceback.format_exception(error):
            for line in text.rstrip().splitlines():
                self.line(f"fault    {line}")

    def progress(self, text: str) -> None:
        """Redraw the progress line, cut to the width of the window; without a terminal nothing happens."""
        if self.live:
            self._write(ERASE + printable(text)[: width_of(self.stream) - 1])
            self.drawn = True

    def row(self, table: str, values: Mapping[str, Any]) -> None:
        """Add a row to `log/<table>.csv`; `values` has an iteration."""
        waiting = self.rows.setdefault(table, [])
        waiting.append(dict(values))
        try:
            if table not in self.tables:
                self.tables[table] = CsvTable(self.folder / f"{table}.csv", iteration=0)
            while waiting:
                self.tables[table].append(waiting[0])
                waiting.pop(0)
        except OSError as error:
            self._warn_of(f"{table}.csv", error)
        self._draw(lambda board: board.row(table, values))

    def replace_rows(self, table: str, iteration: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Put rows of an iteration into `log/<table>.csv`, in place of those of a launch that was killed after it."""
        path = self.folder / f"{table}.csv"
        with warn_on_write_error(path, self.warn):
            self.tables[table] = CsvTable(path, iteration - 1)
            self.tables[table].extend([{"iteration": iteration, **row} for row in rows])

    def pictures(self, path: Path, pictures: Sequence[Tensor], tag: str, iteration: int | None) -> None:
        """Write images (C, H, W) in [0, 1] of equal size side by side to a PNG, and under `tag` for TensorBoard."""
        with warn_on_write_error(path, self._warn_once):
            picture = save_pictures(path, pictures)
            self._draw(lambda board: board.picture(tag, picture, iteration))

    def _warn_once(self, text: str) -> None:
        if "pictures" not in self.failed:
            self.failed.add("pictures")
            self.warn(f"{text}; training continues without such pictures")

    def _draw(self, what: Callable[[Board | WandbBoard], None]) -> None:
        for board in list(self.boards):
            try:
                what(board)
            except OSError as error:
                self.boards.remove(board)
                self.warn(f"{board.name} gets no more rows of this launch: {error}; the CSV files have them")

    def close(self) -> None:
        """Erase the progress line and close the files; to be called at the end of every launch."""
        if self.drawn:
            self._write(ERASE)
            self.drawn = False
        self._draw(lambda board: board.close())
        if self.file:
            self.file.close()


class SilentLog:
    """Replaces `RunLog` on all ranks but 0: writes this rank's pictures and nothing else."""

    live = False

    def pictures(self, path: Path, pictures: Sequence[Tensor], *_: Any) -> None:
        """Write the pictures of this rank's samples. Rank 0 warns if they cannot be written."""
        with warn_on_write_error(path, lambda text: None):
            save_pictures(path, pictures)

    def record_traceback(self, error: BaseException) -> None:
        """Print the place of a fault in the code."""
        traceback.print_exception(error)

    def __getattr__(self, name: str) -> Callable:
        return lambda *args, **kwargs: None


def start_log(settings: Mapping[str, Any], notices: Iterable[str], preface: Iterable[str] = (),
              writes: bool = True) -> RunLog | SilentLog:
    """Start the log of a command and print its first lines.

    Args:
        settings: the `log` section of the options.
        notices: notes from reading the options. preface: lines to print before them.
        writes: whether this rank writes.
    """
    if not writes:
        return SilentLog()
    log = RunLog(**{key: settings[key] for key in ("quiet", "tensorboard", "wandb")})
    for text in (*preface, *(f"note     {notice}" for notice in notices)):
        log.line(text)
    return log
