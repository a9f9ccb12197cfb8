"""Lines for a terminal: colours, width, and figures that people read."""

from __future__ import annotations

import os
import re
import time
import unicodedata

ERASE = "\r\x1b[K"  # to the beginning of the line, and nothing right of it
YELLOW, GREEN, RED = "33", "32", "31"
COLOURS = {"warning": YELLOW, "absent": YELLOW, "machine": YELLOW, "stopped": YELLOW, "warn": YELLOW, "finished": GREEN,
           "done": GREEN, "ok": GREEN, "fail": RED, "error:": RED}  # by a line's first word


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
