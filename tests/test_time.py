"""A run and time: saves by the clock, an end by the clock, a stop that fits the grace period; none changes a bit."""

import os
import re
import signal
import time

import pytest

import checkpoint
from options import OptionError
from runtime.hooks import Hooks
from runtime.watchdog import Watch, end_of, watch
from tests import tiny, world
from tests.runs import assert_equal_runs, run, run_until, straight_and_stopped
from tests.test_signals import tiny_file

TOTAL = 9
ALWAYS = 1e-9  # minutes: every step is late
LAYOUTS = {"split": {}, "bundle": {"layout": "bundle", "keep_last_n": 1},
           "latest only": {"layout": "bundle", "name": None}}

pytestmark = pytest.mark.usefixtures("tiny_tables")


# ---------------------------------------------------------------- checkpoint.every_minutes


@pytest.mark.parametrize("background", [False, True], ids=["waiting", "in background"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_saves_by_the_clock_change_no_bit_and_leave_nothing(tmp_path, layout, background):
    def write(name, _):
        keep = {**LAYOUTS[layout], "async": background, "every_minutes": ALWAYS if name == "two" else 0}
        return tiny.write(tmp_path, name, checkpoint=keep, train={"checkpoint_save": 5})

    one, two = straight_and_stopped(write, [2, 6])
    assert_equal_runs(one, two, TOTAL)
    assert sorted(os.listdir(one / "models")) == sorted(os.listdir(two / "models"))


class Power(Exception):
    """What ends a run without a save."""


def fail(run):
    raise Power


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_killed_run_resumes_from_its_one_save_by_the_clock(tmp_path, layout, capsys):
    keep = {**LAYOUTS[layout], "every_minutes": ALWAYS, "best": None}
    path = tiny.write(tmp_path, "two", checkpoint=keep, train={"checkpoint_save": 4, "checkpoint_test": 0})
    for killed in (3, 8):
        with pytest.raises(Power):
            run("-opt", path, hooks=[tiny.At("after_step", killed, fail)])
        sets = [found for found in checkpoint.find_sets(tmp_path / "two/models") if found.record["reason"] == "clock"]
        assert [found.iteration for found in sets] == [killed - 1]
    latest = tmp_path / "two/models" / ("latest.pt" if keep.get("layout") else "latest.json")
    assert checkpoint.locate(latest).iteration == 4  # the regular one is still there, under its names
    assert run("-opt", path) == 0 and "iteration 7 of 9" in capsys.readouterr().out
    run_until(None, "-opt", tiny.write(tmp_path, "one", train={"checkpoint_save": 4, "checkpoint_test": 0}))
    assert_equal_runs(tmp_path / "one", tmp_path / "two", TOTAL)


def test_without_an_interval_only_regular_saves_are_made(tmp_path, capsys):
    assert run("-opt", tiny.write(tmp_path, checkpoint={"every_minutes": 0}, train={"checkpoint_test": 0})) == 0
    assert capsys.readouterr().out.count("saved  ") == 5


def test_all_processes_save_by_the_clock_of_the_first(tmp_path):
    """Two ranks that decided by their own clocks would wait for each other at different steps."""
    train = {"checkpoint_test": 0, "accumulate": 2}
    path = tiny_file(tmp_path, train=train, checkpoint={"every_minutes": ALWAYS})
    codes, said = world.run(tmp_path / "out", 2, "-opt", path)
    assert codes == [0, 0] and said[0].count("saved  ") == 6, said
    assert run("-opt", tiny_file(tmp_path, "straight", train=train)) == 0
    assert_equal_runs(tmp_path / "straight", tmp_path / "run")


# ---------------------------------------------------------------- train.stop_after


@pytest.mark.parametrize("text, seconds", [
    ("11h30m", 41400), ("90m", 5400), ("1d2h3m4s", 93784), ("45s", 45), ("20", 20), (300.0, 300), (0.5, 0.5)])
def test_a_time_is_read_in_every_form(text, seconds):
    assert end_of(text, 1000.0) == 1000 + seconds


def test_slurm_tells_when_its_job_ends(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 3600))
    assert end_of("slurm", 0.0) - time.monotonic() == pytest.approx(3600, abs=60)
    monkeypatch.delenv("SLURM_JOB_END_TIME")
    with pytest.raises(ValueError, match='"slurm" needs the variable SLURM_JOB_END_TIME'):
        end_of("slurm", 0.0)


@pytest.mark.parametrize("value", ["soon", "", "11:30:00", "0m", 0, -5, "h", "1m1h"])
def test_what_is_not_a_time_is_one_line(tmp_path, value):
    path = tiny.write(tmp_path, train={"stop_after": value})
    expected = r'run.json: train.stop_after: .* is not a (time as "11h30m"|text or a number > 0)'
    with pytest.raises(OptionError, match=expected) as found:
        run("-opt", path)
    assert "\n" not in str(found.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("left, background, asked", [(52, False, False), (50, False, True), (62, True, True),
                                                     (64, True, False)])
def test_the_end_comes_early_enough_for_what_was_measured(monkeypatch, left, background, asked):
    """A step is shorter than a sample; a save may have to wait for the one in progress. A quarter more, and 1 s."""
    sent, now = [], time.monotonic()
    monkeypatch.setattr(os, "kill", lambda process, number: sent.append((process, number)))
    watch = Watch()
    watch.began, watch.end, watch.background = now - 1000, now + left, background
    watch.longest = {"step": 2.0, "sample": 30.0, "save": 10.0}
    watch._stop_in_time(0.5)
    watch._stop_in_time(0.5)  # asked once
    assert sent == [(os.getpid(), signal.SIGUSR1)] * asked


def test_half_of_the_time_is_used_whatever_was_measured(monkeypatch):
    sent, watch = [], Watch()
    monkeypatch.setattr(os, "kill", lambda process, number: sent.append(number))
    watch.longest = {"sample": 1e6}
    for began, end in ((-49, 51), (-51, 49)):
        watch.began, watch.end = time.monotonic() + began, time.monotonic() + end
        watch._stop_in_time(0.5)
        assert bool(sent) == (began == -51)


def test_what_this_launch_measures_replaces_what_an_earlier_one_did(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    watch = Watch()
    watch.inherit({"step": 9.0, "sample": 8.0, "save": 7, "other": 6.0, "rest": "x"})
    assert watch.longest == {"step": 9.0, "sample": 8.0, "save": 7.0}
    for kind, seconds in (("step", 60), ("wait", 99), ("step", 2), ("step", 1), ("sample", 3), ("sample", 5), ("", 0)):
        watch.begin(kind, "")
        clock[0] += seconds
    assert watch.longest == {"step": 2.0, "sample": 5.0, "save": 7.0}  # without the first step, which compiles
    watch.inherit(None)
    watch.begin("sample", "one that is not over yet")
    clock[0] += 50
    assert watch.terms() == {"a validation sample": 50.0, "a save": 7.0}


def strike(run):
    """Let the time of `train.stop_after` be over; until the watching thread sees it, steps are slow."""
    assert watch.end - watch.began == pytest.approx(5400)
    watch.end = time.monotonic()


class Slow(Hooks):
    def after_step(self, run):
        time.sleep(0.05)


def test_a_run_in_time_slots_ends_as_a_straight_one(tmp_path, capsys):
    """It stops as by SIGUSR1, and saves."""
    def launch(stop, *words):
        hooks = [Slow(), tiny.At("after_step", stop, strike)] if stop else []
        assert run(*words, hooks=hooks) == (128 + signal.SIGUSR1 if stop else 0)
        said = capsys.readouterr().out
        assert ("s are left of train.stop_after, and a stop takes up to" in said) == bool(stop)
        assert ("stopped  by SIGUSR1 after iteration" in said) == bool(stop)

    over = {"train": {"total_iter": 60, "checkpoint_save": 0, "checkpoint_test": 30}}
    one, two = straight_and_stopped(lambda name, _: tiny.write(
        tmp_path, name, train={**over["train"], "stop_after": "90m" if name == "two" else None}), [3, 25], launch)
    assert_equal_runs(one, two, 60)


def test_any_process_stops_all_by_its_clock_after_the_same_step(tmp_path):
    path = tiny_file(tmp_path, train={"total_iter": 100000, "checkpoint_test": 0, "stop_after": "90m"})
    codes, said = world.run(tmp_path / "out", 2, "-opt", path, acts=[(1, 3, "time is over")])
    assert codes == [-signal.SIGUSR1] * 2 and said[0].count("stopped  by SIGUSR1 after iteration") == 1, said


# ---------------------------------------------------------------- train.grace


@pytest.mark.parametrize("longest, background, words", [
    ({"step": 3.0, "sample": 40.0, "save": 5.0}, False, r"45.0 s (a validation sample 40.0, a save 5.0) until its check"
     "point is written, more than train.grace 30: validate smaller pieces"),
    ({"step": 3.0, "save": 14.0}, True, "31.0 s (a step 3.0, the save in progress 14.0, a save 14.0) until its "
     "checkpoint is written, more than train.grace 30: set checkpoint.async to false, or let the scheduler grant more"),
    ({"step": 3.0, "save": 14.0}, False, None)])
def test_a_stop_that_takes_longer_than_granted_is_warned_of_with_its_remedy(longest, background, words):
    own = Watch()
    own.longest, own.background = longest, background
    problem = own.find_grace_problem(30)
    assert problem is words is None or problem.startswith(f"a stop may take {words}")


def test_every_start_compares_a_stop_with_the_grace_and_changes_nothing(tmp_path, capfd):
    known = []
    for name, grace in (("one", None), ("two", 1e-6)):
        path = tiny.write(tmp_path, name, train={"grace": grace})
        for first in (1, 5):
            run_until(4 if first == 1 else None, "-opt", path)
            said = capfd.readouterr().out
            assert said.count("warning  a stop may take") == bool(grace), said
            assert not grace or said.index("warning  a stop may") < said.index(f"iter       {first}")
        assert run("-opt", path, "--set", "train.total_iter=10", hooks=[
            tiny.At("before_training", 9, lambda run: known.append(set(watch.longest)))]) == 0
    assert known == [{"step", "sample", "rest", "save"}] * 2  # of earlier launches, from the checkpoint
    assert_equal_runs(tmp_path / "one", tmp_path / "two", TOTAL + 1)


def test_a_dry_run_prints_how_long_a_stop_takes(tmp_path, capsys):
    assert run("-opt", tiny.write(tmp_path), "--dry-run") == 0
    said = capsys.readouterr().out
    assert re.search(r"ok   stop       at most \d+\.\d s \(a .*\d, a save \d.*train.grace is not set", said), said
    assert run("-opt", tiny.write(tmp_path, train={"grace": 1e-6}), "--dry-run") == 0
    assert re.search(r"warn stop       a stop may take .* or let the scheduler grant more", capsys.readouterr().out)
    assert run("-opt", tiny.write(tmp_path, train={"stop_after": "soon"}), "--dry-run") == 2
