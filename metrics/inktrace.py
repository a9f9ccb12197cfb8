"""Metrics of predicted strokes: overlap of areas, F1 of keypoints, errors of directions."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def overlap(found: Tensor, wanted: Tensor) -> dict[str, float]:
    """Return the overlap of two sets of pixels.

    Args: found, wanted: predicted and true pixels, bool tensors of equal shape.
    Returns: {"iou", "precision", "recall", "f1"} in [0,1]; 1 where both sets are empty.
    """
    hits, num_found, num_wanted = ((found & wanted).sum().item(), found.sum().item(), wanted.sum().item())
    return {"iou": _ratio(hits, num_found + num_wanted - hits), "precision": _ratio(hits, num_found),
            "recall": _ratio(hits, num_wanted), "f1": f1(hits, num_found, num_wanted)}


def f1(hits: int, num_found: int, num_wanted: int) -> float:
    """Return the harmonic mean of precision and recall; 1 where both sets are empty."""
    return _ratio(2 * hits, num_found + num_wanted)


def matches(found: Tensor, wanted: Tensor, radius: float) -> int:
    """Count the found points near a true one; each true point matches once, the best found point first.

    Args:
        found: (N,2), in descending order of score.
        wanted: (M,2), the true points.
        radius: largest distance of a match, in the unit of the points.
    """
    distances, hits = torch.cdist(found.double(), wanted.double()), 0
    for row in distances if len(wanted) else ():
        distance, place = row.min(0)
        if distance <= radius:
            hits += 1
            distances[:, place] = math.inf
    return hits


def direction_error(found: Tensor, wanted: Tensor) -> float:
    """Return the mean angle between predicted and true lines in degrees, 0..90; 0 without lines.

    Args: found, wanted: (2,N) cos and sin of twice the angles, times any positive factor.
    """
    (x, y), (u, v) = found.double(), wanted.double()
    angles = torch.atan2(x * v - y * u, x * u + y * v).abs() / 2
    return math.degrees(angles.mean().item()) if len(angles) else 0.0


def _ratio(part: float, total: float) -> float:
    return part / total if total else 1.0
