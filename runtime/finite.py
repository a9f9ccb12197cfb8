"""Find losses and gradients that are not finite before they are saved."""

from __future__ import annotations

import math

import torch

MIN_SCALE = 2.0**-10  # of fp16's loss: the scale starts at 2**16 and each skipped step halves it


class NonFiniteLoss(RuntimeError):
    """Raised when a loss, gradient or weight is NaN or infinite; the last checkpoint is from before."""


class FiniteCheck:
    """Keeps losses and gradient norms of steps until they are checked together, to wait for the device rarely.

    Args: scaler: gradient scaler of fp16; None: another precision.
    """

    def __init__(self, scaler: torch.amp.GradScaler | None):
        self.scaler = scaler
        self.pending: list[tuple[int, dict[str, torch.Tensor], dict[str, torch.Tensor]]] = []

    def add(self, iteration: int, losses: dict[str, torch.Tensor], norms: dict[str, torch.Tensor]) -> None:
        """Add the losses and gradient norms of a step, by name, scalars."""
        self.pending.append((iteration, losses, norms))

    def check(self) -> None:
        """Check all steps since the last call. Raises: NonFiniteLoss, which names the iteration and the terms."""
        scaler = self.scaler
        if self.pending and scaler and scaler.get_scale() < MIN_SCALE:
            raise NonFiniteLoss(f"the gradient was not finite in so many steps until iteration {self.pending[-1][0]} "
                                f"that fp16's loss scale fell to {scaler.get_scale():.1e}: the network no longer "
                                'learns; the last checkpoint is intact; set train.amp to "bf16", or lower the '
                                "learning rate")
        pending, self.pending = self.pending, []
        for iteration, losses, norms in pending:
            values = {name: float(value) for name, value in {**losses, **norms}.items()}
            if not all(math.isfinite(value) for value in values.values()):
                terms = ", ".join(f"{name} {value}" for name, value in values.items())
                what = "loss" if not all(math.isfinite(values[name]) for name in losses) else "gradient"
                raise NonFiniteLoss(f"the {what} is not finite at iteration {iteration}: {terms}; the last checkpoint "
                                    'is intact; lower the learning rate, or set train.on_nan to "skip"; '
                                    f"--replay {iteration} shows the samples of that step")
