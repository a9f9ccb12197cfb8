"""LGT as a recipe: stopped and resumed equals straight; styles, codecs and pictures do what they say; mistakes."""

import csv
import json
import os
import re
import signal
import sys
import types

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.io import decode_image, write_png

import checkpoint
import options
from data import DATASETS
from data.styles import StyleDataset, StyleTestDataset, build_codec, fitted, shared_codec
from models import MODELS, NETWORKS
from models.codecs import PixelCodec
from models.model_lgt import ModelLGT
from models.network_vqgan import VQModel
from storage import files
from tests import tiny
from tests.conftest import ROOT, write_json
from tests.runs import assert_equal_runs, differing, rows, run, run_until, straight_and_stopped

DRAWN = {"num_images": 4}
SMALL = {"net_type": "lgt", "base_channels": 32, "style_dim": 8, "time_dim": 8, "num_encoder_blocks": 1,
         "num_decoder_blocks": 1}
VQGAN = {"ddconfig": {"ch": 32, "ch_mult": [1, 1], "num_res_blocks": 1, "attn_resolutions": [], "in_channels": 3,
                      "out_ch": 3, "resolution": 16, "z_channels": 4}, "n_embed": 16, "embed_dim": 4}


def recipe(folder, name, train=None, data=None, test=None, **over):
    """An option file of 12 drawn pictures in batches of 5: epochs of 2 steps."""
    tree = {"extends": str(ROOT / "options/train_lgt.json"), "task": name, "path": {"root": str(folder)},
            "num_threads": 1, "netG": SMALL,
            "datasets": {"train": {"image_size": 16, "generated": DRAWN,
                                   "dataloader_batch_size": 5, **(data or {})},
                         "test": {"image_size": 16, "num_references": 2,
                                  **(test or {})}},
            "train": {"total_epochs": 3, "save_interval": 1, "eval_interval": 2, "checkpoint_print": 1,
                      "ode_integration_steps": 2, "label_drop_prob": 0.5, **(train or {})},
            "val": {"num_steps": 2, **over.pop("val", {})}, **over}
    return write_json(folder / f"{name}.json", tree)


def model_of(path, *overrides):
    opt, _ = options.parse(str(path), [(k, v, "test") for k, v in overrides], MODELS, NETWORKS, DATASETS)
    opt["device"] = "cpu"
    model = ModelLGT(opt)
    opt["train"]["total_iter"] = opt["train"]["total_iter"] or 6
    model.init_train()
    return model


def batch_of(dataset, indices=range(5), epoch=0):
    return torch.utils.data.default_collate([dataset[epoch, i] for i in indices])


def drawn():
    return StyleDataset(image_size=16, generated=DRAWN)


def folders(root, sizes, seed=0):
    """Style folders of random pictures: {"a": 2} is a folder a of two."""
    rng = np.random.default_rng(seed)
    for style, count in sizes.items():
        (root / style).mkdir(parents=True)
        for i in range(count):
            picture = rng.integers(0, 256, (3, 40, 36), dtype=np.uint8)
            write_png(torch.from_numpy(picture), str(root / style / f"{i}.png"))
    return str(root)


@pytest.fixture
def vqgan(tmp_path):
    """A folder with a checkpoint of our VQGAN recipe, as its loop would write it."""
    torch.manual_seed(0)
    folder = tmp_path / "vqgan"
    folder.mkdir()
    parts = {"G": VQModel(**VQGAN).state_dict(), "state": {
        "version": checkpoint.VERSION, "iteration": 7, "config": {"netG": {"net_type": "vqgan", **VQGAN}}}}
    checkpoint.Saver(folder, checkpoint.Layout("split"), None, False).save(7, parts, best=None, reason="regular",
                                                                          epoch=0, metric=None)
    return folder


# Exactness --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("train", [{}, {"accumulate": 2, "amp": "bf16", "gradient_checkpointing": True, "E_decay": 0.9,
                                        "use_velocity_reg": True}], ids=["plain", "everything"])
def test_stopped_and_resumed_equals_straight(tmp_path, train):
    def write(name, launch):
        return recipe(tmp_path, name, train, {"dataloader_num_workers": int(launch == 1 and not train),
                                              "dataloader_batch_size": 6 if train else 5})

    assert_equal_runs(*straight_and_stopped(write, [1, 4]), 6)  # within an epoch; at an evaluation
    for name in ("sheet.jpg", "plain_to_dusk.jpg"):
        a, b = (tmp_path / run_ / "inference/epoch_0003" / name for run_ in ("one", "two"))
        assert a.read_bytes() == b.read_bytes()
    assert {"epoch_0001.pt", "epoch_0002.pt", "epoch_0003.pt", "latest.pt"} <= set(os.listdir(tmp_path / "two/models"))
    (log,) = (tmp_path / "one/logs").glob("training_*.csv")
    epochs = list(csv.DictReader(log.open()))
    assert [row["epoch"] for row in epochs] == ["1", "2", "3"] and epochs[-1]["learning_rate"] == "1.00e-06"
    assert all(float(row["epoch_time"]) > 0 for row in epochs)
    steps = rows(tmp_path / "one")
    means = [np.mean([float(row["loss_total"]) for row in steps[i : i + 2]]) for i in (0, 2, 4)]
    assert [row["loss_total"] for row in epochs] == [f"{mean:.6f}" for mean in means]
    launches = sorted((tmp_path / "two/logs").glob("training_*.csv"))  # an epoch's row has all of it, also after a stop
    epochs = [row for log in launches for row in csv.DictReader(log.open()) if row["epoch"] != "epoch"]
    assert [row["loss_total"] for row in epochs] == [f"{mean:.6f}" for mean in means]


def test_evaluation_killed_in_the_middle_leaves_no_half_picture(tmp_path, monkeypatch):
    path, real = recipe(tmp_path, "one", {"eval_interval": 3}), os.replace

    def replace(a, b):
        if str(b).endswith("dusk_to_print.jpg"):
            raise KeyboardInterrupt
        real(a, b)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            run("-opt", path)
    folder = tmp_path / "one/inference/epoch_0003"
    assert {p.name for p in folder.iterdir()} == {"plain_to_dusk.jpg", "plain_to_print.jpg", "dusk_to_plain.jpg"}
    for name in ("sheet", "dusk_to_print"):
        (folder / f"{name}.jpg.tmp").write_bytes(b"half")  # what SIGKILL leaves
    assert run("-opt", path) == 0
    assert len(list(folder.iterdir())) == 7 and all(p.suffix == ".jpg" for p in folder.iterdir())
    assert decode_image(str(folder / "sheet.jpg")).shape[0] == 3


def test_recomputed_euler_steps_have_the_same_gradient(tmp_path):
    path, data = recipe(tmp_path, "one"), batch_of(drawn())
    gradients = []
    for overrides in ([], [("train.gradient_checkpointing", True)]):
        torch.manual_seed(0)
        model = model_of(path, *overrides, ("train.use_velocity_reg", True))
        for p in model.netG.parameters():
            nn.init.normal_(p, std=0.05)
        model.feed_data(data)
        model.optimize_parameters(1)
        gradients.append([p.grad.clone() for p in model.netG.parameters() if p.grad is not None])
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-3, atol=1e-6)


def test_trajectories_start_between_the_least_time_of_the_epoch_and_1(tmp_path, monkeypatch):
    """Times t are uniform from epsilon up, which grows from 0 over the epochs of the warm-up."""
    model = model_of(recipe(tmp_path, "times"), ("train.epsilon", 0.8), ("train.epsilon_warmup_epochs", 4))
    starts, integrate = [], model.integrate
    monkeypatch.setattr(model, "integrate", lambda x, t, *rest: (starts.append(t), integrate(x, t, *rest))[1])
    for epoch, least in ((0, 0.2), (1, 0.4), (9, 0.8)):
        starts.clear()
        model.feed_data(batch_of(drawn(), range(10), epoch))
        for step in range(1, 6):
            model.optimize_parameters(step)
        times = torch.cat(starts)
        assert least <= times.min() < times.max() < 1 and times.mean().item() == pytest.approx((least + 1) / 2, abs=0.1)


def test_the_saved_average_is_the_one_of_the_rows(tmp_path):
    model = model_of(recipe(tmp_path, "one"), ("train.label_drop_prob", 0.0), ("train.E_decay", 0.5))
    for p in model.netG.parameters():
        nn.init.normal_(p, std=0.05)
    model.feed_data(batch_of(drawn()))
    model.optimize_parameters(1)
    for state in (model.parts()["G"], model.parts()["E"]):
        torch.testing.assert_close(state["style_embed.avg_embedding"], state["style_embed.embeddings.weight"].mean(0))


def test_learning_rate_is_torchs_cosine_by_epoch(tmp_path):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=5, eta_min=1e-3)
    ours = model_of(recipe(tmp_path, "one"), ("train.total_epochs", 5), ("train.total_iter", 15),
                    ("train.G_scheduler_eta_min", 1e-3)).schedules["optimizerG"]
    for step in range(16):
        assert ours(0.1, step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        if step % 3 == 2:
            optimizer.step()
            theirs.step()


# Data -------------------------------------------------------------------------------------------------------------

def test_styles_are_balanced_and_a_function_of_the_key(tmp_path):
    root = folders(tmp_path / "data", {"a": 5, "b": 2, "c": 1})
    one, two = (StyleDataset(dataroot=root, image_size=32) for _ in range(2))
    assert len(one) == 15
    items, again = [one[3, i] for i in range(15)], [two[3, i] for i in reversed(range(15))][::-1]
    assert np.bincount([item["source_style"] for item in items]).tolist() == [5, 5, 5]
    assert {item["key"] for item in items if item["source_style"] == 0} == {f"a/{i}" for i in range(5)}
    for a, b in zip(items, again):
        assert a["target_style"] == b["target_style"] and torch.equal(a["reference"], b["reference"])
    targets = [one[epoch, i]["target_style"] for epoch in range(20) for i in range(15)]
    assert min(np.bincount(targets)) > 70
    of_target = [two.latents(two.styles[item["target_style"]], n) for item in items[:1] for n in range(5)]
    assert any(torch.equal(items[0]["reference"], latent) for latent in of_target)  # not the source's style


def test_pictures_are_cut_to_their_middle_or_distorted():
    tall = torch.arange(0, 200, 10, dtype=torch.uint8).view(1, 20, 1).expand(3, 20, 12)
    middle = tall[:, 4:16] / 127.5 - 1
    assert torch.equal(fitted(tall, 12, True), middle) and torch.equal(fitted(tall.mT, 12, True), middle.mT)
    whole = fitted(tall, 12, False)
    assert whole.shape == middle.shape and whole[0, 0, 0] < middle[0, 0, 0] and whole[0, -1, 0] > middle[0, -1, 0]


def test_latents_are_kept_by_weights_and_content(tmp_path, monkeypatch, vqgan):
    root, cache = folders(tmp_path / "data", {"a": 1, "b": 1}), tmp_path / "made" / "latents"
    args = dict(dataroot=root, image_size=16, codec={"type": "vqgan", "path": str(vqgan)}, cache_dir=str(cache))
    first = StyleDataset(**args)[0]["source"]
    kept = set(cache.iterdir())
    assert len(kept) >= 1 and first.shape == (4, 8, 8)
    again = StyleDataset(**args)
    monkeypatch.setattr(again.latents.codec, "encode", None)  # would fail
    assert torch.equal(again[0]["source"], first)
    monkeypatch.undo()
    for path in kept:  # a disk's fault, or a kill of other software
        path.write_bytes(path.read_bytes()[:-40])
    assert torch.equal(StyleDataset(**args)[0]["source"], first)
    folders(tmp_path / "other", {"a": 1, "b": 1}, seed=1)
    os.replace(tmp_path / "other/a/0.png", tmp_path / "data/a/0.png")
    assert not torch.equal(StyleDataset(**args)[0]["source"], first)


def test_a_kill_while_caching_leaves_whole_latents_only(tmp_path, monkeypatch, vqgan):
    root, cache = folders(tmp_path / "data", {"a": 2, "b": 2}), tmp_path / "latents"
    args = dict(dataroot=root, image_size=16, codec={"type": "vqgan", "path": str(vqgan)}, cache_dir=str(cache))
    wanted = [StyleDataset(**args | {"cache_dir": None})[0, i]["source"] for i in range(4)]
    for operation in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, operation, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
            with pytest.raises(KeyboardInterrupt):
                StyleDataset(**args)[0, 0]
        assert not list(cache.glob("*.pt"))
    dataset = StyleDataset(**args)
    assert all(torch.equal(dataset[0, i]["source"], w) for i, w in enumerate(wanted))


# Codecs -----------------------------------------------------------------------------------------------------------

def test_pixels_are_given_back_exactly():
    images = torch.rand(2, 3, 16, 24) * 2 - 1
    codec = PixelCodec(4)
    assert codec.encode(images).shape == (2, 48, 4, 6) and torch.equal(codec.decode(codec.encode(images)), images)


def test_a_vqgan_of_our_recipe_is_a_codec(vqgan):
    images, net = torch.rand(2, 3, 16, 16) * 2 - 1, VQModel(**VQGAN)
    by_folder, by_record, by_file = (
        build_codec({"type": "vqgan", "path": str(vqgan / name), **more}) for name, more in
        (("", {}), ("7.json", {}), ("7_G.pth", {"net": {"net_type": "vqgan", **VQGAN}})))
    net.load_state_dict(by_folder.net.state_dict())
    with torch.no_grad():
        wanted = net.eval()(images)[1]
    for codec in (by_folder, by_record, by_file):
        assert codec.channels == 4 and codec.factor == 2 and codec.fingerprint == by_folder.fingerprint
        torch.testing.assert_close(codec.decode(codec.encode(images)), wanted, rtol=1e-4, atol=1e-5)
    assert build_codec({"type": "vqgan", "path": str(vqgan), "scale": 1.0}).fingerprint != by_folder.fingerprint


def test_sd_vae_through_diffusers(monkeypatch):
    with pytest.raises(ValueError, match="pip install") as caught:
        monkeypatch.setitem(sys.modules, "diffusers", None)
        build_codec({"type": "sd-vae"})
    assert "\n" not in str(caught.value)

    class Fake(nn.Module):
        """The part of AutoencoderKL that is used."""

        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 8, stride=8)
            self.config = types.SimpleNamespace(latent_channels=4, block_out_channels=(1, 2, 3, 4))

        @classmethod
        def from_pretrained(cls, path):
            if path == "absent":
                raise OSError("absent is not a local folder and is not a valid model identifier\nmore")
            return cls()

        def encode(self, images):
            mean = self.conv(images)
            return types.SimpleNamespace(latent_dist=types.SimpleNamespace(mean=mean, std=torch.full_like(mean, 0.5)))

        def decode(self, latents):
            return types.SimpleNamespace(sample=latents)

    monkeypatch.setitem(sys.modules, "diffusers", types.SimpleNamespace(AutoencoderKL=Fake))
    codec, images = build_codec({"type": "sd-vae", "posterior": "sample"}), torch.rand(2, 3, 16, 16)
    assert (codec.channels, codec.factor) == (4, 8)
    mean = codec.conv(images) if hasattr(codec, "conv") else codec.net.conv(images)
    latents = codec.encode(images)
    assert torch.equal(latents, codec.encode(images)) and torch.equal(latents[1:], codec.encode(images[1:]))
    assert 0.2 < ((latents / 0.18215 - mean) / 0.5).std() < 3
    torch.testing.assert_close(codec.decode(latents), latents / 0.18215)
    with pytest.raises(ValueError, match="absent: no autoencoder"):
        build_codec({"type": "sd-vae", "path": "absent"})


# Evaluation and use -----------------------------------------------------------------------------------------------

def test_evaluation_leaves_out_a_missing_style_and_names_it(tmp_path, vqgan, capsys):
    codec = {"codec": {"type": "vqgan", "path": str(vqgan)}, "cache_dir": str(tmp_path / "latents")}
    data = folders(tmp_path / "data", {"a": 2, "b": 2, "c": 2})
    tests = folders(tmp_path / "test", {"a": 1, "b": 0, "d": 1, "c": 2})
    path = recipe(tmp_path, "one", {"total_epochs": 1}, {"dataroot": data, **codec}, {"dataroot": tests, **codec})
    with pytest.warns(UserWarning) as said:
        assert run("-opt", path) == 0
    said = " | ".join(str(w.message) for w in said)
    assert "'b' has no picture in the test folder" in said and "'d' is not a trained style" in said
    made = {p.name for p in (tmp_path / "one/inference/epoch_0001").iterdir()}
    assert made == {"a_to_b.jpg", "a_to_c.jpg", "c_to_a.jpg", "c_to_b.jpg", "sheet.jpg"}
    (row,) = csv.DictReader((tmp_path / "one/log/test.csv").open())
    assert {"test.swd", "test.swd_source", "test.swd_a_to_c", "test.ssm_a_to_b"} <= set(row)
    assert "test.swd_a_to_b" not in row  # nothing to compare with
    assert re.search(r"test: swd [\d.]+ \(source [\d.]+\), ssm [\d.]+ \(", capsys.readouterr().out)  # no pairs


def test_evaluation_is_the_same_in_any_batch_and_leaves_the_generator_alone(tmp_path):
    torch.manual_seed(0)
    test, results = StyleTestDataset(image_size=16, num_references=2), []
    weights = None
    for size in (1, 4):
        model = model_of(recipe(tmp_path, "one"), ("val.batch", size), ("val.temperature_lambda", 0.5))
        if weights is None:
            for p in model.netG.parameters():
                nn.init.normal_(p, std=0.05)
            weights = model.netG.state_dict()
        model.netG.load_state_dict(weights)
        before = torch.get_rng_state()
        rows = [model.validate(item) for item in torch.utils.data.DataLoader(test, generator=torch.Generator())]
        assert [picture.shape for picture in model.shown] == [(3, 16, 16)] * 3
        results.append(model.summarize("test", rows))
        assert torch.equal(torch.get_rng_state(), before)
    assert results[0] == pytest.approx(results[1], rel=1e-4) and len(results[0]) == 3 + 3 * 6


def test_a_stop_is_obeyed_between_sources_and_the_evaluation_repeated(tmp_path, monkeypatch):
    path, real, tested = recipe(tmp_path, "one", {"eval_interval": 1, "total_epochs": 2}), ModelLGT.test, []

    def test(self):
        real(self)
        tested.append(self.source_name)
        if len(tested) == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(ModelLGT, "test", test)
    assert run("-opt", path) == 143 and tested == ["plain"]
    assert not (tmp_path / "one/log/test.csv").exists()
    assert run("-opt", path) == 0 and tested[1:] == ["plain", "dusk", "print"] * 2
    assert len(list((tmp_path / "one/inference/epoch_0001").iterdir())) == 7


def test_inference_on_the_users_files(tmp_path, monkeypatch, capsys):
    """Use the checkpoint alone, at each picture's size; partial output is resumed and ends the same to the byte."""
    data = folders(tmp_path / "data", {"a": 2, "b": 2})
    path = recipe(tmp_path, "one", {"total_epochs": 1}, {"dataroot": data, "dataloader_batch_size": 2},
                  {"dataroot": data}, val={"num_steps": 2, "temperature_lambda": 0.5})
    assert run("-opt", path) == 0
    os.rename(data, tmp_path / "mine")
    write_png(torch.randint(0, 256, (3, 21, 50), dtype=torch.uint8), str(tmp_path / "mine/wide.png"))
    use = ("-opt", path, "--test", "--input", tmp_path / "mine", "--style", "b", "--output")
    assert run(*use, tmp_path / "out") == 0
    made = {p.relative_to(tmp_path / "out"): p.read_bytes() for p in (tmp_path / "out").rglob("*.png")}
    assert {str(p) for p in made} == {"wide_to_b.png", *(f"{s}/{i}_to_b.png" for s in "ab" for i in range(2))}
    shapes = [tuple(decode_image(str(tmp_path / "out" / name)).shape) for name in ("a/0_to_b.png", "wide_to_b.png")]
    assert shapes == [(3, 40, 36), (3, 21, 50)]

    real = files.save_file
    with monkeypatch.context() as patch:
        patch.setattr("log.pictures.save_file", lambda path, *rest: real(path, *rest) if path.stem < "1" else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(*use, tmp_path / "half")
    half = [p.name for p in (tmp_path / "half").rglob("*.png")]
    assert half == ["0_to_b.png"]
    assert run(*use, tmp_path / "half") == 0
    assert {p.relative_to(tmp_path / "half"): p.read_bytes() for p in (tmp_path / "half").rglob("*.png")} == made

    one = ("-opt", path, "--test", "--input", tmp_path / "mine/a/1.png", "--output")
    assert run(*one, tmp_path / "single", "--style", "b", "--source_style", "a") == 0
    assert [p.name for p in (tmp_path / "single").glob("*.png")] == ["1_to_b.png"]
    for flags, said in ((("--style", "c"), "--style: 'c' was not trained; valid: a, b"),
                        ((), "--style: missing; valid: a, b"),
                        (("--style", "b", "--source_style", "c"), "--source_style: 'c' was not trained; valid: a, b"),
                        (("--style", "b", "--set", "val.num_steps=3"), None)):
        with pytest.raises(options.OptionError, match=said or "holds results of another source_style, num_steps"):
            run(*one, tmp_path / ("new" if said else "single"), *flags)
        assert not (tmp_path / "new").exists()
    torch.save(checkpoint.locate(tmp_path / "one").load()["G"], tmp_path / "bare.pth")
    bare = (*one, tmp_path / "named", "--style", "b", "--resume", tmp_path / "bare.pth")
    with pytest.raises(checkpoint.CheckpointError, match="does not name the styles"):
        run(*bare)
    assert run(*bare, "--set", 'datasets.train.style_subdirs=["a", "b"]') == 0

    (tmp_path / "mine/b/0.png").write_bytes(b"not a picture")
    with pytest.raises(options.OptionError, match="b/0.png: not a readable image"):
        run(*use, tmp_path / "third")
    with pytest.raises(options.OptionError, match="nowhere is neither a folder"):
        run("-opt", path, "--test", "--input", tmp_path / "nowhere", "--style", "b", "--output", tmp_path / "new")


def test_resume_checkpoint_in_the_options_counts_once(tmp_path, tiny_tables, capsys):
    """The first launch resumes from it; the next ones resume from the run's own newest, never back."""
    def launch(name, stop=None, **train):
        tree = tiny.options(tmp_path, name, train=train)
        run_until(stop, "-opt", write_json(tmp_path / f"{name}.json", tree))
        return re.findall(r"^resume   from \S+/(\S+/models/\d+)", capsys.readouterr().out, re.MULTILINE)

    launch("one")
    named = {"resume_checkpoint": str(tmp_path / "one/models/4_G.pth")}
    assert launch("two", stop=5, **named) == ["one/models/4"]
    assert launch("two", stop=7, **named) == ["two/models/5"]
    assert launch("two", **named) == ["two/models/7"]
    a, b = (checkpoint.locate(tmp_path / name).load() for name in ("one", "two"))
    assert a["state"]["iteration"] == 9 and differing(a, b) == []
    assert launch("two", **named) == ["two/models/9"]  # finished: nothing is done
    back = {"resume_checkpoint": str(tmp_path / "one/models/2.json")}  # a run may also be taken back in this way
    assert launch("one", stop=3, **back) == ["one/models/2"]
    assert launch("one", **back) == ["one/models/3"]
    assert differing(checkpoint.locate(tmp_path / "one").load(), b) == []
    for flags in (["--fresh"], ["--init-from", named["resume_checkpoint"]]):
        with pytest.raises(checkpoint.CheckpointError, match="leave one of them out"):
            run("-opt", tmp_path / "two.json", *flags)


# Mistakes ---------------------------------------------------------------------------------------------------------

def refused(tmp_path, **over):
    with pytest.raises(options.OptionError) as caught:
        run("-opt", recipe(tmp_path, "one", **over))
    assert "\n" not in str(caught.value) and not (tmp_path / "one").exists()
    return str(caught.value)


def test_bad_folders(tmp_path):
    said = refused(tmp_path, data={"dataroot": folders(tmp_path / "x", {"a": 2})})
    assert "has one style, 'a'; a transfer needs two" in said
    said = refused(tmp_path, data={"dataroot": folders(tmp_path / "y", {"a": 2, "b": 0})})
    assert "y/b: holds no pictures" in said
    assert "does not exist" in refused(tmp_path, data={"dataroot": str(tmp_path / "nowhere")})
    assert "there are a" in refused(tmp_path, data={"dataroot": str(tmp_path / "x"), "style_subdirs": ["a", "z"]})
    assert "image_size 40 must be a multiple of 16" in refused(tmp_path, data={"image_size": 40})


def test_an_unreadable_picture_is_named(tmp_path):
    root = folders(tmp_path / "data", {"a": 1, "b": 1})
    (tmp_path / "data/b/0.png").write_bytes(b"not a picture")
    with pytest.raises(options.OptionError, match="b/0.png: not a readable image"):
        run("-opt", recipe(tmp_path, "one", data={"dataroot": root, "dataloader_batch_size": 2}))


def test_bad_codecs(tmp_path, vqgan):
    codec = {"type": "vqgan", "path": str(vqgan)}
    assert "netG.latent_channels: 48 does not fit the 4 of the codec" in refused(
        tmp_path, data={"codec": codec}, test={"codec": codec}, netG={**SMALL, "latent_channels": 48})
    assert "datasets.test.codec" in refused(tmp_path, data={"codec": codec})
    assert "Checkpoint file not found" in refused(tmp_path, data={"codec": {**codec, "path": str(tmp_path / "no.pth")}})
    torch.save(torch.load(vqgan / "7_G.pth", weights_only=True), tmp_path / "weights.pth")
    assert "give net" in refused(tmp_path, data={"codec": {**codec, "path": str(tmp_path / "weights.pth")}})
    assert "did you mean 'pixel'" in refused(tmp_path, data={"codec": {"type": "pixels"}})
    assert "codec.facto: unknown key" in refused(tmp_path, data={"codec": {"type": "pixel", "facto": 2}})
    shared_codec.cache_clear()


def test_other_styles_than_the_checkpoints(tmp_path):
    path = recipe(tmp_path, "one", {"total_epochs": 1})
    assert run("-opt", path) == 0
    with pytest.raises(checkpoint.CheckpointError, match="was trained on plain, dusk, print, in this order"):
        run("-opt", recipe(tmp_path, "one", {"total_epochs": 2},
                           {"generated": {"num_images": 4, "styles": ["dusk", "plain", "print"]}}))


def test_another_codec_than_the_checkpoints(tmp_path, vqgan):
    data = folders(tmp_path / "data", {"a": 2, "b": 2})
    for scale in (1.0, 2.0):
        codec = {"codec": {"type": "vqgan", "path": str(vqgan), "scale": scale}, "cache_dir": None, "dataroot": data}
        path = recipe(tmp_path, "one", {"total_epochs": scale}, {**codec, "dataloader_batch_size": 4}, codec)
        if scale == 1:
            assert run("-opt", path) == 0
    for use in ((), ("--test",)):
        with pytest.raises(checkpoint.CheckpointError, match="datasets.train.codec: is not the one"):
            run("-opt", path, *use)
    tests = folders(tmp_path / "tests", {"d": 1})
    path = recipe(tmp_path, "two", data={"dataroot": data, "dataloader_batch_size": 4}, test={"dataroot": tests})
    with pytest.raises(options.OptionError, match="none of its folders d is a style of a, b"):
        run("-opt", path)
    assert not (tmp_path / "two").exists()


def test_the_shipped_options_are_built(vqgan):
    opt, notices = options.parse(str(ROOT / "options/train_lgt.json"), [], MODELS, NETWORKS, DATASETS)
    assert not notices and json.loads(json.dumps(opt["cli"]))["test_image_dir"] == "datasets.test.dataroot"
    opt["device"] = "cpu"
    assert ModelLGT(opt).netG.latent_channels == 48
    latent = ROOT / "options/lgt/latent.json"
    codec = [(key, str(vqgan), "--codec") for key in options.cli_table(str(latent))["codec"]]
    opt, notices = options.parse(str(latent), codec, MODELS, NETWORKS, DATASETS)
    assert not notices and ModelLGT({**opt, "device": "cpu"}).netG.latent_channels == 4
