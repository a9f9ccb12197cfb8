"""What several data sets do with a sample: its key, its number format, flips and turns."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from data.sampler import Key


def split_key(key: Key | int, length: int) -> Key:
    """`(epoch, index)`, or an index of epoch 0, as plain integers; IndexError ends a loop over the dataset."""
    epoch, index = (operator.index(part) for part in (key if isinstance(key, Sequence) else (0, key)))
    if not 0 <= index < length:
        raise IndexError(f"index {index} of a dataset of {length} items")
    return epoch, index


def augment(clips: Sequence[Tensor], rng: np.random.Generator, hflip: bool, rot: bool) -> list[Tensor]:
    """One of the 8 symmetries of the square (4 of an oblong) for all (..., H, W): flips, then transpose, as in KAIR."""
    flips = [axis for axis, allowed in ((-1, hflip), (-2, rot)) if allowed and rng.random() < 0.5]
    transpose = rot and rng.random() < 0.5 and all(clip.shape[-1] == clip.shape[-2] for clip in clips)
    clips = [clip.flip(flips) for clip in clips]
    return [clip.transpose(-2, -1) for clip in clips] if transpose else clips


def to_float(frames: Tensor) -> Tensor:
    """uint8 -> float32 in [0,1], contiguous."""
    return frames.to(torch.float32, memory_format=torch.contiguous_format).div_(255)
