"""Training files that others wrote, and older ones of ours: what is there is used, what is absent is named."""

import zlib

import pytest
import torch

import checkpoint
import durable
import foreign
from checkpoint import CheckpointError, commit, find_newest, locate
from models.model_plain import ModelPlain
from tests import tiny
from tests.conftest import write_json
from tests.test_checkpoint import parts
from tests.test_exact import differing, final, run, stopped_at

pytestmark = pytest.mark.usefixtures("tiny_tables")


@pytest.fixture
def state(tmp_path):
    """Parts of a finished run of 9 steps, of 4 epochs with one left over."""
    assert run("-opt", write_json(tmp_path / "one.json", tiny.options(tmp_path, "one"))) == 0
    return final(tmp_path / "one")


def prefixed(weights, prefix):
    return {f"{prefix}{key}": value for key, value in weights.items()}


def files_of_others(state):
    """name -> (dict as that program writes it, iteration that it tells or None, absent parts)."""
    g, adam = state["G"], state["optimizerG"]
    return {
        "lightning.ckpt": ({"epoch": 3, "global_step": 7, "pytorch-lightning_version": "2.1.0", "state_dict": g,
                            "optimizer_states": [adam], "lr_schedulers": [{"last_epoch": 7}], "loops": {"a": 1}},
                           7, "E, rng_state, sampler_state"),
        "prefixed.ckpt": ({"epoch": 3, "global_step": 7, "state_dict": prefixed(g, "model.")
                           | {"loss.weight": torch.ones(2)}}, 7, "E, optimizerG, rng_state, sampler_state"),
        "checkpoint_epoch2.pth": ({"version": 1, "epoch": 2, "model_state_dict": g, "optimizer_state_dict": adam,
                                   "scheduler_state_dict": None, "metric": 0.5, "config": {"model": {}},
                                   "metadata": {"stage": "dense"}, "timestamp": "x"}, None,
                                  "E, rng_state, sampler_state"),
        "epoch_0003.pt": ({"epoch": 3, "model_state_dict": prefixed(g, "_orig_mod."), "optimizer_state_dict": adam,
                           "scheduler_state_dict": {"T_max": 100, "last_epoch": 3}, "scaler_state_dict": {},
                           "config": {}, "metrics": {"loss": 1.0}},  # LGT counts from 1
                          None, "E, rng_state, sampler_state"),
        "vqgan_7.pth": ({"steps": 7, "state_dict": g, "optimizer": adam, "optimizer_disc": adam, "scheduler": {}},
                        7, "E, rng_state, sampler_state"),
    }


def test_an_old_dictionary_says_what_it_lacks(tmp_path, state, capsys):
    torch.save({"epoch": 2, "model_state_dict": state["G"], "loss": 0.25, "config": {"embed_dim": 64, "lr": 1e-3}},
               tmp_path / "old.pth")
    assert locate(tmp_path / "old.pth").load()["state"]["metric"] == 0.25
    path = write_json(tmp_path / "two.json", tiny.options(tmp_path, "two", train={"total_iter": 7}))
    assert run("-opt", path, "--resume", tmp_path / "old.pth") == 0
    said = capsys.readouterr().out
    assert "absent   E, optimizerG, rng_state, sampler_state: begun anew" in said and "embed_dim" not in said
    assert "no scheduler in it, and none is needed" in said and "its options are another program's" in said


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
    assert f"absent   {absent}: begun anew, so not bit for bit" in said
    found = checkpoint.find_newest(tmp_path / "two/models").load()
    for key in ("body.0.weight", "body.4.bias"):  # the rate is 0, so what was loaded is still there
        assert torch.equal(found["G"][key], state["G"][key])
    if "optimizerG" not in absent:
        assert found["optimizerG"]["state"][0]["step"] == state["optimizerG"]["state"][0]["step"] + 1


def test_a_folder_of_others_goes_on_from_the_newest(tmp_path, state, capsys):
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
    path = write_json(tmp_path / "two.json", tiny.options(tmp_path, "two", train={"total_iter": 1}))
    assert run("-opt", path, "--init-from", tmp_path / "basicsr.pth") == 0
    assert "loaded      9 tensors" in capsys.readouterr().out


def test_weights_below_a_prefix_are_found_for_the_network_that_they_fit():
    net, model = tiny.Net(), ModelPlain.__new__(ModelPlain)
    own = {key: torch.full_like(value, 2) for key, value in net.state_dict().items()}
    report = model.load_weights(net, prefixed(own, "net.generator.") | {"loss.w": torch.ones(1)}, True, "x.ckpt")
    assert "9 of 9 tensors loaded by name below 'net.generator.'" in report and "skipped 1: loss.w" in report
    assert all(torch.equal(value, own[key]) for key, value in net.state_dict().items())


def test_an_optimizer_of_another_network_is_refused_by_name(tmp_path, state):
    state["optimizerG"]["state"][0]["exp_avg"] = torch.zeros(5)
    torch.save({"global_step": 2, "state_dict": state["G"], "optimizer": state["optimizerG"]}, tmp_path / "x.ckpt")
    path = write_json(tmp_path / "two.json", tiny.options(tmp_path, "two"))
    with pytest.raises(CheckpointError, match=r"x.ckpt: optimizerG: exp_avg \(5,\) does not fit a parameter of \(8, 3"):
        run("-opt", path, "--resume", tmp_path / "x.ckpt")
    assert not (tmp_path / "two").exists()


# ---------------------------------------------------------------- versions of ours


def test_version_1_goes_on_exactly(tmp_path, state, monkeypatch):
    """A folder as 0.1.0 left it: no seals, one process's generators, no best."""
    with monkeypatch.context() as patch:
        stopped_at(patch, 4)
        assert run("-opt", write_json(tmp_path / "old.json", tiny.options(tmp_path, "old"))) == 143
    found = find_newest(tmp_path / "old/models")
    loaded = found.load()
    loaded["state"] = {key: value for key, value in loaded["state"].items()
                       if key not in ("best", "metric", "metadata", "scheduler_state_dict", "scaler_state_dict")}
    loaded["state"] |= {"version": 1, "rng_state": loaded["state"]["rng_state"][0]}
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
    (tmp_path / "old/models/4.json").write_bytes(durable.signed(record, indent=1))
    assert run("-opt", tmp_path / "old.json") == 0
    assert differing(final(tmp_path / "old"), state) == []


def test_every_version_has_a_way_up_and_a_newer_one_is_refused(tmp_path):
    assert sorted(foreign.MIGRATIONS) == list(range(1, foreign.VERSION))
    commit(tmp_path, 1, parts(1) | {"state": {"version": foreign.VERSION + 1, "iteration": 1}})
    with pytest.raises(CheckpointError, match="written by a newer Perdure .version 3; this one reads up to 2.; update"):
        find_newest(tmp_path).load()
