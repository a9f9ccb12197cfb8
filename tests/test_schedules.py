"""The learning rate is torch's, computed from the step alone."""

import pytest
import torch

from models.model_plain import build_schedule
from runtime import schedules

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


@pytest.mark.parametrize("eta_min", [0.0, 1e-6])
def test_cosine_is_torchs(eta_min):
    ours = schedules.cosine(STEPS, eta_min)
    rates = torch_rates(lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, STEPS, eta_min))
    assert [ours(BASE, n) for n in range(STEPS)] == pytest.approx(list(rates), rel=1e-8)  # theirs is a recurrence
    assert ours(BASE, STEPS) == ours(BASE, STEPS + 9) == eta_min


@pytest.mark.parametrize("steps, over", [
    (STEPS, {}), (STEPS, {"pct_start": 0.1, "div_factor": 5, "final_div_factor": 9}), (2, {"pct_start": 0.7}), (7, {}),
    (3, {})])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_one_cycle_is_torchs_in_rate_and_momentum(kind, steps, over):
    over = dict(over)
    momentum = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    optimizer = kind([torch.nn.Parameter(torch.zeros(1))], lr=BASE, **momentum)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, BASE, steps, **over)
    warmup = over.pop("pct_start", 0.3)
    rate, beta = schedules.one_cycle(steps, warmup, **over), schedules.one_cycle_momentum(steps, warmup)
    for n in range(steps):
        group = optimizer.param_groups[0]
        assert rate(BASE, n) == pytest.approx(group["lr"], rel=1e-9)
        assert beta(0.85, n) == pytest.approx(group["momentum"] if momentum else group["betas"][0], rel=1e-12)
        optimizer.step()
        if n < steps - 1:
            scheduler.step()
    assert rate(BASE, steps) == rate(BASE, steps + 5) == rate(BASE, steps - 1)


def test_one_cycle_may_begin_at_the_top():
    """Where torch divides by zero: a single step to warm up in."""
    assert schedules.one_cycle(4, 0.25)(BASE, 0) == BASE


@pytest.mark.parametrize("options", [
    {"G_scheduler_type": "MultiStepLR", "G_scheduler_milestones": [2, 5], "G_scheduler_gamma": 0.5},
    {"G_scheduler_type": "CosineAnnealingWarmRestarts", "G_scheduler_periods": None, "G_scheduler_restart_weights": 1}])
def test_ahead_an_iteration_has_the_rate_that_follows_it(options):
    """As in KAIR, whose loop calls scheduler.step(n) before step n: the last step of a period restarts it."""
    options = {"total_iter": 8, "G_scheduler_eta_min": 0.0, **options}
    usual, ahead = (build_schedule({**options, "G_scheduler_ahead": value}) for value in (False, True))
    assert [ahead(BASE, n) for n in range(8)] == [usual(BASE, n + 1) for n in range(8)] != [usual(BASE, n)
                                                                                          for n in range(8)]


def test_last_step_of_one_period_does_not_restart():
    """KAIR passes the 1-based iteration and trains its last step at the full rate."""
    ours = schedules.cosine_warm_restarts(STEPS)
    assert ours(BASE, STEPS - 1) < 1e-4 * BASE
    assert ours(BASE, STEPS) == BASE


def test_impossible_periods_are_refused():
    with pytest.raises(ValueError, match="must be >= 1"):
        schedules.cosine_warm_restarts(0)
    for make in (lambda: schedules.cosine(0), lambda: schedules.one_cycle(1), lambda: schedules.one_cycle(9, 1.5)):
        with pytest.raises(ValueError, match=">= "):
            make()
