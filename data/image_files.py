"""Reading and writing of image files, with one set of rules for all recipes.

PNG, JPEG and WebP are identified by their first bytes, not by the file name, and decoded by torchvision. Its PNG
decoder dies by SIGSEGV on damaged files (530 of 1,000), so it gets only data that is checked here: the checksums and
the order of chunks, the header, and once per file the number of its pixels. A picture is (3,H,W) uint8 RGB:

- grey is repeated, CMYK is converted, a palette is replaced by its colours;
- transparency is blended with white, as in viewers;
- 16 bits are rounded to 8, with 65535 as 255: an error of half a level at most, while the high byte errs by one;
- EXIF orientation is applied, so that pictures and masks match;
- an animated file is an error.

Masks are read by `read_levels`: grey levels or indices of a palette, without colours and transparency.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp")
KINDS = "PNG, JPEG or WebP"
MAX_SIDE, MAX_PIXELS = 65_535, 180_000_000  # of a picture; a header with more is damaged
JPEG_DENSITY = 600  # largest number of pixels per byte: a bit for each block of 8x8 makes 512
MIN_SIDE = 8  # smallest side of a usable picture in pixels
SIGNATURES = {b"GIF8": "a GIF file", b"BM": "a BMP file", b"II*\0": "a TIFF file", b"MM\0*": "a TIFF file",
              b"<!": "an HTML page", b"<html": "an HTML page", b"version https://git-lfs": "a Git LFS pointer",
              b"%PDF": "a PDF file", b"PK\3\4": "a zip file", b"\x1aE\xdf\xa3": "a video"}


class BadPicture(ValueError):
    """Signal that a file does not hold a usable picture; `skip_corrupt` skips it."""


class Levels(NamedTuple):
    """Hold the stored values of all pixels.

    Attributes:
        planes: (C,H,W), uint8, or int32 at depth 16; C: 1 grey or index, 2 with opacity, 3 RGB, 4 with opacity.
        depth: bits of a value.
        palette: (N,4) uint8 RGB and opacity, indexed by the only plane, or None.
        clear: (C,) transparent colour, or None.
        orientation: of EXIF, 1 to 8.
    """

    planes: Tensor
    depth: int = 8
    palette: Tensor | None = None
    clear: list[int] | None = None
    orientation: int = 1


# Reading -----------------------------------------------------------------------------------------------------------


def read_picture(path: str, least: int = 1) -> Tensor:
    """Read an image file as (3,H,W) uint8 RGB.

    Args: least: smallest allowed side in pixels.
    Raises: FileNotFoundError; BadPicture: the content is not a usable picture; ValueError: the file is unreadable.
    """
    return picture_in(read_bytes(path), path, least)


def picture_in(content: bytes, name: str, least: int = 1) -> Tensor:
    """Decode the content of an image file as `read_picture` does; `name` is its name in messages."""
    picture = as_rgb(levels_in(content, name))
    if min(picture.shape[1:]) < least:
        raise BadPicture(f"{printable(name)}: {size_of(picture)} is too small; {least} pixels a side are needed")
    return picture


def read_levels(path: str) -> Levels:
    """Read the stored values of an image file, upright. Raises: as `read_picture`."""
    return levels_in(read_bytes(path), path)


def read_bytes(path: str) -> bytes:
    """Read the content of a file. Raises FileNotFoundError, or ValueError where it is unreadable."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        raise FileNotFoundError(f"{printable(path)}: is missing") from None
    except OSError as error:
        raise ValueError(unreadable(path, error)) from None


def unreadable(path: str, error: OSError) -> str:
    """Return the message about an unreadable file or folder."""
    remedy = f"; make it readable: chmod -R u+rX {printable(path)}" if isinstance(error, PermissionError) else ""
    return f"{printable(path)}: can't be read: {error.strerror}{remedy}"


def levels_in(content: bytes, name: str) -> Levels:
    """Decode the stored values of an image file, upright. Raises BadPicture with `name` in its message."""
    try:
        if content[:8] == PNG:
            levels = _png(content)
        elif content[:3] == b"\xff\xd8\xff":
            levels = _jpeg(content)
        elif content[:4] == b"RIFF" and content[8:12] == b"WEBP":
            levels = _webp(content)
        else:
            raise ValueError(describe_foreign(content))
    except (ValueError, RuntimeError, zlib.error, struct.error) as error:
        reason = "it is damaged" if isinstance(error, struct.error) else str(error).splitlines()[0]
        reason = reason.rpartition(", ")[2] if isinstance(error, RuntimeError) else reason  # torch: where, what
        raise BadPicture(f"{printable(name)}: not a readable image ({reason}); save it again as {KINDS}") from None
    return levels._replace(planes=upright(levels.planes, levels.orientation))


def describe_foreign(content: bytes) -> str:
    """Name the kind of an unsupported file."""
    if content[4:8] == b"ftyp":
        return "a HEIC or AVIF file" if content[8:11] in (b"hei", b"avi", b"mif") else "a video"
    head = content[:64].lstrip()
    found = next((what for start, what in SIGNATURES.items() if head.lower().startswith(start.lower())), None)
    return found or ("unknown content" if content else "an empty file")


def as_rgb(levels: Levels) -> Tensor:
    """Convert stored values to (3,H,W) uint8 RGB, by the rules of this module."""
    planes, white = levels.planes, 2**levels.depth - 1
    clear = None
    if levels.palette is not None:
        planes = levels.palette[planes[0].long()].movedim(-1, 0)  # (4,H,W)
    else:
        if levels.clear is not None:
            clear = (planes.int() == torch.tensor(levels.clear).view(-1, 1, 1)).all(0)
        if levels.depth == 16:
            planes = (planes + 128).div(257, rounding_mode="floor").to(torch.uint8)  # 65535 = 257 * 255
        elif levels.depth < 8:
            planes = planes * (255 // white)
    opacity = planes[-1:] if len(planes) in (2, 4) else None
    colours = planes[:3] if len(planes) > 2 else planes[0, ..., None].repeat(1, 1, 3).movedim(-1, 0)
    if opacity is not None and int(opacity.min()) < 255:
        share = opacity.float() / 255
        colours = (colours * share + 255 * (1 - share)).round().to(torch.uint8)
    if clear is not None:
        colours = torch.where(clear, 255, colours)
    return colours  # channels are innermost in memory, as decoders return them: a copy would double the cost


def upright(planes: Tensor, orientation: int) -> Tensor:
    """Rotate and flip (C,H,W) upright by the orientation of EXIF."""
    if orientation > 4:
        planes = planes.transpose(1, 2)
    axes = {2: [2], 3: [1, 2], 4: [1], 6: [2], 7: [1, 2], 8: [1]}.get(orientation)
    return planes.flip(axes) if axes else planes


def size_of(frame: Tensor) -> str:
    """Return the size of an image for messages."""
    return f"{frame.shape[-1]}x{frame.shape[-2]} (width x height)"


def printable(text: str) -> str:
    """Return a file name as one line of UTF-8: control characters as question marks, other bytes escaped."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", "?", text.encode(errors="backslashreplace").decode())


def _check_size(width: int, height: int) -> None:
    """Raise ValueError for sizes that are not read."""
    if not 0 < width <= MAX_SIDE or not 0 < height <= MAX_SIDE or width * height > MAX_PIXELS:
        raise ValueError(f"{width}x{height} pixels; at least 1, at most {MAX_SIDE:,} a side and {MAX_PIXELS:,} in all, "
                         "are read")


def _bytes(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def _orientation(tiff: bytes) -> int:
    """Return the orientation of EXIF, 1 without an entry."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order and len(tiff) >= 10:
        (start,) = struct.unpack_from(order + "I", tiff, 4)
        entries = tiff[start + 2 : start + 2 + 12 * 100]
        for entry in struct.iter_unpack(order + "HHIHH", entries[: len(entries) // 12 * 12]):
            if entry[0] == 0x0112:
                return entry[3] if 1 <= entry[3] <= 8 else 1
    return 1


# PNG ---------------------------------------------------------------------------------------------------------------

PNG = b"\x89PNG\r\n\x1a\n"
CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # of a colour type
DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
PIECE = 1 << 20  # largest chunk in bytes passed to libpng, which has a limit
MOST_SOUND = 1_000_000  # largest number of files remembered as undamaged, about 100 bytes each

_sound: set[int] = set()  # hashes of header and checksums of files that were fully unpacked once


def _png(content: bytes) -> Levels:
    chunks, pixels = _chunks(content)
    width, height, depth, colour, packing, filtering, interlaced = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    _check_size(width, height)
    if depth not in DEPTHS.get(colour, ()) or packing or filtering or interlaced > 1:
        raise ValueError("the header is damaged")
    if b"acTL" in chunks and chunks[b"acTL"][:4] > b"\0\0\0\1":
        raise ValueError("it is animated: save one frame as a separate file")
    bits = depth * CHANNELS[colour]
    passes = [(x, y, dx, dy, -(-(width - x) // dx), -(-(height - y) // dy))
              for x, y, dx, dy in (ADAM7 if interlaced else ((0, 0, 1, 1),)) if width > x and height > y]
    plain = not interlaced and depth >= 8 and colour != 3 and bytes(pixels[0][8:9]) >= b"\x70"  # a window of 32 KB
    key = hash((chunks[b"IHDR"], *(bytes(piece[-4:]) for piece in pixels)))
    if plain and key in _sound:
        large = max(map(len, pixels)) > PIECE
        planes = _decode_png(width, height, depth, colour, _pieces(_packed(pixels)) if large else pixels)
    else:
        rows = [(h, 1 + (w * bits + 7) // 8) for *_, w, h in passes]
        raw = _unpack(_packed(pixels), sum(h * length for h, length in rows))
        parts, end = [], 0
        for (*_, w, _), (h, length) in zip(passes, rows):
            begin, end = end, end + h * length
            if max(raw[begin:end:length]) > 4:
                raise ValueError("a row is damaged")
            stored = _pieces(zlib.compress(raw[begin:end], 0))
            if depth < 8 or colour == 3:  # several values per byte are decoded as rows of bytes
                parts.append(_values(_decode_png(length - 1, h, 8, 0, stored)[0], depth)[None, :, :w])
            else:
                parts.append(_decode_png(w, h, depth, colour, stored))
        planes = parts[0] if not interlaced else parts[0].new_zeros(len(parts[0]), height, width)
        for (x, y, dx, dy, *_), part in zip(passes, parts if interlaced else ()):
            planes[:, y::dy, x::dx] = part
        if plain:
            _sound.clear() if len(_sound) >= MOST_SOUND else None
            _sound.add(key)
    palette, clear = _colours(chunks, colour, planes)
    return Levels(planes, depth, palette, clear, _orientation(chunks.get(b"eXIf", b"")))


def _chunks(content: bytes) -> tuple[dict[bytes, bytes], list[memoryview]]:
    """Return the data of the chunks of a PNG file by name, and its complete IDAT chunks. Raises ValueError: damage."""
    view, place, found, pixels, name = memoryview(content), len(PNG), {}, [], b""
    while name != b"IEND":
        before, name = name, content[place + 4 : place + 8]
        if len(name) < 4:
            raise ValueError("the file ends too early")
        (length,) = struct.unpack_from(">I", content, place)
        data, place = place + 8, place + 12 + length
        if place > len(content):
            raise ValueError("the file ends too early")
        if zlib.crc32(view[data - 4 : place - 4]) != struct.unpack_from(">I", content, place - 4)[0]:
            raise ValueError("it is damaged: a checksum does not match")
        critical = name in (b"IHDR", b"PLTE", b"IDAT", b"IEND")
        wrong = (name == b"IHDR") != (before == b"") or (critical and name != b"IDAT" and name in found) or \
            (name == b"IHDR" and length != 13) or (not critical and not name[0] & 32) or \
            (name == b"IDAT" and pixels and before != b"IDAT") or (name == b"PLTE" and pixels)
        if wrong:
            raise ValueError("its parts are damaged or out of order")
        if name == b"IDAT":
            pixels.append(view[data - 8 : place])
        elif name in (b"IHDR", b"PLTE", b"tRNS", b"eXIf", b"acTL"):
            found[name] = content[data : place - 4]
    if not pixels:
        raise ValueError("it holds no pixels")
    return found, pixels


def _unpack(packed: bytes, size: int) -> bytes:
    """Unpack exactly `size` bytes of a zlib stream, with no more memory. Raises ValueError, zlib.error: damage."""
    unpacker = zlib.decompressobj()
    raw = unpacker.decompress(packed, size + 1)
    if len(raw) != size or not unpacker.eof:
        raise ValueError("it does not hold as many pixels as its header says")
    return raw


def _chunk(name: bytes, data: bytes) -> bytes:
    """Return a PNG chunk with its checksum."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(data, zlib.crc32(name)))


def _packed(pixels: Sequence[memoryview]) -> bytes:
    """Return the zlib stream of IDAT chunks."""
    return b"".join(piece[8:-4] for piece in pixels)


def _pieces(packed: bytes) -> list[bytes]:
    """Split a zlib stream into IDAT chunks."""
    return [_chunk(b"IDAT", packed[i : i + PIECE]) for i in range(0, len(packed), PIECE)]


def _decode_png(width: int, height: int, depth: int, colour: int, pixels: Sequence[bytes]) -> Tensor:
    """Decode checked IDAT chunks to (C,height,width)."""
    from torchvision.io import decode_png

    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    planes = decode_png(_bytes(b"".join((PNG, header, *pixels, _chunk(b"IEND", b"")))))
    return planes.int() if depth == 16 else planes  # torch supports few operations of uint16


def _values(rows: Tensor, depth: int) -> Tensor:
    """Unpack rows of bytes (H,N) to values of `depth` bits (H, N * 8 / depth), high bits first."""
    if depth == 8:
        return rows
    shifts = torch.arange(8 - depth, -1, -depth, dtype=torch.uint8)
    return (rows[..., None] >> shifts & (2**depth - 1)).flatten(1)


def _colours(chunks: dict[bytes, bytes], colour: int, planes: Tensor) -> tuple[Tensor | None, list[int] | None]:
    """Return palette and transparent colour of `Levels`."""
    clear = chunks.get(b"tRNS", b"")
    if colour != 3:
        count = {0: 1, 2: 3}.get(colour, 0)
        return None, list(struct.unpack(f">{count}H", clear)) if count and len(clear) == 2 * count else None
    table = chunks.get(b"PLTE", b"")
    if not table or len(table) % 3 or len(table) > 768 or int(planes.max()) >= len(table) // 3:
        raise ValueError("its palette is damaged, or has fewer colours than its pixels use")
    palette = torch.full((len(table) // 3, 4), 255, dtype=torch.uint8)
    palette[:, :3] = _bytes(table).view(-1, 3)
    if clear := clear[: len(palette)]:
        palette[: len(clear), 3] = _bytes(clear)
    return palette, None


# JPEG and WebP, whose decoders report damage -----------------------------------------------------------------------


def _jpeg(content: bytes) -> Levels:
    from torchvision.io import ImageReadMode, decode_jpeg

    place, components, orientation = 2, 0, 1
    while True:
        place = content.find(b"\xff", place)
        marker = content[place + 1 : place + 2]
        if place < 0 or not marker:
            raise ValueError("the file ends too early")
        place += 1 if marker == b"\xff" else 2
        if marker in b"\xff\0\1" or b"\xd0" <= marker <= b"\xd8":
            continue  # padding, or a marker without content
        if marker == b"\xd9" or len(content) < place + 2:
            raise ValueError("it holds no pixels")
        (length,) = struct.unpack_from(">H", content, place)
        data = content[place + 2 : place + length]
        if b"\xc0" <= marker <= b"\xcf" and marker not in b"\xc4\xc8\xcc":
            _, height, width, components = struct.unpack_from(">BHHB", data)
            _check_size(width, height)
            if width * height > JPEG_DENSITY * len(content):
                raise ValueError("it does not hold as many pixels as its header says")
        elif marker == b"\xe1" and data[:6] == b"Exif\0\0":
            orientation = _orientation(data[6:])
        elif marker == b"\xda":
            break
        place += length
    if content.find(b"\xff\xd9", place) < 0:
        raise ValueError("the file ends too early")
    mode = ImageReadMode.GRAY if components == 1 else ImageReadMode.RGB
    return Levels(decode_jpeg(_bytes(content), mode), orientation=orientation)


def _webp(content: bytes) -> Levels:
    from torchvision.io import decode_webp

    end, place, orientation, size = 8 + struct.unpack_from("<I", content, 4)[0], 12, 1, None
    if end > len(content):
        raise ValueError("the file ends too early")
    while place + 8 <= end:
        name, length = struct.unpack_from("<4sI", content, place)
        data = content[place + 8 : place + 8 + length]
        if name in (b"ANIM", b"ANMF"):
            raise ValueError("it is animated: save one frame as a separate file")
        if name == b"VP8 ":
            size = [side & 0x3FFF for side in struct.unpack_from("<HH", data, 6)]
        elif name == b"VP8L":
            (sides,) = struct.unpack_from("<I", data, 1)
            size = (sides & 0x3FFF) + 1, (sides >> 14 & 0x3FFF) + 1
        elif name == b"EXIF":
            orientation = _orientation(data.removeprefix(b"Exif\0\0"))
        place += 8 + length + length % 2
    if size is None:
        raise ValueError("it holds no pixels")
    _check_size(*size)
    return Levels(decode_webp(_bytes(content[:end])), orientation=orientation)


# Writing -----------------------------------------------------------------------------------------------------------


def encode(picture: Tensor, kind: str = "png", quality: int = 95) -> bytes:
    """Encode a picture (C,H,W) uint8, C 1 or 3, as PNG, or as "jpeg" of this quality (0..100)."""
    from torchvision.io import encode_jpeg, encode_png  # this import takes longer than that of torch

    encoded = encode_jpeg(picture, quality=quality) if kind == "jpeg" else encode_png(picture)
    return encoded.numpy().tobytes()
