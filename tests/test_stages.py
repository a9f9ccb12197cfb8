"""Stages: one file, several runs, each begun with the best of the one before; killed anywhere, the same end."""

import os
import shutil
import signal
from functools import partial

import pytest
import torch

import checkpoint
import main as door
import options
from commands.checkpoints import main as ask
from data import DATASETS
from models import MODELS, NETWORKS
from tests import tiny
from tests.conftest import write_json
from tests.programs import run_program
from tests.runs import differing, run

pytestmark = pytest.mark.usefixtures("tiny_tables")
WORST = {"best_metric": "psnr", "best_mode": "min"}  # so that the best is not the newest
BUNDLES = {"layout": "bundle", "name": "checkpoint_epoch{epoch}.pth", "latest": "checkpoint_latest.pth",
           "best": "checkpoint_best.pth", "interrupted": "checkpoint_interrupted.pth", **WORST}
STAGES = [{"name": "one"}, {"name": "two", "train": {"total_iter": 4, "G_optimizer_lr": 0.02}}]


def option_file(folder, name="run", stages=STAGES, models=True, **over):
    tree = tiny.options(folder, name, stages=stages, train={"total_iter": 6, **over.pop("train", {})},
                        checkpoint=over.pop("checkpoint", BUNDLES), **over)
    if models:
        tree["path"]["models"] = str(folder / name)
    return write_json(folder / f"{name}.json", tree)


def parse(path, stage=None, overrides=()):
    return options.parse(str(path), overrides, MODELS, NETWORKS, DATASETS, stage)[0]


def final(folder):
    return checkpoint.find_newest(folder).load()


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Both stages, never stopped."""
    folder = tmp_path_factory.mktemp("straight")
    with pytest.MonkeyPatch.context() as patch:
        tiny.add_rows(patch)
        assert run("-opt", option_file(folder), "--run-all-stages") == 0
    return folder / "run"


@pytest.fixture
def copied(straight, tmp_path):
    """The same runs in a folder of this test's own, and their option file."""
    shutil.copytree(straight, tmp_path / "run")
    return option_file(tmp_path)


# ---------------------------------------------------------------- options


def test_a_stage_lies_on_the_file_and_below_the_command_line(tmp_path):
    write_json(tmp_path / "base.json", tiny.options(tmp_path, "run"))
    path = write_json(tmp_path / "run.json", {"extends": "base.json", "stages": STAGES, "train": {"E_decay": 0.5}})
    opt = parse(path, "two")
    assert (opt["train"]["G_optimizer_lr"], opt["train"]["E_decay"], opt["train"]["total_iter"]) == (0.02, 0.5, 4)
    assert opt["stage"] == "two" and opt["stages"] == [] and opt["task"] == os.path.join("run", "two")
    assert parse(path, "two", [("train.G_optimizer_lr", 1.0, "--lr")])["train"]["G_optimizer_lr"] == 1
    assert parse(path)["train"]["G_optimizer_lr"] == 0.01 and parse(path)["stage"] is None
    assert parse(path, "two", [("path.models", "x", "--save_dir")])["path"]["models"] == os.path.join("x", "two")


@pytest.mark.parametrize("stages, said", [
    ({"name": "one"}, "stages: must be a list"), (["one"], r"stages\[0\]: must be an object"),
    ([{"train": {}}], r"stages\[0\].name: null must be a name"), ([{"name": "a/b"}], r"name: \"a/b\" must be a name"),
    ([{"name": ".."}], "must be a name"), ([{"name": "none"}], "must be a name"),
    ([{"name": "one"}, {"name": "one"}], r"stages\[1\].name: 'one' is used twice"),
    ([{"name": "one", "extends": "x.json"}], "extends: belongs to the file"),
    ([{"name": "one", "init_from": 3}], "init_from: 3 must be an earlier stage"),
    ([{"name": "one", "init_from": "two"}, {"name": "two"}], "one: init_from: 'two' is not before it"),
    ([{"name": "one", "init_from": "one"}], "init_from: 'one' is not before it"),
    ([{"name": "one"}, {"name": "two", "init_from": "gone.pth"}],
     r"two: init_from: gone.pth: no such file; give one, an earlier stage \(one\), or null"),
    ([{"name": "one"}, {"name": "two", "train": {"totl_iter": 3}}],
     r"stages: two: train.totl_iter: unknown key; did you mean 'total_iter'\?"),
    ([{"name": "one"}, {"name": "two", "netG": {"width": "wide"}}], "stages: two: netG.width: \"wide\" is not"),
    ([{"name": "one"}, {"name": "two", "netG": {"width": 4}}],
     r"two: one: is of another architecture: netG.width default against 4 here; 7 of another shape: body.0.wei.*; set"),
])
def test_a_bad_list_is_one_line_before_anything_is_made(tmp_path, stages, said):
    with pytest.raises((options.OptionError, checkpoint.CheckpointError), match=said) as caught:
        run("-opt", option_file(tmp_path, stages=stages))
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("words, said", [
    (("--stage", "tow"), r"there is no 'tow'; did you mean 'two'\?"),
    (("--stage", "two"), "no checkpoint, but stage two starts with the best of one; run --stage one"),
    (("--stage", "two", "--init-from", "gone.pth"), "gone.pth: no such file")])
def test_a_stage_that_cannot_begin_is_one_line(tmp_path, words, said):
    with pytest.raises((options.OptionError, checkpoint.CheckpointError), match=said):
        run("-opt", option_file(tmp_path), *words)
    assert not (tmp_path / "run").exists()


def test_flags_for_stages_need_stages(tmp_path):
    for words in (("--run-all-stages",), ("--stage", "one")):
        with pytest.raises(options.OptionError, match="has no stages"):
            run("-opt", option_file(tmp_path, stages=[]), *words)


def test_extends_in_a_circle_is_one_line(tmp_path):
    write_json(tmp_path / "a.json", {"extends": "b.json"})
    with pytest.raises(options.OptionError, match="circle"):
        run("-opt", write_json(tmp_path / "b.json", {"extends": "a.json"}), "--run-all-stages")


# ---------------------------------------------------------------- running


def test_each_stage_has_its_folder_and_begins_with_the_best_of_the_one_before(straight, tmp_path, capsys):
    one, two = final(straight / "one"), final(straight / "two")
    assert [parts["state"]["metadata"]["stage"] for parts in (one, two)] == ["one", "two"]
    assert (one["state"]["iteration"], two["state"]["iteration"]) == (6, 4)
    best = checkpoint.find_best(straight / "one")
    assert best.iteration == one["state"]["best"] == 3
    words = ("--stage", "two", "--init-from", straight / "one/checkpoint_best.pth")
    assert run("-opt", option_file(tmp_path), *words) == 0
    said = capsys.readouterr().out
    assert differing(final(tmp_path / "run/two"), two) == []
    for line in ("stage    two, 2 of 2, from", "stage    train.total_iter      6 -> 4",
                 "stage    train.G_optimizer_lr  0.01 -> 0.02", "new         0 tensors", "dropped     0 tensors",
                 "loaded      9 tensors  body.1 (5), body.0 (2), body.4 (2)"):
        assert line in said


def test_what_is_finished_is_not_repeated(copied, capsys):
    before = {path: path.stat().st_mtime_ns for path in copied.parent.rglob("*.pth")}
    assert run("-opt", copied) == 0
    assert capsys.readouterr().out.count("nothing left to do") == 2
    assert {path: path.stat().st_mtime_ns for path in copied.parent.rglob("*.pth")} == before


@pytest.mark.parametrize("layout", [BUNDLES, WORST], ids=["bundle", "split"])
def test_the_split_layout_and_root_lead_to_the_same(straight, tmp_path, layout):
    assert run("-opt", option_file(tmp_path, models=False, checkpoint=layout), "--run-all-stages") == 0
    for stage in ("one", "two"):
        assert differing(final(tmp_path / "run" / stage / "models"), final(straight / stage)) == []


def test_killed_in_one_stage_between_and_in_the_other_they_end_the_same(straight, tmp_path):
    path, seen = option_file(tmp_path), set()
    for _ in range(9):  # each launch resumes the one before; where they die is looked at, not assumed
        killed = run_program(tmp_path, "-opt", path, "--run-all-stages", before=partial(tiny.die_at, 36))
        assert killed.returncode == -signal.SIGKILL
        newest = [checkpoint.find_newest(tmp_path / "run" / stage) for stage in ("one", "two")]
        seen.add(tuple(found and found.iteration for found in newest))
        if newest[1] and newest[1].iteration < 4:
            break
    assert run("-opt", path, "--run-all-stages") == 0
    for stage in ("one", "two"):
        assert differing(final(tmp_path / "run" / stage), final(straight / stage)) == []
    assert any(a and a < 6 for a, _ in seen) and any(b and b < 4 for _, b in seen), seen


def test_killed_between_the_stages_the_second_begins_with_the_same_best(straight, copied):
    shutil.rmtree(copied.parent / "run/two")
    assert run("-opt", copied) == 0
    assert differing(final(copied.parent / "run/two"), final(straight / "two")) == []


def test_a_stop_ends_the_chain(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(door, "train", lambda *args, **kwargs: 143)
    assert run("-opt", option_file(tmp_path)) == 143
    monkeypatch.setattr(door, "train", lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGTERM) or 0)
    assert run("-opt", option_file(tmp_path), "--run-all-stages") == 143  # a signal that no run saw
    assert "before stage two; resume with: python main.py -opt" in capsys.readouterr().out


def test_a_stage_may_begin_with_nothing(tmp_path, capsys):
    stages = [{"name": "one"}, {"name": "two", "init_from": None}]
    assert run("-opt", option_file(tmp_path, stages=stages, train={"total_iter": 1})) == 0
    assert "loaded" not in capsys.readouterr().out
    assert run("-opt", option_file(tmp_path, "b", train={"total_iter": 1}), "--stage", "two", "--init-from", "none",
               "--set", "train.G_optimizer_lr=0.01", "--set", "train.total_iter=1") == 0
    assert differing(final(tmp_path / "run/two"), final(tmp_path / "b/two")) == []


# ---------------------------------------------------------------- weights of others


@pytest.mark.parametrize("how", ["member", "record", "folder", "bundle", "weights"])
def test_weights_may_be_named_in_any_way(straight, tmp_path, capsys, how):
    source = tmp_path / "source"
    found = checkpoint.find_newest(straight / "two")
    if how in ("member", "record", "folder"):
        source.mkdir()
        checkpoint.commit(source, 4, found.load())
        source = source / {"member": "4_G.pth", "record": "4.json", "folder": ""}[how]
    elif how == "weights":
        torch.save(found.load()["G"], source)
    else:
        source = found.path
    assert run("-opt", option_file(tmp_path, "new", stages=[], train={"total_iter": 1}), "--init-from", source) == 0
    assert "loaded      9 tensors" in capsys.readouterr().out


def test_what_fits_by_name_is_taken_and_another_shape_is_refused_with_its_reason(straight, tmp_path, capsys):
    weights = checkpoint.find_newest(straight / "two").load()["G"]
    torch.save({"body.0.weight": weights["body.0.weight"], "head.weight": torch.ones(3)}, tmp_path / "part.pth")
    path = option_file(tmp_path, "part", stages=[], train={"total_iter": 1, "E_decay": 0})
    assert run("-opt", path, "--init-from", tmp_path / "part.pth") == 0
    said = capsys.readouterr().out
    assert "loaded      1 tensors  body.0" in said and "new         8 tensors" in said
    assert "dropped     1 tensors  head (1)" in said
    path = option_file(tmp_path, "thin", stages=[], train={"total_iter": 1}, netG={"net_type": "tiny", "width": 4})
    words = ("-opt", path, "--init-from", straight / "two/checkpoint_best.pth")
    with pytest.raises(checkpoint.CheckpointError, match="netG.width default against 4 here; 7 of another shape"):
        run(*words)
    assert run(*words, "--set", "train.G_param_strict=false") == 0
    assert "dropped     7 tensors" in capsys.readouterr().out


# ---------------------------------------------------------------- options from the checkpoint


def test_resume_alone_takes_the_options_from_the_checkpoint(straight, copied, capsys, monkeypatch):
    folder = copied.parent / "run" / "one"
    copied.unlink()
    (folder / "checkpoint_latest.pth").unlink()
    newest = checkpoint.find_newest(folder)
    newest.path.unlink()  # as if it had been killed before the last one
    earlier = checkpoint.find_newest(folder)
    assert earlier.iteration < 6
    assert run("--resume", earlier.path) == 0
    assert differing(final(folder), final(straight / "one")) == []
    assert run("--resume", folder, "--set", "train.total_iter=7") == 0
    assert "options  train.total_iter: 6 -> 7" in capsys.readouterr().out


def test_a_run_that_was_moved_resumes_in_its_new_folder(tmp_path):
    path = option_file(tmp_path, stages=[], models=False, checkpoint={}, train={"total_iter": 2})
    assert run("-opt", path) == 0
    shutil.move(tmp_path / "run", tmp_path / "moved" / "run")
    assert run("--resume", tmp_path / "moved/run", "--set", "train.total_iter=4") == 0
    assert checkpoint.find_newest(tmp_path / "moved/run/models").iteration == 4 and not (tmp_path / "run").exists()
    shutil.move(tmp_path / "moved/run/models", tmp_path / "bare")
    assert run("--resume", tmp_path / "bare/4.json", "--set", "train.total_iter=5") == 0
    assert checkpoint.find_newest(tmp_path / "bare").iteration == 5


def test_a_stopped_run_says_how_to_resume():
    from main import resume_command

    assert resume_command(["--resume", "run/one/x.pth", "--lr", "1"], True) == "python main.py --resume run/one --lr 1"
    assert resume_command(["--resume=run/one/x.pth"], True) == "python main.py --resume run/one"
    assert resume_command(["-opt", "a", "--resume", "x", "--stage", "b"], False) == "python main.py -opt a --stage b"


def test_a_checkpoint_without_options_of_ours_asks_for_a_file(straight, tmp_path):
    weights = checkpoint.find_newest(straight / "two").load()["G"]
    torch.save({"model_state_dict": weights, "epoch": 3, "config": {"lr": 1}}, tmp_path / "last_checkpoint.pth")
    with pytest.raises(options.OptionError, match="stores no options of this program; give an option file with -opt"):
        run("--resume", tmp_path / "last_checkpoint.pth")


def test_a_named_checkpoint_decides_which_stage_resumes(copied, capsys):
    two = copied.parent / "run/two"
    assert run("-opt", copied, "--resume", two / "checkpoint_latest.pth", "--set", "train.total_iter=6") == 0
    said = capsys.readouterr().out
    assert "stage    two, 2 of 2" in said and "stage    one" not in said
    assert checkpoint.find_newest(two).iteration == 6
    assert run("-opt", copied, "--resume", two.parent / "one/checkpoint_latest.pth") == 0
    said = capsys.readouterr().out
    assert "stage    one, 1 of 2" in said and "stage    two, 2 of 2" in said  # and then the stages after it


@pytest.mark.parametrize("stage", ["one", "two"])
def test_a_stages_checkpoint_resumes_into_another_folder(straight, tmp_path, stage):
    """With --save_dir elsewhere, nothing of the stages before is there, and nothing of them is needed."""
    newest = straight / stage / "checkpoint_latest.pth"
    path = option_file(tmp_path)
    words = ("--set", f"path.models={tmp_path / 'else'}", "--resume", newest)
    assert run("-opt", path, "--stage", stage, *words, "--set", "train.total_iter=7") == 0
    assert checkpoint.find_newest(tmp_path / "else" / stage).iteration == 7
    assert run("-opt", path, "--stage", stage, *words, "--set", "train.total_iter=8") == 0  # repeated by a supervisor
    assert checkpoint.find_newest(tmp_path / "else" / stage).iteration == 8


def test_a_stage_resumes_from_a_file_that_tells_no_stage(straight, tmp_path):
    weights = checkpoint.find_newest(straight / "two").load()
    torch.save({"state_dict": weights["G"], "optimizer": weights["optimizerG"], "iter": 3}, tmp_path / "theirs.pth")
    path = option_file(tmp_path)
    with pytest.raises(checkpoint.CheckpointError, match="is of no stage; .*: --stage one or --stage two") as caught:
        run("-opt", path, "--resume", tmp_path / "theirs.pth")
    assert run("-opt", path, *str(caught.value).rpartition(" or ")[2].split(), "--resume", tmp_path / "theirs.pth") == 0
    assert checkpoint.find_newest(tmp_path / "run/two").iteration == 4


def test_the_remedy_for_another_stages_checkpoint_can_be_typed(straight, tmp_path, capsys):
    one = straight / "one/checkpoint_latest.pth"
    with pytest.raises(checkpoint.CheckpointError, match="is of stage 'one'; resume that with --stage one") as caught:
        run("-opt", option_file(tmp_path), "--stage", "two", "--resume", one)
    remedies = str(caught.value).partition("resume that with ")[2].split(", or start two with its weights: ")
    assert run("-opt", option_file(tmp_path), *remedies[1].split()) == 0
    assert "start    at iteration 0 of 4" in capsys.readouterr().out
    assert run("-opt", option_file(tmp_path), *remedies[0].split(), "--set", "train.total_iter=7") == 0
    assert "iteration 6 of 7" in capsys.readouterr().out


# ---------------------------------------------------------------- ranking


def test_runs_are_ranked_by_their_best_metric(straight, tmp_path, capsys):
    for rate in (0.02, 0.001):
        path = option_file(tmp_path, f"lr{rate}", stages=[], models=False, checkpoint={})
        assert run("-opt", path, "--lr", rate) == 0
    capsys.readouterr()
    assert ask(["rank", str(tmp_path), str(straight)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "psnr, larger is better" and lines[1].split() == ["psnr", "run", "train.G_optimizer_lr"]
    values = [float(line.split()[1]) for line in lines[2:4]]
    assert values == sorted(values, reverse=True) and {line.split()[-1] for line in lines[2:4]} == {"0.02", "0.001"}
    stored = [max(row["test.psnr"] for row in final(tmp_path / f"lr{rate}/models")["state"]["history"])
              for rate in ("0.02", "0.001")]
    assert values == pytest.approx(sorted(stored, reverse=True), abs=1e-4)
    assert lines[4] == "stage one: psnr, smaller is better" and "done 6 of 6" in lines[6]
    assert lines[7].startswith("stage two: psnr")


def test_ranking_says_what_it_cannot_rank(tmp_path, capsys):
    assert ask(["rank", str(tmp_path / "gone")]) == 2 and ask(["rank", str(tmp_path)]) == 2
    assert "no such folder of runs" in (said := capsys.readouterr().err) and "no run with a validation" in said
