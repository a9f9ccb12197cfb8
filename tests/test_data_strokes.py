"""Strokes are rasterised as the original does, stay in the picture, and follow from (seed, epoch, index) alone."""

import json

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from data.sampler import sample_rng
from data.strokes import MARGIN, STAGES, StrokeDataset, along, curriculum, draw_strokes, rasterise
from models.network_inktrace import unpack


def drawn(stage, index, size=64):
    return draw_strokes(sample_rng(0, 0, index), stage, size)


def joints(strokes):
    """Whether each segment continues the previous one."""
    return np.hypot(*(strokes[:-1, 6:8] - strokes[1:, :2]).T) < 1e-3


def test_maps_are_the_originals(shared):
    golden = torch.load(shared / "golden" / "inktrace_raster.pt", weights_only=True)
    gate = json.loads(golden["tolerance"])
    for name, case in golden["cases"].items():
        maps = rasterise(case["inputs"]["strokes"], case["size"], ["rounded_keypoints"])
        assert set(maps) == set(case["outputs"])
        for key, wanted in case["outputs"].items():
            assert maps[key].shape == wanted.shape and maps[key].dtype == torch.float32
            moved = ((maps[key] - wanted).abs() > gate["atol"]).any(0).sum().item()
            assert moved <= (0 if key == "keypoints" else gate["pixels_allowed"]), f"{name}: {key}: {moved} pixels"


@pytest.mark.parametrize("stage", range(len(STAGES)))
def test_keypoints_lie_on_the_skeleton(stage):
    off = 0
    for index in range(8):
        strokes = drawn(stage, index)
        maps, original = rasterise(strokes), rasterise(strokes, legacy=["rounded_keypoints"])
        assert (maps["keypoints"].amax(0) <= maps["skeleton"][0]).all()
        assert (maps["keypoints"].sum(0) <= 1).all()  # an end is not a joint
        off += int((original["keypoints"].amax(0) > original["skeleton"][0]).sum())
        assert all(torch.equal(maps[name], original[name]) for name in maps if name != "keypoints")
    assert off  # what the original's rounding does


@pytest.mark.parametrize("stage", range(len(STAGES)))
def test_a_stage_has_its_number_of_strokes(stage):
    (few, many), (short, long) = STAGES[stage]
    numbers = set()
    for index in range(60):
        strokes = drawn(stage, index)
        joined = joints(strokes)
        numbers.add(1 + int((~joined).sum()))
        lengths = np.diff(np.flatnonzero(np.concatenate([[True], ~joined, [True]])))
        assert few <= 1 + (~joined).sum() <= many and (lengths >= short).all() and (lengths <= long).all()
        assert ((strokes[:, :8] >= MARGIN) & (strokes[:, :8] <= 64 - MARGIN)).all()
        assert ((strokes[:, 8:] >= (2 if stage == 0 else 1.5)) & (strokes[:, 8:] <= (5 if stage == 0 else 4))).all()
        if 1 <= stage <= 3:
            assert (np.diff(strokes[:, 1]) >= 0).all()  # from the top down
    assert numbers == set(range(few, many + 1))


def test_a_line_has_about_two_points_a_pixel():
    where, slopes, widths = along(np.array([[10.0, 8, 20, 8, 30, 8, 40, 8, 2, 3, 4]]))
    assert len(where) == 60 and np.hypot(*np.diff(where, axis=0).T).max() < 0.6
    assert np.allclose(slopes, (30, 0)) and np.allclose(where[[0, -1]], ((10, 8), (40, 8)))
    assert widths[0] == 2 and widths[-1] == 4 and widths[30] == pytest.approx(3, abs=0.05)


def test_paths_are_smooth():
    turns = []
    for index in range(40):
        strokes = drawn(6, index)
        before, after = strokes[:-1, 6:8] - strokes[:-1, 4:6], strokes[1:, 2:4] - strokes[1:, :2]
        turns += np.degrees(np.abs(np.angle((after @ (1, 1j)) / (before @ (1, 1j))))).tolist()
    assert np.mean(np.array(turns) < 1e-3) > 0.8  # all but where a path had to turn away from the border


def test_maps_hang_together():
    for index in range(10):
        item = StrokeDataset(curriculum_stage=9)[(3, index)]
        maps = unpack(item["H"])
        line = maps["skeleton"][0] == 1
        assert torch.allclose(maps["tangent"].square().sum(0)[line], torch.ones(int(line.sum())), atol=1e-5)
        assert (maps["offset"].abs() <= 0.5).all() and (maps["width"][0][line] >= 0.15 - 1e-6).all()
        assert (item["H"][:6, ~line] == 0).all() and (item["L"][0][line] > 0).float().mean() > 0.97
        assert set(item["L"].unique().tolist()) <= {0, 0.25, 0.5, 0.75, 1}


def test_ink_is_what_asking_each_pixel_gives():
    strokes = drawn(9, 1)
    t = np.linspace(0, 1, 200)[:, None]
    canvas = np.zeros((128, 128), bool)
    y, x = np.mgrid[:128, :128]
    for s in strokes:
        weights = np.concatenate([(1 - t) ** 3, 3 * (1 - t) ** 2 * t, 3 * (1 - t) * t**2, t**3], 1)
        radii = (1 - t[:, 0]) ** 2 * s[8] + 2 * (1 - t[:, 0]) * t[:, 0] * s[9] + t[:, 0] ** 2 * s[10]
        for (cx, cy), radius in zip(2 * weights @ s[:8].reshape(4, 2), radii):
            canvas |= (x - cx) ** 2 + (y - cy) ** 2 <= max(radius, 0.5) ** 2
    wanted = canvas.reshape(64, 2, 64, 2).mean((1, 3))
    assert np.array_equal(rasterise(strokes)["image"][0].numpy(), wanted.astype("float32"))


def test_strokes_beyond_the_border_are_cut():
    strokes = np.array([[-4.0, 8.5, 4, 8.5, 12, 8.5, 20, 8.5, 3, 3, 3], [20.0, 8.5, 20, 12, 20, 16, 20, 20, 3, 3, 3]])
    maps = rasterise(strokes, 16)
    assert maps["skeleton"][0, 8].sum() == 16 and maps["keypoints"][0].sum() == 0
    assert maps["image"][0, 8, -1] == 1 and maps["image"][0, 0].sum() == 0


def test_a_sample_follows_from_seed_epoch_and_index_alone():
    dataset = StrokeDataset(num_samples=6, curriculum_stage=6, seed=1)
    once = [dataset[(2, index)] for index in range(6)]
    again = next(iter(DataLoader(StrokeDataset(num_samples=6, curriculum_stage=6, seed=1), batch_size=6, num_workers=2,
                                 sampler=[(2, index) for index in range(6)])))
    for name in ("L", "H"):
        assert torch.equal(torch.stack([item[name] for item in once]), again[name])
    others = [StrokeDataset(num_samples=6, curriculum_stage=6, seed=2)[(2, 0)], dataset[(1, 0)], dataset[(2, 1)],
              StrokeDataset(num_samples=6, curriculum_stage=6, seed=1, first_sample=9)[(2, 0)]]
    assert not any(torch.equal(once[0]["L"], other["L"]) for other in others)
    assert torch.equal(StrokeDataset(num_samples=3, curriculum_stage=6, seed=1, first_sample=2)[(2, 3 - 1)]["L"],
                       once[4]["L"])
    with pytest.raises(IndexError):
        dataset[6]


def test_the_curriculum_is_a_function_of_the_epoch():
    assert [curriculum(epoch, 0, 2, 10) for epoch in (0, 9, 10, 19, 20, 99)] == [0, 0, 1, 1, 2, 2]
    assert [curriculum(epoch, 4, None, 1) for epoch in (0, 99)] == [4, 4]
    grown = StrokeDataset(curriculum_stage=0, curriculum_end=6, epochs_per_stage=2)
    for epoch, stage in ((1, 0), (2, 1), (99, 6)):
        assert torch.equal(grown[(epoch, 0)]["L"], StrokeDataset(curriculum_stage=stage)[(epoch, 0)]["L"])


@pytest.mark.parametrize("over, message", [
    ({"curriculum_stage": 10}, "from 0 to 9"), ({"curriculum_stage": 3, "curriculum_end": 2}, "must be >= curric"),
    ({"num_samples": 0}, "must be >= 1"), ({"img_size": 8}, "img_size 8 must be >= 16"),
    ({"legacy": ["x"]}, "unknown x; valid")])
def test_impossible_values_are_refused(over, message):
    with pytest.raises(ValueError, match=message):
        StrokeDataset(**over)
