"""Drawn pen strokes and the maps that a network is to predict from their ink.

Source: Fuwaki/InkTrace at a474eeb (Rust: geometry.rs, rasterize.rs). Differs: a sample is a function of (seed, epoch,
index), not of the system's entropy.

Legend: K segments, N points of all segments, S side of the picture in pixels, s canvas (2S). Coordinates are pixels,
x right, y down; pixel (0, 0) covers [0, 1) x [0, 1). A segment is a cubic Bezier curve of varying width, a row of 11:
x0 y0 x1 y1 x2 y2 x3 y3 and the widths at start, middle and end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from data.sampler import Key, sample_rng
from data.transforms import split_key
from models.network_inktrace import MAPS, pack
from runtime.ranges import NonNegativeInt, PositiveInt, Range, Seed, checked

MARGIN = 4  # least distance of control points from the border in pixels
TRIES = 10  # attempts to place a segment
DISCS = 200  # number of discs of ink along a segment
LEGACY = {"rounded_keypoints": "keypoints lie at rounded coordinates, up to a pixel off the skeleton"}


class Difficulty(NamedTuple):
    """Hold the ranges, both inclusive, of the number of paths and of segments per path."""

    paths: tuple[int, int]
    segments: tuple[int, int] = (1, 1)


STAGES = (Difficulty((1, 1)), Difficulty((1, 3)), Difficulty((2, 5)), Difficulty((3, 8)),
          Difficulty((1, 1), (2, 3)), Difficulty((1, 1), (3, 5)), Difficulty((1, 1), (4, 8)),
          Difficulty((1, 2), (2, 3)), Difficulty((2, 3), (2, 4)), Difficulty((2, 4), (2, 5)))
Stage = Annotated[int, Range(ge=0, le=len(STAGES) - 1)]


def curriculum(epoch: int, start: int, end: int | None, epochs_per_stage: int) -> int:
    """Return the difficulty in an epoch: from `start` it grows by 1 every epochs_per_stage up to `end`; None: fixed."""
    return start if end is None else min(start + epoch // epochs_per_stage, end)


class StrokeDataset(Dataset):
    """Draw ink and its maps, with a difficulty that grows over the epochs.

    Item `(epoch, index)` -> {"L": ink (1,S,S) in [0,1], "H": maps (8,S,S) packed as models.network_inktrace.pack does,
    "index": index, "key": "000000/3", "folder": "stroke_000000"}, all of (seed, epoch, first_sample + index).

    Args:
        num_samples: number of items of an epoch.
        img_size: side S of an image in pixels; the network takes 64.
        curriculum_stage: difficulty of the first epoch.
        curriculum_end: largest difficulty; null: curriculum_stage.
        epochs_per_stage: number of epochs until the difficulty grows by 1.
        first_sample: number of the first item; test sets use others than training, e.g. from 1000000.
        legacy: errors of the original to reproduce, names of LEGACY.
        name: label of the dataset, without effect.
        seed: seed of all strokes.
    Raises: ValueError: a number is out of range, or a name unknown.
    """

    @checked
    def __init__(self, *, num_samples: PositiveInt = 10_000, img_size: Annotated[int, Range(ge=16)] = 64,
                 curriculum_stage: Stage = 0, curriculum_end: Stage | None = None,
                 epochs_per_stage: PositiveInt = 10, first_sample: NonNegativeInt = 0,
                 legacy: Sequence[str] = (), name: str | None = None, seed: Seed = 0):
        if curriculum_end is not None and curriculum_end < curriculum_stage:
            raise ValueError(f"curriculum_end {curriculum_end} must be >= curriculum_stage {curriculum_stage}")
        if unknown := set(legacy) - LEGACY.keys():
            raise ValueError(f"legacy: unknown {', '.join(sorted(unknown))}; valid: {', '.join(LEGACY)}")
        self.num_samples, self.first_sample, self.seed, self.size = num_samples, first_sample, seed, img_size
        self.curriculum = curriculum_stage, curriculum_end, epochs_per_stage
        self.legacy = tuple(legacy)

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, key: Key | int) -> dict[str, Tensor | str | int]:
        epoch, index = split_key(key, len(self))
        rng = sample_rng(self.seed, epoch, self.first_sample + index)
        strokes = draw_strokes(rng, curriculum(epoch, *self.curriculum), self.size)
        maps = rasterise(strokes, self.size, self.legacy)
        return {"L": maps["image"], "H": pack(maps), "index": index, "key": f"{index:06d}/{epoch}",
                "folder": f"stroke_{index:06d}"}


# Strokes -----------------------------------------------------------------------------------------------------------


def draw_strokes(rng: np.random.Generator, stage: int, size: int = 64) -> np.ndarray:
    """Draw the segments (K,11) of one picture of a difficulty, in drawing order."""
    paths, segments = STAGES[stage]
    starts = rng.uniform(0.1 * size, 0.9 * size, (rng.integers(paths[0], paths[1] + 1), 2))
    if segments == (1, 1):
        starts = starts[np.argsort(starts[:, 1], kind="stable")]  # as in writing, lower ones are drawn later
    return np.array([row for start in starts
                     for row in draw_path(rng, start, int(rng.integers(segments[0], segments[1] + 1)), stage, size)])


def draw_path(rng: np.random.Generator, start: np.ndarray, num_segments: int, stage: int,
              size: int) -> list[np.ndarray]:
    """Draw smoothly joined segments, rows of 11."""
    rows, tangent = [], None
    for _ in range(num_segments):
        row = draw_segment(rng, start, tangent, stage, size)
        rows.append(row)
        start = row[6:8]
        tangent = unit(row[6:8] - row[4:6])
    return rows


def draw_segment(rng: np.random.Generator, start: np.ndarray, tangent: np.ndarray | None, stage: int,
                 size: int) -> np.ndarray:
    """Draw the first of ten random curves that stays inside the margin, else a short straight one.

    Args: start: (2,). tangent: (2,) unit vector at the end of the previous segment, or None.
    """
    shortest, longest = (0.3 * size, 0.8 * size) if stage == 0 else (0.12 * size, 0.35 * size)
    low, high = MARGIN, size - MARGIN
    first = np.clip(start, low, high)
    draws = rng.random((TRIES, 6))  # all attempts at once cost less than a loop
    length = shortest + (longest - shortest) * draws[:, 0]
    if tangent is None:
        angle = 2 * math.pi * draws[:, 1]
        leaving = angle + math.pi / 2 * (draws[:, 2] - 0.5)  # the chord, rotated by up to 45 degrees
    else:
        leaving = np.full(TRIES, math.atan2(tangent[1], tangent[0]))
        angle = leaving + math.pi / 1.5 * (draws[:, 1] - 0.5)  # rotated by up to 60 degrees
    arriving = angle + math.pi / 2 * (draws[:, 3] - 0.5)
    last = first + towards(angle) * length[:, None]
    second = first + towards(leaving) * (length * (0.25 + 0.2 * draws[:, 4]))[:, None]
    third = last - towards(arriving) * (length * (0.25 + 0.2 * draws[:, 5]))[:, None]
    curves = np.concatenate([second, third, last], axis=1)  # (TRIES,6)
    inside = ((curves >= low) & (curves <= high)).all(1)
    if inside.any():
        curve = curves[inside.argmax()]
    else:
        centre = unit(size / 2 - first)
        ahead = centre if tangent is None or tangent @ centre <= -0.2 else tangent
        curve = np.clip(first + np.outer((0.33, 0.66, 1), ahead * shortest / 2), low, high).ravel()
    begin, end, middle = rng.uniform(*((2, 5) if stage == 0 else (1.5, 4)), 3)
    return np.concatenate([first, curve, (begin, middle, end)])


def unit(vector: np.ndarray) -> np.ndarray:
    """Return a vector of length 1."""
    return vector / max(math.hypot(*vector), 1e-6)


def towards(angle: np.ndarray) -> np.ndarray:
    """Return unit vectors (K,2) of angles (K,)."""
    return np.stack([np.cos(angle), np.sin(angle)], axis=1)


# Maps --------------------------------------------------------------------------------------------------------------


def rasterise(strokes: np.ndarray | Tensor, size: int = 64, legacy: Sequence[str] = ()) -> dict[str, Tensor]:
    """Return ink and maps of segments; where they cross, the later one counts.

    Args: strokes: (K,11). size: S. legacy: names of LEGACY.
    Returns: float32 maps (C,S,S): image and skeleton (1) in [0,1]; width (1) in units of 10 pixels; tangent (2): cos
        and sin of twice the angle, which does not depend on the direction of a stroke; offset (2) from the middle of a
        pixel to the line, in pixels; keypoints (2): ends of paths, joints of segments.
    """
    strokes = np.asarray(strokes, np.float64)
    points, slopes, widths = along(strokes)
    pixels = np.floor(points).astype(np.intp)
    drawn = ((pixels >= 0) & (pixels < size)).all(1)
    points, slopes, widths, pixels = points[drawn], slopes[drawn], widths[drawn], pixels[drawn]
    ux, uy = (slopes / np.maximum(np.hypot(*slopes.T), 1e-6)[:, None]).T
    values = np.stack([np.ones_like(ux), ux * ux - uy * uy, 2 * ux * uy, widths / 10, *(points - pixels - 0.5).T])
    first, maps = 0, np.zeros((sum(MAPS.values()), size, size), np.float32)
    maps[: len(values), pixels[:, 1], pixels[:, 0]] = values  # of equal pixels the last one stays
    maps[len(values) :] = mark_keypoints(strokes, size, "rounded_keypoints" in legacy)
    result = {"image": torch.from_numpy(paint(strokes, size))}
    for name, channels in MAPS.items():
        result[name] = torch.from_numpy(maps[first : first + channels])
        first += channels
    return result


def bernstein(strokes: np.ndarray, t: np.ndarray) -> np.ndarray:
    """Return points (N,2) of the segments (N,11) or (K,1,11) at t."""
    weights = np.stack([(1 - t) ** 3, 3 * (1 - t) ** 2 * t, 3 * (1 - t) * t**2, t**3], axis=-1)  # (..., 4)
    return np.einsum("...p,...pc->...c", weights, strokes[..., :8].reshape(*strokes.shape[:-1], 4, 2))


def width_at(strokes: np.ndarray, t: np.ndarray) -> np.ndarray:
    """Return the widths of segments at t."""
    begin, middle, end = np.moveaxis(strokes[..., 8:], -1, 0)
    return (1 - t) ** 2 * begin + 2 * (1 - t) * t * middle + t**2 * end


def along(strokes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return points (N,2) of all segments, about two per pixel, with derivatives (N,2) and widths (N,)."""
    corners = strokes[:, :8].reshape(-1, 4, 2)
    sides = np.hypot(*np.moveaxis(np.diff(corners, axis=1), -1, 0))  # (K,3)
    estimate = (np.hypot(*(corners[:, 3] - corners[:, 0]).T) + sides.sum(1)) / 2
    counts = np.maximum((2 * estimate).astype(int), 2)
    which = np.repeat(np.arange(len(strokes)), counts)  # (N,) segment of each point
    t = (np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts)) / (counts - 1)[which]
    a, b, c = np.moveaxis(np.diff(corners, axis=1)[which], 1, 0)  # (N,2) each
    u = 1 - t
    slopes = 3 * ((u * u)[:, None] * a + (2 * u * t)[:, None] * b + (t * t)[:, None] * c)
    return bernstein(strokes[which], t), slopes, width_at(strokes[which], t)


def mark_keypoints(strokes: np.ndarray, size: int, rounded: bool) -> np.ndarray:
    """Return keypoints (2,S,S): ends of paths; joints of segments that are not also an end.

    A segment belongs to the path of the previous one if it starts at its end. The original allows a distance of a
    pixel, so that separate strokes may count as joined.
    """
    starts, ends = strokes[:, :2], strokes[:, 6:8]
    joined = np.hypot(*(ends[:-1] - starts[1:]).T) < 1e-3
    heat = np.zeros((2, size, size), np.float32)
    free = np.concatenate([starts[np.append(True, ~joined)], ends[np.append(~joined, True)]])
    for channel, points in ((1, ends[:-1][joined]), (0, free)):
        x, y = np.floor(points + 0.5 * rounded).astype(np.intp).T
        seen = (x >= 0) & (x < size) & (y >= 0) & (y < size)
        heat[channel, y[seen], x[seen]] = 1
    heat[1] *= 1 - heat[0]
    return heat


def paint(strokes: np.ndarray, size: int) -> np.ndarray:
    """Draw ink (1,S,S): discs along each segment on a canvas of twice the size, averaged over 2x2 pixels.

    A row of a disc is an interval. Counts of the begins and ends of intervals give the covered pixels, which costs far
    less than a test of each pixel and disc.
    """
    side, t = 2 * size, np.linspace(0, 1, DISCS)
    x, y = (2 * bernstein(strokes[:, None], t)).reshape(-1, 2).T  # (N,) on the canvas
    radius = np.maximum(width_at(strokes[:, None], t), 0.5).ravel()  # half the width, in canvas pixels
    reach = math.ceil(radius.max())
    rows = np.rint(y).astype(np.intp)[:, None] + np.arange(-reach, reach + 1)  # (N,R)
    half = radius[:, None] ** 2 - (rows - y[:, None]) ** 2
    inside = (half >= 0) & (rows >= 0) & (rows < side)
    half = np.sqrt(np.maximum(half, 0))
    begin = np.clip(np.ceil(x[:, None] - half), 0, side).astype(np.intp)
    end = np.clip(np.floor(x[:, None] + half) + 1, begin, side).astype(np.intp)
    cells, line = side * (side + 1), rows * (side + 1)  # one more column for intervals that end at the border
    changes = np.bincount((line + begin)[inside], minlength=cells) - np.bincount((line + end)[inside], minlength=cells)
    ink = changes.cumsum().reshape(side, side + 1)[:, :side] > 0
    return ink.reshape(size, 2, size, 2).mean((1, 3), dtype=np.float32)[None]
