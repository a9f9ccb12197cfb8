"""InkTrace trains in both modes, and a stopped and resumed run is a straight one to the last bit."""

import pytest
import torch

import options
from data import DATASETS
from models import MODELS
from models.model_inktrace import ModelInkTrace, draw, hidden_blocks
from models.network_inktrace import pack, unpack
from tests.conftest import ROOT, write_json
from tests.runs import assert_equal_runs, final, rows, straight_and_stopped
from tests.test_options import parse

TOTAL = 4
DENSE = {"netG": {"full_heads": True}, "train": {"G_lossfn_type": "dense"}}


def option_file(folder, name="run", netG=None, train=None, workers=0, **over):
    """The shipped recipe, small: 5 samples in batches of 2, so that epochs of 2 steps are crossed."""
    return write_json(folder / f"{name}.json", {
        "extends": str(ROOT / "options/train_inktrace.json"), "task": name, "stages": [],
        "path": {"root": str(folder), "models": None}, "num_threads": 1, "device": "cpu",
        "datasets": {"train": {"num_samples": 5, "dataloader_batch_size": 2, "dataloader_num_workers": workers,
                               "curriculum_stage": 0, "curriculum_end": 6, "epochs_per_stage": 1},
                     "test": {"num_samples": 2}},
        "netG": {"embed_dim": 16, "num_heads": 2, "num_layers": 1, **(netG or {})},
        "train": {"total_epochs": None, "total_iter": TOTAL, "save_interval": None, "eval_interval": None,
                  "checkpoint_print": 1, "checkpoint_save": 2, "checkpoint_test": 3, **(train or {})}, **over})


def model_of(path):
    opt, _ = parse(path)
    return options.resolve(MODELS, opt["model"], "model")(opt)


def batch(count=2, index=0):
    """Ink and maps that look like strokes, of one sample after the other."""
    data = parse(ROOT / "options/train_inktrace.json")[0]["datasets"]["test"]
    dataset = options.build(DATASETS, data, "dataset_type")
    items = [dataset[index + i] for i in range(count)]
    return {name: torch.stack([item[name] for item in items]) for name in "LH"} | {"index": torch.tensor([index])}


# ---------------------------------------------------------------- exact


@pytest.mark.parametrize("over", [{}, DENSE], ids=["structural", "dense"])
def test_stopped_and_resumed_equals_straight(tmp_path, over):
    train = {"checkpoint_save": 0, **over.get("train", {}), **({"E_decay": 0.9, "keypoint_sigma": 1.5} if over else {})}
    over = {**over, "train": train}  # saved where it is stopped and at its end
    one, two = straight_and_stopped(lambda name, launch: option_file(tmp_path, name, workers=launch, **over), [3])
    assert_equal_runs(one, two, TOTAL)
    check_log(one, "netG" in over)
    assert list(final(one)["optimizerG"]["param_groups"][0]["betas"]) == [0.95, 0.999]  # the cycle's end


def check_log(folder, dense):
    train = rows(folder)
    terms = [name for name in train[0] if name.startswith("loss_")]
    assert len(train) == TOTAL and len(terms) == (5 if dense else 2)
    for row in train:
        assert float(row["G_loss"]) == pytest.approx(sum(float(row[name]) for name in terms), rel=1e-4)
    names = set(rows(folder, "test")[0])
    found = {"skeleton_iou", "skeleton_f1", "tangent_error"}
    found |= {"keypoint_f1", "width_error", "offset_error"} if dense else set()
    assert names == {"iteration", *(f"test.{name}" for name in found)}
    assert len(list((folder / "images").iterdir())) == 4


def test_the_shipped_recipe_is_valid():
    opt, notices = parse(ROOT / "options/train_inktrace.json")
    model = options.resolve(MODELS, opt["model"], "model")({**opt, "device": "cpu"})
    assert not notices and not model.dense
    assert opt["checkpoint"]["latest"] == "checkpoint_latest.pth" and opt["train"]["G_optimizer_type"] == "adamw"


def test_dense_takes_structural_weights_by_name(tmp_path):
    structural = model_of(option_file(tmp_path, "one"))
    dense = model_of(option_file(tmp_path, "two", **DENSE))
    report = dense.load_weights(dense.netG, structural.netG.state_dict(), strict=False, source="x")
    own, given = dense.netG.state_dict(), structural.netG.state_dict()
    assert all(torch.equal(own[name], value) for name, value in given.items())
    assert f"{len(given)} of {len(own)} tensors loaded by name; missing {len(own) - len(given)}" in report


# ---------------------------------------------------------------- a step


def test_hidden_blocks_are_the_originals(shared):
    golden = torch.load(shared / "golden" / "inktrace.pt", weights_only=True)
    recipe, inputs = golden["mask_recipe"], golden["inputs"]
    generator = torch.Generator().manual_seed(recipe["seed"])
    mask = hidden_blocks(3, recipe["mask_ratio"], generator, recipe["block_size"])
    assert torch.equal(mask, inputs["mask"].float())
    assert torch.equal(inputs["image"].float() * (1 - mask), inputs["masked_image"].float())


def test_what_is_hidden_follows_from_seed_and_step(tmp_path):
    models = [model_of(option_file(tmp_path, name, train={"manual_seed": seed})) for seed, name in enumerate("ab")]
    for model in models:
        model.init_train()
    masks = []
    for seed, step in ((0, 3), (0, 3), (0, 4), (1, 3)):
        model = models[seed]
        model.feed_data(batch())
        torch.rand(5)  # what was drawn before does not matter
        model.optimize_parameters(step)
        masks.append(model.mask)
        assert model.mask.mean((1, 2, 3)).tolist() == [38 / 64] * 2
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0][0], masks[0][1])
    assert not any(torch.equal(masks[0], mask) for mask in masks[2:])


def test_single_pixels_may_be_hidden():
    mask = hidden_blocks(2, 0.25, torch.Generator().manual_seed(0), block=1)
    assert mask.mean((1, 2, 3)).tolist() == [0.25, 0.25] and mask.shape == (2, 1, 64, 64)


def test_the_rate_and_beta1_go_through_one_cycle(tmp_path):
    model = model_of(option_file(tmp_path, train={"total_iter": 10}))
    model.init_train()
    seen = []
    for n in range(10):
        model.update_learning_rate(n)
        group = model.G_optimizer.param_groups[0]
        seen.append((group["lr"], *group["betas"]))
    assert seen[2] == (1e-3, 0.85, 0.999) and seen[0][:2] == pytest.approx((4e-5, 0.95))
    assert seen[9][:2] == pytest.approx((4e-9, 0.95))


@pytest.mark.parametrize("kind", ["CosineAnnealingLR", "constant"])
def test_other_schedules_leave_beta1(tmp_path, kind):
    model = model_of(option_file(tmp_path, train={"G_scheduler_type": kind, "total_iter": 10}))
    model.init_train()
    model.update_learning_rate(5)
    group = model.G_optimizer.param_groups[0]
    assert group["lr"] == pytest.approx(5e-4 if kind[:3] == "Cos" else 1e-3) and group["betas"] == (0.9, 0.999)


def test_terms_are_averaged_over_the_parts_of_a_batch(tmp_path):
    model = model_of(option_file(tmp_path, train={"accumulate": 2}))
    model.init_train()
    model.feed_data(batch(4))
    model.optimize_parameters(1)
    assert float(model.log_dict["G_loss"]) == pytest.approx(
        float(model.log_dict["loss_skeleton"] + model.log_dict["loss_tangent"]), rel=1e-5)


# ---------------------------------------------------------------- testing


@pytest.fixture
def tested(tmp_path):
    """A dense model that has seen one image, and what it was to find."""
    model = model_of(option_file(tmp_path, **DENSE))
    model.feed_data(batch(1))
    model.test()
    return model, unpack(model.target.clone())


def test_the_truth_has_perfect_scores_and_what_is_wrong_has_not(tested):
    model, true = tested
    model.restored = model.target.clone()
    perfect = model.metrics()
    assert perfect == {"skeleton_iou": 1, "skeleton_f1": 1, "tangent_error": pytest.approx(0, abs=1e-4),
                       "keypoint_f1": 1, "width_error": 0, "offset_error": 0}
    moved = {**true, "keypoints": true["keypoints"].roll(2, 3), "skeleton": true["skeleton"].roll(32, 3),
             "tangent": -true["tangent"], "width": true["width"] + 0.1}
    model.restored = pack(moved)
    scores = model.metrics()
    assert scores["keypoint_f1"] == 1 and scores["skeleton_f1"] < 0.5 and scores["skeleton_iou"] < scores["skeleton_f1"]
    assert scores["tangent_error"] == pytest.approx(90) and scores["width_error"] == pytest.approx(1, rel=1e-4)
    model.restored = pack({**true, "keypoints": true["keypoints"].roll(5, 3)})
    assert model.metrics()["keypoint_f1"] < 1
    model.restored = torch.zeros_like(model.target)
    assert model.metrics()["skeleton_f1"] == model.metrics()["keypoint_f1"] == 0


def test_the_same_image_is_tested_behind_the_same_blocks(tmp_path):
    model, seen = model_of(option_file(tmp_path)), []
    for index in (0, 1, 0):
        model.feed_data(batch(1, index))
        model.test()
        seen.append(model.degraded)
    assert torch.equal(seen[0], seen[2]) and len(model.pictures()) == 4
    assert not torch.equal(seen[0] == 0, seen[1] == 0)


def test_pictures_show_hue_for_direction(tested):
    model, true = tested
    assert [tuple(picture.shape) for picture in model.pictures()] == [(3, 256, 256)] * 3
    twice = torch.tensor([0, 120, 240]).deg2rad()
    maps = {"skeleton": torch.ones(1, 1, 3), "tangent": torch.stack([twice.cos(), twice.sin()])[:, None]}
    picture = draw(maps)[:, 0]  # lines at 0, 60 and 120 degrees: red, green, blue, each in full
    assert torch.allclose(picture.diagonal(), torch.ones(3)) and torch.allclose(picture.sum(0), torch.tensor(1.5))
    assert (draw({**maps, "keypoints": torch.tensor([[[0, 0, 1.0]]])})[:, 0, 2] == 1).all()


@pytest.mark.parametrize("over, message", [
    ({"train": {"G_lossfn_type": "dense"}}, "netG.full_heads: must be true"),
    ({"train": {"mask_block": 7}}, "mask_block: 7 must divide 64"),
    ({"train": {"mask_ratio": 1.0}}, "mask_ratio: 1.0 is not"),
    ({"netG": {"full_heads": True}, "train": {"accumulate": 2}}, "leaves a single image"),
    ({"train": {"skeleton_weight": -1}}, "train.skeleton_weight: -1 is not a number >= 0"),
    ({"train": {"total_iter": 1}}, "one cycle of 1 steps")])
def test_impossible_values_are_refused_in_one_line(tmp_path, over, message):
    with pytest.raises(ValueError, match=message) as error:
        model_of(option_file(tmp_path, **over)).init_train()
    assert "\n" not in str(error.value)


def test_the_mode_follows_the_loss(tmp_path):
    assert ModelInkTrace.best_metric == ("skeleton_f1", "max")
    model = model_of(option_file(tmp_path, **DENSE))
    model.feed_data(batch(1))
    model.hide()
    assert model.degraded is model.image and model.restore(model.netG.eval(), model.image).shape == (1, 8, 64, 64)
