"""LGT's free energy: how far patches are from a style's, how far an image's self-similarity is from its source's.

Source: KiritoFD/VAE_ca_proj, LGT/losses.py; sliced Wasserstein distance: Rabin et al. 2011; self-similarity: Kolkin
et al. 2019, arXiv:1904.12785. Every loss leaves autocast and computes in float32 or better; the original only casts,
so that on CUDA its products are done in half precision.

Legend: B latents, c channels, h w latent pixels, n = h*w, N rows (patches) of a batch. Every loss is a scalar.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runtime.ranges import NonNegativeFloat, PositiveInt


class PatchSlicedWassersteinLoss(nn.Module):
    """Mean squared distance of the sorted projections of all patches of two batches, each one distribution.

    Args:
        patch_size: side p of a patch in latent pixels; borders are padded with zeros.
        num_projections: random directions onto which patches are projected.
        max_samples: patches compared at most, the same random ones of both batches; None: all.

    Raises:
        ValueError: a number below 1.
    """

    def __init__(self, patch_size: PositiveInt = 3, num_projections: PositiveInt = 64,
                 max_samples: PositiveInt | None = 4096):
        super().__init__()
        if min(patch_size, num_projections, max_samples or 1) < 1:
            raise ValueError(f"patch_size {patch_size}, num_projections {num_projections} and max_samples "
                             f"{max_samples} must be at least 1")
        self.patch_size, self.num_projections, self.max_samples = patch_size, num_projections, max_samples

    def forward(self, x: Tensor, style: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The distance.

        Args:
            x, style: (B, c, h, w), of one shape.
            generator: of the CPU, for indices (only when there are too many patches), then directions: what is
                drawn does not depend on the device. None: torch's global one.

        Raises:
            ValueError: shapes that differ.
        """
        require_same(x, style)
        with torch.autocast(x.device.type, enabled=False):
            pad, p = self.patch_size // 2, self.patch_size
            rows = len(x) * (x.shape[2] + 2 * pad - p + 1) * (x.shape[3] + 2 * pad - p + 1)
            chosen = None
            if self.max_samples is not None and rows > self.max_samples:
                chosen = torch.randperm(rows, generator=generator)[: self.max_samples].to(x.device)
            theta = torch.randn(x.shape[1] * p * p, self.num_projections, generator=generator)
            theta = F.normalize(theta, dim=0, eps=0).T.reshape(-1, x.shape[1], p, p).to(x.device)
            return F.mse_loss(*(self._sorted(batch, theta, chosen) for batch in (x, style)))

    def _sorted(self, batch: Tensor, theta: Tensor, chosen: Tensor | None) -> Tensor:
        """-> (num_projections, N). A convolution projects each patch without writing it out."""
        values = F.conv2d(batch.float(), theta, padding=self.patch_size // 2).transpose(0, 1).flatten(1)
        return (values if chosen is None else values[:, chosen]).sort(dim=1).values


class CosineSSMLoss(nn.Module):
    """Mean squared difference of two images' n x n matrices of similarities between their own latent pixels.

    Args:
        max_spatial_samples: latent pixels compared at most, drawn at random; None: all.

    Source: CosineSSMLoss. What differs: with z (c, n), |x'x - y'y|^2 = |xx'|^2 + |yy'|^2 - 2 |xy'|^2 needs no n x n
    matrix, only c x c ones; they are summed in float64, since the terms cancel.
    """

    def __init__(self, max_spatial_samples: PositiveInt | None = None):
        super().__init__()
        if max_spatial_samples is not None and max_spatial_samples < 1:
            raise ValueError(f"max_spatial_samples must be at least 1, got {max_spatial_samples}")
        self.max_spatial_samples = max_spatial_samples

    def forward(self, x: Tensor, y: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The difference of x, y: (B, c, h, w). generator: of the CPU, for the choice of latent pixels.

        Raises:
            ValueError: shapes that differ.
        """
        require_same(x, y)
        with torch.autocast(x.device.type, enabled=False):
            x, y = (batch.float().flatten(2) for batch in (x, y))  # (B, c, n)
            if self.max_spatial_samples is not None and x.shape[2] > self.max_spatial_samples:
                chosen = torch.randperm(x.shape[2], generator=generator)[: self.max_spatial_samples].to(x.device)
                x, y = x[..., chosen], y[..., chosen]
            x, y = (F.normalize(batch, dim=1).double() for batch in (x, y))
            total = sum(weight * (a @ b.mT).square().sum() for weight, a, b in ((1, x, x), (1, y, y), (-2, x, y)))
            return (total / (len(x) * x.shape[2] ** 2)).float()


class GeometricFreeEnergyLoss(nn.Module):
    """w_style * SWD(end, style) + w_content * SSM(end, source), with an optional price on fast velocities.

    Args:
        w_style: factor of the style's term, a sliced Wasserstein distance.
        w_content: factor of the content's term, the distance of self-similarities.
        patch_size: side of the patches that the style's term compares, in latent pixels.
        num_projections: random directions of the style's term.
        max_samples: patches that the style's term compares at most; None: all.
        max_spatial_samples: latent pixels that the content's term compares at most; None: all.
        velocity_weight: factor of the mean squared velocity, if forward is given one.
        divergence_weight: factor of the velocity's divergence, if forward is given one; 0: not computed.

    Raises:
        ValueError: a negative weight, a number below 1.
    """

    def __init__(self, w_style: NonNegativeFloat = 1.0, w_content: NonNegativeFloat = 1.0, patch_size: PositiveInt = 3,
                 num_projections: PositiveInt = 64, max_samples: PositiveInt | None = 4096,
                 max_spatial_samples: PositiveInt | None = None, velocity_weight: NonNegativeFloat = 0.01,
                 divergence_weight: NonNegativeFloat = 0.0):
        super().__init__()
        for name, weight in {"w_style": w_style, "w_content": w_content, "velocity_weight": velocity_weight,
                             "divergence_weight": divergence_weight}.items():
            if weight < 0:
                raise ValueError(f"{name} must not be negative, got {weight}")
        self.w_style, self.w_content = w_style, w_content
        self.velocity_weight, self.divergence_weight = velocity_weight, divergence_weight
        self.swd = PatchSlicedWassersteinLoss(patch_size, num_projections, max_samples)
        self.ssm = CosineSSMLoss(max_spatial_samples)

    def forward(self, x_pred: Tensor, x_style: Tensor, x_src: Tensor, generator: torch.Generator | None = None,
                groups: Sequence[int] | None = None) -> dict[str, Tensor]:
        """The energy of the latents at the end of the way.

        Args:
            x_pred, x_style, x_src: (B, c, h, w).
            generator: of the CPU, see the two terms.
            groups: style of each latent: each style is then a distribution of its own. None: the whole batch is
                one, as published, which a network can fit that ignores which style was asked for.

        Returns:
            total, style_swd, content_ssm.
        """
        if groups is None:
            swd = self.swd(x_pred, x_style, generator)
        else:
            members = [[i for i, group in enumerate(groups) if group == one] for one in sorted(set(groups))]
            swd = sum(len(m) / len(groups) * self.swd(x_pred[m], x_style[m], generator) for m in members)
        ssm = self.ssm(x_pred, x_src, generator)
        return {"total": self.w_style * swd + self.w_content * ssm, "style_swd": swd, "content_ssm": ssm}

    def regularisation(self, velocity: Tensor) -> Tensor:
        """The price of a velocity (B, c, h, w)."""
        velocity = velocity.float()
        price = self.velocity_weight * velocity.square().mean()
        return price + self.divergence_weight * divergence(velocity) if self.divergence_weight else price


def divergence(velocity: Tensor) -> Tensor:
    """Mean square of d_y v + d_x v, channel by channel, forward differences on the common (h-1, w-1) area."""
    corner = velocity[..., :-1, :-1]
    return (velocity[..., 1:, :-1] + velocity[..., :-1, 1:] - 2 * corner).square().mean()


def require_same(x: Tensor, y: Tensor) -> None:
    if x.ndim != 4 or x.shape != y.shape:
        raise ValueError(f"both must be (batch, channels, height, width) of one shape, got {tuple(x.shape)} and "
                         f"{tuple(y.shape)}")
