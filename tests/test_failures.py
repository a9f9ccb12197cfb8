"""What goes wrong between two steps costs none: one line with cause and remedy, a save, exit code 2, and it resumes."""

import multiprocessing
import os
import re
import signal

import pytest
import torch
from torch.utils.data._utils import signal_handling

from data.loader import Batches, endless
from data.sampler import EndlessBatches
from options import OptionError
from tests import tiny, world
from tests.test_signals import assert_resumes_equal, saved, tiny_file

SAID = {"EIO": "/data/picture.png: Input/output error; the disk or the network share fails",
        "SIGKILL": "a data worker was ended by SIGKILL, as by the system when memory runs out: lower datasets.",
        "SIGBUS": "--shm-size", "full shm": "--shm-size", "SIGSEGV": "ended by SIGSEGV, in a library",
        "is local": "Local: of a kind of its own (world.py, line ", "PermissionError": "on purpose",
        "MemoryError": "no memory is left for a sample: lower", "ZeroDivisionError": "ZeroDivisionError: on purpose (",
        "can't be sent": "worker: ", "SystemExit": "on purpose",
        "KeyboardInterrupt": "on purpose"}
SOON = [("EIO", 0, 1), ("SIGKILL", 2, 1), ("is local", 2, 1), ("MemoryError", 0, 2), ("can't be sent", 1, 1)]
ALL = [(what, workers, size) for what in SAID for workers in (0, 2) for size in (1, 2)
       if workers or not what.startswith(("SIG", "can't"))]


@pytest.mark.parametrize("what, workers, size", [
    pytest.param(*case, marks=() if case in SOON else pytest.mark.slow) for case in dict.fromkeys([*SOON, *ALL])])
def test_a_sample_that_fails_costs_no_step(tmp_path, what, workers, size):
    path = tiny_file(tmp_path, workers=workers)
    codes, said = world.run(tmp_path / "out", size, "-opt", path, acts=[(size - 1, 4, f"sample {what}")], seconds=60)
    everything = "".join(said)
    assert codes == [2] * size and everything.count("error:") == 1 and "Traceback" not in everything, said
    done = max([0, *map(int, re.findall(r"iter +(\d+) ", said[0]))])  # a worker is ahead: its death is seen at once
    assert done == 3 or done < 3 and workers and what.startswith(("SIG", "can't")), said
    kept = f"iteration {done} is saved" if done else "nothing was trained yet"
    assert SAID[what] in everything and f"{kept}: mend this and run the same" in everything, said
    assert saved(tmp_path) == done if done else not list((tmp_path / "run/models").glob("*.json"))
    assert_resumes_equal(tmp_path, path, size)


def test_a_worker_that_dies_in_a_save_does_not_harm_it(tmp_path):
    path = tiny_file(tmp_path, workers=2)
    codes, (said,) = world.run(tmp_path / "out", 1, "-opt", path, acts=[(0, 1, "worker dies in save")])
    assert codes == [2] and "not saved" not in said, said
    assert "models/2.json in " in said and "error: a data worker was ended by SIGKILL" in said, said
    assert_resumes_equal(tmp_path, path)


def test_workers_may_be_ended_where_torch_watches_workers_of_others(monkeypatch):
    before = signal.getsignal(signal.SIGCHLD)
    monkeypatch.setattr(signal_handling, "_SIGCHLD_handler_set", False)
    try:
        others = iter(torch.utils.data.DataLoader(list(range(4)), num_workers=1))  # installs torch's handler
        for _ in range(3):
            ours = endless(tiny.Images(), EndlessBatches(11, 4), 2, pinned=False)
            next(ours)
            ours.close()
            for worker in multiprocessing.active_children():
                worker.join(0.01)
        assert [int(value) for value in others] == [0, 1, 2, 3]
    finally:
        signal.signal(signal.SIGCHLD, before)


@pytest.mark.parametrize("error", [FileNotFoundError(2, "No such file"), EOFError(), ConnectionResetError()])
@pytest.mark.parametrize("end, said", [(lambda: os.kill(os.getpid(), 9), "SIGKILL"), (lambda: os._exit(0), "code 0")])
def test_a_worker_that_died_is_named_whatever_its_half_sent_batch_raises(error, end, said):
    class Loader:
        _workers = [multiprocessing.get_context("fork").Process(target=end)]

        def __next__(self):
            self._workers[0].start()
            raise error

    with pytest.raises(OptionError, match=said):
        next(Batches(Loader(), multiprocessing.SimpleQueue()))
