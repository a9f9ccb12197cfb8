"""The second-order degradation: published ranges, draws of one sample alone, and each of its steps."""

import math
import shutil

import numpy as np
import pytest
import torch

from data import degradation
from data.degradation import add_noise, blur_kernel, blurred, build_degradation, sinc_kernel
from data.sampler import sample_rng
from data.video import VideoRecurrentTestDataset, VideoRecurrentTrainDataset
from options import OptionError
from tests import test_vrt
from tests.runs import run
from tests.vrt import vrt_file

SECOND = {"type": "second_order"}


def sharp(frames=2, height=70, width=90):
    y, x = np.mgrid[:height, :width]
    picture = 128 + 90 * np.sin(np.stack([x / 5 + y / 9, x / 7 - y / 5, (x + y) / 11]))
    return [torch.from_numpy(np.roll(picture, t, 2).round().astype(np.uint8)) for t in range(frames)]


def test_a_sample_depends_on_its_numbers_alone():
    made = build_degradation(4, SECOND)
    draws = {key: made(sharp(), sample_rng(*key)) for key in ((0, 0, 1), (0, 0, 2), (0, 1, 1), (1, 0, 1))}
    for key, found in draws.items():
        assert found.shape == (2, 3, 17, 22) and found.dtype == torch.uint8
        assert torch.equal(found, made(sharp(), sample_rng(*key)))
    assert sum(torch.equal(a, b) for a in draws.values() for b in draws.values()) == len(draws)
    part = made.window(sharp(), 3, 5, 8, sample_rng(0, 0, 1))
    assert part.shape == (2, 3, 8, 8)


def test_draws_are_in_the_published_ranges_and_all_kinds_occur():
    made = build_degradation(4, SECOND)
    rounds = [made.drawn(sample_rng(0, 0, index)).rounds for index in range(400)]
    for at, (sizes, sigmas, counts) in enumerate((((0.15, 1.5), (1, 30), (0.05, 3)), ((0.3, 1.2), (1, 25),
                                                                                     (0.05, 2.5)))):
        drawn = [pair[at] for pair in rounds]
        factors = [one["factor"] for one in drawn]
        assert sizes[0] <= min(factors) < 1.1 * sizes[0] + 0.05 and 0.95 * sizes[1] < max(factors) <= sizes[1]
        assert sum(f < 1 for f in factors) / 400 == pytest.approx((0.7, 0.4)[at], abs=0.08)
        assert sum(f == 1 for f in factors) / 400 == pytest.approx((0.1, 0.3)[at], abs=0.08)
        for gaussian, ends in ((True, sigmas), (False, counts)):
            strengths = [one["strength"] for one in drawn if one["gaussian"] == gaussian]
            assert len(strengths) > 150 and ends[0] <= min(strengths) and max(strengths) <= ends[1]
            assert min(strengths) < 0.1 * ends[1] and max(strengths) > 0.9 * ends[1]
        qualities = [one["quality"] for one in drawn]
        assert 30 <= min(qualities) <= 32 and 93 <= max(qualities) <= 95
        assert sum(one["kernel"] is None for one in drawn) / 400 == pytest.approx((0, 0.2)[at], abs=0.06)
        assert sum(one["gray"] for one in drawn) / 400 == pytest.approx(0.4, abs=0.08)
    kernels = [one["kernel"] for pair in rounds for one in pair if one["kernel"] is not None]
    assert {len(kernel) for kernel in kernels} == set(range(7, 22, 2))
    assert all(float(kernel.sum()) == pytest.approx(1, abs=1e-5) for kernel in kernels)
    ringing = sum(bool((kernel < -1e-4).any()) for kernel in kernels)
    assert ringing / len(kernels) == pytest.approx(0.1, abs=0.05)


def test_kernels_have_the_widths_directions_and_frequencies_that_they_are_made_for():
    grid = torch.arange(21) - 10.0
    kernel = blur_kernel(21, 2.5, 1.0, 0.0)
    assert float((kernel.sum(0) * grid**2).sum()) == pytest.approx(2.5**2, rel=0.02)  # along x
    assert float((kernel.sum(1) * grid**2).sum()) == pytest.approx(1, rel=0.02)
    turned = blur_kernel(21, 2.5, 1.0, math.pi / 2)
    torch.testing.assert_close(turned, kernel.T, atol=1e-6, rtol=0)
    plain, flat, wide = (blur_kernel(21, 2, 2, 0, *more)[10] for more in ((1.0,), (2.0,), (1.0, True)))
    assert flat[9] / flat[10] > plain[9] / plain[10] and flat[5] < plain[5] and wide[0] > plain[0]
    waves = [torch.cos(torch.arange(64) * frequency).expand(1, 1, 64, 64) for frequency in (0.5, 2.0)]
    low, high = (blurred(wave, sinc_kernel(1.2, 21))[0, 0, 32, 16:48].abs().max() for wave in waves)
    assert low > 0.9 and high < 0.15


def test_noise_has_its_strength_and_gray_noise_is_equal_in_all_channels():
    x, rng = torch.full((1, 3, 100, 100), 0.5), np.random.default_rng(0)
    for gray in (False, True):
        for gaussian, strength, expected in ((True, 20, 20 / 255), (False, 1, math.sqrt(0.5 / 2))):
            noise = add_noise(x * 0.5 + 0.25, {"gaussian": gaussian, "gray": gray, "strength": strength}, rng) - 0.5
            if gaussian:
                assert float(noise.std()) == pytest.approx(expected, rel=0.05)
            assert (float((noise[:, 0] - noise[:, 1]).abs().max()) < 1e-6) == gray and float(noise.std()) > 0.01


def test_quality_and_order_of_jpeg_matter(monkeypatch):
    made = build_degradation(2, {**SECOND, "jpeg_range2": [1, 1], "jpeg_range": [100, 100]})
    seen = []
    real = degradation.jpeg
    monkeypatch.setattr(degradation, "jpeg", lambda x, drawn: (seen.append((drawn["quality"], tuple(x.shape[-2:]))),
                                                               real(x, drawn))[1])
    for index in range(12):
        made(sharp(1), sample_rng(0, 0, index))
    assert {quality for quality, _ in seen} == {1, 100} and seen[0][0] == 100
    assert 0 < sum(size == (35, 45) for quality, size in seen if quality == 1) < 12  # after the last resize, or before


def test_frames_of_a_test_clip_share_all_draws_but_the_noise(tmp_path):
    test_vrt.frames_in(tmp_path / "GT", ["a"], [f"{n}.png" for n in range(3)], (48, 48))
    dataset = VideoRecurrentTestDataset(dataroot_gt=str(tmp_path / "GT"), degradation=SECOND)
    whole = dataset[0]["L"]
    assert whole.shape == (3, 3, 12, 12)
    assert torch.equal(dataset.clip(0).read(1, 3)["L"], whole[1:])
    for n in (1, 2):
        shutil.copy(tmp_path / "GT/a/0.png", tmp_path / f"GT/a/{n}.png")
    quiet = {f"{key}{end}": [0, 0] for key in ("noise_range", "poisson_scale_range") for end in ("", "2")}
    same = VideoRecurrentTestDataset(dataroot_gt=str(tmp_path / "GT"), degradation=SECOND | quiet)[0]["L"]
    assert torch.equal(same[0], same[1]) and torch.equal(same[0], same[2])
    train = VideoRecurrentTrainDataset(dataroot_gt=str(tmp_path / "GT"), degradation=SECOND, gt_size=32, num_frame=2)
    assert torch.equal(train[3, 0]["L"], train[3, 0]["L"]) and not torch.equal(train[3, 0]["L"], train[4, 0]["L"])


@pytest.mark.parametrize("wrong, words", [
    ({"noise_rang": [1, 2]}, "degradation.noise_rang: unknown key.*noise_range"),
    ({"noise_range": [5, 1]}, "noise_range .* must rise"), ({"resize_prob": [0.5, 0.5, 0.5]}, "must add up to 1"),
    ({"jpeg_range": [0, 95]}, "jpeg_range: .* is not a list of whole numbers from 1 to 100"),
    ({"blur_sigma": [1]}, "blur_sigma .* 1 numbers"),
    ({"type": "third_order"}, 'degradation.type is \'third_order\'; valid are "bicubic", "blur" and "second_order"')])
def test_wrong_options_are_named(wrong, words):
    with pytest.raises((ValueError, OptionError), match=words):
        build_degradation(4, {**SECOND, **wrong})


def test_the_dry_run_shows_ten_samples_outside_of_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    path = vrt_file(tmp_path, train={"total_iter": 2})
    words = ["--set", 'datasets.train.degradation={"type": "second_order"}', "--set",
             'datasets.train.generated={"num_clips": 12}']
    assert run("-opt", path, "--dry-run", *words) == 0
    (folder,) = tmp_path.glob("dry_run_run_*")
    assert sorted(file.name for file in folder.iterdir()) == [f"{n:02d}.png" for n in range(10)]
    assert f"10 samples, degraded and sharp: {folder}" in capsys.readouterr().out
