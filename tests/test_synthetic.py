"""Drawn video: a pure function of (seed, epoch, index), moving, sharp, and quick to make."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from data.resize import imresize
from data.sampler import sample_rng
from data.synthetic import SyntheticVideoDataset, draw_scene, render
from metrics.psnr_ssim import calculate_psnr


def small(**changes):
    return SyntheticVideoDataset(**{"num_clips": 6, "num_frame": 3, "gt_size": 48, "seed": 3, **changes})


def same(a, b):
    return a["key"] == b["key"] and torch.equal(a["L"], b["L"]) and torch.equal(a["H"], b["H"])


def test_an_item_has_what_video_datasets_give():
    item = small(gt_size=[32, 48], scale=2, first_clip=100000)[1]
    assert item["L"].shape == (3, 3, 16, 24) and item["H"].shape == (3, 3, 32, 48)
    for clip in (item["L"], item["H"]):
        assert clip.dtype == torch.float32 and 0 <= clip.min() < clip.max() <= 1 and clip.is_contiguous()
        assert torch.equal(clip, (clip * 255).round() / 255)  # as 8-bit files would hold
    assert item["key"] == "clip_100001/00000000" and item["folder"] == "clip_100001"
    assert item["lq_path"] == [f"clip_100001/{frame:08d}.png" for frame in range(3)]


def test_an_item_depends_on_its_key_alone():
    keys = [(0, 1), (4, 5), (1, 0), (0, 0)]
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    items = {key: small()[key] for key in keys}
    dataset = small()
    assert all(same(dataset[key], items[key]) for key in reversed(keys))
    assert same(dataset[1], items[0, 1])  # a plain index is one of epoch 0
    assert torch.equal(torch.get_rng_state(), state[0]) and (np.random.get_state()[1] == state[1]).all()
    for workers in (0, 2):
        loader = DataLoader(dataset, batch_sampler=[[key] for key in keys], num_workers=workers)
        for key, batch in zip(keys, loader):
            assert torch.equal(batch["H"][0], items[key]["H"]) and torch.equal(batch["L"][0], items[key]["L"])


def test_epochs_clips_and_seeds_differ():
    item = small()[0, 0]
    for other in (small()[1, 0], small()[0, 1], small(seed=4)[0, 0], small(first_clip=1)[0, 0]):
        assert not torch.equal(item["H"], other["H"])
    assert same(small(first_clip=2)[3, 1], small(first_clip=0)[3, 3])  # numbered through, whatever the first is


def test_epochs_show_the_same_clip_at_other_times():
    dataset = small(use_hflip=False, use_rot=False)
    scene = draw_scene(sample_rng(3, 0, 1).spawn(1)[0], (48, 48))
    for epoch in (0, 5):
        start = sample_rng(3, epoch, 1).integers(256)
        assert torch.equal(dataset[epoch, 1]["H"], render(scene, start + np.arange(3)) / 255)


def test_low_resolution_is_the_bicubic_one_in_every_symmetry():
    states = set()
    for index, item in enumerate(small(num_clips=60, num_frame=1, gt_size=32)):
        expected = (imresize(item["H"], 1 / 4).clamp(0, 1) * 255).round() / 255
        assert (item["L"] - expected).abs().max() < 1.01 / 255  # so L and H were turned alike
        start = sample_rng(3, 0, index).integers(256)
        plain = render(draw_scene(sample_rng(3, 0, index).spawn(1)[0], (32, 32)), np.array([start])) / 255
        turned = {(flips, turn): plain.flip(flips).transpose(-2, -1) if turn else plain.flip(flips)
                  for flips in ((), (-1,), (-2,), (-1, -2)) for turn in (False, True)}
        (state,) = [state for state, clip in turned.items() if torch.equal(item["H"], clip)]
        states.add(state)
    assert len(states) == 8


def test_a_frame_does_not_depend_on_which_others_are_drawn():
    for seed in range(4):
        scene = draw_scene(np.random.default_rng(seed), (48, 64))
        long, alone = render(scene, np.arange(30, 50)), render(scene, np.array([41]))
        assert (long[11].int() - alone[0].int()).abs().max() <= 1  # a rounding apart at most


def test_it_moves_smoothly_and_has_detail():
    psnr, steps = [], []
    for item in SyntheticVideoDataset(num_clips=8, num_frame=2, gt_size=128):
        enlarged = imresize(item["L"], 4).clamp(0, 1)
        psnr.append(calculate_psnr(*(x[0].permute(1, 2, 0) * 255 for x in (item["H"], enlarged))))
        steps.append((item["H"][1] - item["H"][0]).abs().mean().item())
    assert 22 < np.mean(psnr) < 30  # what a network can gain on bicubic
    assert 0.005 < np.mean(steps) < 0.1


@pytest.mark.parametrize("options, says", (
    ({"gt_size": 50}, "multiple of scale 4"), ({"gt_size": [48]}, "[height, width]"), ({"gt_size": 8}, ">= 16"),
    ({"num_clips": 0}, "num_clips 0"), ({"first_clip": -1}, "first_clip"), ({"degradation": {"x": 1}}, "degradation.x"),
), ids=str)
def test_wrong_options_are_named_in_one_line(options, says):
    with pytest.raises(ValueError) as error:
        small(**options)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_a_loop_over_it_ends():
    assert sum(1 for _ in small()) == 6
    with pytest.raises(IndexError):
        small()[0, 6]
