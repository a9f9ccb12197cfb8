"""Drawn video and pictures: textured shapes under a drifting camera, for training without a download.

Every edge is anti-aliased analytically from a signed distance, so that motion has sub-pixel precision. Source: the
distances are first-order forms (Quilez, 2D distance functions).
Legend: T frames, H W pixels, h w pixels of a box that a sprite touches. Lengths are pixels, angles radians,
u v the coordinates of a point in the frame of a sprite (or of the ground), whose outline is where distance = 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from data.degradation import build_degradation
from data.sampler import Key, sample_rng
from data.transforms import augment, split_key, to_float
from runtime.ranges import NonNegativeInt, PositiveInt, Range, Seed, checked

TILT, ZOOM, SHADE = 0.10, 0.08, 4.0  # largest tilt and zoom of the camera; width of the shade around a sprite
LIFETIME = 256  # number of frames of a clip at which an item may start


class SyntheticVideoDataset(Dataset):
    """Draw successive frames of clips and degrade them; each epoch starts elsewhere in a clip.

    Item `(epoch, index)` -> {"L": (T,3,H/scale,W/scale), "H": (T,3,H,W) float32 RGB in [0,1] of 8-bit values,
    "key": "clip_000/00000000", "folder": "clip_000", "lq_path": T such names with .png}.
    The content of a clip depends on (seed, first_clip + index), its start and flips on the epoch, too.

    Args:
        num_clips: number of items.
        num_frame: number T of frames of an item.
        gt_size: side of H in pixels, or [height, width], at least 16; multiples of scale.
        scale: H pixels per L pixel.
        first_clip: number of the first clip; test sets use others than training, e.g. from 100000.
        use_hflip: mirror left-right with probability 1/2.
        use_rot: flip upside down, and (if square) transpose, each with probability 1/2.
        degradation: options of `data.resize.Degradation`, or of `SecondOrder` with type second_order, which computes
            L from H.
        name: label of the dataset, without effect.
        seed: seed of all clips.
    Raises: ValueError: a size or number is invalid.
    """

    @checked
    def __init__(self, *, num_clips: PositiveInt = 256, num_frame: PositiveInt = 6,
                 gt_size: PositiveInt | Sequence[PositiveInt] = 128, scale: PositiveInt = 4,
                 first_clip: NonNegativeInt = 0, use_hflip: bool = True, use_rot: bool = True,
                 degradation: dict | None = None, name: str | None = None, seed: Seed = 0):
        size = (gt_size, gt_size) if isinstance(gt_size, int) else tuple(gt_size)
        if len(size) != 2 or any(side < 16 or side % scale for side in size):
            raise ValueError(f"gt_size {gt_size} must be a side or [height, width], each >= 16 and a multiple of "
                             f"scale {scale}")
        self.num_clips, self.first_clip, self.seed = num_clips, first_clip, seed
        self.num_frame, self.size = num_frame, size
        self.use_hflip, self.use_rot = use_hflip, use_rot
        self.degradation = build_degradation(scale, degradation)

    def __len__(self) -> int:
        return self.num_clips

    def __getitem__(self, key: Key | int) -> dict[str, Tensor | str | list[str]]:
        epoch, index = split_key(key, len(self))
        clip = self.first_clip + index
        rng = sample_rng(self.seed, epoch, clip)
        content = sample_rng(self.seed, 0, clip, 0)  # a separate stream, equal in each epoch
        frames = render(draw_scene(content, self.size), int(rng.integers(LIFETIME)) + np.arange(self.num_frame))
        lq, gt = augment([self.degradation(frames, rng), frames], rng, self.use_hflip, self.use_rot)
        folder = f"clip_{clip:03d}"
        return {"L": to_float(lq), "H": to_float(gt), "key": f"{folder}/{0:08d}", "folder": folder,
                "lq_path": [f"{folder}/{frame:08d}.png" for frame in range(self.num_frame)]}


class SyntheticImageDataset(Dataset):
    """Draw pictures and short clips, in the format of image folders.

    Item `(epoch, index)` -> {"H": (D,H,W,C) uint8, "key", "folder": "image_000"}, D = num_images * num_frame.
    The content depends on (seed, first_image + index), flips on the epoch, too. Pictures are drawn once and kept in
    memory; clips start elsewhere in each epoch.

    Args:
        num_samples: number of items.
        size: side of the pictures in pixels.
        num_images: number of scenes in an item.
        num_frame: number of successive frames of each scene; 1: a still picture.
        first_image: number of the first scene; test sets use others than training, e.g. from 100000.
        n_channels: channels of a picture, 3 for RGB, 1 for grey.
        use_hflip: mirror left-right with probability 1/2.
        use_rot: flip upside down, and transpose, each with probability 1/2.
        seed: seed of all scenes.
    Raises: ValueError: a size or number is out of range.
    """

    @checked
    def __init__(self, *, num_samples: PositiveInt = 512, size: Annotated[int, Range(ge=16)] = 64,
                 num_images: PositiveInt = 1, num_frame: PositiveInt = 1, first_image: NonNegativeInt = 0,
                 n_channels: Literal[1, 3] = 3, use_hflip: bool = True, use_rot: bool = False, seed: Seed = 0):
        self.num_samples, self.first_image, self.seed = num_samples, first_image, seed
        self.num_images, self.num_frame, self.size, self.n_channels = num_images, num_frame, size, n_channels
        self.use_hflip, self.use_rot = use_hflip, use_rot
        self.drawn: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, key: Key | int) -> dict[str, Tensor | str]:
        epoch, index = split_key(key, len(self))
        first = self.first_image + index * self.num_images
        rng = sample_rng(self.seed, epoch, first)
        start = int(rng.integers(LIFETIME)) if self.num_frame > 1 else 0
        pictures = torch.cat([self._scene(first + i, start) for i in range(self.num_images)])  # (D,3,H,W)
        (pictures,) = augment([as_channels(pictures, self.n_channels)], rng, self.use_hflip, self.use_rot)
        name = f"image_{first:03d}"
        return {"H": pictures.permute(0, 2, 3, 1).contiguous(), "key": name, "folder": name}

    def _scene(self, number: int, start: int) -> Tensor:
        """Return the frames (num_frame,3,H,W) uint8 of a scene."""
        if number not in self.drawn:
            content = sample_rng(self.seed, 0, number, 0)  # a separate stream, equal in each epoch
            times = start + np.arange(self.num_frame)
            picture = render(draw_scene(content, (self.size, self.size)), times)
            if self.num_frame > 1:
                return picture
            self.drawn[number] = picture
        return self.drawn[number]


def as_channels(pictures: Tensor, n_channels: int) -> Tensor:
    """Convert (...,3,H,W) uint8 RGB to one channel, the full-range luma of BT.601 as in JPEG, or keep three."""
    if n_channels == 3:
        return pictures
    red, green, blue = pictures.float().unbind(-3)
    return (0.299 * red + 0.587 * green + 0.114 * blue).round().to(torch.uint8).unsqueeze(-3)


# Scenes ------------------------------------------------------------------------------------------------------------

class Texture(NamedTuple):
    """Describe a pattern of two colours."""

    kind: str
    period: float
    angle: float
    duty: float  # fraction of the second colour along a period
    colours: np.ndarray  # (2,3)


class Sprite(NamedTuple):
    """Describe a flat shape that drifts and spins."""

    shape: str
    half: np.ndarray  # (2,) half width and height
    corners: np.ndarray  # (5,2) in [-1,1]: corners of a stroke
    texture: Texture
    outline: float  # width of the rim in the second colour, 0 for none
    position: np.ndarray  # (2,) x y at time 0
    velocity: np.ndarray  # (2,) per frame
    angle: float
    spin: float  # per frame
    depth: float  # factor of the camera's drift: near sprites pass faster


class Scene(NamedTuple):
    """Describe sprites from back to front on an endless ground; sprites repeat every `world` pixels, out of sight."""

    size: tuple[int, int]
    world: np.ndarray  # (2,) x y
    sprites: list[Sprite]
    ground: tuple[Texture, Texture]
    drift: np.ndarray  # (2,) of the camera per frame
    sway: np.ndarray  # (2,2) rate per frame and phase of the camera's tilt and of its zoom


def draw_scene(rng: np.random.Generator, size: tuple[int, int]) -> Scene:
    """Draw a random scene for pictures of size (H,W)."""
    view = np.array(size[::-1], float)  # x y
    largest = 0.27 * view.min()
    reach = (view + TILT * view[::-1]) * (1 + ZOOM) / 2  # farthest point seen from the camera, per axis
    world = 2 * (reach + 1.5 * largest + SHADE)
    palette = draw_palette(rng)
    number = int(12 * world.prod() / view.prod())  # about 12 in sight
    sprites = [draw_sprite(rng, palette, largest, world, layer / number) for layer in range(number)]
    ground = (draw_texture(rng, palette[:2], ("stripes", "checker", "grid", "bricks", "dots"), (14, 40)),
              draw_texture(rng, palette[1:3], ("waves",), (40, 90)))
    sway = np.stack([rng.uniform(0.04, 0.1, 2), rng.uniform(0, 2 * math.pi, 2)], axis=1)
    return Scene(size, world, sprites, ground, rng.uniform(-1.5, 1.5, 2), sway)


def draw_palette(rng: np.random.Generator) -> np.ndarray:
    """Draw colours (9,3): three muted ones for the ground, four of few hues, a light and a dark one."""
    hue = rng.random() + np.array([0, 0.02, 0.06, 0.08, 0.42, 0.5, 0.58, 0.1, 0.5]) + rng.normal(0, 0.02, 9)
    saturation = np.concatenate([rng.uniform(0.1, 0.45, 3), rng.uniform(0.45, 0.95, 4), [0.06, 0.4]])
    value = np.concatenate([rng.uniform(0.35, 0.8, 3), rng.uniform(0.4, 0.9, 4), [0.92, 0.15]])
    wheel = np.clip(np.abs((hue[:, None] + np.array([0, 2, 1]) / 3) % 1 * 6 - 3) - 1, 0, 1)
    return value[:, None] * (1 - saturation[:, None] * (1 - wheel))


def draw_texture(rng: np.random.Generator, colours: np.ndarray, kinds: Sequence[str],
                 periods: tuple[float, float]) -> Texture:
    """Draw a texture of one of these kinds, with a period in pixels of this range."""
    period = periods[0] * (periods[1] / periods[0]) ** rng.random()  # log-uniform
    return Texture(pick(rng, kinds), period, math.pi * rng.random(), 0.25 + 0.4 * rng.random(), colours)


def draw_sprite(rng: np.random.Generator, palette: np.ndarray, largest: float, world: np.ndarray,
                nearness: float) -> Sprite:
    """Draw a sprite; those in front (nearness towards 1) are smaller, so that none covers the picture."""
    shape = pick(rng, tuple(SHAPES))
    first = 3 + int(6 * rng.random())
    second = 3 + (first - 2 + int(5 * rng.random())) % 6  # a different one
    contrast = 0.3 + 0.6 * rng.random()
    colours = np.stack([palette[first], palette[first] + contrast * (palette[second] - palette[first])])
    size = largest * (1 - 0.75 * nearness) * (0.6 + 0.4 * rng.random())
    return Sprite(
        shape=shape,
        half=size * np.array([1, 0.45 + 0.55 * rng.random()]),
        corners=rng.integers(-1, 2, (5, 2)) * 0.85,  # on a 3 x 3 grid, like letters
        texture=draw_texture(rng, colours, tuple(PATTERNS), (9, 28)),
        outline=max(0.0, 4 * rng.random() - 2),
        position=world * rng.random(2),
        velocity=rng.normal(0, 0.6, 2),
        angle=2 * math.pi * rng.random(),
        spin=0.02 * rng.normal(),
        depth=0.7 + 0.6 * nearness,
    )


def pick(rng: np.random.Generator, names: Sequence[str]) -> str:
    """Draw one of the names."""
    return names[int(rng.random() * len(names))]


# Shapes: signed distance to the outline, negative inside -----------------------------------------------------------

def box(u: np.ndarray, v: np.ndarray, sprite: Sprite) -> np.ndarray:
    """Return the distance to a rectangle."""
    return np.maximum(np.abs(u) - sprite.half[0], np.abs(v) - sprite.half[1])


def ellipse(u: np.ndarray, v: np.ndarray, sprite: Sprite) -> np.ndarray:
    """Return the distance to an ellipse."""
    a, b = sprite.half
    level = np.sqrt((u / a) ** 2 + (v / b) ** 2) + 1e-6  # 1e-6 avoids 0 / 0 in the centre
    return level * (level - 1) / (np.sqrt((u / a**2) ** 2 + (v / b**2) ** 2) + 1e-6 / b)


def ring(u: np.ndarray, v: np.ndarray, sprite: Sprite) -> np.ndarray:
    """Return the distance to an elliptic ring."""
    width = 0.15 * sprite.half[1] + 0.7
    return np.abs(ellipse(u, v, sprite) + width) - width


def polygon(corners: int) -> Callable[[np.ndarray, np.ndarray, Sprite], np.ndarray]:
    """Return the function of the distance to a regular polygon, stretched to the sprite."""
    def distance(u: np.ndarray, v: np.ndarray, sprite: Sprite) -> np.ndarray:
        result = np.float32(-np.inf)
        for edge in range(corners):
            x, y = np.array([math.cos(2 * math.pi * edge / corners), math.sin(2 * math.pi * edge / corners)])
            steepness = math.hypot(x / sprite.half[0], y / sprite.half[1])
            p, q = x / sprite.half[0] / steepness, y / sprite.half[1] / steepness  # unit normal of the edge
            result = np.maximum(result, u * p + v * q - math.cos(math.pi / corners) / steepness)
        return result

    return distance


def strokes(u: np.ndarray, v: np.ndarray, sprite: Sprite) -> np.ndarray:
    """Return the distance to a bent line."""
    points = sprite.corners * sprite.half
    result = np.float32(np.inf)
    for (x, y), (dx, dy) in zip(points, np.diff(points, axis=0)):
        if dx or dy:
            along = np.clip(((u - x) * dx + (v - y) * dy) / (dx * dx + dy * dy), 0, 1)
            result = np.minimum(result, (u - x - along * dx) ** 2 + (v - y - along * dy) ** 2)
    return np.sqrt(result) - (0.09 * sprite.half[1] + 0.8)


SHAPES = {"box": box, "ellipse": ellipse, "ring": ring, "triangle": polygon(3), "pentagon": polygon(5),
          "strokes": strokes}


# Patterns: fraction of the second colour, 0..1 --------------------------------------------------------------------

def bands(x: np.ndarray, period: float, width: float) -> np.ndarray:
    """Return anti-aliased bands of a width around the multiples of a period."""
    return np.clip(width / 2 + 0.5 - off_centre(x, period), 0, 1)


def off_centre(x: np.ndarray, period: float) -> np.ndarray:
    """Return the distance to the nearest multiple of a period."""
    turns = x * (1 / period)
    return np.abs(turns - np.rint(turns)) * period


def stripes(u: np.ndarray, v: np.ndarray, texture: Texture) -> np.ndarray:
    """Draw parallel bands."""
    return bands(u, texture.period, texture.duty * texture.period)


def checker(u: np.ndarray, v: np.ndarray, texture: Texture) -> np.ndarray:
    """Draw a checkerboard."""
    a, b = (bands(x, texture.period, texture.period / 2) for x in (u, v))
    return a + b - 2 * a * b


def grid(u: np.ndarray, v: np.ndarray, texture: Texture) -> np.ndarray:
    """Draw crossing lines."""
    return np.maximum(*(bands(x, texture.period, 0.6 + 0.1 * texture.period) for x in (u, v)))


def bricks(u: np.ndarray, v: np.ndarray, texture: Texture) -> np.ndarray:
    """Draw a brick wall."""
    row = texture.period / 2
    shifted = u + np.rint(v * (1 / row) - 0.5) * row  # every second row by half a brick
    gap = 0.6 + 0.05 * texture.period
    return np.maximum(bands(shifted, texture.period, gap), bands(v, row, gap))


def dots(u: np.ndarray, v: np.ndarray, texture: Texture) -> np.ndarray:
    """Draw discs on a grid."""
    distance = np.hypot(off_centre(u, texture.period), off_centre(v, texture.period))
    return np.clip(texture.duty * texture.period / 2 + 1 - distance, 0, 1)


def waves(u: np.ndarray, v: np.ndarray, texture: Texture) -> np.ndarray:
    """Draw bent bands with soft borders."""
    k = 2 * math.pi / texture.period
    return 0.5 + 0.5 * np.sin(k * u + 1.5 * np.sin(0.6 * k * v))


def gradient(u: np.ndarray, v: np.ndarray, texture: Texture) -> np.ndarray:
    """Draw a linear gradient."""
    return np.clip(0.5 + u * (1 / (4 * texture.period)), 0, 1)


PATTERNS = {"stripes": stripes, "checker": checker, "grid": grid, "bricks": bricks, "dots": dots, "waves": waves,
            "gradient": gradient}


# From a scene to pictures ------------------------------------------------------------------------------------------

def render(scene: Scene, times: np.ndarray) -> Tensor:
    """Draw a scene at times (T,) in frames, as (T,3,H,W) uint8 RGB."""
    height, width = scene.size
    view, middle = np.array([width, height]), np.array([width - 1, height - 1]) / 2  # x y
    tilt, zoom = np.sin(np.outer(scene.sway[:, 0], times) + scene.sway[:, 1:])
    camera = rotation(TILT * tilt) / (1 + ZOOM * zoom)[:, None, None]  # (T,2,2): offset on screen -> in the world
    to_screen = np.linalg.inv(camera)
    travelled = np.outer(times, scene.drift)  # (T,2)
    canvas = paint_ground(scene, camera, middle - np.einsum("tij,tj->ti", to_screen, travelled))

    offsets = np.stack([s.position + np.outer(times, s.velocity) - s.depth * travelled for s in scene.sprites])
    offsets = offsets % scene.world - scene.world / 2  # (S,T,2) relative to the camera, modulo the world
    centres = middle + np.einsum("tij,stj->sti", to_screen, offsets)
    radii = np.array([radius(s) + SHADE + 1 for s in scene.sprites])[:, None, None] * (1 + ZOOM)
    low, high = np.floor(centres - radii).astype(int), np.ceil(centres + radii).astype(int) + 1
    seen = ((high > 0) & (low < view)).all(2)  # (S,T)
    for i in np.flatnonzero(seen.any(1)):
        sprite = scene.sprites[i]
        left, top = np.maximum(low[i, seen[i]].min(0), 0)
        right, bottom = np.minimum(high[i, seen[i]].max(0), view)
        matrix = rotation(-sprite.angle - sprite.spin * times) @ camera
        u, v = coordinates(matrix, centres[i], np.arange(left, right), np.arange(top, bottom))
        paint_sprite(canvas[..., top:bottom, left:right], sprite, u, v)
    return torch.from_numpy(np.rint(canvas * 255).astype(np.uint8))


def rotation(angles: np.ndarray) -> np.ndarray:
    """Return rotation matrices (T,2,2) of angles (T,)."""
    cos, sin = np.cos(angles), np.sin(angles)
    return np.stack([np.stack([cos, -sin], -1), np.stack([sin, cos], -1)], -2)


def coordinates(matrix: np.ndarray, origin: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return u, v (T,h,w) float32 of pixels x (w,), y (h,): matrix (T,2,2) times the offset from origin (T,2)."""
    x, y = x - origin[:, :1], y - origin[:, 1:]  # (T,w), (T,h)
    along_x = (matrix[:, :, :1] * x[:, None]).astype(np.float32)  # (T,2,w)
    along_y = (matrix[:, :, 1:] * y[:, None]).astype(np.float32)  # (T,2,h)
    u, v = ((along_x[:, i, None, :] + along_y[:, i, :, None]) for i in (0, 1))
    return u, v


def paint_ground(scene: Scene, camera: np.ndarray, origin: np.ndarray) -> np.ndarray:
    """Draw the ground (T,3,H,W) float32 in [0,1]: a pattern under soft veins, with its origin (T,2) on screen."""
    (height, width), (pattern, veins) = scene.size, scene.ground
    u, v = coordinates(camera, origin, np.arange(width), np.arange(height))
    canvas = np.zeros((len(origin), 3, height, width), np.float32)
    for opacity, texture in ((1, pattern), (0.45, veins)):
        blend(canvas, np.float32(1 - opacity), np.float32(opacity), share_of(u, v, texture), texture)
    return canvas


def paint_sprite(canvas: np.ndarray, sprite: Sprite, u: np.ndarray, v: np.ndarray) -> None:
    """Blend a sprite and its shade into canvas (T,3,h,w) in place."""
    distance = SHAPES[sprite.shape](u, v, sprite)  # (T,h,w)
    share = share_of(u, v, sprite.texture)
    if sprite.outline:
        share = np.maximum(share, np.clip(distance + (sprite.outline + 0.5), 0, 1))
    opacity = np.clip(0.5 - distance, 0, 1)
    around = np.maximum(distance, np.sqrt(u * u + v * v) - radius(sprite))  # no spikes of the shade at sharp corners
    shade = 1 - 0.35 * np.clip(1 - around * (1 / SHADE), 0, 1)
    blend(canvas, shade * (1 - opacity), opacity, share, sprite.texture)


def radius(sprite: Sprite) -> float:
    """Return the radius of the circle around a sprite."""
    return float(np.hypot(*sprite.half))


def share_of(u: np.ndarray, v: np.ndarray, texture: Texture) -> np.ndarray:
    """Return the fraction of the second colour of a texture at u, v (T,h,w)."""
    cos, sin = math.cos(texture.angle), math.sin(texture.angle)
    return PATTERNS[texture.kind](u * cos + v * sin, v * cos - u * sin, texture)


def blend(canvas: np.ndarray, kept: np.ndarray, opacity: np.ndarray, share: np.ndarray, texture: Texture) -> None:
    """Set canvas (T,3,h,w) to kept * canvas + opacity * colour of the texture at `share`, in place."""
    share = opacity * share
    for channel, (first, second) in enumerate(texture.colours.T.tolist()):
        plane = canvas[:, channel]
        plane *= kept
        plane += first * opacity
        plane += (second - first) * share
