"""CSV files that can be cut back to an iteration and are never left with half a row."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from storage.files import save_file


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
