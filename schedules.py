"""Learning rate as a pure function of the step, equal to torch's schedulers.

`step` counts the optimizer steps already done, as torch's `scheduler.last_epoch` does: the first iteration trains
with `schedule(0)`. KAIR passes the 1-based iteration instead, so that its very last step restarts the cosine at the
full rate; here it does not. Nothing is stored, nothing can be restored wrongly.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence

from options import OptionError

Schedule = Callable[[float, int], float]  # (base learning rate, step) -> learning rate


def multi_step(milestones: Sequence[int], gamma: float = 0.1) -> Schedule:
    """`torch.optim.lr_scheduler.MultiStepLR`: times gamma at each milestone (a repeated one counts twice)."""
    ordered = sorted(milestones)
    return lambda base, step: base * gamma ** bisect_right(ordered, step)


def cosine_warm_restarts(period: int, multiplier: int = 1, eta_min: float = 0.0) -> Schedule:
    """`torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(T_0=period, T_mult=multiplier)`.

    Source: SGDR, Loshchilov & Hutter 2017, equation 5.
    Raises: OptionError when period or multiplier is below 1.
    """
    if period < 1 or multiplier < 1:
        raise OptionError(f"train: G_scheduler_periods {period} and G_scheduler_restart_weights {multiplier} "
                          "must be >= 1")

    def schedule(base: float, step: int) -> float:
        done, length = step, period
        while done >= length:  # logarithmic when periods grow; a division when they do not
            if multiplier == 1:
                done %= length
            else:
                done, length = done - length, length * multiplier
        return eta_min + (base - eta_min) * (1 + math.cos(math.pi * done / length)) / 2

    return schedule


def constant() -> Schedule:
    """The base rate, always."""
    return lambda base, step: base
