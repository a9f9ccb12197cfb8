"""The free energy of LGT: a distance of patches to a style, and a distance of self-similarities to the source.

Source: KiritoFD/VAE_ca_proj, LGT/losses.py; sliced Wasserstein distance: Rabin et al. 2011; self-similarity: Kolkin
et al. 2019, arXiv:1904.12785. Every loss leaves autocast and computes in float32 or better; the original only casts
its inputs, so on CUDA it multiplies in half precision.

Legend: B latents, c channels, h w latent pixels, n = h*w, N rows (patches) of a batch. Every loss is a scalar.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runtime.determinism import full_float32
from runtime.ranges import NonNegativeFloat, PositiveInt, checked


class PatchSlicedWassersteinLoss(nn.Module):
    """Compare the patches of two batches: the mean squared difference of their sorted projections.

    Args:
        patch_size: side p of a patch in latent pixels; borders are padded with zeros.
        num_projections: number of random directions onto which patches are projected.
        max_samples: most patches compared, the same random ones of both batches; None: all.
    """

    @checked
    def __init__(self, patch_size: PositiveInt = 3, num_projections: PositiveInt = 64,
                 max_samples: PositiveInt | None = 4096):
        super().__init__()
        self.patch_size, self.num_projections, self.max_samples = patch_size, num_projections, max_samples

    def forward(self, x: Tensor, style: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return the distance.

        Args:
            x, style: (B, c, h, w), of equal shape.
            generator: on the CPU, so that draws do not depend on the device; draws the indices, where there are more
                than max_samples patches, then the directions. None: torch's global generator.
        Raises: ValueError: the shapes differ.
        """
        require_same(x, style)
        with torch.autocast(x.device.type, enabled=False):
            pad, p = self.patch_size // 2, self.patch_size
            rows = len(x) * (x.shape[2] + 2 * pad - p + 1) * (x.shape[3] + 2 * pad - p + 1)
            chosen = None
            if self.max_samples is not None and rows > self.max_samples:
                chosen = torch.randperm(rows, generator=generator)[: self.max_samples]
                chosen = chosen.to(x.device, non_blocking=True)
            theta = torch.randn(x.shape[1] * p * p, self.num_projections, generator=generator)
            theta = F.normalize(theta, dim=0, eps=0).T.reshape(-1, x.shape[1], p, p).to(x.device, non_blocking=True)
            with full_float32():
                return F.mse_loss(*(self._sorted(batch, theta, chosen) for batch in (x, style)))

    def _sorted(self, batch: Tensor, theta: Tensor, chosen: Tensor | None) -> Tensor:
        """Return sorted projections (num_projections, N); a convolution projects patches without extracting them."""
        values = F.conv2d(batch.float(), theta, padding=self.patch_size // 2).transpose(0, 1).flatten(1)
        return (values if chosen is None else values[:, chosen]).sort(dim=1).values


class CosineSSMLoss(nn.Module):
    """Compare self-similarities: the mean squared difference of the n x n cosine similarities within two images.

    Args: max_spatial_samples: most latent pixels compared, drawn at random; None: all.

    Source: CosineSSMLoss. Differs: with x, y (c, n), |x'x - y'y|^2 = |xx'|^2 + |yy'|^2 - 2 |xy'|^2 needs c x c matrices
    instead of n x n; they are summed in float64, since the terms cancel.
    """

    @checked
    def __init__(self, max_spatial_samples: PositiveInt | None = None):
        super().__init__()
        self.max_spatial_samples = max_spatial_samples

    def forward(self, x: Tensor, y: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return the difference.

        Args:
            x, y: (B, c, h, w), of equal shape.
            generator: on the CPU, draws the latent pixels. None: torch's global generator.
        Raises: ValueError: the shapes differ.
        """
        require_same(x, y)
        with torch.autocast(x.device.type, enabled=False):
            x, y = (batch.float().flatten(2) for batch in (x, y))  # (B, c, n)
            if self.max_spatial_samples is not None and x.shape[2] > self.max_spatial_samples:
                chosen = torch.randperm(x.shape[2], generator=generator)[: self.max_spatial_samples]
                chosen = chosen.to(x.device, non_blocking=True)
                x, y = x[..., chosen], y[..., chosen]
            x, y = (F.normalize(batch, dim=1).double() for batch in (x, y))
            total = sum(weight * (a @ b.mT).square().sum() for weight, a, b in ((1, x, x), (1, y, y), (-2, x, y)))
            return (total / (len(x) * x.shape[2] ** 2)).float()


class GeometricFreeEnergyLoss(nn.Module):
    """Compute w_style * SWD(end, style) + w_content * SSM(end, source), and a penalty of fast velocities.

    Args:
        w_style: factor of the style term, a sliced Wasserstein distance.
        w_content: factor of the content term, a distance of self-similarities.
        patch_size: side of the patches of the style term, in latent pixels.
        num_projections: number of random projections of the style term.
        max_samples: most patches that the style term compares; None: all.
        max_spatial_samples: most latent pixels that the content term compares; None: all.
        velocity_weight: factor of the mean squared velocity in the penalty.
        divergence_weight: factor of the divergence in the penalty; 0: not computed.
    """

    @checked
    def __init__(self, w_style: NonNegativeFloat = 1.0, w_content: NonNegativeFloat = 1.0, patch_size: PositiveInt = 3,
                 num_projections: PositiveInt = 64, max_samples: PositiveInt | None = 4096,
                 max_spatial_samples: PositiveInt | None = None, velocity_weight: NonNegativeFloat = 0.01,
                 divergence_weight: NonNegativeFloat = 0.0):
        super().__init__()
        self.w_style, self.w_content = w_style, w_content
        self.velocity_weight, self.divergence_weight = velocity_weight, divergence_weight
        self.swd = PatchSlicedWassersteinLoss(patch_size, num_projections, max_samples)
        self.ssm = CosineSSMLoss(max_spatial_samples)

    def forward(self, x_pred: Tensor, x_style: Tensor, x_src: Tensor, generator: torch.Generator | None = None,
                groups: Sequence[int] | None = None) -> dict[str, Tensor]:
        """Return the energy of latents at the end of their trajectories.

        Args:
            x_pred, x_style, x_src: (B, c, h, w): ends, references of the target style, sources.
            generator: on the CPU, see the two terms.
            groups: target style of each latent; each style is a separate distribution. None: the batch is one
                distribution, as published, which a network that ignores the target style can fit.
        Returns: total, style_swd, content_ssm.
        """
        if groups is None:
            swd = self.swd(x_pred, x_style, generator)
        else:
            members = [torch.tensor([i for i, group in enumerate(groups) if group == one])
                       .to(x_pred.device, non_blocking=True) for one in sorted(set(groups))]
            swd = sum(len(m) / len(groups) * self.swd(x_pred[m], x_style[m], generator) for m in members)
        ssm = self.ssm(x_pred, x_src, generator)
        return {"total": self.w_style * swd + self.w_content * ssm, "style_swd": swd, "content_ssm": ssm}

    def velocity_penalty(self, velocity: Tensor) -> Tensor:
        """Return the penalty of a velocity (B, c, h, w)."""
        velocity = velocity.float()
        penalty = self.velocity_weight * velocity.square().mean()
        return penalty + self.divergence_weight * divergence(velocity) if self.divergence_weight else penalty


def divergence(velocity: Tensor) -> Tensor:
    """Return the mean square of d_y v + d_x v per channel, by forward differences on the (h-1, w-1) area."""
    corner = velocity[..., :-1, :-1]
    return (velocity[..., 1:, :-1] + velocity[..., :-1, 1:] - 2 * corner).square().mean()


def require_same(x: Tensor, y: Tensor) -> None:
    """Raise ValueError unless both have one shape (B, c, h, w)."""
    if x.ndim != 4 or x.shape != y.shape:
        raise ValueError(f"both must be (batch, channels, height, width) of one shape, got {tuple(x.shape)} and "
                         f"{tuple(y.shape)}")
