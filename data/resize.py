"""Degradations of sharp frames: MATLAB's bicubic resize, or blur and subsampling, as matrices.

Source: Keys, Cubic Convolution Interpolation for Digital Image Processing, 1981 (a = -1/2), with antialiasing and
symmetric borders as in MATLAB's imresize; the blur is the "BD" degradation of DUF, 2018.
Legend: T frames, C channels, H W pixels of the sharp frame, h w pixels of the degraded one (H = scale * h).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor


def imresize(img: Tensor | np.ndarray, scale: float, antialiasing: bool = True) -> Tensor | np.ndarray:
    """Resize an image like MATLAB's `imresize(img, scale, 'bicubic')`.

    Args:
        img: (..., H, W), floating point of any range.
        scale: factor > 0 of both sides; the result has ceil(H * scale) rows.
        antialiasing: widen the kernel for scales below 1.
    Returns: (..., h, w) of equal kind and dtype, neither clipped nor rounded.
    Raises: ValueError: img is not floating point, or scale is not positive.
    Source: KAIR's imresize_np. Differs: KAIR fails for scale <= 1/4 without antialiasing, and adds an axis to the
        2-D tensor of its caller.
    """
    x = torch.as_tensor(img)
    if not x.is_floating_point() or x.ndim < 2:
        raise ValueError(f"imresize got {x.dtype} of shape {tuple(x.shape)}; give (..., H, W) floats, e.g. img / 255")
    if not scale > 0:
        raise ValueError(f"imresize got scale {scale}; give a factor above 0")
    height, width = (bicubic_matrix(size, float(scale), antialiasing) for size in x.shape[-2:])
    out = height.to(x) @ x @ width.to(x).T  # (..., H, W) -> (..., h, w)
    return out if isinstance(img, Tensor) else out.numpy()


@lru_cache(maxsize=64)
def bicubic_matrix(size: int, scale: float, antialiasing: bool = True) -> Tensor:
    """Return the read-only float64 matrix (ceil(size * scale), size) that resizes one axis."""
    shrink = min(scale, 1.0) if antialiasing else 1.0
    centres = (np.arange(math.ceil(size * scale - 1e-9)) + 0.5) / scale - 0.5  # 1e-9: 1/3 of 3n is n, not n + 1
    first = np.floor(centres - 2 / shrink).astype(int)
    taps = first[:, None] + np.arange(math.ceil(4 / shrink) + 2)
    weights = _cubic(shrink * (centres[:, None] - taps))
    inside = taps % (2 * size)  # symmetric border: ... b a | a b c ... y z | z y ...
    return _dense(weights, np.where(inside < size, inside, 2 * size - 1 - inside), size)


@lru_cache(maxsize=64)
def blur_matrix(size: int, scale: int, sigma: float) -> Tensor:
    """Return the float64 matrix (size // scale, size) that blurs one axis and keeps pixels 0, scale, 2 * scale, ..."""
    offsets = np.arange(-_blur_radius(sigma), _blur_radius(sigma) + 1)
    taps = np.arange(size // scale)[:, None] * scale + offsets
    weights = np.broadcast_to(np.exp(-0.5 * (offsets / sigma) ** 2), taps.shape)
    period = max(2 * size - 2, 1)
    inside = taps % period  # reflecting border: ... c b | a b c ... x y z | y x ...
    return _dense(weights, np.where(inside < size, inside, period - inside), size)


def _cubic(x: np.ndarray) -> np.ndarray:
    """Return the kernel of Keys with a = -1/2, zero outside [-2, 2]."""
    x = np.abs(x)
    near = (1.5 * x - 2.5) * x**2 + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x <= 1, near, np.where(x <= 2, far, 0.0))


def _blur_radius(sigma: float) -> int:
    return int(4 * sigma + 0.5)  # 6, hence 13 taps, for the usual sigma 1.6


def _dense(weights: np.ndarray, columns: np.ndarray, size: int) -> Tensor:
    """Return a matrix (out, size) with rows that sum to one, from weights (out, taps) at their columns."""
    matrix = np.zeros((len(weights), size))
    np.add.at(matrix, (np.arange(len(weights))[:, None], columns), weights)  # mirrored taps share a column
    return torch.from_numpy(matrix / matrix.sum(1, keepdims=True))


def modcrop(frame: Tensor, scale: int) -> Tensor:
    """Crop (..., H, W) at the bottom and the right to multiples of the scale."""
    height, width = (size // scale * scale for size in frame.shape[-2:])
    return frame[..., :height, :width]


class Degradation:
    """Compute degraded frames (L) of sharp ones (H), rounded to 8 bits.

    Bicubic sums are exact in float64 for scales that are powers of two, so that a window has the pixels of the full
    frame, with any number of threads.

    Args:
        scale: sharp pixels per degraded pixel on each side.
        options: `{"type": "bicubic"}` (also for None) or `{"type": "blur", "blur_sigma": 1.6}`: a Gaussian of that
            sigma in sharp pixels, of which pixels 0, scale, 2 * scale, ... remain: the result is shifted against
            bicubic by (scale - 1) / 2 sharp pixels. Both take `"noise_sigma"`: standard deviation of Gaussian noise
            that is added to L before it is rounded, in 8-bit levels (0..255).
    Raises: ValueError: a key, a type or a value is invalid.
    """

    def __init__(self, scale: int, options: Mapping | None = None):
        options = {"type": "bicubic", **(options or {})}
        self.scale = scale
        self.kind = options.pop("type")
        self.noise_sigma = options.pop("noise_sigma", 0)
        self.blur_sigma = options.pop("blur_sigma", 1.6) if self.kind == "blur" else None
        if self.kind not in ("bicubic", "blur"):
            raise ValueError(f'degradation.type is {self.kind!r}; valid are "bicubic", "blur" and "second_order"')
        if options:
            valid = "type, noise_sigma" + (", blur_sigma" if self.kind == "blur" else "")
            raise ValueError(f"degradation.{next(iter(options))} is unknown for type {self.kind!r}; valid: {valid}")
        if not _is_number(self.noise_sigma) or not 0 <= self.noise_sigma <= 255:
            raise ValueError(f"degradation.noise_sigma is {self.noise_sigma!r}; give a level in 0..255")
        if self.kind == "blur" and (not _is_number(self.blur_sigma) or not 0 < self.blur_sigma <= 100):
            raise ValueError(f"degradation.blur_sigma is {self.blur_sigma!r}; give sharp pixels, above 0, up to 100")

    @property
    def margin(self) -> int:
        """Number of degraded pixels around a window on which its pixels depend."""
        return 2 if self.kind == "bicubic" else math.ceil(_blur_radius(self.blur_sigma) / self.scale)

    def __call__(self, frames: Sequence[Tensor], rng: np.random.Generator) -> Tensor:
        """Return L (T,C,h,w) uint8 of frames T x (C,H,W) uint8, cropped to multiples of the scale."""
        return self._store(torch.stack([self._shrink(modcrop(frame, self.scale), rng) for frame in frames]), rng)

    def drawn(self, rng: np.random.Generator) -> Degradation:
        """Return the degradation of one clip, with all draws but those of noise: here there are none."""
        return self

    def window(self, frames: Sequence[Tensor], top: int, left: int, side: int, rng: np.random.Generator) -> Tensor:
        """Return L[..., top:top+side, left:left+side] of frames T x (C,H,W) uint8, at the cost of that window."""
        scale, margin = self.scale, self.margin
        h, w = (size // scale for size in frames[0].shape[-2:])
        y, x = max(top - margin, 0), max(left - margin, 0)
        rows = slice(y * scale, min(top + side + margin, h) * scale)
        columns = slice(x * scale, min(left + side + margin, w) * scale)
        small = self._shrink(torch.stack([frame[:, rows, columns] for frame in frames]), rng)
        return self._store(small[..., top - y : top - y + side, left - x : left - x + side], rng)

    def _shrink(self, x: Tensor, rng: np.random.Generator | None = None) -> Tensor:
        if self.kind == "blur":
            height, width = (blur_matrix(size, self.scale, float(self.blur_sigma)) for size in x.shape[-2:])
        else:
            height, width = (bicubic_matrix(size, 1 / self.scale) for size in x.shape[-2:])
        return height @ (x.double() @ width.T)  # (..., H, W) -> (..., H, w) -> (..., h, w), levels 0..255

    def _store(self, x: Tensor, rng: np.random.Generator) -> Tensor:
        if self.noise_sigma:
            x = x + self.noise_sigma * torch.from_numpy(rng.standard_normal(x.shape, dtype=np.float32))
        return x.round().clamp_(0, 255).to(torch.uint8)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
