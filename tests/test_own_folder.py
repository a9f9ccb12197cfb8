"""A user's own folder by two short flags, and a drawing where it looks different."""

import pytest
import torch

import options
from commands import arguments
from data import DATASETS
from data.image_files import encode
from models import MODELS, NETWORKS
from tests.conftest import ROOT
from tests.programs import run_program

RECIPES = {"vrt": ["clip_1/00000000.png", "clip_1/00000001.png", "clip_2/0.png", "clip_2/1.png"],
           "vqgan": ["one.png", "below/two.png"], "vqvae": ["one.png"], "lgt": ["a/one.png", "b/two.png"],
           "segmentation": ["images/one.png", "masks/one.png"]}


def folder_of(path, recipe):
    for name in RECIPES[recipe]:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(encode(torch.zeros(3, 160, 160, dtype=torch.uint8)))
    return path


def sections(recipe, *words):
    """The data sections that a command line with short flags leads to."""
    file = str(ROOT / f"options/train_{recipe}.json")
    flags = options.FLAGS | options.cli_table(file)
    args = arguments.parser_for(flags).parse_args(["-opt", file, *map(str, words)])
    stage = next(iter(options.stage_names(file)), None)
    opt, _ = options.parse(file, arguments.overrides_in(args, flags), MODELS, NETWORKS, DATASETS, stage)
    return opt["datasets"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_two_flags_train_and_test_on_own_folders(tmp_path, recipe):
    mine, other = (folder_of(tmp_path / name, recipe) for name in ("mine", "other"))
    found = sections(recipe, "--train", mine, "--test_data", other, "--set", "datasets.train.num_frame=2") \
        if recipe == "vrt" else sections(recipe, "--train", mine, "--test_data", other)
    built = {name: options.build(DATASETS, section, "dataset_type") for name, section in found.items()}
    assert len(built["train"]) and len(built["test"])
    for name, place in (("train", mine), ("test", other)):
        values = [value for value in found[name].values() if isinstance(value, str) and value.startswith("/")]
        assert values and all(value.startswith(str(place)) for value in values)
    help_text = arguments.parser_for(options.cli_table(str(ROOT / f"options/train_{recipe}.json"))).format_help()
    assert "--train VALUE" in help_text and "--test_data VALUE" in help_text and "={}" not in help_text


@pytest.mark.parametrize("recipe, words", [("vrt", "clip_1/ "), ("vqgan", "one.png "), ("lgt", "style_1/ "),
                                           ("segmentation", "masks/ ")])
def test_another_structure_is_answered_by_a_drawing(tmp_path, recipe, words):
    (tmp_path / "wrong/a/b").mkdir(parents=True)
    ended = run_program(tmp_path, "-opt", ROOT / f"options/train_{recipe}.json", "--train", tmp_path / "wrong",
                        "--save_dir", tmp_path / "runs")
    said = ended.stderr
    assert ended.returncode == 2 and "expected, with any names" in said and f"    {words}" in said
    assert said.index("error:") < said.index("expected") and not (tmp_path / "runs").exists()


def test_a_mistake_elsewhere_is_not_answered_by_a_drawing(tmp_path):
    mine = folder_of(tmp_path / "mine", "vrt")
    found = sections("vrt", "--train", mine, "--set", "datasets.train.gt_size=63")
    with pytest.raises(options.OptionError) as caught:
        options.build(DATASETS, found["train"], "dataset_type")
    assert caught.value.drawing == ""


def test_a_key_of_a_flag_may_have_a_value_of_its_own():
    target = ["a.b={}/images", "a.c=0.5", "a.d"]
    assert options.set_by_flag("x", target, "DIR") == {"a.b": "DIR/images", "a.c": 0.5, "a.d": "DIR"}
    assert options.keys_of(target) == ["a.b", "a.c", "a.d"]
