"""Several processes: equal to one, stopped and resumed exactly, all ended by one failure, never a hang."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

import checkpoint
from tests import tiny, world
from tests.conftest import ROOT, write_json
from tests.test_resume import differing

TOTAL = 6
SIZES = (2, 3, 4)


def final(folder, iteration=TOTAL):
    found = checkpoint.find_newest(folder / "models")
    assert found and found.iteration == iteration
    return found.load()


def assert_equal(one, two, iteration=TOTAL):
    a, b = final(one, iteration), final(two, iteration)
    assert set(a) == set(b) and differing(a, b) == []
    for table in ("train", "test"):
        assert (one / "log" / f"{table}.csv").read_text() == (two / "log" / f"{table}.csv").read_text()


def tiny_file(folder, name, **over):
    train = {"total_iter": TOTAL, **over.pop("train", {})}
    path = write_json(folder / f"{name}.json", tiny.options(folder, name, train=train, **over))
    return path


def resumed(folder, size, make, stops):
    """Folders of a run never stopped and of one stopped by each of `stops`, (rank, step, how), and run again."""
    straight, other = make("straight"), make("other")
    codes, said = world.run(folder / "out", size, "-opt", straight)
    assert codes == [0] * size, said
    for stop in stops:
        codes, said = world.run(folder / "out", size, "-opt", other, acts=[stop])
        assert all(codes), said
        if stop[2] == "SIGTERM":
            assert codes == [143] * size, said
            assert re.search(r"stopped  by SIGTERM after iteration", said[0]) and "stopped" not in "".join(said[1:])
    codes, said = world.run(folder / "out", size, "-opt", other)
    assert codes == [0] * size, said
    assert "resume   from" in said[0] and not "".join(said[1:])
    return folder / "straight", folder / "other"


# ---------------------------------------------------------------- exact


def test_killed_and_stopped_runs_end_equal(tmp_path):
    """At 4 processes plain DistributedDataParallel is not exact: its buckets are rebuilt after the first step."""
    over = {"workers": 1, "netG": {"net_type": "tiny", "width": 64}}
    stops = [(3, 3, "SIGKILL"), (2, 3, "SIGTERM")]
    assert_equal(*resumed(tmp_path, 4, lambda name: tiny_file(tmp_path, name, **over), stops))
    state = final(tmp_path / "straight")["state"]
    generators = [generator["torch"] for generator in state["rng_state"]]
    assert len(generators) == 4 and not torch.equal(generators[0], generators[3])


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", world.RECIPES)
def test_every_recipe_ends_equal(tmp_path, kind, size):
    stops = [(size - 1, 3, "SIGKILL"), (1, 4, "SIGTERM")]
    assert_equal(*resumed(tmp_path, size, lambda name: world.recipe(kind, tmp_path, name), stops))


# ---------------------------------------------------------------- under torchrun

TRIALS = int(os.environ.get("PERDURE_TRIALS", 50))


def torchrun(size, *arguments, mark="", options=()):
    """torchrun with these processes; `mark` is in the environment of each of them and of all that they start."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PERDURE_TRIAL": mark}
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={size}", *options]
    return subprocess.Popen([*program, *map(str, arguments)], cwd=ROOT, env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def marked(mark):
    """Processes that carry the mark: id -> rank, None for torchrun; data workers are not counted."""
    found = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            try:
                with open(f"{entry.path}/environ", "rb") as file:
                    words = dict(word.partition(b"=")[::2] for word in file.read().split(b"\0"))
            except OSError:
                continue
            if words.get(b"PERDURE_TRIAL") == mark.encode():
                rank = words.get(b"RANK")
                found[int(entry.name)] = None if rank is None else int(rank)
    return found


def ended(process, mark, seconds):
    """How many seconds until torchrun and everything below it is gone. AssertionError when it takes longer."""
    began, said = time.monotonic(), ""
    try:
        said = process.communicate(timeout=seconds)[0]
        while left := marked(mark):
            assert time.monotonic() < began + seconds, f"still there: {left}\n{said}"
            time.sleep(0.05)
    except (subprocess.TimeoutExpired, AssertionError) as error:
        for pid in marked(mark):
            os.kill(pid, signal.SIGKILL)
        raise AssertionError(f"not ended after {seconds} s\n{said or process.communicate()[0]}") from error
    return time.monotonic() - began, said


@pytest.mark.slow
def test_no_signal_hangs_and_none_changes_the_end(tmp_path):
    """One rank, torchrun or all of them get a signal at a random moment; each trial is over in 30 s."""
    train = {"total_iter": 3000, "checkpoint_save": 100, "checkpoint_test": 500, "checkpoint_print": 100}
    dice, straight = random.Random(0), tiny_file(tmp_path, "straight", train=train)
    log = tmp_path / "other/log/train.log"
    process = torchrun(2, "-m", "tests.tiny", "-opt", straight, mark="straight")
    assert "finished 3000" in ended(process, "straight", 300)[1]
    other = tiny_file(tmp_path, "other", train=train)
    longest, reached = 0, []
    for trial in range(TRIALS):
        sig = dice.choice([signal.SIGTERM, signal.SIGUSR1, signal.SIGKILL])
        target = dice.choice(["rank 0", "rank 1", "torchrun", "all"])
        size, mark = log.stat().st_size if log.exists() else 0, f"trial {trial} {os.getpid()}"
        process = torchrun(2, "-m", "tests.tiny", "-opt", other, mark=mark)
        end = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < end:  # until it trains
            if log.exists() and log.stat().st_size > size:
                break
            time.sleep(0.05)
        time.sleep(dice.uniform(0, 2))
        wanted = {"rank 0": [0], "rank 1": [1], "torchrun": [None], "all": [0, 1, None]}[target]
        hit = [pid for pid, rank in marked(mark).items() if rank in wanted]
        for pid in hit:
            try:
                os.kill(pid, sig)
            except ProcessLookupError:
                pass
        seconds, said = ended(process, mark, 30)
        longest = max(longest, seconds)
        found = checkpoint.find_newest(tmp_path / "other/models")
        reached.append(found.iteration if found else 0)
        print(f"{trial}: {sig.name} to {target}: {seconds:.1f} s, exit code {process.returncode}, at {reached[-1]}",
              flush=True)
        if reached[-1] == 3000:
            assert_equal(tmp_path / "straight", tmp_path / "other", 3000)
            shutil.rmtree(tmp_path / "other")
    print(f"{TRIALS} trials, the longest {longest:.1f} s")
    ended(torchrun(2, "-m", "tests.tiny", "-opt", other, mark="last"), "last", 300)
    assert_equal(tmp_path / "straight", tmp_path / "other", 3000)
