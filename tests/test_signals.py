"""How a run is asked to stop: at once, also while it waits for data or for others, in one line, and nothing is lost."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import checkpoint
from runtime.watchdog import HUNG
from tests import tiny, world
from tests.conftest import ROOT, write_json
from tests.runs import assert_equal_runs

TOTAL = 6


def tiny_file(folder, name="run", **over):
    return tiny.write(folder, name, train={"total_iter": TOTAL, **over.pop("train", {})}, **over)


def saved(folder, name="run"):
    found = checkpoint.find_newest(folder / name / "models")
    return found and found.iteration


STRAIGHT = {}  # options and number of processes -> folder of a run that was never stopped


def assert_resumes_equal(folder, path, size=1):
    """The same command again ends as a run that was never stopped and had no workers, which is made once."""
    codes, said = world.run(folder / "out", size, "-opt", path)
    assert codes == [0] * size, said
    tree = json.loads(path.read_text())
    tree["datasets"]["train"]["dataloader_num_workers"] = 0
    key = json.dumps({**tree, "path": None}), size
    if key not in STRAIGHT:
        straight = write_json(folder / "straight.json", {**tree, "task": "straight"})
        codes, said = world.run(folder / "out", size, "-opt", straight)
        assert codes == [0] * size, said
        STRAIGHT[key] = folder / "straight"
    assert_equal_runs(folder / "run", STRAIGHT[key], TOTAL)


def test_a_closed_terminal_stops_and_saves(tmp_path):
    path = tiny_file(tmp_path)
    codes, said = world.run(tmp_path / "out", 1, "-opt", path, acts=[(0, 3, "SIGHUP")])
    assert codes == [-signal.SIGHUP] and "stopped  by SIGHUP after iteration 3" in said[0], said
    assert saved(tmp_path) == 3
    assert_resumes_equal(tmp_path, path)


def test_a_run_under_nohup_continues_when_the_terminal_closes(tmp_path):
    path = tiny_file(tmp_path)
    codes, said = world.run(tmp_path / "out", 1, "-opt", path, acts=[(0, 0, "nohup"), (0, 3, "SIGHUP")])
    assert codes == [0] and f"finished {TOTAL}" in said[0], said


def test_ctrl_c_is_answered_at_once_and_two_within_two_seconds_are_one(tmp_path):
    path = tiny_file(tmp_path)
    codes, (said,) = world.run(tmp_path / "out", 1, "-opt", path, acts=[(0, 3, "press 0.5")])
    assert codes == [-signal.SIGINT] and said.count("stopping after this step; once more leaves without saving") == 1
    place = tmp_path / "run/models/3.json"
    order = ["Training interrupted by user (Ctrl+C): stopping after", "iter       3", "Saving current state...",
             f"Checkpoint saved to {place}\n", f"You can resume training using: --resume {place}", "stopped  by SIGINT"]
    assert sorted(order, key=said.index) == order, said
    assert saved(tmp_path) == 3


def test_a_later_ctrl_c_leaves_at_once(tmp_path):
    path = tiny_file(tmp_path)
    codes, (said,) = world.run(tmp_path / "out", 1, "-opt", path, acts=[(0, 0, "hasty"), (0, 3, "press 0.7")])
    assert codes == [130] and "stopped  by" not in said, said
    assert saved(tmp_path) == 2


def test_a_later_ctrl_c_leaves_at_once_also_when_this_process_is_in_c(tmp_path):
    """The main process is waiting for the other one, which is stopped: no handler in Python is ever called there."""
    path = tiny_file(tmp_path, train={"total_iter": 1000, "checkpoint_test": 5000})
    run = world.World(tmp_path / "out", 2, "-opt", path, acts=[(0, 0, "hasty"), (1, 3, "SIGSTOP")])
    run.wait_for("iter       2")
    while "(python) T" not in Path(f"/proc/{run.processes[1].pid}/stat").read_text():
        time.sleep(0.05)
    time.sleep(0.5)  # until rank 0 waits
    run.signal(signal.SIGINT, rank=0)
    run.wait_for("stopping after this step")
    time.sleep(0.7)
    run.signal(signal.SIGINT, rank=0)
    run.processes[0].join(20)
    assert run.processes[0].exitcode == 130, run.report()
    run.signal(signal.SIGCONT, rank=1)
    assert run.finish(20)[0] == 130


@pytest.mark.parametrize("size, workers, rank", [
    (1, 0, 0), (2, 2, 1), pytest.param(1, 2, 0, marks=pytest.mark.slow), pytest.param(2, 0, 0, marks=pytest.mark.slow)])
def test_a_hanging_sample_does_not_hold_a_stop(tmp_path, size, workers, rank):
    """Of two processes the last one's sample hangs; the signal is for either."""
    path = tiny_file(tmp_path, workers=workers)
    run = world.World(tmp_path / "out", size, "-opt", path, acts=[(size - 1, 4, "sample hangs")])
    run.wait_for("iter       3")
    time.sleep(0.5)
    run.signal(signal.SIGTERM, rank)
    assert run.finish(30) == [-signal.SIGTERM] * size, run.report()
    assert "stopped  by SIGTERM after iteration 3" in run.said(0) and "Traceback" not in run.report()
    assert saved(tmp_path) == 3
    assert_resumes_equal(tmp_path, path, size)


@pytest.mark.parametrize("size", [1, 2])
def test_a_stop_before_the_first_step_is_one_line(tmp_path, size):
    path = tiny_file(tmp_path)
    codes, said = world.run(tmp_path / "out", size, "-opt", path, acts=[(size - 1, 0, "SIGTERM at start")], seconds=60)
    assert codes[-1] == -signal.SIGTERM and set(codes) <= {-signal.SIGTERM, 128 + signal.SIGTERM}, codes
    assert "".join(said).count("stopped  by SIGTERM before the first step\n") == 1 and "Traceback" not in "".join(said)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("module, number", [("torch", signal.SIGTERM), ("shlex", signal.SIGINT),
                                            ("commands.arguments", signal.SIGINT), ("runtime.signals", signal.SIGINT)])
def test_a_stop_during_the_imports_is_one_line_and_none_before_signals_are_handled(tmp_path, module, number):
    program = ("import os, signal, sys; sys.argv = ['main.py', '-opt', 'options/train_vrt.json']; real = __import__\n"
               "class Finder:\n"
               "    def find_spec(self, name, *_):\n"
               f"        if name == '{module}': os.kill(os.getpid(), {int(number)})\n"
               "sys.meta_path.insert(0, Finder())\n"
               "import runpy; runpy.run_path('main.py', run_name='__main__')")
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    said = "stopped  by SIGTERM before the first step\n" if module == "torch" else ""
    assert (done.returncode, done.stderr) == (-number, said)


# ---------------------------------------------------------------- a process that is stuck


def test_a_suspended_process_is_named_and_may_continue(tmp_path):
    path = tiny_file(tmp_path)
    run = world.World(tmp_path / "out", 2, "-opt", path, acts=[(0, 0, "impatient"), (1, 3, "SIGSTOP")])
    run.wait_for("waiting  for rank 1 since", after="2.json in")
    run.wait_for("no heartbeat: suspended, or", after="2.json in")
    run.signal(signal.SIGCONT, rank=1)
    assert run.finish(30) == [0, 0], run.report()


def test_a_process_suspended_for_too_long_ends_the_run(tmp_path):
    path = tiny_file(tmp_path, train={"watchdog": 3})
    run = world.World(tmp_path / "out", 2, "-opt", path, acts=[(0, 0, "impatient"), (1, 3, "SIGSTOP")])
    run.processes[0].join(40)
    assert run.processes[0].exitcode == HUNG, run.report()
    assert run.said(0).count("error: rank 1: no heartbeat for") == run.said(0).count("error:") == 1
    run.signal(signal.SIGCONT, rank=1)
    assert run.finish(20) == [HUNG, HUNG], run.report()


def test_a_process_that_is_late_is_named_and_waited_for(tmp_path):
    path = tiny_file(tmp_path)
    acts = [(0, 0, "impatient"), (1, 0, "impatient"), (1, 4, "sample is late")]
    codes, said = world.run(tmp_path / "out", 2, "-opt", path, acts=acts)
    assert codes == [0, 0] and "waiting  for rank 1 since" in said[0].partition("2.json in")[2], said
    assert "waiting" not in said[1].partition("2.json in")[2]
