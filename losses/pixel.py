"""Pixel losses of the image and video recipes.

Source: cszn/KAIR models/loss.py, loss_ssim.py. Every loss takes `(restored, target)` of equal shape (..., C, H, W) with
values around [0, 1] and returns a scalar. Legend: B batch, T frames (optional), C channels, H W pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runtime.ranges import NonNegativeFloat


class L1Loss(nn.Module):
    """Compute the mean absolute difference."""

    def forward(self, restored: Tensor, target: Tensor) -> Tensor:
        return F.l1_loss(restored, target)


class L2Loss(nn.Module):
    """Compute the mean squared difference."""

    def forward(self, restored: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(restored, target)


class L2SumLoss(nn.Module):
    """Compute the sum of squared differences."""

    def forward(self, restored: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(restored, target, reduction="sum")


class CharbonnierLoss(nn.Module):
    """Compute the mean of sqrt(difference**2 + eps), a smooth L1 loss.

    Args: G_charbonnier_eps: constant under the root; the loss of equal images is its square root.
    """

    def __init__(self, G_charbonnier_eps: NonNegativeFloat = 1e-9):
        super().__init__()
        self.eps = G_charbonnier_eps

    def forward(self, restored: Tensor, target: Tensor) -> Tensor:
        return torch.sqrt((restored - target).square() + self.eps).mean()


class SSIMLoss(nn.Module):
    """Compute 1 - mean SSIM over 11 x 11 Gaussian windows (sigma 1.5, zero padding), data range 1.

    Source: Wang et al. 2004, equation 13. Differs: KAIR minimises the similarity itself (a bug) and takes 4-D input.
    """

    def __init__(self):
        super().__init__()
        offsets = torch.arange(11) - 5.0
        line = torch.exp(-offsets.square() / (2 * 1.5**2))
        line = line / line.sum()
        self.register_buffer("window", (line[:, None] * line)[None, None], persistent=False)  # (1, 1, 11, 11)

    def similarity(self, restored: Tensor, target: Tensor) -> Tensor:
        """Return the SSIM (B,) of each image of (B, C, H, W)."""
        channels = restored.shape[-3]
        window = self.window.to(restored).expand(channels, 1, -1, -1)

        def blur(x: Tensor) -> Tensor:
            return F.conv2d(x, window, padding=5, groups=channels)

        mean_a, mean_b = blur(restored), blur(target)
        var_a = blur(restored.square()) - mean_a.square()
        var_b = blur(target.square()) - mean_b.square()
        covariance = blur(restored * target) - mean_a * mean_b
        c1, c2 = 0.01**2, 0.03**2
        ssim = ((2 * mean_a * mean_b + c1) * (2 * covariance + c2)
                / ((mean_a.square() + mean_b.square() + c1) * (var_a + var_b + c2)))
        return ssim.mean(dim=(1, 2, 3))

    def forward(self, restored: Tensor, target: Tensor) -> Tensor:
        return 1 - self.similarity(restored.flatten(0, -4), target.flatten(0, -4)).mean()
