"""The practical degradation of photos: blur, resize, noise and JPEG, twice, then a ringing filter.

Source: Zhang et al. 2021, BSRGAN, arXiv:2103.14006; Wang et al. 2021, Real-ESRGAN, arXiv:2107.10833, whose names of
options and published ranges these are. Differs: every draw comes from the generator of one sample, all frames of a
clip share all draws but those of the noise, and JPEG's quality is a whole number.
Legend: T frames, C channels, H W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.image_files import encode, picture_in
from data.resize import Degradation
from options import check, schema_of
from runtime.ranges import Fraction, PositiveFloat, Range, checked

KERNELS = ("iso", "aniso", "generalized_iso", "generalized_aniso", "plateau_iso", "plateau_aniso")
SIZES = range(7, 22, 2)  # of kernels
Quality = Annotated[int, Range(ge=1, le=100)]
Level = Annotated[float, Range(ge=0, le=255)]


class SecondOrder:
    """Degrade sharp frames as photos and their copies on the internet are; `"type": "second_order"`.

    Keys that end in 2 are of the second round.

    Args:
        kernel_prob: probabilities of the blur's kernels iso, aniso, generalized_iso, generalized_aniso, plateau_iso,
            plateau_aniso.
        sinc_prob: probability that the first blur is a sinc filter, which rings.
        blur_sigma: range of the standard deviation of the first blur in pixels, along each of its axes.
        betag_range: range of the exponent of generalized kernels.
        betap_range: range of the exponent of plateau kernels.
        resize_prob: probabilities that the first resize enlarges, shrinks, or keeps the size.
        resize_range: smallest and largest factor of the first resize.
        gaussian_noise_prob: probability of Gaussian noise, instead of Poisson noise, in the first round.
        noise_range: range of the standard deviation of the first Gaussian noise in 8-bit levels.
        poisson_scale_range: range of the strength of the first Poisson noise, 1 for that of counted photons.
        gray_noise_prob: probability that the first noise is equal in all channels.
        jpeg_range: range of the quality of the first JPEG.
        second_blur_prob: probability that there is a second blur.
        sinc_prob2: probability that the second blur is a sinc filter.
        blur_sigma2: range of the standard deviation of the second blur.
        resize_prob2: probabilities that the second resize enlarges, shrinks, or keeps the size.
        resize_range2: smallest and largest factor of the second resize.
        gaussian_noise_prob2: probability of Gaussian noise in the second round.
        noise_range2: range of the standard deviation of the second Gaussian noise.
        poisson_scale_range2: range of the strength of the second Poisson noise.
        gray_noise_prob2: probability that the second noise is equal in all channels.
        jpeg_range2: range of the quality of the second JPEG.
        final_sinc_prob: probability of a sinc filter at the end.
    Raises: ValueError: a value is invalid.
    """

    scale: int

    @checked
    def __init__(self, *, kernel_prob: Sequence[Fraction] = (0.45, 0.25, 0.12, 0.03, 0.12, 0.03),
                 sinc_prob: Fraction = 0.1, blur_sigma: Sequence[PositiveFloat] = (0.2, 3.0),
                 betag_range: Sequence[PositiveFloat] = (0.5, 4.0), betap_range: Sequence[PositiveFloat] = (1.0, 2.0),
                 resize_prob: Sequence[Fraction] = (0.2, 0.7, 0.1), resize_range: Sequence[PositiveFloat] = (0.15, 1.5),
                 gaussian_noise_prob: Fraction = 0.5, noise_range: Sequence[Level] = (1.0, 30.0),
                 poisson_scale_range: Sequence[Level] = (0.05, 3.0), gray_noise_prob: Fraction = 0.4,
                 jpeg_range: Sequence[Quality] = (30, 95), second_blur_prob: Fraction = 0.8,
                 sinc_prob2: Fraction = 0.1, blur_sigma2: Sequence[PositiveFloat] = (0.2, 1.5),
                 resize_prob2: Sequence[Fraction] = (0.3, 0.4, 0.3),
                 resize_range2: Sequence[PositiveFloat] = (0.3, 1.2), gaussian_noise_prob2: Fraction = 0.5,
                 noise_range2: Sequence[Level] = (1.0, 25.0), poisson_scale_range2: Sequence[Level] = (0.05, 2.5),
                 gray_noise_prob2: Fraction = 0.4, jpeg_range2: Sequence[Quality] = (30, 95),
                 final_sinc_prob: Fraction = 0.8):
        self.options = {key: value for key, value in locals().items() if key != "self"}
        for key, value in self.options.items():
            if isinstance(value, Sequence):
                ranged = "_prob" not in key
                if len(value) != (2 if ranged else 6 if key == "kernel_prob" else 3):
                    raise ValueError(f"{key} {list(value)} has {len(value)} numbers")
                if ranged and value[0] > value[1] or not ranged and abs(sum(value) - 1) > 1e-6:
                    raise ValueError(f"{key} {list(value)} must {'rise' if ranged else 'add up to 1'}")

    def drawn(self, rng: np.random.Generator) -> _Drawn:
        """Draw everything but the noise."""
        return _Drawn(self.scale, self.options, rng)

    def __call__(self, frames: Sequence[Tensor], rng: np.random.Generator) -> Tensor:
        """Return L (T,C,h,w) uint8 of frames T x (C,H,W) uint8, cropped to multiples of the scale."""
        return self.drawn(rng)(frames, rng)

    def window(self, frames: Sequence[Tensor], top: int, left: int, side: int, rng: np.random.Generator) -> Tensor:
        """Return the same of a window, see `Degradation.window`; blocks of JPEG begin near the window."""
        return self.drawn(rng).window(frames, top, left, side, rng)


class _Drawn(Degradation):
    """Holds the draws for one clip."""

    margin = 16

    def __init__(self, scale: int, options: Mapping[str, Any], rng: np.random.Generator):
        super().__init__(scale)
        o, self.rounds = options, []
        for end, with_blur in (("", True), ("2", rng.random() < options["second_blur_prob"])):
            low, high = o[f"resize_range{end}"]
            up, down, _ = o[f"resize_prob{end}"]
            pick, gaussian = rng.random(), rng.random() < o[f"gaussian_noise_prob{end}"]
            ends = (1, max(1, high)) if pick < up else (min(1, low), 1) if pick < up + down else (1, 1)
            strength = o[f"noise_range{end}" if gaussian else f"poisson_scale_range{end}"]
            self.rounds.append({
                "kernel": draw_kernel(o, end, rng) if with_blur else None,
                "factor": rng.uniform(*ends), "mode": draw_mode(rng), "gaussian": gaussian,
                "strength": rng.uniform(*strength), "gray": rng.random() < o[f"gray_noise_prob{end}"],
                "quality": int(rng.integers(*o[f"jpeg_range{end}"], endpoint=True))})
        self.last = draw_mode(rng), rng.random() < 0.5  # whether JPEG comes before the last resize
        self.sinc = None
        if rng.random() < o["final_sinc_prob"]:
            self.sinc = sinc_kernel(rng.uniform(math.pi / 3, math.pi), int(rng.choice(SIZES)))

    def drawn(self, rng: np.random.Generator) -> _Drawn:
        """Return itself."""
        return self

    def _shrink(self, x: Tensor, rng: np.random.Generator | None = None) -> Tensor:
        if x.ndim == 3:
            return self._shrink(x[None], rng)[0]
        x = x.float() / 255
        height, width = (size // self.scale for size in x.shape[-2:])
        one, two = self.rounds
        x = jpeg(add_noise(resized(blurred(x, one["kernel"]), *(max(1, int(size * one["factor"]))
                                                                for size in x.shape[-2:]), one["mode"]), one, rng), one)
        x = resized(blurred(x, two["kernel"]), *(max(1, int(size * two["factor"])) for size in (height, width)),
                    two["mode"])
        x, (mode, jpeg_first) = add_noise(x, two, rng), self.last
        x = jpeg(x, two) if jpeg_first else x
        x = blurred(resized(x, height, width, mode), self.sinc).clamp(0, 1)
        return (x if jpeg_first else jpeg(x, two)).double() * 255


def build_degradation(scale: int, options: Mapping | None) -> Degradation | SecondOrder:
    """Build the degradation that options name. Raises: ValueError: one of them is invalid."""
    if (options or {}).get("type") != "second_order":
        return Degradation(scale, options)
    given = {key: value for key, value in options.items() if key != "type"}
    made = SecondOrder(**check(given, schema_of(SecondOrder), "degradation", lambda _: "second_order", []))
    made.scale = scale
    return made


# Kernels -----------------------------------------------------------------------------------------------------------


def draw_kernel(o: Mapping[str, Any], end: str, rng: np.random.Generator) -> Tensor:
    """Draw a blur kernel (n,n) of sum 1."""
    size = int(rng.choice(SIZES))
    if rng.random() < o[f"sinc_prob{end}"]:
        return sinc_kernel(rng.uniform(math.pi / (3 if size < 13 else 5), math.pi), size)
    kind = KERNELS[int(rng.choice(len(KERNELS), p=o["kernel_prob"]))]
    along, across, angle = rng.uniform(*o[f"blur_sigma{end}"]), rng.uniform(*o[f"blur_sigma{end}"]), rng.uniform(
        -math.pi, math.pi)
    low, high = o["betap_range" if "plateau" in kind else "betag_range"]
    beta = rng.uniform(min(1, low), 1) if rng.random() < 0.5 else rng.uniform(1, max(1, high))
    return blur_kernel(size, along, along if kind.endswith("iso") and "aniso" not in kind else across, angle,
                       1.0 if kind in ("iso", "aniso") else beta, "plateau" in kind)


def blur_kernel(size: int, along: float, across: float, angle: float, beta: float = 1.0,
                plateau: bool = False) -> Tensor:
    """Return a kernel (n,n) of a Gaussian whose exponent is raised to beta, or of a plateau 1 / (1 + exponent).

    Args: along, across: standard deviations on its axes. angle: of the first axis, in radians.
    """
    y, x = torch.meshgrid(*[torch.arange(size, dtype=torch.float64) - size // 2] * 2, indexing="ij")
    u, v = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    exponent = ((u / along) ** 2 + (v / across) ** 2) ** beta
    kernel = 1 / (1 + exponent) if plateau else torch.exp(-exponent / 2)
    return (kernel / kernel.sum()).float()


def sinc_kernel(cutoff: float, size: int) -> Tensor:
    """Return the kernel (n,n) of a circular low-pass filter. Args: cutoff: frequency in radians per pixel, up to pi."""
    y, x = torch.meshgrid(*[torch.arange(size, dtype=torch.float64) - size // 2] * 2, indexing="ij")
    radius = (x**2 + y**2).sqrt()
    radius[size // 2, size // 2] = 1
    kernel = cutoff * torch.special.bessel_j1(cutoff * radius) / (2 * math.pi * radius)
    kernel[size // 2, size // 2] = cutoff**2 / (4 * math.pi)
    return (kernel / kernel.sum()).float()


# Steps on (T,C,H,W) in [0,1] ---------------------------------------------------------------------------------------


def draw_mode(rng: np.random.Generator) -> str:
    """Draw how to resize."""
    return str(rng.choice(["area", "bilinear", "bicubic"]))


def blurred(x: Tensor, kernel: Tensor | None) -> Tensor:
    """Filter all channels; None: not at all."""
    if kernel is None:
        return x
    radius = len(kernel) // 2
    padded = F.pad(x, [radius] * 4, "reflect" if min(x.shape[-2:]) > radius else "replicate")
    return F.conv2d(padded.flatten(0, 1)[:, None], kernel[None, None])[:, 0].unflatten(0, x.shape[:2])


def resized(x: Tensor, height: int, width: int, mode: str) -> Tensor:
    """Resize to a size."""
    return F.interpolate(x, (height, width), mode=mode)


def add_noise(x: Tensor, drawn: Mapping[str, Any], rng: np.random.Generator) -> Tensor:
    """Add Gaussian or Poisson noise, clipped to [0,1]."""
    if drawn["gaussian"]:
        shape = (len(x), 1, *x.shape[2:]) if drawn["gray"] else tuple(x.shape)
        noise = torch.from_numpy(rng.standard_normal(shape, dtype=np.float32)) * (drawn["strength"] / 255)
    else:
        levels = x.clamp(0, 1).mul(255).round() / 255
        if drawn["gray"]:
            levels = (levels * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True) \
                if x.shape[1] == 3 else levels[:, :1]
        counts = 2.0 ** math.ceil(math.log2(max(2, len(levels.mul(255).round().unique()))))
        noise = torch.from_numpy(rng.poisson((levels * counts).numpy()).astype(np.float32)) / counts - levels
        noise = noise * drawn["strength"]
    return (x + noise).clamp(0, 1)


def jpeg(x: Tensor, drawn: Mapping[str, Any]) -> Tensor:
    """Encode as JPEG and decode."""
    frames = x.clamp(0, 1).mul(255).round().byte()
    decoded = [picture_in(encode(frame, "jpeg", drawn["quality"]), "a frame") for frame in frames]
    return torch.stack(decoded).float() / 255
