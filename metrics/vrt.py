"""How close a restored video is to its ground truth, as the test loop of KAIR's main_train_vrt reports it."""

from __future__ import annotations

from torch import Tensor

from metrics.psnr_ssim import psnr, rgb2ycbcr, ssim


def video_metrics(restored: Tensor, target: Tensor) -> dict[str, float]:
    """Metrics of one clip: means over its frames, on what an 8-bit file would hold.

    Args:
        restored, target: (T,3,H,W) RGB in [0,1]; what lies outside is clamped.
    Returns:
        {"psnr", "ssim"} on RGB and {"psnr_y", "ssim_y"} on Y, the latter not rounded again.
    Source: the test loop of KAIR's main_train_vrt.
    """
    if restored.shape != target.shape or restored.ndim != 4 or restored.shape[1] != 3:
        raise ValueError(f"clips of shape {tuple(restored.shape)} and {tuple(target.shape)}; both must be (T,3,H,W)")
    pairs = [clip.detach().clamp(0, 1).mul(255).round().cpu() for clip in (restored, target)]
    luma = [255 * rgb2ycbcr(clip.movedim(1, -1) / 255).unsqueeze(1) for clip in pairs]
    scores = {"psnr": psnr, "ssim": ssim}
    means = {name: score(*pairs).mean().item() for name, score in scores.items()}
    return means | {f"{name}_y": score(*luma).mean().item() for name, score in scores.items()}
