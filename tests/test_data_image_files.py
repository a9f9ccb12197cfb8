"""Every kind of image file is read by one rule, whatever the recipe; what is not a picture is an error of one line."""

import io
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torchvision.io import write_png

from data import prepare
from data.frames import read_frame
from data.image_files import ADAM7, CHANNELS, DEPTHS, BadPicture, encode, levels_in, picture_in, read_picture
from data.images import ImageTrainDataset, crop, strip
from data.masks import MaskTrainDataset, images_in, read_image, read_mask
from data.styles import StyleLatents
from report.facts import AS_IT_IS, data_uri
from tests.conftest import ROOT
from tests.test_image_fuzz import png_of

RNG = np.random.default_rng(0)
DISC = np.add.outer(np.square(np.arange(-16, 16)), np.square(np.arange(-20, 12))) < 90  # (32,32), off the middle


def filtered(rows, apart):
    """PNG's five filters in turn over rows (H,N) uint8, each with its number before it."""
    content, above = b"", np.zeros(rows.shape[1], int)
    for number, row in enumerate(rows.astype(int)):
        left, corner = (np.append(np.zeros(apart, int), line)[: len(line)] for line in (row, above))
        guess = left + above - corner
        by_left, by_above, by_corner = abs(guess - left), abs(guess - above), abs(guess - corner)
        paeth = np.where((by_left <= by_above) & (by_left <= by_corner), left,
                         np.where(by_above <= by_corner, above, corner))
        taken = (0, left, above, (left + above) // 2, paeth)[number % 5]
        content += bytes([number % 5]) + ((row - taken) % 256).astype(np.uint8).tobytes()
        above = row
    return content


def png(values, depth, colour, interlaced=False, *extra):
    """A PNG file of values (H,W,C), by the specification."""
    height, width, channels = values.shape
    raw = b""
    for x, y, dx, dy in ADAM7 if interlaced else ((0, 0, 1, 1),):
        if (part := values[y::dy, x::dx]).size:
            bits = np.unpackbits(part.reshape(len(part), -1, 1).astype(">u2").view(np.uint8), axis=-1)[..., -depth:]
            raw += filtered(np.packbits(bits.reshape(len(part), -1), axis=1), max(1, depth * channels // 8))
    packed = zlib.compress(raw)
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)
    return png_of([(b"IHDR", header), *extra, (b"IDAT", packed[:40]), (b"IDAT", packed[40:]), (b"IEND", b"")])


def saved(path, array, mode=None, **how):
    Image.fromarray(array, mode).save(path, **how)
    return str(path)


# One rule ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("interlaced", (False, True))
@pytest.mark.parametrize("colour", CHANNELS)
def test_every_kind_of_png_is_what_was_written(colour, interlaced):
    for depth in DEPTHS[colour]:
        table = RNG.integers(0, 256, 3 * 2**min(depth, 8), dtype=np.uint8).tobytes()
        for size in ((1, 1), (2, 9), (37, 21)):
            values = RNG.integers(0, 2**depth, (*size, CHANNELS[colour]))
            content = png(values, depth, colour, interlaced, *([(b"PLTE", table)] if colour == 3 else []))
            first, later = (picture_in(content, "x") for _ in range(2))
            assert (levels_in(content, "x").planes.movedim(0, -1).numpy() == values).all(), (depth, size)
            assert torch.equal(first, later) and first.stride() == later.stride()  # or sums of them would differ
            if depth < 16 and colour not in (4, 6):
                seen = np.array(Image.open(io.BytesIO(content)).convert("RGB"))
                assert (first.movedim(0, -1).numpy() == seen).all(), (depth, size)


def test_transparent_colours_are_shown_on_white():
    values = np.arange(12).reshape(3, 4, 1) % 3
    colours = bytes((10, 20, 30, 40, 50, 60, 70, 80, 90))
    shown = picture_in(png(values, 2, 3, False, (b"PLTE", colours), (b"tRNS", bytes((255, 0)))), "x")
    assert shown[:, 0, :3].T.tolist() == [[10, 20, 30], [255, 255, 255], [70, 80, 90]]
    shown = picture_in(png(values, 8, 0, False, (b"tRNS", bytes((0, 2)))), "x")
    assert shown[0, 0, :3].tolist() == [0, 1, 255]


@pytest.mark.parametrize("kind", ("JPEG", "PNG", "WEBP"))
def test_a_picture_lies_as_it_is_seen(kind):
    pixels = np.repeat(np.repeat(RNG.integers(0, 256, (3, 5, 3), dtype=np.uint8), 8, 0), 8, 1)
    for orientation in range(1, 9):
        exif, file = Image.Exif(), io.BytesIO()
        exif[0x0112] = orientation
        Image.fromarray(pixels).save(file, kind, exif=exif, quality=95)
        seen = np.array(ImageOps.exif_transpose(Image.open(file)).convert("RGB")).astype(int)
        found = picture_in(file.getvalue(), "x").movedim(0, -1).numpy()
        assert found.shape == seen.shape and abs(found - seen).max() < 8, orientation


def test_all_recipes_read_a_file_alike(tmp_path):
    """16 bits, transparency, orientation, a palette, grey, WebP and upper case, in the readers of all five recipes."""
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = RNG.integers(0, 256, (16, 16, 4), dtype=np.uint8)
    folder = tmp_path / "in" / "style"
    folder.mkdir(parents=True)
    for name in ("a.png", "b.WEBP"):
        saved(folder / name, pixels, lossless=True, format=name[2:].upper())
    saved(folder / "c.JPG", pixels[..., :3], exif=exif, format="JPEG")
    saved(folder / "d.png", pixels[..., 0].astype(np.uint16) * 251)
    saved(folder / "e.png", pixels[..., 0])
    Image.fromarray(pixels[..., :3]).quantize(4).save(folder / "f.png")
    (tmp_path / "masks").mkdir()
    for path in folder.iterdir():
        saved(tmp_path / "masks" / f"{path.stem}.png", np.zeros((16, 16), np.uint8))
    masks = MaskTrainDataset(image_path=str(folder), gt_path=str(tmp_path / "masks"), image_size=16,
                             validation_split=0.0)
    images = ImageTrainDataset(dataroot=str(tmp_path / "in"), size=16, use_hflip=False)
    styles = StyleLatents(str(tmp_path / "in"), None, None, 16, True, None, None, 0)
    shown = images_in(str(folder))
    assert len(images) == len(masks) == len(shown) == 6
    for i, path in enumerate(sorted(folder.iterdir())):
        frame = read_frame(str(path))
        assert frame.dtype == torch.uint8 and frame.shape == (3, 16, 16)
        assert torch.equal(images[i]["H"][0].movedim(-1, 0), frame) and torch.equal(masks.read(i)[0], frame)
        assert torch.equal(styles.picture("style", i), frame.float() / 127.5 - 1)
        assert torch.equal(read_image(shown[i]), frame.float() / 255)
    deep = read_frame(str(folder / "d.png"))[0].numpy()
    assert (deep == np.round(pixels[..., 0] * 251.0 / 257)).all()  # the nearest of 256 levels


def test_16_bit_frames_are_read(shared):
    values = read_frame(str(shared / "field/grey16_frame.png"))
    assert values.dtype == torch.uint8 and values.unique().tolist()[:4] == [0, 5, 10, 15]


# Masks -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("count", (2, 3, 4, 7, 16, 20))
def test_a_palettes_indices_are_the_class_ids_whatever_its_bits(tmp_path, count):
    ids = (np.arange(33 * 21).reshape(33, 21) % count).astype(np.uint8)
    image = Image.fromarray(ids, "P")
    image.putpalette(RNG.integers(1, 255, 3 * count, dtype=np.uint8).tobytes())
    image.save(tmp_path / "m.png")
    assert (tmp_path / "m.png").read_bytes()[24] == (1 if count <= 2 else 2 if count <= 4 else 4 if count <= 16 else 8)
    assert (read_mask(tmp_path / "m.png", count).numpy() == ids).all()


def test_a_mask_of_two_colours_is_the_grey_one(tmp_path):
    grey = saved(tmp_path / "grey.png", DISC.astype(np.uint8) * 255)
    twins = [saved(tmp_path / "one_bit.png", DISC), saved(tmp_path / "deep.png", DISC.astype(np.uint16) * 65535)]
    for mode in ("LA", "RGBA"):
        twins.append(saved(tmp_path / f"{mode}.png", np.array(Image.open(grey).convert(mode)), mode))
    for i, palette in enumerate(((0, 0, 0, 255, 0, 0), (0, 0, 0, 255, 255, 255), (255, 255, 255, 0, 0, 0))):
        image = Image.fromarray(DISC.astype(np.uint8) if i < 2 else 1 - DISC.astype(np.uint8), "P")
        image.putpalette(palette)
        image.save(tmp_path / f"p{i}.png")
        twins.append(str(tmp_path / f"p{i}.png"))
    for path in (grey, *twins):
        assert (read_mask(path, 2).numpy() == DISC).all(), path
        assert (read_mask(path, 2, threshold=127).numpy() == DISC).all(), path
    soft = Image.fromarray((DISC * 200).astype(np.uint8) + 20).convert("P")  # whose palette is a ramp of grey
    soft.putpalette(bytes(level for level in range(256) for _ in range(3)))
    soft.save(tmp_path / "soft.png")
    assert (read_mask(tmp_path / "soft.png", 2, threshold=127).numpy() == DISC).all()


def test_field_masks(shared):
    folder = shared / "field"
    one_bit, grey = (read_mask(folder / f"mask_{name}_disc.png", 2) for name in ("palette_1bit", "grey8"))
    assert torch.equal(one_bit, grey) and set(grey.unique().tolist()) == {0, 1}
    assert read_mask(folder / "mask_palette_4bit_sixteen.png", 16).unique().tolist() == list(range(16))


def test_the_mask_lies_on_the_object(tmp_path, shared):
    for kind, name in (("images", "exif180_image.jpg"), ("gt", "exif180_mask_as_seen.png")):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / f"a{name[-4:]}").write_bytes((shared / "field" / name).read_bytes())
    image, mask, _ = MaskTrainDataset(image_path=str(tmp_path / "images"), gt_path=str(tmp_path / "gt"), image_size=64,
                                      validation_split=0.0).read(0)
    grey, inside = image.float().mean(0), mask == 1
    assert abs(grey[inside].mean() - grey[~inside].mean()) > 60 > 2 * grey[inside].std()


# Damage ------------------------------------------------------------------------------------------------------------

@pytest.fixture
def flipped(tmp_path):
    """A folder of two good pictures and one with a flipped bit, large enough for the report to shrink it."""
    (tmp_path / "in" / "clip").mkdir(parents=True)
    for name in ("0.png", "1.png", "2.png"):
        write_png(torch.from_numpy(RNG.integers(0, 256, (3, 200, 200), dtype=np.uint8)),
                  str(tmp_path / "in" / "clip" / name))
    content = bytearray((tmp_path / "in/clip/1.png").read_bytes())
    assert len(content) > AS_IT_IS
    content[len(content) // 2] ^= 4
    (tmp_path / "in/clip/1.png").write_bytes(content)
    return tmp_path / "in"


def test_a_flipped_bit_is_named_everywhere_and_skipped_where_that_is_asked_for(tmp_path, flipped):
    bad, says = flipped / "clip/1.png", r"1\.png: not a readable image \(it is damaged: a checksum does not match\)"
    readers = (lambda: read_frame(str(bad)), lambda: read_mask(bad, 2), lambda: data_uri(bad),
               lambda: ImageTrainDataset(dataroot=str(flipped), size=64)[1],
               lambda: prepare.main(["meta", str(flipped), str(tmp_path / "meta.txt")]),
               lambda: StyleLatents(str(flipped), None, None, 16, True, None, None, 0).picture("clip", 1))
    for read in readers:
        with pytest.raises(BadPicture, match=says) as error:
            read()
        assert "\n" not in str(error.value)
    patient = ImageTrainDataset(dataroot=str(flipped), size=200, use_hflip=False, skip_corrupt=True)
    with pytest.warns(UserWarning, match="skipped"):
        assert torch.equal(patient[1]["H"], patient[2]["H"])


def test_what_is_not_a_picture_is_called_by_its_name(tmp_path):
    frames = [Image.fromarray(RNG.integers(0, 256, (16, 16, 3), dtype=np.uint8)) for _ in range(2)]
    files = {}
    for kind in ("PNG", "WEBP", "GIF"):
        frames[0].save(file := io.BytesIO(), kind, save_all=True, append_images=frames[1:])
        files[kind] = file.getvalue()
    cases = [(files["PNG"], "it is animated"), (files["WEBP"], "it is animated"), (files["GIF"], "a GIF file"),
             (b"", "an empty file"), (b"\0\0\0\x18ftypmp42" + bytes(64), "a video"), (b"words", "unknown content"),
             (b"\n<!DOCTYPE html><p>404", "an HTML page"), (b"version https://git-lfs.github", "a Git LFS pointer")]
    for content, says in cases:
        (tmp_path / "a.png").write_bytes(content)
        with pytest.raises(BadPicture, match=rf"a\.png: not a readable image \({says}.*; save it again as PNG"):
            read_picture(str(tmp_path / "a.png"))
    still = io.BytesIO()
    frames[0].save(still, "PNG")
    (tmp_path / "a.jpg").write_bytes(still.getvalue())  # the content counts, not the name
    assert (read_picture(str(tmp_path / "a.jpg")).movedim(0, -1).numpy() == np.array(frames[0])).all()


def test_absurd_sizes_take_no_memory():
    def header(width, height):
        return struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)

    bomb = zlib.compress(bytes(200_000_000), 9)
    jpeg = io.BytesIO()
    Image.new("RGB", (16, 16)).save(jpeg, "JPEG")
    jpeg = bytearray(jpeg.getvalue())
    place = jpeg.index(b"\xff\xc0") + 5
    jpeg[place : place + 4] = b"\xff\xff\xff\xff"
    thinner = jpeg.copy()
    thinner[place : place + 4] = b"\x20\0\x20\0"  # 8192 x 8192 pixels in a kilobyte
    tracemalloc.start()
    try:
        for content, says in ((png_of([(b"IHDR", header(60_000, 60_000)), (b"IDAT", bomb), (b"IEND", b"")]), "60000x"),
                              (png_of([(b"IHDR", header(9, 9)), (b"IDAT", bomb), (b"IEND", b"")]), "not hold as many"),
                              (bytes(jpeg), "65535x65535 pixels"), (bytes(thinner), "not hold as many")):
            with pytest.raises(BadPicture, match=says):
                picture_in(content, "x")
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()
    for size in ((65_535, 1), (1, 65_535)):  # the largest
        assert picture_in(encode(torch.zeros(1, *size, dtype=torch.uint8)), "x").shape == (3, *size)


def test_a_thin_picture_is_an_error_or_cut_before_it_is_enlarged(tmp_path, monkeypatch):
    saved(tmp_path / "a.png", np.zeros((2, 3000, 3), np.uint8))
    saved(tmp_path / "b.png", np.full((30, 30, 3), 7, np.uint8))
    for make in (lambda **how: ImageTrainDataset(dataroot=str(tmp_path), size=256, **how)[0],):
        with pytest.raises(BadPicture, match=r"a\.png: 3000x2 \(width x height\) is too small; 8 pixels a side"):
            make()
        with pytest.warns(UserWarning, match="skipped"):
            assert (make(skip_corrupt=True)["H"] == 7).all()
    largest, resize = [], F.interpolate
    monkeypatch.setattr(F, "interpolate", lambda x, size, **how: largest.append(max(size)) or resize(x, size, **how))
    wide = torch.arange(20_000, dtype=torch.int32).expand(3, 9, -1)
    assert crop(torch.zeros(3, 9, 20_000, dtype=torch.uint8), 256, 256, (0.3, 0.7)).shape == (3, 256, 256)
    assert largest == [4 * 256]
    assert int(strip(wide, (0, 0))[0, 0, 0]) == 0 and int(strip(wide, (0.99999, 0.99999))[0, 0, -1]) == 19_999
    assert strip(wide[:, :, :36], (0.5, 0.5)).shape == (3, 9, 36)  # others stay whole


def test_latents_kept_in_memory_have_a_bound(tmp_path, monkeypatch):
    (tmp_path / "style").mkdir()
    for i in range(5):
        saved(tmp_path / "style" / f"{i}.png", np.full((16, 16, 3), i, np.uint8))
    monkeypatch.setattr("data.styles.MOST_KEPT", 2 * 3 * 16 * 16 * 4)
    latents = StyleLatents(str(tmp_path), None, None, 16, True, None, None, 0)
    seen = [[latents("style", i) for i in range(5)] for _ in range(2)]
    assert len(latents.kept) == 2 and all(torch.equal(a, b) for a, b in zip(*seen))


def test_no_other_module_touches_the_codecs():
    for path in (p for folder in ("", "data", "models", "losses", "report") for p in (ROOT / folder).glob("*.py")):
        if path.name != "image_files.py":
            assert "torchvision.io" not in path.read_text() and "import PIL" not in path.read_text(), path
