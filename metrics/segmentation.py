"""Metrics of segmentation, computed from counts that are summed over a data set."""

from __future__ import annotations

import torch
from torch import Tensor


def confusion(prediction: Tensor, target: Tensor, num_classes: int, ignore_index: int | None = None) -> Tensor:
    """Count true positives, false positives and false negatives of each class.

    Args:
        prediction, target: class ids of equal shape, 0..num_classes-1.
        ignore_index: value of ignored pixels of the target; None: there are none.
    Returns: (num_classes,3) int64: true positives, false positives, false negatives.
    """
    valid = target != (-1 if ignore_index is None else ignore_index)
    classes = torch.arange(num_classes, device=target.device).view(-1, *[1] * target.ndim)
    positive, true = (prediction == classes) & valid, target == classes  # (K,...)
    counts = [positive & true, positive & ~true, ~positive & true & valid]
    return torch.stack([each.flatten(1).sum(1) for each in counts], dim=1)


def segmentation_metrics(counts: Tensor) -> dict[str, float]:
    """Return intersection over union, precision, recall and F1 of summed counts.

    Args: counts: (K,3) of `confusion`; of two classes only the second, the foreground, counts.
    Returns: {"iou", "precision", "recall", "f1"}; with more than two classes means over those that occur, and
        `iou_<class>` of each. Without true and predicted pixels the IoU is 1 and all else 0.
    """
    scores = [_scores(*row) for row in counts.tolist()[1 if len(counts) == 2 else 0:] if any(row)] or [_scores(0, 0, 0)]
    means = {name: sum(score[name] for score in scores) / len(scores) for name in scores[0]}
    if len(counts) > 2:
        means |= {f"iou_{c}": _scores(*row)["iou"] for c, row in enumerate(counts.tolist()) if any(row)}
    return means


def _scores(hits: float, false: float, missed: float) -> dict[str, float]:
    def ratio(part: float, total: float, empty: float = 0.0) -> float:
        return part / total if total else empty

    return {"iou": ratio(hits, hits + false + missed, empty=1.0), "precision": ratio(hits, hits + false),
            "recall": ratio(hits, hits + missed), "f1": ratio(2 * hits, 2 * hits + false + missed)}
