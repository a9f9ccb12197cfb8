"""Drawn aerial images of fields and buildings with their masks, for training without a download.

Fields are strips with furrows and hedges, crossed by a road, with trees and shadows. Buildings are rectangles or
L-shapes with a roof lit from one side; masks show them.
Legend: H W pixels; u v the coordinates of a point in the frame of a building, lengths in pixels, angles in radians.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from data.sampler import Key, sample_rng
from data.transforms import split_key
from runtime.ranges import NonNegativeInt, PositiveInt, Range, Seed, checked

GROUND, BUILDING, ROAD = 0, 1, 2


class SyntheticMaskDataset(Dataset):
    """Draw images and masks as a function of (seed, first_image + index).

    Item `(epoch, index)` -> (image (3,H,W) uint8 RGB, mask (H,W) uint8 class ids, name); equal in every epoch.

    Args:
        num_images: number of items.
        image_size: side of image and mask in pixels.
        first_image: number of the first image; test sets use others than training, e.g. from 100000.
        num_classes: number of classes; 1 or 2: buildings and background, 3: roads, too.
        seed: seed of all images.
    Raises: ValueError: a number is out of range.
    """

    @checked
    def __init__(self, *, num_images: PositiveInt = 256, image_size: Annotated[int, Range(ge=16)] = 64,
                 first_image: NonNegativeInt = 0, num_classes: Literal[1, 2, 3] = 2, seed: Seed = 0):
        self.num_images, self.size, self.first, self.seed = num_images, image_size, first_image, seed
        self.roads = num_classes == 3

    def __len__(self) -> int:
        return self.num_images

    def __getitem__(self, key: Key | int) -> tuple[Tensor, Tensor, str]:
        number = self.first + split_key(key, len(self))[1]
        image, mask = draw(sample_rng(self.seed, 0, number), self.size)
        if not self.roads:
            mask[mask == ROAD] = GROUND
        return torch.from_numpy(image), torch.from_numpy(mask), f"drawn_{number:06d}"


def draw(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw an image (3,H,W) uint8 and its mask (H,W) uint8 of GROUND, BUILDING, ROAD."""
    y, x = np.mgrid[:size, :size].astype(np.float32)
    canvas, mask = draw_fields(rng, x, y), np.zeros((size, size), np.uint8)
    if rng.random() < 0.6:
        draw_road(rng, x, y, canvas, mask)
    for _ in range(rng.integers(3, 9)):
        draw_tree(rng, x, y, canvas)
    sun = rng.uniform(0, 2 * math.pi)
    for _ in range(rng.integers(2, 7)):
        draw_building(rng, x, y, canvas, mask, sun)
    canvas += rng.normal(0, 0.02, canvas.shape)
    return np.rint(canvas.clip(0, 1) * 255).astype(np.uint8), mask


def draw_fields(rng: np.random.Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Draw strips with colours, furrows and borders, (3,H,W)."""
    size = len(x)
    u, v = turned(x - size / 2, y - size / 2, rng.uniform(0, math.pi))
    width = rng.uniform(0.25, 0.5) * size
    bend = 0.04 * size * np.sin(v / (0.2 * size) + rng.uniform(0, 6))
    strip = np.floor((u + bend) / width).astype(int)
    cells = strip * 2 + (v > rng.uniform(-0.3, 0.3) * size)
    cells -= cells.min()
    number = cells.max() + 1
    green = rng.uniform(0, 1, (number, 1))
    colours = green * (0.30, 0.48, 0.20) + (1 - green) * (0.62, 0.52, 0.32) + rng.normal(0, 0.05, (number, 3))
    period, angle = rng.uniform(3, 8, number), rng.uniform(0, math.pi, number)
    phase = (x * np.cos(angle)[cells] + y * np.sin(angle)[cells]) * (2 * math.pi / period)[cells]
    furrows = 0.05 * rng.random(number)[cells] * np.sin(phase)
    hedge = np.abs(((u + bend) / width) % 1 - 0.5) > 0.5 - 0.7 / width
    return np.where(hedge, 0.6, 1) * (colours.T[:, cells] + furrows)


def draw_road(rng: np.random.Generator, x: np.ndarray, y: np.ndarray, canvas: np.ndarray, mask: np.ndarray) -> None:
    """Draw a road in colours that roofs have, too, so that colour does not identify buildings."""
    size = len(x)
    u, v = turned(x - rng.uniform(0.2, 0.8) * size, y - rng.uniform(0.2, 0.8) * size, rng.uniform(0, math.pi))
    distance = np.abs(u + 0.05 * size * np.sin(v / (0.25 * size))) - rng.uniform(0.025, 0.05) * size
    paint(canvas, cover(distance), rng.uniform(0.4, 0.7) + rng.normal(0, 0.02, 3))
    mask[distance < 0] = ROAD


def draw_tree(rng: np.random.Generator, x: np.ndarray, y: np.ndarray, canvas: np.ndarray) -> None:
    """Draw a dark disc."""
    centre, radius = rng.uniform(0, len(x), 2), rng.uniform(0.02, 0.06) * len(x)
    distance = np.hypot(x - centre[0], y - centre[1]) - radius
    paint(canvas, cover(distance), np.array([0.12, 0.26, 0.10]) + rng.normal(0, 0.03, 3))


def draw_building(rng: np.random.Generator, x: np.ndarray, y: np.ndarray, canvas: np.ndarray, mask: np.ndarray,
                  sun: float) -> None:
    """Draw a building: its shadow, and its roof with one half in the light."""
    size = len(x)
    half = rng.uniform(0.06, 0.16, 2) * size
    centre, angle = rng.uniform(0.05, 0.95, 2) * size, rng.uniform(0, math.pi)
    wing = rng.uniform(0.4, 0.8, 2) * half if rng.random() < 0.4 else None
    roof = rng.choice([[0.62, 0.26, 0.20], [0.45, 0.45, 0.48], [0.80, 0.78, 0.74], [0.38, 0.30, 0.26]])
    roof = roof + rng.normal(0, 0.04, 3)
    height = rng.uniform(0.02, 0.05) * size

    def distance(dx: float, dy: float) -> tuple[np.ndarray, np.ndarray]:
        u, v = turned(x - centre[0] - dx, y - centre[1] - dy, angle)
        outside = box(u, v, half)
        if wing is not None:
            outside = np.minimum(outside, box(u - half[0], v - half[1] + wing[1], wing))
        return outside, v

    shadow, _ = distance(-height * math.cos(sun), -height * math.sin(sun))
    paint(canvas, 0.55 * cover(shadow), np.zeros(3))
    outline, v = distance(0, 0)
    light = 1 + 0.16 * math.cos(sun - angle) * np.tanh(v)
    paint(canvas, cover(outline), roof[:, None, None] * light)
    mask[outline < 0] = BUILDING


# ---------------------------------------------------------------- shapes


def turned(x: np.ndarray, y: np.ndarray, angle: float) -> tuple[np.ndarray, np.ndarray]:
    """Rotate coordinates by an angle."""
    return x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)


def box(u: np.ndarray, v: np.ndarray, half: np.ndarray) -> np.ndarray:
    """Return the signed distance to a rectangle, negative inside."""
    return np.maximum(np.abs(u) - half[0], np.abs(v) - half[1])


def cover(distance: np.ndarray) -> np.ndarray:
    """Return the coverage of pixels from signed distances."""
    return np.clip(0.5 - distance, 0, 1)


def paint(canvas: np.ndarray, opacity: np.ndarray, colour: np.ndarray) -> None:
    """Blend a colour (3,) or an image (3,H,W) into canvas (3,H,W) in place."""
    colour = colour[:, None, None] if colour.ndim == 1 else colour
    canvas += opacity * (colour - canvas)
