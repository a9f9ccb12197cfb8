"""VRT's recipe: testing as KAIR does at any length and size, published option files that train, use on own frames."""

import json
import os
import re

import pytest
import torch
from torchvision.io import write_png

import checkpoint
import main as door
import options
from data.video import FrameFolder
from models import model_vrt
from models.model_vrt import ModelVRT
from models.network_vrt import VRT
from tests.conftest import ROOT, SHARED, write_json
from tests.runs import differing, final, run, run_until, second_writer, stopped_after_file, straight_and_stopped
from tests.test_options import parse
from tests.vrt import vrt_file


class Sharpen(torch.nn.Module):
    """In place of VRT where only windows and tiles matter: a frame depends on its neighbours, in time and space."""

    pa_frames = 2

    def __init__(self, scale=1):
        super().__init__()
        self.scale, self.largest = scale, (0, 0, 0)

    def forward(self, x):
        self.largest = max(self.largest, tuple(x.shape[i] for i in (1, 3, 4)))
        before = torch.cat([x[:, :1], x[:, :-1]], 1)
        blurred = torch.nn.functional.avg_pool2d(x.flatten(0, 1), 3, 1, 1, count_include_pad=False)
        out = (2 * x - blurred.view_as(x) + 0.25 * before)[:, :, :3]
        return out.repeat_interleave(self.scale, -1).repeat_interleave(self.scale, -2)


def only_testing(scale=1, **val):
    """A ModelVRT that can only test."""
    model = ModelVRT.__new__(ModelVRT)
    model.sample, model.baselines = None, {}
    val = {"num_frame_testing": 0, "num_frame_overlapping": 2, "size_patch_testing": 0,
           "size_patch_overlapping": 20, "pad_seq": False,
           "flip_seq": False, "center_frame_only": False, **val}
    model.__dict__ |= {"opt": {"val": val, "scale": scale}, "netG": Sharpen(scale), "netE": None,
                       "device": torch.device("cpu"), "target_frame": -1, "lpips": None, "flow": None, "before": {}}
    return model


def restored(model, clip):
    with model.testing() as network:
        return model.restore(network, clip)


def windows_of_kair(network, clip, size, overlap, flip):
    """Overlapping windows held in one piece and averaged, as the original does it."""
    def once(x):
        total, weight = torch.zeros_like(x[:, :, :3]), torch.zeros(x.shape[1])
        for start in model_vrt.window_starts(x.shape[1], size, overlap):
            total[:, start : start + size] += network(x[:, start : start + size])
            weight[start : start + size] += 1
        return total / weight[:, None, None, None]

    return (once(clip) + once(clip.flip(1)).flip(1)) / 2 if flip else once(clip)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("frames, size, overlap", [(7, 3, 1), (9, 4, 2), (10, 4, 3), (3, 6, 2), (1, 6, 2), (6, 6, 2)])
def test_streamed_windows_equal_those_held_in_one_piece(frames, size, overlap, flip):
    torch.manual_seed(0)
    clip = torch.rand(1, frames, 3, 12, 17)
    model = only_testing(num_frame_testing=size, num_frame_overlapping=overlap, flip_seq=flip)
    torch.testing.assert_close(restored(model, clip), windows_of_kair(Sharpen(), clip, size, overlap, flip))


def test_a_padded_sequence_repeats_its_last_frame(frames=5):
    clip = torch.rand(1, frames, 3, 8, 8)
    padded = torch.cat([clip, clip[:, -1:]], 1)
    model = only_testing(pad_seq=True, num_frame_testing=4)
    expected = windows_of_kair(Sharpen(), padded, 4, 2, False)[:, :frames]
    torch.testing.assert_close(restored(model, clip), expected)


@pytest.mark.parametrize("scale", [1, 4])
@pytest.mark.parametrize("height, width", [(64, 64), (61, 107), (40, 129), (37, 30)])
def test_tiles_with_overlap_equal_the_whole(scale, height, width):
    clip = torch.rand(1, 2, 3, height, width)
    whole, tiled = restored(only_testing(scale), clip), restored(only_testing(scale, size_patch_testing=48), clip)
    assert (whole - tiled).abs().max() < 1e-3 if scale == 4 or max(height, width) <= 48 else True
    inside = (whole - tiled).abs().amax((0, 1, 2)) < 1e-3
    assert inside.float().mean() > 0.9  # at scale 1 KAIR's seam of 10 pixels is a hard one


def test_memory_is_that_of_a_window_for_a_clip_of_any_length():
    frames, reads, held = 400, [], []
    model = only_testing(num_frame_testing=8, num_frame_overlapping=2, flip_seq=True)

    def read(start, stop):
        reads.append(stop - start)
        return {"L": torch.full((stop - start, 3, 4, 4), float(start))}

    with model.testing() as network:
        for count, (t, _, _) in enumerate(model.restore_frames(network, read, frames)):
            held.append(sum(reads) - count)
            assert t == count
    assert count == frames - 1 and max(reads) == 8 and model.netG.largest[0] == 8
    only = [t for t, _, _ in model.restore_frames(model.netG, read, frames, wanted={3, 390})]
    assert only == [3, 390]


def test_center_frame_and_single_targets():
    model = only_testing(center_frame_only=True)
    model.feed_data({"L": torch.rand(1, 5, 3, 8, 8), "H": torch.rand(1, 5, 3, 8, 8)})
    model.test()
    assert model.restored.shape[1] == model.target.shape[1] == model.degraded.shape[1] == 1
    model = only_testing()
    model.feed_data({"L": torch.rand(1, 7, 3, 16, 16), "H": torch.rand(1, 1, 3, 16, 16), "target_frame": 3})
    model.test()
    assert model.restored.shape == model.degraded.shape == model.target.shape
    assert "psnr" in model.metrics()


# ---------------------------------------------------------------- published option files


KAIR = sorted((SHARED / "kair_options").glob("*.json")) if SHARED.is_dir() else []
OURS = sorted(path for path in (ROOT / "options/vrt").glob("00*.json") if path.stem.count("_") > 1)


def test_fixed_parameters_learn_at_their_own_rate():
    model = ModelVRT.__new__(ModelVRT)
    net = torch.nn.ModuleDict({"body": torch.nn.Linear(2, 2), "spynet": torch.nn.Linear(2, 2)})
    model.__dict__ |= {"netG": net, "fixed": list(net["spynet"].parameters()),
                       "opt_train": {"G_optimizer_lr": 4e-4, "fix_lr_mul": 0.25}}
    others, fixed = model.parameter_groups()
    assert [id(p) for p in others["params"]] == [id(p) for p in net["body"].parameters()] and "lr" not in others
    assert fixed["params"] == model.fixed and fixed["lr"] == 1e-4


def test_without_upscale_the_networks_own_is_compared_with_scale(tmp_path):
    opt, _ = parse(vrt_file(tmp_path), ("scale", 2))
    del opt["netG"]["upscale"]
    with pytest.raises(ValueError, match="scale 2 and netG.upscale 4 must be equal"):
        ModelVRT(opt)


def frames_in(folder, clips, numbers, size):
    generator = torch.Generator().manual_seed(0)
    for clip in clips:
        (folder / clip).mkdir(parents=True, exist_ok=True)
        for number in numbers:
            write_png(torch.randint(0, 255, (3, *size), generator=generator, dtype=torch.uint8),
                      str(folder / clip / number))


def small(path, folder):
    """Overrides that make a published recipe a small one on data made here, its kind of dataset and network kept."""
    tree, _ = options.load(str(path))
    train, net = tree["datasets"]["train"], tree["netG"]
    scale, kind = tree.get("scale", 1), train["dataset_type"]
    frames = 4 if net.get("pa_frames") == 0 else 7 if "Vimeo" in kind else 2
    stages = len(net["embed_dims"])
    sets = {"path.root": str(folder), "num_threads": 1, "netG.spynet_path": None,
            "netG.embed_dims": [12] * stages, "netG.depths": [1] * stages, "netG.num_heads": [2] * stages,
            "netG.img_size": [frames, 16, 16], "netG.window_size": net["window_size"] if frames == 4 else [2, 4, 4],
            "netG.indep_reconsts": [stages - 1], "netG.deformable_groups": 4 if net.get("pa_frames", 2) else 1,
            "netG.use_checkpoint_attn": False, "netG.use_checkpoint_ffn": False, "train.checkpoint_test": 0,
            "train.total_iter": 3, "train.checkpoint_save": 2, "train.checkpoint_print": 3, "train.fix_iter":
            2 if tree["train"].get("fix_iter", 0) > 0 else tree["train"].get("fix_iter", 0),
            "datasets.train.gt_size": 16 * scale,
            "datasets.train.dataloader_batch_size": 1, "datasets.train.dataloader_num_workers": 0,
            "datasets.train.meta_info_file": None, "datasets.train.io_backend": {"type": "disk"},
            "train.manual_seed": 0, "device": "cpu"}
    if "Vimeo" in kind:
        numbers = [f"im{n}.png" for n in range(1, 8)]
        frames_in(folder / "gt", ["00001/0001", "00001/0002"], numbers, (20 * scale, 24 * scale))
        frames_in(folder / "lq", ["00001/0001", "00001/0002"], numbers, (20, 24))
        (folder / "meta.txt").write_text("00001/0001 7 (256,448,3)\n00001/0002 7 (256,448,3)\n")
        sets["datasets.train.meta_info_file"] = str(folder / "meta.txt")
    else:
        numbers = [f"{n:08d}.png" for n in range(8)]
        frames_in(folder / "gt", ["a", "b"], numbers, (20 * scale, 24 * scale))
        frames_in(folder / "lq", ["a", "b"], numbers, (20, 24))
        sets["datasets.train.num_frame"] = frames
    sets["datasets.train.dataroot_gt"] = str(folder / "gt")
    if train.get("dataroot_lq"):
        sets["datasets.train.dataroot_lq"] = str(folder / "lq")
    return sets


def as_words(sets):
    return [word for key, value in sets.items()
            for word in ("--set", f"{key}={value if isinstance(value, str) else json.dumps(value)}")]


@pytest.mark.parametrize("number, kind, baseline", [("003", "VideoTestVimeo90KDataset", "bicubic"),
                                                    ("009", "VFI_Vimeo90K", "average")])
def test_a_set_with_one_target_frame_is_validated_against_its_baseline(tmp_path, number, kind, baseline):
    (path,) = (path for path in OURS if path.stem.startswith(number))
    sets = small(path, tmp_path)
    for key in ("dataroot_gt", "meta_info_file"):
        sets[f"datasets.test.{key}"] = sets[f"datasets.train.{key}"]
    if number == "003":
        sets["datasets.test.dataroot_lq"] = str(tmp_path / "lq")
    sets |= {"train.total_iter": 1, "datasets.test.dataset_type": kind, "task": "run", "val.save_img": True}
    assert door.main(["-opt", str(path), *as_words(sets)]) == 0
    (row,) = checkpoint.locate(tmp_path / "run/models/1.json").load()["state"]["history"]
    assert row["test.psnr"] > 0 and row[f"test.psnr_{baseline}"] > 0
    assert len(list((tmp_path / "run/images").glob("*.png"))) == 2


# Those that differ most from the default recipe, which tests/test_resume.py has. The slow run takes all.
DIFFERENT = ("008", "009")
RECIPES = [pytest.param(path, id=f"{path.parent.name}-{path.stem[:3]}", marks=() if path in OURS and
                        path.stem[:3] in DIFFERENT else pytest.mark.slow) for path in (*OURS, *KAIR)]


@pytest.mark.parametrize("path", RECIPES)
def test_a_published_recipe_trains_and_resumes_exactly(path, tmp_path, monkeypatch):
    sets = small(path, tmp_path)
    real = options.parse

    def without_tests(*args, **kwargs):  # their data is not here
        opt, notices = real(*args, **kwargs)
        opt["datasets"] = {"train": opt["datasets"]["train"]}
        return opt, notices

    monkeypatch.setattr(options, "parse", without_tests)

    def write(name, launch):
        return write_json(tmp_path / f"{name}.json", {"extends": str(path), "task": name})

    def launch(stop, *words):
        run_until(stop, *words, *as_words(sets))

    one, two = straight_and_stopped(write, [2], launch)
    assert differing(final(one, 3), final(two, 3)) == []


# ---------------------------------------------------------------- use


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Option file and folder of a run of two steps, and seven frames of its own."""
    folder = tmp_path_factory.mktemp("trained")
    path = vrt_file(folder, train={"total_iter": 2})
    assert run("-opt", path) == 0
    frames_in(folder, ["lq"], [f"{n:03d}.png" for n in range(7)], (19, 23))
    frames_in(folder, ["gt"], [f"{n:03d}.png" for n in range(7)], (76, 92))
    return path, folder


def use(path, *words):
    windows = ("--set", "val.num_frame_testing=3", "--set", "val.num_frame_overlapping=1")
    return run("-opt", path, "--test", *words, *windows)


def test_the_users_frames_are_restored_with_and_without_truth(trained, tmp_path, capsys):
    path, folder = trained
    assert use(path, "--input", folder / "lq", "--output", tmp_path / "a") == 0
    assert sorted(os.listdir(tmp_path / "a")) == [*(f"{n:03d}.png" for n in range(7)), "made_by.json"]
    assert "done     7 written, 0 were there" in capsys.readouterr().out
    assert use(path, "--input", folder / "lq", "--output", tmp_path / "b", "--truth", folder / "gt") == 0
    said = capsys.readouterr().out
    assert "metrics  psnr" in said and (tmp_path / "b/metrics.csv").read_text().count("\n") == 8
    for n in range(7):
        assert (tmp_path / f"a/{n:03d}.png").read_bytes() == (tmp_path / f"b/{n:03d}.png").read_bytes()


def test_partial_output_is_resumed_and_ends_the_same(trained, tmp_path, monkeypatch, capsys):
    path, folder = trained
    words = ("--input", folder / "lq", "--truth", folder / "gt", "--output")
    assert use(path, *words, tmp_path / "whole") == 0
    with stopped_after_file(monkeypatch, "002.png"):
        assert use(path, *words, tmp_path / "half") == 143
    assert "stopped  by SIGTERM; resume with: python main.py -opt" in capsys.readouterr().out
    assert not (tmp_path / "half/003.png").exists()
    (tmp_path / "half/001.png").unlink()
    assert use(path, *words, tmp_path / "half") == 0
    said = capsys.readouterr().out
    assert "done     5 written, 2 were there" in said, said[-900:]
    for name in os.listdir(tmp_path / "whole"):
        if name != "made_by.json":
            assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "half" / name).read_bytes(), name


def test_a_second_process_does_not_write_into_the_same_folder(trained, tmp_path, monkeypatch):
    path, folder = trained
    words = ("--input", folder / "lq", "--truth", folder / "gt", "--output", tmp_path / "a/b")
    told = second_writer(monkeypatch, lambda: use(path, *words))
    assert use(path, *words) == 0
    assert re.match(rf"{tmp_path}/a/b: process {os.getpid()} on .* is writing here; wait for it or stop it", told[0])
    assert "\n" not in told[0]
    monkeypatch.undo()
    assert sorted(os.listdir(tmp_path / "a/b")) == [*(f"{n:03d}.png" for n in range(7)), "made_by.json", "metrics.csv"]
    (tmp_path / "a/b/.lock").write_text("left by a kill")
    assert use(path, *words) == 0 and not (tmp_path / "a/b/.lock").exists()


def test_truth_is_averaged_over_clips_as_a_test_set_is(trained, tmp_path, capsys):
    path, _ = trained
    for name, sizes in (("lq", (19, 23)), ("gt", (76, 92))):
        frames_in(tmp_path / name, ["long"], [f"{n}.png" for n in range(5)], sizes)
        frames_in(tmp_path / name, ["short"], ["0.png"], sizes)
    capsys.readouterr()
    assert use(path, "--input", tmp_path / "lq", "--truth", tmp_path / "gt", "--output", tmp_path / "out") == 0
    own = dict(re.findall(r"(psnr|ssim) ([\d.]+)", capsys.readouterr().out.split("metrics  ")[1]))
    data = [word for key, name in (("dataroot_lq", "lq"), ("dataroot_gt", "gt"))
            for word in ("--set", f"datasets.test.{key}={tmp_path / name}")]
    assert use(path, *data) == 0
    said = dict(re.findall(r"(psnr|ssim) ([\d.]+)", capsys.readouterr().out.split("metrics  ")[1]))
    rows = [line.split(",") for line in (tmp_path / "out/metrics.csv").read_text().splitlines()]
    column = rows[0].index("psnr")
    by_clip = {clip: [float(row[column]) for row in rows[1:] if row[0].startswith(clip)] for clip in ("long", "short")}
    over_frames = sum(sum(values) for values in by_clip.values()) / 6
    assert len(by_clip["long"]) == 5 and abs(over_frames - float(said["psnr"])) > 0.01, "the case tells both ways apart"
    assert {key: float(own[key]) for key in own} == pytest.approx({key: float(said[key]) for key in said}, rel=1e-3)


def test_one_frame_and_a_folder_of_clips(trained, tmp_path):
    path, folder = trained
    frames_in(tmp_path / "clips", ["one"], ["x.png"], (17, 33))
    frames_in(tmp_path / "clips", ["two"], ["8.png", "9.png", "10.png"], (32, 32))
    assert use(path, "--input", tmp_path / "clips", "--output", tmp_path / "out") == 0
    assert sorted(os.listdir(tmp_path / "out/two")) == ["10.png", "8.png", "9.png"]
    assert FrameFolder(str(tmp_path / "out/one")).clip(0).read(0, 1)["L"].shape == (1, 3, 68, 132)


@pytest.mark.parametrize("words, complaint", [
    (["--input", "{lq}"], "--input and --output belong together"),
    (["--input", "{lq}", "--output", "{lq}"], "is the input; name another folder"),
    (["--input", "{none}", "--output", "{out}"], "does not exist"),
    (["--input", "{lq}", "--output", "{gt}"], "is not empty and has no made_by.json"),
    (["--input", "{lq}", "--output", "{out}", "--resume", "{none}"], "Checkpoint file not found"),
    (["--input", "{lq}", "--output", "{out}", "--truth", "{lq}"], "scale 4 asks for GT = 4 x LQ"),
])
def test_bad_use_is_one_line_and_makes_nothing(trained, tmp_path, words, complaint):
    path, folder = trained
    places = {"lq": folder / "lq", "gt": folder / "gt", "none": folder / "none", "out": tmp_path / "out"}
    with pytest.raises((options.OptionError, checkpoint.CheckpointError)) as caught:
        use(path, *(word.format(**places) for word in words))
    assert complaint in str(caught.value) and "\n" not in str(caught.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("words", [("--input", "lq", "--output", "out"), ()], ids=["files", "test sets"])
def test_use_that_lacks_memory_is_one_line_with_this_models_options(trained, tmp_path, monkeypatch, words):
    def full(self, x):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. Of the allocated memory")

    path, folder = trained
    places = {"lq": folder / "lq", "out": tmp_path / "out"}
    with monkeypatch.context() as patch, pytest.raises(options.OptionError) as caught:
        patch.setattr(VRT, "forward", full)
        use(path, *(places.get(word, word) for word in words))
    assert re.search(r"out of memory: CUDA out of memory. Tried to allocate 2 GiB; test on smaller pieces "
                     r"\(val.num_frame_testing, val.size_patch_testing\) or smaller pictures$", str(caught.value))
    assert use(path, *(places.get(word, word) for word in words)) == 0


def test_results_of_other_weights_are_kept_apart(trained, tmp_path):
    path, folder = trained
    words = ("--input", folder / "lq", "--output", tmp_path / "out")
    assert use(path, *words, "--resume", folder / "run/models/2_E.pth") == 0
    with pytest.raises(options.OptionError, match="holds results of another weights .made_by.json.; name"):
        use(path, *words, "--resume", folder / "run/models/2_G.pth")


def test_the_options_test_sets_are_tested_without_input(trained, capsys):
    path, _ = trained
    assert run("-opt", path, "--test") == 0
    assert "metrics  test: psnr" in capsys.readouterr().out


def test_without_weights_it_says_so(tmp_path):
    tree = {"extends": str(ROOT / "options/train_vrt.json"), "path": {"root": str(tmp_path)}}
    path = write_json(tmp_path / "x.json", tree)
    with pytest.raises(checkpoint.CheckpointError, match="no checkpoint yet; train first, or name weights with"):
        run("-opt", path, "--test")
