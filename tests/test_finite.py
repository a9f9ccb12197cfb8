"""Nothing that is not finite gets into a checkpoint: neither by a loss nor by a gradient nor by what a step leaves."""

import json
import os
import random
import re

import pytest
import torch

import checkpoint
import train
from data.sampler import order
from models.model_plain import ModelPlain
from runtime.hooks import Hooks
from tests import tiny
from tests.conftest import write_json
from tests.runs import assert_equal_runs, final, run

pytestmark = pytest.mark.usefixtures("tiny_tables")


def all_finite(folder):
    parts = checkpoint.find_newest(folder / "models").load()
    moments = [v for values in parts["optimizerG"]["state"].values() for v in values.values()]
    return all(v.isfinite().all() for v in [*parts["G"].values(), *parts["E"].values(), *moments])


class SpoiltGradients(Hooks):
    """Makes the gradient of these steps NaN at a finite loss, as sqrt at 0 does."""

    def __init__(self, steps):
        self.steps = steps

    def before_step(self, run):
        if run.iteration in self.steps:
            self.handle = next(run.model.netG.parameters()).register_hook(lambda gradient: gradient * float("nan"))

    def after_step(self, run):
        if run.iteration in self.steps:
            self.handle.remove()


def test_a_gradient_that_is_not_finite_stops_before_its_step(tmp_path, shared):
    tree = json.loads((shared / "field/nan_gradient.json").read_text())
    tree["path"]["root"] = str(tmp_path)
    path = write_json(tmp_path / "nan.json", tree)
    for _ in range(2):  # the same command again meets the same end, and no checkpoint is spoilt by it
        with pytest.raises(train.NonFiniteLoss, match=r"the gradient is not finite at iteration \d+: G_loss 0\.\d+, "
                                                      "gradient norm of optimizerG nan"):
            run("-opt", path)
        assert all_finite(tmp_path / "nan_gradient")


def test_a_gradient_that_is_not_finite_is_named_with_its_step(tmp_path):
    with pytest.raises(train.NonFiniteLoss, match="the gradient is not finite at iteration 5: "):
        run("-opt", tiny.write(tmp_path, "one"), hooks=[SpoiltGradients({5})])
    assert checkpoint.find_newest(tmp_path / "one/models").iteration == 4 and all_finite(tmp_path / "one")


@pytest.mark.parametrize("clip", [0.5, None], ids=["clipped", "not clipped"])
def test_skipping_leaves_such_a_step_out_and_resumes_exactly(tmp_path, clip):
    over = {"train": {"on_nan": "skip", "G_optimizer_clipgrad": clip}}
    for name in ("one", "two"):
        path = tiny.write(tmp_path, name, **over)
        stop = [tiny.stop_after(4)] if name == "two" else []
        assert run("-opt", path, hooks=[SpoiltGradients({3}), *stop]) == (143 if stop else 0)
    assert run("-opt", tmp_path / "two.json") == 0
    assert all_finite(tmp_path / "one")
    assert checkpoint.find_newest(tmp_path / "one/models").load()["state"]["skipped"] == 1
    assert_equal_runs(tmp_path / "one", tmp_path / "two")


def test_a_loss_that_is_not_finite_stops_at_its_step_or_is_skipped_with_its_batch_statistics_put_back(tmp_path):
    def poison(run):
        run.model.degraded = run.model.degraded * float("nan")

    path = tiny.write(tmp_path, "one")
    with pytest.raises(train.NonFiniteLoss, match="not finite at iteration 3: G_loss nan; the same again: "):
        run("-opt", path, hooks=[tiny.At("before_step", 3, poison)])
    assert checkpoint.find_newest(tmp_path / "one/models").iteration == 2 and all_finite(tmp_path / "one")
    skip = ("--set", "train.on_nan=skip")
    assert run("-opt", path, *skip, hooks=[tiny.At("before_step", 3, poison)]) == 0
    assert all_finite(tmp_path / "one") and final(tmp_path / "one", 9)["state"]["skipped"] == 1


def test_a_checkpoint_is_called_intact_only_where_there_is_one(tmp_path):
    path = tiny.write(tmp_path, train={"on_nan": "skip", "nan_limit": 1})
    for step, kept in ((1, "this run has no checkpoint yet"), (3, "the last checkpoint is intact")):
        for skipped in ("stop", "skip"):
            spoil = SpoiltGradients({step})
            with pytest.raises(train.NonFiniteLoss, match=rf"(finite at|until) iteration {step}\b.*; {kept}; "):
                run("-opt", path, "--set", f"train.on_nan={skipped}", hooks=[spoil])
        run("-opt", path, "--set", "train.total_iter=2")


def test_many_skips_in_a_row_end_the_run(tmp_path):
    path = tiny.write(tmp_path, "one", train={"on_nan": "skip", "nan_limit": 3})
    with pytest.raises(train.NonFiniteLoss, match="3 steps in a row were skipped until iteration 6"):
        run("-opt", path, hooks=[SpoiltGradients(range(4, 100))])
    assert all_finite(tmp_path / "one")


@pytest.mark.parametrize("part", ["weight", "moment", "batch statistics"])
def test_weights_or_moments_that_are_not_finite_are_never_committed(tmp_path, part):
    def overflow(run):
        model = run.model
        target = {"weight": next(model.netG.parameters()).data, "batch statistics": model.netG.body[1].running_var,
                  "moment": next(iter(model.G_optimizer.state.values()))["exp_avg_sq"]}[part]
        target.view(-1)[0] = float("nan") if part == "batch statistics" else float("inf")

    path = tiny.write(tmp_path, "one", train={"checkpoint_save": 5})
    with pytest.raises(train.NonFiniteLoss, match="after iteration 5 .* is not finite, so no checkpoint"):
        run("-opt", path, hooks=[tiny.At("after_step", 5, overflow)])
    assert not checkpoint.find_newest(tmp_path / "one/models") or \
        checkpoint.find_newest(tmp_path / "one/models").iteration == 3


def test_infinity_in_a_buffer_is_a_mask_and_is_saved():
    model = ModelPlain.__new__(ModelPlain)
    net = tiny.Net()
    net.register_buffer("mask", torch.tensor([0.0, float("-inf")]))
    model.__dict__ |= {"networks": {"G": net}, "optimizers": {}, "device": torch.device("cpu")}
    net.body[0].weight.data.fill_(3e38)  # finite, though their sum is not
    assert model.find_non_finite() is None
    net.mask[0] = float("nan")
    assert model.find_non_finite() == "G.mask"


def test_fp16_that_never_finds_a_finite_gradient_ends_the_run(tmp_path):
    train_options = {"amp": "fp16", "total_iter": 60, "checkpoint_print": 5}
    path = tiny.write(tmp_path, "one", train=train_options)
    with pytest.raises(train.NonFiniteLoss, match="fp16's loss scale fell to"):
        run("-opt", path, hooks=[SpoiltGradients(range(4, 100))])
    assert all_finite(tmp_path / "one")


def test_a_run_of_nothing_but_skipped_steps_is_not_finished(tmp_path):
    path = tiny.write(tmp_path, "one", train={"on_nan": "skip", "nan_limit": 50})
    with pytest.raises(train.NonFiniteLoss, match="9 steps in a row were skipped"):
        run("-opt", path, hooks=[SpoiltGradients(range(1, 100))])


def test_a_checkpoint_of_weights_that_are_not_finite_is_named(tmp_path):
    path = tiny.write(tmp_path, "one")
    assert run("-opt", path) == 0
    parts = checkpoint.find_newest(tmp_path / "one/models").load()
    parts["G"]["body.0.bias"][0] = float("nan")
    (tmp_path / "spoilt").mkdir()
    checkpoint.commit(tmp_path / "spoilt", 9, parts)
    with pytest.raises(checkpoint.CheckpointError, match="9.json: G.body.0.bias is not finite"):
        run("-opt", path, "--resume", tmp_path / "spoilt/9.json", "--set", "train.total_iter=12")


def fault_in(tmp_path, monkeypatch, key=None, call=None, **over):
    """The message of a run in which one sample, or the input of one forward pass, is NaN."""
    get, forward, calls = tiny.Images.__getitem__, tiny.Net.forward, []
    nan = torch.full((3, 16, 16), float("nan"))

    def passed(self, x):
        calls.append(1)
        return forward(self, x * (float("nan") if len(calls) == call else 1))

    monkeypatch.setattr(tiny.Images, "__getitem__", lambda self, k: get(self, k) | ({"L": nan} if k == key else {}))
    monkeypatch.setattr(tiny.Net, "forward", passed)
    with pytest.raises(train.NonFiniteLoss) as caught:
        run("-opt", tiny.write(tmp_path, train={"accumulate": 2, "checkpoint_test": 0, **over}))
    return str(caught.value)


def test_a_loss_that_is_not_finite_is_computed_again_and_names_its_micro_batch_and_samples(tmp_path, monkeypatch):
    said = fault_in(tmp_path, monkeypatch, key=(1, 4))
    second = order(0, 1, 11)
    place = second.index(4)
    step, number = 3 + place // 4, place % 4 // 2  # the first epoch has two batches of four
    pair = second[place // 2 * 2 : place // 2 * 2 + 2]
    assert f"not finite at iteration {step}: " in said
    assert f"; the same again: micro-batch {number}, index {pair[0]} of epoch 2, index {pair[1]} of epoch 2; " in said
    assert f"--replay {step}" in said


def test_a_loss_that_is_not_finite_only_once_is_the_fault_of_the_machine(tmp_path, monkeypatch):
    said = fault_in(tmp_path, monkeypatch, call=6)  # the second micro-batch of step 3
    assert "not finite at iteration 3: " in said and "another result when computed again: the machine" in said
    assert checkpoint.find_newest(tmp_path / "run/models").iteration == 2 and all_finite(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("trial", range(int(os.environ.get("PERDURE_REPLAYS", "4"))))
def test_a_fault_at_random_is_named_as_repeated_or_not_also_by_a_replay(tmp_path, monkeypatch, capsys, trial):
    """A NaN in a random sample, and a bit flipped in the weights or inputs of one of two computations of a step."""
    draw = random.Random(trial)
    key = draw.choice([(epoch, index) for epoch in range(4) for index in order(0, epoch, 11)[:8]])
    with monkeypatch.context() as patch:
        (tmp_path / "nan").mkdir()
        said = fault_in(tmp_path / "nan", patch, key=key)
        step = int(re.search(r"at iteration (\d+)", said)[1])
        named = f"index {key[1]} of epoch {key[0] + 1}"
        assert re.search(rf"the same again: micro-batch [01], [^;]*{named}[,;]", said)
        capsys.readouterr()
        assert run("-opt", tmp_path / "nan/run.json", "--replay", step) == 0
        said = capsys.readouterr().out
        assert named in said.split("samples  of step")[1] and "nan" in said and "equal    " in said
    with monkeypatch.context() as patch:
        (tmp_path / "once").mkdir()
        assert "another result" in fault_in(tmp_path / "once", patch, call=draw.randrange(1, 17))
    path = tiny.write(tmp_path, "flip", train={"accumulate": 2})
    assert run("-opt", path) == 0
    step = draw.randrange(3, 10)
    begun = checkpoint.find_newest(tmp_path / "flip/models", before=step).iteration
    real, calls, target = tiny.Net.forward, [], 2 * (step - begun - 1) + draw.randrange(4) + 1

    def flipped(self, x):
        calls.append(1)
        if len(calls) == target:
            where = draw.choice([x, *(p.data for p in self.parameters())])
            bits = where.reshape(-1).view(torch.int32)
            bits[draw.randrange(len(bits))] ^= 1 << draw.randrange(12, 31)
            x = bits.view(torch.float32).view(x.shape) if where is x else x
        return real(self, x)

    monkeypatch.setattr(tiny.Net, "forward", flipped)
    capsys.readouterr()
    assert run("-opt", path, "--replay", step) == 1, (step, target)
    assert "differs  a second computation" in capsys.readouterr().out
