"""One run's folder over time: a lock, saves on a thread, refused saves, links, and what proves that a run resumes."""

import contextlib
import errno
import io
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import checkpoint
import options
from checkpoint import CheckpointError, Layout, Saver
from commands import prove
from models.model_plain import ModelPlain
from runtime.hooks import Hooks
from storage import files
from storage import tree as storage_tree
from storage.tree import Snapshot
from tests import tiny, world
from tests.conftest import write_json
from tests.programs import Program, fork, print_to
from tests.runs import final, run, run_until
from tests.test_checkpoint import parts

pytestmark = pytest.mark.usefixtures("tiny_tables")


# ---------------------------------------------------------------- a lock


def test_a_run_is_refused_by_the_owners_name_until_that_dies_and_its_workers_hold_no_lock(tmp_path):
    path = tiny.write(tmp_path, workers=2, train={"total_iter": 100000, "checkpoint_save": 5})
    first = Program(tmp_path, "-opt", path)
    try:
        deadline = time.monotonic() + 60
        while not list((tmp_path / "run/models").glob("*.json")) and time.monotonic() < deadline:
            time.sleep(0.05)
        with pytest.raises(CheckpointError, match=f"process {first.pid} on .* is writing here; wait for it or stop it"):
            run("-opt", path)
        first.kill()
        first.wait(10)
        total = checkpoint.find_newest(tmp_path / "run/models").iteration + 1
        assert run("-opt", path, "--set", f"train.total_iter={total}",
                   "--set", "datasets.train.dataloader_num_workers=0") == 0  # its orphaned workers may still live
    finally:
        first.kill()
        first.wait(10)


def test_a_folder_that_cant_be_written_is_one_line(tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match="/proc/perdure/run/models: can't be made: No such file"):
        run("-opt", write_json(tmp_path / "x.json", tiny.options("/proc/perdure", "run")))
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(CheckpointError, match="can't be made"):
        run("-opt", write_json(tmp_path / "x.json", tiny.options(tmp_path, "taken")))
    path = write_json(tmp_path / "y.json", tiny.options(tmp_path, "run", train={"total_iter": 1}))
    assert run("-opt", path) == 0

    def refuse(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(files, "open", refuse, raising=False)
    with pytest.raises(CheckpointError, match="run: can't be written: Read-only file system"):
        run("-opt", path)


# ---------------------------------------------------------------- saving on a thread


def test_a_snapshot_is_a_copy_in_buffers_that_are_used_again():
    tree = {"a": torch.arange(6.0).reshape(2, 3).t(), "b": [torch.ones(2, dtype=torch.int64), {"c": 3}], "a/b": None}
    snapshot = Snapshot()
    first = snapshot.take(tree)
    addresses = [t.data_ptr() for t in snapshot.rooms.values()]
    assert torch.equal(first["a"], tree["a"]) and first["b"][1] == {"c": 3}
    tree["a"].add_(1)
    assert not torch.equal(first["a"], tree["a"])  # what is being written does not move
    second = snapshot.take(tree)
    assert torch.equal(second["a"], tree["a"])
    assert [t.data_ptr() for t in snapshot.rooms.values()] == addresses


def test_a_snapshot_of_many_tensors_needs_few_buffers(monkeypatch):
    """Each pinned buffer takes a call of the driver, and torch rounds its size up to a power of two."""
    state = {"G": {str(i): torch.rand(i % 5, 7, dtype=[torch.float32, torch.float64][i % 2]) for i in range(300)},
             "big": torch.rand(9000), "state": {"flag": torch.tensor(True)}}
    monkeypatch.setattr(storage_tree, "BUFFER", 20_000)
    sizes, real = [], torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **how: (
        sizes.append(size[0]) if how["dtype"] == torch.uint8 else None, real(*size, **how))[1])
    snapshot = Snapshot()
    for _ in range(2):
        copied = snapshot.take(state)
        assert not list(storage_tree.differences(state, copied))
    assert sizes == [20_000, 20_000, 36_000]
    written = io.BytesIO()
    torch.save(copied["G"]["1"], written)
    assert written.tell() < 3000  # without the rest of the buffer


def test_a_snapshot_waits_for_every_card_that_it_copies_from(monkeypatch):
    """A wait for the current card alone would leave copies from others unfinished when they are written."""
    waited = []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(
        synchronize=lambda: waited.append(str(device))))
    monkeypatch.setattr(Snapshot, "_room_for", lambda self, value: torch.empty_like(value, device="cpu"))
    with FakeTensorMode():
        state = {"G": [torch.empty(3, device=f"cuda:{i}") for i in (1, 0, 1)], "step": torch.zeros(())}
        Snapshot().take(state)
    assert sorted(waited) == ["cuda:0", "cuda:1"]


def test_training_continues_while_a_save_is_written_and_the_next_save_waits(tmp_path, monkeypatch):
    gate, order = threading.Event(), []
    real = checkpoint.commit

    def slow(folder, iteration, *args, **kwargs):
        gate.wait(10)
        order.append(iteration)
        return real(folder, iteration, *args, **kwargs)

    monkeypatch.setattr(checkpoint, "commit", slow)
    saver, state = Saver(tmp_path, background=True), parts(1)
    saver.save(1, state)
    state["G"]["w"].fill_(99)  # a step that changes what is being written
    assert saver.poll() is None and not list(tmp_path.glob("*.json"))
    gate.set()
    saver.wait()
    assert saver.poll().found.iteration == 1 and saver.poll() is None
    assert torch.equal(checkpoint.find_newest(tmp_path).load()["G"]["w"], torch.ones(64))
    saver.save(2, parts(2))
    saver.wait()
    assert order == [1, 2] and saver.poll().found.iteration == 2


@pytest.mark.parametrize("policy", ["stop", "warn"])
def test_an_error_on_the_thread_surfaces_at_the_next_step(tmp_path, monkeypatch, capsys, policy):
    real, failed = checkpoint.commit, []

    def refused_once(folder, iteration, *args, **kwargs):
        if iteration == 2 and not failed:
            failed.append(iteration)
            raise OSError(28, "No space left on device")
        return real(folder, iteration, *args, **kwargs)

    monkeypatch.setattr(checkpoint, "commit", refused_once)
    steps = []

    class Counting(Hooks):
        def before_step(self, run):
            if run.iteration == 3:
                run.saves.saver.wait()
            steps.append(run.iteration)

    keep = {"async": True, "on_save_error": policy}
    path = tiny.write(tmp_path, checkpoint=keep)
    if policy == "stop":
        with pytest.raises(CheckpointError, match="checkpoint 2 was not saved: .*No space left on device; older"):
            run("-opt", path, hooks=[Counting()])
        assert steps[-1] <= 3
    else:
        assert run("-opt", path, hooks=[Counting()]) == 0
        assert "warning  checkpoint 2 was not saved: [Errno 28] No space left" in capsys.readouterr().out
        assert final(tmp_path / "run")["state"]["iteration"] == 9
    assert not list((tmp_path / "run/models").glob("*.tmp"))


def test_a_signal_in_the_middle_of_a_background_save_ends_with_both_committed(tmp_path, monkeypatch):
    real = checkpoint.commit

    def slow(folder, iteration, *args, **kwargs):
        if iteration == 4:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.3)
        return real(folder, iteration, *args, **kwargs)

    keep = {"async": True}
    path = tiny.write(tmp_path, checkpoint=keep)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "commit", slow)
        assert run("-opt", path) == 143
    iterations = [found.iteration for found in checkpoint.find_sets(tmp_path / "run/models")]
    assert 4 in iterations and all(found.fault() is None for found in checkpoint.find_sets(tmp_path / "run/models"))
    assert run("-opt", path) == 0


def test_what_runs_in_the_background_by_itself(tmp_path):
    from train import Run

    def background(**over):
        tree = tiny.options(tmp_path, "run", **over)
        from data import DATASETS
        from models import MODELS, NETWORKS

        opt, _ = options.parse(str(write_json(tmp_path / "run.json", tree)), [], MODELS, NETWORKS, DATASETS)
        return Run(opt, None).saves.saver.background

    assert [background(), background(checkpoint={"async": True}), background(checkpoint={"async": False})] == \
        [False, True, False]  # auto: with CUDA


# ---------------------------------------------------------------- names and metrics


@pytest.mark.parametrize("keep, words", [
    ({"name": "epoch.pt"}, "name: 'epoch.pt' needs the field {epoch} or {iter}"),
    ({"name": "{step}.pt"}, "the fields are {epoch} and {iter}"),
    ({"best": "../best.pt"}, "best: '../best.pt' must be a file name that ends in one of .pt, .pth, .ckpt"),
    ({"latest": "latest"}, "latest: 'latest' must be a file name"),
    ({"layout": "bundle", "name": None, "latest": None}, "name and latest can't both be null"),
    ({"best_metric": "lpips"}, "checkpoint.best_mode: missing; whether a larger or a smaller lpips is better"),
    ({"async": "yes"}, "checkpoint.async: \"yes\" is not one of \"auto\" or true or false"),
    ({"layout": "zip"}, "checkpoint.layout"),
])
def test_names_that_no_file_could_have_are_refused(tmp_path, keep, words):
    path = write_json(tmp_path / "x.json", tiny.options(tmp_path, "run", checkpoint=keep))
    with pytest.raises(options.OptionError) as caught:
        run("-opt", path)
    assert words in str(caught.value) and "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_a_metric_that_there_is_not_is_said_with_those_that_there_are(tmp_path):
    tree = tiny.options(tmp_path, "run", checkpoint={"best_metric": "lpips", "best_mode": "min"})
    with pytest.raises(options.OptionError, match="'lpips' is not a metric of this run; valid: test.psnr, test.ssim"):
        run("-opt", write_json(tmp_path / "run.json", tree))
    assert checkpoint.find_newest(tmp_path / "run/models").iteration == 3  # what was learnt is kept


def test_links_become_copies_where_a_disk_has_none(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    saver = Saver(tmp_path, Layout("bundle", name="it{iter}.pt"), keep_last_n=1)
    for n in (1, 2, 3):
        saver.save(n, parts(n), best=1)
        saver.poll()
    assert sorted(os.listdir(tmp_path)) == ["best.pt", "it3.pt", "latest.pt"]
    assert checkpoint.locate(tmp_path / "best.pt").iteration == 1 and checkpoint.find_newest(tmp_path).iteration == 3


def test_a_kill_between_a_commit_and_its_links_is_put_right_at_the_next_start(tmp_path, monkeypatch):
    path = tiny.write(tmp_path, train={"total_iter": 20})
    for step in (8, 9):
        run_until(step, "-opt", path)
        latest, best = (tmp_path / f"run/models/{name}.json" for name in ("latest", "best"))
        if step == 8:
            best_before = checkpoint.locate(best).iteration
            latest.unlink(), best.unlink()
            os.link(tmp_path / "run/models/4.json", latest)
    assert latest.samefile(tmp_path / "run/models/8.json")  # 9 was interrupted: no commit made links since
    assert checkpoint.locate(best).iteration == best_before


# ---------------------------------------------------------------- --prove-resume


def prove_child(program, task, output):
    """Be the process of a run of prove.py, forked: `python -c program task`."""
    print_to(output)
    sys.argv = ["-c", task]
    exec(program, {})


@pytest.fixture
def forked(tmp_path, monkeypatch):
    """Lets prove.py's processes be forked."""
    def run(command, **_):
        assert command[:2] == [sys.executable, "-c"]
        process = fork(prove_child, *command[2:], str(tmp_path / "said"))
        process.join(60)
        return subprocess.CompletedProcess(command, process.exitcode, (tmp_path / "said").read_text(), "")

    monkeypatch.setattr(subprocess, "run", run)


def test_prove_resume_says_exact_on_the_users_own_options(tmp_path, forked, capsys):
    path = world.recipe("vqvae", tmp_path, "run")
    assert run("-opt", path, "--prove-resume", "4") == 0
    said = capsys.readouterr().out
    assert "4 steps straight, and 4 steps killed after step 2" in said and "are equal, bit for bit" in said
    assert sorted(os.listdir(tmp_path)) == ["run.json", "said"]  # nothing of it stays


def test_a_run_that_cannot_be_proved_ends_with_its_own_complaint(tmp_path, forked):
    path = world.recipe("vqvae", tmp_path, "run", netG={"net_type": "vqvae2", "n_embed": "many"})
    with pytest.raises(options.OptionError, match='^.*netG.n_embed: "many" is not'):
        run("-opt", path, "--prove-resume")


class Died(BaseException):
    """In place of SIGKILL, where processes would only take longer."""


@pytest.fixture
def in_this_process(monkeypatch):
    """Runs of prove.py as calls; what was committed at each kill."""
    found = []

    def die(*_):
        found.append(checkpoint.find_newest(running[0] / "models"))
        raise Died

    running = []

    def call(folder, name, option_file, overrides, stage, steps, kill_after, look):
        running[:] = [Path(folder) / name]
        with monkeypatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as said:
            patch.setattr(os, "kill", die)
            with contextlib.suppress(Died):
                prove._child(option_file, overrides, stage, folder, name, steps, kill_after, look)
                assert kill_after is None
        torch.use_deterministic_algorithms(False)
        return said.getvalue()

    monkeypatch.setattr(prove, "_run", call)
    return found


@pytest.mark.parametrize("fault, words", [
    ("none", "exact    all 36 tensors and the rest of the state are equal, bit for bit"),
    ("a variable", "because  an uninterrupted run repeats itself, so the checkpoint lacks something that the next"),
    ("a variable, and the kernels", "because  an uninterrupted run repeats itself"),  # compared under the same
    ("the clock", "because  two uninterrupted runs differ as well"),
    ("an operation", "because  upsample_nearest_of_the_test has no deterministic kernel on this device"),
])
def test_prove_resume_says_whether_and_why(tmp_path, monkeypatch, in_this_process, capsys, fault, words):
    """A step that depends on a variable in no checkpoint, on the clock, on an operation that says so."""
    real, clock = ModelPlain.feed_data, iter(range(1, 1000))

    def feed_data(self, data, **kwargs):
        real(self, data, **kwargs)
        self.steps = getattr(self, "steps", 0) + 1
        if fault == "an operation" and torch.are_deterministic_algorithms_enabled():
            warnings.warn("upsample_nearest_of_the_test does not have a deterministic implementation", stacklevel=1)
        more = {"none": 0, "a variable": self.steps,
                "a variable, and the kernels": self.steps + torch.are_deterministic_algorithms_enabled()}
        self.degraded = self.degraded + more.get(fault, next(clock)) * 1e-3

    monkeypatch.setattr(ModelPlain, "feed_data", feed_data)
    code = prove.prove(str(tiny.write(tmp_path)), [], 4)
    said = capsys.readouterr().out
    assert code == (fault != "none") and words in said
    assert ("differs " in said and "first G.body.0.weight" in said) == (fault != "none")


def test_prove_resume_kills_after_the_commit_of_a_background_save(tmp_path, monkeypatch, in_this_process, capsys):
    """Else the second run would start at 0, and two equal runs from scratch would be called exact."""
    real = checkpoint.commit

    def slow(*args, **kwargs):
        time.sleep(0.2)
        return real(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "commit", slow)
    tree = tiny.options(tmp_path, "run", checkpoint={"async": True}, train={"G_optimizer_lr": 0.02})
    assert prove.prove(str(write_json(tmp_path / "run.json", tree)), [], 4) == 0
    assert [found and found.iteration for found in in_this_process] == [2]
    assert "exact " in capsys.readouterr().out


def test_a_proof_that_did_not_resume_is_an_error(tmp_path, monkeypatch, in_this_process):
    call = prove._run

    def forget(folder, name, *args):
        if name == "killed":
            shutil.rmtree(Path(folder) / name, ignore_errors=True)
        return call(folder, name, *args)

    monkeypatch.setattr(prove, "_run", forget)
    path = tiny.write(tmp_path)
    with pytest.raises(CheckpointError, match="started again at iteration 0 instead of 2, so nothing was proved"):
        prove.prove(str(path), [], 4)


# ---------------------------------------------------------------- disks that have less, or nothing


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES, errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("kind", ["folders", "files"])
def test_a_disk_without_fsync_is_accepted_and_said_once(tmp_path, monkeypatch, capsys, kind, number):
    real = os.fsync

    def refuse(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}") == (kind == "folders"):
            raise OSError(number, os.strerror(number))
        real(descriptor)

    path = tiny.write(tmp_path)
    monkeypatch.setattr(os, "fsync", refuse)
    monkeypatch.setattr(files, "notices", [])
    if number in (errno.EINVAL, errno.ENOTSUP) or kind == "folders" and number in (errno.EBADF, errno.EACCES):
        assert run("-opt", path) == 0
        assert capsys.readouterr().out.count(f"this file system can't force {kind} to the disk") == 1
        assert final(tmp_path / "run")["state"]["iteration"] == 9
    else:
        with pytest.raises(CheckpointError, match=f"models: a checkpoint can't be written here: {os.strerror(number)}; "
                                                  f"(set path.root|make room|give this user)"):
            run("-opt", path)
        assert "iter " not in capsys.readouterr().out and os.listdir(tmp_path / "run/models") == []


@pytest.mark.parametrize("call, number, remedy", [("replace", errno.EROFS, "give this user the right to write"),
                                                  ("fsync", errno.EIO, "set path.root to another disk"),
                                                  ("replace", errno.ENOSPC, "make room there")])
def test_a_folder_that_takes_no_checkpoint_is_found_before_the_first_step(tmp_path, monkeypatch, capsys, call, number,
                                                                        remedy):
    path = tiny.write(tmp_path)
    (tmp_path / "run/models/.probe").mkdir(parents=True)  # a kill in the trial of an earlier start
    (tmp_path / "run/models/.probe/1.json").write_text("{}")

    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch, pytest.raises(CheckpointError, match=remedy) as caught:
        patch.setattr(os, call, refuse)
        run("-opt", path)
    assert "\n" not in str(caught.value) and "iter " not in capsys.readouterr().out
    assert run("-opt", path) == 0 and not (tmp_path / "run/models/.probe").exists()


# ---------------------------------------------------------------- the same command, again


def test_a_repeated_resume_of_another_run_resumes_its_own_newest(tmp_path, monkeypatch, capsys, named="4_G.pth"):
    run_until(4, "-opt", write_json(tmp_path / "a.json", tiny.options(tmp_path, "other")))
    path = write_json(tmp_path / "b.json", tiny.options(tmp_path, "run"))
    words = ("-opt", path, "--resume", tmp_path / "other/models" / named)
    run_until(7, *words)
    capsys.readouterr()
    run_until(8, *words)  # as a supervisor does
    said = capsys.readouterr().out
    assert "before and is at iteration 7; it resumes from there" in said and "iteration 7 of 9" in said
    assert run(*words) == 0 and "iteration 8 of 9" in capsys.readouterr().out
    assert run(*words) == 0 and "nothing left to do" in capsys.readouterr().out
    assert not list((tmp_path / "run").glob("models_*"))  # nothing was put aside on the way
    assert run(*words, "--fresh") == 0 and "iteration 4 of 9" in capsys.readouterr().out


@pytest.mark.parametrize("left", ["refused", "cut off", "cut off as .pth.tar", "cut off as .PTH", "members",
                                  "BasicSR without a network"])
def test_a_run_never_starts_over_silently_beside_what_it_cant_use(tmp_path, capsys, left):
    models = tmp_path / "run/models"
    models.mkdir(parents=True)
    if left == "members":
        checkpoint.commit(models, 4, parts(4))
        (models / "4.json").unlink(), (models / "4_state.pth").unlink()
    elif left == "BasicSR without a network":
        torch.save({"iter": 5, "network_of_mine": {"w": torch.ones(2)}}, models / "last.pth")
    else:
        file = models / f"model{left.partition(' as ')[2] or '.ckpt'}"
        torch.save({"iter": 5, "model": {"w": torch.ones(999)}, "optimizer": torch.optim.SGD([torch.ones(1)], 0.1)},
                   file)
        if left != "refused":
            os.truncate(file, 900)
    before = sorted(os.listdir(models))
    path = tiny.write(tmp_path)
    reason = {"refused": "holds an object .torch.optim", "cut": "damaged", "members": "state is missing"}
    with pytest.raises(CheckpointError,
                       match=f"none is usable .*{reason.get(left.split()[0], 'network_of_mine .1 tensors')}"):
        run("-opt", path)
    assert "iter " not in capsys.readouterr().out and sorted(os.listdir(models)) == before
    assert run("-opt", path, "--fresh", "--set", "train.total_iter=1") == 0
    (archive,) = (tmp_path / "run").glob("models_*")
    assert sorted(os.listdir(archive)) == before


def test_a_run_that_was_moved_and_renamed_resumes_in_its_new_folder(tmp_path, capsys):
    assert run("-opt", write_json(tmp_path / "a.json", tiny.options(tmp_path, "run", train={"total_iter": 4}))) == 0
    (tmp_path / "run").rename(tmp_path / "run of May")
    capsys.readouterr()
    assert run("--resume", tmp_path / "run of May/models/4.json", "--set", "train.total_iter=5") == 0
    assert f"finished 5 iterations in {tmp_path / 'run of May'}\n" in capsys.readouterr().out
    assert not (tmp_path / "run of May/models/log").exists() and not (tmp_path / "run").exists()


def test_a_checkpoint_past_the_end_is_an_error(tmp_path):
    assert run("-opt", tiny.write(tmp_path, "a", train={"total_iter": 4})) == 0
    path = tiny.write(tmp_path, "b", train={"total_iter": 3})
    with pytest.raises(options.OptionError, match=r"4.json: is at iteration 4, past the end of the run, iteration 3; "
                                                    "raise train.total_iter"):
        run("-opt", path, "--resume", tmp_path / "a/models/4.json")
    assert not (tmp_path / "b").exists()


def test_a_name_that_is_too_long_for_a_folder_is_one_line(tmp_path):
    with pytest.raises(CheckpointError, match="can't be looked into: File name too long"):
        run("-opt", write_json(tmp_path / "a.json", tiny.options(tmp_path, "n" * 300)))
