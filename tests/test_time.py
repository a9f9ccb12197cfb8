"""A run and time: saves by the clock, an end by the clock, a stop that fits the grace period; none changes a bit."""

import os

import pytest

import checkpoint
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
    for name, minutes, saves in (("run", ALWAYS, 6), ("straight", 0, 3)):
        path = tiny_file(tmp_path, name, checkpoint={"every_minutes": minutes}, train={"checkpoint_test": 0})
        codes, said = world.run(tmp_path / "out", 2, "-opt", path)
        assert codes == [0, 0] and said[0].count("saved  ") == saves, said
    assert_equal_runs(tmp_path / "straight", tmp_path / "run")
