"""Format lines for a terminal: colours, width, durations and numbers."""

from __future__ import annotations

import os
import re
import time

ERASE = "\r\x1b[K"  # moves to the beginning of the line and erases it
YELLOW, GREEN, RED = "33", "32", "31"
COLOURS = {"warning": YELLOW, "absent": YELLOW, "machine": YELLOW, "stopped": YELLOW, "warn": YELLOW, "finished": GREEN,
           "done": GREEN, "ok": GREEN, "fail": RED, "error:": RED}  # by the first word of a line


def is_terminal(stream) -> bool:
    """Return whether a line on a stream can be redrawn."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def status(word: str, stream) -> str:
    """Return the first word of a line in its colour, on a terminal and unless NO_COLOR is set (no-color.org)."""
    if word not in COLOURS or not is_terminal(stream) or os.environ.get("NO_COLOR"):
        return word
    return f"\x1b[{COLOURS[word]}m{word}\x1b[0m"


def width_of(stream) -> int:
    """Return the number of columns of the window."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except OSError:
        return 80


def printable(text: str) -> str:
    """Replace control characters, which names of files may contain, by question marks."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", "?", text)


class Pace:
    """Measures steps per second and the time left, from the start of this launch.

    `paused` holds the seconds of validations: they do not count for the speed, but for the time left.

    Args: start: iteration at the start of the launch. total: last iteration of the run.
    """

    def __init__(self, start: int, total: int):
        self.start, self.total, self.began = start, total, time.monotonic()
        self.paused = 0.0

    def describe(self, iteration: int) -> str:
        """Return speed and time left as '2.31 it/s, 01:02 left'."""
        spent, done = time.monotonic() - self.began, iteration - self.start
        if done <= 0 or spent <= self.paused:
            return "-- it/s"
        rate = done / (spent - self.paused)
        speed = f"{rate:.2f} it/s" if rate >= 1 else f"{1 / rate:.2f} s/it"
        return f"{speed}, {duration((self.total - iteration) * spent / done)} left"


def duration(seconds: float) -> str:
    """Return seconds as '1d 02:03:04', '2:03:04' or '03:04'."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d {hour:02d}:{minute:02d}:{second:02d}"
    return f"{hour}:{minute:02d}:{second:02d}" if hour else f"{minute:02d}:{second:02d}"


def number(value: float) -> str:
    """Return a number with four decimals, or in scientific notation where it is small or large."""
    return f"{value:.4e}" if value and (abs(value) < 1e-3 or abs(value) >= 1e5) else f"{value:.4f}"
