"""imresize agrees with KAIR's; a window degraded alone agrees with the whole frame degraded."""

import numpy as np
import pytest
import torch

from data.resize import Degradation, bicubic_matrix, imresize


def frames(count, height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8) for _ in range(count)]


def test_imresize_agrees_with_kair(shared):
    golden = torch.load(shared / "golden/kair_helpers.pt", weights_only=True)["imresize"]
    inputs = {"hwc": golden["img"], "hwc_odd": golden["img_odd"], "hw": golden["img"][..., 0]}
    for name, expected in golden["out"].items():
        layout, _, rest = name.partition("/scale=")
        up, down = (int(part) for part in rest.split("/")[:2])
        img = inputs[layout].float() / 255
        img = img.permute(2, 0, 1) if img.ndim == 3 else img
        out = imresize(img, up / down, antialiasing="no_antialias" not in name)
        out = out.permute(1, 2, 0) if out.ndim == 3 else out
        if "uint8" in name:
            assert torch.equal((out.clamp(0, 1) * 255).round().byte(), expected), name
        else:
            torch.testing.assert_close(out, expected, atol=1e-6, rtol=0, msg=name)


def test_imresize_takes_arrays_and_batches_and_leaves_them_alone():
    clip = torch.rand(2, 5, 3, 12, 20)
    before = clip.clone()
    out = imresize(clip, 0.5)
    assert out.shape == (2, 5, 3, 6, 10) and torch.equal(clip, before)
    torch.testing.assert_close(out[1, 4, 2], imresize(clip[1, 4, 2], 0.5))
    array = imresize(clip.double().numpy(), 0.5)
    assert isinstance(array, np.ndarray) and array.dtype == np.float64
    torch.testing.assert_close(torch.from_numpy(array).float(), out)


@pytest.mark.parametrize("scale", (1 / 2, 1 / 3, 1 / 4, 1 / 8, 1.5, 2, 3, 4))
@pytest.mark.parametrize("antialiasing", (True, False))
def test_imresize_keeps_constants_and_sizes(scale, antialiasing):
    for size in (1, 7, 24):  # smaller than the kernel: the border is mirrored again and again
        out = imresize(torch.full((size, 24), 0.7), scale, antialiasing)
        assert out.shape == (-(-size * scale // 1), -(-24 * scale // 1))
        torch.testing.assert_close(out, torch.full_like(out, 0.7))


def test_imresize_refuses_in_one_line():
    for wrong in (lambda: imresize(torch.zeros(8, 8, dtype=torch.uint8), 0.5), lambda: imresize(torch.zeros(8, 8), 0)):
        with pytest.raises(ValueError) as error:
            wrong()
        assert "give" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("options", (None, {"type": "blur"}, {"type": "blur", "blur_sigma": 2.7}), ids=str)
@pytest.mark.parametrize("scale", (1, 2, 3, 4))
def test_a_window_equals_the_whole_frame_cut(scale, options):
    clip = frames(2, 16 * scale + 1, 21 * scale + scale - 1)  # neither side a multiple of the scale
    degradation, rng = Degradation(scale, options), np.random.default_rng(0)
    whole = degradation(clip, rng)
    assert whole.shape == (2, 3, 16 + (scale == 1), 21)
    for top, left, side in ((0, 0, 8), (4, 7, 6), (8, 13, 8), (0, 5, 16), (5, 0, 1)):
        window = degradation.window(clip, top, left, side, rng)
        assert torch.equal(window, whole[..., top : top + side, left : left + side]), (top, left, side)


def test_bicubic_degradation_is_imresize_in_8_bits():
    clip = frames(1, 32, 48)
    expected = (imresize(clip[0] / 255, 1 / 4).clamp(0, 1) * 255).round()
    difference = (Degradation(4)(clip, np.random.default_rng(0))[0].float() - expected).abs()
    assert difference.max() <= 1 and (difference > 0).float().mean() < 0.01  # float32 may round a tie the other way
    assert torch.equal(Degradation(1)(clip, np.random.default_rng(0))[0], clip[0])


def test_bicubic_sums_are_exact():
    (sharp,) = frames(1, 64, 64)
    matrix = bicubic_matrix(64, 1 / 4) * 4096
    assert torch.equal(matrix, matrix.round())  # so that whole numbers can do the sums
    whole = matrix.long() @ sharp.long() @ matrix.long().T
    assert torch.equal(Degradation(4)._shrink(sharp), whole.double() / 4096**2)


def test_blur_keeps_every_fourth_pixel_from_the_first():
    impulse = torch.zeros(3, 40, 40, dtype=torch.uint8)
    impulse[:, 16, 20] = 255
    out = Degradation(4, {"type": "blur"})([impulse], np.random.default_rng(0))[0, 0]
    assert out.argmax() == 4 * 10 + 5  # pixel (16, 20) is number (4, 5)
    kernel = torch.exp(-0.5 * (torch.arange(-6, 7) / 1.6) ** 2)
    assert out[4, 5] == round(255 / kernel.sum().item() ** 2)
    assert torch.equal(out[3], out[5]) and torch.equal(out[4, 4], out[4, 6])


def test_noise_comes_from_the_given_generator():
    clip = [torch.full((3, 64, 64), 128, dtype=torch.uint8)]
    degradation = Degradation(2, {"noise_sigma": 10})
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first, again, other = (degradation(clip, np.random.default_rng(seed)) for seed in (5, 5, 6))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.double().std().item() == pytest.approx(10, rel=0.05)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("options, says", (
    ({"type": "jpeg"}, '"bicubic", "blur" and'),
    ({"sigma": 3}, "degradation.sigma is unknown"),
    ({"blur_sigma": 2}, "degradation.blur_sigma is unknown for type 'bicubic'"),
    ({"type": "blur", "blur_sigma": 0}, "above 0"),
    ({"noise_sigma": -1}, "0..255"),
    ({"noise_sigma": "loud"}, "0..255"),
), ids=str)
def test_wrong_degradations_are_named_in_one_line(options, says):
    given = dict(options)
    with pytest.raises(ValueError) as error:
        Degradation(4, options)
    assert says in str(error.value) and "\n" not in str(error.value)
    assert options == given  # the options are the caller's
