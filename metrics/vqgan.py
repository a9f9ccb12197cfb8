"""Metrics of autoencoders with codebooks: PSNR of reconstructions, and use of the codebook."""

from __future__ import annotations

import torch
from torch import Tensor

from metrics.psnr_ssim import psnr


def image_metrics(restored: Tensor, target: Tensor) -> dict[str, float]:
    """Return the mean PSNR of images rounded to 8 bits, and that of a baseline of one colour.

    Args: restored, target: (B,C,H,W) in [0,1]; other values are clamped.
    Returns: {"psnr", "psnr_mean_colour"} in decibels; the baseline is the mean colour of each target.
    Raises: ValueError: the shapes differ or are not (B,C,H,W).
    """
    if restored.shape != target.shape or restored.ndim != 4:
        raise ValueError(f"images of shape {tuple(restored.shape)} and {tuple(target.shape)}; both must be (B,C,H,W)")
    restored, target = (images.detach().clamp(0, 1).mul(255).round() for images in (restored, target))
    plain = target.mean((2, 3), keepdim=True).round().expand_as(target)
    return {"psnr": psnr(restored, target).mean().item(), "psnr_mean_colour": psnr(plain, target).mean().item()}


def code_hits(indices: Tensor, num_codes: int) -> Tensor:
    """Return how often each code occurs, (num_codes,) int64. Args: indices: of any shape, 0..num_codes - 1."""
    flat = indices.flatten().long()
    return flat.new_zeros(num_codes).index_add_(0, flat, torch.ones_like(flat))  # bincount would wait for the GPU


def codebook_use(hits: Tensor) -> dict[str, Tensor]:
    """Return the use of a codebook.

    Args: hits: how often each code occurs, (K,).
    Returns:
        {"codes_used": fraction of the codes that occur, "perplexity": exp of the entropy of the indices, 1..K},
        scalars on the device of the hits.
    """
    frequencies = hits.float() / hits.sum()
    return {"codes_used": (hits > 0).float().mean(), "perplexity": torch.special.entr(frequencies).sum().exp()}


def perplexity(indices: Tensor, num_codes: int) -> Tensor:
    """Return the perplexity of `codebook_use`."""
    return codebook_use(code_hits(indices, num_codes))["perplexity"]
