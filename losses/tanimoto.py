"""Losses of segmentation: Tanimoto with complement in two forms, Dice, and cross-entropy.

Source: Diakogiannis et al. 2020, arXiv:1904.00592, section 2.4; feevos/resuneta (nn/loss/loss.py); for the pooled form
mischiefliao/ResUNeta-Torch (loss.py). Every loss takes logits and labels (B,K,H,W), labels in [0,1], one-hot or soft,
and `valid` (B,1,H,W), 0 for ignored pixels. `activation` None: a sigmoid for one class, a softmax for more.
Legend: B batch, K classes, H W pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runtime.ranges import Fraction, PositiveFloat, checked


class TanimotoLoss(nn.Module):
    """Compute the published form: squares, per image, classes weighted by their volume in the batch.

    T = (sum_c w_c N_c + s) / (sum_c w_c D_c + s) with N = sum pl, D = sum p^2 + sum l^2 - sum pl, w = 1 / V^2;
    the loss is 1 - T, averaged over images and, with complement, over T(p, l) and T(1 - p, 1 - l).

    Args:
        complement: average with the loss of 1 - p and 1 - l, which has a gradient where a class is absent.
        smooth: constant s that avoids 0 / 0; it affects large images, where 1 / V is small.
    Source: equations 5 and 6; the class of feevos/resuneta returns the similarity.
    """

    def __init__(self, complement: bool = True, smooth: PositiveFloat = 1e-5):
        super().__init__()
        self.complement, self.smooth = complement, smooth

    def forward(self, logits: Tensor, labels: Tensor, valid: Tensor | None = None,
                activation: str | None = None) -> Tensor:
        return 1 - self.similarity(activate(logits, activation), labels, valid).mean()

    def similarity(self, p: Tensor, labels: Tensor, valid: Tensor | None = None) -> Tensor:
        """Return T (B,) of each image from probabilities."""
        valid = 1 if valid is None else valid
        likeness = self._tanimoto(p * valid, labels * valid)
        if not self.complement:
            return likeness
        return (likeness + self._tanimoto((1 - p) * valid, (1 - labels) * valid)) / 2

    def _tanimoto(self, p: Tensor, labels: Tensor) -> Tensor:
        both = (p * labels).sum((2, 3))  # (B,K)
        either = (p.square() + labels.square()).sum((2, 3)) - both
        volume = labels.sum((2, 3)).mean(0)  # (K,)
        present = volume > 0
        weight = torch.where(present, volume, 1).pow(-2) * present
        weight = torch.where(present, weight, weight.max())  # absent classes: as the rarest; all absent: 0
        return ((weight * both).sum(1) + self.smooth) / ((weight * either).sum(1) + self.smooth)


class PooledTanimotoLoss(nn.Module):
    """Compute the form of the PyTorch port: sums over all pixels of the batch, foreground only.

    T = (sum pl + s) / (sum p + sum l - sum pl + s); loss = a (1 - T(p, l)) + (1 - a) (1 - T(1 - p, 1 - l)).

    Args:
        complement: whether to add the second term; without it alpha has no effect.
        alpha: weight a of the foreground term.
        smooth: constant s that avoids 0 / 0.
    Source: mischiefliao/ResUNeta-Torch. Differs with more than two classes: their losses are averaged; the port takes
        the largest class instead, which has no gradient.
    """

    @checked
    def __init__(self, complement: bool = True, alpha: Fraction = 0.5, smooth: PositiveFloat = 1e-6):
        super().__init__()
        self.complement, self.alpha, self.smooth = complement, alpha, smooth

    def forward(self, logits: Tensor, labels: Tensor, valid: Tensor | None = None,
                activation: str | None = None) -> Tensor:
        p, labels = foreground(activate(logits, activation)), foreground(labels)
        valid = 1 if valid is None else valid
        loss = 1 - self._tanimoto(p * valid, labels * valid)  # (K,)
        if self.complement:
            other = 1 - self._tanimoto((1 - p) * valid, (1 - labels) * valid)
            loss = self.alpha * loss + (1 - self.alpha) * other
        return loss.mean()

    def _tanimoto(self, p: Tensor, labels: Tensor) -> Tensor:
        both, either = (p * labels).sum((0, 2, 3)), (p + labels).sum((0, 2, 3))
        return (both + self.smooth) / (either - both + self.smooth)


class DiceLoss(nn.Module):
    """Compute the mean over classes of 1 - (2 sum pl + s) / (sum p + sum l + s), sums over the batch, foreground only.

    Args: smooth: constant s that avoids 0 / 0.
    """

    def __init__(self, smooth: PositiveFloat = 1e-6):
        super().__init__()
        self.smooth = smooth

    def forward(self, logits: Tensor, labels: Tensor, valid: Tensor | None = None,
                activation: str | None = None) -> Tensor:
        valid = 1 if valid is None else valid
        p, labels = foreground(activate(logits, activation)) * valid, foreground(labels) * valid
        both, either = (p * labels).sum((0, 2, 3)), (p + labels).sum((0, 2, 3))
        return (1 - (2 * both + self.smooth) / (either + self.smooth)).mean()


class CrossEntropyLoss(nn.Module):
    """Compute the cross-entropy, a mean over valid pixels: binary for a sigmoid, else over classes.

    For two channels both are equal: the binary logit is then the difference of the channels.
    """

    def forward(self, logits: Tensor, labels: Tensor, valid: Tensor | None = None,
                activation: str | None = None) -> Tensor:
        if activation_of(logits, activation) == "softmax":
            loss = -(labels * F.log_softmax(logits, dim=1)).sum(1, keepdim=True)
        else:
            loss = F.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(1, keepdim=True)
        if valid is None:
            return loss.mean()
        return (loss * valid).sum() / valid.sum().clamp(min=1)


def activation_of(logits: Tensor, activation: str | None = None) -> str:
    """Return the activation: "sigmoid" or "softmax"."""
    return activation or ("sigmoid" if logits.shape[1] == 1 else "softmax")


def activate(logits: Tensor, activation: str | None = None) -> Tensor:
    """Return probabilities (B,K,H,W) of logits."""
    return logits.sigmoid() if activation_of(logits, activation) == "sigmoid" else logits.softmax(1)


def foreground(x: Tensor) -> Tensor:
    """Return all classes but 0, or the only channel."""
    return x[:, 1:] if x.shape[1] > 1 else x
