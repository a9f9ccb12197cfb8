"""The metrics of every validation of a run, and which validation is the best."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any


class History:
    """The validations of a run, oldest first.

    Args:
        metric: name of the test metric that decides which validation is the best. mode: "max" or "min".
        rows: {"iteration": n, "<set>.<metric>": value, ...} of each.
    """

    def __init__(self, metric: str, mode: str, rows: Iterable[dict[str, Any]] = ()):
        self.metric, self.mode, self.rows = metric, mode, list(rows)

    def column(self, row: Mapping[str, Any]) -> str | None:
        """Return the first key of a row that is the deciding metric, of whatever test set."""
        return next((key for key in row if key == self.metric or key.endswith(f".{self.metric}")), None)

    def value(self, row: Mapping[str, Any]) -> float | None:
        """Return the deciding metric of a row."""
        return row.get(self.column(row))

    @property
    def best_row(self) -> dict[str, Any] | None:
        """The best validation so far, the first of equals; values that are not finite do not count."""
        rows = [row for row in self.rows if self.value(row) is not None and math.isfinite(self.value(row))]
        return (max if self.mode == "max" else min)(rows, key=self.value, default=None)

    @property
    def best(self) -> int | None:
        """The iteration of the best validation so far."""
        return self.best_row["iteration"] if self.best_row else None

    def has(self, iteration: int) -> bool:
        """Return whether it holds the validation of an iteration."""
        return any(row["iteration"] == iteration for row in self.rows)
