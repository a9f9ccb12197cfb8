"""Several processes: equal to one, stopped and resumed exactly, all ended by one failure, never a hang."""

import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch

import checkpoint
from data.sampler import EndlessBatches
from runtime import distributed
from runtime.saves import check_ranks
from tests import world
from tests.conftest import ROOT
from tests.runs import assert_equal_runs, straight_and_stopped
from tests.test_signals import tiny_file

SIZES = (2, 3, 4)


def resumed(folder, size, make, stops):
    """Folders of a run never stopped and of one stopped by each of `stops`, (rank, step, how), and run again."""
    def launch(stop, *words):
        codes, said = world.run(folder / "out", size, *words, acts=[stop] if stop else [])
        if not stop:
            assert codes == [0] * size, said
            assert ("resume   from" in said[0]) == (words[1].stem == "two") and not "".join(said[1:])
        elif stop[2].startswith("SIGTERM"):
            assert codes == [-signal.SIGTERM] * size, said
            assert re.search(r"stopped  by SIGTERM after iteration", said[0]) and "stopped" not in "".join(said[1:])
        else:
            assert all(codes), said

    return straight_and_stopped(lambda name, _: make(name), stops, launch)


# ---------------------------------------------------------------- exact


def test_killed_and_stopped_runs_end_equal(tmp_path):
    over = {"workers": 1, "netG": {"net_type": "tiny", "width": 64}}
    stops = [(1, 3, "SIGKILL"), (0, 3, "SIGTERM")]
    assert_equal_runs(*resumed(tmp_path, 2, lambda name: tiny_file(tmp_path, name, **over), stops))


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", world.RECIPES)
def test_every_recipe_ends_equal(tmp_path, kind, size):
    stops = [(size - 1, 3, "SIGKILL"), (1, 4, "SIGTERM")]
    assert_equal_runs(*resumed(tmp_path, size, lambda name: world.recipe(kind, tmp_path, name), stops))


# ---------------------------------------------------------------- equal to one process


@pytest.mark.parametrize("size", [2, 4])
def test_the_samples_do_not_depend_on_the_number_of_processes(size):
    whole = iter(EndlessBatches(21, 8, seed=3, position=(1, 8)))
    shares = [iter(EndlessBatches(21, 8, seed=3, position=(1, 8), rank=r, world_size=size)) for r in range(size)]
    for _ in range(7):
        batch, parts = next(whole), [next(share) for share in shares]
        assert batch == [key for part in parts for key in part]


def on_sizes(folder, write, straight, stops, last):
    """Folders of a run never stopped, on `straight` processes, and of one on other numbers of processes in turn.

    Args: stops: (size, rank, step, how). last: number of processes at the end.
    """
    def launch(stop, *words):
        size, *act = stop or (straight if words[1].stem == "one" else last,)
        codes, said = world.run(folder / "out", size, *words, acts=[tuple(act)] if act else [], seconds=200)
        assert all(codes) if act else codes == [0] * size, said
        assert size & (size - 1) or "machine  changed" not in said[0]  # since bits are equal

    return straight_and_stopped(lambda name, _: write(name), stops, launch)


def test_any_number_of_processes_ends_with_the_same_bits(tmp_path):
    """Batch norm, dropout and clipping among them."""
    def write(name):
        return tiny_file(tmp_path, name, train={"accumulate": 4}, netG={"net_type": "tiny", "width": 64})

    stops = [(4, 3, 3, "SIGKILL"), (1, 0, 4, "SIGTERM")]
    assert_equal_runs(*on_sizes(tmp_path, write, 1, stops, 2))


@pytest.mark.slow
@pytest.mark.parametrize("kind", world.RECIPES)
def test_any_number_of_processes_ends_with_the_same_bits_in_every_recipe(tmp_path, kind):
    stops = [(4, 3, 3, "SIGKILL"), (2, 0, 4, "SIGKILL"), (1, 0, 5, "SIGTERM")]
    write = lambda name: world.recipe(kind, tmp_path, name, train={"accumulate": 4})  # noqa: E731
    assert_equal_runs(*on_sizes(tmp_path, write, 1, stops, 4))


@pytest.mark.parametrize("size", [2, 3, 4, 6])
def test_a_sum_of_micro_batches_is_a_tree(size, monkeypatch):
    """Of numbers whose sum depends on the order; ranks that hold a power of two of them sum as one does."""
    values = torch.tensor([1.0] + [2.0**-24] * 11)  # one after the other they add nothing to 1

    def tree(numbers):
        half = len(numbers) // 2
        return tree(numbers[:half]) + tree(numbers[half:]) if half else numbers[0]

    monkeypatch.setattr(distributed, "world_size", lambda: 1)
    (alone,) = distributed.sum_micro_batches(lambda number: [values[number].clone()], 12)
    assert alone == tree(list(values)) and alone != sum(values)
    shares = []
    monkeypatch.setattr(distributed, "world_size", lambda: size)
    for rank in range(size):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(distributed, "_sum_over_ranks", lambda x: shares.append(x) or x)
        distributed.sum_micro_batches(lambda number: [values[number].clone()], 12)
    assert (tree([share[0] for share in shares]) == alone) or size in (3, 6)


@pytest.mark.parametrize("accumulate, size, num", [(1, 1, 1), (4, 1, 4), (4, 2, 4), (1, 4, 4), (6, 3, 6), (2, 4, 4)])
def test_the_number_of_micro_batches(accumulate, size, num, monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: size)
    assert distributed.num_micro_batches(accumulate) == num


def test_micro_batches_that_processes_cannot_share_are_an_error(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    with pytest.raises(ValueError, match="train.accumulate 3 must be a multiple of the 2 processes"):
        distributed.num_micro_batches(3)


# ---------------------------------------------------------------- one failure ends all


def failed(folder, acts, *words, path=None, **over):
    """What is said when it happens in one of two processes: the cause once, and all are gone in seconds."""
    codes, said = world.run(folder / "out", 2, "-opt", path or tiny_file(folder, **over), *words, acts=acts,
                            seconds=30)
    assert 0 not in codes
    return codes, "".join(said)


def test_an_exception_in_one_process_ends_all_with_its_cause(tmp_path):
    codes, said = failed(tmp_path, [(1, 3, "raise"), (0, 3, "sleep")])
    assert codes == [1, 1] and said.count("Traceback") == 1 and "ZeroDivisionError: on purpose" in said


def test_a_process_that_is_killed_ends_those_that_do_not_talk_to_it(tmp_path):
    codes, said = failed(tmp_path, [(1, 3, "SIGKILL"), (0, 3, "sleep")])
    assert codes == [1, -signal.SIGKILL] and said.count("error:") == 1
    assert "error: process 1 has ended without a word" in said


def test_a_broken_connection_is_not_taken_for_the_cause(tmp_path):
    """The other process may see it before the watch has noticed the death."""
    codes, said = failed(tmp_path, [(1, 3, "SIGKILL"), (0, 0, "listens late")])
    assert codes == [1, -signal.SIGKILL] and said.count("error:") == 1 and "Traceback" not in said, said
    assert "error: process 1 has ended without a word" in said


def test_nan_in_one_process_is_reported_once(tmp_path):
    codes, said = failed(tmp_path, [(1, 3, "nan")])
    assert 1 in codes and said.count("error:") == 1 and "not finite at iteration 4" in said


def test_nan_in_one_process_makes_all_leave_the_step_out(tmp_path):
    path = tiny_file(tmp_path, train={"on_nan": "skip"})
    codes, said = world.run(tmp_path / "out", 2, "-opt", path, acts=[(1, 3, "nan")])
    assert codes == [0, 0] and "1 steps skipped" in said[0], said


@pytest.mark.parametrize("words, complaint", [
    (["--set", "datasets.train.dataloader_batch_size=5"], "a batch of 5 can't be shared by 2 processes"),
    (["--set", "train.total_iters=5"], "did you mean 'total_iter'?"),
    (["--frsh"], "unrecognized arguments: --frsh"),
    (["--prove-resume"], "for one process: leave torchrun out")], ids=lambda x: x[-1] if isinstance(x, list) else "")
def test_a_mistake_is_one_line(tmp_path, words, complaint):
    codes, said = failed(tmp_path, [], *words)
    assert 2 in codes and said.count("error:") == 1 and complaint in said and "Traceback" not in said
    assert not (tmp_path / "run").exists()


def test_ranks_with_other_weights_save_nothing(tmp_path):
    codes, said = failed(tmp_path, [(1, 3, "other weights")])
    assert codes == [2, 2] and said.count("error:") == 1, said
    assert "after iteration 3 the ranks differ in weights or moments" in said
    assert checkpoint.find_newest(tmp_path / "run/models").iteration == 2


def test_the_rank_with_other_weights_is_named(tmp_path):
    check_ranks(4, [7, 7, 7], tmp_path)
    with pytest.raises(checkpoint.CheckpointError, match="after iteration 4 rank 1 differs from the others in weights.*"
                       "nothing is saved, this run has no checkpoint yet"):
        check_ranks(4, [7, 8, 7], tmp_path)


def test_a_refused_save_ends_all_or_none(tmp_path):
    codes, said = failed(tmp_path, [(0, 2, "full disk")])
    assert codes[0] == 2 and said.count("error:") == 1 and "checkpoint 2 was not saved" in said
    warn = tiny_file(tmp_path, checkpoint={"on_save_error": "warn"})
    codes, said = world.run(tmp_path / "out", 2, "-opt", warn, acts=[(0, 2, "full disk")])
    assert codes == [0, 0] and "the next interval tries again" in said[0], said


def test_a_stop_in_validation_is_agreed_there(tmp_path):
    """The last process to validate gets the signal: no process takes another step before the validation is repeated."""
    make = lambda name: tiny_file(tmp_path, name, train={"checkpoint_test": 2})  # noqa: E731
    assert_equal_runs(*resumed(tmp_path, 2, make, [(1, 4, "SIGTERM at validation")]))


# ---------------------------------------------------------------- under torchrun

TRIALS = int(os.environ.get("PERDURE_TRIALS", 50))


def torchrun(size, *arguments, mark="", options=()):
    """torchrun with these processes; `mark` is in the environment of each of them and of all that they start."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PERDURE_TRIAL": mark}
    options = options or ["--standalone"]
    program = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={size}", *options]
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


def wait_for(path, text, process, seconds=120):
    end = time.monotonic() + seconds
    while not (path.exists() and text in path.read_text()):
        assert process.poll() is None and time.monotonic() < end, process.communicate()[0]
        time.sleep(0.02)


LONG = {"total_iter": 120, "checkpoint_save": 20, "checkpoint_test": 60}


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The folder of a run of two processes that was never stopped."""
    folder = tmp_path_factory.mktemp("straight")
    codes, said = world.run(folder / "out", 2, "-opt", tiny_file(folder, "straight", train=LONG))
    assert codes == [0, 0], said
    return folder / "straight"


@pytest.mark.slow
def test_a_killed_worker_leads_to_a_restart_that_resumes_exactly(tmp_path, straight):
    """--fresh and KAIR's flags are on the command line, which torchrun repeats: it may not start over once more."""
    words = ["-m", "tests.tiny", "-opt", tiny_file(tmp_path, "other", train=LONG), "--fresh", "--dist", "True",
             "--launcher", "pytorch"]
    process = torchrun(2, *words, mark="restart", options=["--standalone", "--max-restarts=2"])
    wait_for(tmp_path / "other/log/train.log", "40.json", process)
    (pid,) = (pid for pid, rank in marked("restart").items() if rank == 1)
    os.kill(pid, signal.SIGKILL)
    seconds, said = ended(process, "restart", 120)
    assert process.returncode == 0 and said.count("resume   from") == 1 and "archived" not in said, said
    assert_equal_runs(straight, tmp_path / "other", 120)


@pytest.mark.slow
def test_a_failing_process_is_torchruns_root_cause(tmp_path):
    broken = tiny_file(tmp_path, train={"total_iter": 300, "G_optimizer_lr": 1e38})
    process = torchrun(2, "-m", "tests.tiny", "-opt", broken, mark="cause")
    seconds, said = ended(process, "cause", 60)
    assert process.returncode == 1 and said.count("\nerror: the loss is not finite") == 1, said
    assert "error: the loss is not finite" in said[said.index("Root Cause"):]


@pytest.mark.slow
@pytest.mark.parametrize("sig", [signal.SIGHUP, signal.SIGINT], ids=lambda sig: sig.name)
def test_a_terminal_reaches_all_of_torchrun_at_once_and_all_is_saved(tmp_path, sig):
    """Each process gets the signal from the terminal, and once more from torchrun, which got it too."""
    train = {"total_iter": 200, "checkpoint_save": 199, "checkpoint_test": 199}
    path = tiny_file(tmp_path, "other", train=train)
    process = torchrun(2, "-m", "tests.tiny", "-opt", path, mark=f"terminal {sig.name}")
    wait_for(tmp_path / "other/log/train.log", "iter      30", process)
    for pid in marked(f"terminal {sig.name}"):
        os.kill(pid, sig)
    said = ended(process, f"terminal {sig.name}", 60)[1]
    stopped = int(re.search(rf"stopped  by {sig.name} after iteration (\d+)", said)[1])
    assert checkpoint.find_newest(tmp_path / "other/models").iteration == stopped < 199, said
    assert ("stopping after this step; once more leaves" in said) == (sig == signal.SIGINT), said
    codes, said = world.run(tmp_path / "out", 2, "-opt", tiny_file(tmp_path, "straight", train=train))
    assert codes == [0, 0], said
    assert world.run(tmp_path / "out", 2, "-opt", path)[0] == [0, 0]
    assert_equal_runs(tmp_path / "straight", tmp_path / "other", 200)


@pytest.mark.slow
def test_two_nodes(tmp_path, straight):
    """Two torchruns that meet on loopback; a stop asked of one of them stops both, and together they resume."""
    path = tiny_file(tmp_path, "other", train=LONG)
    for stop in (True, False):
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        nodes = [torchrun(1, "-m", "tests.tiny", "-opt", path, mark=f"node{n}", options=[
            "--nnodes=2", f"--node_rank={n}", "--master_addr=127.0.0.1", f"--master_port={port}"]) for n in (0, 1)]
        if stop:
            wait_for(tmp_path / "other/log/train.log", "iter      30", nodes[0])
            (pid,) = (pid for pid, rank in marked("node1").items() if rank == 1)
            os.kill(pid, signal.SIGUSR1)
        said = [ended(node, f"node{n}", 120)[1] for n, node in enumerate(nodes)]
        assert [node.returncode for node in nodes] == [0, 0], said
        assert ("stopped  by SIGUSR1" if stop else "finished 120") in said[0] and not said[1].count("saved")
    assert_equal_runs(straight, tmp_path / "other", 120)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["signal", "clock"])
def test_the_slurm_script_goes_back_into_the_queue_and_resumes(tmp_path, how):
    """With a Slurm of three shell scripts: one node, whose step gets USR1 before the end, or sees it come."""
    train = {**LONG, "total_iter": 120 if how == "signal" else 4000}  # half a minute or more
    path, tools = tiny_file(tmp_path, "other", train=train), tmp_path / "bin"
    tools.mkdir()
    torch_run = ('for word; do [ $word = main.py ] && words+=(-m tests.tiny) || words+=("$word"); done; '
                 f'exec {sys.executable} -m torch.distributed.run "${{words[@]}}"')
    for name, text in {"srun": 'shift; exec "$@"', "scontrol": '[ $1 = show ] && echo 127.0.0.1 || echo "$@"',
                       "torchrun": torch_run}.items():
        (tools / name).write_text(f"#!/bin/bash\n{text}\n")
        (tools / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "SLURM_JOB_ID": str(os.getpid()),
                   "SLURM_JOB_NODELIST": "x", "SLURM_JOB_NUM_NODES": "1", "PROCESSES": "2", "OMP_NUM_THREADS": "1"}
    for count in (0, 1):
        mark = f"slurm{count}"
        if how == "clock":
            environment["SLURM_JOB_END_TIME"] = str(int(time.time()) + (1000 if count else 25))
        process = subprocess.Popen(["bash", "scripts/train.slurm", str(path), "--fresh"], cwd=ROOT, text=True,
                                   env={**environment, "PERDURE_TRIAL": mark, "SLURM_RESTART_COUNT": str(count)},
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if count == 0 and how == "signal":
            wait_for(tmp_path / "other/log/train.log", "iter      30", process)
            for pid in marked(mark):
                if pid != process.pid:  # all of the step, not the batch shell
                    os.kill(pid, signal.SIGUSR1)
        said = ended(process, mark, 300)[1]
        assert process.returncode == 0, said
        assert ("requeue" in said) == ("stopped  by SIGUSR1" in said) == (count == 0), said
    codes, said = world.run(tmp_path / "out", 2, "-opt", tiny_file(tmp_path, "straight", train=train), seconds=300)
    assert codes == [0, 0], said
    assert_equal_runs(tmp_path / "straight", tmp_path / "other", train["total_iter"])


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
            assert_equal_runs(tmp_path / "straight", tmp_path / "other", 3000)
            shutil.rmtree(tmp_path / "other")
    print(f"{TRIALS} trials, the longest {longest:.1f} s")
    ended(torchrun(2, "-m", "tests.tiny", "-opt", other, mark="last"), "last", 300)
    assert_equal_runs(tmp_path / "straight", tmp_path / "other", 3000)
