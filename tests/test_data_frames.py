"""Frames in an lmdb are those of the folder; what `data.prepare` writes is whole, or not there."""

import os
import sys

import pytest
import torch
from torch.utils.data import DataLoader
from torchvision.io import write_jpeg, write_png

import data.frames
from data import prepare
from data.video import FrameFolder, VideoRecurrentTestDataset
from data.vimeo import VideoRecurrentTrainVimeoDataset, VideoRecurrentTrainVimeoVFIDataset, VideoTestVimeo90KDataset
from tests.conftest import ROOT
from tests.test_data_video import FRAMES, frame, lq_of, same, told, train, write_clips
from tests.test_data_vimeo import write_sequences

LMDB = {"io_backend": {"type": "lmdb"}}


@pytest.fixture
def lmdb():
    return pytest.importorskip("lmdb", reason="the extra `lmdb` is not installed")


@pytest.fixture
def roots(tmp_path):
    return write_clips(tmp_path / "GT"), write_clips(tmp_path / "LQ", lq_of)


def packed(root):
    prepare.main(["lmdb", root, root + ".lmdb"])
    return root + ".lmdb"


# lmdb --------------------------------------------------------------------------------------------------------------

def test_an_lmdb_has_basicsrs_layout(lmdb, roots, tmp_path):
    root = packed(roots[0])
    lines = (tmp_path / "GT.lmdb/meta_info.txt").read_text().splitlines()
    assert len(lines) == 3 * FRAMES and lines[1] == "a/00000001.png (40,56,3) 1"
    with lmdb.open(root, readonly=True, lock=False) as environment, environment.begin() as transaction:
        assert transaction.get(b"b/00000005") == (tmp_path / "GT/b/00000005.png").read_bytes()
    assert len(FrameFolder(root)[0]["L"]) == FRAMES  # which leaves no lock in a folder that may be read-only
    assert sorted(os.listdir(root)) == ["data.mdb", "meta_info.txt"]


@pytest.mark.parametrize("workers", (0, 1, 2))
def test_lmdb_and_folder_give_equal_batches(lmdb, roots, workers):
    gt, lq = roots
    folder = train(gt, dataroot_lq=lq, random_reverse=True)
    dataset = train(packed(gt), dataroot_lq=packed(lq), random_reverse=True, **LMDB)
    keys = [(epoch, index) for epoch in range(2) for index in range(len(folder))]
    dataset[0]  # opens it here, before the workers are forked
    loader = DataLoader(dataset, batch_sampler=[keys[i : i + 6] for i in range(0, len(keys), 6)], num_workers=workers)
    seen = 0
    for batch in loader:
        dataset[seen % len(dataset)]  # both sides of the fork at once
        for L, H in zip(batch["L"], batch["H"]):
            item = folder[keys[seen]]
            assert torch.equal(L, item["L"]) and torch.equal(H, item["H"])
            seen += 1
    assert seen == len(keys)


def test_no_open_lmdb_crosses_a_fork(lmdb, roots):
    dataset = train(packed(roots[0]), **LMDB)
    item = dataset[0]
    assert data.frames._open
    if not (child := os.fork()):
        os._exit(len(data.frames._open))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0 and same(dataset[0], item)


def test_every_way_of_listing_an_lmdb(lmdb, roots, tmp_path):
    gt, lq = roots
    small, large = packed(lq), packed(gt)
    (tmp_path / "meta.txt").write_text(f"b {FRAMES - 1} (40,56,3) 1\nc {FRAMES} (40,56,3)\n")
    meta = {"meta_info_file": str(tmp_path / "meta.txt")}
    a, b = train(gt, dataroot_lq=lq, **meta), train(large, dataroot_lq=small, **meta, **LMDB)
    assert len(a) == len(b) == 2 * FRAMES - 1 and all(same(a[i], b[i]) for i in range(len(a)))
    whole = VideoRecurrentTestDataset(dataroot_gt=large, dataroot_lq=small, **LMDB)
    twin = VideoRecurrentTestDataset(dataroot_gt=gt, dataroot_lq=lq)
    assert [item["folder"] for item in whole] == ["a", "b", "c"] and torch.equal(whole[2]["H"], twin[2]["H"])
    assert whole[1]["lq_path"][3] == f"{small}/b/00000003"
    assert torch.equal(FrameFolder(small)[1]["L"], twin[1]["L"])
    (tmp_path / "meta.txt").write_text("b 7 (40,56,3) 0\n")
    with told(f"{large}/b/00000006", "missing", kind=FileNotFoundError):
        train(large, **meta, **LMDB)
    (tmp_path / "meta.txt").write_text("z 6 (40,56,3) 0\n")
    with told("'z'", large, kind=FileNotFoundError):
        train(large, **meta, **LMDB)


def test_sequences_in_an_lmdb(lmdb, tmp_path):
    gt = write_sequences(tmp_path / "GT")
    root = packed(gt)
    for kind in (VideoRecurrentTrainVimeoDataset, VideoRecurrentTrainVimeoVFIDataset, VideoTestVimeo90KDataset):
        own = {"gt_size": 16} if "Train" in kind.__name__ else {}
        a, b = kind(dataroot_gt=gt, **own), kind(dataroot_gt=root, **own, **LMDB)
        assert len(a) == len(b) == 3 and all(torch.equal(a[i][side], b[i][side]) for i in range(3) for side in "LH")


def test_mistakes_with_an_lmdb(lmdb, roots, tmp_path, monkeypatch):
    root = packed(roots[0])
    with open(f"{root}/meta_info.txt", "a") as file:
        file.write("d/00000000.png (40,56,3) 1\n")
    with told(f"{root}/d/00000000", "missing", kind=FileNotFoundError):
        FrameFolder(root)[3]
    with told(root, '"disk"', '{"type": "lmdb"}'):
        train(root)
    with told("nowhere.lmdb", "python -m data.prepare lmdb", kind=FileNotFoundError):
        train("/nowhere.lmdb", **LMDB)
    (tmp_path / "bad.lmdb").mkdir()
    with told("bad.lmdb/meta_info.txt", "python -m data.prepare lmdb", kind=FileNotFoundError):
        train(str(tmp_path / "bad.lmdb"), **LMDB)
    (tmp_path / "bad.lmdb/meta_info.txt").write_text("a/0.png (40,56,3) 1\n")
    (tmp_path / "bad.lmdb/data.mdb").write_bytes(b"no lmdb" * 999)
    with told("bad.lmdb", "not a readable lmdb"):
        train(str(tmp_path / "bad.lmdb"), num_frame=1, **LMDB)
    monkeypatch.setitem(sys.modules, "lmdb", None)
    data.frames._close_all()
    with told("pip install lmdb"):
        train(root, **LMDB)


# Public data -------------------------------------------------------------------------------------------------------

def test_a_missing_public_dataset_is_named():
    with told("dataroot_gt", "trainsets/REDS/x does not exist", "fetch REDS", "240 to 269", kind=FileNotFoundError):
        train("trainsets/REDS/x")
    with told("trainsets/GoPro/x.lmdb", "data.prepare lmdb", "fetch GOPRO_Large", kind=FileNotFoundError):
        train("trainsets/GoPro/x.lmdb", **LMDB)
    with told("meta_info_file", "/no/meta.txt", "python -m data.prepare meta", kind=FileNotFoundError):
        train(str(ROOT), meta_info_file="/no/meta.txt")


# prepare -----------------------------------------------------------------------------------------------------------

def test_a_meta_file_lists_any_folder(roots, tmp_path):
    gt, _ = roots
    meta = str(tmp_path / "meta.txt")
    assert prepare.main(["meta", gt, meta]) == f"{meta}: 3 clips; use it with filename_tmpl 08d, filename_ext png"
    assert (tmp_path / "meta.txt").read_text() == "".join(f"{clip} 6 (40,56,3) 0\n" for clip in "abc")
    assert all(same(x, y) for x, y in zip(train(gt), train(gt, meta_info_file=meta), strict=True))
    write_jpeg(frame(3, 0), f"{gt}/c/shot.jpg")  # names that are no numbers, and nested clips, are listed too
    os.rename(f"{gt}/b", f"{gt}/a/b")
    prepare.main(["meta", gt, meta + "2"])
    assert (tmp_path / "meta.txt2").read_text() == "a 6 (40,56,3) 0\na/b 6 (40,56,3) 0\nc 7 (40,56,3)\n"
    assert len(train(gt, meta_info_file=meta + "2")) == 19
    (tmp_path / "meta.txt").write_text("c 6 (40,56,3)\n")
    with told("line 1", "'c' has 7 frames, not 6"):
        train(gt, meta_info_file=meta)


def test_first_frame_and_template_are_found():
    assert prepare.numbering_of(["00003.jpg", "00004.jpg"]) == (3, "05d", "jpg")
    assert prepare.numbering_of([f"{i}.png" for i in range(8, 12)]) == (8, "d", "png")
    for others in (["1.png", "3.png"], ["1.png", "2.jpg"], ["01.png", "2.png"], ["im1.png"]):
        assert prepare.numbering_of(others) is None


@pytest.mark.parametrize("command, out", (("lmdb", "out.lmdb"), ("meta", "out.txt")))
def test_what_fails_leaves_nothing(roots, tmp_path, command, out):
    if command == "lmdb":
        pytest.importorskip("lmdb")
    gt, place = roots[0], tmp_path / "place"
    place.mkdir()
    (tmp_path / "GT/c/00000003.png").write_bytes(b"damaged")
    with told(f"{gt}/c/00000003.png: not a readable image"):
        prepare.main([command, gt, str(place / out)])
    assert not list(place.iterdir())
    write_png(frame(2, 3), f"{gt}/c/00000003.png")
    prepare.main([command, gt, str(place / out)])
    assert os.listdir(place) == [out]
    for words, arguments in ((("exists already",), (gt, str(place / out))),
                             (("FOLDER", "/nowhere"), ("/nowhere", str(place / f"x{out}"))),
                             (("no frames",), (str(place), str(place / f"x{out}")))):
        with told(*words, kind=(ValueError, FileNotFoundError)):
            prepare.main([command, *arguments])
    assert os.listdir(place) == [out]


def test_a_list_of_names_ends_after_three():
    assert data.frames.name_some(["a", "b", "c"]) == "'a', 'b', 'c'"
    assert data.frames.name_some(list("abcde")) == "'a', 'b', 'c' and 2 more"
