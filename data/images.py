"""Datasets of pictures from folders, and of successive frames of clips, resized and cropped to squares.

Source: taming-transformers' data/base.py (resize the shorter side, then crop). Differs: every draw comes from
`sample_rng(seed, epoch, index)`; of a thin picture only a part is resized.
Legend: D pictures of an item, H W pixels (both `size`), C channels.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from data.folders import is_folder, read_lines, unsupported_files, walk
from data.frames import LAYOUT, scan_clips
from data.image_files import EXTENSIONS, KINDS, MIN_SIDE, BadPicture, printable, read_picture
from data.movie import frame_paths, is_video
from data.sampler import Key, sample_rng
from data.synthetic import SyntheticImageDataset, as_channels
from data.transforms import augment, build_drawn, split_key
from runtime.ranges import PositiveInt, Seed, checked

LONGEST = 4  # longest side that is resized, divided by the shorter one


class ImageTrainDataset(Dataset):
    """Load pictures, cropped and mirrored at random.

    Item `(epoch, index)` -> {"H": (D,H,W,C) uint8, "key", "folder": name of the first picture}.

    Args:
        dataroot: folder of PNG, JPEG or WebP files at any depth, or a text file that lists one per line; None: drawn
            pictures.
        generated: drawn pictures without dataroot, e.g. {"num_samples": 512}: arguments of `SyntheticImageDataset`.
        size: side of the square crop in pixels.
        resize: shorter side before the crop in pixels; [from, to] draws it for each item; None: size.
        random_crop: crop at a random place, instead of the middle.
        use_hflip: mirror left-right with probability 1/2.
        use_rot: flip upside down, and transpose, each with probability 1/2.
        num_images: number D of successive pictures of an item; the last item may hold fewer.
        n_channels: channels of a picture, 3 for RGB, 1 for grey.
        skip_corrupt: replace an unreadable picture by the next one, with a warning, instead of an error.
        cache_data: keep every picture in memory after its first use (3 bytes per pixel of the file).
        name: label of the dataset, without effect.
        seed: seed of all draws, with epoch and index.
    Raises: FileNotFoundError, ValueError: options or the folder are invalid.
    """

    layout = """expected, with any names:
  FOLDER/
    one.png           PNG, JPEG or WebP
    below/            at any depth
      another.jpg"""

    @checked
    def __init__(self, *, dataroot: str | None = None, generated: dict | None = None,
                 size: PositiveInt = 256, resize: PositiveInt | Sequence[PositiveInt] | None = None,
                 random_crop: bool = True, use_hflip: bool = True, use_rot: bool = False,
                 num_images: PositiveInt = 1, n_channels: Literal[1, 3] = 3, skip_corrupt: bool = False,
                 cache_data: bool = False, name: str | None = None, seed: Seed = 0):
        self._prepare(size, resize, random_crop, use_hflip, use_rot, n_channels, skip_corrupt, cache_data, seed)
        if not dataroot:
            self._draw(generated, num_images=num_images)
            return
        paths = list_images(dataroot)
        self.items = [(paths, range(i, min(i + num_images, len(paths)))) for i in range(0, len(paths), num_images)]

    def _prepare(self, size: int, resize: int | Sequence[int] | None, random_crop: bool, use_hflip: bool,
                 use_rot: bool, n_channels: int, skip_corrupt: bool, cache_data: bool, seed: int) -> None:
        sides = (resize, resize) if isinstance(resize, int) else tuple(resize or (size, size))
        if len(sides) != 2 or not size <= sides[0] <= sides[1]:
            raise ValueError(f"resize {resize} must be a side, or [from, to], of at least size {size}")
        self.size, self.sides, self.random_crop = size, sides, random_crop
        self.use_hflip, self.use_rot, self.n_channels, self.seed = use_hflip, use_rot, n_channels, seed
        self.skip_corrupt, self.kept = skip_corrupt, {} if cache_data else None
        self.drawn: SyntheticImageDataset | None = None

    def _draw(self, generated: dict | None, **defaults: int) -> None:
        """Replace files by drawn pictures."""
        self.drawn = build_drawn(SyntheticImageDataset, generated, defaults, size=self.size, n_channels=self.n_channels,
                                 use_hflip=self.use_hflip, use_rot=self.use_rot, seed=self.seed)

    def __len__(self) -> int:
        return len(self.drawn or self.items)

    def sample_names(self) -> list[str]:
        """Return the file name of the first picture of each item; [] for drawn ones."""
        return [] if self.drawn else [os.path.basename(paths[places[0]]) for paths, places in self.items]

    def __getitem__(self, key: Key | int) -> dict[str, Tensor | str]:
        if self.drawn:
            return self.drawn[key]
        epoch, index = split_key(key, len(self))
        rng = sample_rng(self.seed, epoch, index)
        paths, places = self.items[index]
        side = int(rng.integers(self.sides[0], self.sides[1] + 1))
        spot = rng.random(2) if self.random_crop else (0.5, 0.5)  # equal for all pictures of the item
        pictures = torch.stack([crop(self._read(paths, i), side, self.size, spot) for i in places])  # (D,C,H,W)
        (pictures,) = augment([pictures], rng, self.use_hflip, self.use_rot)
        name = os.path.splitext(os.path.basename(paths[places[0]]))[0]
        return {"H": pictures.permute(0, 2, 3, 1).contiguous(), "key": paths[places[0]], "folder": name}

    def _read(self, paths: list[str], place: int) -> Tensor:
        """Read the picture (C,h,w) uint8 at a place, or with skip_corrupt the next readable one."""
        for step in range(len(paths)):
            path = paths[(place + step) % len(paths)]
            if self.kept is not None and path in self.kept:
                return self.kept[path]
            try:
                picture = as_channels(read_picture(path, MIN_SIDE), self.n_channels)
            except BadPicture as error:
                if not self.skip_corrupt:
                    raise BadPicture(f"{error}; or set skip_corrupt to skip such files") from None
                warnings.warn(f"{error}; skipped, the next one replaces it", stacklevel=2)
                continue
            if self.kept is not None:
                self.kept[path] = picture
            return picture
        raise ValueError(f"{os.path.dirname(paths[0])}: none of {len(paths)} pictures can be read")


class ImageTestDataset(ImageTrainDataset):
    """Load the middles of pictures, sixteen per item, which a validation shows as a grid.

    Args: as `ImageTrainDataset`.
    """

    @checked
    def __init__(self, *, dataroot: str | None = None, generated: dict | None = None,
                 size: PositiveInt = 256, resize: PositiveInt | None = None, num_images: PositiveInt = 16,
                 n_channels: Literal[1, 3] = 3, skip_corrupt: bool = False, cache_data: bool = False,
                 name: str | None = None, seed: Seed = 0):
        drawn = {"num_samples": 1, "first_image": 100_000, **(generated or {})}
        super().__init__(dataroot=dataroot, generated=drawn, size=size, resize=resize, random_crop=False,
                         use_hflip=False, num_images=num_images, n_channels=n_channels, skip_corrupt=skip_corrupt,
                         cache_data=cache_data, seed=seed)


class VideoSequenceDataset(ImageTrainDataset):
    """Load successive frames of clips, cropped and mirrored alike.

    Item `(epoch, index)` -> {"H": (D,H,W,C) uint8 with D = num_frame, "key", "folder": "clip_frame"}.

    Args:
        dataroot: folder of clip folders (or of the frames of a single clip); None: drawn video.
        generated: drawn video without dataroot: arguments of `SyntheticImageDataset`.
        num_frame: number D of frames of an item.
        frame_step: distance in frames between the first frames of successive items.
        skip_corrupt: replace an unreadable frame by the next one of the clip, with a warning, instead of an error.
        others: as `ImageTrainDataset`.
    Raises: as ImageTrainDataset.
    """

    layout = LAYOUT

    @checked
    def __init__(self, *, dataroot: str | None = None, generated: dict | None = None, num_frame: PositiveInt = 4,
                 frame_step: PositiveInt = 1, size: PositiveInt = 256,
                 resize: PositiveInt | Sequence[PositiveInt] | None = None, random_crop: bool = True,
                 use_hflip: bool = True, use_rot: bool = False, n_channels: Literal[1, 3] = 3,
                 skip_corrupt: bool = False, cache_data: bool = False, name: str | None = None, seed: Seed = 0):
        self._prepare(size, resize, random_crop, use_hflip, use_rot, n_channels, skip_corrupt, cache_data, seed)
        if not dataroot:
            self._draw(generated, num_frame=num_frame)
            return
        self.items = []
        for clip in scan_clips(dataroot, None, sides=("dataroot", "")):
            if len(clip.gt) < num_frame:
                raise ValueError(f"{dataroot}: clip {clip.name!r} has {len(clip.gt)} frames; num_frame is {num_frame}")
            starts = range(0, len(clip.gt) - num_frame + 1, frame_step)
            self.items += [(clip.gt, range(start, start + num_frame)) for start in starts]


# Files -------------------------------------------------------------------------------------------------------------

def list_images(dataroot: str, what: str = "dataroot") -> list[str]:
    """Return the sorted paths of all pictures below a folder, those that a text file lists, or that of one picture.

    Args: what: name of `dataroot` in messages.
    Raises: FileNotFoundError, ValueError: there is no picture.
    """
    if os.path.isfile(dataroot) and dataroot.endswith(".txt"):
        paths = [os.path.join(os.path.dirname(dataroot), line.strip()) for line in read_lines(dataroot) if line.strip()]
        absent = next((path for path in paths if not os.path.isfile(path)), None)
        if absent:
            raise FileNotFoundError(f"{what} {dataroot}: {printable(absent)} does not exist")
    elif is_folder(dataroot):
        paths = sorted(os.path.join(folder, name) for folder, names in walk(dataroot) for name in names)
    elif os.path.isfile(dataroot) and dataroot.lower().endswith(EXTENSIONS):
        return [dataroot]
    else:
        raise FileNotFoundError(f"{what}: {dataroot} is neither a folder of pictures nor a .txt file that "
                                f"lists some; {KINDS} files are read")
    if not paths:
        raise ValueError(f"{what} {dataroot} holds no pictures; {KINDS} files are needed, in folders of any depth"
                         + unsupported_files("; "))
    return paths


def images_by_name(source: str) -> dict[str, str]:
    """Return the paths of `list_images` by their paths below the source without extensions, or frames of a video.

    Raises: FileNotFoundError, ValueError: as `list_images`, and where two pictures have equal names.
    """
    if is_video(source):
        return frame_paths(source)
    root = source if os.path.isdir(source) else os.path.dirname(source) or "."
    found = list_images(source, "input")
    paths = {os.path.splitext(os.path.relpath(path, root))[0]: path for path in found}
    if len(paths) < len(found):
        raise ValueError(f"{source}: two pictures differ only in their extensions; rename one")
    return paths


def strip(picture: Tensor, spot: Sequence[float]) -> Tensor:
    """Crop a thin picture (C,h,w) at `spot`, (y, x) in [0,1): an enlargement of 3000 x 2 pixels would take GB."""
    longest = LONGEST * min(picture.shape[-2:])
    top, left = (int(at * (edge - longest + 1)) if edge > longest else 0 for at, edge in zip(spot, picture.shape[-2:]))
    return picture[:, top : top + longest, left : left + longest]


def crop(picture: Tensor, side: int, size: int, spot: Sequence[float]) -> Tensor:
    """Resize the shorter side of (C,h,w) uint8 to `side`, and crop (C,size,size) at `spot`, (y, x) in [0,1)."""
    picture = strip(picture, spot)
    height, width = picture.shape[-2:]
    if min(height, width) != side:
        scale = side / min(height, width)
        height, width = (max(side, round(edge * scale)) for edge in (height, width))
        resized = F.interpolate(picture[None].float(), (height, width), mode="bicubic", antialias=True)[0]
        picture = resized.round().clamp_(0, 255).to(torch.uint8)
    top, left = (int(at * (edge - size + 1)) for at, edge in zip(spot, (height, width)))
    return picture[:, top : top + size, left : left + size]
