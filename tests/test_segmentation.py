"""Segmentation: pairs of files, what is drawn at random, counts, and runs that are stopped and resumed."""

import csv
import os
import re

import pytest
import torch
from torchvision.io import write_jpeg, write_png

import checkpoint
from data.masks import (
    MaskTestDataset,
    MaskTrainDataset,
    boundary,
    chosen,
    distance,
    images_in,
    read_image,
    read_mask,
)
from data.synthetic_masks import SyntheticMaskDataset
from metrics.segmentation import confusion, segmentation_metrics
from models.model_plain import merge_tiles
from models.model_segmentation import HISTORIES, ModelSegmentation, fade, hsv
from options import OptionError
from tests.conftest import ROOT, write_json
from tests.runs import StopInCall, assert_equal_runs, final, run, run_until, straight_and_stopped
from tests.test_options import parse

EPOCHS, STEPS = 3, 3  # of each


def options_in(folder, name="run", **over):
    """The default recipe, small: 3 epochs of 3 steps."""
    drawn = {"image_size": 16, "generated": {"num_images": 7}, **over.pop("data", {})}
    tree = {"extends": str(ROOT / "options/train_segmentation.json"), "task": name, "path": {"root": str(folder)},
            "num_threads": 1, "val": {"save_img": False},
            "datasets": {"train": {**drawn, "dataloader_batch_size": 2},
                         "test": {**drawn, "generated": {"num_images": 3}}},
            "netG": {"depth": 2, "width": 4, **over.pop("net", {})},
            "train": {"total_epochs": EPOCHS, "checkpoint_print": 1, **over.pop("train", {})}, **over}
    return write_json(folder / f"{name}.json", tree)


def pictures_in(folder, sizes=None, values=(0, 255), name="image"):
    """image_path and gt_path with drawn pictures, stems 0, 1, ... -> flags for them."""
    drawn = SyntheticMaskDataset(num_images=len(sizes or range(6)), image_size=24)
    for i, (image, mask, _) in enumerate(drawn):
        height, width = sizes[i] if sizes else (24, 24)
        for which, x in (("images", image), ("gt", mask[None] * (values[1] - values[0]) + values[0])):
            (folder / which).mkdir(exist_ok=True)
            write_png(x[:, :height, :width].to(torch.uint8), str(folder / which / f"{name}{i}.png"))
    return {"image_path": str(folder / "images"), "gt_path": str(folder / "gt")}


# ---------------------------------------------------------------- exactness


KINDS = {"plain": {}, "averaged, in parts": {"train": {"E_decay": 0.9, "accumulate": 2}},
         "many tasks, ignored pixels": {"net": {"multitask": True}, "data": {"multitask": True, "ignore_index": 255}},
         "one channel": {"data": {"num_classes": 1}, "train": {
             "G_lossfn_type": "bce", "G_scheduler_type": "ReduceLROnPlateau", "G_scheduler_patience": 0}},
         "three classes": {"data": {"num_classes": 3}, "train": {"G_lossfn_type": "tanimoto_pooled"}}}
PLACES = {"mid-epoch": 5, "epoch's end": 3, "validation": StopInCall("test", 5), "its end": StopInCall("summarize", 2)}


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    assert run("-opt", options_in(folder)) == 0
    return folder / "run"


@pytest.mark.parametrize("place", PLACES)
def test_stopped_and_resumed_by_the_same_command_or_by_flag(tmp_path, straight, place):
    path, models = options_in(tmp_path), tmp_path / "run/models"
    run_until(PLACES[place], "-opt", path)
    left = models / ("interrupted_checkpoint.pth" if place == "mid-epoch" else "latest_checkpoint.pth")
    assert left.exists() and checkpoint.find_newest(models).iteration == checkpoint.locate(left).iteration
    assert run("-opt", path, *(["--resume", left] if place in ("mid-epoch", "validation") else [])) == 0
    assert_equal_runs(straight, tmp_path / "run", EPOCHS * STEPS)
    assert sorted(os.listdir(models)) == sorted(os.listdir(straight / "models"))


@pytest.mark.parametrize("kind", list(KINDS)[1:])
def test_every_kind_of_step_stopped_and_resumed(tmp_path, kind):
    over = {**KINDS[kind], "train": {"save_interval": EPOCHS, **KINDS[kind].get("train", {})}}
    assert_equal_runs(*straight_and_stopped(lambda name, _: options_in(tmp_path, name, **over), [5]))


def test_what_a_checkpoint_holds(straight):
    names = ["best_model.pth", *(f"checkpoint_epoch_{n}.pth" for n in (1, 2, 3)), "latest_checkpoint.pth"]
    assert sorted(os.listdir(straight / "models")) == names
    bundle = checkpoint.load_file(straight / "models/latest_checkpoint.pth")
    assert {"model_state_dict", "optimizer_state_dict", "scheduler_state_dict", *HISTORIES} <= set(bundle)
    assert bundle["epoch"] == EPOCHS and all(len(bundle[name]) == EPOCHS for name in HISTORIES)
    assert bundle["best_loss"] == min(bundle["val_losses"]) and len(bundle["validation_names"]) == 3
    assert set(bundle["train_metrics_history"][0]) == {"iou", "precision", "recall", "f1"}
    best = checkpoint.locate(straight / "models/best_model.pth").iteration
    assert best == STEPS * (1 + bundle["val_losses"].index(bundle["best_loss"]))
    with open(straight / "log/train.csv", newline="") as file:
        losses = [float(row.split(",")[3]) for row in file.read().splitlines()[1:]]
    means = [sum(losses[i : i + STEPS]) / STEPS for i in range(0, len(losses), STEPS)]
    assert bundle["train_losses"] == pytest.approx(means)


def test_epochs_are_a_total_and_more_may_follow(tmp_path, straight, capsys):
    path = options_in(tmp_path)
    assert run("-opt", path, "--epochs", 2) == 0 == run("-opt", path, "--epochs", 1)
    assert "nothing left to do" in capsys.readouterr().out
    assert checkpoint.find_newest(tmp_path / "run/models").iteration == 2 * STEPS
    assert run("-opt", path, "--epochs", 3) == 0
    assert len(final(tmp_path / "run")["state"]["val_losses"]) == 3


def test_a_checkpoint_without_history_loads_and_says_so(tmp_path, straight, capsys):
    bundle = checkpoint.load_file(straight / "models/checkpoint_epoch_2.pth")
    old = {key: bundle[key] for key in ("epoch", "model_state_dict", "optimizer_state_dict")}
    torch.save(old | {"epoch": 1}, tmp_path / "checkpoint_epoch_1.pth")  # counted from 0, as others do
    assert run("-opt", options_in(tmp_path), "--resume", tmp_path / "checkpoint_epoch_1.pth") == 0
    said = capsys.readouterr().out
    assert "holds no train_losses, train_metrics_history, val_losses" in said and "not bit for bit" in said
    assert "iteration 6 of 9" in said
    assert len(final(tmp_path / "run")["state"]["train_losses"]) == 1


def test_the_users_flags_alone_choose_the_recipe(tmp_path, monkeypatch):
    """--model_save_path holds everything, --checkpoint_mode best keeps the latest and the best."""
    flags = [f"--{key}={value}" for key, value in pictures_in(tmp_path).items()]
    flags += ["--image_size=16", "--batch_size=2", "--epochs=2", f"--model_save_path={tmp_path / 'checkpoints'}",
              "--checkpoint_mode=best", "--set", "netG.depth=2", "--set", "netG.width=4"]
    assert run(*flags) == 0
    found = set(os.listdir(tmp_path / "checkpoints"))
    assert {"latest_checkpoint.pth", "best_model.pth", "images", "log", "options"} <= found
    assert not any(name.startswith("checkpoint_epoch") for name in found)
    history = checkpoint.load_file(tmp_path / "checkpoints/latest_checkpoint.pth")["val_metrics_history"]
    assert len(history) == 2


# ---------------------------------------------------------------- model


def model(tmp_path, **over):
    opt, _ = parse(options_in(tmp_path, **over))
    opt["device"] = "cpu"
    torch.manual_seed(0)
    made = ModelSegmentation(opt)
    made.init_train()
    return made


def test_counts_are_summed_before_they_are_divided(tmp_path):
    made = model(tmp_path)
    rows = [{"loss": 0.2, "tp_0": 0.0, "fp_0": 0.0, "fn_0": 0.0, "tp_1": tp, "fp_1": fp, "fn_1": fn}
            for tp, fp, fn in ((1.0, 1.0, 0.0), (8.0, 0.0, 2.0), (0.0, 0.0, 0.0))]
    found = made.summarize("test", rows)
    assert found == pytest.approx({"loss": 0.2, "iou": 9 / 12, "precision": 0.9, "recall": 9 / 11, "f1": 18 / 21})


def test_the_rate_falls_at_a_plateau_as_torchs_does(tmp_path):
    made = model(tmp_path, train={"G_scheduler_type": "ReduceLROnPlateau", "G_scheduler_gamma": 0.5,
                                  "G_scheduler_patience": 2, "G_optimizer_lr": 0.1})
    optimizer = torch.optim.SGD([torch.zeros(1)], 0.1)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=2)
    for loss in (1, 0.9, 0.95, 0.95, 0.89999, 0.8, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.7, 0.7, 0.7, 0.7):
        made.history["val_losses"].append(loss)
        theirs.step(loss)
        made.update_learning_rate(1)
        assert made.current_learning_rate() == pytest.approx(optimizer.param_groups[0]["lr"])
    assert optimizer.param_groups[0]["lr"] < 0.03


def test_pictures_are_image_truth_and_prediction(tmp_path):
    made = model(tmp_path, data={"num_classes": 3, "ignore_index": 9})
    image, ids = torch.rand(1, 3, 16, 16), torch.randint(3, (1, 16, 16))
    ids[0, 0, 0] = 9
    made.feed_data({"L": image, "H": ids, "folder": ["x"], "epoch": [3], "num_samples": [7]})
    assert made.epoch["place"] == (3, 7)
    made.test()
    shown, truth, said = made.pictures()
    assert torch.equal(shown, image[0]) and truth.shape == said.shape == (3, 16, 16)
    assert truth[:, 0, 0].tolist() == [0.5] * 3 and len(truth.flatten(1).unique(dim=1).T) == 4
    assert torch.equal(made.colours(made.classes(made.restored)[0]), said)


def test_ignored_pixels_teach_nothing(tmp_path):
    made = model(tmp_path, data={"ignore_index": 255})
    logits, ids = torch.randn(2, 2, 16, 16, requires_grad=True), torch.randint(2, (2, 16, 16))
    ids[:, 8:] = 255
    made.loss(logits, ids).backward()
    assert not logits.grad[:, :, 8:].any() and logits.grad[:, :, :8].any()
    made.restored, made.target = logits, ids
    (counts,) = made.counts()
    assert counts.sum() == (2 * 8 * 16) + counts[0, 1:].sum()


def test_prediction_of_any_size_whole_and_in_tiles(tmp_path):
    whole, image = model(tmp_path), torch.rand(3, 50, 41)
    assert whole.predict(image).shape == (50, 41)
    made = model(tmp_path, val={"tile": 16, "tile_overlap": 8})
    assert made.predict(image).shape == (50, 41) and made.predict(image[:, :9, :12]).shape == (9, 12)
    local = torch.nn.functional.avg_pool2d  # what looks no further than 1 pixel is the same in tiles, but for seams
    whole = local(image[None], 3, 1, 1)

    def blended(predict):
        return merge_tiles(predict, image[None], 16, 8, lambda _, length, __: fade(length, 8))

    torch.testing.assert_close(blended(lambda x: x), image[None])
    tiles = blended(lambda x: local(x, 3, 1, 1))
    assert (tiles - whole)[..., 1:-1, 1:-1].abs().max() < 0.15
    over = made.overlay(image, torch.eye(41)[:1].expand(50, 41).long())
    assert torch.equal(over[:, :, 1:], image[:, :, 1:])
    torch.testing.assert_close(over[:, :, 0], (image[:, :, 0] + torch.tensor([[0.9], [0.3], [0.2]])) / 2)
    many = made.overlay(torch.zeros(3, 1, 13), torch.arange(13)[None])  # no class is painted black
    assert (many[:, 0].amax(0)[1:] > 0.3).all() and not many[:, 0, 0].any()


def test_a_folder_is_predicted_and_partial_output_is_resumed(tmp_path, straight, capsys):
    folders, path = pictures_in(tmp_path, sizes=[(24, 20), (16, 9)]), options_in(tmp_path)
    out, first = tmp_path / "out", tmp_path / "out/image0_pred.png"
    use = ["-opt", path, "--test", "--resume", straight / "models/best_model.pth", "--input", folders["image_path"],
           "--output", out, "--truth", folders["gt_path"]]
    assert run(*use) == 0
    names = {f"image{i}_{kind}.png" for i in (0, 1) for kind in ("overlay", "pred")}
    assert names <= set(os.listdir(out)) and "iou" in (out / "metrics.csv").read_text()
    assert read_mask(first, 2).shape == (24, 20)
    rows = list(csv.DictReader((out / "metrics.csv").open()))
    hits, false, missed = (sum(float(row[f"{kind}_1"]) for row in rows) for kind in ("tp", "fp", "fn"))
    iou = float(re.search(r"metrics  iou ([\d.e-]+)", capsys.readouterr().out)[1])
    assert iou == pytest.approx(hits / (hits + false + missed), rel=1e-3), "counted over all images, as a test set is"
    (out / "image1_pred.png").unlink()
    assert run(*use) == 0 and names <= set(os.listdir(out))
    assert run("-opt", path, "--test", "--resume", straight / "models/best_model.pth") == 0  # on the test set


def test_classes_are_shown_in_black_white_and_colours_and_ignored_pixels_in_grey():
    made = object.__new__(ModelSegmentation)
    made.ignore_index = 9
    shown = made.colours(torch.tensor([[0, 1, 2, 7, 9]]))
    assert shown.shape == (3, 1, 5)
    assert [shown[:, 0, i].tolist() for i in (0, 1, 3, 4)] == [[0.0] * 3, [1.0] * 3, [0.0] * 3, [0.5] * 3]
    assert shown[:, 0, 2].tolist() == pytest.approx([0.9, 0.3, 0.2])


def test_there_may_be_255_classes(tmp_path):
    folders = pictures_in(tmp_path, values=(0, 1))
    assert len(MaskTestDataset(**folders, image_size=16, num_classes=255, validation_split=1.0)) == 6
    for wrong in (0, 256):
        with pytest.raises(ValueError, match=f"num_classes {wrong} must be from 1 to 255"):
            MaskTestDataset(**folders, image_size=16, num_classes=wrong)


def test_tasks_of_the_conditioned_head():
    inside = torch.zeros(9, 12, dtype=torch.bool)
    inside[2:7, 3:9] = True
    outside = (~inside).nonzero().float()
    expected = torch.cdist(torch.cartesian_prod(torch.arange(9.0), torch.arange(12.0)), outside).amin(1).view(9, 12)
    torch.testing.assert_close(torch.from_numpy(distance(inside.numpy())), expected / expected.max())
    edge = torch.from_numpy(boundary(inside.numpy()))
    assert edge.sum() == 2 * (5 + 6) - 4 + 2 * (5 + 6)  # the rim within, and the one around it without its corners
    assert edge[2, 3] == edge[1, 3] == 1 and edge[4, 5] == edge[1, 2] == 0
    colours = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [0.5, 0.25, 0.25], [0, 0, 0]]).T.view(1, 3, 5, 1)
    found = hsv(colours)[0, :, :, 0].T
    torch.testing.assert_close(found, torch.tensor([[0, 1, 1], [1 / 3, 1, 1], [2 / 3, 1, 1], [0, 0.5, 0.5], [0, 0, 0]]))


def test_metrics_are_the_goldens(shared):
    case = torch.load(shared / "golden/tanimoto.pt", weights_only=True)["cases"]["binary_metrics"]
    counts = confusion(case["inputs"]["pred"].long(), case["inputs"]["target"].long(), 2)
    assert counts.tolist() == [[case["counts"][k] for k in kinds] for kinds in (("tn", "fn", "fp"), ("tp", "fp", "fn"))]
    assert segmentation_metrics(counts) == pytest.approx({k: float(v) for k, v in case["outputs"].items()})
    assert segmentation_metrics(torch.zeros(2, 3)) == {"iou": 1, "precision": 0, "recall": 0, "f1": 0}
    three = segmentation_metrics(torch.tensor([[2, 0, 2], [0, 0, 0], [3, 1, 0]]))  # class 1 does not occur
    assert three["iou"] == pytest.approx((2 / 4 + 3 / 4) / 2) and set(three) >= {"iou_0", "iou_2"}


# ---------------------------------------------------------------- data


def test_an_item_depends_on_its_key_alone_and_image_and_mask_turn_alike(tmp_path):
    kinds = ({}, pictures_in(tmp_path), {"max_angle": 45.0})
    for kind in kinds:
        data, other = (MaskTrainDataset(image_size=24, seed=3, **kind) for _ in range(2))
        state = torch.get_rng_state()
        for key in ((0, 1), (4, 0)):
            a, b = data[key], other[key]
            assert torch.equal(a["L"], b["L"]) and torch.equal(a["H"], b["H"])
        assert not torch.equal(data[0, 0]["L"], data[1, 0]["L"]) and torch.equal(torch.get_rng_state(), state)
        assert data[7, 0]["epoch"] == 7 and data[7, 0]["num_samples"] == len(data)
        assert data[0]["H"].dtype == torch.int64 and data[0]["L"].dtype == torch.float32
    image = torch.randint(256, (3, 24, 24), dtype=torch.uint8)
    write_png(image, str(tmp_path / "images/image0.png"))
    write_png((image[:1] > 127).byte(), str(tmp_path / "gt/image0.png"))  # a mask that follows from the image
    data = MaskTrainDataset(**kinds[1], image_size=24, validation_split=0, brightness=0, contrast=0)
    for epoch in range(12):
        item = data[epoch, 0]
        assert torch.equal(item["L"][0] > 0.5, item["H"] == 1)


def test_the_split_is_by_seed_and_name_and_leaves_nothing_out(tmp_path):
    folders = pictures_in(tmp_path, sizes=[(24, 24)] * 20)
    parts = []
    for seed in (0, 0, 1):
        train, test = (kind(**folders, image_size=16, seed=seed) for kind in (MaskTrainDataset, MaskTestDataset))
        names = [{pair[0].stem for pair in part.pairs} for part in (train, test)]
        assert not names[0] & names[1] and len(names[0]) == 16 and len(names[1]) == 4
        parts.append(names[1])
    assert parts[0] == parts[1] != parts[2]
    stems = [f"{i}" for i in range(100)]
    assert len(chosen(stems, 0.2, 0) ^ chosen([*stems, "new"], 0.2, 0)) <= 2  # a new image moves hardly any


def test_masks_of_ids_and_of_0_and_255(tmp_path):
    def saved(*values, name="m.png"):
        write_png(torch.tensor(values, dtype=torch.uint8).view(1, 1, -1), str(tmp_path / name))
        return tmp_path / name

    assert read_mask(saved(0, 255, 0), 2).tolist() == [[0, 1, 0]] == read_mask(saved(0, 1, 0), 1).tolist()
    assert read_mask(saved(0, 2, 5), 6).tolist() == [[0, 2, 5]]
    assert read_mask(saved(0, 1, 255), 2, ignore_index=255).tolist() == [[0, 1, 255]]
    assert read_mask(saved(0, 255, 9), 2, ignore_index=9).tolist() == [[0, 1, 9]]
    assert read_mask(saved(3, 127, 128), 2, threshold=127).tolist() == [[0, 0, 1]]
    for values, classes, says in (((0, 2, 255), 2, "values 2 are"), ((0, 1, 255), 2, "1 beside 255"),
                                  ((0, 255), 3, "values 255 are"), ((7, 8, 9), 6, "values 7, 8, 9 are")):
        with pytest.raises(ValueError, match=says) as error:
            read_mask(saved(*values), classes)
        assert "\n" not in str(error.value)
    write_png(torch.randint(255, (3, 4, 4), dtype=torch.uint8), str(tmp_path / "m.png"))
    with pytest.raises(ValueError, match="a mask in colour"):
        read_mask(tmp_path / "m.png", 2)


BAD = {  # what is done to good folders, options -> what is said
    "no mask": (lambda f: os.remove(f / "gt/image1.png"), {}, "1 without a mask: image1.png"),
    "no image": (lambda f: os.remove(f / "images/image2.png"), {}, "1 without an image: image2.png"),
    "two of a stem": (lambda f: write_jpeg(torch.zeros(3, 8, 8, dtype=torch.uint8), str(f / "images/image0.jpg")), {},
                      "has both image0.jpg and image0.png"),
    "sizes": (lambda f: write_png(torch.zeros(1, 9, 24, dtype=torch.uint8), str(f / "gt/image0.png")), {},
              "the mask is 24x9 (width x height)"),
    "values": (lambda f: write_png(torch.full((1, 24, 24), 7, dtype=torch.uint8), str(f / "gt/image0.png")), {},
               "mask values 7 are out of range"),
    "one pixel": (lambda f: [write_png(torch.zeros(1, 1, 1, dtype=torch.uint8), str(f / w / "image0.png"))
                             for w in ("images", "gt")], {}, "1x1 (width x height) is too small"),
    "no picture": (lambda f: (f / "images/image0.png").write_text("x"), {}, "not a readable image"),
    "empty folder": (lambda f: [os.remove(p) for p in (f / "gt").iterdir()], {}, "holds no PNG"),
    "no folder": (lambda f: None, {"gt_path": "nowhere"}, "nowhere is not a folder"),
    "empty training": (lambda f: None, {"validation_split": 1.0}, "leaves none of the 6 images"),
    "one path": (lambda f: None, {"gt_path": None}, "gt_path is missing"),
    "ignored class": (lambda f: None, {"ignore_index": 2, "num_classes": 3}, "a value that no class has"),
    "tiny": (lambda f: None, {"image_size": 4}, "image_size 4"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named_in_one_line(tmp_path, name):
    folders = pictures_in(tmp_path)
    harm, over, says = BAD[name]
    harm(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        MaskTrainDataset(**{"validation_split": 0.0, **folders, **over})
    assert says in str(error.value) and "\n" not in str(error.value)
    if "match" in str(error.value):
        assert len(MaskTrainDataset(**folders, validation_split=0.0, skip_unmatched=True)) == 5


def test_bad_input_ends_a_run_before_it_makes_a_folder(tmp_path):
    folders = pictures_in(tmp_path)
    os.remove(tmp_path / "gt/image1.png")
    with pytest.raises(OptionError, match="1 without a mask"):
        run("-opt", options_in(tmp_path, data=folders))
    with pytest.raises(OptionError, match="leaves none of the 6 images of .* for validation"):
        run("-opt", options_in(tmp_path, data={"validation_split": 0.0, **pictures_in(tmp_path)}))
    assert not (tmp_path / "run").exists()


def test_a_bad_mask_in_mid_epoch_keeps_what_was_learnt(tmp_path):
    folders = pictures_in(tmp_path)
    write_png(torch.full((1, 24, 24), 7, dtype=torch.uint8), str(tmp_path / "gt/image5.png"))
    with pytest.raises(OptionError, match="image5.png: mask values 7"):
        run("-opt", options_in(tmp_path, data={**folders, "validation_split": 0.2}))


@pytest.mark.parametrize("over, says", [
    ({"net": {"num_classes": 3}}, "netG.num_classes 3"), ({"net": {"multitask": True}}, "multitask must be true"),
    ({"val": {"tile": 32, "tile_overlap": 32}}, "tile_overlap 32 must be below"),
    ({"net": {"depth": 6}, "data": {"image_size": 32}}, "image_size 32 leaves nothing at depth 6"),
    ({"train": {"loss_alpha": 3.0, "G_lossfn_type": "tanimoto_pooled"}}, "loss_alpha: 3.0 is not a number from 0 to 1"),
], ids=str)
def test_options_that_contradict_each_other(tmp_path, over, says):
    with pytest.raises(ValueError) as error:
        model(tmp_path, **over)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_images_to_be_segmented(tmp_path):
    folders = pictures_in(tmp_path, sizes=[(24, 20), (16, 9)])
    paths = images_in(folders["image_path"])
    assert [tuple(read_image(path).shape) for path in paths] == [(3, 24, 20), (3, 16, 9)] and paths[1].stem == "image1"
    assert images_in(str(paths[0])) == paths[:1]


def test_real_landscapes_are_read(shared):
    root = shared / "data/segmentation"
    folders = {"image_path": str(root / "images"), "gt_path": str(root / "gt"), "image_size": 64}
    train, test = MaskTrainDataset(**folders), MaskTestDataset(**folders)
    assert (len(train), len(test)) == (82, 21)
    for item in (train[3, 5], test[0]):
        assert item["L"].shape == (3, 64, 64) and set(item["H"].unique().tolist()) == {0, 1}


