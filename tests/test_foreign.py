"""Training files that others wrote, and older ones of ours: what is there is used, what is absent is named."""

import argparse
import re
import shutil
import zlib

import numpy as np
import pytest
import torch

import checkpoint
from checkpoint import CheckpointError, commit, find_newest, locate
from models.model_base import _by_module
from models.model_plain import ModelPlain
from storage import foreign, sealed
from tests import tiny
from tests.conftest import write_json
from tests.runs import differing, final, run, run_until
from tests.test_checkpoint import parts
from tests.test_segmentation import options_in

pytestmark = pytest.mark.usefixtures("tiny_tables")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished run of 9 steps, of 4 epochs with one left over."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        tiny.add_rows(patch)
        assert run("-opt", tiny.write(folder, "one")) == 0
    return folder / "one"


@pytest.fixture
def state(finished):
    """Its parts, for one test to change."""
    return final(finished)


def prefixed(weights, prefix):
    return {f"{prefix}{key}": value for key, value in weights.items()}


def files_of_others(state):
    """name -> (dict as that program writes it, iteration that it tells or None, absent parts)."""
    g, adam = state["G"], state["optimizerG"]
    return {
        "lightning.ckpt": ({"epoch": 3, "global_step": 7, "pytorch-lightning_version": "2.1.0", "state_dict": g,
                            "optimizer_states": [adam], "lr_schedulers": [{"last_epoch": 7}], "loops": {"a": 1}},
                           7, "E, sampler_state"),
        "prefixed.ckpt": ({"epoch": 3, "global_step": 7, "state_dict": prefixed(g, "model.")
                           | {"loss.weight": torch.ones(2)}}, 7, "E, optimizerG, sampler_state"),
        "checkpoint_epoch2.pth": ({"version": 1, "epoch": 2, "model_state_dict": g, "optimizer_state_dict": adam,
                                   "scheduler_state_dict": None, "metric": 0.5, "config": {"model": {}},
                                   "metadata": {"stage": "dense"}, "timestamp": "x"}, None,
                                  "E, sampler_state"),
        "epoch_0003.pt": ({"epoch": 3, "model_state_dict": prefixed(g, "_orig_mod."), "optimizer_state_dict": adam,
                           "scheduler_state_dict": {"T_max": 100, "last_epoch": 3}, "scaler_state_dict": {},
                           "config": {}, "metrics": {"loss": 1.0}},  # LGT counts from 1
                          None, "E, sampler_state"),
        "vqgan_7.pth": ({"steps": 7, "state_dict": g, "optimizer": adam, "optimizer_disc": adam, "scheduler": {}},
                        7, "E, sampler_state"),
    }


def test_an_old_dictionary_says_what_it_lacks(tmp_path, state, capsys):
    torch.save({"epoch": 2, "model_state_dict": state["G"], "loss": 0.25, "config": {"embed_dim": 64, "lr": 1e-3}},
               tmp_path / "old.pth")
    assert locate(tmp_path / "old.pth").load()["state"]["metric"] == 0.25
    path = tiny.write(tmp_path, "two", train={"total_iter": 7})
    assert run("-opt", path, "--resume", tmp_path / "old.pth") == 0
    said = capsys.readouterr().out
    assert "absent   E, optimizerG, sampler_state: starts over" in said and "embed_dim" not in said
    assert "it has no scheduler, and none is needed" in said and "its options are those of another program" in said


@pytest.mark.parametrize("count", [5.0, torch.tensor(5), torch.tensor([5.0])])
def test_an_iteration_kept_as_a_float_or_tensor_counts(count):
    payload = {"model": {"w": torch.ones(1)}, "iter": count, "epoch": 1}
    assert foreign.unpack(payload, "x")["state"]["iteration"] == 5


@pytest.mark.parametrize("name", ["lightning.ckpt", "prefixed.ckpt", "checkpoint_epoch2.pth", "epoch_0003.pt",
                                  "vqgan_7.pth"])
def test_resume_takes_a_training_file_of_others_and_says_what_is_absent(tmp_path, state, capsys, name):
    payload, iteration, absent = files_of_others(state)[name]
    torch.save(payload, tmp_path / name)
    iteration = iteration or 6  # 3 finished epochs of 2 steps
    tree = tiny.options(tmp_path, "two", train={"total_iter": iteration + 1, "G_optimizer_lr": 0.0})
    assert run("-opt", write_json(tmp_path / "two.json", tree), "--resume", tmp_path / name) == 0
    said = capsys.readouterr().out
    assert f"resume   from {tmp_path / name}: iteration {iteration} of {iteration + 1}, epoch 3" in said
    assert f"absent   {absent}: starts over, so the run is not bit" in said
    found = checkpoint.find_newest(tmp_path / "two/models").load()
    for key in ("body.0.weight", "body.4.bias"):  # the rate is 0, so what was loaded is still there
        assert torch.equal(found["G"][key], state["G"][key])
    if "optimizerG" not in absent:
        assert found["optimizerG"]["state"][0]["step"] == state["optimizerG"]["state"][0]["step"] + 1


def test_a_folder_of_another_program_resumes_from_the_newest(tmp_path, state, capsys):
    models = tmp_path / "two/models"
    models.mkdir(parents=True)
    payload = files_of_others(state)["epoch_0003.pt"][0]
    for epoch in (9, 10):
        torch.save(payload | {"epoch": epoch, "scheduler_state_dict": {}}, models / f"epoch_{epoch + 1}.pt")
    torch.save({"some": torch.ones(1)}, models / "vgg16.pth")
    tree = tiny.options(tmp_path, "two", train={"total_iter": 23})
    assert run("-opt", write_json(tmp_path / "two.json", tree)) == 0
    assert f"resume   from {models / 'epoch_11.pt'}: iteration 22 of 23" in capsys.readouterr().out


def test_tamings_file_gives_both_networks_and_both_optimizers(tmp_path):
    adam = parts()["optimizerG"]
    torch.save({"state_dict": {"encoder.w": torch.ones(1), "loss.discriminator.main.0.weight": torch.ones(2),
                               "loss.perceptual_loss.lin0.weight": torch.ones(3)},
                "optimizer_states": [adam, adam], "global_step": 5, "epoch": 1}, tmp_path / "last.ckpt")
    loaded = locate(tmp_path / "last.ckpt").load()
    assert list(loaded["G"]) == ["encoder.w"] and list(loaded["D"]) == ["main.0.weight"]
    assert {"optimizerG", "optimizerD"} <= set(loaded) and loaded["state"]["iteration"] == 5


def test_kairs_and_basicsrs_weights_start_a_run(tmp_path, state, capsys):
    torch.save({"params": state["G"], "params_ema": state["E"]}, tmp_path / "basicsr.pth")
    with pytest.raises(CheckpointError, match="holds weights only, no iteration; start from them with --init-from"):
        locate(tmp_path / "basicsr.pth")
    path = tiny.write(tmp_path, "two", train={"total_iter": 1})
    assert run("-opt", path, "--init-from", tmp_path / "basicsr.pth") == 0
    assert "loaded      9 tensors" in capsys.readouterr().out


def test_weights_below_a_prefix_are_found_for_the_network_that_they_fit():
    net, model = tiny.Net(), ModelPlain.__new__(ModelPlain)
    own = {key: torch.full_like(value, 2) for key, value in net.state_dict().items()}
    report = model.load_weights(net, prefixed(own, "net.generator.") | {"loss.w": torch.ones(1)}, True, "x.ckpt")
    assert "9 of 9 tensors loaded by name below 'net.generator.'" in report and "skipped 1: loss.w" in report
    assert all(torch.equal(value, own[key]) for key, value in net.state_dict().items())


def test_tensors_are_counted_by_modules_no_deeper_than_8_of_them_allow():
    assert _by_module(["a.b.c.d.e.w", "a.b.c.d.f.w", "bias"]) == "a.b.c.d (2), bias (1)"
    assert _by_module([f"body.{i // 3}.{i}.w" for i in range(9)]) == "body.0 (3), body.1 (3), body.2 (3)"
    assert _by_module([f"{i}.w" for i in range(10)]).endswith("7 (1), and 2 more modules")


def test_an_optimizer_of_another_network_is_refused_by_name(tmp_path, state):
    state["optimizerG"]["state"][0]["exp_avg"] = torch.zeros(5)
    torch.save({"global_step": 2, "state_dict": state["G"], "optimizer": state["optimizerG"]}, tmp_path / "x.ckpt")
    path = tiny.write(tmp_path, "two")
    with pytest.raises(CheckpointError, match=r"x.ckpt: optimizerG: exp_avg \(5,\) does not fit a parameter of \(8, 3"):
        run("-opt", path, "--resume", tmp_path / "x.ckpt")
    assert not (tmp_path / "two").exists()


# ---------------------------------------------------------------- never random weights for trained ones


def resumed(tmp_path, source, total, name="two", **train):
    """Exit code of a run of the tiny recipe from a file of others."""
    tree = tiny.options(tmp_path, name, train={"total_iter": total, "G_optimizer_lr": 0.0, **train})
    return run("-opt", write_json(tmp_path / f"{name}.json", tree), "--resume", source)


def assert_weights_of(tmp_path, state, name="two"):
    found = checkpoint.find_newest(tmp_path / name / "models").load()
    for key in ("body.0.weight", "body.4.bias"):  # the rate is 0, so what was loaded is still there
        assert torch.equal(found["G"][key], state["G"][key])
    return found


UNKNOWN = {"an unknown key": lambda s: {"net_of_mine": s["G"], "iter": 5}, "two known keys": lambda s: {
           "net": s["G"], "generator": s["G"], "iter": 5}, "only E": lambda s: {"params_ema": s["E"], "iter": 5},
           "only an optimizer": lambda s: {"optimizer": s["optimizerG"], "epoch": 3, "iter": 5},
           "no tensor": lambda s: {"model_state_dict": {}, "epoch": 3}, "a list": lambda s: {
           "net": list(s["G"].values()), "global_step": 5}, "BasicSR's state": lambda s: {
           "epoch": 1, "iter": 5, "optimizers": [s["optimizerG"]], "schedulers": []}}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_a_file_without_a_network_is_not_resumed(tmp_path, state, capsys, kind):
    payload = UNKNOWN[kind](state)
    models = tmp_path / "own/models"
    models.mkdir(parents=True)
    capsys.readouterr()
    own = tiny.write(tmp_path, "own")
    there = tmp_path / "theirs.pth"
    for source, words in ((there, ("--resume", there)), (models / "theirs.pth", ())):
        torch.save(payload, source)
        path = own if not words else tiny.write(tmp_path, "two")
        with pytest.raises(CheckpointError, match="holds no weights under a known key") as caught:
            run("-opt", path, *words)
        said = str(caught.value)
        assert "\n" not in said and all(key in said for key in payload)
        assert "iter " not in capsys.readouterr().out
    assert not (tmp_path / "two").exists() and [path.name for path in models.iterdir()] == ["theirs.pth"]


def test_the_way_out_of_an_unknown_key_can_be_typed(tmp_path, state, monkeypatch):
    torch.save({"net_of_mine": state["G"], "iter": 5}, tmp_path / "theirs.pth")
    with pytest.raises(CheckpointError) as caught:
        locate(tmp_path / "theirs.pth")
    command = re.search(r'python -c "(.*?)",', str(caught.value))[1]
    monkeypatch.chdir(tmp_path)
    exec(command, {})
    weights, _ = checkpoint.read_weights(tmp_path / "weights.pth")
    assert differing(weights, state["G"]) == []


@pytest.mark.parametrize("key", ["net", "netG", "net_g", "generator", "network", "weights", "G_state_dict"])
def test_the_usual_names_of_a_network_are_understood(tmp_path, state, key):
    torch.save({key: prefixed(state["G"], "module."), "iter": torch.tensor(5), "optim": state["optimizerG"]},
               tmp_path / "theirs.pth")
    assert resumed(tmp_path, tmp_path / "theirs.pth", 6) == 0
    assert assert_weights_of(tmp_path, state)["optimizerG"]["state"][0]["step"] == 10
    assert differing(checkpoint.read_weights(tmp_path / "theirs.pth")[0], state["G"]) == []


@pytest.mark.parametrize("named", ["", "models", "training_states", "training_states/10.state", "models/net_g_10.pth"])
def test_basicsrs_network_and_state_resume_together(tmp_path, state, capsys, named):
    place = tmp_path / "theirs"
    (place / "models").mkdir(parents=True)
    (place / "training_states").mkdir()
    for iteration in (9, 10):
        torch.save({"params": state["G"], "params_ema": state["E"]}, place / f"models/net_g_{iteration}.pth")
        torch.save({"epoch": 2, "iter": iteration, "optimizers": [state["optimizerG"]], "schedulers": [{"_last_lr": [
            0.3], "last_epoch": iteration}]}, place / f"training_states/{iteration}.state")
    shutil.copy(place / "models/net_g_10.pth", place / "models/net_g_latest.pth")
    torch.save({"params": state["G"]}, place / "models/net_g_11.pth")  # its state was not written any more
    assert resumed(tmp_path, place / named, 11) == 0
    said = capsys.readouterr().out
    assert "iteration 10 of 11" in said and "absent   sampler_state: starts over" in said
    assert "was at learning rate 0.3; here it follows from the options" in said
    assert assert_weights_of(tmp_path, state)["optimizerG"]["state"][0]["step"] == 10
    (place / "models/net_g_10.pth").unlink()
    with pytest.raises(CheckpointError, match="a training state without a network; net_g_10.pth is missing"):
        locate(place / "training_states/10.state")


def test_an_optimizer_that_is_none_is_refused_by_name(tmp_path, state):
    for label in ("G", "optimizerG"):
        torch.save(state["G"], tmp_path / f"300_{label}.pth")
    with pytest.raises(CheckpointError, match="its optimizerG is not an optimizer's state; move that file elsewhere"):
        resumed(tmp_path, tmp_path / "300_G.pth", 301)


def test_a_file_without_checksums_is_called_so(tmp_path, state, capsys):
    for old in (True, False):
        torch.save({"state_dict": state["G"], "iter": 6}, tmp_path / "x.pth", _use_new_zipfile_serialization=not old)
        assert resumed(tmp_path, tmp_path / "x.pth", 7, name=f"run{old}") == 0
        assert ("which has no checksums: damage in it cannot be detected" in capsys.readouterr().out) == old


# ---------------------------------------------------------------- what else is in such files


class ModelCheckpoint:
    """A callback of the program that wrote the file: Lightning 1.x keeps its class as a key."""


def test_unknown_classes_and_numpy_values_beside_what_is_used_do_no_harm(tmp_path, state, capsys):
    payload = {"state_dict": state["G"], "optimizer_states": [state["optimizerG"]], "global_step": np.int64(7),
               "epoch": 3, "callbacks": {ModelCheckpoint: {"best": ModelCheckpoint()}}, "best_acc": np.float64(0.9),
               "hyper_parameters": argparse.Namespace(lr=np.float32(0.1), at=np.arange(3)), "where": tmp_path,
               "dates": [np.datetime64("2024-01-01")], "lr_schedulers": [{"last_epoch": 7}]}
    torch.save(payload, tmp_path / "last.ckpt")
    assert resumed(tmp_path, tmp_path / "last.ckpt", 8) == 0
    assert "iteration 7 of 8" in capsys.readouterr().out
    assert assert_weights_of(tmp_path, state)["optimizerG"]["state"][0]["step"] == 10


@pytest.mark.parametrize("kind", ["optimizer", "a moment", "network", "whole"])
def test_an_object_in_what_is_needed_is_refused_with_a_way_out(tmp_path, state, kind):
    adam = torch.optim.Adam(tiny.Net().parameters())
    state["optimizerG"]["state"][0]["exp_avg"] = ModelCheckpoint()
    payload = {"optimizer": {"state_dict": state["G"], "optimizer": adam, "iter": 5},
               "a moment": {"state_dict": state["G"], "optimizer": state["optimizerG"], "iter": 5},
               "network": {"model": tiny.Net(), "iter": 5}, "whole": tiny.Net()}[kind]
    torch.save(payload, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="only the program that wrote it can read; there, torch.save"
                       if kind == "whole" else "holds an object .*state_dict") as caught:
        resumed(tmp_path, tmp_path / "x.pth", 6)
    assert "\n" not in str(caught.value) and not (tmp_path / "two").exists()


@pytest.mark.parametrize("name", ["lightning_class_key.ckpt", "numpy_scalar.pth", "namespace.pth"])
def test_files_from_the_field_give_their_weights(shared, name):
    weights, _ = checkpoint.read_weights(shared / "field" / name)
    assert list(weights) == ["decoder.conv_out.weight"]
    assert locate(shared / "field" / name).iteration == (77 if name.startswith("lightning") else None)


def test_lightning_2_with_two_optimizers_counts_batches(tmp_path):
    """Its global_step counts the steps of each; taming's 1.x and files with one optimizer tell the steps themselves."""
    adam = parts()["optimizerG"]
    progress = {"total": {"ready": 7, "started": 7, "processed": 7, "completed": 6}, "current": {"ready": 2}}
    payload = {"state_dict": {"w": torch.ones(1)}, "global_step": 14, "epoch": 1, "optimizer_states": [adam, adam],
               "loops": {"fit_loop": {"epoch_loop.batch_progress": progress}}}
    for change, iteration in (({}, 7), ({"optimizer_states": [adam]}, 14), ({"loops": {}}, 14), ({"loops": None}, 14),
                              ({"global_step": 5}, 5)):
        torch.save(payload | change, tmp_path / "x.ckpt")
        assert locate(tmp_path / "x.ckpt").iteration == iteration, change


def plateau(losses, lr=1e-3):
    """Optimizer and scheduler of ResUNeta-Torch after these validations, for the weights of the tiny segmentation."""
    from models import MODELS, NETWORKS  # noqa: F401

    weight = torch.nn.Parameter(torch.ones(1))
    adam = torch.optim.Adam([weight], lr=lr)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(adam, mode="min", factor=0.5, patience=1)
    for loss in losses:
        scheduler.step(loss)
    return scheduler.state_dict()


def test_a_users_segmentation_state_brings_history_best_loss_and_plateaus_along(tmp_path, capsys):
    """The dictionary that RESUME_TRAINING_GUIDE describes, metrics in lists of numpy numbers as sklearn gives them."""
    assert run("-opt", options_in(tmp_path, "one", train={"total_epochs": 1})) == 0
    weights = checkpoint.find_newest(tmp_path / "one/models").load()
    losses = [0.5, 0.25, 0.3, 0.3, 0.4]
    metrics = {key: [np.float64(0.1 * i) for i in range(5)] for key in ("iou", "precision", "recall", "f1")}
    torch.save({"epoch": 4, "model_state_dict": weights["G"], "optimizer_state_dict": weights["optimizerG"],
                "scheduler_state_dict": plateau(losses), "train_losses": losses, "val_losses": losses,
                "train_metrics_history": metrics, "val_metrics_history": metrics, "best_val_loss": 0.25,
                "gradient_history": []}, tmp_path / "interrupted_checkpoint.pth")
    path = options_in(tmp_path, "two", train={"total_epochs": 6, "G_scheduler_type": "ReduceLROnPlateau",
                                              "G_optimizer_lr": 1e-3, "G_scheduler_gamma": 0.5,
                                              "G_scheduler_patience": 1})
    capsys.readouterr()
    assert run("-opt", path, "--resume", tmp_path / "interrupted_checkpoint.pth") == 0
    said = capsys.readouterr().out
    assert "iteration 15 of 18" in said and "next learning rate 0.0005" in said and "holds no" not in said
    assert "history  5 validations taken over, the best at iteration 6: loss 0.25" in said
    assert "was at learning rate" not in said
    state = checkpoint.find_newest(tmp_path / "two/models").load()["state"]
    assert state["val_losses"][:5] == losses and len(state["val_losses"]) == 6 == len(state["history"])
    assert state["train_losses"][:5] == losses and state["best_loss"] == min(state["val_losses"])
    assert [row["f1"] for row in state["val_metrics_history"][:5]] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    path = options_in(tmp_path, "three", train={"total_epochs": 6, "G_optimizer_lr": 1e-3})
    assert run("-opt", path, "--resume", tmp_path / "interrupted_checkpoint.pth") == 0
    assert ("its ReduceLROnPlateau (factor 0.5, patience 1) was at learning rate 0.0005; here it follows from the "
            "options: ") in capsys.readouterr().out


@pytest.mark.parametrize("key", ["scheduler", "lr_schedulers", "scheduler_state_dict", "lr_scheduler"])
def test_a_scheduler_that_stood_elsewhere_is_said(tmp_path, state, capsys, key):
    schedule = {"T_max": 100, "eta_min": 0, "last_epoch": 3, "_last_lr": [0.004]}
    torch.save({"model_state_dict": state["G"], "iter": 6, "metric": 0.125, "epoch": 3,
                key: [schedule] if key == "lr_schedulers" else schedule}, tmp_path / "x.pth")
    assert resumed(tmp_path, tmp_path / "x.pth", 7, G_optimizer_lr=0.01) == 0
    said = capsys.readouterr().out
    assert "its scheduler (T_max 100, eta_min 0) was at learning rate 0.004; here it follows from the opt" in said
    assert "its value 0.125" in said and "the best starts over" in said and "it has no scheduler" not in said


# ---------------------------------------------------------------- versions of ours


def test_version_1_resumes(tmp_path, state, capsys):
    """A folder as 0.1.0 left it: no seals, generators, no best."""
    run_until(4, "-opt", tiny.write(tmp_path, "old"))
    found = find_newest(tmp_path / "old/models")
    loaded = found.load()
    loaded["state"] = {key: value for key, value in loaded["state"].items()
                       if key not in ("best", "metric", "metadata", "scheduler_state_dict", "scaler_state_dict")}
    loaded["state"] |= {"version": 1, "rng_state": {"torch": torch.get_rng_state()}}
    loaded["state"]["sampler_state"].pop("length")
    for path in (tmp_path / "old/models").iterdir():
        path.unlink()
    for label, part in loaded.items():
        torch.save(part, tmp_path / f"old/models/4_{label}.pth")
    files = {}
    for label in loaded:
        data = (tmp_path / f"old/models/4_{label}.pth").read_bytes()
        files[f"4_{label}.pth"] = {"size": len(data), "crc32": zlib.crc32(data)}
    record = {"version": 1, "iteration": 4, "timestamp": "x", "reason": "interrupted", "files": files}
    (tmp_path / "old/models/4.json").write_bytes(sealed.with_checksum(record, indent=1))
    assert run("-opt", tmp_path / "old.json") == 0
    assert "a version that saved random generators: draws are new from here" in capsys.readouterr().out
    assert differing(final(tmp_path / "old"), state) == []  # that version's run had other draws before


def test_a_newer_version_is_refused(tmp_path):
    commit(tmp_path, 1, parts(1) | {"state": {"version": foreign.VERSION + 1, "iteration": 1}})
    with pytest.raises(CheckpointError, match="written by a newer Perdure .version 4; this one reads up to 3.; update"):
        find_newest(tmp_path).load()
