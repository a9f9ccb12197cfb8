"""Datasets of clips: random crops of a few frames for training, full clips or windows of them for tests.

Source: KAIR's data/dataset_video_train.py and dataset_video_test.py, whose options and fields these are. Differs: every
draw comes from `sample_rng(seed, epoch, index)`; LQ and GT are paired by name, not by position; `val_partition` applies
to every dataset (KAIR trains on its own test clips unless the name is "REDS"); a window may end at the last frame of a
clip for any interval; num_frame 1 works; L can be computed from GT.
Legend: T frames, H W pixels of GT, h w pixels of LQ (H = scale * h). A frame in memory is (3,H,W) uint8 RGB.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from data.degradation import build_degradation
from data.frames import (
    LAYOUT,
    LMDB,
    SIDES,
    Clip,
    FrameReader,
    check_backend,
    clips_of_meta,
    lines_of,
    partition,
    paths_of,
    scan_clips,
)
from data.image_files import size_of
from data.resize import Degradation, modcrop
from data.sampler import Key, sample_rng
from data.synthetic import SyntheticVideoDataset
from data.transforms import augment, build_drawn, split_key, to_float
from runtime.ranges import PositiveInt, Range, Seed, checked

Level = Annotated[float, Range(ge=0, le=255)]  # of noise, on the scale of 8-bit pixels


class VideoRecurrentTrainDataset(Dataset):
    """Load random crops of successive frames, flipped and transposed at random.

    Item `(epoch, index)` -> {"L": (T,C,h,w), "H": (T,3,H,W) float32 RGB in [0,1], "key": "clip/frame"}.
    There is one item per frame; an item too close to the end of its clip starts at a random frame.

    Args:
        dataroot_gt: folder of clip folders (or of the frames of a single clip), or an lmdb; None: drawn video.
        generated: drawn video without dataroot_gt, e.g. {"num_clips": 256}: arguments of `SyntheticVideoDataset`.
        dataroot_lq: folder or lmdb of degraded frames, with the names of GT; None: see `degradation`.
        meta_info_file: list of clips in lines `clip frames shape first_frame`, e.g. `000 100 (720,1280,3) 0`, whose
            files are named by filename_tmpl and filename_ext. Without first_frame, or with None here, all PNG, JPEG and
            WebP files, in order of name.
        num_frame: number T of frames of an item.
        gt_size: side of the GT crop in pixels, a multiple of scale.
        scale: GT pixels per LQ pixel.
        filename_tmpl: format of the frame number in a file name, for meta_info_file.
        filename_ext: extension of file names, for meta_info_file.
        interval_list: distances in frames between successive frames; one is drawn for each item.
        random_reverse: reverse an item with probability 1/2.
        use_hflip: mirror left-right with probability 1/2.
        use_rot: flip upside down, and transpose, each with probability 1/2.
        val_partition: clips of REDS to exclude, "REDS4" or "official"; None: none.
        test_mode: keep only the clips of val_partition, instead of excluding them.
        io_backend: kind of the roots: {"type": "disk"}, or {"type": "lmdb"} for lmdbs of BasicSR's layout.
        cache_data: decode all frames at the start and keep them in memory (3 bytes per pixel).
        name: label of the dataset, without effect.
        degradation: options of `data.resize.Degradation`, or of `SecondOrder` with type second_order, which computes
            L from GT without dataroot_lq.
        sigma_min: smallest noise level of nonblind denoising, see sigma_max.
        sigma_max: largest noise level of nonblind denoising, 0..255; one level is drawn for each item: L = H + noise of
            level / 255, not clipped, with level / 255 as fourth channel. Needs scale 1; dataroot_lq has no effect.
        seed: seed of all draws, with epoch and index.
    Raises: FileNotFoundError, ValueError: options, names of files or the first frame are invalid.
    """

    layout = LAYOUT

    nonblind = False

    @checked
    def __init__(self, *, dataroot_gt: str | None = None, dataroot_lq: str | None = None,
                 meta_info_file: str | None = None, generated: dict | None = None,
                 num_frame: PositiveInt = 6, gt_size: PositiveInt = 256, scale: PositiveInt = 4,
                 filename_tmpl: str = "08d", filename_ext: str = "png",
                 interval_list: Sequence[PositiveInt] = (1,), random_reverse: bool = False,
                 use_hflip: bool = True, use_rot: bool = True, val_partition: str | None = None,
                 test_mode: bool = False, io_backend: dict | None = None, cache_data: bool = False,
                 name: str | None = None, degradation: dict | None = None, sigma_min: Level = 0.0,
                 sigma_max: Level | None = None, seed: Seed = 0):
        if not dataroot_gt and (dataroot_lq or meta_info_file):
            raise ValueError(f"dataroot_gt is missing, though {dataroot_lq or meta_info_file} is given; name it, or "
                             "set that to null as well, for drawn video")
        if self.nonblind and sigma_max is None:
            raise ValueError("sigma_max is missing; give the largest level of noise, 0..255, e.g. 50")
        self.sigmas = None if sigma_max is None else (sigma_min, sigma_max)
        if self.sigmas:
            check_noise(f"sigma_min {sigma_min}, sigma_max {sigma_max}", self.sigmas, scale, dataroot_gt, degradation)
            dataroot_lq = None
        self.drawn = None if dataroot_gt else build_drawn(
            SyntheticVideoDataset, generated,
            {"num_frame": num_frame, "gt_size": gt_size, "use_hflip": use_hflip, "use_rot": use_rot},
            scale=scale, seed=seed, degradation=degradation)
        if self.drawn:
            return
        check_backend(io_backend, dataroot_gt, dataroot_lq)
        if not interval_list:
            raise ValueError("interval_list is empty; give distances in frames, e.g. [1]")
        self.window = RandomWindow(gt_size, scale, None if self.sigmas else lq_maker(scale, dataroot_lq, degradation),
                                   use_hflip, use_rot)
        self.num_frame, self.seed = num_frame, seed
        self.interval_list, self.random_reverse = tuple(interval_list), random_reverse

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
        self.window.reader = FrameReader(paths_of(self.clips) if cache_data else ())
        self.window.read(*pair_of(self.clips[0], [0]))  # raises errors of size or format now, not in mid-epoch

    def __len__(self) -> int:
        return len(self.drawn or self.samples)

    def sample_names(self) -> list[str]:
        """Return clip and first frame of each item; [] for drawn ones."""
        return [] if self.drawn else [f"{clip.name}/{clip.frames[frame]}" for clip, frame in self.samples]

    def __getitem__(self, key: Key | int) -> dict[str, Tensor | str]:
        if self.drawn:
            return self.drawn[key]
        epoch, index = split_key(key, len(self))
        rng = sample_rng(self.seed, epoch, index)
        clip, frame = self.samples[index]
        lq, gt = self.window(*pair_of(clip, self._positions(len(clip.frames), frame, rng)), rng)
        target = to_float(gt)
        degraded = with_noise(target, float(rng.uniform(*self.sigmas)), rng) if self.sigmas else to_float(lq)
        return {"L": degraded, "H": target, "key": f"{clip.name}/{clip.frames[frame]}"}

    def _positions(self, length: int, start: int, rng: np.random.Generator) -> list[int]:
        """Draw the positions of the num_frame frames of an item in a clip; the first is `start` where that fits."""
        interval = int(rng.choice(self.interval_list))
        last_start = length - ((self.num_frame - 1) * interval + 1)
        if start > last_start:
            start = int(rng.integers(last_start + 1))
        positions = [start + i * interval for i in range(self.num_frame)]
        return positions[::-1] if self.random_reverse and rng.random() < 0.5 else positions


class VideoRecurrentTrainNonblindDenoisingDataset(VideoRecurrentTrainDataset):
    """Load as `VideoRecurrentTrainDataset`; sigma_max is required."""

    nonblind = True


@dataclass(frozen=True)
class LazyClip:
    """Give access to a clip of a test set in windows, so that memory does not depend on its length.

    Attributes:
        name: of the clip.
        frames: T names without extension.
        paths: T paths of the LQ frames.
        read: `read(start=0, stop=None)` -> {"L": (t,C,h,w), "H": (t,3,H,W)} of frames start..stop-1, float32 RGB in
            [0,1]; without ground truth H is absent. Concatenated windows equal the clip.
    """

    name: str
    frames: list[str]
    paths: list[str]
    read: Callable[..., dict[str, Tensor]]


class VideoRecurrentTestDataset(Dataset):
    """Load full clips, one per folder, without random draws except optional noise.

    Item `(epoch, index)` -> {"L": (T,C,h,w), "H": (T,3,H,W) float32 RGB in [0,1], "folder": name,
    "lq_path": T file names}; equal in every epoch. Without dataroot_gt H is absent.
    `clip(index)` -> `LazyClip`, for clips of any length.

    Args:
        dataroot_gt: folder of clip folders (or of the frames of a single clip), or an lmdb; None: LQ only.
        generated: drawn video where both roots are None: arguments of `SyntheticVideoDataset`.
        dataroot_lq: folder or lmdb of degraded frames, with the names of GT; None: see `degradation`.
        meta_info_file: list of clips to load, named by the first field of each line; None: all.
        scale: GT pixels per LQ pixel; GT is cropped at the bottom and right to a multiple of it.
        num_frame: key of KAIR's option files, without effect.
        cache_data: decode all frames at the start and keep them in memory (3 bytes per pixel).
        io_backend: kind of the roots: {"type": "disk"}, or {"type": "lmdb"} for lmdbs of BasicSR's layout.
        name: label of the dataset, without effect.
        degradation: options of `data.resize.Degradation`, or of `SecondOrder` with type second_order, which computes
            L from GT without dataroot_lq.
        sigma: noise level of nonblind denoising, 0..255: L = GT + noise of sigma / 255, not clipped, with sigma / 255
            as fourth channel. Needs scale 1; dataroot_lq has no effect.
        seed: seed of the noise, with index and frame.
    Raises: FileNotFoundError, ValueError: options, names of files or frames are invalid.
    """

    layout = LAYOUT

    sides, videos = SIDES, False

    @checked
    def __init__(self, *, dataroot_gt: str | None = None, dataroot_lq: str | None = None,
                 meta_info_file: str | None = None, generated: dict | None = None, scale: PositiveInt = 4,
                 num_frame: Annotated[int, Range(ge=-1)] = -1, cache_data: bool = False, io_backend: dict | None = None,
                 name: str | None = None, degradation: dict | None = None, sigma: Level | None = None,
                 seed: Seed = 0):
        if meta_info_file and not (dataroot_gt or dataroot_lq):
            raise ValueError(f"dataroot_gt is missing, though {meta_info_file} is given; name it")
        if sigma is not None:
            check_noise(f"sigma {sigma}", (sigma, sigma), scale, dataroot_gt, degradation)
            dataroot_lq = None
        self.drawn = None if dataroot_gt or dataroot_lq else build_drawn(
            SyntheticVideoDataset, generated,
            {"num_clips": 2, "first_clip": 100_000, "use_hflip": False, "use_rot": False},
            scale=scale, seed=seed, degradation=degradation)
        if self.drawn:
            return
        check_backend(io_backend, dataroot_gt, dataroot_lq, sides=self.sides, videos=self.videos)
        self.degradation = lq_maker(scale, dataroot_lq, degradation)
        self.scale, self.sigma, self.seed = scale, sigma, seed
        only = [line.split()[0] for _, line in lines_of(meta_info_file)] if meta_info_file else None
        self.clips = scan_clips(dataroot_gt, dataroot_lq, only, self.sides)
        self.reader = FrameReader(paths_of(self.clips) if cache_data else ())
        self.sizes: dict[str, tuple] = {}  # size of the frames of each clip, to compare windows

    def __len__(self) -> int:
        return len(self.drawn or self.clips)

    def __getitem__(self, key: Key | int) -> dict[str, Tensor | str | list[str]]:
        if self.drawn:
            return self.drawn[key]
        clip = self.clip(split_key(key, len(self))[1])
        return {**clip.read(), "folder": clip.name, "lq_path": clip.paths}

    def clip(self, index: int) -> LazyClip:
        """Return the clip of an index, to be read in windows."""
        if self.drawn:  # a few frames, drawn at once
            item = self.drawn[index]
            frames = [os.path.splitext(os.path.basename(path))[0] for path in item["lq_path"]]
            return LazyClip(item["folder"], frames, item["lq_path"], lambda start=0, stop=None: {
                side: item[side][start:stop] for side in "LH"})
        clip = self.clips[index]
        return LazyClip(clip.name, clip.frames, clip.lq or clip.gt, partial(self._read, index))

    def _read(self, index: int, start: int = 0, stop: int | None = None) -> dict[str, Tensor]:
        clip, window = self.clips[index], slice(start, stop)
        lq = self._frames(clip.lq, window) if clip.lq else None
        if clip.gt is None:
            return {"L": to_float(torch.stack(lq))}
        gt = [modcrop(frame, self.scale) for frame in self._frames(clip.gt, window)]
        target = to_float(torch.stack(gt))
        if lq is not None:
            check_scale(clip.lq[start], gt[0], lq[0], self.scale)
            return {"L": to_float(torch.stack(lq)), "H": target}
        # A separate generator for each frame, so that its noise does not depend on the window.
        rngs = [sample_rng(self.seed, 0, index, start + i) for i in range(len(gt))]
        if self.sigma is not None:
            noisy = [with_noise(frame[None], self.sigma, rng) for frame, rng in zip(target, rngs)]
            return {"L": torch.cat(noisy), "H": target}
        drawn = self.degradation.drawn(sample_rng(self.seed, 0, index))
        small = [drawn([frame], rng) for frame, rng in zip(gt, rngs)]
        return {"L": to_float(torch.cat(small)), "H": target}

    def _frames(self, paths: list[str], window: slice) -> list[Tensor]:
        frames = self.reader(paths[window])
        first = self.sizes.setdefault(paths[0], frames[0].shape)
        if frames[0].shape != first:
            raise ValueError(f"{paths[window][0]}: a frame of {size_of(frames[0])} in a clip of "
                             f"{first[2]}x{first[1]} ({paths[0]})")
        return frames


class SingleVideoRecurrentTestDataset(VideoRecurrentTestDataset):
    """Load clips without ground truth, as `VideoRecurrentTestDataset` with dataroot_lq alone.

    Args:
        dataroot_lq: folder or lmdb of degraded frames.
        meta_info_file: list of clips to load, named by the first field of each line; None: all.
        name: label of the dataset, without effect.
    """

    def __init__(self, *, dataroot_lq: str, meta_info_file: str | None = None,
                 num_frame: Annotated[int, Range(ge=-1)] = -1, cache_data: bool = False,
                 io_backend: dict | None = None, name: str | None = None):
        if not dataroot_lq:
            raise ValueError("dataroot_lq is missing; name the folder of clips to restore")
        super().__init__(dataroot_lq=dataroot_lq, meta_info_file=meta_info_file, cache_data=cache_data,
                         io_backend=io_backend)


class FrameFolder(VideoRecurrentTestDataset):
    """Load the frames of one clip or of several, for inference.

    Args:
        input: folder of frames or of clip folders, an lmdb, or a video.
        gt: ground truth with equal names of frames; None: unknown.
        scale: GT pixels per input pixel.
        sigma: noise level of the input, 0..255, as fourth channel for nonblind denoising; None: no channel.
    Raises: FileNotFoundError, ValueError: options, names of files or frames are invalid.
    """

    sides, videos = ("gt", "input"), True

    @checked
    def __init__(self, input: str, gt: str | None = None, *, scale: int = 1, sigma: Level | None = None):
        if not input:
            raise ValueError("input is missing; name the folder of frames to restore")
        super().__init__(dataroot_lq=input, dataroot_gt=gt, scale=scale,
                         io_backend={"type": "lmdb" if input.endswith(LMDB) else "disk"})
        self.level = sigma

    def _read(self, index: int, start: int = 0, stop: int | None = None) -> dict[str, Tensor]:
        item = super()._read(index, start, stop)
        return item if self.level is None else item | {"L": with_level(item["L"], self.level)}


# Parts of an item --------------------------------------------------------------------------------------------------

class RandomWindow:
    """Crop one window from all frames of an item, uniformly on the LQ grid, and augment it.

    Args:
        gt_size: side of the window in GT pixels.
        scale: GT pixels per LQ pixel.
        degradation: computes L where there are no LQ frames; None: L is H.
        use_hflip, use_rot: see `augment`.
    """

    def __init__(self, gt_size: int, scale: int, degradation: Degradation | None, use_hflip: bool, use_rot: bool):
        if gt_size % scale:
            raise ValueError(f"gt_size {gt_size} must be a positive multiple of scale {scale}")
        self.gt_size, self.scale, self.degradation = gt_size, scale, degradation
        self.use_hflip, self.use_rot = use_hflip, use_rot
        self.reader = FrameReader()

    def read(self, gt_paths: list[str], lq_paths: list[str] | None) -> tuple[list[Tensor], list[Tensor] | None]:
        """Read GT and LQ frames. Raises ValueError where their sizes do not match or are below the window."""
        gt = self.reader(gt_paths)
        if min(gt[0].shape[-2:]) < self.gt_size:
            raise ValueError(f"{gt_paths[0]}: a frame of {size_of(gt[0])} is smaller than gt_size {self.gt_size}; "
                             "give larger frames or a smaller gt_size")
        if lq_paths is None:
            return gt, None
        lq = self.reader(lq_paths)
        check_scale(lq_paths[0], gt[0], lq[0], self.scale)
        return gt, lq

    def __call__(self, gt_paths: list[str], lq_paths: list[str] | None,
                 rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Return LQ (T,3,h,w) and GT (T,3,H,W), uint8."""
        gt, lq = self.read(gt_paths, lq_paths)
        scale, side = self.scale, self.gt_size // self.scale
        top, left = (int(rng.integers(size // scale - side + 1)) for size in gt[0].shape[-2:])
        rows, columns = (slice(i * scale, i * scale + self.gt_size) for i in (top, left))
        sharp = torch.stack([frame[:, rows, columns] for frame in gt])
        if lq is not None:
            small = torch.stack([frame[:, top : top + side, left : left + side] for frame in lq])
        else:
            small = self.degradation.window(gt, top, left, side, rng) if self.degradation else sharp
        small, sharp = augment([small, sharp], rng, self.use_hflip, self.use_rot)
        return small, sharp


def pair_of(clip: Clip, positions: Sequence[int]) -> tuple[list[str], list[str] | None]:
    """Return the paths of GT and LQ frames at these positions."""
    gt, lq = (None if paths is None else [paths[i] for i in positions] for paths in (clip.gt, clip.lq))
    return gt, lq


def with_noise(clean: Tensor, sigma: float, rng: np.random.Generator) -> Tensor:
    """Add noise of sigma / 255 to (T,3,H,W) in [0,1], not clipped, and the channel of its level: (T,4,H,W)."""
    noise = torch.from_numpy(rng.standard_normal(clean.shape, dtype=np.float32)) * (sigma / 255)
    return with_level(clean + noise, sigma)


def with_level(frames: Tensor, sigma: float) -> Tensor:
    """Append the channel of a noise level to (T,3,H,W): (T,4,H,W)."""
    return torch.cat([frames, torch.full_like(frames[:, :1], sigma / 255)], dim=1)


def check_noise(what: str, levels: tuple[float, float], scale: int, dataroot_gt: str | None,
                degradation: dict | None) -> None:
    """Raise ValueError where noise of these levels cannot be added to GT; `what` names its options."""
    if scale != 1 or not dataroot_gt or not 0 <= levels[0] <= levels[1] <= 255:
        raise ValueError(f"{what} adds noise to GT: it needs dataroot_gt, scale 1, not {scale}, and rising levels in "
                         "0..255")
    if degradation:
        raise ValueError(f"{what} and degradation both compute L from GT; remove one")


def lq_maker(scale: int, dataroot_lq: str | None, degradation: dict | None) -> Degradation | None:
    """Return what computes L without dataroot_lq, else None. Raises ValueError where both are given."""
    if dataroot_lq and degradation:
        raise ValueError(f"degradation computes L from GT, but dataroot_lq {dataroot_lq} is given, too; remove one")
    return None if dataroot_lq else build_degradation(scale, degradation)


def check_scale(lq_path: str, gt: Tensor, lq: Tensor, scale: int) -> None:
    """Raise ValueError where GT is not scale times as large as LQ."""
    if gt.shape[-2:] != tuple(size * scale for size in lq.shape[-2:]):
        raise ValueError(f"{lq_path}: LQ is {size_of(lq)} but its GT is {size_of(gt)}; scale {scale} asks for "
                         f"GT = {scale} x LQ")
