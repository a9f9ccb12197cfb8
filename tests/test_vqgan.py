"""The VQGAN recipe: stopped anyhow it ends as if never stopped, a step is taming's, and mistakes are told first."""

import copy
import json
import math
import os

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.io import read_image, write_jpeg

import options
from data import DATASETS
from losses.calculator import LossCalculator
from losses.vqperceptual import VQLPIPSWithDiscriminator
from models import MODELS, NETWORKS
from models.model_vqgan import ModelVQGAN
from models.network_discriminator import NLayerDiscriminator
from models.network_vqgan import EMAVQ
from models.network_vqvae import VQVAE2
from runtime import determinism
from tests.conftest import ROOT, write_json
from tests.runs import assert_equal_runs, differing, final, rows, run, straight_and_stopped

TOTAL, START = 6, 3  # with disc_every 2, D is stepped in 4 and 6
DDCONFIG = {"in_channels": 3, "out_ch": 3, "resolution": 16, "ch": 32, "ch_mult": [1, 1], "num_res_blocks": 1,
            "attn_resolutions": [], "z_channels": 4, "dropout": 0.1}
NETS = {
    "emavq": {"net_type": "emavq", "n_embed": 8, "embed_dim": 4, "ddconfig": DDCONFIG, "restart_below": 0.1},
    "vqgan": {"net_type": "vqgan", "n_embed": 8, "embed_dim": 4, "ddconfig": DDCONFIG},
    "gumbelvq": {"net_type": "gumbelvq", "n_embed": 8, "embed_dim": 4, "ddconfig": DDCONFIG},
    "vqvae2": {"net_type": "vqvae2", "n_embed": 8, "embed_dim": 4, "num_hiddens": 8, "num_res_hiddens": 4},
    "vqvae": {"net_type": "vqvae", "n_embed": 8, "embed_dim": 4, "num_hiddens": 8, "num_res_hiddens": 4, "decay": 0.9},
}


def tree(folder, name="run", net="emavq", train=None, loss=None, images=None, **over):
    data = {"dataset_type": "ImageTrainDataset", "size": 16, "generated": {"num_samples": 5}, **(images or {})}
    loss = {"disc_start": START, "disc_ndf": 4, "disc_num_layers": 1, "perceptual_weight": 0, **(loss or {})}
    return {"task": name, "model": net, "path": {"root": str(folder)}, "num_threads": 1, "netG": NETS[net],
            "datasets": {"train": {**data, "dataloader_batch_size": 2},
                         "test": {"dataset_type": "ImageTestDataset", "size": 16, "generated": {"num_images": 3}}},
            "train": {"total_iter": TOTAL, "checkpoint_save": 2, "checkpoint_test": 3, "checkpoint_print": 1,
                      "disc_every": 2, "E_decay": 0.9, "G_optimizer_clipgrad": 1.0, "lossconfig": loss,
                      "G_scheduler_type": "CosineAnnealingWarmRestarts", **(train or {})}, **over}


def built(folder, **over):
    """A model of these options, ready to train."""
    opt, _ = options.parse(str(write_json(folder / "o.json", tree(folder, **over))), [], MODELS, NETWORKS, DATASETS)
    opt["device"] = "cpu"
    model = ModelVQGAN(opt)
    model.init_train()
    return model


# ---- stopped and resumed -------------------------------------------------------------------------------------------


CASES = {"before disc_start, at it, between two steps of D": ("emavq", [2, 3, 5], {}), "no EMA": ("vqgan", [5], {}),
         "Gumbel noise": ("gumbelvq", [4], {"temperature_end": 0.5}), "two codebooks": ("vqvae2", [1, 5], {}),
         "in parts, bf16": ("vqvae", [4], {"amp": "bf16", "accumulate": 2}),
         "fp16": ("emavq", [5], {"amp": "fp16", "D_optimizer_clipgrad": 0.5})}


@pytest.mark.parametrize("case", CASES)
def test_stopped_and_resumed_everything_is_equal(tmp_path, case):
    net, stops, train = CASES[case]
    train = {"checkpoint_save": 0, **train}  # saved where it is stopped and at its end
    one, two = straight_and_stopped(
        lambda name, _: write_json(tmp_path / f"{name}.json", tree(tmp_path, name, net, train)), stops)
    assert_equal_runs(one, two, TOTAL)
    assert set(final(one)) == {"G", "E", "D", "optimizerG", "optimizerD", "state"}


def test_the_table_of_losses_shows_every_term_and_the_discriminators_last_ones(tmp_path):
    assert run("-opt", write_json(tmp_path / "one.json", tree(tmp_path, "one"))) == 0
    train, test = (rows(tmp_path / "one", table) for table in ("train", "test"))
    for row in train:
        step = int(row["iteration"])
        assert row["G_loss"] and row["rec_loss"] and row["quant_loss"] and 0 < float(row["codes_used"]) <= 1
        assert 1 <= float(row["perplexity"]) <= 8
        assert bool(row["g_loss"]) == bool(row["d_weight"]) == (step >= START)
        assert bool(row["D_loss"]) == bool(row["D_real"]) == bool(row["D_fake"]) == (step >= 4)
    assert train[4]["D_loss"] == train[3]["D_loss"] != train[5]["D_loss"]
    assert {"test.psnr", "test.psnr_mean_colour", "test.codes_used", "test.perplexity"} <= set(test[0])
    (picture, _) = sorted((tmp_path / "one/images").iterdir())
    assert read_image(str(picture)).shape == (3, 2 * 16 + 8, 3 * (16 + 4) + 4)  # input over reconstruction


# ---- a step --------------------------------------------------------------------------------------------------------


def two_passes(net, loss, optimizers, images, step, every):
    """Taming's order on the same modules, its discriminator left alone in the autoencoder's turn."""
    vq_loss, restored, _, _ = net(images)
    total, _ = loss.generator_loss(vq_loss, images, restored, step, net.last_layer)
    optimizers[0].zero_grad()
    total.backward()
    optimizers[0].step()
    net.update_codebook(step)
    if step % every == 0 and loss.has_discriminator(step):
        total, _ = loss.discriminator_loss(images, restored, step)
        optimizers[1].zero_grad()
        total.backward()
        optimizers[1].step()


@pytest.mark.parametrize("net", ["vqgan", "emavq", "vqvae2"])
def test_steps_are_those_of_tamings_order(tmp_path, net):
    """Written out with torch's own optimizers: the same bits for G, and D, whose turn comes every other step."""
    model = built(tmp_path, net=net, train={"G_optimizer_clipgrad": None, "E_decay": 0})
    other = copy.deepcopy((model.netG, model.loss))
    bare, loss = other
    kind = dict(lr=1e-4, betas=(0.5, 0.9), fused=True)
    optimizers = [torch.optim.Adam(one.parameters(), **kind) for one in (bare, loss.discriminator)]
    for step in range(1, 7):
        images = torch.rand(2, 3, 16, 16)
        model.feed_data({"H": images})
        model.optimize_parameters(step)
        determinism.seed_micro_batch(model.opt_train["manual_seed"], step, 0)  # the same dropout
        two_passes(bare, loss, optimizers, images * 2 - 1, step, every=2)
    assert differing(model.netG.state_dict(), bare.state_dict()) == []
    assert differing(model.netD.state_dict(), loss.discriminator.state_dict()) == []
    assert int(model.optimizers["optimizerD"].state_dict()["state"][0]["step"]) == 2


def test_one_forward_pass_a_step_and_no_discriminator_before_disc_start(tmp_path, monkeypatch):
    model, passes, real = built(tmp_path), [], NLayerDiscriminator.forward
    model.netG.register_forward_hook(lambda *_: passes.append("G"))
    monkeypatch.setattr(NLayerDiscriminator, "forward", lambda *_: passes.append("D") or real(*_))
    for step in range(1, 7):
        model.feed_data({"H": torch.rand(2, 3, 16, 16)})
        model.optimize_parameters(step)
        passes.append(step)
    assert passes == ["G", 1, "G", 2, "G", "D", 3, "G", "D", "D", "D", 4, "G", "D", 5, "G", "D", "D", "D", 6]


def test_an_early_discriminator_is_stepped_before_disc_start_as_tamings(tmp_path):
    """Its loss is 0 there, so its weights stay, but Adam counts the steps, on which its first real ones depend."""
    model = built(tmp_path, loss={"legacy": ["early_discriminator"]})
    before = [p.clone() for p in model.netD.parameters()]
    for step in (1, 2):
        model.feed_data({"H": torch.rand(2, 3, 16, 16)})
        model.optimize_parameters(step)
    assert int(model.optimizers["optimizerD"].state_dict()["state"][0]["step"]) == 1  # disc_every is 2
    assert all(map(torch.equal, before, model.netD.parameters()))


def test_codebooks_of_averages_are_in_no_optimizer_and_move_once_an_iteration(tmp_path):
    model = built(tmp_path, train={"accumulate": 2, "E_decay": 0.5})
    inside = {id(p) for o in model.optimizers.values() for group in o.param_groups for p in group["params"]}
    book = model.netG.quantize.embedding
    assert not inside & {id(book.weight), id(book.embed_avg), id(book.cluster_size)} and not list(book.parameters())
    before, calls = book.weight.clone(), []
    monkey = model.netG.quantize.update
    model.netG.quantize.update = lambda *a: calls.append(a) or monkey(*a)
    model.feed_data({"H": torch.rand(4, 3, 16, 16)})
    model.optimize_parameters(1)
    assert len(calls) == 1 and not torch.equal(before, book.weight)
    assert torch.equal(model.netE.quantize.embedding.weight, book.weight)


def test_a_step_left_out_leaves_nothing_behind(tmp_path):
    model = built(tmp_path, train={"on_nan": "skip", "accumulate": 2})
    before = {k: v.clone() for k, v in model.netG.state_dict().items() if "quantize" not in k}
    images = torch.rand(4, 3, 16, 16)
    images[3] = float("nan")
    model.feed_data({"H": images})
    model.optimize_parameters(4)
    assert model.skipped == 1
    assert all(torch.equal(model.netG.state_dict()[k], v) for k, v in before.items())
    assert not model.optimizers["optimizerD"].state_dict()["state"]


def test_the_calculator_answers_as_the_seed_asks():
    loss = VQLPIPSWithDiscriminator(2, perceptual_weight=0.0, disc_ndf=4, disc_num_layers=1)
    last = nn.Conv2d(3, 3, 1)
    calculator = LossCalculator(loss, last.weight, disc_every=3)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    for step, joined, due in ((1, False, False), (2, True, False), (3, True, True)):
        losses = calculator.compute_total_loss(images, last(images), torch.ones(1), step)
        assert ("g_loss" in losses) == joined and ("D_loss" in losses) == bool(losses["gan_loss"]) == due
        assert calculator.discriminator_due(step) == due
    gan = calculator.compute_total_loss(images, last(images), torch.ones(1), 3, optimizer_idx=1)
    assert gan["total_loss"] is gan["gan_loss"] and last.weight.grad is None
    with pytest.raises(ValueError, match="disc_every 0 must be >= 1"):
        LossCalculator(loss, last.weight, disc_every=0)


def test_which_loss_is_found_by_the_network_or_forced(tmp_path):
    absolute, squared = nn.functional.l1_loss, nn.functional.mse_loss
    for net, forced, wanted in (("emavq", None, absolute), ("vqvae", None, squared), ("vqvae", True, absolute),
                                ("emavq", False, squared)):
        assert built(tmp_path, net=net, train={"use_taming_loss": forced}).loss.pixelloss is wanted


def test_every_name_of_the_seed_is_a_model(tmp_path):
    names = ["TamingVQGAN", "taming_vqgan", "EMAVQ", "emavq", "VQGAN", "vqgan", "VQVAE2", "vqvae2", "VqVae", "vqvae"]
    assert all(options.resolve(MODELS, name, "") is ModelVQGAN and name in NETWORKS for name in names)


# ---- data and use --------------------------------------------------------------------------------------------------


def test_sequences_are_flattened_and_scaled(tmp_path):
    model = built(tmp_path)
    frames = torch.randint(256, (2, 3, 16, 32, 3), dtype=torch.uint8)  # (b, d, h, w, c)
    model.feed_data({"H": frames})
    assert model.images.shape == (6, 3, 16, 32)
    assert torch.equal(model.images[4], frames[1, 1].permute(2, 0, 1).float() / 255 * 2 - 1)
    model.feed_data({"H": frames.permute(0, 1, 4, 2, 3).float() / 255})  # as the video recipes have them
    assert torch.equal(model.images[4], frames[1, 1].permute(2, 0, 1).float() / 255 * 2 - 1)


@pytest.mark.parametrize("net", ["emavq", "vqvae2"])
def test_images_of_any_size_are_reconstructed_and_come_back_from_their_indices(tmp_path, net):
    model = built(tmp_path, net=net)
    images, indices = model.reconstruct(torch.rand(2, 3, 17, 21) * 2 - 1)
    assert images.shape == (2, 3, 17, 21) and images.abs().max() <= 1 and model.netG.training
    network = model.netE.eval()
    again = network.decode_code(indices) if net == "vqvae2" else network.decode_code(indices[0], (2, 9, 11))
    torch.testing.assert_close(again.clamp(-1, 1)[..., :17, :21], images)


# ---- files of others -----------------------------------------------------------------------------------------------


def taming_state(model):
    """A state dict as taming's models write it."""
    return {**model.netG.state_dict(), "loss.perceptual_loss.lin0.model.1.weight": torch.ones(1),
            **{f"loss.discriminator.{key}": value for key, value in model.netD.state_dict().items()}}


@pytest.mark.parametrize("kind", ["last.ckpt", "vqgan_5.pth", "adapter_5.pth"])
def test_tamings_files_work_with_resume_and_init_from(tmp_path, capsys, kind):
    other = built(tmp_path, train={"E_decay": 0})
    for step in (3, 4):
        other.feed_data({"H": torch.rand(2, 3, 16, 16)})
        other.optimize_parameters(step)
    g, d = (other.optimizers[label].state_dict() for label in ("optimizerG", "optimizerD"))
    state = {("model." if "adapter" in kind else "") + key: value for key, value in taming_state(other).items()}
    torch.save({"state_dict": state, "optimizer_states": [g, d], "global_step": 5, "epoch": 2} if "ckpt" in kind else
               {"steps": 5, "state_dict": state, "optimizer": g, "optimizer_disc": d, "scheduler": {}}, tmp_path / kind)
    train = {"G_optimizer_lr": 0.0, "E_decay": 0}  # what was loaded is still there
    path = write_json(tmp_path / "run.json", tree(tmp_path, train=train))
    assert run("-opt", path, "--resume", tmp_path / kind) == 0
    assert "sampler_state, discriminator_log: starts over" in capsys.readouterr().out
    found = final(tmp_path / "run")
    for label, network in (("G", other.netG), ("D", other.netD)):
        weights = {name: value for name, value in network.named_parameters()}
        assert weights and all(torch.equal(found[label][name], value) for name, value in weights.items())
    assert [int(found[f"optimizer{x}"]["state"][0]["step"]) for x in "GD"] == [3, 2]
    path = write_json(tmp_path / "new.json", tree(tmp_path, "new", train={**train, "total_iter": 1}))
    assert run("-opt", path, "--init-from", tmp_path / kind) == 0
    told, found = capsys.readouterr().out, final(tmp_path / "new", 1)
    assert "iteration 0 of 1" in told and told.count("loaded") == 2
    assert torch.equal(found["D"]["main.0.weight"], other.netD.main[0].weight)
    assert torch.equal(found["G"]["encoder.conv_in.weight"], other.netG.encoder.conv_in.weight)


# ---- mistakes ------------------------------------------------------------------------------------------------------


MISTAKES = {
    "codebook larger than memory": ({"netG": {**NETS["emavq"], "n_embed": 10**11}}, "needs 5,960 GiB in training"),
    "resolution": ({"netG": {**NETS["emavq"], "ddconfig": {**DDCONFIG, "resolution": 17}}}, "resolution must be a mul"),
    "size": ({"images": {"size": 25}}, "datasets.train.size: 25 must be a multiple of 2"),
    "size of the discriminator": ({"loss": {"disc_num_layers": 3}}, "size: 16 must be .* at least 24 for the discrim"),
    "grey": ({"n_channels": 1}, "netG takes 3 channels, but n_channels is 1"),
    "channels out": ({"netG": {**NETS["emavq"], "ddconfig": {**DDCONFIG, "out_ch": 4}}}, "ddconfig.out_ch is 4"),
    "empty folder": ({"images": {"dataroot": "EMPTY"}}, "empty holds no pictures"),
    "misspelt": ({"loss": {"disc_weigth": 1}}, "train.lossconfig.disc_weigth: unknown key; did you mean 'disc_weight'"),
    "no disc_start": ({"train": {"lossconfig": {}}}, "train.lossconfig.disc_start: missing"),
    "no weights": ({"loss": {"perceptual_weight": 1.0}}, "vgg_path: .* does not exist; download .*perceptual_weight"),
    "no codebook": ({"netG": {"net_type": "spynet"}}, "netG.net_type: spynet has no codebook; valid: vqgan, emavq"),
    "condition": ({"loss": {"disc_conditional": True}}, "disc_conditional: this recipe has no condition"),
    "disc_every": ({"train": {"disc_every": 0}}, "train.disc_every: 0 is not a whole number >= 1"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_takes_one_line_and_leaves_no_folder(tmp_path, monkeypatch, case):
    over, message = MISTAKES[case]
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    text = json.dumps({**tree(tmp_path), **over} if "netG" in over else tree(tmp_path, **over))
    path = tmp_path / "o.json"
    path.write_text(text.replace("EMPTY", str(tmp_path / "empty")))
    with pytest.raises(options.OptionError, match=message) as told:
        run("-opt", path)
    assert "\n" not in str(told.value) and not (tmp_path / "run").exists()


def test_one_corrupt_jpeg_among_good_ones_is_named_and_by_option_skipped(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for i in range(3):
        write_jpeg(torch.randint(256, (3, 20, 30), dtype=torch.uint8), str(tmp_path / "in" / f"{i}.jpg"))
    (tmp_path / "in/1.jpg").write_bytes(b"no picture")
    (tmp_path / "in/scan.tif").write_bytes(b"II*")
    for skip in (False, True):
        images = {"dataroot": str(tmp_path / "in"), "skip_corrupt": skip}
        path = write_json(tmp_path / "o.json", tree(tmp_path, images=images, train={"total_iter": 3}))
        if skip:
            with pytest.warns(UserWarning, match="1.jpg: not a readable image"):
                assert run("-opt", path) == 0
            assert capsys.readouterr().out.count("note     passed over: 1 .tif files") == 1
            run("-opt", path, "--dry-run")
            assert capsys.readouterr().out.count("note     passed over: 1 .tif files") == 1
        else:
            with pytest.raises(options.OptionError, match="1.jpg: not a readable image"):
                run("-opt", path)


@pytest.mark.parametrize("name, kind", [("train_vqgan", EMAVQ), ("train_vqvae", VQVAE2)])
def test_the_shipped_options_build(name, kind):
    opt, notices = options.parse(str(ROOT / f"options/{name}.json"), [], MODELS, NETWORKS, DATASETS)
    opt["device"] = "cpu"
    model = ModelVQGAN(opt)
    assert notices == [] and isinstance(model.netG, kind) and model.lpips is None
    assert len(options.build(DATASETS, opt["datasets"]["train"], "dataset_type")) == 512


# ---------------------------------------------------------------- use


@pytest.mark.parametrize("net, levels", [("emavq", 1), ("vqvae2", 2)])
def test_inference_on_the_users_pictures_writes_reconstructions_and_codes(tmp_path, net, levels):
    path = write_json(tmp_path / "run.json", tree(tmp_path, net=net, train={"total_iter": 2}))
    assert run("-opt", path) == 0
    for name, size in (("a.jpg", (21, 30)), ("deep/b.jpg", (16, 16))):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        write_jpeg(torch.randint(0, 255, (3, *size), dtype=torch.uint8), str(tmp_path / "in" / name))
    words = ("-opt", path, "--test", "--input", tmp_path / "in", "--output", tmp_path / "out")
    assert run(*words) == 0
    assert read_image(str(tmp_path / "out/a.png")).shape == (3, 21, 30)
    assert {"a.png", "a.npz", "deep", "made_by.json", "metrics.csv"} == set(os.listdir(tmp_path / "out"))
    codes = np.load(tmp_path / "out/a.npz")
    assert len(codes.files) == levels and all(codes[key].ndim == 2 and codes[key].max() < 8 for key in codes.files)
    before = {name: (tmp_path / "out" / name).read_bytes() for name in ("a.png", "deep/b.png", "deep/b.npz")}
    (tmp_path / "out/deep/b.npz").unlink()
    assert run(*words) == 0
    assert before == {name: (tmp_path / "out" / name).read_bytes() for name in before}
    for wrong, complaint in (("none", "is neither a folder of pictures nor"), ("run.json", "is neither a folder")):
        with pytest.raises(options.OptionError, match=complaint):
            run("-opt", path, "--test", "--input", tmp_path / wrong, "--output", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_codes_decode_to_the_reconstruction(tmp_path):
    model = built(tmp_path)
    images = torch.rand(1, 3, 16, 20) * 2 - 1
    model.images = images
    model.test()
    codes = model.codes()["codes"]
    network = model.netE.eval()
    with torch.no_grad():
        decoded = network.decode_code(codes[None], (1, *codes.shape, 4)) if codes.ndim == 1 else \
            network.decode_code(codes.flatten(), (1, *codes.shape, 4))
    torch.testing.assert_close(decoded.clamp(-1, 1)[..., :16, :20], model.restored)
    error = ((images - model.restored) / 2).square().mean().item()
    assert model.metrics()["psnr"] == pytest.approx(-10 * math.log10(error), abs=0.02)  # it rounds to 8 bits
