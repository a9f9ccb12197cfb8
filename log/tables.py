"""Write CSV files that can be cut back to an iteration and never end in half a row."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from storage.files import save_file


def append(file: BinaryIO, text: bytes) -> None:
    """Append all of `text` to an unbuffered file, or none of it. Raises: OSError."""
    end = file.seek(0, os.SEEK_END)
    try:
        while text:
            text = text[file.write(text):]
    except OSError:
        file.truncate(end)
        raise


class CsvTable:
    """A CSV file (RFC 4180) with an `iteration` column, which gains columns as rows need them.

    Epochs are counted from 1; a table that counts them from 0 is raised by one when it is opened.

    Args: path: the file. iteration: rows of later iterations are removed.
    """

    def __init__(self, path: Path, iteration: int):
        self.path, self.columns = path, []
        if path.exists():
            self.columns, rows = self._read()
            if "iteration" in self.columns:
                rows = [row for row in rows if int(row["iteration"]) <= iteration]
                if any(row.get("epoch") == "0" for row in rows):  # of an earlier version, which counted epochs from 0
                    rows = [row | {"epoch": int(row["epoch"]) + 1} if row["epoch"].isdecimal() else row for row in rows]
                write_table(path, self.columns, rows)
            else:  # not ours, or saved by another program in its own format: kept under another name
                self.columns = []
                os.replace(path, path.with_suffix(".csv.old"))

    def append(self, values: Mapping[str, Any]) -> None:
        """Append a row, or nothing of it. Raises: OSError."""
        self.extend([values])

    def extend(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append rows, or nothing of them. Raises: OSError."""
        if new := list(dict.fromkeys(key for row in rows for key in row if key not in self.columns)):
            write_table(self.path, self.columns + new, self._read()[1] if self.columns else [])
            self.columns += new
        with open(self.path, "ab", buffering=0) as file:
            append(file, csv_text(self.columns, rows))

    def _read(self) -> tuple[list[str], list[dict[str, str]]]:
        """Return columns and rows, without rows that a kill or a power cut damaged."""
        text = self.path.read_bytes().decode("utf-8-sig", errors="surrogateescape")
        complete = [line for line in text.split("\n")[:-1] if "\0" not in line]
        columns, *rows = list(csv.reader(complete)) or [[]]
        rows = [dict(zip(columns, row)) for row in rows if len(row) == len(columns)]
        return columns, [row for row in rows if row.get("iteration", "").isdecimal()]


def csv_text(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> bytes:
    """Return rows as the text of a CSV file, without a header."""
    text = io.StringIO(newline="")
    csv.DictWriter(text, columns, restval="").writerows(rows)
    return text.getvalue().encode(errors="surrogateescape")  # a column may be a folder's name, in any bytes


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Replace a CSV file by a complete new one; cells that a row lacks are empty."""
    text = csv_text(columns, [dict(zip(columns, columns)), *rows])
    if not path.exists() or path.read_bytes() != text:  # without a change nothing is written, for the disk may be full
        save_file(path, text)
