"""Damaged image files: each is read, or told in one line; none ends the process."""

import io
import os
import random
import struct
import zlib

import numpy as np
import pytest
import torch
import torchvision.io  # noqa: F401 - once, not in each child
from PIL import Image

from data.image_files import PNG, read_levels, read_picture

DAMAGES = ("bit", "bytes", "cut", "zeros", "swap", "header", "pixels", "order", "narrow window")
EACH = 25  # files a child reads: to fork torch takes longer than to read them


def written(array, mode, **how):
    file = io.BytesIO()
    Image.fromarray(array).convert(mode).save(file, **how)
    return file.getvalue()


@pytest.fixture(scope="module")
def sources():
    """Good files of every kind, partly noise, so that damage has something to hit."""
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (40, 56, 3), dtype=np.uint8)
    colours[:, :20] = np.arange(40, dtype=np.uint8)[:, None, None]
    deep = io.BytesIO()
    Image.fromarray(colours[..., 0].astype(np.uint16) * 257).save(deep, format="PNG")
    pngs = [written(colours, mode, format="PNG") for mode in ("RGB", "L", "RGBA", "P", "1", "LA")]
    return [*pngs, deep.getvalue(), written(colours, "RGB", format="JPEG"), written(colours, "L", format="JPEG"),
            written(colours, "RGB", format="JPEG", progressive=True), written(colours, "CMYK", format="JPEG"),
            written(colours, "RGB", format="WEBP"), written(colours, "RGBA", format="WEBP", lossless=True)]


def chunks_of(content):
    place, chunks = len(PNG), []
    while place < len(content):
        (length,) = struct.unpack_from(">I", content, place)
        chunks.append((content[place + 4 : place + 8], bytearray(content[place + 8 : place + 8 + length])))
        place += 12 + length
    return chunks


def png_of(chunks):
    """A PNG file of these chunks, checksums and all."""
    return PNG + b"".join(struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
                          for name, data in chunks)


def damaged(content, how, rng):
    """The content with one kind of damage; what the last four do inside a PNG file has right checksums again."""
    content, size = bytearray(content), len(content)
    if content.startswith(PNG) and how in DAMAGES[-4:]:
        chunks = chunks_of(bytes(content))
        (number,) = (i for i, (name, _) in enumerate(chunks) if name == b"IDAT")
        header, pixels = chunks[0][1], chunks[number][1]
        if how == "header":
            header[rng.randrange(13)] = rng.choice((rng.randrange(256), rng.randrange(17)))
        elif how == "pixels":
            pixels[rng.randrange(len(pixels))] ^= 1 << rng.randrange(8)
        elif how == "order":
            rng.shuffle(chunks)
            chunks[rng.randrange(len(chunks)):] *= rng.randrange(3)
        else:
            window = rng.randrange(8)
            pixels[:2] = struct.pack(">H", (window << 12 | 8 << 8) + 31 - (window << 12 | 8 << 8) % 31)
        return png_of(chunks)
    if how == "bytes":
        for _ in range(rng.randint(1, 8)):
            content[rng.randrange(size)] = rng.randrange(256)
    elif how == "cut":
        del content[rng.randrange(size):]
    elif how == "zeros":
        start = rng.randrange(size)
        content[start:] = bytes(size - start)
    elif how in ("swap", "order"):
        a, b = sorted(rng.randrange(size - 16) for _ in range(2))
        content[a : a + 16], content[b : b + 16] = content[b : b + 16], content[a : a + 16]
    else:
        content[rng.randrange(min(size, 700 if how == "header" else size))] ^= 1 << rng.randrange(8)
    return bytes(content)


def read_in_a_child(files):
    """How each file was read by a forked process: "read", "told", or what went wrong. A crash ends the list."""
    end, child_end = os.pipe()
    if not (child := os.fork()):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        torch.set_num_threads(1)  # as in a data worker: the parent's pool of threads does not cross a fork
        for path in files:
            for read in (read_picture, read_levels):
                try:
                    read(path)
                    said = b"r"
                except ValueError as error:
                    said = b"t" if "\n" not in str(error) and path in str(error) else b"?"
                except BaseException:
                    said = b"!"
                os.write(child_end, said)
        os._exit(0)
    os.close(child_end)
    with open(end, "rb") as pipe:
        said = pipe.read().decode()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return [said[i : i + 2] for i in range(0, len(said), 2)] + ([f"ended with {status}"] if status else [])


@pytest.mark.parametrize("count", [180, pytest.param(2000, marks=pytest.mark.slow)])
def test_no_damaged_picture_ends_the_process(tmp_path, sources, count):
    found, cases = [], [(i, DAMAGES[i % len(DAMAGES)], i // len(DAMAGES) % len(sources)) for i in range(count)]
    for start in range(0, count, EACH):
        files = []
        for i, how, source in cases[start : start + EACH]:
            files.append(str(tmp_path / f"{i}_{how}.png"))
            with open(files[-1], "wb") as file:
                file.write(damaged(sources[source], how, random.Random(i)))
        found += [(os.path.basename(path), said) for path, said in zip(files, read_in_a_child(files))]
        assert len(found) == min(start + EACH, count), f"a crash at file {cases[len(found)]}"
    assert [case for case in found if set(case[1]) - set("rt")] == []
    told = sum(said == "tt" for _, said in found)
    assert count / 3 < told < count  # some damage to a JPEG leaves a picture


def test_undamaged_pictures_of_every_kind_are_read(tmp_path, sources):
    for i, content in enumerate(sources):
        (tmp_path / f"{i}.png").write_bytes(content)
        for _ in range(2):  # the second time it is known to be sound
            assert read_picture(str(tmp_path / f"{i}.png")).shape == (3, 40, 56)
