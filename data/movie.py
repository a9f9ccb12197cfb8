"""Read and write video files through the ffmpeg program by a pipe: a few frames in memory, whatever the length.

A frame of a video has the path `CLIP.mp4/00000007`, counted from 0, as one in an lmdb does. It is (3,H,W) uint8 RGB,
upright. A video of varying frame rate is read at its mean rate. Colours are converted by the video's own matrix, and
written by BT.709, of which players know the tag.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from data.folders import VIDEOS, is_hidden
from data.image_files import encode, printable

WRITTEN = (".mp4", ".mov", ".mkv")
CONVERT = "flags=bicubic+accurate_rnd+full_chroma_int"  # swscale's defaults lose half a level of chroma


class Facts(NamedTuple):
    """Hold what is needed to read a video and to write another like it.

    Attributes:
        rate: frames per second, as a fraction.
        filters: of ffmpeg, before frames are counted.
        offset: seconds from the start of the file, and of its sound, to the first frame.
        aspect: width to height of a pixel, upright.
        colours: transfer function and primaries, as ffmpeg names them.
        matrix: of the conversion to RGB, as ffmpeg names it.
    """

    count: int
    rate: str
    filters: str
    offset: float
    aspect: str
    colours: tuple[str, str]
    matrix: str


def is_video(path: str | os.PathLike) -> bool:
    """Return whether a path is a video file by its name."""
    return os.path.splitext(path)[1].lower() in VIDEOS and os.path.isfile(path)


def videos_in(folder: str) -> list[str]:
    """Return the paths of the videos of a folder that holds nothing else, sorted; else []."""
    names = sorted(name for name in os.listdir(folder) if not is_hidden(name)) if os.path.isdir(folder) else []
    paths = [os.path.join(folder, name) for name in names]
    if not all(map(is_video, paths)):
        return []
    if len({os.path.splitext(path)[0] for path in paths}) < len(paths):
        raise ValueError(f"{printable(folder)}: two videos differ only in their extensions; rename one")
    return paths


def program(name: str, path: str) -> str:
    """Return the path of ffmpeg or ffprobe. Raises ValueError where it is not installed."""
    if found := shutil.which(name):
        return found
    raise ValueError(f"{printable(path)}: videos need {name}, which is not on the PATH; install it (apt install "
                     "ffmpeg, conda install -c conda-forge ffmpeg, brew install ffmpeg), or use a folder of frames")


def _ask(path: str, name: str, *words: str) -> str:
    """Return what a program prints about a video. Raises ValueError where it can't read it."""
    done = subprocess.run([program(name, path), "-v", "error", *words], stdin=subprocess.DEVNULL, capture_output=True,
                          text=True, errors="replace", start_new_session=True)
    if done.returncode:
        raise ValueError(f"{printable(path)}: can't be read as a video ({_reason(done.stderr)})")
    return done.stdout


def _reason(text: str) -> str:
    """Return the first of ffmpeg's messages, without the part of it that speaks and the path."""
    line = next(iter(text.strip().splitlines()), "no reason given")
    return printable(re.sub(r"^(\[[^]]* @ 0x[0-9a-f]+\] )+|^file:\S.*: ", "", line))[:200]


def _url(path: str | os.PathLike) -> str:
    return f"file:{os.path.abspath(path)}"  # no name is taken for an option or another protocol


def probe(path: str) -> tuple[dict, dict]:
    """Return ffprobe's entries of a file and of its first video stream. Raises ValueError."""
    found = json.loads(_ask(path, "ffprobe", "-show_format", "-show_streams", "-of", "json", _url(path)))
    streams = [stream for stream in found["streams"] if stream.get("codec_type") == "video"
               and not stream.get("disposition", {}).get("attached_pic")]
    if not streams:
        raise ValueError(f"{printable(path)}: holds no video stream")
    return found["format"], streams[0]


def mark_of(path: str) -> str:
    """Return the comment of a video."""
    tags = {key.lower(): value for key, value in probe(path)[0].get("tags", {}).items()}
    return tags.get("comment", "")


@lru_cache(maxsize=64)
def facts_of(path: str) -> Facts:
    """Return the facts of a video, all frames of which are decoded once. Raises ValueError."""
    whole, stream = probe(path)
    printed = _ask(path, "ffprobe", "-select_streams", "V:0", "-show_entries", "frame=best_effort_timestamp_time",
                   "-of", "csv=p=0", _url(path))
    stamps = [line.strip(",") for line in printed.split()]
    times = [float(stamp) for stamp in stamps if re.fullmatch(r"-?[0-9.]+", stamp)]
    rate, count, filters = Fraction(_ratio(stream.get("r_frame_rate"), "25")), len(stamps), ""
    if len(times) == count > 1 and max(abs(at - times[0] - i / rate) for i, at in enumerate(times)) * rate > 0.6:
        rate = Fraction(_ratio(stream.get("avg_frame_rate"), str(rate)))
        filters = f"fps={rate},"
        lines = _ask(path, "ffmpeg", "-i", _url(path), "-map", "0:V:0", "-vf", _filters(filters, str(rate)), "-r",
                     str(rate), "-f", "null", "-progress", "pipe:1", "-")
        count = int(re.findall(r"^frame=\s*(\d+)", lines, re.MULTILINE)[-1])
    if not count:
        raise ValueError(f"{printable(path)}: holds no frame that can be decoded")
    aspect = Fraction(_ratio(stream.get("sample_aspect_ratio", "").replace(":", "/"), "1"))
    turned = [float(data["rotation"]) for data in stream.get("side_data_list", []) if "rotation" in data]
    if turned and round(turned[0] / 90) % 2:
        aspect = 1 / aspect
    known = [stream.get(key, "unknown") for key in ("color_transfer", "color_primaries", "color_space")]
    by_size = "bt709" if min(stream["width"], stream["height"]) >= 720 else "smpte170m"
    return Facts(count, str(rate), filters, max(0.0, times[0] - float(whole.get("start_time", 0))) if times else 0.0,
                 str(aspect), tuple("bt709" if name in ("unknown", "reserved") else name for name in known[:2]),
                 by_size if known[2] in ("unknown", "reserved", "gbr") else known[2])


def _ratio(text: str | None, default: str) -> str:
    """Return a fraction that ffprobe printed; the default for one that is unknown, as 0/0."""
    return text if text and re.fullmatch(r"[1-9]\d*(/[1-9]\d*)?", text) else default


def _filters(filters: str, rate: str, start: int = 0) -> str:
    """Return filters after which frame `start` has time 0 and the frames after it follow at the rate."""
    return f"{filters}select=gte(n\\,{start}),setpts=N/({rate})/TB"


# Reading -----------------------------------------------------------------------------------------------------------


def frame_paths(path: str) -> dict[str, str]:
    """Return {name: path} of the frames of a video."""
    return {f"{i:08d}": f"{path}/{i:08d}" for i in range(facts_of(path).count)}


def is_frame(path: str) -> bool:
    """Return whether a path is that of a frame in a video."""
    return is_video(os.path.dirname(path))


def read_frames(paths: Sequence[str]) -> list[Tensor]:
    """Return successive frames of a video. Raises ValueError where it can't be decoded."""
    movie, first = os.path.dirname(paths[0]), int(os.path.basename(paths[0]))
    return _stream(movie).read(first, first + len(paths))


@lru_cache(maxsize=2)  # an input and its truth
def _stream(path: str) -> _Stream:
    return _Stream(path)


class _Stream:
    """Decodes a video from a process of ffmpeg, and keeps the frames of the last call, which windows share."""

    def __init__(self, path: str):
        self.path, self.facts = path, facts_of(path)
        self.process: subprocess.Popen | None = None
        self.next, self.held = 0, {}

    def read(self, start: int, stop: int) -> list[Tensor]:
        self.held = {i: frame for i, frame in self.held.items() if start <= i}
        if self.process is None or start < self.next and start not in self.held:
            self._open(start)
        while self.next < stop:
            frame = self._decode()
            if self.next >= start:
                self.held[self.next] = frame
            self.next += 1
        return [self.held[i] for i in range(start, stop)]

    def _open(self, start: int) -> None:
        self.close()
        self.next, self.held, self.errors = start, {}, tempfile.TemporaryFile()
        facts = self.facts
        chain = f"{_filters(facts.filters, facts.rate, start)},scale=in_color_matrix={facts.matrix}:{CONVERT}"
        # A session of its own: Ctrl+C stops this program after the frame, not the decoder in the middle of one.
        self.process = subprocess.Popen(
            [program("ffmpeg", self.path), "-v", "error", "-i", _url(self.path), "-map", "0:V:0", "-vf", chain, "-r",
             facts.rate, "-f", "image2pipe", "-c:v", "ppm", "-pix_fmt", "rgb24", "-"],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=self.errors, start_new_session=True)

    def _decode(self) -> Tensor:
        pipe = self.process.stdout
        head = [pipe.readline() for _ in range(3)]  # b"P6\n", b"WIDTH HEIGHT\n", b"255\n"
        width, height = map(int, head[1].split()) if head[2] else (0, 0)
        data = bytearray(3 * width * height)
        if not data or pipe.readinto(data) != len(data):
            self.errors.seek(0)
            raise ValueError(f"{printable(self.path)}: ends at frame {self.next} of {self.facts.count} "
                             f"({_reason(self.errors.read().decode(errors='replace'))})")
        return torch.frombuffer(data, dtype=torch.uint8).view(height, width, 3).movedim(-1, 0)

    def close(self) -> None:
        """End the process."""
        if self.process:
            self.process.kill()
            self.process.stdout.close()
            self.process.wait()
            self.errors.close()

    def __del__(self):
        self.close()


# Writing -----------------------------------------------------------------------------------------------------------


def outputs(source: str, output: Path) -> list[tuple[str, Path]]:
    """Return videos to read with the videos to write from them; [] where pictures are written.

    Raises: ValueError: ffmpeg is missing, or the output is a video and the input is not.
    """
    clips = [source] if is_video(source) else videos_in(source)
    for name in ("ffmpeg", "ffprobe") if clips else ():
        program(name, source)
    if os.path.isdir(source) and clips:
        return [(clip, output / f"{Path(clip).stem}{WRITTEN[0]}") for clip in clips]
    if output.suffix.lower() in VIDEOS and not output.is_dir():
        if not clips:
            raise ValueError(f"--output {output}: is a video, and {printable(source)} is none; name a folder")
        if output.suffix.lower() not in WRITTEN:
            raise ValueError(f"--output {output}: videos are written as {', '.join(WRITTEN)}; name one of these")
        return [(source, output)]
    return []


@lru_cache(maxsize=1)
def _varying(path: str) -> tuple[str, str]:
    """Return the option that fills no time before a late first frame; it was renamed in ffmpeg 5.1."""
    found = re.search(r"version n?(\d+)\.", _ask(path, "ffmpeg", "-version"))
    return "-vsync" if found and int(found[1]) < 6 else "-fps_mode", "vfr"


def write_video(path: Path, frames: Iterable[bytes], source: str, mark: str = "", trial: bool = False) -> None:
    """Write a video of frames (PNG files) with rate, pixel aspect, colours and sound of another.

    Args: mark: comment in the file. trial: write only what sound a tenth of a second has.
    Raises: ValueError: ffmpeg can't do it, e.g. store this sound in a file of this kind.
    """
    facts, frames = facts_of(source), iter(frames)
    first = next(frames)
    even = not any(first[at] % 2 for at in (19, 23))  # the last bytes of width and height in a PNG's header
    words = ["-itsoffset", f"{facts.offset}", "-f", "image2pipe", "-c:v", "png", "-framerate", facts.rate, "-i", "-",
             "-i", _url(source), "-map", "0:v", "-map", "1:a?", "-c:a", "copy", "-c:v", "libx264", "-crf", "14",
             "-vf", f"scale=out_color_matrix=bt709:out_range=tv:{CONVERT},format={'yuv420p' if even else 'yuv444p'},"
                    f"setsar={facts.aspect}",
             *_varying(source), "-colorspace", "bt709", "-color_range", "tv", "-color_trc", facts.colours[0],
             "-color_primaries", facts.colours[1], "-metadata", f"comment={mark}",
             *(["-t", "0.1"] if trial else []), _url(path)]
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen([program("ffmpeg", source), "-v", "error", "-y", *words], stdin=subprocess.PIPE,
                                   stderr=errors, start_new_session=True)
        try:
            process.stdin.write(first)
            for frame in frames:
                process.stdin.write(frame)
            process.stdin.close()
        except BrokenPipeError:
            pass  # ffmpeg ended early: its exit code says it
        except BaseException:
            process.kill()
            raise
        if process.wait():
            errors.seek(0)
            raise ValueError(f"{printable(str(path))}: can't be written with the sound of {printable(source)} "
                             f"({_reason(errors.read().decode(errors='replace'))})")
    if not trial:
        with open(path, "rb+") as file:
            os.fsync(file.fileno())


def try_writing(path: Path, source: str) -> None:
    """Raise ValueError where `write_video` will fail, before hours of work."""
    with tempfile.TemporaryDirectory() as folder:
        write_video(Path(folder, f"trial{path.suffix}"), [encode(torch.zeros(3, 64, 64, dtype=torch.uint8))], source,
                    trial=True)


def pictures_of(source: str) -> Iterator[tuple[str, bytes]]:
    """Yield file name and PNG of each frame of a video, or of each video of a folder in a folder of its own."""
    clips = {"": source} if is_video(source) else {Path(path).stem: path for path in videos_in(source)}
    if not clips:
        raise ValueError(f"{printable(source)}: is neither a video ({', '.join(VIDEOS)}) nor a folder of such alone")
    for folder, clip in clips.items():
        for name, path in frame_paths(clip).items():
            yield os.path.join(folder, f"{name}.png"), encode(read_frames([path])[0].contiguous())
