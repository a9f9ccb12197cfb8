"""Datasets of images and masks, paired by stem and split by seed, with random augmentation for training.

Source: mischiefliao/ResUNeta-Torch (options, augmentation, resizing). Differs: images without mask are an error that
lists them; the split is random, not the end of the sorted files; values of no class are an error; every draw comes
from `sample_rng(seed, epoch, index)`.
Legend: H W pixels, S = image_size, K classes. An image in memory is (3,H,W) uint8 RGB, a mask (H,W) uint8 class ids.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from data.folders import is_folder, list_folder, unsupported_files
from data.frames import read_frame
from data.image_files import EXTENSIONS, KINDS, MIN_SIDE, printable, read_levels, read_picture, size_of
from data.movie import frame_paths, is_video
from data.sampler import Key, sample_rng
from data.synthetic_masks import SyntheticMaskDataset
from data.transforms import build_drawn, split_key
from runtime.ranges import Fraction, ProperFraction, Range, Seed, checked

LISTED = 10  # names in a message
Side = Annotated[int, Range(ge=MIN_SIDE)]
Classes = Annotated[int, Range(ge=1, le=255)]
Ignored = Annotated[int, Range(ge=2, le=255)]
Threshold = Annotated[int, Range(ge=0, le=254)]
Angle = Annotated[float, Range(ge=0, le=180)]


class MaskDataset(Dataset):
    """Read pairs of images and masks; a subclass defines its part of the split and its augmentation.

    Args:
        image_path: folder of images (PNG, JPEG, WebP); None: drawn fields and buildings.
        gt_path: folder of masks, each with the stem of its image.
        generated: drawn images without image_path, e.g. {"num_images": 256}: arguments of `SyntheticMaskDataset`.
        image_size: side S in pixels to which images and masks are resized.
        num_classes: number K of classes; masks hold 0..K-1, with 1 or 2 classes also 0 and 255.
        ignore_index: value of ignored pixels in a mask; 255 is then not foreground. None: no pixel is ignored.
        mask_threshold: value of a mask with soft edges above which a pixel is class 1. None: other values are errors.
        validation_split: fraction of the images for validation, selected by seed and names, so that a new image moves
            hardly any other. 0: all train. 1: all validate.
        skip_unmatched: ignore images without mask and masks without image, instead of an error.
        multitask: add maps of boundary and distance, the targets of the conditioned head.
        seed: seed of the split, and with epoch and index of all draws.
    Raises: FileNotFoundError, ValueError: options, names of files or the first pair are invalid.
    """

    layout = """expected, with any names of files:
  FOLDER/
    images/           image_path: PNG, JPEG or WebP
      one.jpg
    masks/            gt_path: class ids, or 0 and 255, under the stem of their image
      one.png"""

    validates = False
    first_image = 0  # number of the first drawn image

    @checked
    def __init__(self, *, image_path: str | None = None, gt_path: str | None = None, generated: dict | None = None,
                 image_size: Side = 256, num_classes: Classes = 2, ignore_index: Ignored | None = None,
                 mask_threshold: Threshold | None = None, validation_split: Fraction = 0.2,
                 skip_unmatched: bool = False, multitask: bool = False, seed: Seed = 0):
        if ignore_index is not None and ignore_index < num_classes:
            raise ValueError(f"ignore_index {ignore_index} must be in {num_classes}..255: a value that no class has")
        if mask_threshold is not None and num_classes > 2:
            raise ValueError(f"mask_threshold {mask_threshold} needs num_classes 1 or 2, not {num_classes}")
        if (image_path is None) != (gt_path is None):
            missing, given = ("gt_path", image_path) if gt_path is None else ("image_path", gt_path)
            raise ValueError(f"{missing} is missing, though {given} is given; name its folder")
        self.size, self.num_classes, self.seed = image_size, num_classes, seed
        self.ignore_index, self.threshold, self.multitask = ignore_index, mask_threshold, multitask
        self.drawn = None
        if image_path is None:
            self.drawn = build_drawn(SyntheticMaskDataset, generated, {
                "image_size": image_size, "num_classes": num_classes, "first_image": self.first_image, "seed": seed})
            return
        pairs = paired(Path(image_path), Path(gt_path), skip_unmatched)
        kept = chosen(pairs, validation_split, seed)
        self.pairs = [pair for stem, pair in pairs.items() if (stem in kept) == self.validates]
        if not self.pairs:
            part, change = ("validation", "raise") if self.validates else ("training", "lower")
            raise ValueError(f"validation_split {validation_split} leaves none of the {len(pairs)} images of "
                             f"{image_path} for {part}; {change} it, or give more images")
        self.read(0)  # raises errors of size or values now, not in mid-epoch

    def __len__(self) -> int:
        return len(self.drawn or self.pairs)

    def sample_names(self) -> list[str]:
        """Return the stem of each image; [] for drawn ones."""
        return [] if self.drawn else [image.stem for image, _ in self.pairs]

    def read(self, index: int) -> tuple[Tensor, Tensor, str]:
        """Read and resize an image (3,S,S) and its mask (S,S) of class ids; return them with their stem."""
        from torchvision.transforms.v2 import InterpolationMode  # slow to import
        from torchvision.transforms.v2 import functional as T

        if self.drawn:
            image, mask, stem = self.drawn[index]
        else:
            (image_file, mask_file), stem = self.pairs[index], self.pairs[index][0].stem
            image = read_picture(str(image_file), MIN_SIDE)
            mask = read_mask(mask_file, self.num_classes, self.ignore_index, self.threshold)
            if image.shape[1:] != mask.shape:
                raise ValueError(f"{mask_file}: the mask is {size_of(mask)}, its image {image_file} {size_of(image)}; "
                                 "they must be equal")
        side = [self.size, self.size]
        return T.resize(image, side, antialias=True), T.resize(mask[None], side, InterpolationMode.NEAREST)[0], stem

    def item(self, image: Tensor, mask: Tensor, stem: str) -> dict[str, Tensor | str]:
        """Return the item of an image."""
        found = {"L": image.float() / 255, "H": mask.long(), "key": stem, "folder": stem}
        return found | tasks_of(mask.numpy(), self.num_classes) if self.multitask else found


class MaskTrainDataset(MaskDataset):
    """Load images for training, rotated, mirrored and relit at random.

    Item `(epoch, index)` -> {"L": (3,S,S) float32 RGB in [0,1], "H": (S,S) int64 class ids, "key", "folder": stem,
    "epoch", "num_samples"}, with multitask also {"boundary", "distance": (K,S,S) float32 in [0,1]}.

    Args: as `MaskDataset`, and
        use_hflip: mirror left-right with probability 1/2.
        use_vflip: mirror upside down with probability 1/2.
        use_rot90: rotate by 90 degrees with probability 1/2.
        brightness: largest relative change of brightness, applied with probability 0.2.
        contrast: largest relative change of contrast, applied with probability 0.2.
        max_angle: largest angle in degrees of a rotation about a random point, with a zoom of up to 1.25 in or out and
            reflected borders, as in the paper; 0: no rotation.
    """

    @checked
    def __init__(self, *, image_path: str | None = None, gt_path: str | None = None, generated: dict | None = None,
                 image_size: Side = 256, num_classes: Classes = 2, ignore_index: Ignored | None = None,
                 mask_threshold: Threshold | None = None, validation_split: Fraction = 0.2,
                 skip_unmatched: bool = False, multitask: bool = False, use_hflip: bool = True, use_vflip: bool = True,
                 use_rot90: bool = True, brightness: ProperFraction = 0.2,
                 contrast: ProperFraction = 0.2, max_angle: Angle = 0.0, seed: Seed = 0):
        super().__init__(image_path=image_path, gt_path=gt_path, generated=generated, image_size=image_size,
                         num_classes=num_classes, ignore_index=ignore_index, mask_threshold=mask_threshold,
                         validation_split=validation_split, skip_unmatched=skip_unmatched, multitask=multitask,
                         seed=seed)
        turns = (mirror, use_hflip), (flip, use_vflip), (rotate90, use_rot90)
        self.turns = [turn for turn, wanted in turns if wanted]
        self.lights = [("adjust_brightness", brightness), ("adjust_contrast", contrast)]
        self.max_angle = max_angle

    def __getitem__(self, key: Key | int) -> dict[str, Tensor | str | int]:
        from torchvision.transforms.v2 import functional as T  # slow to import

        epoch, index = split_key(key, len(self))
        rng = sample_rng(self.seed, epoch, index)
        image, mask, stem = self.read(index)
        for turn in self.turns:
            if rng.random() < 0.5:
                image, mask = turn(image), turn(mask)
        if self.max_angle:
            image, mask = rotated(image, mask, rng, self.max_angle)
        for light, most in self.lights:
            if rng.random() < 0.2:
                image = getattr(T, light)(image, 1 + float(rng.uniform(-most, most)))
        return {**self.item(image, mask, stem), "epoch": epoch, "num_samples": len(self)}


class MaskTestDataset(MaskDataset):
    """Load images for validation, in order of name, without augmentation.

    Item -> as of `MaskTrainDataset`, without "epoch" and "num_samples". Args: as `MaskDataset`.
    """

    validates, first_image = True, 100_000

    def __getitem__(self, key: Key | int) -> dict[str, Tensor | str]:
        return self.item(*self.read(split_key(key, len(self))[1]))


# ---------------------------------------------------------------- files


def images_in(source: str) -> list[Path]:
    """Return the images of a folder or the frames of a video in order, or one image. Raises ValueError, OSError."""
    path = Path(source)
    if is_video(path):
        return [Path(frame) for frame in frame_paths(source).values()]
    if path.is_file() and path.suffix.lower() not in EXTENSIONS:
        raise ValueError(f"input: {printable(source)} is not an image; give a {KINDS} file, or a folder of such")
    return [path] if path.is_file() else list(by_stem(path, "input").values())


def read_image(path: Path) -> Tensor:
    """Read an image, or a frame of a video, as (3,H,W) float32 RGB in [0,1]. Raises: as `read_picture`."""
    return read_frame(str(path), MIN_SIDE).float() / 255


def by_stem(folder: Path, name: str) -> dict[str, Path]:
    """Return the images of a folder by stem, in order. Raises FileNotFoundError, ValueError."""
    if not is_folder(str(folder)):
        raise FileNotFoundError(f"{name}: {folder} is not a folder; give one of {KINDS} files")
    files: dict[str, Path] = {}
    for path in (folder / file for file in list_folder(str(folder))[1]):
        if path.stem in files:
            raise ValueError(f"{name}: {folder} has both {files[path.stem].name} and {path.name}; keep one of them")
        files[path.stem] = path
    if not files:
        raise FileNotFoundError(f"{name}: {folder} holds no {KINDS} file{unsupported_files('; ')}")
    return files


def paired(image_path: Path, gt_path: Path, skip_unmatched: bool) -> dict[str, tuple[Path, Path]]:
    """Return image and mask by stem, in order. Raises ValueError that lists images and masks without partner."""
    images, masks = by_stem(image_path, "image_path"), by_stem(gt_path, "gt_path")
    alone = {"without a mask": [p.name for stem, p in images.items() if stem not in masks],
             "without an image": [p.name for stem, p in masks.items() if stem not in images]}
    if any(alone.values()) and not skip_unmatched:
        listed = "; ".join(f"{len(names)} {what}: {some(names)}" for what, names in alone.items() if names)
        raise ValueError(f"{image_path} and {gt_path} do not match: {listed}. Each image needs a mask of the same "
                         "stem; skip_unmatched ignores the others")
    both = {stem: (path, masks[stem]) for stem, path in images.items() if stem in masks}
    if not both:
        raise ValueError(f"{image_path} and {gt_path}: no image has a mask of the same stem")
    return both


def chosen(stems: Iterable[str], share: float, seed: int) -> set[str]:
    """Return the stems for validation: those of the smallest hashes, independent of the order of files."""
    ranked = sorted(stems, key=lambda stem: hashlib.sha256(os.fsencode(f"{seed}/{stem}")).digest())
    return set(ranked[: round(share * len(ranked))])


def some(names: list[str]) -> str:
    """List the first names, and count the others."""
    return ", ".join(names[:LISTED]) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")


# ---------------------------------------------------------------- masks


def read_mask(path: Path, num_classes: int, ignore_index: int | None = None, threshold: int | None = None) -> Tensor:
    """Read a mask as class ids (H,W) uint8 from grey levels or indices of a palette.

    White is 255 in masks of 1, 8 and 16 bits. In a palette of black and white alone, white is class 1 at any
    index. A palette whose grey levels equal their indices is ignored.

    Raises: ValueError: the mask has colours, or values of no class, which are listed.
    """
    levels = read_levels(str(path))
    planes, palette = levels.planes, levels.palette
    planes = planes[:-1] if len(planes) in (2, 4) else planes  # without transparency
    if not (planes == planes[:1]).all():
        raise ValueError(f"{path}: a mask in colour; save it as grey levels that are class ids"
                         + (" or 0 and 255" if num_classes <= 2 else ""))
    mask, white = planes[0], 2**levels.depth - 1
    if palette is not None:
        used = mask.unique().long()
        colours = palette[used, :3]
        if (colours == used[:, None]).all():
            palette = None
        elif num_classes <= 2 and ((colours == 0) | (colours == 255)).all() and (colours == colours[:, :1]).all():
            mask = (palette[mask.long(), 0] == 255).to(torch.uint8)
    elif levels.depth == 1 or threshold is not None:
        mask = (mask.int() * 255 + white // 2) // white
    elif levels.depth == 16:
        mask = torch.where(mask == white, 255, mask)
    if threshold is not None and palette is None:
        ones = (mask > threshold).to(torch.uint8)
        return ones if ignore_index is None else torch.where(mask == ignore_index, mask, ones)
    valid = {*range(max(2, num_classes)), *([] if ignore_index is None else [ignore_index])}
    values = set(mask.unique().tolist())
    if values <= valid:
        return mask.to(torch.uint8)
    if num_classes <= 2 and values <= {0, 255} | valid - {1}:
        return torch.where(mask == 255, 1, mask).to(torch.uint8)
    binary = num_classes <= 2
    wrong = [str(value) for value in sorted(values - valid) if value != 255 or not binary] or ["1 beside 255"]
    right = f"0..{max(2, num_classes) - 1}" + (" or 0 and 255" if binary else "")
    hint = "; mask_threshold takes soft edges" if binary else ""
    raise ValueError(f"{path}: mask values {some(wrong)} are out of range; num_classes {num_classes} takes {right}, "
                     f"and ignore_index {ignore_index}{hint}")


# ---------------------------------------------------------------- augmentation


def mirror(x: Tensor) -> Tensor:
    """Mirror left-right."""
    return x.flip(-1)


def flip(x: Tensor) -> Tensor:
    """Mirror upside down."""
    return x.flip(-2)


def rotate90(x: Tensor) -> Tensor:
    """Rotate by 90 degrees."""
    return x.rot90(1, (-2, -1))


def rotated(image: Tensor, mask: Tensor, rng: np.random.Generator, max_angle: float) -> tuple[Tensor, Tensor]:
    """Rotate and zoom image and mask about a random point, with reflected borders."""
    from torchvision.transforms.v2 import InterpolationMode  # slow to import
    from torchvision.transforms.v2 import functional as T

    size = image.shape[-1]
    angle, zoom = float(rng.uniform(-max_angle, max_angle)), float(1.25 ** rng.uniform(-1, 1))
    centre = [float(c) for c in rng.uniform(0.25, 0.75, 2) * size + size // 2]
    out = []
    for x, how in ((image, InterpolationMode.BILINEAR), (mask[None], InterpolationMode.NEAREST)):
        wide = T.pad(x, [size // 2] * 4, padding_mode="reflect")
        wide = T.affine(wide, angle, [0, 0], zoom, [0, 0], interpolation=how, center=centre)
        out.append(T.center_crop(wide, [size, size]))
    return out[0], out[1][0]


# ---------------------------------------------------------------- targets of the conditioned head


def tasks_of(mask: np.ndarray, num_classes: int) -> dict[str, Tensor]:
    """Return boundary and distance of each class, (K,H,W) float32 in [0,1].

    Source: feevos/resuneta. Differs: a boundary is every pixel with a neighbour of another class in a 3x3 cross,
    instead of OpenCV's Canny detector and a dilation.
    """
    ids = range(num_classes) if num_classes > 1 else (1,)
    layers = np.stack([mask == c for c in ids])
    return {"boundary": torch.from_numpy(np.stack([boundary(layer) for layer in layers])),
            "distance": torch.from_numpy(np.stack([distance(layer) for layer in layers]))}


def boundary(inside: np.ndarray) -> np.ndarray:
    """Return 1 at pixels with a neighbour of the other value, else 0."""
    edge = np.zeros(inside.shape, np.float32)
    down, right = inside[1:] != inside[:-1], inside[:, 1:] != inside[:, :-1]
    for part, differs in ((edge[1:], down), (edge[:-1], down), (edge[:, 1:], right), (edge[:, :-1], right)):
        part[differs] = 1
    return edge


def distance(inside: np.ndarray) -> np.ndarray:
    """Return the distance to the nearest pixel outside divided by its maximum; all 0 or all 1 without an edge.

    Source: Felzenszwalb and Huttenlocher 2012: one axis after the other; here with all offsets.
    """
    if inside.all() or not inside.any():
        return inside.astype(np.float32)
    squared = np.where(inside, np.float32(1e9), np.float32(0))
    for _ in range(2):  # columns, then rows
        offsets = np.arange(len(squared), dtype=np.float32)
        squared = np.stack([(squared + np.square(offsets - i)[:, None]).min(0) for i in range(len(squared))]).T
    found = np.sqrt(squared)
    return found / found.max()
