"""What lies about in real folders: systems' files, links that lead up, other formats, gaps, odd names and lists."""

import contextlib
import os

import numpy as np
import pytest
import torch
from PIL import Image

import options
from commands.infer import Rows
from data import prepare
from data.folders import list_folder, read_lines, unsupported_files, walk
from data.frames import FrameReader
from data.images import ImageTrainDataset, VideoSequenceDataset, images_by_name, list_images
from data.masks import MaskTrainDataset, chosen, images_in, read_image
from data.styles import StyleLatents
from data.video import FrameFolder, VideoRecurrentTestDataset, VideoRecurrentTrainDataset
from data.vimeo import names_of
from tests.test_data_video import told

LEFT_BEHIND = (".ipynb_checkpoints", ".Trash-0", "@eaDir", "__MACOSX", "lost+found", "$RECYCLE.BIN")
ODD = os.fsdecode(b"caf\xe9")  # as Latin-1 wrote it, no text in UTF-8


def picture(path, value=100, size=(16, 16)):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    Image.fromarray(np.full((*size, 3), value, np.uint8)).save(path)


@pytest.fixture(autouse=True)
def no_unsupported_files():
    unsupported_files()


@pytest.fixture
def root(tmp_path):
    """Two folders of three frames each."""
    for folder in "ab":
        for number in range(3):
            picture(tmp_path / "in" / folder / f"{number:03d}.png", 10 * number)
    return tmp_path / "in"


def listed(root):
    """What every lister finds below the root, by paths."""
    return [list_images(str(root)), [path for clip in FrameFolder(str(root)).clips for path in clip.lq],
            [os.path.join(root, clip, frame) for clip, frames in prepare.clips_below(str(root)) for frame in frames],
            [path for files in StyleLatents(str(root), None, None, 16, True, None, None, 0).files.values()
             for path in files],
            [str(path) for folder in "ab" for path in images_in(str(root / folder))],
            [str(root / name / f"{i:03d}.png") for name in list_folder(str(root))[0] for i in range(3)]]


def test_what_systems_leave_behind_and_links_that_lead_up_are_passed_over_everywhere(root):
    clean = listed(root)
    assert all(found == clean[0] for found in clean) and len(clean[0]) == 6
    for name in LEFT_BEHIND:
        for place in (root, root / "a"):
            picture(place / name / "000.png")
            picture(place / name / "deeper" / "._000.png")
    for name in ("._000.png", ".hidden.png", "Thumbs.db", ".DS_Store", "desktop.ini"):
        (root / "a" / name).write_bytes(b"\0")
    for place, target in (("up", root), ("a/up", root), ("a/self", root / "a"), ("b/out", root.parent)):
        os.symlink(target, root / place)
    assert listed(root) == clean
    os.symlink(root / "b", root / "c")  # a link to elsewhere is followed, as ever
    assert len(list_images(str(root))) == 9


def test_two_folders_that_link_to_each_other_end(tmp_path):
    for here, there in ("ab", "ba"):
        picture(tmp_path / here / "0.png")
        os.symlink(tmp_path / there, tmp_path / here / "other")
    assert sum(len(pictures) for _, pictures in walk(str(tmp_path))) == 4


def test_other_formats_are_counted_in_one_line(root):
    for name in ("a/x.tif", "a/y.TIFF", "b/z.bmp", "b/w.bmp"):
        (root / name).write_bytes(b"II*\0")
    for _ in range(2):  # as training and test sets may list one folder
        list_images(str(root))
    line = unsupported_files()
    assert line.startswith("passed over: 2 .bmp, 1 .tif, 1 .tiff files, as ") and "PNG, JPEG or WebP" in line
    assert not unsupported_files()  # told once
    for make in (lambda: list_images(str(root / "only")), lambda: FrameFolder(str(root / "only")),
                 lambda: images_in(str(root / "only"))):
        (root / "only").mkdir(exist_ok=True)
        (root / "only/x.tif").write_bytes(b"II*\0")
        with pytest.raises((ValueError, FileNotFoundError), match=r"; passed over: 1 \.tif files, as .*only/x\.tif"):
            make()


def test_a_gap_in_a_clips_numbers_is_named(root):
    for number in (3, 4, 6, 7):
        picture(root / "b" / f"{number:03d}.png")
    for make in (lambda: VideoRecurrentTrainDataset(dataroot_gt=str(root), gt_size=8, num_frame=2),
                 lambda: VideoRecurrentTestDataset(dataroot_gt=str(root)), lambda: FrameFolder(str(root)),
                 lambda: VideoSequenceDataset(dataroot=str(root), num_frame=2, size=8),
                 lambda: list(prepare.clips_below(str(root)))):
        with told(f"{root}/b: frames are missing between '004' and '006'"):
            make()
    picture(root / "b" / "005.png")
    assert len(FrameFolder(str(root))) == 2


@pytest.mark.parametrize("names, gap", [
    (("f1", "f2", "f10"), True), (("0", "5", "10", "15"), False), (("0", "5", "10", "20"), True),
    (("1403636579763", "1403636579813", "1403636579870", "1403636579901"), False),  # times
    (("frame0", "frame1", "frame3", "framet"), False), (("a1", "b5", "c9"), False), (("1", "3"), False)], ids=str)
def test_which_names_have_a_gap(tmp_path, names, gap):
    for name in names:
        picture(tmp_path / "clip" / f"{name}.png")
    with pytest.raises(ValueError, match="missing between") if gap else contextlib.nullcontext():
        assert len(FrameFolder(str(tmp_path)).clip(0).frames) == len(names)


def test_a_byte_order_mark_is_not_part_of_a_list_or_of_options(root, tmp_path, shared):
    mark = b"\xef\xbb\xbf"
    (tmp_path / "list.txt").write_bytes(mark + b"in/a/000.png\r\nin/b/001.png\r\n")
    assert len(ImageTrainDataset(dataroot=str(tmp_path / "list.txt"), size=8)) == 2
    (tmp_path / "meta.txt").write_bytes(mark + b"a 3 (16,16,3) 0\n")
    clips = VideoRecurrentTrainDataset(dataroot_gt=str(root), meta_info_file=str(tmp_path / "meta.txt"), gt_size=8,
                                       num_frame=2, filename_tmpl="03d").clips
    assert [clip.name for clip in clips] == ["a"] == names_of(str(tmp_path / "meta.txt"), str(root))
    assert options.read_file(str(shared / "field/bom_options.json"))["task"] == "bom"
    assert read_lines(str(shared / "field/bom_list.txt")) == ["png_good.png"]


def test_a_list_that_is_not_utf_8_names_itself(root, tmp_path):
    for content, line in (("in/a/000.png\nin/caf\xe9.png".encode("latin-1"), 2), ("in/a/000.png".encode("utf-16"), 1)):
        (tmp_path / "list.txt").write_bytes(content)
        for make in (lambda: list_images(str(tmp_path / "list.txt")),
                     lambda: names_of(str(tmp_path / "list.txt"), str(root))):
            with told(f"{tmp_path}/list.txt, line {line}: is not a text in UTF-8", "save it as UTF-8"):
                make()


def test_names_may_be_any_bytes(tmp_path):
    (tmp_path / "gt").mkdir()
    for kind in ("images", "gt"):
        picture(tmp_path / kind / f"{ODD}.png", 0)
        picture(tmp_path / kind / "new\nline.png", 0)
    folder, name = str(tmp_path / "images"), f"{ODD}.png"
    assert len(ImageTrainDataset(dataroot=folder, size=16)) == 2 and ODD in images_by_name(folder)
    masks = MaskTrainDataset(image_path=folder, gt_path=str(tmp_path / "gt"), validation_split=0.0)
    assert masks[0]["key"] == ODD and chosen([ODD, "b"], 0.5, 0)
    assert torch.equal(FrameReader()([f"{folder}/{name}"])[0], torch.zeros(3, 16, 16, dtype=torch.uint8))
    for _ in range(2):
        rows = Rows(tmp_path / "metrics.csv")
        rows.add(ODD, {"psnr": 1.0})
        rows.close()
        assert Rows(tmp_path / "metrics.csv").rows == {ODD: {"psnr": 1.0}}
    for path, shown in ((f"{folder}/{name}", "caf\\udce9.png"), (f"{folder}/new\nline.png", "new?line.png")):
        with open(path, "wb") as file:
            file.write(b"damaged")
        with pytest.raises(ValueError) as error:
            FrameReader()([path])
        assert f"images/{shown}: not a readable image" in str(error.value) and str(error.value).encode()


def test_an_lmdb_holds_frames_of_any_name(tmp_path):
    pytest.importorskip("lmdb")
    picture(tmp_path / "in" / "clip" / f"{ODD}.png", 3)
    prepare.main(["lmdb", str(tmp_path / "in"), str(tmp_path / "out.lmdb")])
    clip = FrameFolder(str(tmp_path / "out.lmdb"))[0]
    assert clip["lq_path"] == [f"{tmp_path}/out.lmdb/clip/{ODD}"] and (clip["L"] == 3 / 255).all()


@contextlib.contextmanager
def somebody_else():
    """As a user who is not root, whom nothing is forbidden."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def test_a_missing_permission_is_called_so(root):
    for folder in (root, *root.parents):
        if str(folder).startswith("/tmp/"):
            os.chmod(folder, 0o755)
    closed = [root / "b" / "000.png", root / "b"]
    for path in closed:
        os.chmod(path, 0)
        with somebody_else():
            for make in (lambda: [ImageTrainDataset(dataroot=str(root), size=8, skip_corrupt=True)[3]],
                         lambda: FrameFolder(str(root))[1], lambda: read_image(images_in(str(root / "b"))[0]),
                         lambda: StyleLatents(str(root), None, None, 16, True, None, None, 0)("b", 0)):
                with told(f"{path}: can't be read: Permission denied; make it readable"):
                    make()
        os.chmod(path, 0o755)


def test_a_video_in_place_of_a_folder_is_an_error_that_names_the_remedy(tmp_path, shared):
    clip = str(shared / "field/not_frames.mp4")
    for make in (lambda: FrameFolder(clip), lambda: images_by_name(clip), lambda: images_in(clip)):
        with told(clip, "video"):  # it is none; without ffmpeg: videos need it
            make()
    with told(clip, "folder of", "PNG, JPEG or WebP", "python -m data.prepare frames VIDEO FOLDER makes one"):
        VideoRecurrentTestDataset(dataroot_gt=clip)
