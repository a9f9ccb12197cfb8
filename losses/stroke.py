"""Losses of stroke maps: masked structural pretraining, and dense prediction of skeleton, keypoints and geometry.

Source: Fuwaki/InkTrace at a474eeb, losses.py; the keypoints' focal loss is CornerNet's, Law & Deng 2018, equation 1.
Legend: B images, C channels, H W pixels. Maps come by name as in models.network_inktrace, predicted and true ones of
equal shape (B, C, H, W); every loss returns its weighted terms, scalars, and their sum under "total".
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runtime.distributed import all_reduce_mean, world_size
from runtime.ranges import NonNegativeFloat

EPSILON = 1e-6  # how close to 0 and 1 a probability may come
Maps = Mapping[str, Tensor]


class StructuralPretrainLoss(nn.Module):
    """Skeleton and tangent of the whole strokes, also where the ink is hidden.

    Args:
        skeleton_weight: factor of the skeleton's term.
        tangent_weight: factor of the tangent's term.
    Raises: ValueError: a negative weight.
    """

    def __init__(self, *, skeleton_weight: NonNegativeFloat = 1.0, tangent_weight: NonNegativeFloat = 1.0):
        super().__init__()
        self.weights = checked({"loss_skeleton": skeleton_weight, "loss_tangent": tangent_weight})

    def forward(self, predicted: Maps, true: Maps) -> dict[str, Tensor]:
        return weighted(self.weights, {"loss_skeleton": skeleton_loss(predicted["skeleton"], true["skeleton"]),
                                       "loss_tangent": on_skeleton("tangent", predicted, true, torch.square)})


class DenseLoss(nn.Module):
    """All five maps.

    Args:
        skeleton_weight: factor of the skeleton's term.
        keypoints_weight: factor of the keypoints' term.
        tangent_weight: factor of the tangent's term.
        width_weight: factor of the stroke width's term.
        offset_weight: factor of the offset's term.
        keypoint_sigma: pixels over which a keypoint's target falls off, e.g. 1.5; 0: it is one pixel.

    Raises: ValueError: a negative weight or sigma.

    Source: as the module. Differs in the mask of tangent and offset, which is each sample's own; the original's gained
    an axis, so that every sample's error counted under every sample's skeleton.
    """

    def __init__(self, *, skeleton_weight: NonNegativeFloat = 10.0, keypoints_weight: NonNegativeFloat = 5.0,
                 tangent_weight: NonNegativeFloat = 1.0, width_weight: NonNegativeFloat = 1.0,
                 offset_weight: NonNegativeFloat = 1.0, keypoint_sigma: NonNegativeFloat = 0.0):
        super().__init__()
        if keypoint_sigma < 0:
            raise ValueError(f"keypoint_sigma {keypoint_sigma} must be >= 0")
        self.keypoint_sigma = keypoint_sigma
        self.weights = checked({"loss_skel": skeleton_weight, "loss_keys": keypoints_weight,
                                "loss_tan": tangent_weight, "loss_width": width_weight, "loss_off": offset_weight})

    def forward(self, predicted: Maps, true: Maps) -> dict[str, Tensor]:
        keypoints = true["keypoints"]
        if self.keypoint_sigma:
            keypoints = gaussian_heatmap(keypoints, self.keypoint_sigma)
        return weighted(self.weights, {"loss_skel": skeleton_loss(predicted["skeleton"], true["skeleton"]),
                                       "loss_keys": focal_loss(predicted["keypoints"], keypoints),
                                       "loss_tan": on_skeleton("tangent", predicted, true, torch.square),
                                       "loss_width": on_skeleton("width", predicted, true, torch.abs),
                                       "loss_off": on_skeleton("offset", predicted, true, torch.abs)})


def checked(weights: dict[str, float]) -> dict[str, float]:
    for name, weight in weights.items():
        if weight < 0:
            raise ValueError(f"the weight of {name} must not be negative, got {weight}")
    return weights


def weighted(weights: Mapping[str, float], terms: Maps) -> dict[str, Tensor]:
    """Terms times their weights, and "total"."""
    terms = {name: weights[name] * term for name, term in terms.items()}
    return terms | {"total": sum(terms.values())}


def skeleton_loss(predicted: Tensor, true: Tensor) -> Tensor:
    """Cross entropy plus Dice of probabilities."""
    logits = torch.logit(predicted, EPSILON)
    return F.binary_cross_entropy_with_logits(logits, true) + dice_loss(predicted, true)


def dice_loss(predicted: Tensor, true: Tensor) -> Tensor:
    """1 - overlap of each map with the true one, averaged. Source: Milletari et al. 2016, equation 2, smoothed by 1."""
    both = (predicted * true).sum((2, 3))
    return (1 - (2 * both + 1) / (predicted.sum((2, 3)) + true.sum((2, 3)) + 1)).mean()


def on_skeleton(name: str, predicted: Maps, true: Maps, measure) -> Tensor:
    """The mean error of a map on the true skeleton: everywhere else it means nothing."""
    mask = (true["skeleton"] > 0.5).to(predicted[name])  # (B, 1, H, W)
    error = measure(predicted[name] - true[name]) * mask
    return error.sum() / count_at_least_1(mask) / error.shape[1]


def focal_loss(predicted: Tensor, true: Tensor) -> Tensor:
    """Keypoints are where the target is exactly 1; near one, a false alarm costs less."""
    predicted = predicted.clamp(EPSILON, 1 - EPSILON)
    found = (1 - predicted).square() * predicted.log()
    silent = (1 - true).pow(4) * predicted.square() * (1 - predicted).log()
    positive = true == 1
    return -torch.where(positive, found, silent).sum() / count_at_least_1(positive)


def count_at_least_1(mask: Tensor) -> Tensor:
    """How many are 1 in the batch, a mean over the processes that share it."""
    return all_reduce_mean(mask.sum().float()).clamp(min=1 / world_size())


def gaussian_heatmap(points: Tensor, sigma: float = 1.5, radius: int = 5) -> Tensor:
    """Single pixels of 1 spread to bells of height 1; where bells meet, the higher one counts.

    Args: points: (B, C, H, W), 0 or 1. sigma, radius: of a bell, in pixels.
    Differs from the original, whose sum of tails can reach 1 where there is no keypoint.
    """
    offsets = torch.arange(-radius, radius + 1, dtype=points.dtype, device=points.device)
    line = torch.exp(-offsets.square() / (2 * sigma**2))
    padded = F.pad(points, (radius,) * 4)
    rows = (padded.unfold(2, 2 * radius + 1, 1) * line).amax(-1)  # a bell is a product of two lines, and so its maximum
    return (rows.unfold(3, 2 * radius + 1, 1) * line).amax(-1)
