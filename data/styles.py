"""Datasets of latents of pictures, in one folder per style: balanced pairs for training, first pictures for tests.

Source: the datasets of KiritoFD/VAE_ca_proj, LGT/train.py. Differs: every draw comes from `sample_rng(seed, epoch,
index)`; styles are balanced exactly, not on average; latents are computed at first use and cached on disk; pictures
are resized by antialiased bicubic interpolation instead of Lanczos.
Legend: H W pixels; c channels, h w latent pixels; S styles, R references.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from data.folders import list_folder, unsupported_files
from data.frames import check_folder
from data.image_files import KINDS, MIN_SIDE, read_bytes, read_picture
from data.images import strip
from data.sampler import Key, sample_rng
from data.synthetic_styles import DrawnStyles
from data.transforms import build_drawn, split_key
from models.codecs import CODECS
from options import check, resolve, schema_of
from runtime import distributed
from runtime.ranges import PositiveInt, Seed, checked
from storage.files import save_file
from storage.sealed import CheckpointError, load_file

LATENTS = "experiments/latents"  # default cache of latents
MOST_KEPT = 1 << 29  # largest number of bytes of latents that a process keeps in memory


class StyleLatents:
    """Return latents of the pictures of several styles, from memory, from the disk or computed.

    Args:
        dataroot: folder of style folders; None: drawn pictures.
        style_subdirs: names of the styles in order; None: all folders by name.
        generated: arguments of `DrawnStyles`.
        image_size: side in pixels, a multiple of four latent pixels.
        crop: resize the shorter side and crop the middle; False: resize both sides.
        codec: section of a latent codec, see `models.codecs`; None: pixels.
        cache_dir: folder of cached latents of codecs with weights, named by digests of weights, file and size; None:
            in memory only.
        seed: seed of drawn pictures.
        allow_empty: ignore style folders without pictures.
    Raises: FileNotFoundError, ValueError: a folder or an option is invalid.
    """

    def __init__(self, dataroot: str | None, style_subdirs: Sequence[str] | None, generated: dict | None,
                 image_size: int, crop: bool, codec: dict | None, cache_dir: str | None, seed: int,
                 allow_empty: bool = False):
        self.dataroot, self.image_size, self.crop, self.cache_dir = dataroot, image_size, crop, cache_dir
        self.codec = shared_codec(json.dumps(codec, sort_keys=True))
        side = 4 * self.codec.factor
        if image_size < side or image_size % side:
            raise ValueError(f"image_size {image_size} must be a multiple of {side}: 4 latent pixels of "
                             f"{self.codec.factor}")
        self.drawn = None if dataroot else build_drawn(DrawnStyles, generated, {}, size=image_size, seed=seed)
        self.files: dict[str, list[str]] = {}  # style -> sorted paths
        for style in style_names(dataroot, style_subdirs, generated):
            files = [""] * self.drawn.num_images if self.drawn else pictures_in(os.path.join(dataroot, style))
            if not files and not allow_empty:
                raise ValueError(f"{os.path.join(dataroot, style)}: holds no pictures; {KINDS} files are needed"
                                 + unsupported_files("; "))
            if files:
                self.files[style] = files
        self.kept: dict[tuple[str, int], Tensor] = {}
        self.device, self.on_disk = torch.device("cpu"), bool(self.codec.fingerprint and cache_dir and not self.drawn)

    def __call__(self, style: str, number: int) -> Tensor:
        """Return the latent (c,h,w) float32 of a picture of a style."""
        number %= len(self.files[style])
        if (latent := self.kept.get((style, number))) is None:
            latent = self._latent(style, number)
            if (len(self.kept) + 1) * latent.nbytes <= MOST_KEPT:  # all have equal size
                self.kept[style, number] = latent
        return latent

    def encode_on(self, device: torch.device) -> None:
        """Encode all pictures on a card, as far as latents are kept; data workers, which start later, can't use it."""
        if device.type == "cpu" or not self.codec.fingerprint:
            return
        self.device = device
        self.codec.to(device)
        all_of_them = [(style, number) for style, files in self.files.items() for number in range(len(files))]
        # Ranks find each other's on the disk; without it, what is encoded here, not by workers, is the same for all.
        first = len(all_of_them) * distributed.rank() // distributed.world_size() if self.on_disk else 0
        for key in all_of_them[first:] + all_of_them[:first]:
            self(*key)
            if key not in self.kept and not self.on_disk:
                break
        self.device = torch.device("cpu")
        self.codec.to(self.device)

    def picture(self, style: str, number: int) -> Tensor:
        """Return a picture (3,image_size,image_size) float32 in [-1,1]."""
        if self.drawn:
            return torch.from_numpy(self.drawn(style, number)).float() / 127.5 - 1
        return fitted(read_picture(self.files[style][number], MIN_SIDE), self.image_size, self.crop)

    def _latent(self, style: str, number: int) -> Tensor:
        if not self.on_disk:
            return self._encode(style, number)
        path = self.files[style][number]
        facts = f"{self.codec.fingerprint} {self.image_size} {self.crop} ".encode()
        kept = Path(self.cache_dir) / f"{hashlib.sha256(facts + read_bytes(path)).hexdigest()}.pt"
        if kept.exists():
            try:
                return load_file(kept)
            except CheckpointError:
                pass  # damaged: it is computed again
        latent = self._encode(style, number).contiguous()
        kept.parent.mkdir(parents=True, exist_ok=True)
        temporary = kept.with_name(f"{kept.stem}.{os.getpid()}")  # workers may compute the same latent at once
        save_file(temporary, latent)
        os.replace(temporary, kept)
        return latent

    def _encode(self, style: str, number: int) -> Tensor:
        return self.codec.encode(self.picture(style, number)[None].to(self.device))[0].cpu()


class StyleDataset(Dataset):
    """Pair pictures with a target style and a reference picture of that style.

    Item `(epoch, index)` -> {"source": (c,h,w) latent, "source_style": its style, "target_style": drawn uniformly,
    "reference": (c,h,w) of a random picture of the target style, "epoch", "key": "style/number"}.
    An epoch has equal numbers of all styles and every picture of the largest style once; smaller styles repeat.

    Args:
        dataroot: folder of style folders; None: drawn pictures of three styles.
        style_subdirs: names of the styles, in the order of their ids; None: all folders by name.
        generated: drawn pictures without dataroot: arguments of `data.synthetic_styles.DrawnStyles`.
        image_size: side in pixels: the shorter side is resized to it, and the middle cropped.
        codec: latent codec, {"type": "pixel" | "vqgan" | "sd-vae", ...}, see `models.codecs`; None: pixels.
        cache_dir: folder of cached latents; None: in memory only. Latents of "pixel" are not cached on disk.
        name: label of the dataset, without effect.
        seed: seed of all draws, with epoch and index.
    Raises:
        FileNotFoundError, ValueError: there are fewer than two styles, a style folder is empty, the codec is invalid.
    """

    layout = """expected, with any names:
  FOLDER/
    style_1/          one folder for each style
      one.png         PNG, JPEG or WebP
    style_2/
      another.jpg"""

    @checked
    def __init__(self, *, dataroot: str | None = None, style_subdirs: Sequence[str] | None = None,
                 generated: dict | None = None, image_size: PositiveInt = 64, codec: dict | None = None,
                 cache_dir: str | None = LATENTS, name: str | None = None, seed: Seed = 0):
        self.latents = StyleLatents(dataroot, style_subdirs, generated, image_size, True, codec, cache_dir, seed)
        self.styles, self.seed = list(self.latents.files), seed
        if len(self.styles) < 2:
            raise ValueError(f"{dataroot or 'generated'}: has one style, {self.styles[0]!r}; a transfer needs two or "
                             "more, each in a folder")

    def sample_names(self) -> list[str]:
        """Return style and file name of each picture; [] for drawn ones."""
        return [] if self.latents.drawn else [f"{style}/{os.path.basename(path)}"
                                              for style, paths in self.latents.files.items() for path in paths]

    def encode_on(self, device: torch.device) -> None:
        """Encode all pictures on a card, see `StyleLatents`."""
        self.latents.encode_on(device)

    def __len__(self) -> int:
        return len(self.styles) * max(map(len, self.latents.files.values()))

    def __getitem__(self, key: Key | int) -> dict[str, Tensor | int | str]:
        epoch, index = split_key(key, len(self))
        rng = sample_rng(self.seed, epoch, index)
        number, style = divmod(index, len(self.styles))
        target = int(rng.integers(len(self.styles)))
        reference = int(rng.integers(len(self.latents.files[self.styles[target]])))
        return {"source": self.latents(self.styles[style], number), "source_style": style, "target_style": target,
                "reference": self.latents(self.styles[target], reference), "epoch": epoch,
                "key": f"{self.styles[style]}/{number}"}


class StyleTestDataset(Dataset):
    """Return for each style folder its first picture, and reference pictures of all styles.

    Item -> {"source": (c,h,w) latent, "style" and "folder": its style, "reference": (S,R,c,h,w), "styles": S names of
    styles}; equal in every epoch. Folders without pictures are ignored.

    Args:
        dataroot: folder of style folders (`test_image_dir`); None: drawn pictures.
        image_size: side in pixels to which both sides of a picture are resized, without a crop.
        num_references: number R of the first pictures of each style; a folder with fewer repeats them.
        others: as `StyleDataset`.
    Raises: FileNotFoundError, ValueError: no folder has pictures, or an option is invalid.
    """

    layout = StyleDataset.layout

    @checked
    def __init__(self, *, dataroot: str | None = None, style_subdirs: Sequence[str] | None = None,
                 generated: dict | None = None, image_size: PositiveInt = 64, codec: dict | None = None,
                 cache_dir: str | None = LATENTS, num_references: PositiveInt = 8, name: str | None = None,
                 seed: Seed = 0):
        generated = {"first_image": 100_000, "num_images": num_references} | (generated or {})
        self.latents = StyleLatents(dataroot, style_subdirs, generated, image_size, False, codec, cache_dir, seed,
                                    allow_empty=True)
        if not self.latents.files:
            raise ValueError(f"{dataroot}: none of its folders holds pictures; each style needs one")
        self.num_references = num_references

    def encode_on(self, device: torch.device) -> None:
        """Encode all pictures on a card, see `StyleLatents`."""
        self.latents.encode_on(device)

    def __len__(self) -> int:
        return len(self.latents.files)

    def __getitem__(self, key: Key | int) -> dict[str, Tensor | str | list[str]]:
        _, index = split_key(key, len(self))
        styles = list(self.latents.files)
        references = [torch.stack([self.latents(style, i) for i in range(self.num_references)]) for style in styles]
        return {"source": references[index][0], "reference": torch.stack(references), "styles": styles,
                "style": styles[index], "folder": styles[index]}


def style_names(dataroot: str | None, style_subdirs: Sequence[str] | None, generated: dict | None) -> list[str]:
    """Return the styles in the order of their ids.

    Raises: FileNotFoundError, ValueError: a folder does not exist, there is none, or a name occurs twice.
    """
    if dataroot is None:
        return style_subdirs or build_drawn(DrawnStyles, generated, {}).styles
    check_folder(dataroot, "dataroot")
    there, _ = list_folder(dataroot)
    names = list(style_subdirs or there)
    if not names:
        raise ValueError(f"{dataroot}: holds no style folders; put the pictures of each style into a separate folder")
    for name in names:
        if name not in there:
            raise FileNotFoundError(f"{dataroot}: style folder {name!r} does not exist; there are {', '.join(there)}")
        if names.count(name) > 1:
            raise ValueError(f"style_subdirs: {name!r} is named twice")
    return names


def pictures_in(folder: str) -> list[str]:
    """Return the paths of the pictures in a folder, sorted by name."""
    return [os.path.join(folder, name) for name in list_folder(folder)[1]]


def fitted(picture: Tensor, size: int, crop: bool) -> Tensor:
    """Resize (3,H,W) uint8 to (3,size,size) in [-1,1] with a crop of the middle, or without crop distorted."""
    picture = strip(picture, (0.5, 0.5)) if crop else picture
    height, width = picture.shape[1:]
    if crop:
        scale = size / min(height, width)
        shape = max(size, round(height * scale)), max(size, round(width * scale))
    else:
        shape = size, size
    image = picture[None].float()
    if shape != (height, width):
        image = F.interpolate(image, shape, mode="bicubic", antialias=True, align_corners=False).clamp(0, 255)
    top, left = (shape[0] - size) // 2, (shape[1] - size) // 2
    return image[0, :, top : top + size, left : left + size] / 127.5 - 1


def build_codec(section: Mapping[str, Any] | None, where: str = "codec") -> nn.Module:
    """Build the codec of an option section, e.g. {"type": "vqgan", "path": ...}; None: pixels.

    Raises: OptionError, CheckpointError: the section is invalid, or its weights are.
    """
    section = dict(section or {"type": "pixel"})
    component = resolve(CODECS, section.pop("type", None), f"{where}.type")
    keywords = check(section, schema_of(component), "codec", lambda _: where.removesuffix(": codec"), [])
    try:
        return component(**keywords).eval().requires_grad_(False)
    except ValueError as error:
        raise type(error)(f"{where}: {error}") from error


@lru_cache(maxsize=2)
def shared_codec(section: str) -> nn.Module:
    """Return one codec on the CPU for all datasets of a run."""
    return build_codec(json.loads(section))
