"""How much of a segmentation is right."""

from __future__ import annotations

import torch
from torch import Tensor


def confusion(prediction: Tensor, target: Tensor, num_classes: int, ignore_index: int | None = None) -> Tensor:
    """Counts to be added up over a data set before anything is divided.

    Args:
        prediction, target: class ids of equal shape, 0..num_classes-1.
        ignore_index: value of target where a pixel does not count.
    Returns: (num_classes,3) int64 true positives, false positives, false negatives of each class.
    """
    valid = target != (-1 if ignore_index is None else ignore_index)
    classes = torch.arange(num_classes, device=target.device).view(-1, *[1] * target.ndim)
    said, true = (prediction == classes) & valid, target == classes  # (K,...)
    counts = [said & true, said & ~true, ~said & true & valid]
    return torch.stack([each.flatten(1).sum(1) for each in counts], dim=1)


def segmentation_metrics(counts: Tensor) -> dict[str, float]:
    """Intersection over union, precision, recall and F1 of summed counts.

    Args: counts: (K,3) as of `confusion`; of two classes the second is the foreground, and it alone counts.
    Returns: {"iou", "precision", "recall", "f1"}; for more than two classes the means over those that occur, and
        `iou_<class>` of each of them. Where nothing is there and nothing was found, the IoU is 1 and the rest is 0.
    """
    scores = [_scores(*row) for row in counts.tolist()[1 if len(counts) == 2 else 0:] if any(row)] or [_scores(0, 0, 0)]
    means = {name: sum(score[name] for score in scores) / len(scores) for name in scores[0]}
    if len(counts) > 2:
        means |= {f"iou_{c}": _scores(*row)["iou"] for c, row in enumerate(counts.tolist()) if any(row)}
    return means


def _scores(hits: float, false: float, missed: float) -> dict[str, float]:
    def share(part: float, whole: float, empty: float = 0.0) -> float:
        return part / whole if whole else empty

    return {"iou": share(hits, hits + false + missed, empty=1.0), "precision": share(hits, hits + false),
            "recall": share(hits, hits + missed), "f1": share(2 * hits, 2 * hits + false + missed)}
