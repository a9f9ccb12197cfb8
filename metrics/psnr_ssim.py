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
WEIGHTS = [math.exp(-0.5 * (offset / 1.5) ** 2) for offset in range(6)]  # of SSIM's window, from its middle
WEIGHTS = [weight / (2 * sum(WEIGHTS) - WEIGHTS[0]) for weight in WEIGHTS]
STRIP = 32  # rows of windows: four maps of 42 rows of 1280 pixels in float64 take 1.7 MB


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
    norms = torch.stack([torch.linalg.vector_norm(x - y, dtype=torch.float64) for x, y in zip(a, b, strict=True)])
    return 20 * torch.log10(255 * math.sqrt(a[0].numel()) / norms)


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Return the SSIM (T,) of each frame of (T,C,H,W); on a CPU in strips of one channel, which fit into its cache."""
    (height, width), rows = a.shape[-2:], STRIP if a.device.type == "cpu" else a.shape[-2]
    if min(height, width) < 11:
        raise ValueError(f"SSIM's window is 11 x 11; {height} x {width} pixels are too few")
    planes = 1 if a.device.type == "cpu" else a.shape[1]
    sums = [sum(_ssim_sum(p[:, top : top + rows + 10], q[:, top : top + rows + 10])
                for p, q in zip(x.split(planes), y.split(planes)) for top in range(0, height - 10, rows))
            for x, y in zip(a, b, strict=True)]
    return torch.stack(sums) / (a.shape[1] * (height - 10) * (width - 10))


def _ssim_sum(x: Tensor, y: Tensor) -> Tensor:
    """Return the sum of the SSIM of all windows of (C,h,w), from means and variances of the sum and the difference."""
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    x = x.double()
    moments = x.new_empty(4, *x.shape)
    torch.add(x, y, out=moments[0])
    torch.sub(x, y, out=moments[1])
    torch.mul(moments[:2], moments[:2], out=moments[2:])
    moments = _weighted(_weighted(moments, -2), -1)
    squares = moments[:2].square()
    (both, apart), (var_both, var_apart) = squares, moments[2:].sub_(squares)
    luminance = (both - apart).add_(2 * c1).div_(both.add_(apart).add_(2 * c1))
    contrast = (var_both - var_apart).add_(2 * c2).div_(var_both.add_(var_apart).add_(2 * c2))
    return torch.dot(luminance.flatten(), contrast.flatten())


def _weighted(x: Tensor, axis: int) -> Tensor:
    """Return Gaussian means over 11 pixels along an axis, which becomes 10 shorter."""
    size = x.shape[axis] - 10
    out = x.narrow(axis, 5, size) * WEIGHTS[0]
    for offset, weight in enumerate(WEIGHTS[1:], 1):  # in float64 sums of shifted views are faster than a convolution
        out.add_(x.narrow(axis, 5 - offset, size), alpha=weight).add_(x.narrow(axis, 5 + offset, size), alpha=weight)
    return out


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
