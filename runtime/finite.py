"""Find losses and gradients that are not finite before they are saved."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from checkpoint import what_is_kept
from data.sampler import describe_samples
from runtime import distributed

MIN_SCALE = 2.0**-10  # of fp16's loss: the scale starts at 2**16 and each skipped step halves it


class NonFiniteLoss(RuntimeError):
    """Raised when a loss, gradient or weight is NaN or infinite; the last checkpoint is from before."""


class FiniteCheck:
    """Keeps losses and gradient norms of steps until they are checked together, to wait for the device rarely.

    Args: scaler: gradient scaler of fp16; None: another precision. folder: of the run's checkpoints, for messages.
    """

    def __init__(self, scaler: torch.amp.GradScaler | None, folder: Path):
        self.scaler, self.folder = scaler, folder
        self.pending: list[tuple[int, dict[str, torch.Tensor], dict[str, torch.Tensor]]] = []

    def add(self, iteration: int, losses: dict[str, torch.Tensor], norms: dict[str, torch.Tensor]) -> None:
        """Add the losses and gradient norms of a step, by name, scalars."""
        self.pending.append((iteration, losses, norms))

    def check(self, explain: Callable[[], str] = lambda: "") -> None:
        """Check all steps since the last call.

        Args: explain: called for a step that is not finite; its text becomes a part of the message.
        Raises: NonFiniteLoss, which names the iteration and the terms.
        """
        scaler = self.scaler
        if self.pending and scaler and scaler.get_scale() < MIN_SCALE:
            raise NonFiniteLoss(f"the gradient was not finite in so many steps until iteration {self.pending[-1][0]} "
                                f"that fp16's loss scale fell to {scaler.get_scale():.1e}: the network no longer "
                                f'learns; {what_is_kept(self.folder)}; set train.amp to "bf16", or lower the '
                                "learning rate")
        pending, self.pending = self.pending, []
        for iteration, losses, norms in pending:
            values = {name: float(value) for name, value in {**losses, **norms}.items()}
            if not all(math.isfinite(value) for value in values.values()):
                terms = ", ".join(f"{name} {value}" for name, value in values.items())
                what = "loss" if not all(math.isfinite(values[name]) for name in losses) else "gradient"
                raise NonFiniteLoss(f"the {what} is not finite at iteration {iteration}: {terms}; {explain()}"
                                    f"{what_is_kept(self.folder)}; lower the learning rate, look at the samples, or "
                                    f'set train.on_nan to "skip"; --replay {iteration} computes that step again')


def compute_again(run: Any) -> str:
    """Compute the last step of a `train.Run` again, which changed nothing since it was not finite. All ranks call it.

    A second computation without fault trains the weights, so the run must end.

    Returns: whether the result is the same, with the micro-batches and samples that are not finite; ends in "; ".
    """
    model = run.model
    first = model.numbers()
    model.optimize_parameters(run.iteration)
    second = losses, _ = model.numbers()
    equal = distributed.gather(repr(first) == repr(second))  # as text, since NaN differs from itself
    if not all(equal):
        ranks = [str(rank) for rank, same in enumerate(equal) if not same]
        where = f" on rank {', '.join(ranks)}" if len(equal) > 1 else ""
        return f"another result when computed again{where}: the machine, or a kernel without fixed order; "
    keys = run.batches.keys_of(run.iteration - run.started_at)
    size = len(keys) // len(losses)
    found = [(number, describe_samples(run.train_set, keys[place * size : (place + 1) * size]))
             for place, (number, terms) in enumerate(losses.items())
             if not all(math.isfinite(value) for value in terms.values())]
    found = sum(distributed.gather(found), []) or [("any", describe_samples(run.train_set, keys))]
    return "the same again: " + "; ".join(f"micro-batch {number}, {names}" for number, names in found) + "; "

