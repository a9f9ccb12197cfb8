"""Pictures of three styles that are drawn, not read: the same kind of scene as a drawing, at dusk and as old print.

No picture exists in two styles: what a style adds must be learnt from other scenes. Source: own, on the scenes of
`data.synthetic`. Legend: H W pixels; a picture is (3,H,W) float32 RGB in [0,1].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from data.sampler import sample_rng
from data.synthetic import draw_scene, render
from runtime.ranges import NonNegativeInt, PositiveInt, Seed

LUMA = np.array([0.299, 0.587, 0.114], np.float32)[:, None, None]


def plain(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """As it is drawn: many colours, bright."""
    return picture


def dusk(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Dark and blue, with warm lights where it was brightest."""
    light = (picture * LUMA).sum(0, keepdims=True)
    shade = np.array([0.05, 0.1, 0.28], np.float32)[:, None, None]
    colour = np.array([0.25, 0.35, 0.6], np.float32)[:, None, None]
    glow = np.array([0.85, 0.5, 0.05], np.float32)[:, None, None]
    return shade + colour * (0.6 * light + 0.25 * picture) + glow * np.clip(2.5 * light - 1.5, 0, 1)


def print_(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Brown ink on yellowed paper, in lines of a random phase."""
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
    """`pictures(style, number)` -> (3,size,size) uint8, a function of (seed, style, number).

    Args:
        styles: names of the styles to draw, of plain, dusk, print; None: all.
        num_images: number of pictures of each style.
        first_image: number of the first picture; test sets take others than training.
        size: side of a picture in pixels.
        seed: seed of all pictures.
    Raises:
        ValueError: an unknown style, an impossible number.
    """

    def __init__(self, *, styles: Sequence[str] | None = None, num_images: PositiveInt = 64,
                 first_image: NonNegativeInt = 0, size: PositiveInt = 64, seed: Seed = 0):
        self.styles = list(STYLES) if styles is None else list(styles)
        if unknown := [style for style in self.styles if style not in STYLES]:
            raise ValueError(f"generated: unknown style {unknown[0]!r}; valid: {', '.join(STYLES)}")
        if num_images < 1 or first_image < 0 or size < 16:
            raise ValueError(f"generated: num_images {num_images} must be >= 1, first_image {first_image} >= 0, "
                             f"size {size} >= 16")
        self.num_images, self.first_image, self.size, self.seed = num_images, first_image, size, seed

    def __call__(self, style: str, number: int) -> np.ndarray:
        rng = sample_rng(self.seed, list(STYLES).index(style), self.first_image + number)
        picture = render(draw_scene(rng, (self.size, self.size)), np.zeros(1))[0].numpy().astype(np.float32) / 255
        return np.rint(np.clip(STYLES[style](picture, rng), 0, 1) * 255).astype(np.uint8)
