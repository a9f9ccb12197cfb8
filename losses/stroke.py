"""Losses of stroke maps, for structural pretraining and for dense prediction.

Source: Fuwaki/InkTrace at a474eeb, losses.py; the focal loss of keypoints is that of CornerNet, Law & Deng 2018,
equation 1. Maps are given by name as in models.network_inktrace, predicted and true ones of equal shape (B, C, H, W);
every loss returns its weighted terms, scalars, and their sum as "total". Legend: B images, C channels, H W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runtime.ranges import NonNegativeFloat, checked

EPSILON = 1e-6  # least distance of a probability from 0 and 1
Maps = Mapping[str, Tensor]


class StructuralPretrainLoss(nn.Module):
    """Compute the loss of skeleton and tangent, also where ink is hidden.

    Args:
        skeleton_weight: factor of the skeleton term.
        tangent_weight: factor of the tangent term.
    """

    @checked
    def __init__(self, *, skeleton_weight: NonNegativeFloat = 1.0, tangent_weight: NonNegativeFloat = 1.0):
        super().__init__()
        self.weights = {"loss_skeleton": skeleton_weight, "loss_tangent": tangent_weight}

    def forward(self, predicted: Maps, true: Maps) -> dict[str, Tensor]:
        return weighted(self.weights, {"loss_skeleton": skeleton_loss(predicted["skeleton"], true["skeleton"]),
                                       "loss_tangent": on_skeleton("tangent", predicted, true, torch.square)})


class DenseLoss(nn.Module):
    """Compute the loss of all five maps.

    Args:
        skeleton_weight: factor of the skeleton term.
        keypoints_weight: factor of the keypoint term.
        tangent_weight: factor of the tangent term.
        width_weight: factor of the stroke width term.
        offset_weight: factor of the offset term.
        keypoint_sigma: standard deviation of keypoint targets in pixels, e.g. 1.5; 0: one pixel.

    Source: as the module. Differs: tangent and offset of a sample are masked by its own skeleton; a broadcast in the
    original masks every sample by the skeletons of all samples.
    """

    @checked
    def __init__(self, *, skeleton_weight: NonNegativeFloat = 10.0, keypoints_weight: NonNegativeFloat = 5.0,
                 tangent_weight: NonNegativeFloat = 1.0, width_weight: NonNegativeFloat = 1.0,
                 offset_weight: NonNegativeFloat = 1.0, keypoint_sigma: NonNegativeFloat = 0.0):
        super().__init__()
        self.keypoint_sigma = keypoint_sigma
        self.weights = {"loss_skel": skeleton_weight, "loss_keys": keypoints_weight, "loss_tan": tangent_weight,
                        "loss_width": width_weight, "loss_off": offset_weight}

    def forward(self, predicted: Maps, true: Maps) -> dict[str, Tensor]:
        keypoints = true["keypoints"]
        if self.keypoint_sigma:
            keypoints = gaussian_heatmap(keypoints, self.keypoint_sigma)
        return weighted(self.weights, {"loss_skel": skeleton_loss(predicted["skeleton"], true["skeleton"]),
                                       "loss_keys": focal_loss(predicted["keypoints"], keypoints),
                                       "loss_tan": on_skeleton("tangent", predicted, true, torch.square),
                                       "loss_width": on_skeleton("width", predicted, true, torch.abs),
                                       "loss_off": on_skeleton("offset", predicted, true, torch.abs)})


def weighted(weights: Mapping[str, float], terms: Maps) -> dict[str, Tensor]:
    """Return weighted terms and their sum as "total"."""
    terms = {name: weights[name] * term for name, term in terms.items()}
    return terms | {"total": sum(terms.values())}


def skeleton_loss(predicted: Tensor, true: Tensor) -> Tensor:
    """Return cross-entropy plus Dice loss of probabilities."""
    logits = torch.logit(predicted, EPSILON)
    return F.binary_cross_entropy_with_logits(logits, true) + dice_loss(predicted, true)


def dice_loss(predicted: Tensor, true: Tensor) -> Tensor:
    """Return the mean Dice loss of maps, smoothed by 1. Source: Milletari et al. 2016, equation 2."""
    both = (predicted * true).sum((2, 3))
    return (1 - (2 * both + 1) / (predicted.sum((2, 3)) + true.sum((2, 3)) + 1)).mean()


def on_skeleton(name: str, predicted: Maps, true: Maps, measure) -> Tensor:
    """Return the mean error of a map on the true skeleton; elsewhere the map is undefined."""
    mask = (true["skeleton"] > 0.5).to(predicted[name])  # (B, 1, H, W)
    error = measure(predicted[name] - true[name]) * mask
    return error.sum() / count_at_least_1(mask) / error.shape[1]


def focal_loss(predicted: Tensor, true: Tensor) -> Tensor:
    """Return the focal loss of keypoints, which are pixels of target 1; the target lowers false positives nearby."""
    predicted = predicted.clamp(EPSILON, 1 - EPSILON)
    positive_loss = (1 - predicted).square() * predicted.log()
    negative_loss = (1 - true).pow(4) * predicted.square() * (1 - predicted).log()
    positive = true == 1
    return -torch.where(positive, positive_loss, negative_loss).sum() / count_at_least_1(positive)


def count_at_least_1(mask: Tensor) -> Tensor:
    """Return the number of ones, at least 1."""
    return mask.sum().float().clamp(min=1)


def gaussian_heatmap(points: Tensor, sigma: float = 1.5, radius: int = 5) -> Tensor:
    """Replace pixels of 1 by Gaussians of height 1; where they overlap, the maximum counts.

    Args: points: (B, C, H, W), 0 or 1. sigma, radius: of a Gaussian, in pixels.
    Differs from the original, whose sums can reach 1 where there is no keypoint.
    """
    offsets = torch.arange(-radius, radius + 1, dtype=points.dtype, device=points.device)
    line = torch.exp(-offsets.square() / (2 * sigma**2))
    padded = F.pad(points, (radius,) * 4)
    rows = (padded.unfold(2, 2 * radius + 1, 1) * line).amax(-1)  # a Gaussian is a product of two lines
    return (rows.unfold(3, 2 * radius + 1, 1) * line).amax(-1)
