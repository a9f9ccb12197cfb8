"""Datasets of Vimeo-90K sequences for super-resolution, and of frame quintuples for interpolation.

Source: KAIR's data/dataset_video_train.py and dataset_video_test.py; for interpolation the test sets of FLAVR
(arXiv:2012.08512). Differs: a reversed item does not affect the next; any number of frames up to 7 works; L can be
computed from GT; caching works.
Legend: T frames, H W pixels of GT, h w pixels of LQ. A sequence is a folder `00001/0001` of im1.png to im7.png.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from data.folders import list_folder
from data.frames import LMDB, FrameReader, check_backend, frame_path, lines_of, scan_clips, scan_root
from data.resize import modcrop
from data.sampler import Key, sample_rng
from data.transforms import split_key, to_float
from data.video import RandomWindow, check_scale, lq_maker
from runtime.ranges import PositiveInt, Seed, checked

MIDDLE = 4  # the target frame, im4
JITTER = 0.05  # FLAVR's: relative for brightness, contrast and saturation, of the full circle for hue


class VimeoTrainDataset(Dataset):
    """Load random windows of named sequences, for both training sets."""

    def _prepare(self, roots: tuple[str, str | None], meta_info_file: str | None, extension: str, random_reverse: bool,
                 window: RandomWindow, seed: int) -> None:
        self.names, self.roots, self.extension = names_of(meta_info_file, roots[0]), roots, extension
        self.random_reverse, self.window, self.seed = random_reverse, window, seed
        window.read(*self._paths(self.names[0], [MIDDLE]))  # raises errors of size or format now

    def __len__(self) -> int:
        return len(self.names)

    def sample_names(self) -> list[str]:
        """Return the name of each sequence."""
        return self.names

    def _draw(self, key: Key | int, numbers: list[int],
              more: Sequence[int] = ()) -> tuple[str, Tensor, Tensor, np.random.Generator]:
        """Return name, LQ and GT of an item, perhaps reversed, with `more` frames behind, and its generator."""
        epoch, index = split_key(key, len(self))
        rng, name = sample_rng(self.seed, epoch, index), self.names[index]
        reverse = self.random_reverse and rng.random() < 0.5
        lq, gt = self.window(*self._paths(name, [*(numbers[::-1] if reverse else numbers), *more]), rng)
        return name, lq, gt, rng

    def _paths(self, name: str, numbers: Sequence[int]) -> tuple[list[str], list[str] | None]:
        """Return the paths of GT and LQ frames of a sequence."""
        gt, lq = (root and [frame_path(root, name, f"im{i}", self.extension) for i in numbers] for root in self.roots)
        return gt, lq


class VideoRecurrentTrainVimeoDataset(VimeoTrainDataset):
    """Load random crops of sequences, flipped and transposed at random.

    Item `(epoch, index)` -> {"L": (T,3,h,w), "H": (T,3,H,W) float32 RGB in [0,1], "key": "00001/0001"}.

    Args:
        dataroot_gt: folder (or lmdb) of sequences.
        dataroot_lq: folder (or lmdb) of degraded frames; None: see `degradation`.
        meta_info_file: list of sequences, named by the first field of each line, e.g. sep_trainlist.txt of Vimeo-90K;
            None: all.
        num_frame: number of frames around im4, 1 to 7.
        temporal_scale: distance in frames between successive frames of an item.
        pad_sequence: repeat the last frame.
        mirror_sequence: append the reversed frames.
        gt_size: side of the GT crop in pixels, a multiple of scale.
        scale: GT pixels per LQ pixel.
        random_reverse: reverse an item with probability 1/2.
        use_hflip: mirror left-right with probability 1/2.
        use_rot: flip upside down, and transpose, each with probability 1/2.
        filename_ext: extension of the file names of frames.
        io_backend: kind of the roots: {"type": "disk"}, or {"type": "lmdb"} for lmdbs of BasicSR's layout.
        name: label of the dataset, without effect.
        degradation: options of `data.resize.Degradation`, or of `SecondOrder` with type second_order, which computes
            L from GT without dataroot_lq.
        seed: seed of all draws, with epoch and index.
    Raises: FileNotFoundError, ValueError: options, names of files or the first frame are invalid.
    """

    @checked
    def __init__(self, *, dataroot_gt: str, dataroot_lq: str | None = None, meta_info_file: str | None = None,
                 num_frame: PositiveInt = 7, temporal_scale: PositiveInt = 1, pad_sequence: bool = False,
                 mirror_sequence: bool = False, gt_size: PositiveInt = 256, scale: PositiveInt = 4,
                 random_reverse: bool = False, use_hflip: bool = True, use_rot: bool = True, filename_ext: str = "png",
                 io_backend: dict | None = None, name: str | None = None, degradation: dict | None = None,
                 seed: Seed = 0):
        check_backend(io_backend, dataroot_gt, dataroot_lq)
        self.numbers = numbers_of(num_frame, temporal_scale)
        self.order = order_of(len(self.numbers), pad_sequence, mirror_sequence)
        window = RandomWindow(gt_size, scale, lq_maker(scale, dataroot_lq, degradation), use_hflip, use_rot)
        self._prepare((dataroot_gt, dataroot_lq), meta_info_file, filename_ext, random_reverse, window, seed)

    def __getitem__(self, key: Key | int) -> dict[str, Tensor | str]:
        name, lq, gt, _ = self._draw(key, self.numbers)
        return {"L": to_float(lq[self.order]), "H": to_float(gt[self.order]), "key": name}


class VideoRecurrentTrainVimeoVFIDataset(VimeoTrainDataset):
    """Load random crops of the frames around im4 and of im4, the target of frame interpolation.

    Item `(epoch, index)` -> {"L": (T,3,H,W), "H": (1,3,H,W) float32 RGB in [0,1], "key": "00001/0001"}.

    Args:
        temporal_scale: distance in frames between successive frames of an item: with num_frame 7 the distance 2 selects
            im1, im3, im5, im7; im4 must not be selected.
        color_jitter: change brightness, contrast, saturation and hue slightly, equally for all frames.
        others: as `VideoRecurrentTrainVimeoDataset`.
    Raises: FileNotFoundError, ValueError: options, names of files or the first frame are invalid.
    """

    @checked
    def __init__(self, *, dataroot_gt: str, meta_info_file: str | None = None, num_frame: PositiveInt = 7,
                 temporal_scale: PositiveInt = 2, gt_size: PositiveInt = 192, random_reverse: bool = False,
                 use_hflip: bool = True, use_rot: bool = True, color_jitter: bool = False, filename_ext: str = "png",
                 io_backend: dict | None = None, name: str | None = None, seed: Seed = 0):
        self.around = numbers_of(num_frame, temporal_scale)
        if MIDDLE in self.around or len(self.around) < 2:
            raise ValueError(f"num_frame {num_frame}, temporal_scale {temporal_scale} give frames {self.around}; im4, "
                             "the target, must not be one; 7 and 2 give [1, 3, 5, 7]")
        check_backend(io_backend, dataroot_gt)
        self.color_jitter = color_jitter
        self._prepare((dataroot_gt, None), meta_info_file, filename_ext, random_reverse,
                      RandomWindow(gt_size, 1, None, use_hflip, use_rot), seed)

    def __getitem__(self, key: Key | int) -> dict[str, Tensor | str]:
        name, _, gt, rng = self._draw(key, self.around, [MIDDLE])
        frames = to_float(gt)
        if self.color_jitter:
            frames = jitter(frames, rng)
        return {"L": frames[:-1], "H": frames[-1:], "key": name}


class VideoTestVimeo90KDataset(Dataset):
    """Load sequences to compare im4: of super-resolution, or with temporal_scale 2 of interpolation.

    Item `(epoch, index)` -> {"L": (T,3,h,w), "H": (1,3,H,W) float32 RGB in [0,1], "folder": "00001/0266",
    "lq_path": file names, "target_frame": index of im4 in L, -1 where it is absent}.

    Args:
        cache_data: decode all frames at the start and keep them in memory (3 bytes per pixel).
        others: as `VideoRecurrentTrainVimeoDataset`.
    Raises: FileNotFoundError, ValueError: options, names of files or frames are invalid.
    """

    @checked
    def __init__(self, *, dataroot_gt: str, dataroot_lq: str | None = None, meta_info_file: str | None = None,
                 num_frame: PositiveInt = 7, temporal_scale: PositiveInt = 1, pad_sequence: bool = False,
                 mirror_sequence: bool = False, scale: PositiveInt = 4, cache_data: bool = False,
                 filename_ext: str = "png", io_backend: dict | None = None, name: str | None = None,
                 degradation: dict | None = None, seed: Seed = 0):
        check_backend(io_backend, dataroot_gt, dataroot_lq)
        self.names, self.scale, self.seed = names_of(meta_info_file, dataroot_gt), scale, seed
        self.gt_root, self.lq_root, self.extension = dataroot_gt, dataroot_lq or dataroot_gt, filename_ext
        maker = lq_maker(scale, dataroot_lq, degradation)
        self.degradation = maker if scale > 1 or degradation else None  # at scale 1 L is GT
        self.numbers = numbers_of(num_frame, temporal_scale)
        self.order = order_of(len(self.numbers), pad_sequence, mirror_sequence)
        keep = range(len(self)) if cache_data else ()
        self.reader = FrameReader({path for index in keep for paths in self._paths(index) for path in paths})
        self.reader([path for paths in self._paths(0) for path in paths][-1:])  # raises errors of format now

    def __len__(self) -> int:
        return len(self.names)

    def sample_names(self) -> list[str]:
        """Name of each sequence."""
        return self.names

    def __getitem__(self, key: Key | int) -> dict[str, Tensor | str | int | list[str]]:
        _, index = split_key(key, len(self))
        lq_paths, gt_path = self._paths(index)
        (gt,), lq = self.reader(gt_path), self.reader(lq_paths)
        gt = modcrop(gt, self.scale)
        if self.degradation:
            lq = list(self.degradation(lq, sample_rng(self.seed, 0, index)))
        check_scale(lq_paths[0], gt, lq[0], self.scale)
        return {"L": to_float(torch.stack([lq[i] for i in self.order])), "H": to_float(gt[None]),
                "folder": self.names[index], "lq_path": [lq_paths[i] for i in self.order],
                "target_frame": self.numbers.index(MIDDLE) if MIDDLE in self.numbers else -1}

    def _paths(self, index: int) -> tuple[list[str], list[str]]:
        """Return the paths of the frames of L, and of im4."""
        name = self.names[index]
        return ([frame_path(self.lq_root, name, f"im{i}", self.extension) for i in self.numbers],
                [frame_path(self.gt_root, name, f"im{MIDDLE}", self.extension)])


class InterpolationTestDataset(Dataset):
    """Load four frames and their middle frame, from rows (folder, four paths, one path) of a subclass.

    Item `(epoch, index)` -> {"L": (4,3,H,W), "H": (1,3,H,W) float32 RGB in [0,1], "folder": name,
    "lq_path": four file names}.
    """

    def __init__(self, rows: list[tuple[str, list[str], str]]):
        self.rows, self.reader = rows, FrameReader()
        self.reader(rows[0][1][:1])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: Key | int) -> dict[str, Tensor | str | list[str]]:
        folder, around, middle = self.rows[split_key(key, len(self))[1]]
        frames = to_float(torch.stack(self.reader([*around, middle])))
        return {"L": frames[:-1], "H": frames[-1:], "folder": folder, "lq_path": around}


class VFI_DAVIS(InterpolationTestDataset):
    """Load DAVIS at 480p: in windows of seven frames, two frames apart, frame 3 as target of 0, 2, 4, 6.

    Args:
        dataroot_gt: folder (or lmdb) of clip folders.
        others: as `VideoRecurrentTrainVimeoDataset`.
    Raises: FileNotFoundError, ValueError: names of files or frames are invalid.
    """

    def __init__(self, *, dataroot_gt: str, io_backend: dict | None = None, name: str | None = None):
        check_backend(io_backend, dataroot_gt)
        rows = [(f"{clip.name}/{clip.frames[start + 3]}", clip.gt[start : start + 7 : 2], clip.gt[start + 3])
                for clip in scan_clips(dataroot_gt, None) for start in range(0, len(clip.frames) - 6, 2)]
        if not rows:
            raise ValueError(f"dataroot_gt {dataroot_gt} has no clip of seven frames; give longer clips")
        super().__init__(rows)


class VFI_UCF101(InterpolationTestDataset):
    """Load UCF101: in each folder framet as target of frame0 to frame3.

    Args:
        dataroot_gt: folder (or lmdb) of these folders.
        others: as `VideoRecurrentTrainVimeoDataset`.
    Raises: FileNotFoundError, ValueError: names of files or frames are invalid.
    """

    def __init__(self, *, dataroot_gt: str, io_backend: dict | None = None, name: str | None = None):
        check_backend(io_backend, dataroot_gt)
        wanted, rows = [*(f"frame{i}" for i in range(4)), "framet"], []
        for clip in scan_clips(dataroot_gt, None):
            paths = dict(zip(clip.frames, clip.gt))
            if absent := [frame for frame in wanted if frame not in paths]:
                raise FileNotFoundError(f"{dataroot_gt}/{clip.name}: {absent[0]} is missing; a folder holds frame0 to "
                                        "frame3 and framet")
            *around, middle = (paths[frame] for frame in wanted)
            rows.append((clip.name, around, middle))
        super().__init__(rows)


class VFI_Vimeo90K(InterpolationTestDataset):
    """Load Vimeo-90K: im4 as target of im1, im3, im5, im7.

    Args:
        meta_info_file: list of sequences, named by the first field of each line, e.g. sep_testlist.txt of Vimeo-90K;
            None: all.
        others: as `VideoRecurrentTrainVimeoDataset`.
    Raises: FileNotFoundError, ValueError: names of files or frames are invalid.
    """

    def __init__(self, *, dataroot_gt: str, meta_info_file: str | None = None, filename_ext: str = "png",
                 io_backend: dict | None = None, name: str | None = None):
        check_backend(io_backend, dataroot_gt)
        super().__init__([(name, [frame_path(dataroot_gt, name, f"im{i}", filename_ext) for i in (1, 3, 5, 7)],
                           frame_path(dataroot_gt, name, f"im{MIDDLE}", filename_ext))
                          for name in names_of(meta_info_file, dataroot_gt)])


# Shared functions ------------------------------------------------------------------------------------------------

def names_of(meta: str | None, root: str) -> list[str]:
    """Return the sequences that a file lists, else all below the root, sorted."""
    if meta:
        return [line.split()[0] for _, line in lines_of(meta)]
    if root.endswith(LMDB):
        return list(scan_root(root, "dataroot_gt"))
    names = [f"{clip}/{sequence}" for clip in list_folder(root)[0]
             for sequence in list_folder(os.path.join(root, clip))[0]]
    if not names:
        raise ValueError(f"dataroot_gt {root} holds no sequences; they are folders like 00001/0001 of im1.png, ...")
    return names


def numbers_of(num_frame: int, temporal_scale: int) -> list[int]:
    """Return the numbers of the frames im1 to im7 of an item: num_frame around im4, every temporal_scale-th."""
    if num_frame > 7:
        raise ValueError(f"num_frame {num_frame} must be in 1..7")
    first = (9 - num_frame) // 2
    return list(range(first, first + num_frame, temporal_scale))


def order_of(length: int, pad: bool, mirror: bool) -> list[int]:
    """Return the order of frames: all, then the last one again, or all reversed."""
    if pad and mirror:
        raise ValueError("pad_sequence and mirror_sequence both lengthen the sequence; choose one")
    return [*range(length), *([length - 1] if pad else []), *(range(length - 1, -1, -1) if mirror else [])]


def jitter(frames: Tensor, rng: np.random.Generator) -> Tensor:
    """Change brightness, contrast, saturation and hue of (T,3,H,W) in [0,1] equally, in random order."""
    from torchvision.transforms import functional  # slow to import

    for change in rng.permutation(4):
        amount = float(rng.uniform(-JITTER, JITTER))
        if change == 3:
            frames = functional.adjust_hue(frames, amount)
        else:
            adjust = (functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation)[change]
            frames = adjust(frames, 1 + amount)
    return frames
