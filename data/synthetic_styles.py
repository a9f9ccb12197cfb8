"""Drawn pictures of three styles: scenes of `data.synthetic` as they are, at dusk, and as old print.

No scene exists in two styles. Legend: H W pixels; a picture is (3,H,W) float32 RGB in [0,1].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated

import numpy as np

from data.sampler import sample_rng
from data.synthetic import draw_scene, render
from runtime.ranges import NonNegativeInt, PositiveInt, Range, Seed, checked

LUMA = np.array([0.299, 0.587, 0.114], np.float32)[:, None, None]


def plain(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the picture unchanged."""
    return picture


def dusk(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Darken the picture towards blue, with warm lights at its brightest places."""
    light = (picture * LUMA).sum(0, keepdims=True)
    shade = np.array([0.05, 0.1, 0.28], np.float32)[:, None, None]
    colour = np.array([0.25, 0.35, 0.6], np.float32)[:, None, None]
    glow = np.array([0.85, 0.5, 0.05], np.float32)[:, None, None]
    return shade + colour * (0.6 * light + 0.25 * picture) + glow * np.clip(2.5 * light - 1.5, 0, 1)


def print_(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Print the picture in brown ink on yellow paper, in lines of random phase."""
    dark = 1 - (picture * LUMA).sum(0, keepdims=True)
    rows, columns = np.mgrid[: picture.shape[1], : picture.shape[2]].astype(np.float32)
    lines = 0.5 + 0.5 * np.sin((rows + columns) * (np.pi / 2) + np.float32(rng.uniform(0, 2 * np.pi)))
    ink = np.clip(1.5 * dark - 0.55 * lines, 0, 1)
    paper = np.array([0.95, 0.87, 0.68], np.float32)[:, None, None]
    brown = np.array([0.3, 0.16, 0.07], np.float32)[:, None, None]
    return paper + (brown - paper) * ink


STYLES: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
    "plain": plain, "dusk": dusk, "print": print_}


class DrawnStyles:
    """Draw pictures (3,size,size) uint8 as a function of (seed, style, number).

    Args:
        styles: names of styles among plain, dusk and print; None: all.
        num_images: number of pictures of each style.
        first_image: number of the first picture; test sets use others than training.
        size: side of a picture in pixels.
        seed: seed of all pictures.
    Raises: ValueError: a style is unknown, or a number out of range.
    """

    @checked
    def __init__(self, *, styles: Sequence[str] | None = None, num_images: PositiveInt = 64,
                 first_image: NonNegativeInt = 0, size: Annotated[int, Range(ge=16)] = 64, seed: Seed = 0):
        self.styles = list(STYLES) if styles is None else list(styles)
        if unknown := [style for style in self.styles if style not in STYLES]:
            raise ValueError(f"generated: unknown style {unknown[0]!r}; valid: {', '.join(STYLES)}")
        self.num_images, self.first_image, self.size, self.seed = num_images, first_image, size, seed

    def __call__(self, style: str, number: int) -> np.ndarray:
        rng = sample_rng(self.seed, list(STYLES).index(style), self.first_image + number)
        picture = render(draw_scene(rng, (self.size, self.size)), np.zeros(1))[0].numpy().astype(np.float32) / 255
        return np.rint(np.clip(STYLES[style](picture, rng), 0, 1) * 255).astype(np.uint8)
