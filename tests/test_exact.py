"""The final state of an interrupted run equals a straight run's, for every layout, way to save and kind of step."""

import os
import random
import shutil
import signal

import numpy as np
import pytest
import torch

import checkpoint
from models.model_plain import ModelPlain
from options import OptionError
from tests import tiny
from tests.conftest import write_json
from tests.test_resume import differing, run

TOTAL = 9  # 11 samples in batches of 4: epochs of 2 steps, so that these cross four boundaries
LAYOUTS = {"split": {"layout": "split"}, "bundle": {"layout": "bundle", "keep_last_n": 2},
           "latest only": {"layout": "bundle", "name": None},
           "iterations": {"layout": "bundle", "name": "it{iter}.pth"}}
STEPS = {"plain": {}, "parts": {"accumulate": 3}, "bf16": {"amp": "bf16"}, "fp16": {"amp": "fp16", "accumulate": 2},
         "no clipping, no average": {"G_optimizer_clipgrad": None, "E_decay": 0}, "epochs": {"save_interval": 1},
         "adamw": {"G_optimizer_type": "adamw", "G_optimizer_wd": 0.1}}


pytestmark = pytest.mark.usefixtures("tiny_tables")


def final(folder, iteration=TOTAL):
    found = checkpoint.find_newest(folder / "models")
    assert found.iteration == iteration
    return found.load()


def stopped_at(monkeypatch, step, sig=signal.SIGTERM):
    """From now on a run of this process is sent a signal in that step."""
    real = ModelPlain.optimize_parameters

    def interrupted(self, current_step):
        real(self, current_step)
        if current_step == step:
            os.kill(os.getpid(), sig)

    monkeypatch.setattr(ModelPlain, "optimize_parameters", interrupted)


def straight_and_stopped(tmp_path, monkeypatch, stops, workers=(0,), **over):
    """Folders of two runs: one never stopped, one stopped in these steps and gone on with, workers taking turns."""
    assert run("-opt", write_json(tmp_path / "one.json", tiny.options(tmp_path, "one", **over))) == 0
    for i, step in enumerate([*stops, None]):
        tree = tiny.options(tmp_path, "two", workers=workers[i % len(workers)], **over)
        with monkeypatch.context() as patch:
            stopped_at(patch, step)
            assert run("-opt", write_json(tmp_path / "two.json", tree)) == (143 if step else 0)
    return tmp_path / "one", tmp_path / "two"


def assert_equal(one, two):
    a, b = final(one), final(two)
    assert set(a) == set(b) and differing(a, b) == []
    for table in ("train", "test"):
        assert (one / "log" / f"{table}.csv").read_text() == (two / "log" / f"{table}.csv").read_text()


@pytest.mark.parametrize("background", [False, True], ids=["waiting", "in background"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("step", [1, 2, 3, 4, 8])
def test_every_layout_at_each_place_in_an_epoch(tmp_path, monkeypatch, layout, background, step):
    one, two = straight_and_stopped(tmp_path, monkeypatch, [step], checkpoint={**LAYOUTS[layout], "async": background})
    assert_equal(one, two)
    assert sorted(os.listdir(one / "models")) == sorted(os.listdir(two / "models"))  # also what is kept is the same


@pytest.mark.parametrize("kind", STEPS)
@pytest.mark.parametrize("layout", ["split", "bundle"])
def test_every_kind_of_step(tmp_path, monkeypatch, kind, layout):
    one, two = straight_and_stopped(tmp_path, monkeypatch, [3, 6], train=STEPS[kind], checkpoint=LAYOUTS[layout])
    assert_equal(one, two)
    state = final(one)["state"]
    assert bool(state["scaler_state_dict"]) == (kind == "fp16") and state["history"] and state["best"]


@pytest.mark.slow  # the compiler takes most of a minute
def test_compiled_steps(tmp_path, monkeypatch):
    one, two = straight_and_stopped(tmp_path, monkeypatch, [3, 6], train={"compile": True})
    assert_equal(one, two)


@pytest.mark.parametrize("workers", [(0, 1, 2), (2, 0, 1), (1, 2, 0)], ids=str)
def test_workers_changed_at_each_resume(tmp_path, monkeypatch, workers):
    assert_equal(*straight_and_stopped(tmp_path, monkeypatch, [3, 6], workers))


def test_what_a_validation_draws_leaves_the_training_alone(tmp_path, monkeypatch):
    real = ModelPlain.test
    for name in ("one", "two"):
        assert run("-opt", write_json(tmp_path / f"{name}.json", tiny.options(tmp_path, name))) == 0
        monkeypatch.setattr(ModelPlain, "test", lambda self: (real(self), torch.rand(1), random.random(),
                                                              np.random.random()))
    assert_equal(tmp_path / "one", tmp_path / "two")


def test_the_layout_may_change_at_a_resume(tmp_path, monkeypatch):
    one, two = tmp_path / "one", tmp_path / "two"
    assert run("-opt", write_json(tmp_path / "one.json", tiny.options(tmp_path, "one"))) == 0
    for layout, step in (("bundle", 3), ("split", 6), ("bundle", None)):
        tree = tiny.options(tmp_path, "two", checkpoint=LAYOUTS[layout])
        with monkeypatch.context() as patch:
            stopped_at(patch, step)
            run("-opt", write_json(tmp_path / "two.json", tree))
    assert_equal(one, two)


def test_parts_of_a_batch_make_the_same_step(tmp_path):
    """Without dropout and batch statistics, accumulation differs from the whole batch by rounding only."""
    torch.manual_seed(0)
    data, gradients = torch.rand(5, 3, 16, 16), []
    for parts in (1, 2, 5):
        torch.manual_seed(1)
        model = ModelPlain.__new__(ModelPlain)
        net = tiny.Net().eval()
        model.__dict__ |= {"netG": net, "forward_G": net, "netE": None, "G_lossfn": torch.nn.L1Loss(),
                           "scaler": None, "log_dict": {}, "optimizers": {}, "gradient_norms": {},
                           "device": torch.device("cpu"), "degraded": data, "target": data * 0.5, "skipped": 0,
                           "G_optimizer": torch.optim.SGD(net.parameters(), 0.0),
                           "opt_train": {"accumulate": parts, "amp": None, "G_lossfn_weight": 2.0, "on_nan": "stop",
                                         "G_optimizer_clipgrad": None}}
        model.optimize_parameters(1)
        gradients.append([p.grad.clone() for p in net.parameters()] + [model.log_dict["G_loss"]])
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-5, atol=1e-7)


def test_latest_and_best_are_links_that_retention_leaves(tmp_path):
    keep = {"layout": "bundle", "keep_last_n": 1, "name": "it{iter}.pt", "best_metric": "psnr", "best_mode": "min"}
    tree = tiny.options(tmp_path, "one", checkpoint=keep, train={"checkpoint_test": 1})
    assert run("-opt", write_json(tmp_path / "one.json", tree)) == 0
    models, history = tmp_path / "one/models", final(tmp_path / "one")["state"]["history"]
    worst = min(history, key=lambda row: row["test.psnr"])["iteration"]
    assert sorted(os.listdir(models)) == ["best.pt", "it9.pt", "latest.pt"]
    assert (models / "latest.pt").samefile(models / "it9.pt")
    assert checkpoint.locate(models / "best.pt").iteration == worst < TOTAL


def test_an_operation_without_a_deterministic_kernel_is_named(tmp_path, monkeypatch):
    def refused(self, step):
        raise RuntimeError("grid_sampler_2d_backward_cuda does not have a deterministic implementation, but you set")

    monkeypatch.setattr(ModelPlain, "optimize_parameters", refused)
    with pytest.raises(OptionError, match="grid_sampler_2d_backward_cuda has no deterministic kernel on"):
        run("-opt", write_json(tmp_path / "one.json", tiny.options(tmp_path, "one")))


@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2], ids=lambda s: s.name)
def test_every_signal_stops_after_the_step_with_its_exit_code(tmp_path, monkeypatch, capsys, sig):
    path = write_json(tmp_path / "one.json", tiny.options(tmp_path, "one"))
    with monkeypatch.context() as patch:
        stopped_at(patch, 5, sig)
        assert run("-opt", path) == 128 + sig
    said = capsys.readouterr().out
    assert f"stopped  by {sig.name} after iteration 5; resume with: python main.py -opt {path}" in said


def test_an_interrupted_save_has_one_slot_that_the_next_regular_one_frees(tmp_path, monkeypatch):
    path = write_json(tmp_path / "one.json", tiny.options(tmp_path, "one", checkpoint=LAYOUTS["bundle"]))
    for step in (3, 5):  # 3 is validated and the best, so it is kept under that name
        with monkeypatch.context() as patch:
            stopped_at(patch, step, signal.SIGINT)
            assert run("-opt", path) == 130
        assert "interrupted.pt" in os.listdir(tmp_path / "one/models")
    assert checkpoint.find_newest(tmp_path / "one/models").path.name == "interrupted.pt"
    assert run("-opt", path) == 0
    assert "interrupted.pt" not in os.listdir(tmp_path / "one/models")


def test_going_back_puts_links_right(tmp_path):
    path = write_json(tmp_path / "one.json", tiny.options(tmp_path, "one", checkpoint=LAYOUTS["iterations"]))
    assert run("-opt", path) == 0
    kept = final(tmp_path / "one")
    assert run("-opt", path, "--resume", tmp_path / "one/models/it4.pth") == 0
    assert differing(kept, final(tmp_path / "one")) == []
    (archive,) = (tmp_path / "one").glob("models_*")
    assert {"it6.pth", "it9.pth", "latest.pt"} <= set(os.listdir(archive))
    shutil.rmtree(archive)
    assert run("-opt", path, "--fresh") == 0
    assert differing(kept, final(tmp_path / "one")) == []


@pytest.mark.parametrize("background", [False, True], ids=["waiting", "in background"])
def test_parameters_in_another_memory_format_resume_exactly(tmp_path, monkeypatch, background):
    """A background save's snapshot is contiguous, its parameters need not be."""
    real = ModelPlain.__init__

    def channels_last(self, opt):
        real(self, opt)
        for network in self.networks.values():
            network.to(memory_format=torch.channels_last)

    monkeypatch.setattr(ModelPlain, "__init__", channels_last)
    assert_equal(*straight_and_stopped(tmp_path, monkeypatch, [3, 6], checkpoint={"async": background}))
