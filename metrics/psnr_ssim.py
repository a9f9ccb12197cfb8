"""PSNR and SSIM of images, on RGB or on luma (Y of BT.601), as KAIR and BasicSR report them.

Source: Wang et al., Image Quality Assessment: From Error Visibility to Structural Similarity, 2004; MATLAB's
rgb2ycbcr. Equals KAIR's utils_image, but changes no argument and raises an error for unsupported shapes.
Legend: T frames, C channels, H W pixels; values are 0..255 unless stated otherwise.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

Image = np.ndarray | Tensor

# ITU-R BT.601, studio swing: rows Y, Cb, Cr of R, G, B in 0..1
YCBCR = ((65.481, 128.553, 24.966), (-37.797, -74.203, 112.0), (112.0, -93.786, -18.214))
YCBCR_OFFSET = (16.0, 128.0, 128.0)


def calculate_psnr(img1: Image, img2: Image, border: int = 0) -> float:
    """Return the peak signal-to-noise ratio of two images.

    Args:
        img1, img2: (H,W) or (H,W,C), C = 1 or 3, uint8 or float, 0..255.
        border: pixels to crop on each side.
    Returns: decibels; inf for identical images.
    Raises: ValueError: the shapes differ or are not those of images.
    """
    return psnr(*_planes(img1, img2, border)).item()


def calculate_ssim(img1: Image, img2: Image, border: int = 0) -> float:
    """Return the structural similarity of two images: Gaussian window 11 x 11, sigma 1.5, valid region, mean.

    Args, Raises: as calculate_psnr; without their borders images need at least 11 x 11 pixels.
    Returns: similarity, 1 for identical images.
    """
    return ssim(*_planes(img1, img2, border)).item()


def rgb2ycbcr(img: Image, only_y: bool = True) -> Image:
    """Convert RGB to YCbCr, or to Y alone.

    Args:
        img: (...,3) uint8 in 0..255 or float in [0,1].
        only_y: return Y (...) instead of (...,3).
    Returns: an image of equal kind and dtype: uint8 in 16..235 (Cb, Cr 16..240), or float, divided by 255.
    """
    return _ycbcr(img, YCBCR, only_y)


def bgr2ycbcr(img: Image, only_y: bool = True) -> Image:
    """Convert BGR to YCbCr, or to Y alone, as rgb2ycbcr does for RGB."""
    return _ycbcr(img, tuple(row[::-1] for row in YCBCR), only_y)


def _planes(img1: Image, img2: Image, border: int) -> list[Tensor]:
    """Convert two images (H,W) or (H,W,C) to float64 (1,C,H,W) without their borders."""
    planes = []
    for img in (img1, img2):
        img = _tensor(img)
        img = img.unsqueeze(-1) if img.ndim == 2 else img
        if img.ndim != 3 or img.shape[-1] not in (1, 3):
            raise ValueError(f"an image of shape {tuple(img.shape)}; (H,W), (H,W,1) or (H,W,3) is needed")
        planes.append(img.movedim(-1, 0)[None].double())
    height, width = planes[0].shape[-2:]
    if planes[0].shape != planes[1].shape:
        raise ValueError(f"images of different shapes: {tuple(np.shape(img1))} and {tuple(np.shape(img2))}")
    if not 0 <= 2 * border < min(height, width):
        raise ValueError(f"a border of {border} leaves nothing of {height} x {width} pixels")
    return [x[..., border : height - border, border : width - border] for x in planes]


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Return the PSNR (T,) in decibels of each frame of (T,C,H,W)."""
    error = (a.double() - b.double()).square().flatten(1).mean(1)
    return 20 * torch.log10(255 / error.sqrt())


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Return the SSIM (T,) of each frame of (T,C,H,W), one at a time: its five moment maps fit into the cache."""
    if min(a.shape[-2:]) < 11:
        raise ValueError(f"SSIM's window is 11 x 11; {a.shape[-2]} x {a.shape[-1]} pixels are too few")
    return torch.stack([_frame_ssim(x.double(), y.double()) for x, y in zip(a, b, strict=True)])


def _frame_ssim(x: Tensor, y: Tensor) -> Tensor:
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    moments = torch.stack([x, y, x * x, y * y, x * y])  # (5,C,H,W)
    mean_x, mean_y, xx, yy, xy = _gaussian_window(moments)
    var_x, var_y, covariance = xx - mean_x**2, yy - mean_y**2, xy - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return (luminance * (2 * covariance + c2) / (var_x + var_y + c2)).mean()


def _gaussian_window(x: Tensor) -> Tensor:
    """Return weighted means (...,H-10,W-10) over 11 x 11 pixels of (...,H,W), one axis after the other."""
    weights = [math.exp(-0.5 * (offset / 1.5) ** 2) for offset in range(-5, 6)]
    for axis in (-2, -1):  # in float64 sums of shifted views are much faster than a convolution
        shifted = [x.narrow(axis, start, x.shape[axis] - 10) for start in range(11)]
        x = shifted[0] * (weights[0] / sum(weights))
        for view, weight in zip(shifted[1:], weights[1:]):
            x.add_(view, alpha=weight / sum(weights))
    return x


def _ycbcr(img: Image, matrix: tuple, only_y: bool) -> Image:
    x = _tensor(img)
    if x.ndim < 1 or x.shape[-1] != 3 or not (x.dtype == torch.uint8 or x.is_floating_point()):
        raise ValueError(f"{x.dtype} of shape {tuple(x.shape)}; (...,3) uint8 or float is needed")
    rows = slice(0, 1 if only_y else 3)
    levels = x.double() if x.dtype == torch.uint8 else x.double() * 255
    out = levels @ torch.tensor(matrix[rows], dtype=torch.float64).T.to(x.device) / 255
    out += torch.tensor(YCBCR_OFFSET[rows], dtype=torch.float64, device=x.device)
    out = (out.round() if x.dtype == torch.uint8 else out / 255).to(x.dtype)
    out = out[..., 0] if only_y else out
    return out if isinstance(img, Tensor) else out.numpy()


def _tensor(img: Image) -> Tensor:
    return img if isinstance(img, Tensor) else torch.from_numpy(np.ascontiguousarray(img))  # no negative strides
