"""What happens in a validation costs no step: the checkpoint due at it is committed first, and the metrics follow."""

import json
import os
import signal
import time

import pytest
import torch

import checkpoint
import options
from models.model_plain import ModelPlain
from runtime.evaluate import MOST_ATTEMPTS, NAME_BYTES, Progress, short_name
from tests import tiny, world
from tests.programs import run_program
from tests.runs import assert_equal_runs, final, rows, run, run_until
from tests.test_exact import LAYOUTS

pytestmark = pytest.mark.usefixtures("tiny_tables")
BOTH = {"checkpoint_save": 3, "checkpoint_test": 3}  # due at the same iterations, as in four published files


def option_file(folder, name, train=None, **over):
    return tiny.write(folder, name, train={**BOTH, **(train or {})}, **over)


def validated(folder):
    return [int(row["iteration"]) for row in rows(folder, "test")]


def die_in_validation():
    """Let this process die by SIGKILL in its first validation, once what is being saved is committed."""
    savers, made = [], checkpoint.Saver.__init__
    checkpoint.Saver.__init__ = lambda self, *args, **kwargs: (made(self, *args, **kwargs), savers.append(self))[0]
    ModelPlain.validate = lambda *_: ([saver.wait() for saver in savers], os.kill(os.getpid(), signal.SIGKILL))


@pytest.mark.parametrize("layout, background", [
    ("split", False), ("split", True), ("bundle", False), ("latest only", True)])
def test_kill_9_in_a_validation_loses_no_step_that_was_to_be_saved(tmp_path, layout, background):
    over = {"checkpoint": {**LAYOUTS[layout], "async": background}}
    assert run("-opt", option_file(tmp_path, "one", **over)) == 0
    path = option_file(tmp_path, "two", **over)
    killed = run_program(tmp_path, "-opt", path, before=die_in_validation)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert checkpoint.find_newest(tmp_path / "two/models").iteration == 3
    assert run("-opt", path) == 0
    assert_equal_runs(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_metrics_of_a_validation_are_in_the_checkpoint_that_was_saved_before_it(tmp_path, layout):
    assert run("-opt", option_file(tmp_path, "one", train={"total_iter": 3}, checkpoint=LAYOUTS[layout])) == 0
    found = checkpoint.find_newest(tmp_path / "one/models")
    state = found.load()["state"]
    assert [row["iteration"] for row in state["history"]] == [3] and state["best"] == 3
    assert found.record["metric"] == state["metric"] == state["history"][0]["test.psnr"] and found.record["best"] == 3
    best = "best.pt" if found.bundled else "best.json"
    assert checkpoint.locate(tmp_path / "one/models" / best).iteration == 3


def test_a_validation_that_fails_saves_the_steps_so_far_and_names_the_sample(tmp_path, monkeypatch):
    path = option_file(tmp_path, "one", train={"checkpoint_save": 100})

    def broken(self):
        raise ValueError("test/0001.png: damaged")

    with monkeypatch.context() as patch:
        patch.setattr(ModelPlain, "metrics", broken)
        with pytest.raises(options.OptionError, match="validation of iteration 3 failed: test set test, 0: "
                                                      "test/0001.png: damaged; the steps so far are saved"):
            run("-opt", path)
        assert checkpoint.find_newest(tmp_path / "one/models").iteration == 3
        with pytest.raises(options.OptionError, match="validation of iteration 3 failed"):
            run("-opt", path)  # until it is mended, and nothing is lost
    assert run("-opt", path) == 0
    assert run("-opt", option_file(tmp_path, "two", train={"checkpoint_save": 100})) == 0
    assert_equal_runs(tmp_path / "two", tmp_path / "one")


@pytest.mark.parametrize("error, words", [(MemoryError("cannot allocate"), "out of memory"),
                                          (torch.OutOfMemoryError("CUDA: out of memory"), "; test on smaller pictures"),
                                          (KeyError("nothing"), "KeyError")], ids=["host", "device", "fault"])
def test_out_of_memory_in_a_validation_is_one_line_with_the_remedy(tmp_path, monkeypatch, capsys, error, words):
    def broken(self, sample):
        raise error

    monkeypatch.setattr(ModelPlain, "validate", broken)
    with pytest.raises(options.OptionError, match=words):
        run("-opt", option_file(tmp_path, "one", train={"checkpoint_save": 100}))
    assert checkpoint.find_newest(tmp_path / "one/models").iteration == 3
    assert ("Traceback" in capsys.readouterr().out) == isinstance(error, KeyError)


def test_one_process_whose_sample_fails_ends_the_validation_of_all_with_a_save(tmp_path):
    path = tiny.write(tmp_path, train={"checkpoint_save": 100})
    codes, said = world.run(tmp_path / "out", 2, "-opt", path, acts=[(1, 3, "bad validation")])
    assert codes[0] in (1, 2) and codes[1] in (1, 2), said
    assert "validation of iteration 3 failed: test set test, 1: damaged on purpose" in said[0] + said[1]
    assert checkpoint.find_newest(tmp_path / "run/models").iteration == 3


def cut_off_after(patch, samples, how):
    """Let a launch end in the validation, after so many samples."""
    real, left = ModelPlain.validate, iter(range(samples, -1, -1))

    def validate(self, sample):
        if next(left) == 0:
            how()
        return real(self, sample)

    patch.setattr(ModelPlain, "validate", validate)


def test_a_validation_longer_than_the_time_slice_is_finished_over_several_launches(tmp_path, monkeypatch):
    data = {"train": {"dataset_type": "tiny", "dataloader_batch_size": 4},
            "test": {"dataset_type": "tiny", "num_samples": 5}}
    assert run("-opt", option_file(tmp_path, "one", datasets=data)) == 0
    path, launches = option_file(tmp_path, "two", datasets=data), 0
    while launches < 30:  # each launch has time for one sample
        launches += 1
        with monkeypatch.context() as patch:
            cut_off_after(patch, 0, lambda: os.kill(os.getpid(), signal.SIGTERM))
            if (code := run("-opt", path)) == 0:
                break
            assert code == 143
    assert 12 <= launches < 30  # three validations of five samples, the request is obeyed after the one under way
    assert_equal_runs(tmp_path / "one", tmp_path / "two")


def test_a_validation_that_never_finishes_a_sample_does_not_keep_the_run_from_advancing(tmp_path, monkeypatch, capsys):
    path = option_file(tmp_path, "one", train={"total_iter": 4})

    class Killed(BaseException):
        pass

    def kill():
        raise Killed  # nothing is written any more, as after SIGKILL

    for _ in range(MOST_ATTEMPTS):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            cut_off_after(patch, 0, kill)
            run("-opt", path)
        assert checkpoint.find_newest(tmp_path / "one/models").iteration == 3
    assert run("-opt", path) == 0
    assert "the validation of iteration 3 was interrupted 3 times" in capsys.readouterr().out
    assert [row["iteration"] for row in final(tmp_path / "one", 4)["state"]["history"]] == [4]


def test_the_last_validation_obeys_a_signal_and_is_done_by_the_next_launch(tmp_path, monkeypatch, capsys):
    assert run("-opt", option_file(tmp_path, "one", train={"total_iter": 3})) == 0
    path = option_file(tmp_path, "two", train={"total_iter": 3})
    capsys.readouterr()
    with monkeypatch.context() as patch:
        cut_off_after(patch, 0, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert run("-opt", path) == 143
    assert checkpoint.find_newest(tmp_path / "two/models").iteration == 3
    assert "finished" not in capsys.readouterr().out
    assert run("-opt", path) == 0
    assert "finished 3 iterations" in capsys.readouterr().out
    assert_equal_at_3(tmp_path / "one", tmp_path / "two")
    assert run("-opt", path) == 0
    assert "nothing left to do" in capsys.readouterr().out


def assert_equal_at_3(one, two):
    a, b = final(one, 3)["state"], final(two, 3)["state"]
    assert a["history"] == b["history"] and a["best"] == b["best"] == 3


def test_an_amendment_cut_off_between_its_files_leaves_a_whole_set(tmp_path, monkeypatch):
    assert run("-opt", option_file(tmp_path, "one", train={"total_iter": 3})) == 0
    models, real = tmp_path / "one/models", os.replace
    saver = checkpoint.Saver(models)
    state = checkpoint.find_newest(models).load()["state"]
    for survivors in (0, 1, 2, 3):  # replacements that happen before the power is cut
        left = iter(range(survivors, -1, -1))

        class Cut(BaseException):
            pass

        def replace(source, target, left=left, Cut=Cut):
            if next(left) == 0:
                raise Cut
            real(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", replace)
            try:
                saver.save(3, {"state": {**state, "history": [{"iteration": survivors}]}}, best=3, amend=True)
            except Cut:
                pass
            assert saver.pending is None or saver.poll()
        found = checkpoint.find_newest(models)
        assert found.iteration == 3 and found.fault() is None
        assert found.load()["state"]["history"] in (state["history"], [{"iteration": survivors}])
        for link in ("latest.json", "best.json"):
            assert checkpoint.locate(models / link).load()
        state = found.load()["state"]


def test_progress_of_another_iteration_or_other_options_is_ignored(tmp_path):
    progress = Progress(tmp_path, [3, "a"]).open()
    progress.add("test", 1, {"psnr": 30.5})
    progress.flush()
    assert Progress(tmp_path, [3, "a"]).open().rows == {"test": {1: {"psnr": 30.5}}}
    assert Progress(tmp_path, [4, "a"]).open().rows == {}
    (tmp_path / "validation_0.json").write_text("{}")
    assert Progress(tmp_path, [3, "a"]).open().rows == {}


def test_training_again_from_before_a_cut_off_validation_does_not_use_its_samples(tmp_path, monkeypatch):
    path = option_file(tmp_path, "one", train={"total_iter": 3, "checkpoint_save": 1})
    with monkeypatch.context() as patch:
        cut_off_after(patch, 0, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert run("-opt", path) == 143  # one sample of iteration 3 is finished
    assert json.loads((tmp_path / "one/log/validation_0.json").read_text())["rows"]["test"]
    assert run("-opt", path, "--resume", tmp_path / "one/models/1.json", "--lr", "0.5") == 0
    lone = option_file(tmp_path, "two", train={"total_iter": 3, "checkpoint_save": 1})
    assert run("-opt", lone, "--set", "train.total_iter=1", "--set", "train.G_scheduler_periods=3") == 0
    assert run("-opt", lone, "--lr", "0.5") == 0
    assert final(tmp_path / "one", 3)["state"]["history"][-1] == final(tmp_path / "two", 3)["state"]["history"][-1]


def test_long_names_of_samples_are_shortened_and_stay_different():
    names = ["a" * 300 + "1", "a" * 300 + "2", "影" * 200, "x/y"]
    short = [short_name(name) for name in names]
    assert len(set(short)) == 4 and all(len(os.fsencode(name)) <= NAME_BYTES for name in short) and short[3] == "x_y"


def test_pictures_tables_options_and_log_that_cannot_be_written_are_warnings(tmp_path, monkeypatch, capsys):
    real = os.replace

    def full(source, target):  # a full disk, but for checkpoints
        if "models" not in str(target):
            os.unlink(source)
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(os, "replace", full)
    folder = tmp_path / "one"
    for name in ("images", "options"):  # files where folders should be
        folder.mkdir(exist_ok=True)
        (folder / name).write_text("")
    (folder / "log").mkdir()
    (folder / "log/train.csv").mkdir()
    assert run("-opt", option_file(tmp_path, "one", val={"save_img": True})) == 0
    said = capsys.readouterr().out
    for name in ("images/", "options/", "log/train.csv", "report"):
        assert any(line.startswith("warning") and name in line for line in said.splitlines()), name
    assert final(folder, 9)


def test_a_log_folder_that_cannot_be_written_is_a_warning(tmp_path, capsys):
    (tmp_path / "one").mkdir()
    (tmp_path / "one/log").write_text("a file")
    assert run("-opt", option_file(tmp_path, "one")) == 0
    assert "warning" in capsys.readouterr().out and final(tmp_path / "one", 9)


def test_test_csv_follows_the_history(tmp_path, monkeypatch):
    path = option_file(tmp_path, "one")
    with monkeypatch.context() as patch:
        cut_off_after(patch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))  # in the validation of iteration 6
        assert run("-opt", path) == 143
    with open(tmp_path / "one/log/test.csv", "a") as file:  # as a kill between the row and the checkpoint leaves it
        file.write("6" + "," * 8 + "\n")
    assert run("-opt", path) == 0
    assert validated(tmp_path / "one") == [3, 6, 9]
    elsewhere = option_file(tmp_path, "two")
    assert run("-opt", elsewhere, "--resume", tmp_path / "one/models/6.json") == 0
    assert validated(tmp_path / "two") == [3, 6, 9]


@pytest.mark.parametrize("background", [False, True], ids=["waiting", "in background"])
def test_a_last_save_that_fails_is_not_a_finished_run(tmp_path, monkeypatch, capsys, background):
    keep = {"on_save_error": "warn", "async": background}
    path, real = option_file(tmp_path, "one", checkpoint=keep), checkpoint.commit
    refused = []

    def full(folder, iteration, *args, **kwargs):
        if iteration == 9 and len(refused) < 50:
            refused.append(time.monotonic())
            raise OSError(28, "No space left on device")
        return real(folder, iteration, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "commit", full)
        patch.setattr(time, "sleep", lambda seconds: None)
        with pytest.raises(checkpoint.CheckpointError, match="checkpoint 9 was not saved: .*No space left"):
            run("-opt", path)
    assert "finished" not in capsys.readouterr().out and len(refused) >= 3
    status = json.loads((tmp_path / "one/log/status.json").read_text())
    assert status["state"] == "failed" and "No space left" in status["reason"]
    assert run("-opt", path) == 0
    assert run("-opt", option_file(tmp_path, "two", checkpoint=keep)) == 0
    assert_equal_runs(tmp_path / "two", tmp_path / "one")


def test_a_stop_whose_save_fails_tries_again(tmp_path, monkeypatch, capsys):
    path, real = option_file(tmp_path, "one", checkpoint={"on_save_error": "warn"}), checkpoint.commit
    refused = []

    def full_twice(folder, iteration, *args, **kwargs):
        if folder.name != ".probe" and len(refused) < 2:
            refused.append(iteration)
            raise OSError(28, "No space left on device")
        return real(folder, iteration, *args, **kwargs)

    monkeypatch.setattr(checkpoint, "commit", full_twice)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    run_until(2, "-opt", path)
    assert refused == [2, 2] and checkpoint.find_newest(tmp_path / "one/models").iteration == 2


def test_other_samples_of_equal_number_are_said_at_the_resume(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tiny.Images, "sample_names", lambda self: [f"{i}.png" for i in range(11)], raising=False)
    path = option_file(tmp_path, "one", train={"total_iter": 3})
    assert run("-opt", path) == 0
    more = ["-opt", path, "--set", "train.total_iter=6"]
    assert run(*more) == 0 and "but others, or in another order" not in capsys.readouterr().out
    monkeypatch.setattr(tiny.Images, "sample_names", lambda self: [f"{i}.jpg" for i in range(11)])
    assert run(*more, "--set", "train.total_iter=9") == 0
    assert "warning  the training set has 11 samples as before, but other ones" in capsys.readouterr().out


def test_a_test_sample_that_hangs_does_not_hold_a_stop(tmp_path, monkeypatch):
    real = tiny.Images.__getitem__

    def hanging(self, key):
        if not isinstance(key, tuple):  # of a test set
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
            raise AssertionError("the stop request waited for the sample")
        return real(self, key)

    path = option_file(tmp_path, "one", train={"checkpoint_save": 100})
    with monkeypatch.context() as patch:
        patch.setattr("commands.dry_run.look", lambda run: None)
        patch.setattr(tiny.Images, "__getitem__", hanging)
        assert run("-opt", path) == 143
    assert checkpoint.find_newest(tmp_path / "one/models").iteration == 3
    assert run("-opt", path) == 0
