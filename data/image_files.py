"""Image files: which they are, what is in them, and how they are written; one rule for all recipes.

PNG, JPEG and WebP are told by their first bytes, whatever the name says, and decoded by torchvision. Its PNG decoder
dies by SIGSEGV where libpng finds anything wrong (530 of 1,000 damaged files), so it only gets what has been checked
here: every chunk's checksum, the header, the order, and once for each file that its pixels can be unpacked and are as
many as the header says. A picture is (3,H,W) uint8 RGB:

- grey is repeated, CMYK converted, a palette shown in its colours;
- transparency is shown on white, as viewers show it;
- 16 bits become 8 by rounding, 65535 being 255: off by half a level at most, where the high byte alone is off by one;
- EXIF orientation is applied, so that a picture lies as it is seen, and its mask on it;
- an animated file is an error: which of its frames is meant can't be known.

Of a mask the levels themselves count (`read_levels`): no colours, no transparency, the indices of a palette.
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
MAX_SIDE, MAX_PIXELS = 65_535, 180_000_000  # of a picture; more is a damaged header, or needs tiles
JPEG_DENSITY = 600  # pixels that a byte can tell at most: a bit for each block of 8x8 makes 512
MIN_SIDE = 8  # pixels; what is smaller shows nothing that could be told apart
SIGNATURES = {b"GIF8": "a GIF file", b"BM": "a BMP file", b"II*\0": "a TIFF file", b"MM\0*": "a TIFF file",
              b"<!": "an HTML page", b"<html": "an HTML page", b"version https://git-lfs": "a Git LFS pointer",
              b"%PDF": "a PDF file", b"PK\3\4": "a zip file", b"\x1aE\xdf\xa3": "a video"}


class BadPicture(ValueError):
    """A file whose content is not a picture that can be used, in one line; `skip_corrupt` passes over it."""


class Levels(NamedTuple):
    """What is stored for each pixel.

    Attributes:
        planes: (C,H,W), uint8, or int32 at depth 16; C: 1 grey or index, 2 with opacity, 3 RGB, 4 with opacity.
        depth: bits of a value. palette: (N,4) uint8 RGB and opacity that the one plane is an index of, or None.
        clear: (C,) the colour that is transparent, or None. orientation: EXIF's, 1 to 8.
    """

    planes: Tensor
    depth: int = 8
    palette: Tensor | None = None
    clear: list[int] | None = None
    orientation: int = 1


# Reading -----------------------------------------------------------------------------------------------------------


def read_picture(path: str, least: int = 1) -> Tensor:
    """(3,H,W) uint8 RGB of an image file.

    Args: least: pixels that the shorter side must have.
    Raises: FileNotFoundError; BadPicture, a ValueError; ValueError where the file can't be read at all: one line.
    """
    return picture_in(read_bytes(path), path, least)


def picture_in(content: bytes, name: str, least: int = 1) -> Tensor:
    """`read_picture` of a file's content; `name` is what messages call it."""
    picture = as_rgb(levels_in(content, name))
    if min(picture.shape[1:]) < least:
        raise BadPicture(f"{printable(name)}: {size_of(picture)} is too small; {least} pixels a side are needed")
    return picture


def read_levels(path: str) -> Levels:
    """What an image file stores, upright. Raises: as `read_picture`."""
    return levels_in(read_bytes(path), path)


def read_bytes(path: str) -> bytes:
    """A file's content. Raises: FileNotFoundError, ValueError: one line that names it."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        raise FileNotFoundError(f"{printable(path)}: is missing") from None
    except OSError as error:
        raise ValueError(unreadable(path, error)) from None


def unreadable(path: str, error: OSError) -> str:
    """What to say of a file or folder that the system does not give."""
    remedy = f"; make it readable: chmod -R u+rX {printable(path)}" if isinstance(error, PermissionError) else ""
    return f"{printable(path)}: can't be read: {error.strerror}{remedy}"


def levels_in(content: bytes, name: str) -> Levels:
    """What an image file with this content stores, upright. Raises: BadPicture, one line that begins with `name`."""
    try:
        if content[:8] == PNG:
            levels = _png(content)
        elif content[:3] == b"\xff\xd8\xff":
            levels = _jpeg(content)
        elif content[:4] == b"RIFF" and content[8:12] == b"WEBP":
            levels = _webp(content)
        else:
            raise ValueError(foreign(content))
    except (ValueError, RuntimeError, zlib.error, struct.error) as error:
        reason = "it is damaged" if isinstance(error, struct.error) else str(error).splitlines()[0]
        reason = reason.rpartition(", ")[2] if isinstance(error, RuntimeError) else reason  # torch: where, what
        raise BadPicture(f"{printable(name)}: not a readable image ({reason}); save it again as {KINDS}") from None
    return levels._replace(planes=upright(levels.planes, levels.orientation))


def foreign(content: bytes) -> str:
    """What a file is that is none of ours."""
    if content[4:8] == b"ftyp":
        return "a HEIC or AVIF file" if content[8:11] in (b"hei", b"avi", b"mif") else "a video"
    head = content[:64].lstrip()
    found = next((what for start, what in SIGNATURES.items() if head.lower().startswith(start.lower())), None)
    return found or ("unknown content" if content else "an empty file")


def as_rgb(levels: Levels) -> Tensor:
    """(3,H,W) uint8, by the rules above."""
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
    return colours  # whose values lie pixel by pixel in memory, as decoders give them: a copy would cost as much again


def upright(planes: Tensor, orientation: int) -> Tensor:
    """(C,H,W) as it is seen, by EXIF's orientation."""
    if orientation > 4:
        planes = planes.transpose(1, 2)
    axes = {2: [2], 3: [1, 2], 4: [1], 6: [2], 7: [1, 2], 8: [1]}.get(orientation)
    return planes.flip(axes) if axes else planes


def size_of(frame: Tensor) -> str:
    return f"{frame.shape[-1]}x{frame.shape[-2]} (width x height)"


def printable(text: str) -> str:
    """A file's name in one line of UTF-8: control characters as question marks, bytes that are not text escaped."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", "?", text.encode(errors="backslashreplace").decode())


def _check_size(width: int, height: int) -> None:
    if not 0 < width <= MAX_SIDE or not 0 < height <= MAX_SIDE or width * height > MAX_PIXELS:
        raise ValueError(f"{width}x{height} pixels; at least 1, at most {MAX_SIDE:,} a side and {MAX_PIXELS:,} in all, "
                         "are read")


def _bytes(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def _orientation(tiff: bytes) -> int:
    """EXIF's orientation; 1 where it does not say one."""
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
PIECE = 1 << 20  # bytes of a chunk that libpng gets; it has a limit
MOST_SOUND = 1_000_000  # files known to be sound inside, some 100 bytes each

_sound: set[int] = set()  # hashes of header and checksums of what was unpacked once, as a whole


def _png(content: bytes) -> Levels:
    chunks, pixels = _chunks(content)
    width, height, depth, colour, packing, filtering, interlaced = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    _check_size(width, height)
    if depth not in DEPTHS.get(colour, ()) or packing or filtering or interlaced > 1:
        raise ValueError("the header is damaged")
    if b"acTL" in chunks and chunks[b"acTL"][:4] > b"\0\0\0\1":
        raise ValueError("it is animated: save the frame that is meant as a file of its own")
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
            if depth < 8 or colour == 3:  # several values a byte, which torchvision takes for one: rows of bytes
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
    """What a PNG file's chunks hold by name, and its IDAT chunks whole. Raises: ValueError: damage, a wrong order."""
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
    """Exactly `size` bytes of a zlib stream, no more memory than they take. Raises: ValueError, zlib.error."""
    unpacker = zlib.decompressobj()
    raw = unpacker.decompress(packed, size + 1)
    if len(raw) != size or not unpacker.eof:
        raise ValueError("it does not hold as many pixels as its header says")
    return raw


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(data, zlib.crc32(name)))


def _packed(pixels: Sequence[memoryview]) -> bytes:
    return b"".join(piece[8:-4] for piece in pixels)


def _pieces(packed: bytes) -> list[bytes]:
    return [_chunk(b"IDAT", packed[i : i + PIECE]) for i in range(0, len(packed), PIECE)]


def _decode_png(width: int, height: int, depth: int, colour: int, pixels: Sequence[bytes]) -> Tensor:
    """(C,height,width) of IDAT chunks that are known to be sound."""
    from torchvision.io import decode_png

    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    planes = decode_png(_bytes(b"".join((PNG, header, *pixels, _chunk(b"IEND", b"")))))
    return planes.int() if depth == 16 else planes  # of uint16 torch can do little


def _values(rows: Tensor, depth: int) -> Tensor:
    """Rows of bytes (H,N) -> values of `depth` bits (H, N * 8 / depth), the high bits first."""
    if depth == 8:
        return rows
    shifts = torch.arange(8 - depth, -1, -depth, dtype=torch.uint8)
    return (rows[..., None] >> shifts & (2**depth - 1)).flatten(1)


def _colours(chunks: dict[bytes, bytes], colour: int, planes: Tensor) -> tuple[Tensor | None, list[int] | None]:
    """The palette with opacity, and the colour that is transparent, as of `Levels`."""
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
            continue  # padding, and what has no content
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
            raise ValueError("it is animated: save the frame that is meant as a file of its own")
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
    """A picture (C,H,W) uint8, C 1 or 3, as a PNG file's content, or a "jpeg" one's of this quality."""
    from torchvision.io import encode_jpeg, encode_png  # which take longer to import than torch

    encoded = encode_jpeg(picture, quality=quality) if kind == "jpeg" else encode_png(picture)
    return encoded.numpy().tobytes()
