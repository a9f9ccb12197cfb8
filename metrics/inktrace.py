"""How well strokes are found: areas, key points, directions."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def overlap(found: Tensor, wanted: Tensor) -> dict[str, float]:
    """How well a set of pixels covers another, of which both may be empty.

    Args: found, wanted: bool tensors of equal shape.
    Returns: {"iou", "precision", "recall", "f1"} in [0,1]; 1 where there was nothing to find and nothing was found.
    """
    hits, num_found, num_wanted = ((found & wanted).sum().item(), found.sum().item(), wanted.sum().item())
    return {"iou": _share(hits, num_found + num_wanted - hits), "precision": _share(hits, num_found),
            "recall": _share(hits, num_wanted), "f1": f1(hits, num_found, num_wanted)}


def f1(hits: int, num_found: int, num_wanted: int) -> float:
    """Harmonic mean of precision and recall; 1 where there was nothing to find and nothing was found."""
    return _share(2 * hits, num_found + num_wanted)


def matches(found: Tensor, wanted: Tensor, radius: float) -> int:
    """How many points lie near a wanted one; each may be used once, by the first that comes.

    Args: found: (N,2), the surest first. wanted: (M,2). radius: largest distance, in the points' unit.
    """
    distances, hits = torch.cdist(found.double(), wanted.double()), 0
    for row in distances if len(wanted) else ():
        distance, place = row.min(0)
        if distance <= radius:
            hits += 1
            distances[:, place] = math.inf
    return hits


def direction_error(found: Tensor, wanted: Tensor) -> float:
    """Mean angle between lines, in degrees 0..90.

    Args: found, wanted: (2,N) cos and sin of twice the lines' angles, of any length. Returns: 0 if N is 0.
    """
    (x, y), (u, v) = found.double(), wanted.double()
    angles = torch.atan2(x * v - y * u, x * u + y * v).abs() / 2
    return math.degrees(angles.mean().item()) if len(angles) else 0.0


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 1.0
