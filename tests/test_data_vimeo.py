"""Sequences of Vimeo-90K and sets of five frames: the right frames, in the right order, by the key alone."""

import pytest
import torch
from torchvision.io import write_png

from data.vimeo import (
    VFI_DAVIS,
    VFI_UCF101,
    VFI_Vimeo90K,
    VideoRecurrentTrainVimeoDataset,
    VideoRecurrentTrainVimeoVFIDataset,
    VideoTestVimeo90KDataset,
)
from tests.test_data_video import frame, lq_of, same, shown, told

NAMES = ("00001/0001", "00001/0007", "00002/0001")


def write_sequences(root, make=lambda gt: gt):
    for number, name in enumerate(NAMES):
        (root / name).mkdir(parents=True)
        for i in range(1, 8):
            write_png(make(frame(number, i)), str(root / name / f"im{i}.png"))
    return str(root)


@pytest.fixture
def gt(tmp_path):
    return write_sequences(tmp_path / "GT")


@pytest.fixture
def lq(tmp_path):
    return write_sequences(tmp_path / "LQ", lq_of)


def numbers(item, side="H"):
    return [round(x) % 50 for x in (item[side][:, 2, 0, 0] * 255).tolist()]


def train(root, **changes):
    return VideoRecurrentTrainVimeoDataset(**{"dataroot_gt": root, "gt_size": 16, **changes})


def test_super_resolution(gt, lq, tmp_path):
    (tmp_path / "list.txt").write_text("00002/0001\n00001/0007 7 (256,448,3)\n")  # Vimeo-90K's lines, and KAIR's
    dataset = train(gt, dataroot_lq=lq, meta_info_file=str(tmp_path / "list.txt"), pad_sequence=True)
    item = dataset[3, 0]
    assert len(dataset) == 2 and item["key"] == "00002/0001" and shown(item)[0] == (2, 1)
    assert item["L"].shape == (8, 3, 4, 4) and item["H"].shape == (8, 3, 16, 16)
    assert numbers(item) == numbers(item, "L") == [1, 2, 3, 4, 5, 6, 7, 7]
    block = item["H"][..., :2, :, :] * 255 // 16 * 16
    assert torch.equal(block[..., ::4, ::4], item["L"][:, :2] * 255)  # one window and symmetry for both
    assert same(train(gt)[0], train(gt)[0]) and train(gt)[0]["L"].shape == (7, 3, 4, 4)  # L is made


@pytest.mark.parametrize("options, expected", [
    ({"num_frame": 5}, [2, 3, 4, 5, 6]),
    ({"num_frame": 1}, [4]),
    ({"temporal_scale": 2}, [1, 3, 5, 7]),
    ({"num_frame": 3, "mirror_sequence": True}, [3, 4, 5, 5, 4, 3]),
])
def test_which_frames(gt, options, expected):
    assert numbers(train(gt, **options)[0]) == expected


def test_reversing_leaves_no_trace(gt):
    dataset, keys = train(gt, random_reverse=True), [(epoch, index) for epoch in range(8) for index in range(3)]
    alone = {key: train(gt, random_reverse=True)[key] for key in keys}
    assert {tuple(numbers(item)) for item in alone.values()} == {tuple(range(1, 8)), tuple(range(7, 0, -1))}
    assert all(same(dataset[key], alone[key]) for key in reversed(keys))


def test_interpolation(gt):
    def make(**changes):
        return VideoRecurrentTrainVimeoVFIDataset(dataroot_gt=gt, gt_size=32, random_reverse=True, **changes)

    plain, jittered, orders = make(), make(color_jitter=True), set()
    for key in [(epoch, 1) for epoch in range(8)]:
        item, other = plain[key], jittered[key]
        assert item["L"].shape == (4, 3, 32, 32) and numbers(item) == [4]
        orders.add(tuple(numbers(item, "L")))
        change = (other["H"] - item["H"]).abs()
        assert same(make(color_jitter=True)[key], other) and 0 < change.max() < 0.4 and other["H"].max() <= 1
        still = other["L"][0, 0] - other["L"][-1, 0]
        assert still.abs().max() < 0.04  # all frames alike: red is the row in each
    assert orders == {(1, 3, 5, 7), (7, 5, 3, 1)}
    with told("im4", "[1, 3, 5, 7]"):
        make(temporal_scale=1)


def test_test_sets_of_vimeo(gt, lq, tmp_path):
    (tmp_path / "list.txt").write_text("00001/0007\n")
    options = {"dataroot_gt": gt, "dataroot_lq": lq, "meta_info_file": str(tmp_path / "list.txt")}
    item = VideoTestVimeo90KDataset(**options, pad_sequence=True)[0]
    assert numbers(item, "L") == [1, 2, 3, 4, 5, 6, 7, 7] and numbers(item) == [4] and item["target_frame"] == 3
    assert item["H"].shape == (1, 3, 40, 56) and item["folder"] == "00001/0007" and len(item["lq_path"]) == 8
    assert same(VideoTestVimeo90KDataset(**options, pad_sequence=True, cache_data=True)[0], item)
    made = VideoTestVimeo90KDataset(dataroot_gt=gt)
    assert len(made) == 3 and made[2]["L"].shape == (7, 3, 10, 14)
    between = VideoTestVimeo90KDataset(dataroot_gt=gt, dataroot_lq=gt, scale=1, temporal_scale=2)[1]
    assert numbers(between, "L") == [1, 3, 5, 7] and numbers(between) == [4] and between["target_frame"] == -1
    twin = VFI_Vimeo90K(dataroot_gt=gt)[1]
    assert all(torch.equal(twin[side], between[side]) for side in "LH") and twin["lq_path"] == between["lq_path"]


def test_sets_of_five_frames(tmp_path):
    for name, count in (("bear", 10), ("cow", 7), ("short", 6)):
        (tmp_path / "DAVIS" / name).mkdir(parents=True)
        for i in range(count):
            write_png(frame(0, i), str(tmp_path / f"DAVIS/{name}/{i:05d}.png"))
    davis = VFI_DAVIS(dataroot_gt=str(tmp_path / "DAVIS"))
    assert [item["folder"] for item in davis] == ["bear/00003", "bear/00005", "cow/00003"]
    assert numbers(davis[1], "L") == [2, 4, 6, 8] and numbers(davis[1]) == [5]
    for place in ("1", "2"):
        (tmp_path / "UCF" / place).mkdir(parents=True)
        for i, name in enumerate(("frame0", "frame1", "frame2", "frame3", "framet")):
            write_png(frame(0, i), str(tmp_path / "UCF" / place / f"{name}.png"))
    ucf = VFI_UCF101(dataroot_gt=str(tmp_path / "UCF"))
    assert len(ucf) == 2 and numbers(ucf[0], "L") == [0, 1, 2, 3] and numbers(ucf[0]) == [4]
    (tmp_path / "UCF/2/framet.png").unlink()
    with told("UCF/2", "framet is missing", kind=FileNotFoundError):
        VFI_UCF101(dataroot_gt=str(tmp_path / "UCF"))
    with told("no clip of seven frames"):
        VFI_DAVIS(dataroot_gt=str(tmp_path / "DAVIS/short"))


def test_mistakes(gt, lq, tmp_path):
    for kind in (VideoRecurrentTrainVimeoDataset, VideoRecurrentTrainVimeoVFIDataset, VideoTestVimeo90KDataset,
                 VFI_Vimeo90K):
        with told("dataroot_gt", "/trainsets/vimeo90k", "fetch", "im7.png", kind=FileNotFoundError):
            kind(dataroot_gt="/trainsets/vimeo90k")
        (tmp_path / "list.txt").write_text("00009/0001\n")
        with told("00009/0001/im", "missing", kind=FileNotFoundError):
            kind(dataroot_gt=gt, meta_info_file=str(tmp_path / "list.txt"))
        (tmp_path / "empty").mkdir(exist_ok=True)
        with told(tmp_path / "empty", "00001/0001"):
            kind(dataroot_gt=str(tmp_path / "empty"))
    with told("num_frame 9", "1..7"):
        train(gt, num_frame=9)
    with told("choose one"):
        train(gt, pad_sequence=True, mirror_sequence=True)
    with told("56x40", "gt_size 64"):
        train(gt, gt_size=64)
    with told("14x10", "scale 2"):
        train(gt, dataroot_lq=lq, scale=2)
    with pytest.raises(IndexError):
        VFI_Vimeo90K(dataroot_gt=gt)[3]
