"""Frames of clips in folders or in an lmdb: listing, pairing by name, and reading.

A frame is identified by its path, in an lmdb by `ROOT.lmdb/clip/frame` without extension, like the keys of BasicSR,
in a video by `CLIP.mp4/number`.
Source: the layout of BasicSR's lmdb (data.mdb and meta_info.txt) and KAIR's meta_info files. Differs: LQ and GT are
paired by name, not by position; numbers in names are sorted by value (2 before 10); options are not changed.
A frame in memory is (3,H,W) uint8 RGB.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from torch import Tensor

from data.folders import is_folder, list_folder, read_lines, unsupported_files
from data.image_files import KINDS, picture_in, printable, read_picture, size_of
from data.movie import frame_paths, is_frame, is_video, read_frames
from storage import system

VAL_PARTITIONS = {"REDS4": {"000", "011", "015", "020"}, "official": {f"{clip:03d}" for clip in range(240, 270)}}
LMDB = ".lmdb"
SIDES = ("dataroot_gt", "dataroot_lq")  # names of the two roots in messages
MAKE_LMDB = "python -m data.prepare lmdb FOLDER OUT.lmdb makes one"

LAYOUT = """expected, with any names:
  FOLDER/
    clip_1/           one folder for each clip
      00000000.png    its frames: PNG, JPEG or WebP, in order of name
      00000001.png
    clip_2/
      00000000.png"""

# Sources of public data, by a part of the path of a missing folder.
PUBLIC = {
    "REDS": "REDS (seungjunnah.github.io/Datasets/reds): a folder per clip, 000 to 239 of its train set and "
            "240 to 269, which are 000 to 029 of its validation set",
    "REDS4": "clips 000, 011, 015 and 020 of REDS's train set (seungjunnah.github.io/Datasets/reds), a folder each",
    "vimeo90k": "the Vimeo-90K septuplets (toflow.csail.mit.edu): sequences/00001/0001/im1.png to im7.png, "
                "sep_trainlist.txt, sep_testlist.txt",
    "Vid4": "Vid4: the clips calendar, city, foliage and walk, a folder each",
    "UDM10": "UDM10 (github.com/psychopa4/PFNL): ten clips, a folder each",
    "DVD": "DVD of Su et al. 2017 (github.com/shuochsu/DeepVideoDeblurring): a folder per clip, its GT/ in train_GT/, "
           "its input/ in train_GT_blurred/",
    "DVD10": "the ten test clips of DVD (github.com/shuochsu/DeepVideoDeblurring), each one's GT/ in test_GT/, its "
             "input/ in test_GT_blurred/",
    "GoPro": "GOPRO_Large (seungjunnah.github.io/Datasets/gopro): a folder per clip, its sharp/ in train_GT/, its "
             "blur/ in train_GT_blurred/",
    "GoPro11": "the eleven test clips of GOPRO_Large (seungjunnah.github.io/Datasets/gopro), each one's sharp/ in "
               "test_GT/, its blur/ in test_GT_blurred/",
    "DAVIS": "DAVIS 2017 at 480p (davischallenge.org): the clip folders of JPEGImages/480p",
    "Set8": "Set8 (github.com/m-tassano/fastdvdnet): eight clips, a folder each",
    "UCF101": "the UCF101 triplets of frame interpolation: folders of frame0.png to frame3.png and framet.png",
}


class Clip(NamedTuple):
    """Hold the names of the frames of a clip, without extension, and their paths; an absent side is None."""

    name: str
    frames: list[str]
    gt: list[str] | None
    lq: list[str] | None


# Reading -----------------------------------------------------------------------------------------------------------

class FrameReader:
    """Read frames; those of `keep` are read once at the start and shared with worker processes."""

    def __init__(self, keep: Iterable[str] = ()):
        self.kept = {path: read_frame(path) for path in keep}

    def __call__(self, paths: Sequence[str]) -> list[Tensor]:
        """Return read-only frames (3,H,W) uint8. Raises ValueError where their sizes differ."""
        if paths and is_frame(paths[0]):
            return read_frames(paths)
        frames = [self.kept[path] if path in self.kept else read_frame(path) for path in paths]
        for path, frame in zip(paths, frames, strict=True):
            if frame.shape != frames[0].shape:
                raise ValueError(f"{path}: a frame of {size_of(frame)} in a clip of {size_of(frames[0])} ({paths[0]})")
        return frames


def paths_of(clips: Iterable[Clip]) -> Iterable[str]:
    """Return the paths of all frames of clips."""
    return (path for clip in clips for path in (clip.gt or []) + (clip.lq or []))


def read_frame(path: str, least: int = 1) -> Tensor:
    """Read a frame from an image file, an lmdb or a video, as (3,H,W) uint8 RGB; `least` as in `read_picture`."""
    if LMDB + "/" in path and not os.path.isfile(path):
        return picture_in(_in_lmdb(path), path, least)
    return read_frames([path])[0] if is_frame(path) else read_picture(path, least)


# lmdb --------------------------------------------------------------------------------------------------------------

_open: dict[str, Any] = {}  # root -> environment


def _close_all() -> None:
    while _open:
        _open.popitem()[1].close()


system.at_fork(before=_close_all)  # an lmdb environment must not cross a fork


def lmdb_module() -> Any:
    """Import lmdb. Raises ValueError where it is not installed."""
    try:
        return importlib.import_module("lmdb")
    except ImportError:
        raise ValueError("lmdb is not installed; pip install lmdb") from None


def _in_lmdb(path: str) -> bytes:
    """Return the encoded image at `ROOT.lmdb/key`."""
    root, _, key = path.rpartition(LMDB + "/")
    root += LMDB
    if root not in _open:
        lmdb = lmdb_module()
        try:
            _open[root] = lmdb.open(root, readonly=True, lock=False, readahead=False, create=False)
        except lmdb.Error as error:
            raise ValueError(f"{root}: not a readable lmdb ({error}); {MAKE_LMDB}") from None
    with _open[root].begin(buffers=True) as transaction:
        found = transaction.get(os.fsencode(key))
        if found is None:
            raise FileNotFoundError(f"{path}: frame is missing in the lmdb")
        return bytes(found)


@lru_cache(maxsize=4)
def _scan_lmdb(root: str, side: str) -> dict[str, dict[str, str]]:
    """Return {clip: {frame: path}} of the keys in meta_info.txt, read-only."""
    check_folder(root, side)
    clips: dict[str, dict[str, str]] = {}
    for _, line in lines_of(os.path.join(root, "meta_info.txt"), "lmdb"):
        key = os.path.splitext(line.strip().rsplit(" ", 2)[0])[0]  # of `clip/frame.png (h,w,c) compress_level`
        folder, _, frame = key.rpartition("/")
        clips.setdefault(folder, {})[frame] = f"{root}/{key}"
    return {folder: dict(sorted(clips[folder].items(), key=_natural)) for folder in sorted(clips)}


def check_backend(io_backend: dict | None, *roots: str | None, sides: Sequence[str] = SIDES,
                  videos: bool = False) -> None:
    """Raise an error where the backend is unknown, a root is missing or of another kind; `videos` may be roots."""
    backend = dict(io_backend or {"type": "disk"})  # a copy, to keep the options
    kind = backend.pop("type", None)
    if kind not in ("disk", "lmdb") or backend:
        raise ValueError(f'io_backend {io_backend} is unknown; valid are {{"type": "disk"}} and {{"type": "lmdb"}}')
    for side, root in zip(sides, roots):
        if not root or videos and is_video(root):
            continue
        if root.endswith(LMDB) != (kind == "lmdb"):
            need = f"the name of an lmdb ends with {LMDB}; {MAKE_LMDB}" if kind == "lmdb" else 'give {"type": "lmdb"}'
            raise ValueError(f'{side} {root} does not fit io_backend "{kind}"; {need}')
        check_folder(root, side)
    if kind == "lmdb":
        lmdb_module()


def check_folder(folder: str, side: str) -> None:
    """Raise an error where a folder (or lmdb) does not exist, with its source, or is a file."""
    there = is_folder(folder)
    if os.path.isfile(folder):
        raise ValueError(f"{side}: {printable(folder)} is a file; give a folder of {KINDS} frames, or of one such "
                         "folder for each clip; of a video, python -m data.prepare frames VIDEO FOLDER makes one")
    if not there:
        remedies = [MAKE_LMDB] * folder.endswith(LMDB) + [f"fetch {text}" for name, text in PUBLIC.items()
                                                          if name in folder.split("/")]
        raise FileNotFoundError("; ".join([f"{side}: folder {folder} does not exist", *remedies]))


# Listing -----------------------------------------------------------------------------------------------------------

def scan_clips(gt_root: str | None, lq_root: str | None, only: Sequence[str] | None = None,
               sides: tuple[str, str] = SIDES) -> list[Clip]:
    """Return the clips below one or two roots, paired by the names of folders and frames, sorted by name.

    Args:
        gt_root, lq_root: folders or lmdbs, of which one may be None.
        only: names of the clips to return, in this order; None: all.
        sides: names of the roots in messages.
    Raises: FileNotFoundError, ValueError: names differ, frames are missing, or a folder is empty.
    """
    gt, lq = (scan_root(root, side, only) if root else None for root, side in zip((gt_root, lq_root), sides))
    if gt and lq:
        check_same(gt, lq, gt_root, lq_root, "clip")
        for folder in gt:
            check_same(gt[folder], lq[folder], os.path.join(gt_root, folder), os.path.join(lq_root, folder), "frame")
    root, clips = (gt_root, gt) if gt else (lq_root, lq)
    for folder, frames in clips.items():
        check_numbers(os.path.join(root, folder), frames)
    own_name = os.path.basename(os.path.abspath(root))  # where the root is the only clip
    return [Clip(folder or own_name, list(frames),
                 list(gt[folder].values()) if gt else None,
                 [lq[folder][frame] for frame in frames] if lq else None) for folder, frames in clips.items()]


def scan_root(root: str, side: str, only: Sequence[str] | None = None) -> dict[str, dict[str, str]]:
    """Return {clip: {frame: path}}, sorted; the clip "" holds frames in the root itself."""
    if is_video(root):
        return {"": frame_paths(root)}
    if root.endswith(LMDB):
        clips = _scan_lmdb(root, side)
        return {folder: scan_frames(root, folder, side) for folder in (clips if only is None else only)}
    check_folder(root, side)
    folders, pictures = list_folder(root)
    if pictures:
        if folders:
            raise ValueError(f"{side} {root} holds frames and folders ({name_some(folders)}); keep one kind")
        folders = [""]
    elif not folders:
        raise ValueError(f"{side} {root} holds no clips; put the {KINDS} frames of each clip into a separate folder"
                         + unsupported_files("; "))
    elif only is not None:
        folders = only
    return {folder: scan_frames(root, folder, side) for folder in folders}


def scan_frames(root: str, folder: str, side: str) -> dict[str, str]:
    """Return {name without extension: path} of the images of a clip, sorted by name."""
    if root.endswith(LMDB):
        if folder not in (clips := _scan_lmdb(root, side)):
            raise FileNotFoundError(f"{side}: clip {folder!r} is missing in {root}")
        return clips[folder]
    frames: dict[str, str] = {}
    check_folder(folder := os.path.join(root, folder), side)
    for name in list_folder(folder)[1]:
        stem, path = os.path.splitext(name)[0], os.path.join(folder, name)
        if stem in frames:
            raise ValueError(f"{path}: a second frame named {stem!r} ({frames[stem]}); keep one of them")
        frames[stem] = path
    if not frames:
        raise ValueError(f"{side} {folder} holds no frames; {KINDS} files are needed{unsupported_files('; ')}")
    return dict(sorted(frames.items(), key=_natural))


def check_numbers(clip: str, frames: Iterable[str]) -> None:
    """Raise ValueError where frames that are numbered in equal steps have a gap."""
    parts = [re.fullmatch(r"(.*?)([0-9]+)([^0-9]*)", frame) for frame in frames]
    if len(parts) < 3 or not all(parts) or len({(part[1], part[3]) for part in parts}) > 1:
        return
    parts.sort(key=lambda part: int(part[2]))
    steps = [int(after[2]) - int(before[2]) for before, after in zip(parts, parts[1:])]
    step, at = min(steps), steps.index(max(steps))
    if 0 < step < steps[at] and 2 * steps.count(step) >= len(steps):  # otherwise names are times, not numbers
        raise ValueError(f"{clip}: frames are missing between {parts[at][0]!r} and {parts[at + 1][0]!r}; add them, or "
                         "make a clip of each part")


def _natural(item: tuple[str, str]) -> list:
    """Return the key that sorts (name, path) by the values of numbers, then by leading zeros."""
    return [(int(part), part) if i % 2 else part for i, part in enumerate(re.split(r"([0-9]+)", item[0]))]


def clips_of_meta(meta: str, gt_root: str, lq_root: str | None, template: str, extension: str) -> list[Clip]:
    """Return the clips that a file lists in lines `clip frames shape first_frame`.

    A line without first_frame accepts any names of frames.

    Raises: FileNotFoundError, ValueError: a line is invalid or a frame is missing.
    """
    clips = []
    for number, line in lines_of(meta):
        match = re.fullmatch(r"(\S+)\s+([0-9]+)\s+(\S+)(?:\s+([0-9]+))?", line.strip())
        if not match or not (match[4] or match[3].startswith("(")):
            raise ValueError(f"{meta}, line {number}: {line.strip()!r} is not `clip frames shape first_frame`, "
                             "e.g. `000 100 (720,1280,3) 0`")
        folder, count = match[1], int(match[2])
        if match[4] is None:
            (clip,) = scan_clips(gt_root, lq_root, [folder])
            if len(clip.frames) != count:
                raise ValueError(f"{meta}, line {number}: clip {folder!r} has {len(clip.frames)} frames, not {count}")
            clips.append(clip)
            continue
        first = int(match[4])
        try:
            frames = [f"{frame:{template}}" for frame in range(first, first + count)]
        except ValueError:
            raise ValueError(f'filename_tmpl {template!r} can\'t number frames; give a format such as "08d"') from None
        gt, lq = (None if root is None else numbered_frames(root, folder, side, frames, extension)
                  for root, side in zip((gt_root, lq_root), SIDES))
        clips.append(Clip(folder, frames, gt, lq))
    return clips


def numbered_frames(root: str, folder: str, side: str, frames: list[str], extension: str) -> list[str]:
    """Return the paths of frames of these names. Raises FileNotFoundError where one is missing."""
    paths = [frame_path(root, folder, frame, extension) for frame in frames]
    if root.endswith(LMDB):
        there = set(scan_frames(root, folder, side).values())
    else:
        check_folder(folder := os.path.join(root, folder), side)
        there = {os.path.join(folder, name) for name in list_folder(folder)[1]}
    for path in paths:
        if path not in there:
            raise FileNotFoundError(f"{path}: frame is missing, but meta_info_file lists it")
    return paths


def frame_path(root: str, folder: str, frame: str, extension: str) -> str:
    """Return the path of a frame in a folder or an lmdb."""
    return f"{root}/{folder}/{frame}" if root.endswith(LMDB) else os.path.join(root, folder, f"{frame}.{extension}")


def partition(clips: list[Clip], val_partition: str | None, test_mode: bool, root: str) -> list[Clip]:
    """Return the clips outside of a partition, or in test_mode those inside."""
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


def lines_of(meta: str, what: str = "meta_info_file") -> list[tuple[int, str]]:
    """Return the non-blank lines of a list of clips or frames, with their numbers."""
    if not os.path.isfile(meta):
        remedy = MAKE_LMDB if what == "lmdb" else f"python -m data.prepare meta FOLDER {meta} writes it"
        raise FileNotFoundError(f"{what}: {meta} does not exist; {remedy}")
    lines = [(number, line) for number, line in enumerate(read_lines(meta, bytewise=what == "lmdb"), 1) if line.strip()]
    if not lines:
        raise ValueError(f"{what}: {meta} is empty; each line names a clip or a frame")
    return lines


def check_same(gt: Iterable[str], lq: Iterable[str], gt_root: str, lq_root: str, what: str) -> None:
    """Raise ValueError where GT and LQ have different names, with counts and missing names."""
    gt, lq = set(gt), set(lq)
    missing = [f"{what} {name_some(sorted(names))} only in {root}"
               for names, root in ((gt - lq, gt_root), (lq - gt, lq_root)) if names]
    if missing:
        raise ValueError(f"GT has {len(gt)} {what}s, LQ {len(lq)}, not of the same names: {'; '.join(missing)}")


def name_some(names: Sequence[str]) -> str:
    """List the first names, and count the others."""
    listed = ", ".join(repr(name) for name in names[:3])
    return listed + (f" and {len(names) - 3} more" if len(names) > 3 else "")
