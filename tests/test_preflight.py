"""What is looked at before the first step: it finds what would go wrong, and changes nothing."""

import os
import random
import shutil
import signal
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch

import checkpoint
import main as door
from commands import dry_run
from commands.checkpoints import compare
from data import DATASETS
from models import NETWORKS
from options import OptionError
from tests import tiny
from tests.conftest import ROOT, run_main, write_json

RECIPES = sorted((ROOT / "options").glob("train_*.json"))


class RestlessImages(tiny.Images):
    """A dataset that draws from every global generator each time it is asked, as no dataset should."""

    def __getitem__(self, key):
        random.random()
        np.random.rand()
        torch.rand(1)
        return super().__getitem__(key)


class OneBadImage(tiny.Images):
    def __getitem__(self, key):
        if key[1] == self.num_samples - 1:
            raise ValueError("photos/10.png: not a readable image; a PNG or JPEG file is needed")
        return super().__getitem__(key)


class Greedy(tiny.Net):
    """More than this machine has."""

    def forward(self, x):
        return super().forward(x) + torch.empty(1 << 46).sum()


@pytest.fixture
def options_of(tmp_path, tiny_tables, monkeypatch):
    """Writes the options of a tiny run; gives the arguments that name them."""
    monkeypatch.setitem(DATASETS, "restless", f"{__name__}:RestlessImages")
    monkeypatch.setitem(DATASETS, "one_bad", f"{__name__}:OneBadImage")
    monkeypatch.setitem(NETWORKS, "greedy", f"{__name__}:Greedy")

    def make(name="run", dataset="tiny", **over):
        tree = tiny.options(tmp_path, name, **over)
        tree["datasets"]["train"]["dataset_type"] = dataset
        return ["-opt", str(write_json(tmp_path / f"{name}.json", tree))]

    return make


def everything_in(folder):
    """Each path below a folder, of files with content and time."""
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) if path.is_file() else None
            for path in Path(folder).rglob("*")}


def dry(arguments, capfd):
    """Exit code of a dry run, and its table as {name: (status, text)}."""
    capfd.readouterr()
    code = door.main([*arguments, "--dry-run"])
    lines = [line for line in capfd.readouterr().out.splitlines() if line[:5].strip() in ("ok", "warn", "fail")]
    return code, {line[5:16].strip(): (line[:5].strip(), line[16:]) for line in lines}


def test_training_after_a_look_is_bit_for_bit_the_training_without(tmp_path, options_of, monkeypatch, capfd):
    looked = options_of("looked", dataset="restless")
    assert door.main(looked) == 0
    said = capfd.readouterr().out
    assert "checked  11 of 11 training samples read, 1 of 2 of test; checkpoints to come: 6 of" in said
    with monkeypatch.context() as without:
        without.setattr(dry_run, "look", lambda run: None)
        assert door.main(options_of("plain", dataset="restless")) == 0
    records = [tmp_path / name / "models" / "9.json" for name in ("looked", "plain")]
    assert compare(*records) == 0
    for found in checkpoint.find_sets(tmp_path / "looked" / "models"):
        if found.iteration > 4:
            checkpoint.remove(found)
    assert door.main(looked) == 0  # resumes from 4, after a look
    assert "4.json: iteration 4 of 9" in capfd.readouterr().out
    assert compare(*records) == 0


def test_a_dry_run_tries_all_and_leaves_nothing(tmp_path, options_of, capfd, monkeypatch):
    arguments = options_of(checkpoint={"keep_last_n": 1})
    before = everything_in(tmp_path)
    code, table = dry(arguments, capfd)
    assert code == 0 and everything_in(tmp_path) == before
    assert {name: status for name, (status, _) in table.items()} == dict.fromkeys(
        ("start", "data", "data test", "steps", "use test", "memory", "save", "disk", "duration", "stop"), "ok")
    assert table["start"][1].startswith("at iteration 0 of 9")
    assert table["data"][1] == "11 of 11 training samples read"
    assert table["disk"][1].startswith("checkpoints to come: 4 of ")
    assert "9 steps of" in table["duration"][1] and "3 validations" in table["duration"][1]

    assert door.main([*arguments, "--set", "train.total_iter=5"]) == 0
    before = everything_in(tmp_path)
    code, table = dry(arguments, capfd)
    assert code == 0 and everything_in(tmp_path) == before
    assert table["start"][1].endswith("5.json after iteration 5 of 9")
    code, table = dry([*arguments, "--set", "train.total_iter=5"], capfd)
    assert code == 0 and table["start"] == ("warn", "iteration 5 of 5 is done: nothing left to do; raise "
                                                    "train.total_iter")


def test_every_stage_of_a_file_is_tried(tmp_path, options_of, capfd):
    arguments = options_of(stages=[{"name": "one"}, {"name": "two", "train": {"total_iter": 4}}])
    before = everything_in(tmp_path)
    assert door.main([*arguments, "--dry-run"]) == 0 and everything_in(tmp_path) == before
    said = capfd.readouterr().out
    assert "ok   start      at iteration 0 of 9" in said and "ok   start      at iteration 0 of 4" in said


def test_everything_that_is_missing_is_reported_at_once(tmp_path, options_of, capfd):
    code, table = dry(["-opt", str(ROOT / "options/train_vrt.json"), "--set", "datasets.train.dataroot_gt=nowhere",
                           "--set", "netG.spynet_path=none.pth", "--set", f"path.root={tmp_path}"], capfd)
    assert code == 2 and list(table) == ["data train", "data test", "model"]
    assert [status for status, _ in table.values()] == ["fail", "ok", "fail"]
    assert "nowhere" in table["data train"][1] and "none.pth" in table["model"][1]


def test_weights_that_are_not_there_fail(options_of, capfd):
    code, table = dry(options_of(path={"root": "x", "pretrained_netG": "none.pth"}), capfd)
    assert code == 2 and table == {"start": ("fail", "none.pth: no such file")}


def test_a_sample_that_can_not_be_read(tmp_path, options_of, capfd):
    code, table = dry(options_of(dataset="one_bad"), capfd)
    assert code == 2 and table["data"] == ("fail", "photos/10.png: not a readable image; a PNG or JPEG file is needed")
    with pytest.raises(OptionError, match="photos/10.png"):  # at a start too, before there is a folder
        door.main(options_of(dataset="one_bad"))
    assert not (tmp_path / "run").exists()


def test_too_little_memory_says_what_helps(options_of, capfd):
    code, table = dry(options_of(netG={"net_type": "greedy"}), capfd)
    assert code == 2 and table["steps"][0] == "fail" and table["save"][0] == "ok"
    assert table["steps"][1].startswith("out of memory") and "train.accumulate" in table["steps"][1]
    assert "duration" not in table


def test_a_first_loss_that_is_not_finite(options_of, capfd):
    code, table = dry([*options_of(), "--set", "train.G_lossfn_weight=1e39"], capfd)
    assert code == 2 and "not finite at iteration 1" in table["steps"][1]


def test_a_disk_that_is_too_small(options_of, capfd, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 0, 60_000))
    code, table = dry(options_of(), capfd)
    assert code == 0 and table["disk"][0] == "warn" and "checkpoint.keep_last_n" in table["disk"][1]
    assert door.main(options_of()) == 0  # a warning, for there may be room when it is needed
    assert "warning  checkpoints to come: 6 of" in capfd.readouterr().out
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 0, 100))
    code, table = dry(options_of("other"), capfd)
    assert code == 2 and table["disk"][0] == table["save"][0] == "fail"


def test_a_save_that_is_not_read_as_it_was_written(options_of, capfd, monkeypatch):
    def load(found):
        parts = load.real(found)
        parts["G"]["body.0.bias"][0] += 1
        return parts

    load.real = checkpoint.CheckpointSet.load
    monkeypatch.setattr(checkpoint.CheckpointSet, "load", load)
    code, table = dry(options_of(), capfd)
    assert code == 2 and "G.body.0.bias is not read as it was written" in table["save"][1]


def test_a_folder_that_can_not_be_made(tmp_path, options_of, capfd):
    (tmp_path / "file").write_text("")
    code, table = dry([*options_of(), "--set", f"path.root={tmp_path / 'file'}"], capfd)
    assert code == 2 and "path.root" in table["save"][1]


def test_a_signal_ends_it_and_nothing_is_left(tmp_path, options_of, capfd, monkeypatch):
    arguments = options_of()
    before = everything_in(tmp_path)
    real = dry_run.Trial.steps
    monkeypatch.setattr(dry_run.Trial, "steps", lambda self: (os.kill(os.getpid(), signal.SIGTERM), real(self))[1])
    code, table = dry(arguments, capfd)
    assert code == 143 and list(table)[-1] == "steps" and everything_in(tmp_path) == before


def test_how_many_are_to_come():
    run = type("Run", (), {})()
    run.iteration, run.batches = 100, type("Batches", (), {"batches_per_epoch": 7})
    run.opt = {"train": {"total_iter": 150, "checkpoint_save": 20, "save_interval": None, "checkpoint_test": 0,
                         "eval_interval": 2}}
    assert dry_run.times_due(run, "save") == 3  # 120, 140, 150
    assert dry_run.times_due(run, "test") == 4
    run.iteration = 150
    assert dry_run.times_due(run, "save") == 0


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_passes_a_dry_run(path, tmp_path):
    done = run_main("-opt", path, "--dry-run", "--set", f"path.root={tmp_path}")
    assert done.returncode == 0 and " 0 warnings, 0 to be mended" in done.stdout, done.stdout + done.stderr
    assert not list(tmp_path.iterdir())
