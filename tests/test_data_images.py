"""Pictures of any size and kind come as squares that depend on their key alone; bad files are told in one line."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.io import write_jpeg, write_png

from data.image_files import read_picture
from data.images import ImageTestDataset, ImageTrainDataset, VideoSequenceDataset
from data.synthetic import SyntheticImageDataset, as_channels

SIZES = ((40, 56), (90, 30), (24, 24), (50, 50))


def gradient(height, width, blue=0):
    """Red is the row, green the column, so that flips and crops show."""
    rows = torch.linspace(0, 255, height)[:, None].expand(height, width)
    columns = torch.linspace(0, 255, width).expand(height, width)
    return torch.stack([rows, columns, torch.full_like(rows, blue)]).to(torch.uint8)


@pytest.fixture
def folder(tmp_path):
    for i, size in enumerate(SIZES):
        (tmp_path / "in" / f"class_{i % 2}").mkdir(parents=True, exist_ok=True)
        write_png(gradient(*size, 60 * i), str(tmp_path / "in" / f"class_{i % 2}" / f"{i}.png"))
    (tmp_path / "in" / "notes.txt").write_text("no picture")
    return tmp_path / "in"


def train(root, **changes):
    return ImageTrainDataset(**{"dataroot": str(root), "size": 24, "seed": 2, **changes})


def test_an_item_is_a_square_that_depends_on_its_key_alone(folder):
    keys = [(0, 1), (7, 3), (1, 0), (0, 0)]
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    items = {key: train(folder, resize=[24, 32])[key]["H"] for key in keys}
    cached = train(folder, resize=[24, 32], cache_data=True)
    assert all(torch.equal(cached[key]["H"], items[key]) for key in [*reversed(keys), *keys])
    assert torch.equal(torch.get_rng_state(), before[0]) and (np.random.get_state()[1] == before[1]).all()
    for item in items.values():
        assert item.shape == (1, 24, 24, 3) and item.dtype == torch.uint8
    for workers in (0, 2):
        loader = DataLoader(cached, batch_sampler=[[key] for key in keys], num_workers=workers)
        assert all(torch.equal(batch["H"][0], items[key]) for key, batch in zip(keys, loader))


def test_crops_reach_every_place_and_flips_happen_only_when_asked(folder):
    dataset = train(folder, use_rot=True)
    wide = [dataset[epoch, 0]["H"][0].float() for epoch in range(40)]  # 40 x 56 -> 24 x 34
    assert len({int(train(folder)[epoch, 0]["H"][..., 1].min()) for epoch in range(60)}) == 11  # of 34 - 24 + 1 places
    assert len({(bool(x[0, 0, 0] > x[-1, -1, 0]), bool(x[0, 0, 1] > x[-1, -1, 1])) for x in wide}) == 4
    still = [train(folder, use_hflip=False)[epoch, 0]["H"][0].float() for epoch in range(10)]
    assert all(x[0, 0, 0] < x[-1, 0, 0] and x[0, 0, 1] < x[0, -1, 1] for x in still)


def test_stripes_of_a_pixel_shrink_to_their_mean(tmp_path):
    """A shrunk picture is averaged first: sampled alone, stripes would stay stripes."""
    stripes = (torch.arange(96) % 2 * 255).expand(3, 96, 96).to(torch.uint8)
    write_png(stripes, str(tmp_path / "stripes.png"))
    inner = train(tmp_path, resize=32)[0]["H"][0, 4:-4, 4:-4].float()  # a third, of which crops are 24 wide
    assert ((inner - 127.5).abs() <= 3).all()


def test_a_test_set_shows_groups_of_middles_the_same_in_each_epoch(folder):
    dataset = ImageTestDataset(dataroot=str(folder), size=24, num_images=3)
    assert [dataset[i]["H"].shape[0] for i in range(len(dataset))] == [3, 1]
    assert torch.equal(dataset[0, 0]["H"], dataset[5, 0]["H"])
    middle = dataset[0]["H"][0].float()  # 40 x 56 -> 24 x 34 -> its middle
    assert abs(middle[..., 1].mean() - 127) < 3 and dataset[0]["folder"] == "0"


def test_transparent_and_grey_pictures_become_rgb(tmp_path):
    def saved(array, name, mode=None):
        Image.fromarray(array, mode).save(tmp_path / name)
        return read_picture(str(tmp_path / name))[:, 0, 0].tolist()

    assert saved(np.full((8, 8, 4), [10, 20, 30, 0], np.uint8), "clear.png") == [255] * 3  # not what lies beneath
    assert saved(np.full((8, 8, 4), [10, 20, 30, 255], np.uint8), "solid.png") == [10, 20, 30]
    assert saved(np.full((8, 8, 2), [0, 128], np.uint8), "la.png", "LA") == [127] * 3
    assert saved(np.full((8, 8), 90, np.uint8), "grey.jpg") == [90] * 3
    grey = train(tmp_path, size=8, n_channels=1)[0]["H"]
    assert grey.shape == (1, 8, 8, 1)
    assert as_channels(torch.tensor([255, 0, 0], dtype=torch.uint8).view(3, 1, 1), 1).item() == 76


def test_a_corrupt_jpeg_is_named_and_by_option_skipped(folder):
    bad = folder / "class_0" / "1_bad.jpg"
    write_jpeg(gradient(40, 40), str(bad))
    bad.write_bytes(bad.read_bytes()[:-2])  # its end marker
    dataset = train(folder)
    place = dataset.items[0][0].index(str(bad))
    with pytest.raises(ValueError, match=r"1_bad.jpg: .*\(the file ends too early\).*or set") as told:
        dataset[place]
    assert "\n" not in str(told.value)
    patient = train(folder, skip_corrupt=True, random_crop=False, use_hflip=False)
    with pytest.warns(UserWarning, match="1_bad.jpg.*skipped"):
        stand_in = patient[3, place]["H"]
    assert torch.equal(stand_in, patient[0, place + 1]["H"])
    for path in folder.rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="none of 5 pictures can be read"), pytest.warns(UserWarning):
        patient[0]


def test_empty_and_missing_folders_and_impossible_options_take_one_line(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    cases = [({"dataroot": str(tmp_path / "empty")}, "holds no pictures; PNG, JPEG or WebP files"),
             ({"dataroot": str(tmp_path / "nowhere")}, "neither a folder of pictures nor a .txt"),
             ({"resize": 20}, "resize 20 must be .* at least size 24"), ({"size": 0}, "size 0"),
             ({"num_images": 0}, "num_images 0 must be >= 1"), ({"n_channels": 4}, "n_channels 4 must be one of 1, 3"),
             ({"dataroot": None, "generated": {"num_sample": 3}}, "did you mean 'num_samples'")]
    for changes, message in cases:
        with pytest.raises((ValueError, FileNotFoundError), match=message) as told:
            train(folder, **changes)
        assert "\n" not in str(told.value)
    listed = tmp_path / "list.txt"
    listed.write_text("in/class_1/3.png\n\nin/class_0/0.png\n")
    assert [item["folder"] for item in train(listed)] == ["3", "0"]
    listed.write_text("gone.png")
    with pytest.raises(FileNotFoundError, match="gone.png does not exist"):
        train(listed)


def test_clips_come_as_sequences_cut_alike(tmp_path):
    for clip, frames in (("a", 5), ("b", 4)):
        (tmp_path / clip).mkdir()
        for i in range(frames):
            write_png(gradient(30, 40, 10 * i), str(tmp_path / clip / f"{i:03d}.png"))
    dataset = VideoSequenceDataset(dataroot=str(tmp_path), num_frame=3, size=16, resize=24)
    assert len(dataset) == 3 + 2
    item = dataset[4, 1]["H"]
    assert item.shape == (3, 16, 16, 3) and item[:, 0, 0, 2].tolist() == [10, 20, 30]
    assert torch.equal(item[0, ..., :2], item[2, ..., :2])
    assert len(VideoSequenceDataset(dataroot=str(tmp_path), num_frame=3, frame_step=2, size=16)) == 2 + 1
    with pytest.raises(ValueError, match="clip 'b' has 4 frames; num_frame is 5"):
        VideoSequenceDataset(dataroot=str(tmp_path), num_frame=5, size=16)


def test_drawn_pictures_stay_the_same_and_test_sets_have_others():
    drawn = ImageTrainDataset(generated={"num_samples": 3}, size=32, seed=1)
    test = ImageTestDataset(generated={"num_images": 2}, size=32, seed=1)
    assert len(drawn) == 3 and drawn[0]["H"].shape == (1, 32, 32, 3) and test[0]["H"].shape == (2, 32, 32, 3)
    still = SyntheticImageDataset(num_samples=3, size=32, use_hflip=False, seed=1)
    assert torch.equal(still[0, 1]["H"], still[5, 1]["H"])
    assert {torch.equal(drawn[e, 1]["H"], still[1]["H"]) for e in range(8)} == {True, False}  # flips
    assert not torch.equal(test[0]["H"][0], still[0]["H"][0])
    clip = VideoSequenceDataset(generated={"num_samples": 2}, num_frame=3, size=32)[1]["H"]
    assert clip.shape == (3, 32, 32, 3) and not torch.equal(clip[0], clip[1])
    with pytest.raises(ValueError, match="size 8 must be >= 16"):
        SyntheticImageDataset(size=8)
