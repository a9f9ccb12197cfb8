"""Options: comments, extends, overrides, and one clear line for every mistake."""

import json

import pytest

import main as door
import options
from data import DATASETS
from models import MODELS, NETWORKS
from tests.conftest import ROOT, write_json
from tests.programs import run_program

# those published for VRT: tests/test_options_vrt.py
SHIPPED = sorted(path for path in (ROOT / "options").rglob("*.json") if "_train_vrt_" not in path.name)


def parse(path, *overrides):
    return options.parse(str(path), [(k, v, "--set") for k, v in overrides], MODELS, NETWORKS, DATASETS)


@pytest.fixture
def option_file(tmp_path):
    """A small valid file: the default recipe with other things on top."""

    def make(name="a.json", **over):
        return write_json(tmp_path / name, {"extends": str(ROOT / "options/train_vrt.json"), **over})

    return make


def error_of(path, *overrides):
    with pytest.raises(options.OptionError) as caught:
        parse(path, *overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_shipped_file_is_parsed_and_its_networks_built(path):
    import torch

    opt, notices = parse(path)
    assert not notices
    opt["netG"].pop("spynet_path", None)  # a file that is fetched, not shipped
    with torch.device("meta"):
        for name in [k for k in opt if k.startswith("net")]:
            options.build(NETWORKS, opt[name], "net_type")


@pytest.mark.parametrize("text, value", [
    ('{"a": 1} // end', {"a": 1}),
    ('{"a": "http://x" // comment\n}', {"a": "http://x"}),
    ('// first\n{"a": "\\"//", "b": 2}', {"a": '"//', "b": 2}),
    ('{"a": "\\\\" // "\n, "b": "//"}', {"a": "\\", "b": "//"}),
])
def test_comments_only_outside_strings(tmp_path, text, value):
    (tmp_path / "x.json").write_text(text)
    assert options.read_file(str(tmp_path / "x.json")) == value


def test_broken_json_names_line_and_column(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('{\n  // why\n  "a": 1,\n  "b": }\n')
    with pytest.raises(options.OptionError, match=r"x\.json:4:8: not valid JSON"):
        options.read_file(str(path))
    path.write_text('{"a": 1,}')
    with pytest.raises(options.OptionError, match=r"x\.json:1:\d+: not valid JSON"):
        options.read_file(str(path))
    with pytest.raises(options.OptionError, match="no such option file"):
        options.read_file(str(tmp_path / "none.json"))
    path.write_text("[1]")
    with pytest.raises(options.OptionError, match="one JSON object, not a list"):
        options.read_file(str(path))


def test_extends_merges_deeply_and_lists_replace(tmp_path):
    write_json(tmp_path / "base.json", {"train": {"a": 1, "b": [1, 2, 3]}, "x": 1})
    write_json(tmp_path / "mid.json", {"extends": "base.json", "train": {"b": [9]}})
    (tmp_path / "sub").mkdir()
    write_json(tmp_path / "sub" / "top.json", {"extends": "../mid.json", "x": 2})
    tree, origins = options.load(str(tmp_path / "sub" / "top.json"))
    assert tree == {"train": {"a": 1, "b": [9]}, "x": 2}
    assert origins["train.a"].endswith("base.json") and origins["train.b"].endswith("mid.json")


def test_extends_in_a_circle_shows_the_chain(tmp_path):
    write_json(tmp_path / "a.json", {"extends": "b.json"})
    write_json(tmp_path / "b.json", {"extends": "c.json"})
    write_json(tmp_path / "c.json", {"extends": "b.json"})
    with pytest.raises(options.OptionError, match=r"b\.json -> .*c\.json -> .*b\.json"):
        options.load(str(tmp_path / "a.json"))


def test_order_defaults_extends_file_command_line(option_file):
    path = option_file(train={"G_optimizer_lr": 5e-4})
    opt, _ = parse(path, ("train.total_iter", 7))
    assert opt["train"]["on_nan"] == "stop"  # a default
    assert opt["train"]["G_lossfn_type"] == "charbonnier"  # from extends
    assert opt["train"]["G_optimizer_lr"] == 5e-4  # from the file
    assert opt["train"]["total_iter"] == 7  # from the command line


@pytest.mark.parametrize("over, expected", [
    ({"train": {"G_optimizer_lrr": 1}}, "train.G_optimizer_lrr: unknown key; did you mean 'G_optimizer_lr'?"),
    ({"netG": {"window": [1]}}, "netG.window: unknown key; did you mean 'window_size'?"),
    ({"datasets": {"train": {"gtsize": 1}}}, "datasets.train.gtsize: unknown key; did you mean 'gt_size'?"),
    ({"trian": {}}, "trian: unknown key; did you mean 'train'?"),
    ({"train": {"total_iter": "many"}}, 'train.total_iter: "many" is not a whole number'),
    ({"train": {"total_iter": True}}, "train.total_iter: true is not a whole number"),
    ({"train": {"total_iter": 1.5}}, "train.total_iter: 1.5 is not a whole number"),
    ({"train": {"G_optimizer_lr": None}}, "train.G_optimizer_lr: null is not a number"),
    ({"train": {"on_nan": "explode"}}, 'train.on_nan: "explode" is not one of "stop", "skip"'),
    ({"netG": {"depths": 3}}, "netG.depths: 3 is not a list of whole numbers"),
    ({"netG": {"net_type": "vtr"}}, "netG.net_type: unknown 'vtr'; did you mean 'vrt'?"),
    ({"model": "vrrt"}, "model: unknown 'vrrt'; did you mean 'vrt'?"),
    ({"datasets": {"valid": {}}}, "datasets.valid: an entry is named train, test or test_<name>"),
])
def test_each_mistake_is_one_line_that_names_file_key_and_remedy(option_file, over, expected):
    path = option_file(**over)
    message = error_of(path)
    assert message.startswith(str(path)) and expected in message


def test_a_mistake_is_blamed_on_the_file_that_made_it(option_file, tmp_path):
    option_file("base.json", train={"totl_iter": 1})
    write_json(tmp_path / "top.json", {"extends": "base.json", "train": {"total_iter": 5}})
    assert error_of(tmp_path / "top.json").startswith(str(tmp_path / "base.json"))
    assert error_of(option_file(), ("train.totl", 1)).startswith("--set: train.totl")
    assert "is a value, not a section" in error_of(option_file(), ("scale.x", 1))


def test_missing_keys_are_named(tmp_path):
    path = write_json(tmp_path / "a.json", {"task": "t", "model": "vrt"})
    assert "datasets: missing" in error_of(path)


def test_whole_floats_and_lists_are_taken_as_the_signature_wants(option_file):
    opt, _ = parse(option_file(train={"total_iter": 1e3, "G_optimizer_lr": 1}))
    assert opt["train"]["total_iter"] == 1000 and isinstance(opt["train"]["total_iter"], int)
    assert isinstance(opt["train"]["G_optimizer_lr"], float)


def test_kairs_own_files_pass_with_notices(shared):
    for path in sorted((shared / "kair_options").glob("*.json")):
        opt, notices = parse(path)
        assert opt["netG"]["pa_frames"] == (0 if "videofi" in opt["task"] else 2)
        assert any("init_type is not used" in n for n in notices)


def test_cli_table_and_built_in_flags_reach_the_options(option_file, tmp_path):
    plain = option_file()
    own = option_file("own.json", cli={"clips": "datasets.train.num_clipz"}, path={"root": str(tmp_path / "runs")})
    for path, words, complaint in (
            (own, ["--clips", "3"], "--clips: datasets.train.num_clipz: unknown key"),
            (plain, ["--lr", "fast"], '--lr: train.G_optimizer_lr: "fast" is not a number'),
            (option_file("bad.json", cli=["x"]), [], "cli: must be an object"),
            *((option_file(f"{number}.json", cli=dict.fromkeys(names, "task")), [], f"{number}.json: cli: {words}")
              for number, (names, words) in enumerate([
                  (["help"], "argument --help: conflicting option string"), (["opt"], "argument --opt: conflicting"),
                  (["quiet"], "argument --quiet: conflicting"), (["x-y", "x_y"], "argument --x_y/--x-y: conflicting"),
                  (["local_rank"], "argument --local_rank/--local-rank: conflicting"), (["batch-size"], "argument --"),
                  (["a b"], '"a b" must be the name of a flag'), ([""], '"" must be'), (["a=b"], '"a=b" must be')])),
            (plain, ["--set", "train"], "write it as section.key=value"),
            (plain, ["--input", "x"], "--input, --output and --truth go with --test")):
        with pytest.raises(options.OptionError) as caught:
            door.main(["-opt", str(path), *words])
        assert complaint in str(caught.value)
    assert not (tmp_path / "runs").exists()


def test_no_option_file_is_one_line_and_2(tmp_path):
    done = run_program(tmp_path)
    assert done.returncode == 2 and "which run?" in done.stderr and "Traceback" not in done.stderr


def test_a_key_with_a_percent_sign_does_not_break_the_help(option_file):
    with pytest.raises(SystemExit) as caught:
        door.main(["-opt", str(option_file(cli={"clips": "datasets.train.100%"})), "--help"])
    assert caught.value.code == 0


def test_home_is_expanded_in_any_path(option_file, monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    opt, _ = parse(option_file(), ("path.root", "~/runs"))
    assert opt["path"]["root"] == "/home/somebody/runs"


def test_resolved_options_are_plain_json(option_file):
    from storage.tree import plain

    opt, _ = parse(option_file())
    assert json.loads(json.dumps(plain(opt)))["train"]["total_iter"] == opt["train"]["total_iter"]


def test_flags_lead_to_the_shipped_file_that_has_them():
    folder = str(ROOT / "options")
    for flags in (["--gt_path", "masks"], ["--gt_path=masks"], ["--gt-path=masks", "--lr=1"]):
        assert options.find_option_file(flags, folder) == f"{folder}/train_segmentation.json"
    assert options.find_option_file(["--lr", "1"], folder) is options.find_option_file(["gt_path"], folder) is None
