"""Losses and gradients that are not finite: found before they are saved."""

from __future__ import annotations

import math

import torch

LEAST_SCALE = 2.0**-10  # of fp16's loss scale: it begins at 2**16 and is halved by each step that is left out


class NonFiniteLoss(RuntimeError):
    """The loss became NaN or infinite; the last checkpoint is from before."""


class FiniteCheck:
    """Losses and gradient norms of the steps that are not checked yet.

    Args: scaler: fp16's, if any.
    """

    def __init__(self, scaler: torch.amp.GradScaler | None):
        self.scaler = scaler
        self.pending: list[tuple[int, dict[str, torch.Tensor], dict[str, torch.Tensor]]] = []

    def add(self, iteration: int, losses: dict[str, torch.Tensor], norms: dict[str, torch.Tensor]) -> None:
        """Note a step."""
        self.pending.append((iteration, losses, norms))

    def check(self) -> None:
        """Stop at a NaN or infinite loss. Looks at all steps since the last look: the device is waited for rarely."""
        scaler = self.scaler
        if self.pending and scaler and scaler.get_scale() < LEAST_SCALE:
            raise NonFiniteLoss(f"the gradient was not finite in so many steps until iteration {self.pending[-1][0]} "
                                f"that fp16's loss scale fell to {scaler.get_scale():.1e}: nothing is learnt any more; "
                                'the last checkpoint is intact; set train.amp to "bf16", or lower the learning rate')
        pending, self.pending = self.pending, []
        for iteration, losses, norms in pending:
            values = {name: float(value) for name, value in {**losses, **norms}.items()}
            if not all(math.isfinite(value) for value in values.values()):
                terms = ", ".join(f"{name} {value}" for name, value in values.items())
                what = "loss" if not all(math.isfinite(values[name]) for name in losses) else "gradient"
                raise NonFiniteLoss(f"the {what} is not finite at iteration {iteration}: {terms}; the last checkpoint "
                                    'is intact; lower the learning rate, or set train.on_nan to "skip"')
