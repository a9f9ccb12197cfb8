"""Clips on disk: every item is a pure function of its key, LQ and GT stay together, mistakes are told in one line."""

import shutil
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from torchvision.io import write_jpeg, write_png

from data.resize import Degradation, imresize
from data.synthetic import SyntheticVideoDataset
from data.video import (
    FrameFolder,
    SingleVideoRecurrentTestDataset,
    VideoRecurrentTestDataset,
    VideoRecurrentTrainDataset,
    VideoRecurrentTrainNonblindDenoisingDataset,
)

HEIGHT, WIDTH, FRAMES = 40, 56, 6


def frame(clip, number, height=HEIGHT, width=WIDTH):
    """Recognisable: red is the row, green the column, blue tells clip and frame."""
    rows, columns = torch.arange(height)[:, None].expand(height, width), torch.arange(width).expand(height, width)
    return torch.stack([4 * rows, 4 * columns, torch.full_like(rows, 50 * clip + number)]).to(torch.uint8)


def lq_of(gt, scale=4):
    """Each LQ pixel tells the position of its own block, so that a wrong crop shows."""
    return gt[:, ::scale, ::scale].contiguous()


def write_clips(root, make=lambda gt: gt, *, clips=("a", "b", "c"), frames=FRAMES, name="{:08d}.png",
                size=(HEIGHT, WIDTH)):
    for number, clip in enumerate(clips):
        (root / clip).mkdir(parents=True)
        for i in range(frames):
            write_png(make(frame(number, i, *size)), str(root / clip / name.format(i)))
    return str(root)


@pytest.fixture
def gt(tmp_path):
    return write_clips(tmp_path / "GT")


@pytest.fixture
def lq(tmp_path):
    return write_clips(tmp_path / "LQ", lq_of)


def train(root, **changes):
    return VideoRecurrentTrainDataset(**{"dataroot_gt": root, "num_frame": 3, "gt_size": 16, "seed": 2, **changes})


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) if torch.is_tensor(a[k]) else a[k] == b[k] for k in a)


def shown(item):
    """Which frames an item shows, by the blue of H: (clip, frame) each."""
    return [divmod(round(x), 50) for x in (item["H"][:, 2, 0, 0] * 255).tolist()]


# Training ----------------------------------------------------------------------------------------------------------

def test_an_item_depends_on_its_key_alone(gt, lq):
    keys = [(0, 1), (7, 5), (1, 17), (0, 0), (7, 17)]
    options = {"dataroot_lq": lq, "interval_list": [1, 2], "random_reverse": True}
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    items = {key: train(gt, **options)[key] for key in keys}
    assert not same(items[1, 17], items[7, 17])
    dataset = train(gt, **options, cache_data=True)
    assert all(same(dataset[key], items[key]) for key in reversed(keys))
    assert same(dataset[1], items[0, 1])  # a plain index is one of epoch 0
    assert torch.equal(torch.get_rng_state(), before[0]) and (np.random.get_state()[1] == before[1]).all()
    for workers in (0, 2):
        loader = DataLoader(dataset, batch_sampler=[[key] for key in keys], num_workers=workers)
        for key, batch in zip(keys, loader):
            assert torch.equal(batch["H"][0], items[key]["H"]) and torch.equal(batch["L"][0], items[key]["L"])


def test_one_window_and_one_symmetry_for_all_frames_of_both(gt, lq):
    dataset, states, corners = train(gt, dataroot_lq=lq), set(), set()
    assert len(dataset) == 3 * FRAMES
    for epoch in range(12):
        for index in range(len(dataset)):
            item = dataset[epoch, index]
            sharp, small = item["H"] * 255, item["L"] * 255
            assert sharp.shape == (3, 3, 16, 16) and small.shape == (3, 3, 4, 4) and sharp.dtype == torch.float32
            assert (sharp[:, :2] == sharp[:1, :2]).all()  # red and green: the same place in each frame
            block = sharp[:, :2] // 16 * 16  # where the 4 x 4 pixels start that an LQ pixel stands for
            assert torch.equal(block[..., ::4, ::4], small[:, :2])
            assert torch.equal(block[..., 3::4, 3::4], small[:, :2])
            row, column = sharp[0, 0], sharp[0, 1]
            states.add((bool(row[0, 0] != row[0, 1]), bool(row[0, 0] > row[-1, -1]),
                        bool(column[0, 0] > column[-1, -1])))
            corners.add((int(small[0, 0].min()) // 16, int(small[0, 1].min()) // 16))
    assert len(states) == 8
    for axis, last in ((0, 6), (1, 10)):  # up to the last window, and none beyond
        assert {corner[axis] for corner in corners} == set(range(last + 1))


def test_switches_off_mean_no_flip_at_all(gt):
    for item in train(gt, use_hflip=False, use_rot=False, num_frame=1):
        assert item["H"][0, 0, 0, 0] < item["H"][0, 0, 1, 0] and item["H"][0, 1, 0, 0] < item["H"][0, 1, 0, 1]
    states = {bool(i["H"][0, 1, 0, 0] < i["H"][0, 1, 0, 1]) for i in train(gt, use_rot=False, num_frame=1)}
    assert states == {True, False}


def test_starts_intervals_and_reverse(gt):
    dataset = train(gt, interval_list=[2], num_frame=3)  # 5 frames needed: the last start is 1
    for epoch in range(6):
        for index in range(len(dataset)):
            item, (clip, start) = dataset[epoch, index], divmod(index, FRAMES)
            frames = [number for _, number in shown(item)]
            assert {c for c, _ in shown(item)} == {clip}
            assert frames in ([0, 2, 4], [1, 3, 5]) and (start > 1 or frames[0] == start)
            assert item["key"] == f"{'abc'[clip]}/{start:08d}"  # the item's own frame, as in KAIR
    starts = {shown(dataset[epoch, 5])[0][1] for epoch in range(20)}
    assert starts == {0, 1}  # the last possible start too, which KAIR never takes for intervals above 1
    orders = {tuple(n for _, n in shown(train(gt, random_reverse=True)[epoch, 0])) for epoch in range(20)}
    assert orders == {(0, 1, 2), (2, 1, 0)}
    drawn = {shown(train(gt, interval_list=[1, 2])[epoch, 0])[1][1] for epoch in range(20)}
    assert drawn == {1, 2}
    assert train(gt, num_frame=1)[0]["L"].shape == (1, 3, 4, 4)  # KAIR's fails


def test_meta_file_and_scan_agree(gt, lq, tmp_path):
    meta = tmp_path / "meta.txt"
    meta.write_text("".join(f"{clip} {FRAMES} ({HEIGHT},{WIDTH},3) 00000000\n" for clip in "abc") + "\n")
    a, b = train(gt, dataroot_lq=lq), train(gt, dataroot_lq=lq, meta_info_file=str(meta))
    assert len(a) == len(b) and all(same(a[2, i], b[2, i]) for i in range(len(a)))
    meta.write_text("b 3 (40,56,3) 2\n")
    part = train(gt, meta_info_file=str(meta))
    assert len(part) == 3 and shown(part[0]) == [(1, 2), (1, 3), (1, 4)] and part[0]["key"] == "b/00000002"


def test_names_need_not_be_numbers(tmp_path):
    root = write_clips(tmp_path / "GT", name="shot-{}.png")
    write_jpeg(frame(0, 0), str(tmp_path / "GT/a/shot-6.JPG"))  # sorted in by name
    (tmp_path / "GT/a/.DS_Store").touch()
    (tmp_path / "GT/a/readme.txt").touch()
    dataset = train(root)
    assert len(dataset) == 3 * FRAMES + 1 and dataset[FRAMES]["key"] == "a/shot-6"


def test_frames_right_in_the_root_are_one_clip(gt):
    dataset = train(gt + "/b")
    assert len(dataset) == FRAMES and dataset[1]["key"] == "b/00000001"
    assert [c.name for c in VideoRecurrentTestDataset(dataroot_gt=gt + "/b").clips] == ["b"]


@pytest.mark.parametrize("options", (None, {"type": "blur"}), ids=str)
@pytest.mark.parametrize("scale", (2, 4))
def test_lq_on_the_fly_is_the_crop_of_the_degraded_frame(tmp_path, scale, options):
    generator, (height, width) = torch.Generator().manual_seed(0), (43, 57)  # multiples of neither scale
    whole = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
    (tmp_path / "GT/a").mkdir(parents=True)
    write_png(whole, str(tmp_path / "GT/a/0.png"))
    degraded = Degradation(scale, options)([whole], np.random.default_rng(0))[0] / 255
    dataset = train(str(tmp_path / "GT"), num_frame=1, scale=scale, degradation=options, use_hflip=False, use_rot=False)
    for epoch in range(25):
        item = dataset[epoch, 0]
        sharp, small, side = item["H"][0], item["L"][0], 16 // scale
        places = [(y, x) for y in range(degraded.shape[1] - side + 1) for x in range(degraded.shape[2] - side + 1)
                  if torch.equal(whole[:, y * scale : y * scale + 16, x * scale : x * scale + 16] / 255, sharp)]
        ((y, x),) = places
        assert torch.equal(small, degraded[:, y : y + side, x : x + side])


def test_noise_on_the_fly_is_drawn_from_the_key(gt):
    noisy = {"degradation": {"noise_sigma": 20}}
    assert same(train(gt, **noisy)[3, 4], train(gt, **noisy)[3, 4])
    assert not torch.equal(train(gt, **noisy)[3, 4]["L"], train(gt)[3, 4]["L"])


def test_val_partition_holds_whatever_the_name(tmp_path):
    root = write_clips(tmp_path / "GT", clips=("000", "001", "240"), frames=3)
    assert {c.name for c in train(root, val_partition="REDS4", name="train_dataset").clips} == {"001", "240"}
    assert {c.name for c in train(root, val_partition="official").clips} == {"000", "001"}
    assert {c.name for c in train(root, val_partition="REDS4", test_mode=True).clips} == {"000"}
    assert len(train(root).clips) == 3


def test_nonblind_training_draws_a_level_for_each_item(gt):
    def noisy(**changes):
        return VideoRecurrentTrainNonblindDenoisingDataset(**{
            "dataroot_gt": gt, "dataroot_lq": gt, "scale": 1, "num_frame": 2, "gt_size": 32, "sigma_min": 10,
            "sigma_max": 50, "seed": 3, **changes})

    levels, dataset = set(), noisy()
    for key in [(0, 0), (1, 0), (0, 7), (9, 17)]:
        item = dataset[key]
        level, noise = item["L"][0, 3, 0, 0].item(), item["L"][:, :3] - item["H"]
        assert item["L"].shape == (2, 4, 32, 32) and (item["L"][:, 3] == level).all() and 10 <= level * 255 <= 50
        assert noise.std().item() == pytest.approx(level, rel=0.06) and item["L"].min() < 0  # not clipped
        assert not torch.equal(noise[0], noise[1]) and same(noisy()[key], item)
        levels.add(level)
    assert len(levels) == 4
    with told("sigma_max is missing"):
        noisy(sigma_max=None)
    with told("sigma_min 60, sigma_max 50", "0..255"):
        noisy(sigma_min=60)
    with told("scale 1, not 4"):
        noisy(scale=4)


def test_the_options_stay_as_they_are(gt):
    io_backend, degradation, intervals = {"type": "disk"}, {"type": "blur", "blur_sigma": 2}, [1, 2]
    train(gt, io_backend=io_backend, degradation=degradation, interval_list=intervals)[0]
    assert (io_backend, degradation, intervals) == ({"type": "disk"}, {"type": "blur", "blur_sigma": 2}, [1, 2])


def test_without_folders_video_is_drawn():
    drawn = VideoRecurrentTrainDataset(num_frame=2, gt_size=32, generated={"num_clips": 3}, seed=1)
    whole = VideoRecurrentTestDataset(generated={"num_frame": 2, "gt_size": [32, 48]}, seed=1)
    twin = SyntheticVideoDataset(num_clips=3, num_frame=2, gt_size=32, seed=1)
    assert len(drawn) == 3 and same(drawn[5, 2], twin[5, 2])
    assert [item["folder"] for item in whole] == ["clip_100000", "clip_100001"]
    still = SyntheticVideoDataset(num_clips=2, num_frame=2, gt_size=[32, 48], first_clip=100_000, use_hflip=False,
                                  use_rot=False, seed=1)
    assert all(same(whole[epoch, 1], still[epoch, 1]) for epoch in range(6))
    for given in ({"dataroot_lq": "/LQ"}, {"meta_info_file": "/meta.txt"}):
        with told("dataroot_gt is missing", *given.values()):  # a forgotten folder is not replaced in silence
            VideoRecurrentTrainDataset(**given)
    with told("dataroot_gt is missing"):
        VideoRecurrentTestDataset(meta_info_file="/meta.txt")
    with told("sigma 5", "dataroot_gt"):
        VideoRecurrentTestDataset(sigma=5, scale=1)
    with told("generated.clips"):
        VideoRecurrentTrainDataset(generated={"clips": 3})


# Testing -----------------------------------------------------------------------------------------------------------

def test_whole_clips(gt, lq):
    dataset = VideoRecurrentTestDataset(dataroot_gt=gt, dataroot_lq=lq)
    cached = VideoRecurrentTestDataset(dataroot_gt=gt, dataroot_lq=lq, cache_data=True)
    assert [item["folder"] for item in dataset] == ["a", "b", "c"]
    item = dataset[4, 1]
    assert item["H"].shape == (FRAMES, 3, HEIGHT, WIDTH) and item["L"].shape == (FRAMES, 3, HEIGHT // 4, WIDTH // 4)
    assert shown(item) == [(1, number) for number in range(FRAMES)]
    assert item["lq_path"] == [f"{lq}/b/{number:08d}.png" for number in range(FRAMES)]  # also when cached
    only = VideoRecurrentTestDataset(dataroot_lq=lq)[0]
    assert "H" not in only and torch.equal(only["L"], dataset[0]["L"])
    for root in (gt, lq):
        shutil.rmtree(root)
    assert same(cached[1], item)


def test_lq_of_whole_clips_is_made_on_the_fly(tmp_path):
    root = write_clips(tmp_path / "GT", size=(42, 59))
    item = VideoRecurrentTestDataset(dataroot_gt=root)[0]
    assert item["H"].shape == (FRAMES, 3, 40, 56)  # cut to multiples of 4
    expected = (imresize(item["H"], 1 / 4).clamp(0, 1) * 255).round() / 255
    assert (item["L"] - expected).abs().max() < 1.01 / 255


def test_meta_file_chooses_the_clips(gt, lq, tmp_path):
    (tmp_path / "meta.txt").write_text("c 6 (40,56,3) 0\na\n")
    dataset = VideoRecurrentTestDataset(dataroot_gt=gt, dataroot_lq=lq, meta_info_file=str(tmp_path / "meta.txt"))
    assert [item["folder"] for item in dataset] == ["c", "a"]


def test_nonblind_noise(gt):
    dataset = VideoRecurrentTestDataset(dataroot_gt=gt, scale=1, sigma=25)
    state = torch.get_rng_state()
    item = dataset[0]
    assert torch.equal(torch.get_rng_state(), state) and same(dataset[0], item) and same(dataset[9, 0], item)
    noise = item["L"][:, :3] - item["H"]
    assert noise.std().item() == pytest.approx(25 / 255, rel=0.05) and item["L"].min() < 0  # not clipped
    assert item["L"].shape == (FRAMES, 4, HEIGHT, WIDTH) and (item["L"][:, 3] == 25 / 255).all()
    clean = VideoRecurrentTestDataset(dataroot_gt=gt, scale=1, sigma=0)[0]  # level 0 still has its channel
    assert torch.equal(clean["L"][:, :3], clean["H"]) and (clean["L"][:, 3] == 0).all()


@pytest.mark.parametrize("made", ("lq", "bicubic", "noise", "noisy LQ", "drawn"))
def test_clips_in_windows_are_the_whole_clip(gt, lq, made):
    dataset = VideoRecurrentTestDataset(**{
        "lq": {"dataroot_gt": gt, "dataroot_lq": lq},
        "bicubic": {"dataroot_gt": gt},
        "noise": {"dataroot_gt": gt, "scale": 1, "sigma": 25},
        "noisy LQ": {"dataroot_gt": gt, "degradation": {"noise_sigma": 9}},
        "drawn": {"generated": {"num_frame": FRAMES, "gt_size": [32, 48]}}}[made])
    clip, item = dataset.clip(1), dataset[1]
    assert clip.name == item["folder"] and clip.paths == item["lq_path"] and len(clip.frames) == FRAMES
    assert clip.frames[5].endswith("00000005") or made == "drawn"
    windows = [clip.read(start, start + 2) for start in (4, 0, 2)]  # in any order
    for side in "LH":
        assert windows[0][side].shape[0] == 2
        assert torch.equal(torch.cat([windows[i][side] for i in (1, 2, 0)]), item[side])


def test_a_window_reads_its_own_frames_alone(gt, lq, tmp_path):
    for path in [*(tmp_path / "GT/b").iterdir(), *(tmp_path / "LQ/b").iterdir()]:
        if path.stem not in ("00000002", "00000003"):
            path.write_bytes(b"")  # would be an error if it were read
    clip = VideoRecurrentTestDataset(dataroot_gt=gt, dataroot_lq=lq).clip(1)
    assert clip.read(2, 4)["H"].shape[0] == 2
    with told(f"{lq}/b/00000004.png"):
        clip.read(3, 5)


def test_windows_of_one_clip_have_one_size(gt):
    write_png(frame(0, 3, 44, 56), f"{gt}/a/00000003.png")
    clip = VideoRecurrentTestDataset(dataroot_gt=gt, scale=1).clip(0)
    clip.read(0, 2)
    with told(f"{gt}/a/00000003.png", "56x44", "56x40"):
        clip.read(3, 4)


def test_frames_to_restore(gt, lq, tmp_path):
    only = SingleVideoRecurrentTestDataset(dataroot_lq=lq, num_frame=-1)[2]
    assert only.keys() == {"L", "folder", "lq_path"} and only["folder"] == "c"
    with told("dataroot_lq is missing"):
        SingleVideoRecurrentTestDataset(dataroot_lq="")
    assert [clip.name for clip in FrameFolder(f"{lq}/b").clips] == ["b"]
    clips = FrameFolder(lq, gt, scale=4)
    assert same(clips[1], VideoRecurrentTestDataset(dataroot_gt=gt, dataroot_lq=lq)[1]) and len(clips) == 3
    told_level = FrameFolder(lq, sigma=20)[0]["L"]
    assert torch.equal(told_level[:, :3], FrameFolder(lq)[0]["L"]) and (told_level[:, 3] == 20 / 255).all()
    (tmp_path / "new").mkdir()
    for number in (9, 11, 10):
        write_jpeg(frame(0, number), str(tmp_path / f"new/shot{number}.jpg"))
    assert FrameFolder(str(tmp_path / "new")).clip(0).frames == ["shot9", "shot10", "shot11"]  # numbers by value
    with told("input: folder /nowhere", kind=FileNotFoundError):
        FrameFolder("/nowhere")
    with told("input is missing"):
        FrameFolder("")
    with told("gt: folder /nowhere", kind=FileNotFoundError):
        FrameFolder(lq, "/nowhere")
    with told("sigma 300", "from 0 to 255"):
        FrameFolder(lq, sigma=300)


def test_real_frames(shared):
    root = shared / "data/video"
    scan = VideoRecurrentTrainDataset(dataroot_gt=str(root / "train_GT"), gt_size=64)
    meta = VideoRecurrentTrainDataset(dataroot_gt=str(root / "train_GT"), gt_size=64,
                                      meta_info_file=str(root / "meta_info_train_GT.txt"))
    assert len(scan) == len(meta) == 5 * 24 and same(scan[1, 77], meta[1, 77])
    clips = VideoRecurrentTestDataset(dataroot_gt=str(root / "test_GT"))
    assert [tuple(item["L"].shape) for item in clips] == [(10, 3, 32, 80), (10, 3, 44, 80)]


# Mistakes ----------------------------------------------------------------------------------------------------------

@contextmanager
def told(*words, kind=ValueError):
    """The block fails with this kind of error, whose single line has all these words."""
    with pytest.raises(kind) as error:
        yield
    text = str(error.value)
    assert "\n" not in text and isinstance(error.value, kind)
    for word in words:
        assert str(word) in text, text


def test_folders_that_are_not_there_or_empty(gt, lq, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts/a").mkdir(parents=True)
    (tmp_path / "texts/a/notes.txt").touch()
    with told("dataroot_gt", f"{tmp_path}/nowhere", kind=FileNotFoundError):
        train(f"{tmp_path}/nowhere")
    with told("dataroot_lq", f"{tmp_path}/no", kind=FileNotFoundError):
        train(gt, dataroot_lq=f"{tmp_path}/no")
    for make in (train, lambda root: VideoRecurrentTestDataset(dataroot_gt=root)):
        with told(f"{tmp_path}/empty", "PNG"):
            make(f"{tmp_path}/empty")
        with told(f"{tmp_path}/texts/a", "PNG"):
            make(f"{tmp_path}/texts")
    write_png(frame(0, 0), f"{gt}/stray.png")
    with told(gt, "frames and folders", "'a', 'b', 'c'"):
        train(gt)


def test_files_that_are_no_frames(gt, lq, tmp_path):
    intact = (tmp_path / "GT/b/00000003.png").read_bytes()
    for damage in (b"", b"not a picture", intact[: len(intact) // 2]):
        (tmp_path / "GT/b/00000003.png").write_bytes(damage)
        with told(f"{gt}/b/00000003.png", "not a readable image"):
            train(gt)[0, 6 + 2]
        with told(f"{gt}/b/00000003.png"):
            train(gt, cache_data=True)
        with told(f"{gt}/b/00000003.png"):
            VideoRecurrentTestDataset(dataroot_gt=gt)[1]
    dataset = train(gt)
    (tmp_path / "GT/b/00000003.png").unlink()
    with told(f"{gt}/b/00000003.png", "missing", kind=FileNotFoundError):
        dataset[0, 6 + 2]


def test_sizes(gt, lq, tmp_path):
    with told(f"{gt}/a/00000000.png", "56x40", "gt_size 64"):
        train(gt, gt_size=64)
    with told(f"{lq}/a/00000000.png", "14x10", "56x40", "scale 2"):
        train(gt, dataroot_lq=lq, scale=2)
    with told("14x10", "56x40", "scale 2"):
        VideoRecurrentTestDataset(dataroot_gt=gt, dataroot_lq=lq, scale=2)[0]
    with told("gt_size 18", "scale 4"):
        train(gt, gt_size=18)
    with told("num_frame 0"):
        train(gt, num_frame=0)
    with told("interval_list [0]"):
        train(gt, interval_list=[0])
    with told(gt, "'a' has 6 frames", "needs 7"):
        train(gt, num_frame=7)
    with told("interval 2 needs 7"):
        train(gt, num_frame=4, interval_list=[1, 2])
    assert train(gt, num_frame=6) and train(gt, num_frame=3, interval_list=[2])  # just enough
    write_png(frame(0, 3, 44, 56), f"{gt}/a/00000003.png")
    with told(f"{gt}/a/00000003.png", "56x44", "56x40"):
        train(gt)[0, 1]


def test_lq_and_gt_that_do_not_match(gt, lq, tmp_path):
    (tmp_path / "LQ/b/00000002.png").rename(tmp_path / "LQ/b/00000009.png")
    for make in (train, lambda gt, dataroot_lq: VideoRecurrentTestDataset(dataroot_gt=gt, dataroot_lq=dataroot_lq)):
        with told(f"'00000002' only in {gt}/b", f"'00000009' only in {lq}/b"):
            make(gt, dataroot_lq=lq)
    (tmp_path / "LQ/b/00000009.png").unlink()
    with told("GT has 6 frames, LQ 5", f"{gt}/b"):
        train(gt, dataroot_lq=lq)
    (tmp_path / "LQ/b").rename(tmp_path / "LQ/x")
    with told(f"'b' only in {gt}", f"'x' only in {lq}"):
        train(gt, dataroot_lq=lq)
    with told(lq, "remove one"):
        train(gt, dataroot_lq=lq, degradation={"type": "blur"})
    write_jpeg(frame(0, 0), f"{gt}/a/00000000.jpg")
    with told(f"{gt}/a/00000000", "second frame"):
        train(gt)


def test_meta_files(gt, lq, tmp_path):
    meta = tmp_path / "meta.txt"

    def listed(text, **options):
        meta.write_text(text)
        return train(gt, meta_info_file=str(meta), **options)

    with told("meta_info_file", "/no.txt", kind=FileNotFoundError):
        train(gt, meta_info_file="/no.txt")
    with told(meta, "empty"):
        listed("\n")
    for line in ("b 6 0", "b 6 (40, 56, 3) 0", "b six (40,56,3) 0", "b 6 (40,56,3) -1"):
        with told(f"{meta}, line 3", repr(line)):
            listed(f"a 6 (40,56,3) 0\n\n{line}\n")
    with told(f"{gt}/a/00000006.png", kind=FileNotFoundError):
        listed("a 7 (40,56,3) 0")
    with told(f"{gt}/z", kind=FileNotFoundError):
        listed("z 6 (40,56,3) 0")
    with told(f"{gt}/a/00000000.jpg", kind=FileNotFoundError):
        listed("a 6 (40,56,3) 0", filename_ext="jpg")
    with told("filename_tmpl 'q'", "08d"):
        listed("a 6 (40,56,3) 0", filename_tmpl="q")
    (tmp_path / "LQ/a/00000004.png").unlink()
    with told(f"{lq}/a/00000004.png", kind=FileNotFoundError):
        listed("a 6 (40,56,3) 0", dataroot_lq=lq)


def test_options_that_are_not_possible(gt, lq):
    for make in (train, lambda root, **options: VideoRecurrentTestDataset(dataroot_gt=root, **options)):
        for backend in ({"type": "memcached"}, {"type": "disk", "db": 1}, {"db": 1}):
            with told(backend, '"disk"', '"lmdb"'):
                make(gt, io_backend=backend)
        with told(gt, "ends with .lmdb", "python -m data.prepare lmdb"):
            make(gt, io_backend={"type": "lmdb"})
        with told("jpeg", "bicubic"):
            make(gt, degradation={"type": "jpeg"})
        with told("scale"):
            make(gt, scale=0)
    with told("REDS5", "REDS4", "official"):
        train(gt, val_partition="REDS5")
    with told("test_mode", "REDS4"):
        train(gt, test_mode=True)
    with told(gt, "no clip is left"):
        train(gt, val_partition="REDS4", test_mode=True)
    with told("sigma 10", "scale 1"):
        VideoRecurrentTestDataset(dataroot_gt=gt, sigma=10)
    with told("remove one"):
        VideoRecurrentTestDataset(dataroot_gt=gt, scale=1, sigma=1, degradation={"type": "blur"})
    with pytest.raises(IndexError):
        train(gt)[0, 18]
