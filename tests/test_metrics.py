"""PSNR, SSIM and Y agree with KAIR's numbers, without KAIR's side effects."""

import json
import math

import numpy as np
import pytest
import torch

from metrics.psnr_ssim import STRIP, _ssim_sum, bgr2ycbcr, calculate_psnr, calculate_ssim, rgb2ycbcr, ssim
from metrics.vqgan import code_hits, codebook_use, image_metrics
from metrics.vrt import video_metrics
from tests.conftest import ROOT


@pytest.fixture
def golden(shared):
    return torch.load(shared / "golden/kair_helpers.pt", weights_only=True)["metrics"]


def test_psnr_and_ssim_agree_with_kair(golden):
    color, gray = (golden["color_a"], golden["color_b"]), (golden["gray_a"], golden["gray_b"])
    pairs = {"color": color, "gray2d": gray, "gray3d": [x[..., None] for x in gray], "identical": color[:1] * 2}
    luma = {"": lambda x: x, "_y": lambda x: bgr2ycbcr(x.float() / 255) * 255, "_y_uint8rounded": bgr2ycbcr}
    for name, expected in golden["values"].items():
        metric, pair, border = name.split("/")
        a, b = (luma[metric[4:]](x) for x in pairs[pair])
        calculate = calculate_psnr if metric.startswith("psnr") else calculate_ssim
        for kind in (lambda x: x, lambda x: x.numpy()):
            assert calculate(kind(a), kind(b), int(border[6:])) == pytest.approx(expected, abs=1e-6), name


def test_luma_agrees_with_kair(golden):
    for name, expected in golden["ycbcr"].items():
        convert = rgb2ycbcr if name.startswith("rgb") else bgr2ycbcr
        img = golden["color_a"] if "uint8" in name else golden["color_a"].float() / 255
        out = convert(img, only_y=name.endswith("y"))
        assert out.dtype == expected.dtype
        torch.testing.assert_close(out, expected, atol=0 if "uint8" in name else 1e-6, rtol=0, msg=name)
        assert np.array_equal(convert(img.numpy(), only_y=name.endswith("y")), out.numpy())


def test_luma_leaves_its_argument_alone():
    img = np.random.default_rng(0).random((4, 5, 3), dtype=np.float32)
    before = img.copy()
    y = rgb2ycbcr(img)
    assert np.array_equal(img, before) and y.dtype == np.float32 and y.shape == (4, 5)
    assert np.array_equal(bgr2ycbcr(img[..., ::-1]), y)  # a view that runs backwards


def test_video_metrics_are_means_of_the_8_bit_frames():
    generator = torch.Generator().manual_seed(0)
    target = torch.rand(3, 3, 24, 32, generator=generator)
    restored = target + 0.2 * torch.randn(target.shape, generator=generator)  # partly outside [0,1]
    before = restored.clone()
    found = video_metrics(restored, target)
    assert torch.equal(restored, before)
    pairs = [[x.clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).numpy() for x in pair]
             for pair in zip(restored, target)]
    luma = [[rgb2ycbcr(x.astype(np.float32) / 255) * 255 for x in pair] for pair in pairs]
    for name, calculate, images in (("psnr", calculate_psnr, pairs), ("ssim", calculate_ssim, pairs),
                                    ("psnr_y", calculate_psnr, luma), ("ssim_y", calculate_ssim, luma)):
        assert found[name] == pytest.approx(np.mean([calculate(*pair) for pair in images]), abs=1e-7), name


def test_20_pictures_score_as_with_kair_and_basicsr():
    """Values of BasicSR's calculate_psnr and calculate_ssim; KAIR's differ from them by at most 4.3e-7."""
    values = json.loads((ROOT / "tests/metrics_basicsr.json").read_text())
    for i, expected in enumerate(values):
        rng = np.random.RandomState(i)
        height, width = 24 + i, 40 - i // 2
        y, x = np.mgrid[:height, :width]
        base = np.stack([128 + 100 * np.sin((x * (c + 1) + y * (i + 1)) / 9.0) for c in range(3)], -1)
        sharp, soft = (np.clip(base + rng.randint(-n, n + 1, base.shape), 0, 255).round() for n in (20, i + 1))
        pair = [torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255 for picture in (soft, sharp)]
        names = ("psnr", "psnr_y", "ssim", "ssim_y")
        found = [video_metrics(*pair, border)[name] for border in (0, 4) for name in names]
        assert found == pytest.approx(expected, abs=1e-6), i
    assert len(values) == 20


def test_a_frame_of_several_strips_is_the_mean_over_all_windows():
    a, b = torch.rand(2, 2, 3, 2 * STRIP + 23, 40, generator=torch.Generator().manual_seed(0)).mul(255).round()
    whole = torch.stack([_ssim_sum(x, y) for x, y in zip(a, b)]) / (3 * (a.shape[2] - 10) * 30)
    torch.testing.assert_close(ssim(a, b), whole, atol=1e-12, rtol=0)


def test_identical_clips():
    clip = torch.rand(2, 3, 16, 16)
    scores = video_metrics(clip, clip)
    assert scores["psnr"] == scores["psnr_y"] == math.inf and scores["ssim"] == pytest.approx(1)


@pytest.mark.parametrize("wrong", (
    lambda: calculate_psnr(np.zeros((8, 8, 2)), np.zeros((8, 8, 2))),
    lambda: calculate_ssim(np.zeros((16, 16, 4)), np.zeros((16, 16, 4))),
    lambda: calculate_psnr(np.zeros((8, 8)), np.zeros((8, 9))),
    lambda: calculate_psnr(np.zeros((8, 8)), np.zeros((8, 8)), border=4),
    lambda: calculate_ssim(np.zeros((10, 16)), np.zeros((10, 16))),
    lambda: rgb2ycbcr(np.zeros((8, 8, 4))),
    lambda: rgb2ycbcr(np.zeros((8, 8, 3), int)),
    lambda: video_metrics(torch.zeros(1, 3, 16, 16), torch.zeros(2, 3, 16, 16)),
))
def test_what_does_not_fit_is_an_error_of_one_line(wrong):
    with pytest.raises(ValueError) as error:
        wrong()
    assert "\n" not in str(error.value)


def test_image_metrics_are_means_over_images_and_know_what_one_colour_gets():
    target = torch.zeros(2, 3, 4, 4)
    target[1, :, :2] = 1
    restored = target.clone()
    restored[:] += 10 / 255 * (1 - 2 * target)
    values = image_metrics(restored, target)
    assert values["psnr"] == pytest.approx(20 * math.log10(255 / 10))
    assert values["psnr_mean_colour"] == math.inf  # the first is one colour
    assert image_metrics(restored[1:], target[1:])["psnr_mean_colour"] == pytest.approx(
        10 * math.log10(255**2 / ((127**2 + 128**2) / 2)))
    assert image_metrics(restored[:, :1], target[:, :1])["psnr"] == pytest.approx(values["psnr"])
    with pytest.raises(ValueError, match="both must be"):
        image_metrics(restored, target[:1])


def test_codebook_use_counts_codes_and_weighs_them():
    even = codebook_use(code_hits(torch.arange(4).repeat(3).view(2, 6), 8))
    assert even["codes_used"].item() == 0.5 and even["perplexity"].item() == pytest.approx(4)
    one = codebook_use(code_hits(torch.full((5,), 7), 8))
    assert one["codes_used"].item() == 0.125 and one["perplexity"].item() == pytest.approx(1)
