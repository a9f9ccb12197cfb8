"""Metrics of restored video, as the test loop of KAIR's main_train_vrt reports them."""

from __future__ import annotations

from torch import Tensor

from metrics.psnr_ssim import psnr, rgb2ycbcr, ssim


def video_metrics(restored: Tensor, target: Tensor) -> dict[str, float]:
    """Return the metrics of a clip: means over its frames, rounded to 8 bits.

    Args: restored, target: (T,3,H,W) RGB in [0,1]; other values are clamped.
    Returns: {"psnr", "ssim"} on RGB and {"psnr_y", "ssim_y"} on luma, which is not rounded again.
    Raises: ValueError: the shapes differ or are not (T,3,H,W).
    """
    if restored.shape != target.shape or restored.ndim != 4 or restored.shape[1] != 3:
        raise ValueError(f"clips of shape {tuple(restored.shape)} and {tuple(target.shape)}; both must be (T,3,H,W)")
    pairs = [clip.detach().clamp(0, 1).mul(255).round().cpu() for clip in (restored, target)]
    luma = [255 * rgb2ycbcr(clip.movedim(1, -1) / 255).unsqueeze(1) for clip in pairs]
    scores = {"psnr": psnr, "ssim": ssim}
    means = {name: score(*pairs).mean().item() for name, score in scores.items()}
    return means | {f"{name}_y": score(*luma).mean().item() for name, score in scores.items()}
