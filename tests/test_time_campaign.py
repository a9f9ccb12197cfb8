"""Kills after the grace period, hangs and restarts, long validations, a queue of short slots: minutes long each.

    python -m pytest -n 0 -s -m slow tests/test_time_campaign.py     PERDURE_TERMS, _HANGS, _LONG: how many of each
"""

import os
import random
import shutil
import signal
import time

import pytest

import checkpoint
from models.model_plain import ModelPlain
from runtime.hooks import Hooks
from tests import tiny, world
from tests.programs import Program, fork
from tests.runs import assert_equal_runs, run_until
from tests.test_distributed import ended, torchrun

TERMS = int(os.environ.get("PERDURE_TERMS", 100))
HANGS = int(os.environ.get("PERDURE_HANGS", 50))
LONG = int(os.environ.get("PERDURE_LONG", 50))

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("tiny_tables")]


class Slow(Hooks):
    """Steps, samples, saves and a start that take a while."""

    def __init__(self, start=0.3, step=0.05, sample=0.6, save=0.4):
        self.start, self.step, self.sample, self.save = start, step, sample, save

    def before_training(self, run):
        time.sleep(self.start)
        real = run.model.validate
        run.model.validate = lambda sample: (time.sleep(self.sample), real(sample))[1]

    def after_step(self, run):
        time.sleep(self.step)

    def before_save(self, run):
        time.sleep(self.save)


def slow():
    """In the program: what a start measures takes as long as what the run does."""
    def slowed(owner, name, seconds):
        real = getattr(owner, name)
        setattr(owner, name, lambda *args, **kwargs: (time.sleep(seconds), real(*args, **kwargs))[1])

    slowed(checkpoint, "commit", 0.4)
    slowed(ModelPlain, "validate", 0.6)
    return [Slow(sample=0, save=0)]


def read(program):
    return program.stdout if program.output.with_suffix(".out").exists() else ""


def test_sigterm_then_sigkill_after_the_grace_period_loses_nothing_without_a_warning(tmp_path):
    """Half of the runs have a grace period that is long enough, half one that is not."""
    train = {"total_iter": 40, "checkpoint_save": 20, "checkpoint_test": 10}
    run_until(None, "-opt", tiny.write(tmp_path, "straight", train=train))
    dice, count = random.Random(0), {"saved": 0, "nothing to save": 0, "finished": 0, "warned, then killed": 0}
    for trial in range(TERMS):
        grace = dice.choice([0.2, 10.0])
        path = tiny.write(tmp_path, "two", train={**train, "grace": grace})
        models = tmp_path / "two/models"
        before = checkpoint.find_newest(models)
        program = Program(tmp_path, "-opt", path, before=slow)
        end = time.monotonic() + dice.uniform(0.0, 8.0)
        while program.returncode is None and time.monotonic() < end:
            time.sleep(0.02)
        warned = "warning  a stop may take" in read(program)
        if program.returncode is None:
            os.kill(program.pid, signal.SIGTERM)
            program.process.join(grace)
        killed = program.returncode is None
        program.kill()
        program.wait()
        said, found = read(program), checkpoint.find_newest(models)
        reached = [int(line.split()[1]) for line in said.splitlines() if line.startswith("iter ")]
        if program.returncode == 0:
            count["finished"] += 1
        elif found and reached and found.iteration == reached[-1]:
            count["saved"] += 1
        elif not reached and (found and found.iteration) == (before and before.iteration):
            count["nothing to save"] += 1
        else:
            assert killed and warned, (trial, grace, found and found.iteration, program.returncode, said)
            count["warned, then killed"] += 1
        if found and found.iteration == 40 and program.returncode == 0:
            assert_equal_runs(tmp_path / "straight", tmp_path / "two", 40)
            shutil.rmtree(tmp_path / "two")
    print(f"{TERMS} trials: {count}")


@pytest.mark.parametrize("kind", ["stopped", "worker", "read", "step"])
def test_a_hang_of_one_process_leads_to_an_exact_restart(tmp_path, kind):
    train = {"total_iter": 12, "checkpoint_save": 4, "checkpoint_test": 6, "accumulate": 2}
    run_until(None, "-opt", tiny.write(tmp_path, "straight", train=train))
    for number in range(HANGS // 4 + 1):
        shutil.rmtree(tmp_path / "other", ignore_errors=True)
        path = tiny.write(tmp_path, "other", train={**train, "watchdog": 10}, workers=int(kind == "worker"))
        if kind in ("worker", "read"):
            run_until(9, "-opt", path)  # hangs at once when it is resumed
        mark = f"hang {kind} {number} {os.getpid()}"
        process = torchrun(2, "-m", "tests.hanging", kind, "-opt", path, mark=mark,
                           options=["--standalone", "--max-restarts=1"])
        seconds, said = ended(process, mark, 240)
        assert process.returncode == 0, said
        named = "error: rank 1: no heartbeat for" if kind == "stopped" else "error: rank 1 hangs: nothing was finished"
        assert said.count(named) == said.count("\nerror: ") == 1, said
        assert kind == "stopped" or (tmp_path / "other/log/stacks_1.txt").exists()
        assert_equal_runs(tmp_path / "straight", tmp_path / "other", 12)
        print(f"{kind} {number}: restarted and equal after {seconds:.0f} s", flush=True)


class LongValidations(Hooks):
    def before_training(self, run):
        run.model.shares_tests = False  # rank 0 computes all of them, and rank 1 waits
        Slow(start=0, sample=1.0).before_training(run)

    def before_save(self, run):
        if run.iteration % 10 == 0:
            time.sleep(3)


def long_validations(rank, size, port, arguments, output, acts):
    world.Acts = lambda acts: LongValidations()  # in this process, which is one of the world
    world.member(rank, size, port, arguments, output, acts)


def test_long_validations_and_saves_are_no_hang(tmp_path, monkeypatch):
    """Each takes longer than train.watchdog, and no sample does."""
    monkeypatch.setattr(world, "fork", lambda target, *args: fork(long_validations, *args))
    path = tiny.write(tmp_path, train={"total_iter": LONG, "checkpoint_save": 5, "checkpoint_test": 1, "watchdog": 5},
                      datasets={"train": {"dataset_type": "tiny", "dataloader_batch_size": 4},
                                "test": {"dataset_type": "tiny", "num_samples": 6}})
    codes, said = world.run(tmp_path / "out", 2, "-opt", path, seconds=40 + 40 * LONG)
    assert codes == [0, 0] and "hangs" not in "".join(said), said
    assert said[0].count("test     ") == LONG
    print(f"{LONG} validations of 6 s each with train.watchdog 5: no false alarm")


def queued():
    return [Slow(start=0, step=0.1, sample=3.0, save=0)]


def test_a_queue_of_ten_slots_finishes_a_run_whose_validation_takes_most_of_one(tmp_path):
    """Slots of 20 s; 100 steps, two validations of 15 s each."""
    data = {"train": {"dataset_type": "tiny", "dataloader_batch_size": 4},
            "test": {"dataset_type": "tiny", "num_samples": 5}}
    train = {"total_iter": 100, "checkpoint_save": 50, "checkpoint_test": 50}
    path = tiny.write(tmp_path, "two", train={**train, "stop_after": 20}, datasets=data)
    ends = []
    while len(ends) < 10 and (not ends or ends[-1][0] != 0):
        program, began = Program(tmp_path, "-opt", path, before=queued), time.monotonic()
        program.process.join(20)
        killed = program.returncode is None
        program.kill()
        ends.append((program.wait(), round(time.monotonic() - began, 1), killed))
    print(f"slots: (exit code, seconds, killed by the queue) {ends}")
    assert ends[-1][0] == 0 and not any(killed for _, _, killed in ends), ends
    run_until(None, "-opt", tiny.write(tmp_path, "one", train=train, datasets=data))
    assert_equal_runs(tmp_path / "one", tmp_path / "two", 100)
