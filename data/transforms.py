"""Functions that several datasets share: keys of samples, flips, number formats, drawn stand-ins."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.sampler import Key
from options import check, schema_of


def split_key(key: Key | int, length: int) -> Key:
    """Return `(epoch, index)` of a key, or of an index in epoch 0. Raises IndexError past the end of the dataset."""
    epoch, index = (operator.index(part) for part in (key if isinstance(key, Sequence) else (0, key)))
    if not 0 <= index < length:
        raise IndexError(f"index {index} of a dataset of {length} items")
    return epoch, index


def augment(clips: Sequence[Tensor], rng: np.random.Generator, hflip: bool, rot: bool) -> list[Tensor]:
    """Draw one symmetry of the square (flips, then transpose) and apply it to all (..., H, W), as KAIR does."""
    flips = [axis for axis, allowed in ((-1, hflip), (-2, rot)) if allowed and rng.random() < 0.5]
    transpose = rot and rng.random() < 0.5 and all(clip.shape[-1] == clip.shape[-2] for clip in clips)
    clips = [clip.flip(flips) for clip in clips]
    return [clip.transpose(-2, -1) for clip in clips] if transpose else clips


def to_float(frames: Tensor) -> Tensor:
    """Convert uint8 to contiguous float32 in [0,1]."""
    return frames.to(torch.float32, memory_format=torch.contiguous_format).div_(255)


def build_drawn(component: Callable, generated: Mapping[str, Any] | None, defaults: Mapping[str, Any],
                **fixed: Any) -> Any:
    """Build the drawn data that replaces missing folders.

    Args:
        component: class of the drawn data.
        generated: the option of that name, arguments of the class.
        defaults: arguments where `generated` has none.
        fixed: arguments that `generated` cannot change.
    Raises: OptionError: `generated` has an unknown key or a wrong value.
    """
    given = check(generated or {}, schema_of(component), "generated", lambda _: "drawn data", [])
    return component(**{**defaults, **given, **fixed})
