"""The published VRT recipes: every value that makes the network and its training, and what is missing to run them."""

import pytest
import torch

import options
from data import DATASETS
from models import MODELS, NETWORKS
from tests.conftest import ROOT
from tests.test_options import parse

RECIPES = {  # base name -> parameters of the network, SpyNet's included, and keys of its state
    "001_train_vrt_videosr_bi_reds_6frames": (30_676_435, 1666),
    "002_train_vrt_videosr_bi_reds_16frames": (32_577_991, 1666),
    "003_train_vrt_videosr_bi_vimeo_7frames": (32_577_991, 1666),
    "004_train_vrt_videosr_bd_vimeo_7frames": (32_577_991, 1666),
    "005_train_vrt_videodeblurring_dvd": (18_320_007, 1526),
    "006_train_vrt_videodeblurring_gopro": (18_320_007, 1526),
    "007_train_vrt_videodeblurring_reds": (18_320_007, 1526),
    "008_train_vrt_videodenoising_davis": (18_320_871, 1526),
    "009_train_vrt_videofi_vimeo_4frames": (9_943_387, 1354),
}


def recipe(name):
    return ROOT / f"options/vrt/{name}.json"


@pytest.mark.parametrize("name", RECIPES)
def test_the_network_is_the_published_one(name):
    opt, notices = parse(recipe(name), ("netG.spynet_path", None))
    assert not notices and opt["task"] == name
    with torch.device("meta"):
        network = options.build(NETWORKS, opt["netG"], "net_type")
    assert (sum(p.numel() for p in network.parameters()), len(network.state_dict())) == RECIPES[name]
    train, data = opt["train"], opt["datasets"]["train"]
    assert (train["total_iter"], train["G_optimizer_lr"], data["dataloader_batch_size"]) == (300_000, 4e-4, 8)
    frames = data["num_frame"] + data.get("pad_sequence", False)
    assert opt["netG"]["img_size"][0] == (4 if "videofi" in name else frames)
    assert opt["netG"]["img_size"][1] * opt["scale"] == data["gt_size"]
    assert opt["val"]["size_patch_testing"] % opt["netG"]["window_size"][-1] == 0


def test_the_same_values_as_in_kairs_files(shared):
    paths = sorted((shared / "kair_options").glob("*.json"))
    assert len(paths) == 4
    for path in paths:
        theirs, ours = parse(path)[0], parse(recipe(path.stem))[0]
        for section in ("netG", "train", "val"):
            off = {"spynet_path"} if ours["netG"]["pa_frames"] == 0 else set()
            off |= {"fix_iter", "fix_keys", "fix_lr_mul", "G_param_strict", "E_param_strict", "num_frame_overlapping"} \
                if "videofi" in path.stem else set()  # without flow these mean nothing
            defaults = options.schema_of(options.resolve(NETWORKS, "vrt", "")) if section == "netG" else {}
            for key in set(theirs[section]) - off:
                mine = ours[section][key] if key in ours[section] else defaults[key][1]
                same = list(mine) == list(theirs[section][key]) if isinstance(mine, (list, tuple)) \
                    else mine == theirs[section][key]
                assert same, f"{path.stem}: {section}.{key}"
        for key in ("num_frame", "gt_size", "random_reverse", "use_hflip", "use_rot", "dataset_type"):
            assert ours["datasets"]["train"][key] == theirs["datasets"]["train"][key], f"{path.stem}: {key}"
        assert ours["datasets"]["train"].get("val_partition") == theirs["datasets"]["train"].get("val_partition")


@pytest.mark.parametrize("name", RECIPES)
def test_missing_data_and_weights_are_named(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    opt, _ = parse(recipe(name))
    for section in opt["datasets"].values():
        root = section["dataroot_gt"]
        with pytest.raises(options.OptionError, match=f"dataroot_gt: folder {root} .*; fetch ") as raised:
            options.build(DATASETS, section, "dataset_type")
        assert "\n" not in str(raised.value)
    if opt["netG"]["pa_frames"]:
        with pytest.raises(options.OptionError, match=r"spynet_path: model_zoo/vrt/spynet.*pth does not exist; "):
            options.build(NETWORKS, opt["netG"], "net_type")


def test_the_tables_hold_every_dataset_of_kairs_files():
    assert {options.resolve(DATASETS, name, "").__name__ for name in DATASETS} == set(DATASETS)
    assert "vrt" in MODELS


@pytest.mark.parametrize("card, parts", [("8gb", 8), ("12gb", 8), ("24gb", 4), ("80gb", 1)])
def test_a_smaller_card_changes_how_and_not_what(card, parts):
    base, small = parse(recipe("001_train_vrt_videosr_bi_reds_6frames"))[0], parse(recipe(f"001_{card}"))[0]
    changed = {key for key, value in options.flatten(small).items() if value != options.flatten(base).get(key)}
    how = {"netG.use_checkpoint_attn", "netG.use_checkpoint_ffn", "train.accumulate", "train.amp",
           "val.num_frame_testing", "val.size_patch_testing"}
    assert changed - {"task", "opt_path"} <= how
    assert (small["train"]["accumulate"], small["train"]["amp"]) == (parts, "bf16")
