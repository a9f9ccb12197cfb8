"""Metrics of restored video, as the test loop of KAIR's main_train_vrt reports them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from metrics.psnr_ssim import YCBCR, YCBCR_OFFSET, psnr, ssim


class Eight(NamedTuple):
    """Hold a clip as it is compared: (T,3,H,W) levels 0..255, and their luma (T,1,H,W), which is not rounded again."""

    rgb: Tensor
    luma: Tensor


def in_8_bits(clip: Tensor, border: int = 0) -> Eight:
    """Round a clip (T,3,H,W) in [0,1] to 8 bits, on its device; other values are clamped.

    Args: border: pixels to crop on each side.
    Raises: ValueError: the shape is another, or the border leaves nothing.
    """
    if clip.ndim != 4 or clip.shape[1] != 3 or 2 * border >= min(clip.shape[-2:]):
        raise ValueError(f"a clip of shape {tuple(clip.shape)} with a border of {border}; (T,3,H,W) is needed")
    height, width = clip.shape[-2:]
    clip = clip.detach()[..., border : height - border, border : width - border]
    rgb = clip.clamp(0, 1).mul_(255).round_()
    luma = torch.full_like(rgb[:, :1], YCBCR_OFFSET[0], dtype=torch.float64)
    for channel, weight in enumerate(YCBCR[0]):
        luma.add_((rgb[:, channel : channel + 1] / 255).double(), alpha=weight)
    return Eight(rgb, luma.div_(255).float() * 255)  # in the precision of KAIR and BasicSR


def frame_metrics(restored: Eight, target: Eight) -> dict[str, Tensor]:
    """Return the metrics (T,) of each frame: "psnr", "ssim" on RGB and "psnr_y", "ssim_y" on luma."""
    if restored.rgb.shape != target.rgb.shape:
        raise ValueError(f"clips of different shapes: {tuple(restored.rgb.shape)} and {tuple(target.rgb.shape)}")
    scores = {"psnr": psnr, "ssim": ssim}
    return {f"{name}{end}": score(a, b) for end, a, b in zip(("", "_y"), restored, target)
            for name, score in scores.items()}


def video_metrics(restored: Tensor, target: Tensor, border: int = 0) -> dict[str, float]:
    """Return the means of `frame_metrics` over the frames of two clips of `in_8_bits`."""
    columns = frame_metrics(in_8_bits(restored, border), in_8_bits(target, border))
    return dict(zip(columns, torch.stack(list(columns.values())).mean(1).tolist()))
