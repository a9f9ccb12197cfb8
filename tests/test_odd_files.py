"""The table of docs/data.md: one rule for all recipes, a test for each row."""

import os
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from data.folders import unsupported_files
from data.frames import read_frame
from data.images import images_by_name
from data.masks import images_in, read_image
from data.styles import pictures_in
from data.video import FrameFolder
from tests.conftest import ROOT

GREY = torch.arange(0, 240, dtype=torch.uint8).view(12, 20)
COLOUR = torch.stack([GREY, GREY.flip(0), GREY.flip(1)])
WHITE = torch.full((3, 12, 20), 255, dtype=torch.uint8)


def save(path, picture=COLOUR, kind="PNG", **how):
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture.movedim(0, -1).numpy())
    image.save(path, kind, **how)


def vrt(folder):
    found = FrameFolder(str(folder))
    return {f"{'' if clip.name == folder.name else clip.name + '/'}{frame}": (255 * image).round().byte()
            for clip in map(found.clip, range(len(found))) for frame, image in zip(clip.frames, clip.read()["L"])}


def vqgan(folder):
    return {name: read_frame(path) for name, path in images_by_name(str(folder)).items()}


def segmentation(folder):
    return {path.stem: (255 * read_image(path)).round().byte() for path in images_in(str(folder))}


def lgt(folder):
    return {os.path.splitext(os.path.basename(path))[0]: read_frame(path) for path in pictures_in(str(folder))}


RECIPES = (vrt, vqgan, segmentation, lgt)


def reads(folder, expected, recipes=RECIPES, close=0):
    """All recipes find these pictures and no others."""
    for recipe in recipes:
        found = recipe(folder)
        assert found.keys() == expected.keys(), recipe
        for name, picture in expected.items():
            assert (found[name].int() - picture.int()).abs().max() <= close, (recipe, name)


def fails(folder, words, recipes=RECIPES):
    for recipe in recipes:
        with pytest.raises(ValueError, match=words) as caught:
            recipe(folder)
        assert "\n" not in str(caught.value)


def grey(folder):
    save(folder / "a.png", Image.fromarray(GREY.numpy()))
    reads(folder, {"a": GREY.expand(3, -1, -1)})


def palette(folder):
    image = Image.fromarray((GREY % 5).numpy(), "P")
    colours = torch.tensor([[9, 1, 2], [30, 4, 5], [6, 77, 8], [200, 10, 111], [12, 13, 240]], dtype=torch.uint8)
    image.putpalette(colours.flatten().tolist())
    save(folder / "a.png", image)
    reads(folder, {"a": colours[(GREY % 5).long()].movedim(-1, 0)})


def transparency(folder):
    opacity = torch.where(GREY > 120, 255, 51).byte()
    save(folder / "a.png", torch.cat([COLOUR, opacity[None]]))
    mixed = COLOUR * (opacity / 255) + 255 * (1 - opacity / 255)
    reads(folder, {"a": mixed.round().byte()})


def one_transparent_colour(folder):
    save(folder / "a.png", transparency=tuple(COLOUR[:, 3, 4].tolist()))
    expected = COLOUR.clone()
    expected[:, 3, 4] = 255
    reads(folder, {"a": expected})


def bits_16(folder):
    save(folder / "a.png", Image.fromarray(GREY.numpy().astype(np.uint16) * 257 + 3))
    reads(folder, {"a": GREY.expand(3, -1, -1)})


def bits_1(folder):
    save(folder / "a.png", Image.fromarray((GREY > 100).numpy()))
    reads(folder, {"a": ((GREY > 100).byte() * 255).expand(3, -1, -1)})


def interlaced(folder):
    from tests.test_data_image_files import png

    (folder / "a.png").write_bytes(png(GREY.numpy()[..., None], 8, 0, True))
    reads(folder, {"a": GREY.expand(3, -1, -1)})


def cmyk(folder):
    plain = torch.full((3, 16, 16), 200, dtype=torch.uint8)
    save(folder / "a.jpg", Image.fromarray(plain.movedim(0, -1).numpy()).convert("CMYK"), "JPEG", quality=100)
    reads(folder, {"a": plain}, close=4)


def exif(folder):
    halves = torch.zeros(3, 16, 24, dtype=torch.uint8)
    halves[:, :8] = 240
    tag = Image.Exif()
    tag[0x0112] = 3
    save(folder / "a.jpg", halves, "JPEG", quality=100, exif=tag)
    reads(folder, {"a": halves.flip(1, 2)}, close=4)


def another_ending(folder):
    save(folder / "a.jpg")
    reads(folder, {"a": COLOUR})


def upper_case(folder):
    save(folder / "a.PNG")
    reads(folder, {"a": COLOUR})


def names(folder):
    odd = ["a b'c", "ünï 画", os.fsdecode(b"raw \xff")]
    for name in odd:
        save(folder / f"{name}.png")
    reads(folder, dict.fromkeys(odd, COLOUR))


def link_to_a_file(folder):
    save(folder.parent / "elsewhere.png")
    (folder / "a.png").symlink_to(folder.parent / "elsewhere.png")
    reads(folder, {"a": COLOUR})


def link_to_a_folder(folder):
    (folder.parent / "other").mkdir()
    save(folder.parent / "other/a.png")
    (folder / "sub").symlink_to(folder.parent / "other")
    (folder.parent / "other/up").symlink_to(folder.parent)
    (folder / "self").symlink_to(folder)
    reads(folder, {"sub/a": COLOUR}, recipes=(vqgan,))
    (folder.parent / "other/up").unlink()
    reads(folder, {"sub/a": COLOUR}, recipes=(vrt, vqgan))


def hidden(folder):
    save(folder / "a.png")
    save(folder / ".b.png")
    (folder / ".c").mkdir()
    save(folder / ".c/d.png")
    reads(folder, {"a": COLOUR})


def of_systems(folder):
    save(folder / "a.png")
    for name in ("@eaDir", "__MACOSX", ".ipynb_checkpoints"):
        (folder / name).mkdir()
        save(folder / name / "b.png")
    for name in ("Thumbs.db", "desktop.ini", "._a.png"):
        (folder / name).write_bytes(b"x")
    reads(folder, {"a": COLOUR})
    assert unsupported_files() == ""


def another_format(folder):
    save(folder / "a.png")
    for name in ("b.tif", "c.bmp", "d.mp4"):
        (folder / name).write_bytes(b"x")
    for recipe in RECIPES:
        reads(folder, {"a": COLOUR}, (recipe,))
        said = unsupported_files()
        assert said.startswith("passed over: 1 .bmp, 1 .mp4, 1 .tif files") and "data.prepare frames" in said


def no_picture(folder):
    for content, words in ((b"<html>", "an HTML page"), (b"version https://git-lfs", "a Git LFS pointer"),
                           (b"", "an empty file")):
        (folder / "a.png").write_bytes(content)
        fails(folder, rf"a.png: not a readable image \({words}\); save it again as PNG")


def damaged(folder):
    save(folder / "b.png")
    whole = (folder / "b.png").read_bytes()
    (folder / "b.png").unlink()
    for content in (whole[:-30], whole[:60] + bytes([whole[60] ^ 1]) + whole[61:]):
        (folder / "a.png").write_bytes(content)
        fails(folder, "a.png: not a readable image")


def animated(folder):
    frames = [Image.fromarray((COLOUR // n).movedim(0, -1).contiguous().numpy()) for n in (1, 2)]
    frames[0].save(folder / "a.webp", "WEBP", save_all=True, append_images=frames[1:])
    fails(folder, "animated: save one frame")


def two_endings(folder):
    save(folder / "a.png")
    save(folder / "a.jpg", kind="JPEG")
    fails(folder, "a\\.|extensions", recipes=(vrt, vqgan, segmentation))


CASES = {"grey": grey, "palette": palette, "transparency": transparency,
         "one transparent colour": one_transparent_colour, "16 bits": bits_16, "1, 2 or 4 bits": bits_1,
         "interlaced": interlaced, "CMYK": cmyk, "rotated by EXIF": exif,
         "another kind than its ending says": another_ending, "ending in upper case": upper_case,
         "spaces and unicode in names": names, "link to a file": link_to_a_file, "link to a folder": link_to_a_folder,
         "hidden file or folder": hidden, "files of systems": of_systems, "another format": another_format,
         "no picture inside": no_picture, "damaged or cut off": damaged, "animated": animated,
         "two names that differ in the ending only": two_endings}
ROWS = re.findall(r"^\| (.*?) \| .*\|$", (ROOT / "docs/data.md").read_text(), re.MULTILINE)[1:]


def test_the_table_is_what_is_tested():
    assert ROWS == list(CASES)


@pytest.mark.parametrize("row", CASES)
def test_a_row_of_the_table_is_true(tmp_path, row):
    unsupported_files()
    (tmp_path / "in").mkdir()
    CASES[row](tmp_path / "in")
    unsupported_files()
    shutil.rmtree(tmp_path / "in")
