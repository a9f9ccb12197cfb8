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
from runtime.history import LossMeans
from runtime.hooks import Hooks
from tests import tiny
from tests.runs import assert_equal_runs, differing, final, rows, run, run_until, straight_and_stopped

TOTAL = 9  # 11 samples in batches of 4: epochs of 2 steps, so that these cross four boundaries
LAYOUTS = {"split": {"layout": "split"}, "bundle": {"layout": "bundle", "keep_last_n": 2},
           "latest only": {"layout": "bundle", "name": None},
           "iterations": {"layout": "bundle", "name": "it{iter}.pth"}}
STEPS = {"plain": {}, "parts": {"accumulate": 4}, "bf16": {"amp": "bf16"}, "fp16": {"amp": "fp16", "accumulate": 2},
         "no clipping, no average": {"G_optimizer_clipgrad": None, "E_decay": 0}, "epochs": {"save_interval": 1},
         "adamw": {"G_optimizer_type": "adamw", "G_optimizer_wd": 0.1}}


pytestmark = pytest.mark.usefixtures("tiny_tables")


@pytest.mark.parametrize("background", [False, True], ids=["waiting", "in background"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_stopped_at_each_place_in_an_epoch(tmp_path, layout, background):
    """In the middle and at the end of one; where nothing, a validation, a save or both were due."""
    keep = {**LAYOUTS[layout], "async": background}
    one, two = straight_and_stopped(lambda name, _: tiny.write(tmp_path, name, checkpoint=keep), [1, 3, 6, 8])
    assert_equal_runs(one, two, TOTAL)
    assert sorted(os.listdir(one / "models")) == sorted(os.listdir(two / "models"))  # also what is kept is the same


@pytest.mark.parametrize("kind, layout", [
    *((kind, "split") for kind in STEPS), ("fp16", "bundle"), ("epochs", "bundle")])
def test_every_kind_of_step(tmp_path, kind, layout):
    over = {"train": STEPS[kind], "checkpoint": LAYOUTS[layout]}
    one, two = straight_and_stopped(lambda name, _: tiny.write(tmp_path, name, **over), [3])
    assert_equal_runs(one, two, TOTAL)
    state = final(one)["state"]
    assert bool(state["scaler_state_dict"]) == (kind == "fp16") and state["history"] and state["best"]


@pytest.mark.slow  # the compiler takes most of a minute
def test_compiled_steps(tmp_path):
    over = {"train": {"compile": True}}
    assert_equal_runs(*straight_and_stopped(lambda name, _: tiny.write(tmp_path, name, **over), [3, 6]))


def test_workers_and_layout_changed_at_each_resume(tmp_path):
    launches = ((0, "bundle"), (2, "split"), (1, "bundle"))

    def write(name, launch):
        workers, layout = launches[launch] if name == "two" else (0, "split")
        return tiny.write(tmp_path, name, workers=workers, checkpoint=LAYOUTS[layout])

    assert_equal_runs(*straight_and_stopped(write, [3, 6]), TOTAL)


def test_what_a_validation_draws_leaves_the_training_alone(tmp_path, monkeypatch):
    real = ModelPlain.test
    for name in ("one", "two"):
        assert run("-opt", tiny.write(tmp_path, name)) == 0
        monkeypatch.setattr(ModelPlain, "test", lambda self: (real(self), torch.rand(1), random.random(),
                                                              np.random.random()))
    assert_equal_runs(tmp_path / "one", tmp_path / "two", TOTAL)


def test_each_hook_is_called_at_its_point(tmp_path):
    calls = []

    class Recorder(Hooks):
        def __getattribute__(self, name):
            return lambda run: calls.append(f"{name} {run.iteration}")

    train = {"total_iter": 3, "checkpoint_save": 2, "checkpoint_test": 3}
    assert run("-opt", tiny.write(tmp_path, "one", train=train), hooks=[Recorder()]) == 0
    assert calls == ["before_training 0", "before_step 1", "after_step 1", "before_step 2", "after_step 2",
                     "before_save 2", "before_step 3", "after_step 3", "before_save 3", "before_validation 3",
                     "before_save 3"]  # with the metrics


def test_parts_of_a_batch_make_the_same_step(tmp_path):
    """Without dropout and batch statistics, accumulation differs from the whole batch by rounding only."""
    torch.manual_seed(0)
    data, gradients = torch.rand(5, 3, 16, 16), []
    for parts in (1, 5):
        torch.manual_seed(1)
        model = ModelPlain.__new__(ModelPlain)
        net = tiny.Net().eval()
        model.__dict__ |= {"netG": net, "forward_G": net, "networks": {"G": net}, "G_lossfn": torch.nn.L1Loss(),
                           "scaler": None, "moving": None,
                           "optimizers": {"optimizerG": torch.optim.SGD(net.parameters(), 0.0)},
                           "device": torch.device("cpu"), "degraded": data, "target": data * 0.5, "skipped": 0,
                           "opt_train": {"accumulate": parts, "amp": None, "G_lossfn_weight": 2.0, "on_nan": "stop",
                                         "G_optimizer_clipgrad": None, "manual_seed": 0}}
        model.optimize_parameters(1)
        gradients.append([p.grad.clone() for p in net.parameters()] + [model.log_dict["G_loss"]])
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-5, atol=1e-7)


def test_latest_and_best_are_links_that_retention_leaves(tmp_path):
    keep = {"layout": "bundle", "keep_last_n": 1, "name": "it{iter}.pt", "best_metric": "psnr", "best_mode": "min"}
    assert run("-opt", tiny.write(tmp_path, "one", checkpoint=keep, train={"checkpoint_test": 1})) == 0
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
        run("-opt", tiny.write(tmp_path, "one"))


@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2], ids=lambda s: s.name)
def test_every_signal_stops_after_the_step_with_its_exit_code_and_the_command_that_resumes(tmp_path, capsys, sig):
    path = tiny.write(tmp_path, "one")
    run_until(5, "-opt", path, sig=sig)
    said = capsys.readouterr().out
    assert f"stopped  by {sig.name} after iteration 5; resume with: python main.py -opt {path}" in said
    assert run("-opt", path) == 0 and f"5.json: iteration 5 of {TOTAL}" in capsys.readouterr().out


def test_an_interrupted_save_has_one_slot_that_the_next_regular_one_frees(tmp_path):
    path = tiny.write(tmp_path, "one", checkpoint=LAYOUTS["bundle"])
    for step in (3, 5):  # 3 is validated and the best, so it is kept under that name
        run_until(step, "-opt", path)
        assert "interrupted.pt" in os.listdir(tmp_path / "one/models")
    assert checkpoint.find_newest(tmp_path / "one/models").path.name == "interrupted.pt"
    assert run("-opt", path) == 0
    assert "interrupted.pt" not in os.listdir(tmp_path / "one/models")


@pytest.mark.parametrize("layout, named", [("iterations", "it4.pth"), ("split", "4_G.pth")])
def test_an_older_one_archives_the_newer_and_leads_to_the_same_end_as_does_fresh(tmp_path, capsys, layout, named):
    path, folder = tiny.write(tmp_path, "one", checkpoint=LAYOUTS[layout]), tmp_path / "one"
    assert run("-opt", path) == 0
    kept = final(folder)
    assert run("-opt", path, "--resume", folder / "models" / named) == 0
    assert differing(kept, final(folder)) == [] and "archived newer checkpoints" in capsys.readouterr().out
    (archive,) = folder.glob("models_*")
    assert [found.iteration for found in checkpoint.find_sets(archive)] == [6, 8, 9]
    assert (archive / ("latest.pt" if layout == "iterations" else "latest.json")).exists()
    assert [int(row["iteration"]) for row in rows(folder)] == list(range(1, 10))
    shutil.rmtree(archive)
    assert run("-opt", path, "--fresh") == 0
    assert differing(kept, final(folder)) == [] and len(list(folder.glob("models_*"))) == 1


@pytest.mark.parametrize("background", [False, True], ids=["waiting", "in background"])
def test_parameters_in_another_memory_format_resume_exactly(tmp_path, monkeypatch, background):
    """A background save's snapshot is contiguous, its parameters need not be."""
    real = ModelPlain.__init__

    def channels_last(self, opt):
        real(self, opt)
        for network in self.networks.values():
            network.to(memory_format=torch.channels_last)

    monkeypatch.setattr(ModelPlain, "__init__", channels_last)
    over = {"checkpoint": {"async": background}}
    assert_equal_runs(*straight_and_stopped(lambda name, _: tiny.write(tmp_path, name, **over), [3, 6]))


def test_losses_in_the_table_are_means_since_the_last_row_and_a_resume_marks_its_row(tmp_path):
    def write(name, launch, every=4):
        return tiny.write(tmp_path, name, train={"checkpoint_print": every})

    each, _ = straight_and_stopped(lambda name, _: tiny.write(tmp_path, f"each_{name}"), [])
    single = [float(row["G_loss"]) for row in rows(each)]
    one, two = straight_and_stopped(write, [6])
    assert [(row["iteration"], row["steps"]) for row in rows(one)] == [("4", "4"), ("8", "4")]
    assert [(row["iteration"], row["steps"]) for row in rows(two)] == [("4", "4"), ("8", "2")]
    for folder, begin in ((one, 4), (two, 6)):
        first, second = (float(row["G_loss"]) for row in rows(folder))
        assert first == pytest.approx(sum(single[:4]) / 4, rel=1e-12)
        assert second == pytest.approx(sum(single[begin:8]) / (8 - begin), rel=1e-12)


def test_terms_of_some_steps_are_averaged_over_those():
    means = LossMeans()
    for step in range(4):
        terms = {"G_loss": torch.tensor(float(step))}
        means.add(terms | ({"D_loss": torch.tensor(10.0 * step)} if step % 2 else {}))
    assert means.num_steps == 4 and means.close() == {"G_loss": 1.5, "D_loss": 20.0}
    assert means.num_steps == 0 and means.close() == {}
