"""Learning rates as pure functions of the step, equal to torch's schedulers.

`step` is the number of finished optimizer steps, like torch's `scheduler.last_epoch`: the first iteration trains with
`schedule(0)`. KAIR passes the 1-based iteration instead, so that its last step restarts the cosine at the full rate;
here it does not. A schedule has no state, so there is nothing to save or restore.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence

from options import OptionError

Schedule = Callable[[float, int], float]  # (base learning rate, step) -> learning rate


def multi_step(milestones: Sequence[int], gamma: float = 0.1) -> Schedule:
    """Return `torch.optim.lr_scheduler.MultiStepLR`: times gamma at each milestone (a repeated one counts twice)."""
    ordered = sorted(milestones)
    return lambda base, step: base * gamma ** bisect_right(ordered, step)


def cosine_warm_restarts(period: int, multiplier: int = 1, eta_min: float = 0.0) -> Schedule:
    """Return `torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(T_0=period, T_mult=multiplier)`.

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


def cosine(steps: int, eta_min: float = 0.0) -> Schedule:
    """Return `torch.optim.lr_scheduler.CosineAnnealingLR(T_max=steps)`, which stays at its end; torch's rises again.

    Raises: OptionError when steps is below 1.
    """
    if steps < 1:
        raise OptionError(f"a cosine over {steps} steps: must be >= 1")
    return lambda base, step: between(base, eta_min, step / steps)


def one_cycle(steps: int, warmup: float = 0.3, div_factor: float = 25.0, final_div_factor: float = 1e4) -> Schedule:
    """Return `torch.optim.lr_scheduler.OneCycleLR(max_lr=base, total_steps=steps)`: up to the base rate, then down.

    Args:
        steps: steps of the run; later ones have the lowest rate, where torch's raises an error.
        warmup: share of the steps in which the rate rises, in (0, 1) (torch: pct_start).
        div_factor: base rate divided by first rate. final_div_factor: first rate divided by last rate.
    Raises: OptionError for an impossible value.
    Source: Smith & Topin 2018, "Super-Convergence", section 3; torch's two phases of cosines.
    """
    phase = cycle(steps, warmup)

    def schedule(base: float, step: int) -> float:
        rising, share = phase(step)
        first = base / div_factor
        return between(first, base, share) if rising else between(base, first / final_div_factor, share)

    return schedule


def one_cycle_momentum(steps: int, warmup: float = 0.3, highest: float = 0.95) -> Schedule:
    """Return OneCycleLR's schedule of SGD's momentum or Adam's beta1: from `highest` down to the base, then up.

    Args: steps, warmup: as `one_cycle`. highest: torch's max_momentum.
    Returns: (lowest momentum, step) -> momentum.
    """
    phase = cycle(steps, warmup)

    def schedule(base: float, step: int) -> float:
        falling, share = phase(step)
        return between(highest, base, share) if falling else between(base, highest, share)

    return schedule


def cycle(steps: int, warmup: float) -> Callable[[int], tuple[bool, float]]:
    """Return a function of the step: whether it is in the first of two phases, and the finished share of its phase."""
    if steps < 2 or not 0 < warmup < 1:
        raise OptionError(f"one cycle of {steps} steps with a share of {warmup} to warm up: the run must have >= 2 "
                          "steps and the share lie between 0 and 1")
    top, last = warmup * steps - 1, steps - 1  # at top the rate is highest; torch's counts from 0 as well
    return lambda step: (True, step / top if top > 0 else 1.0) if step <= top else (False, (step - top) / (last - top))


def between(start: float, end: float, share: float) -> float:
    """Return the value at a share (0 to 1, beyond it stays) of half a cosine wave from start to end."""
    return end + (start - end) * (1 + math.cos(math.pi * min(share, 1.0))) / 2


def constant() -> Schedule:
    """Return the schedule that keeps the base rate."""
    return lambda base, step: base
