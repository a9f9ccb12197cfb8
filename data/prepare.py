"""Prepare clips for training: turn videos into frames, pack frames into an lmdb, or list them in a meta_info file.

    python -m data.prepare frames clip.mp4 trainsets/mine/clip
    python -m data.prepare lmdb trainsets/DVD/train_GT trainsets/DVD/train_GT.lmdb
    python -m data.prepare meta trainsets/DVD/train_GT meta_info_DVD_train_GT.txt

Source: BasicSR's lmdb, data.mdb and meta_info.txt of lines `clip/frame.png (h,w,c) 1` with keys without extension;
KAIR's meta_info files. Differs: the content of files is stored, not encoded again.
Every frame is decoded once to detect damage. OUT appears only when it is complete.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator

from data.folders import unsupported_files, walk
from data.frames import LMDB, check_folder, check_numbers, lmdb_module, read_frame
from data.image_files import KINDS
from data.movie import pictures_of

BATCH = 64  # frames per transaction, which holds them in memory
PAGE = 4096


def main(argv: list[str]) -> str:
    """Run the command. Returns a line that describes its output."""
    parser = argparse.ArgumentParser(prog="python -m data.prepare", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, out in (("frames", "OUT"), ("lmdb", "OUT.lmdb"), ("meta", "OUT.txt")):
        command = commands.add_parser(name)
        command.add_argument("folder", metavar="VIDEO" if name == "frames" else "FOLDER",
                             help="a video, or a folder of videos" if name == "frames" else
                             "of clip folders, at any depth, of frames")
        command.add_argument("out", metavar=out)
    args = parser.parse_args(argv)
    folder, out = os.path.normpath(args.folder), os.path.normpath(args.out)
    if args.command == "lmdb" and not out.endswith(LMDB):
        raise ValueError(f"{out}: the name of an lmdb ends with {LMDB}")
    if os.path.exists(out):
        raise ValueError(f"{out} exists already; remove it, or name another")
    if args.command != "frames":
        check_folder(folder, "FOLDER")
    above = os.path.dirname(os.path.abspath(out))
    os.makedirs(above, exist_ok=True)
    partial = tempfile.mkdtemp(prefix=f".{os.path.basename(out)}.", dir=above)
    try:
        made = os.path.join(partial, "made")
        summary = {"frames": write_frames, "lmdb": write_lmdb, "meta": write_meta}[args.command](folder, made)
        os.rename(made, out)
    finally:
        shutil.rmtree(partial)
    return f"{out}: {summary}" + unsupported_files("; ")


def clips_below(folder: str) -> Iterator[tuple[str, list[str]]]:
    """Yield path below the folder and file names of each clip, sorted; frames of the folder itself are the clip "."."""
    empty = True
    for place, frames in walk(folder):
        if len({os.path.splitext(name)[0] for name in frames}) < len(frames):
            raise ValueError(f"{place}: two frames differ only in their extensions; keep one of them")
        if frames:
            check_numbers(place, [os.path.splitext(name)[0] for name in frames])
            empty = False
            yield os.path.relpath(place, folder), frames
    if empty:
        raise ValueError(f"{folder} holds no frames; {KINDS} files are needed{unsupported_files('; ')}")


def write_frames(source: str, out: str) -> str:
    """Write the frames of a video, or of each video of a folder into a folder of its own."""
    count = 0
    for name, content in pictures_of(source):
        path = os.path.join(out, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(content)
        count += 1
    return f"{count} frames"


def write_lmdb(folder: str, out: str) -> str:
    """Pack all frames below a folder into an lmdb at `out`."""
    lmdb = lmdb_module()
    names = [os.path.normpath(os.path.join(clip, frame)) for clip, frames in clips_below(folder) for frame in frames]
    # Each value fills full pages; factor 2 for keys and for copies of pages during a write.
    pages = sum(2 + os.path.getsize(os.path.join(folder, name)) // PAGE for name in names)
    environment = lmdb.open(out, map_size=(2 * pages + 1024) * PAGE, lock=False)
    try:
        with open(os.path.join(out, "meta_info.txt"), "w", encoding="utf-8", errors="surrogateescape") as meta:
            for start in range(0, len(names), BATCH):
                with environment.begin(write=True) as transaction:
                    for name in names[start : start + BATCH]:
                        path = os.path.join(folder, name)
                        with open(path, "rb") as file:
                            transaction.put(os.fsencode(os.path.splitext(name)[0]), file.read())
                        meta.write(f"{name} {shape_of(path)} 1\n")
            meta.flush()
            os.fsync(meta.fileno())
        environment.sync(True)
    except lmdb.Error as error:  # e.g. a key beyond 511 bytes, a full disk
        raise ValueError(f"{folder} can't be packed: {error}") from None
    finally:
        environment.close()
    return f'{len(names)} frames; use it with io_backend {{"type": "lmdb"}}'


def write_meta(folder: str, out: str) -> str:
    """List the clips below a folder as `clip frames shape first_frame`, the last only where names are numbers."""
    count, formats = 0, set()
    with open(out, "w", encoding="utf-8") as file:
        for clip, frames in clips_below(folder):
            if any(character.isspace() for character in clip):
                raise ValueError(f"{os.path.join(folder, clip)}: a clip's name must have no blanks to be listed")
            shapes = {shape_of(os.path.join(folder, clip, frame)) for frame in frames}
            if len(shapes) > 1:
                raise ValueError(f"{os.path.join(folder, clip)}: frames of sizes {' and '.join(sorted(shapes)[:2])}")
            numbering = numbering_of(frames)
            formats.add(numbering and numbering[1:])
            file.write(f"{clip} {len(frames)} {shapes.pop()}" + (f" {numbering[0]}\n" if numbering else "\n"))
            count += 1
        file.flush()
        os.fsync(file.fileno())
    if len(formats) == 1 and (only := formats.pop()):
        return f"{count} clips; use it with filename_tmpl {only[0]}, filename_ext {only[1]}"
    return f"{count} clips"


def shape_of(path: str) -> str:
    """Return the shape of a frame in the format of meta_info files."""
    channels, height, width = read_frame(path).shape
    return f"({height},{width},{channels})"


def numbering_of(frames: list[str]) -> tuple[int, str, str] | None:
    """Return first frame, filename_tmpl and filename_ext of files numbered without gaps, else None."""
    stems, extensions = zip(*(os.path.splitext(frame) for frame in frames))
    if len(set(extensions)) > 1 or not all(stem.isascii() and stem.isdigit() for stem in stems):
        return None
    first, width = min(map(int, stems)), min(map(len, stems))
    template = f"0{width}d" if width > 1 else "d"
    wanted = {f"{number:{template}}" for number in range(first, first + len(stems))}
    return (first, template, extensions[0][1:]) if wanted == set(stems) else None


if __name__ == "__main__":
    try:
        print(main(sys.argv[1:]))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
