"""The learning rate is torch's, computed from the step alone."""

import pytest
import torch

import schedules

BASE, STEPS = 3e-4, 400


def torch_rates(make):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=BASE)
    scheduler = make(optimizer)
    for _ in range(STEPS):
        yield optimizer.param_groups[0]["lr"]
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("milestones, gamma", [([50, 120, 121, 300], 0.5), ([10, 10, 40], 0.1), ([], 0.5)])
def test_multi_step_is_torchs(milestones, gamma):
    ours = schedules.multi_step(milestones, gamma)
    rates = list(torch_rates(lambda o: torch.optim.lr_scheduler.MultiStepLR(o, milestones, gamma)))
    assert [ours(BASE, n) for n in range(STEPS)] == pytest.approx(rates, rel=1e-12)


@pytest.mark.parametrize("period, multiplier, eta_min", [(100, 1, 1e-7), (37, 1, 0.0), (30, 2, 1e-6), (1, 3, 0.0)])
def test_cosine_warm_restarts_is_torchs(period, multiplier, eta_min):
    ours = schedules.cosine_warm_restarts(period, multiplier, eta_min)
    rates = torch_rates(lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, period, multiplier, eta_min))
    assert [ours(BASE, n) for n in range(STEPS)] == pytest.approx(list(rates), rel=1e-12, abs=1e-18)


def test_last_step_of_one_period_does_not_restart():
    """KAIR passes the 1-based iteration and trains its last step at the full rate."""
    ours = schedules.cosine_warm_restarts(STEPS)
    assert ours(BASE, STEPS - 1) < 1e-4 * BASE
    assert ours(BASE, STEPS) == BASE


def test_impossible_periods_are_refused():
    with pytest.raises(ValueError, match="must be >= 1"):
        schedules.cosine_warm_restarts(0)
