"""The metrics of every validation of a run, and which is the best; the means of losses between two rows of the log."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor


class LossMeans:
    """Averages loss terms over the steps since the last row, without waiting for the device."""

    def __init__(self):
        self.num_steps = 0
        self.sums: dict[tuple[str, ...], list] = {}  # names of terms that come together -> their sums, number of steps

    def add(self, terms: Mapping[str, Tensor]) -> None:
        """Add the terms of a step, scalars on one device. Some steps of a recipe have more terms than others."""
        values = torch.stack([term.detach().double() for term in terms.values()])
        found = self.sums.setdefault(tuple(terms), [torch.zeros_like(values), 0])
        found[0] += values
        found[1] += 1
        self.num_steps += 1

    def close(self) -> dict[str, float]:
        """Return the means and start over. Waits for the device."""
        totals: dict[str, tuple[float, int]] = {}
        for names, (sums, count) in self.sums.items():
            for name, value in zip(names, sums.tolist()):
                known = totals.get(name, (0.0, 0))
                totals[name] = known[0] + value, known[1] + count
        self.num_steps, self.sums = 0, {}
        return {name: value / count for name, (value, count) in totals.items()}


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
