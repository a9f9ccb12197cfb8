"""How close decoded pictures are to their originals, and how much of a codebook is in use."""

from __future__ import annotations

import torch
from torch import Tensor

from metrics.psnr_ssim import psnr


def image_metrics(restored: Tensor, target: Tensor) -> dict[str, float]:
    """PSNR over all channels, a mean over images, on what an 8-bit file would hold; and what one colour would get.

    Args:
        restored, target: (B,C,H,W) in [0,1]; what lies outside is clamped.
    Returns:
        {"psnr", "psnr_mean_colour"}: the latter of pictures that are nothing but their own mean colour.
    """
    if restored.shape != target.shape or restored.ndim != 4:
        raise ValueError(f"images of shape {tuple(restored.shape)} and {tuple(target.shape)}; both must be (B,C,H,W)")
    restored, target = (images.detach().clamp(0, 1).mul(255).round().cpu() for images in (restored, target))
    plain = target.mean((2, 3), keepdim=True).round().expand_as(target)
    return {"psnr": psnr(restored, target).mean().item(), "psnr_mean_colour": psnr(plain, target).mean().item()}


def codebook_use(indices: Tensor, num_codes: int) -> dict[str, Tensor]:
    """How much of a codebook is in use.

    Args:
        indices: of any shape, 0..num_codes - 1.
    Returns:
        {"codes_used": share of the codes that occur, 0..1, "perplexity": exp of the entropy of the indices,
        1..num_codes}, scalars on the indices' device.
    """
    hits = torch.zeros(num_codes, device=indices.device)
    hits.index_add_(0, indices.flatten(), torch.ones_like(indices.flatten(), dtype=hits.dtype))
    share = hits / indices.numel()
    return {"codes_used": (hits > 0).float().mean(), "perplexity": torch.special.entr(share).sum().exp()}
