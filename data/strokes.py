"""Strokes as a pen draws them, and the maps a network is to read out of their ink: made, not read.

Source: Fuwaki/InkTrace at a474eeb (its Rust generator: geometry.rs, rasterize.rs). A sample here is a function of
(seed, epoch, index), there of the system's entropy.

Legend: K segments, N points of all of them, S side of the picture in pixels, s canvas (2S). Coordinates are pixels,
x right, y down, pixel (0, 0) covers [0, 1) twice. A segment is a cubic Bezier curve of varying width, a row of 11:
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
from runtime.ranges import NonNegativeInt, PositiveInt, Range, Seed

MARGIN = 4  # pixels that control points keep from the border, whatever the size
TRIES = 10  # to place a segment
DISCS = 200  # of ink along a segment
LEGACY = {"rounded_keypoints": "keypoints lie at the nearest pixel's number, so up to a pixel off the skeleton"}


class Difficulty(NamedTuple):
    """How many paths, of how many segments each; both ranges inclusive."""

    paths: tuple[int, int]
    segments: tuple[int, int] = (1, 1)


STAGES = (Difficulty((1, 1)), Difficulty((1, 3)), Difficulty((2, 5)), Difficulty((3, 8)),
          Difficulty((1, 1), (2, 3)), Difficulty((1, 1), (3, 5)), Difficulty((1, 1), (4, 8)),
          Difficulty((1, 2), (2, 3)), Difficulty((2, 3), (2, 4)), Difficulty((2, 4), (2, 5)))
Stage = Annotated[int, Range(ge=0, le=len(STAGES) - 1)]


def curriculum(epoch: int, start: int, end: int | None, epochs_per_stage: int) -> int:
    """The stage of difficulty in an epoch, counted from 0: one more every epochs_per_stage up to `end`; None: fixed."""
    return start if end is None else min(start + epoch // epochs_per_stage, end)


class StrokeDataset(Dataset):
    """Ink and its maps; the strokes grow harder as the epochs go by.

    Item `(epoch, index)` -> {"L": ink (1,S,S) in [0,1], "H": maps (8,S,S) packed as models.network_inktrace.pack does,
    "index": index, "key": "000000/3", "folder": "stroke_000000"}, all of (seed, epoch, first_sample + index).

    Args:
        num_samples: number of items of an epoch.
        img_size: side S of an image in pixels; the network takes 64.
        curriculum_stage: difficulty of the first epoch.
        curriculum_end: largest difficulty; null: that of the first epoch.
        epochs_per_stage: epochs until the difficulty grows by 1.
        first_sample: number of the first item; test sets take strokes that training never sees, e.g. from 1000000.
        legacy: mistakes of the original to repeat, names of LEGACY.
        name: KAIR's label of the dataset; not used.
        seed: seed of all strokes.
    Raises:
        ValueError: an impossible number, in one line.
    """

    def __init__(self, *, num_samples: PositiveInt = 10_000, img_size: Annotated[int, Range(ge=16)] = 64,
                 curriculum_stage: Stage = 0, curriculum_end: Stage | None = None,
                 epochs_per_stage: PositiveInt = 10, first_sample: NonNegativeInt = 0,
                 legacy: Sequence[str] = (), name: str | None = None, seed: Seed = 0):
        last = curriculum_stage if curriculum_end is None else curriculum_end
        if not 0 <= curriculum_stage <= last < len(STAGES):
            raise ValueError(f"curriculum_stage {curriculum_stage} and curriculum_end {curriculum_end} must lie in "
                             f"0..{len(STAGES) - 1} and rise")
        if min(num_samples, epochs_per_stage) < 1 or first_sample < 0 or img_size < 16:
            raise ValueError(f"num_samples {num_samples} and epochs_per_stage {epochs_per_stage} must be >= 1, "
                             f"first_sample {first_sample} >= 0, img_size {img_size} >= 16")
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


# What is drawn -----------------------------------------------------------------------------------------------------


def draw_strokes(rng: np.random.Generator, stage: int, size: int = 64) -> np.ndarray:
    """Segments (K,11) of one picture of this difficulty, in the order in which they are drawn."""
    paths, segments = STAGES[stage]
    starts = rng.uniform(0.1 * size, 0.9 * size, (rng.integers(paths[0], paths[1] + 1), 2))
    if segments == (1, 1):
        starts = starts[np.argsort(starts[:, 1], kind="stable")]  # as one writes: later ones lie on top
    return np.array([row for start in starts
                     for row in draw_path(rng, start, int(rng.integers(segments[0], segments[1] + 1)), stage, size)])


def draw_path(rng: np.random.Generator, start: np.ndarray, num_segments: int, stage: int,
              size: int) -> list[np.ndarray]:
    """Segments that go on smoothly from one another, rows of 11."""
    rows, tangent = [], None
    for _ in range(num_segments):
        row = draw_segment(rng, start, tangent, stage, size)
        rows.append(row)
        start = row[6:8]
        tangent = unit(row[6:8] - row[4:6])
    return rows


def draw_segment(rng: np.random.Generator, start: np.ndarray, tangent: np.ndarray | None, stage: int,
                 size: int) -> np.ndarray:
    """The first of ten random curves that stays inside the margin, else a short straight one.

    Args: start: (2,). tangent: (2,) unit vector at the end of the segment before, or None.
    """
    shortest, longest = (0.3 * size, 0.8 * size) if stage == 0 else (0.12 * size, 0.35 * size)
    low, high = MARGIN, size - MARGIN
    first = np.clip(start, low, high)
    draws = rng.random((TRIES, 6))  # all tries at once; unused ones cost less than a loop
    length = shortest + (longest - shortest) * draws[:, 0]
    if tangent is None:
        angle = 2 * math.pi * draws[:, 1]
        leaving = angle + math.pi / 2 * (draws[:, 2] - 0.5)  # the chord, turned by up to 45 degrees
    else:
        leaving = np.full(TRIES, math.atan2(tangent[1], tangent[0]))
        angle = leaving + math.pi / 1.5 * (draws[:, 1] - 0.5)  # turned by up to 60 degrees
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
    return vector / max(math.hypot(*vector), 1e-6)


def towards(angle: np.ndarray) -> np.ndarray:
    """(K,) -> unit vectors (K,2)"""
    return np.stack([np.cos(angle), np.sin(angle)], axis=1)


# From strokes to maps ----------------------------------------------------------------------------------------------


def rasterise(strokes: np.ndarray | Tensor, size: int = 64, legacy: Sequence[str] = ()) -> dict[str, Tensor]:
    """Ink and maps of segments; where they cross, the later one counts.

    Args: strokes: (K,11). size: S. legacy: names of LEGACY.
    Returns: float32 maps (C,S,S): image, skeleton and width (1 channel), in [0,1], [0,1] and tenths of pixels;
        tangent (2): cos and sin of twice the angle, so that a stroke has no direction; offset (2): from the middle of
        the pixel to the line, in pixels; keypoints (2): ends of paths, joints of segments.
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
    """Points (N,2) of the segments (N,11) or (K,1,11) at t."""
    weights = np.stack([(1 - t) ** 3, 3 * (1 - t) ** 2 * t, 3 * (1 - t) * t**2, t**3], axis=-1)  # (..., 4)
    return np.einsum("...p,...pc->...c", weights, strokes[..., :8].reshape(*strokes.shape[:-1], 4, 2))


def width_at(strokes: np.ndarray, t: np.ndarray) -> np.ndarray:
    begin, middle, end = np.moveaxis(strokes[..., 8:], -1, 0)
    return (1 - t) ** 2 * begin + 2 * (1 - t) * t * middle + t**2 * end


def along(strokes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """About two points a pixel: where (N,2), derivative (N,2) and width (N,), segment after segment."""
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
    """(2,S,S): where paths start and end; where one segment goes on from another, but not also an end.

    Segments belong to one path if one starts where the one before ends. The original allows a pixel between them, so
    that strokes which happen to follow each other count as joined.
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
    """Ink (1,S,S): discs along each segment on a canvas of twice the size, shrunk.

    A row of a disc is an interval: counting where they begin and end tells which pixels lie in any, far fewer than
    asking each pixel about each disc.
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
    cells, line = side * (side + 1), rows * (side + 1)  # one more column, where intervals that touch the border end
    changes = np.bincount((line + begin)[inside], minlength=cells) - np.bincount((line + end)[inside], minlength=cells)
    ink = changes.cumsum().reshape(side, side + 1)[:, :side] > 0
    return ink.reshape(size, 2, size, 2).mean((1, 3), dtype=np.float32)[None]
