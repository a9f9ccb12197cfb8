"""A process that hangs is named with its place and ended, for a restart; not one that works, waits or is suspended."""

import os
import time

import pytest

from runtime import watchdog
from runtime.watchdog import HUNG, Watch, watch
from tests import tiny, world
from tests.runs import run
from tests.test_signals import assert_resumes_equal, tiny_file


class Ended(Exception):
    """What a process that hangs would do: exit."""


@pytest.fixture
def own(monkeypatch, tmp_path):
    """A watch of ten seconds without a thread; it raises instead of ending this process."""
    def end(code):
        assert code == HUNG
        raise Ended

    monkeypatch.setattr(watchdog, "end_process", end)
    own = Watch()
    own.patience, own.folder = 10.0, tmp_path
    own._find_hang(0.5)
    return own


def test_only_time_without_progress_counts(own, tmp_path, capfd):
    written = [0]
    own.written = lambda: written[0]
    for _ in range(3):  # a unit that ends, or bytes that are written, begin the count again
        own._find_hang(9.5)
        own.begin("step", "step 7")
        own._find_hang(9.5)
        own._find_hang(9.5)
        written[0] += 1
        own._find_hang(9.5)
    own._find_hang(9.5)
    with pytest.raises(Ended):
        own._find_hang(1)
    assert capfd.readouterr().err == (
        "error: rank 0 hangs: nothing was finished for 10 s (train.watchdog) in: step 7; the stacks of all threads are "
        f"in {tmp_path / 'stacks_0.txt'}; run the same command again\n")
    assert "test_only_time_without_progress_counts" in (tmp_path / "stacks_0.txt").read_text()


def test_a_watch_that_is_off_ends_nothing(own):
    own.patience = 0.0
    own._find_hang(1e9)


def test_who_waits_for_others_does_not_hang_until_all_do(own):
    own.waits = lambda: True
    own._find_hang(1e9)
    own.waits = lambda: False
    with pytest.raises(Ended):
        own._find_hang(1)


def test_a_line_that_another_rank_printed_is_not_repeated(own, capfd):
    told = []
    own.tell = lambda *what: told.append(what)
    with pytest.raises(Ended):
        own._find_hang(11)
    assert capfd.readouterr().err == "" and told[0][1] == HUNG


def test_a_log_folder_that_hangs_or_is_missing_holds_nothing_up(own, monkeypatch, capfd):
    own.folder = own.folder / "absent"
    with pytest.raises(Ended):
        own._find_hang(11)
    said = capfd.readouterr().err
    assert "most recent call first" in said and "the stacks of all threads are in the lines above" in said
    monkeypatch.setattr(watchdog, "DUMP_SECONDS", 0.1)
    own.dump = lambda: time.sleep(60)
    with pytest.raises(Ended):
        own._find_hang(11)


def test_the_time_of_a_suspension_does_not_count(monkeypatch):
    """As by SIGSTOP or a debugger: the watching thread did not run either."""
    times, passed = iter([0.0, 0.5, 1000.5, 1001.0]), []

    class Event:
        left = 3

        def wait(self, seconds):
            self.left -= 1
            return self.left < 0

    own = Watch()
    monkeypatch.setattr(time, "monotonic", lambda: next(times))
    own._name_phase = own._stop_in_time = own.compare_grace = lambda passed: None
    own.ended, own._find_hang = Event(), passed.append
    own._look()
    assert passed == [0.5, 1.0, 0.5]


# ---------------------------------------------------------------- the start


def test_a_long_phase_of_the_start_is_named(tmp_path, tiny_tables, monkeypatch, capsys):
    real, seen = tiny.Images.__init__, []

    def slow(self, *, num_samples: int = 11, size: int = 16, seed: int = 0):
        end = time.monotonic() + 30
        while watch.said is not watch.now and time.monotonic() < end:
            time.sleep(0.01)
        seen.append(watch.now[1])
        real(self, num_samples=num_samples, size=size, seed=seed)

    monkeypatch.setattr(tiny.Images, "__init__", slow)
    monkeypatch.setattr(watchdog, "SAY_AFTER", 0.0)
    assert run("-opt", tiny.write(tmp_path, train={"total_iter": 1})) == 0
    said = capsys.readouterr().out
    assert set(seen) == {"scanning the data"} and said.count("start    scanning the data ...") == 1
    assert said.index("scanning the data ...") < said.index("Perdure  run in")


# ---------------------------------------------------------------- processes that hang


def children_of(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(child) for child in file.read().split()]


@pytest.mark.parametrize("workers, what, place, stack", [
    (0, "sample hangs", "the data of step 4", "__getitem__"),
    (1, "sample hangs", "the data of step 4", "_try_get_data"),
    (0, "sleep", "step 3", "after_step")], ids=["read", "worker", "step"])
def test_a_hang_is_named_and_ended_with_its_workers_and_resumes_exactly(tmp_path, workers, what, place, stack):
    path = tiny_file(tmp_path, workers=workers)
    acts = [(0, 2, "watched"), (0, 4 if "sample" in what else 3, what)]
    members = world.World(tmp_path / "out", 1, "-opt", path, acts=acts)
    members.wait_for("iter       2" if what == "sleep" else "iter       3")
    children = children_of(members.processes[0].pid)
    assert members.finish(60) == [HUNG], members.report()
    assert len(children) == workers and not [child for child in children if os.path.exists(f"/proc/{child}/exe")]
    assert f"error: rank 0 hangs: nothing was finished for 2 s (train.watchdog) in: {place}; " in members.said(0)
    assert stack in (tmp_path / "run/log/stacks_0.txt").read_text()
    if workers:  # the one that leaves most behind
        assert_resumes_equal(tmp_path, path)


def test_of_two_processes_the_one_that_hangs_is_named_and_both_end(tmp_path):
    acts = [(0, 3, "watched"), (1, 3, "watched"), (1, 4, "sample hangs")]
    codes, said = world.run(tmp_path / "out", 2, "-opt", tiny_file(tmp_path), acts=acts)
    assert codes == [HUNG, HUNG] and "".join(said).count("error:") == 1, said
    assert "error: rank 1 hangs: nothing was finished for 2 s (train.watchdog) in: the data of step 4" in said[1]
    assert "in: step 4" in (tmp_path / "run/log/stacks_0.txt").read_text()  # where the other one waited
