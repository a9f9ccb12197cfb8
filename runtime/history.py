"""The metrics of every validation of a run, and which is the best."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


class History:
    """The validations of a run, oldest first.

    Args: metric: name of the test metric that says which is the best. mode: "max" or "min".
    """

    def __init__(self, metric: str, mode: str):
        self.metric, self.mode = metric, mode
        self.rows: list[dict[str, Any]] = []  # {"iteration": n, "<set>.<metric>": value, ...}

    def value(self, row: Mapping[str, Any]) -> float | None:
        """The metric that counts, in a row of the history."""
        return next((value for key, value in row.items() if key == self.metric or key.endswith(f".{self.metric}")),
                    None)

    @property
    def best(self) -> int | None:
        """The iteration of the best validation so far."""
        rows = [row for row in self.rows if self.value(row) is not None and math.isfinite(self.value(row))]
        choose = max if self.mode == "max" else min
        return choose(rows, key=self.value)["iteration"] if rows else None

    def has(self, iteration: int) -> bool:
        """Whether the validation of this iteration is in it."""
        return iteration in [row["iteration"] for row in self.rows]
