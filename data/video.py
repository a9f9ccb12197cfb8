"""Clips of frames on disk: random crops of a few frames for training, whole clips for testing.

Source: KAIR's data/dataset_video_train.py and dataset_video_test.py (its option names, keys and returned fields).
Different here: every draw comes from `sample_rng(seed, epoch, index)`; LQ and GT pair by name, not by position;
`val_partition` holds whatever the dataset's name is (KAIR trains on its own test clips unless it is "REDS");
a window of frames may end at a clip's last frame for any interval; num_frame 1 works; L can be made on the fly.
Legend: T frames, H W pixels of GT, h w pixels of LQ (H = scale * h). A frame in memory is (3,H,W) uint8 RGB.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.io import ImageReadMode, decode_image, read_file

from data.resize import Degradation, modcrop
from data.sampler import Key, sample_rng
from options import check, schema_of

VAL_PARTITIONS = {"REDS4": {"000", "011", "015", "020"}, "official": {f"{clip:03d}" for clip in range(240, 270)}}
EXTENSIONS = (".png", ".jpg", ".jpeg")


class Clip(NamedTuple):
    """One clip: its frames' names without extension, and their files; a side that is not on disk is None."""

    name: str
    frames: list[str]
    gt: list[str] | None
    lq: list[str] | None


class VideoRecurrentTrainDataset(Dataset):
    """num_frame successive frames of one window of a clip, flipped and transposed at random.

    Item `(epoch, index)` -> {"L": (T,3,h,w), "H": (T,3,H,W) float32 RGB in [0,1], "key": "clip/frame"}.
    There is one item per frame; a frame too close to its clip's end for num_frame frames starts elsewhere.

    Args:
        dataroot_gt: folder of clip folders (or of the frames of a single clip); None draws video instead.
        generated: what is drawn then, e.g. {"num_clips": 256}: arguments of `SyntheticVideoDataset`.
        dataroot_lq: the same with degraded frames of equal names; None makes them of GT, see `degradation`.
        meta_info_file: lines `clip frames shape first_frame`, e.g. `000 100 (720,1280,3) 0`, files then being named
            by filename_tmpl and filename_ext; None takes every png, jpg or jpeg file there is, in order of name.
        num_frame: T.
        gt_size: side of the GT window in pixels, a multiple of scale.
        scale: GT pixels per LQ pixel.
        interval_list: distances in frames between successive frames, one of which is drawn for each item.
        random_reverse: play every other item backwards.
        use_hflip: mirror left-right with probability 1/2. use_rot: upside down, and transpose, each likewise.
        val_partition: "REDS4" or "official" removes these clips of REDS; test_mode keeps only them.
        io_backend: {"type": "disk"}.
        cache_data: decode all frames at the start and keep them (3 bytes per pixel).
        name: KAIR's label of the dataset; not used.
        degradation: how L is made when there is no dataroot_lq, see `data.resize.Degradation`.
        seed: of all draws, together with epoch and index.
    Raises:
        FileNotFoundError, ValueError: of one line, at the start wherever the file names or the first frame tell.
    """

    def __init__(self, *, dataroot_gt: str | None = None, dataroot_lq: str | None = None,
                 meta_info_file: str | None = None, generated: dict | None = None,
                 num_frame: int = 6, gt_size: int = 256, scale: int = 4, filename_tmpl: str = "08d",
                 filename_ext: str = "png", interval_list: Sequence[int] = (1,), random_reverse: bool = False,
                 use_hflip: bool = True, use_rot: bool = True, val_partition: str | None = None,
                 test_mode: bool = False, io_backend: dict | None = None, cache_data: bool = False,
                 name: str | None = None, degradation: dict | None = None, seed: int = 0):
        if not dataroot_gt and (dataroot_lq or meta_info_file):
            raise ValueError(f"dataroot_gt is missing, though {dataroot_lq or meta_info_file} is given; name it")
        self.drawn = None if dataroot_gt else drawn_video(
            {"num_frame": num_frame, "gt_size": gt_size, "use_hflip": use_hflip, "use_rot": use_rot}, generated,
            scale=scale, seed=seed, degradation=degradation)
        if self.drawn:
            return
        check_disk(io_backend)
        if scale < 1 or gt_size < 1 or gt_size % scale:
            raise ValueError(f"gt_size {gt_size} must be a positive multiple of scale {scale}")
        if num_frame < 1 or not interval_list or min(interval_list) < 1:
            raise ValueError(f"num_frame {num_frame} and each of interval_list {list(interval_list)} must be >= 1")
        self.degradation = lq_maker(scale, dataroot_lq, degradation)
        self.num_frame, self.gt_size, self.scale, self.seed = num_frame, gt_size, scale, seed
        self.interval_list, self.random_reverse = tuple(interval_list), random_reverse
        self.use_hflip, self.use_rot = use_hflip, use_rot

        if meta_info_file:
            clips = clips_of_meta(meta_info_file, dataroot_gt, dataroot_lq, filename_tmpl, filename_ext)
        else:
            clips = scan_clips(dataroot_gt, dataroot_lq)
        self.clips = partition(clips, val_partition, test_mode, dataroot_gt)
        longest = (num_frame - 1) * max(interval_list) + 1
        for clip in self.clips:
            if len(clip.frames) < longest:
                raise ValueError(f"{dataroot_gt}: clip {clip.name!r} has {len(clip.frames)} frames; num_frame "
                                 f"{num_frame} at interval {max(interval_list)} needs {longest}")
        self.samples = [(clip, frame) for clip in self.clips for frame in range(len(clip.frames))]
        self.reader = FrameReader(self.clips if cache_data else ())
        self._frames(self.clips[0], [0])  # a wrong size or format shows now, not in the middle of an epoch

    def __len__(self) -> int:
        return len(self.drawn or self.samples)

    def __getitem__(self, key: Key | int) -> dict[str, Tensor | str]:
        if self.drawn:
            return self.drawn[key]
        epoch, index = split_key(key, len(self))
        rng = sample_rng(self.seed, epoch, index)
        clip, frame = self.samples[index]
        gt, lq = self._frames(clip, self._positions(len(clip.frames), frame, rng))
        lq, gt = augment(self._crop(gt, lq, rng), rng, self.use_hflip, self.use_rot)
        return {"L": to_float(lq), "H": to_float(gt), "key": f"{clip.name}/{clip.frames[frame]}"}

    def _positions(self, length: int, start: int, rng: np.random.Generator) -> list[int]:
        """Which num_frame of a clip's frames are shown, in this order; the first is `start` where that fits."""
        interval = int(rng.choice(self.interval_list))
        last_start = length - ((self.num_frame - 1) * interval + 1)
        if start > last_start:
            start = int(rng.integers(last_start + 1))
        positions = [start + i * interval for i in range(self.num_frame)]
        return positions[::-1] if self.random_reverse and rng.random() < 0.5 else positions

    def _frames(self, clip: Clip, positions: list[int]) -> tuple[list[Tensor], list[Tensor] | None]:
        """The GT and LQ frames at these positions, known to be of matching sizes and no smaller than the window."""
        gt = self.reader.frames(clip.gt, positions)
        if min(gt[0].shape[-2:]) < self.gt_size:
            raise ValueError(f"{clip.gt[positions[0]]}: a frame of {size_of(gt[0])} is smaller than gt_size "
                             f"{self.gt_size}; give larger frames or a smaller gt_size")
        if clip.lq is None:
            return gt, None
        lq = self.reader.frames(clip.lq, positions)
        check_scale(clip, positions[0], gt[0], lq[0], self.scale)
        return gt, lq

    def _crop(self, gt: list[Tensor], lq: list[Tensor] | None, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """One window, uniform on the LQ grid, of all frames -> LQ (T,3,h,w), GT (T,3,H,W)."""
        scale, side = self.scale, self.gt_size // self.scale
        top, left = (int(rng.integers(size // scale - side + 1)) for size in gt[0].shape[-2:])
        rows, columns = (slice(i * scale, i * scale + self.gt_size) for i in (top, left))
        if lq is None:
            small = self.degradation.window(gt, top, left, side, rng)
        else:
            small = torch.stack([frame[:, top : top + side, left : left + side] for frame in lq])
        return small, torch.stack([frame[:, rows, columns] for frame in gt])


class VideoRecurrentTestDataset(Dataset):
    """Whole clips, one item per folder, nothing drawn at random but optional noise.

    Item `(epoch, index)` -> {"L": (T,C,h,w), "H": (T,3,H,W) float32 RGB in [0,1], "folder": name,
    "lq_path": T file names}; the same in every epoch. H is absent when there is no dataroot_gt.

    Args:
        dataroot_gt: folder of clip folders (or of the frames of a single clip); None: LQ only, nothing to compare.
        generated: what is drawn when both roots are None: arguments of `SyntheticVideoDataset`.
        dataroot_lq: the same with degraded frames of equal names; None makes them of GT, see `degradation`.
        meta_info_file: lines whose first field names a clip to take; None takes all.
        scale: GT pixels per LQ pixel; GT is cut at the bottom and right to a multiple of it.
        num_frame: KAIR's, for its border flags; not used.
        cache_data: decode all frames at the start and keep them (3 bytes per pixel).
        io_backend: {"type": "disk"}. name: KAIR's label of the dataset; not used.
        degradation: how L is made when there is no dataroot_lq, see `data.resize.Degradation`.
        sigma: level 0..255 for nonblind denoising: L = GT + noise of sigma / 255, not clipped, with the level
            sigma / 255 as a 4th channel. Asks for scale 1; dataroot_lq is then not read.
        seed: of the noise, together with the index.
    Raises:
        FileNotFoundError, ValueError: of one line.
    """

    def __init__(self, *, dataroot_gt: str | None = None, dataroot_lq: str | None = None,
                 meta_info_file: str | None = None, generated: dict | None = None, scale: int = 4,
                 num_frame: int = -1, cache_data: bool = False, io_backend: dict | None = None,
                 name: str | None = None, degradation: dict | None = None, sigma: float | None = None, seed: int = 0):
        if sigma is not None and (scale != 1 or not dataroot_gt or not 0 <= sigma <= 255):
            raise ValueError(f"sigma {sigma} adds noise to GT: it needs dataroot_gt, scale 1, not {scale}, and 0..255")
        if meta_info_file and not (dataroot_gt or dataroot_lq):
            raise ValueError(f"dataroot_gt is missing, though {meta_info_file} is given; name it")
        self.drawn = None if dataroot_gt or dataroot_lq else drawn_video(
            {"num_clips": 2, "first_clip": 100_000, "use_hflip": False, "use_rot": False}, generated,
            scale=scale, seed=seed, degradation=degradation)
        if self.drawn:
            return
        check_disk(io_backend)
        if sigma is not None:
            if degradation:
                raise ValueError("sigma and degradation both make L from GT; remove one")
            dataroot_lq = None
        self.degradation = lq_maker(scale, dataroot_lq, degradation)
        self.scale, self.sigma, self.seed = scale, sigma, seed
        only = [line.split()[0] for _, line in lines_of(meta_info_file)] if meta_info_file else None
        self.clips = scan_clips(dataroot_gt, dataroot_lq, only)
        self.reader = FrameReader(self.clips if cache_data else ())

    def __len__(self) -> int:
        return len(self.drawn or self.clips)

    def __getitem__(self, key: Key | int) -> dict[str, Tensor | str | list[str]]:
        if self.drawn:
            return self.drawn[key]
        _, index = split_key(key, len(self))
        clip, rng = self.clips[index], sample_rng(self.seed, 0, index)
        everything = range(len(clip.frames))
        item = {"folder": clip.name, "lq_path": clip.lq or clip.gt}
        lq = self.reader.frames(clip.lq, everything) if clip.lq else None
        if clip.gt is None:
            return {"L": to_float(torch.stack(lq)), **item}
        gt = [modcrop(frame, self.scale) for frame in self.reader.frames(clip.gt, everything)]
        target = to_float(torch.stack(gt))
        if self.sigma is not None:
            return {"L": with_noise(target, self.sigma, rng), "H": target, **item}
        if lq is None:
            return {"L": to_float(self.degradation(gt, rng)), "H": target, **item}
        check_scale(clip, 0, gt[0], lq[0], self.scale)
        return {"L": to_float(torch.stack(lq)), "H": target, **item}


def drawn_video(usual: dict, generated: dict | None, **given) -> Dataset:
    """The drawn video that stands in for folders: `generated` says what, over what is usual."""
    from data.synthetic import SyntheticVideoDataset  # which is built on this module

    wanted = check(generated or {}, schema_of(SyntheticVideoDataset), "generated", lambda _: "drawn video", [])
    return SyntheticVideoDataset(**{**usual, **wanted, **given})


# What an item is made of -----------------------------------------------------------------------------------------

def split_key(key: Key | int, length: int) -> Key:
    """`(epoch, index)`, or an index of epoch 0, as plain integers; IndexError ends a loop over the dataset."""
    epoch, index = (operator.index(part) for part in (key if isinstance(key, Sequence) else (0, key)))
    if not 0 <= index < length:
        raise IndexError(f"index {index} of a dataset of {length} items")
    return epoch, index


def augment(clips: Sequence[Tensor], rng: np.random.Generator, hflip: bool, rot: bool) -> list[Tensor]:
    """One of the 8 symmetries of the square (4 of an oblong) for all (..., H, W): flips, then transpose, as in KAIR."""
    flips = [axis for axis, allowed in ((-1, hflip), (-2, rot)) if allowed and rng.random() < 0.5]
    transpose = rot and rng.random() < 0.5 and all(clip.shape[-1] == clip.shape[-2] for clip in clips)
    clips = [clip.flip(flips) for clip in clips]
    return [clip.transpose(-2, -1) for clip in clips] if transpose else clips


def to_float(frames: Tensor) -> Tensor:
    """uint8 -> float32 in [0,1], contiguous."""
    return frames.to(torch.float32, memory_format=torch.contiguous_format).div_(255)


def with_noise(clean: Tensor, sigma: float, rng: np.random.Generator) -> Tensor:
    """Clean (T,3,H,W) in [0,1] -> (T,4,H,W): noise of sigma / 255 added, not clipped; then the level's channel."""
    noise = torch.from_numpy(rng.standard_normal(clean.shape, dtype=np.float32)) * (sigma / 255)
    return torch.cat([clean + noise, torch.full_like(clean[:, :1], sigma / 255)], dim=1)


def lq_maker(scale: int, dataroot_lq: str | None, degradation: dict | None) -> Degradation | None:
    """What makes L where LQ is not on disk; to ask for both is an error."""
    if scale < 1:
        raise ValueError(f"scale is {scale}; give an integer >= 1")
    if dataroot_lq and degradation:
        raise ValueError(f"degradation makes L from GT, but dataroot_lq {dataroot_lq} is given too; remove one")
    return None if dataroot_lq else Degradation(scale, degradation)


# Frames ----------------------------------------------------------------------------------------------------------

class FrameReader:
    """Reads frames of clips; those of `keep` only once, at the start, where worker processes share them."""

    def __init__(self, keep: Iterable[Clip]):
        self.kept = {path: read_frame(path) for clip in keep for path in (clip.gt or []) + (clip.lq or [])}

    def frames(self, paths: list[str], positions: Sequence[int]) -> list[Tensor]:
        """The frames (3,H,W) uint8 at these positions, all of one size; not to be written to."""
        chosen = [paths[position] for position in positions]
        frames = [self.kept[path] if path in self.kept else read_frame(path) for path in chosen]
        for path, frame in zip(chosen, frames, strict=True):
            if frame.shape != frames[0].shape:
                raise ValueError(f"{path}: a frame of {size_of(frame)} in a clip of {size_of(frames[0])} ({chosen[0]})")
        return frames


def read_frame(path: str) -> Tensor:
    """An image file -> (3,H,W) uint8 RGB; transparency is dropped, grey repeated."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: frame is missing")
    try:
        frame = decode_image(read_file(path), ImageReadMode.RGB)
    except RuntimeError:
        raise ValueError(f"{path}: not a readable image; a PNG or JPEG file is needed") from None
    if frame.dtype != torch.uint8 or frame.ndim != 3:
        raise ValueError(f"{path}: frame has {frame.dtype} values, shape {tuple(frame.shape)}; save it with 8 bits")
    return frame


def size_of(frame: Tensor) -> str:
    return f"{frame.shape[-1]}x{frame.shape[-2]} (width x height)"


def check_scale(clip: Clip, position: int, gt: Tensor, lq: Tensor, scale: int) -> None:
    if gt.shape[-2:] != tuple(size * scale for size in lq.shape[-2:]):
        raise ValueError(f"{clip.lq[position]}: LQ is {size_of(lq)} but its GT is {size_of(gt)}; "
                         f"scale {scale} asks for GT = {scale} x LQ")


def check_disk(io_backend: dict | None) -> None:
    backend = dict(io_backend or {"type": "disk"})  # a copy: the options stay as they are
    kind = backend.pop("type", None)
    if kind in ("lmdb", "memcached"):
        raise ValueError(f'io_backend "{kind}" is not available in this version; unpack the frames into folders and '
                         'use {"type": "disk"}')
    if kind != "disk" or backend:
        raise ValueError(f'io_backend {io_backend} is unknown; valid is {{"type": "disk"}}')


# Clips -----------------------------------------------------------------------------------------------------------

def scan_clips(gt_root: str | None, lq_root: str | None, only: Sequence[str] | None = None) -> list[Clip]:
    """The clips below one or two roots, paired by the names of folders and frames, sorted by name.

    `only`: names of the clips to take, in this order. At least one root is needed.
    """
    gt, lq = (scan_root(root, side, only) if root else None
              for root, side in ((gt_root, "dataroot_gt"), (lq_root, "dataroot_lq")))
    if gt and lq:
        check_same(gt, lq, gt_root, lq_root, "clip")
        for folder in gt:
            check_same(gt[folder], lq[folder], os.path.join(gt_root, folder), os.path.join(lq_root, folder), "frame")
    root, clips = (gt_root, gt) if gt else (lq_root, lq)
    own_name = os.path.basename(os.path.abspath(root))  # of a root that is itself the only clip
    return [Clip(folder or own_name, list(frames),
                 list(gt[folder].values()) if gt else None,
                 [lq[folder][frame] for frame in frames] if lq else None) for folder, frames in clips.items()]


def scan_root(root: str, side: str, only: Sequence[str] | None) -> dict[str, dict[str, str]]:
    """{clip: {frame: file}}, sorted; the clip "" stands for frames that lie in the root itself."""
    entries = list_folder(root, side)
    folders = sorted(entry.name for entry in entries if entry.is_dir())
    if any(entry.name.lower().endswith(EXTENSIONS) for entry in entries):
        if folders:
            raise ValueError(f"{side} {root} holds frames and folders ({name_some(folders)}); keep one kind")
        folders = [""]
    elif not folders:
        raise ValueError(f"{side} {root} holds no clips; put each clip's png or jpg frames into a folder of its own")
    elif only is not None:
        folders = only
    return {folder: scan_frames(os.path.join(root, folder), side) for folder in folders}


def scan_frames(folder: str, side: str) -> dict[str, str]:
    """{name without extension: path} of a folder's images, sorted by name."""
    frames: dict[str, str] = {}
    for entry in sorted(list_folder(folder, side), key=lambda entry: entry.name):
        stem, extension = os.path.splitext(entry.name)
        if extension.lower() not in EXTENSIONS:
            continue
        if stem in frames:
            raise ValueError(f"{entry.path}: a second frame named {stem!r} ({frames[stem]}); keep one of them")
        frames[stem] = entry.path
    if not frames:
        raise ValueError(f"{side} {folder} holds no frames; png, jpg or jpeg files are needed")
    return frames


def clips_of_meta(meta: str, gt_root: str, lq_root: str | None, template: str, extension: str) -> list[Clip]:
    """The clips that a file of lines `clip frames shape first_frame` lists; each named file must be there."""
    clips = []
    for number, line in lines_of(meta):
        fields = line.split()
        if len(fields) != 4 or not (fields[1].isdecimal() and fields[3].isdecimal()):
            raise ValueError(f"{meta}, line {number}: {line.strip()!r} is not `clip frames shape first_frame`, "
                             "e.g. `000 100 (720,1280,3) 0`")
        folder, count, first = fields[0], int(fields[1]), int(fields[3])
        try:
            frames = [f"{frame:{template}}" for frame in range(first, first + count)]
        except ValueError:
            raise ValueError(f'filename_tmpl {template!r} can\'t number frames; give a format such as "08d"') from None
        gt, lq = (None if root is None else numbered_files(os.path.join(root, folder), side, frames, extension)
                  for root, side in ((gt_root, "dataroot_gt"), (lq_root, "dataroot_lq")))
        clips.append(Clip(folder, frames, gt, lq))
    return clips


def numbered_files(folder: str, side: str, frames: list[str], extension: str) -> list[str]:
    there = {entry.name for entry in list_folder(folder, side)}
    files = [f"{frame}.{extension}" for frame in frames]
    for file in files:
        if file not in there:
            raise FileNotFoundError(f"{os.path.join(folder, file)}: frame is missing, but meta_info_file lists it")
    return [os.path.join(folder, file) for file in files]


def partition(clips: list[Clip], val_partition: str | None, test_mode: bool, root: str) -> list[Clip]:
    """All clips but those of the partition; in test_mode only those."""
    if val_partition is None and not test_mode:
        return clips
    if val_partition not in VAL_PARTITIONS:
        raise ValueError(f'val_partition is {val_partition!r}; valid are {", ".join(map(repr, VAL_PARTITIONS))}'
                         f'{", and test_mode needs one" if test_mode else ""}')
    held_out = VAL_PARTITIONS[val_partition]
    kept = [clip for clip in clips if (clip.name in held_out) == test_mode]
    if not kept:
        raise ValueError(f"{root}: no clip is left with val_partition {val_partition!r}, test_mode {test_mode}")
    return kept


def list_folder(folder: str, side: str) -> list[os.DirEntry]:
    """What a folder holds, hidden files aside."""
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"{side}: folder {folder} does not exist")
    with os.scandir(folder) as entries:
        return [entry for entry in entries if not entry.name.startswith(".")]


def lines_of(meta: str) -> list[tuple[int, str]]:
    """The lines of a meta_info_file that are not blank, with their numbers."""
    if not os.path.isfile(meta):
        raise FileNotFoundError(f"meta_info_file: {meta} does not exist")
    with open(meta, encoding="utf-8") as file:
        lines = [(number, line) for number, line in enumerate(file, 1) if line.strip()]
    if not lines:
        raise ValueError(f"meta_info_file: {meta} is empty; each line names a clip")
    return lines


def check_same(gt: Iterable[str], lq: Iterable[str], gt_root: str, lq_root: str, what: str) -> None:
    """GT and LQ hold the same names, in one line that counts both and says which are missing where."""
    gt, lq = set(gt), set(lq)
    missing = [f"{what} {name_some(sorted(names))} only in {root}"
               for names, root in ((gt - lq, gt_root), (lq - gt, lq_root)) if names]
    if missing:
        raise ValueError(f"GT has {len(gt)} {what}s, LQ {len(lq)}, not of the same names: {'; '.join(missing)}")


def name_some(names: Sequence[str]) -> str:
    listed = ", ".join(repr(name) for name in names[:3])
    return listed + (f" and {len(names) - 3} more" if len(names) > 3 else "")
