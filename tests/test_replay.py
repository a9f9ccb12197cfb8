"""--replay: a step computed again shows what the run saw, and whether the machine repeats it."""

import re

import pytest
import torch

import options
from tests import tiny
from tests.runs import run
from tests.test_stages import option_file

pytestmark = pytest.mark.usefixtures("tiny_tables")


@pytest.fixture
def trained(tmp_path):
    """The option file of a finished run of 9 steps, and the checksum of its weights after step 6."""
    seen = []
    path = tiny.write(tmp_path, "run", train={"accumulate": 2})
    assert run("-opt", path, hooks=[tiny.At("after_step", 6, lambda run: seen.append(run.model.checksum()))]) == 0
    return path, seen[0]


def test_a_replayed_step_is_that_of_the_run(trained, tmp_path, capsys):
    path, checksum = trained
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    assert run("-opt", path, "--replay", 6) == 0
    said = capsys.readouterr().out
    assert "resume   from" in said and "4.json: iteration 4 of 9" in said
    assert f"weights  {checksum % 2**32:08x} after the step" in said and "equal    a second computation" in said
    assert len(re.findall("losses   of micro-batch", said)) == 2 and "\ngradient norm of optimizerG 0." in said
    assert len(re.findall(r"index \d+ of epoch 3", said)) == 4
    assert sorted(tmp_path.rglob("*")) == before
    assert run("-opt", path, "--replay", 6, "--resume", tmp_path / "run/models/2.json") == 0
    assert f"weights  {checksum % 2**32:08x} after the step" in capsys.readouterr().out


def test_a_machine_that_does_not_repeat_itself_is_found(trained, capsys, monkeypatch):
    """The last bits of an input differ in one of the two computations."""
    path, _ = trained
    real, calls = tiny.Net.forward, []

    def flipped(self, x):
        calls.append(1)
        return real(self, x * (1 + 1e-6 * (len(calls) == 5)))  # steps 5 and 6 and 6 have two micro-batches each

    monkeypatch.setattr(tiny.Net, "forward", flipped)
    assert run("-opt", path, "--replay", 6) == 1
    assert "differs  a second computation gives another result" in capsys.readouterr().out


def test_a_sample_that_is_not_finite_is_named(trained, capsys, monkeypatch):
    path, _ = trained
    real = tiny.Images.__getitem__
    monkeypatch.setattr(tiny.Images, "__getitem__", lambda self, key: real(self, key) | (
        {"L": torch.full((3, 16, 16), float("nan"))} if key == (2, 1) else {}))
    assert run("-opt", path, "--replay", 6) == 0
    said = capsys.readouterr().out
    assert "index 1 of epoch 3" in said and said.count("G_loss nan") == 1 and "equal" in said


@pytest.mark.parametrize("step, words, message", [
    (0, (), "--replay 0: must be 1 or above"), (10, (), "--replay 10: the run has 9 steps"),
    (4, ("--resume", "6"), "is at iteration 6, after that step; name an older checkpoint")])
def test_a_step_that_cannot_be_replayed_is_one_line(trained, tmp_path, step, words, message):
    words = [tmp_path / f"run/models/{word}.json" if word.isdigit() else word for word in words]
    with pytest.raises(options.OptionError, match=message):
        run("-opt", trained[0], "--replay", step, *words)


def test_the_first_step_of_a_later_stage_is_replayed_from_the_weights_it_began_with(tmp_path, capsys):
    seen = []
    path = option_file(tmp_path)
    look = tiny.At("after_step", 1, lambda run: seen.append(run.model.checksum()))
    assert run("-opt", path, "--run-all-stages", hooks=[look]) == 0
    capsys.readouterr()
    assert run("-opt", path, "--replay", 1, "--stage", "two") == 0
    said = capsys.readouterr().out
    assert "from the best of one" in said and f"weights  {seen[1] % 2**32:08x} after the step" in said
    with pytest.raises(options.OptionError, match="--replay 5: the run has 4 steps"):
        run("-opt", path, "--replay", 5)  # of the last stage


def test_a_step_past_the_last_epoch_is_one_line(tmp_path):
    path = tiny.write(tmp_path, train={"total_epochs": 2})
    assert run("-opt", path) == 0
    with pytest.raises(options.OptionError, match="--replay 5: the run has 4 steps"):
        run("-opt", path, "--replay", 5)
