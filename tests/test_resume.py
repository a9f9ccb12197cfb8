"""Stopped anyhow, resumed by the same command: the final files equal a straight run's, tensor for tensor."""

import csv
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

import checkpoint
import main as door
import options
from models.model_vrt import ModelVRT
from tests.conftest import ROOT, run_main, write_json

TOTAL = 6
TIMES = ("timestamp", "config", "environment", "resumed_from")  # may differ between equal runs


def recipe_in(folder):
    """The default recipe, small: makes an option file whose run lies in `folder/<name>`."""

    def make(name="run", workers=0, train=None, **over):
        tree = {
            "extends": str(ROOT / "options/train_vrt.json"), "task": name, "path": {"root": str(folder)},
            "num_threads": 2,
            "datasets": {"train": {"gt_size": 64, "num_frame": 2, "dataloader_num_workers": workers,
                                   "generated": {"num_clips": 5}},  # epochs of 2 batches: a run crosses three of them
                         "test": {"generated": {"num_clips": 1, "num_frame": 2, "gt_size": [64, 64]}}},
            "netG": {"img_size": [2, 16, 16], "embed_dims": [8] * 8, "num_heads": [2] * 8, "drop_path_rate": 0.3,
                     "deformable_groups": 2, "window_size": [2, 2, 2]},
            "train": {"total_iter": TOTAL, "checkpoint_save": 2, "checkpoint_test": 3, "checkpoint_print": 1,
                      "G_optimizer_clipgrad": 1.0, "E_decay": 0.9, **(train or {})}, **over}
        return write_json(folder / f"{name}.json", tree)

    return make


@pytest.fixture
def recipe(tmp_path):
    return recipe_in(tmp_path)


def run(*arguments):
    """main.py in this process: as quick as a call, with the same door."""
    return door.main([str(a) for a in arguments])


def differing(a, b, path=""):
    """Paths at which two states differ."""
    if isinstance(a, torch.Tensor):
        return [] if torch.equal(a, b) else [path]
    if isinstance(a, dict):
        keys = [k for k in {**a, **b} if k not in TIMES]
        return [d for k in keys
                for d in (differing(a[k], b[k], f"{path}.{k}") if k in a and k in b else [f"{path}.{k}"])]
    if isinstance(a, (list, tuple)):
        same = len(a) == len(b)
        return [d for i, (x, y) in enumerate(zip(a, b)) for d in differing(x, y, f"{path}[{i}]")] if same else [path]
    return [] if a == b else [path]


def final(folder, iteration=TOTAL):
    found = checkpoint.locate(folder / "models" / f"{iteration}.json")
    return found.load()


def assert_equal_runs(a, b, iteration=TOTAL):
    one, two = final(a, iteration), final(b, iteration)
    assert set(one) == set(two) == {"G", "E", "optimizerG", "state"}
    assert differing(one, two) == []
    for table in ("train", "test"):
        assert (a / "log" / f"{table}.csv").read_text() == (b / "log" / f"{table}.csv").read_text()


@pytest.fixture(scope="session")
def never_stopped(tmp_path_factory):
    folder = tmp_path_factory.mktemp("never_stopped")
    torch.set_num_threads(2)
    assert run("-opt", recipe_in(folder)("straight")) == 0
    return folder / "straight"


@pytest.fixture
def straight(recipe, tmp_path, never_stopped):
    """The folder of a run that was never stopped, for this test alone."""
    recipe("straight")
    shutil.copytree(never_stopped, tmp_path / "straight")
    for which in ("latest", "best"):  # hard links, which copying takes apart
        link = tmp_path / "straight/models" / f"{which}.json"
        iteration = checkpoint.locate(link).iteration
        link.unlink()
        os.link(link.with_name(f"{iteration}.json"), link)
    return tmp_path / "straight"


def test_a_run_leaves_what_it_promises(straight):
    names = set(os.listdir(straight / "models"))
    assert {f"{n}_{part}.pth" for n in (2, 4, 6) for part in ("G", "E", "optimizerG", "state")} <= names
    assert {"2.json", "4.json", "6.json"} <= names and len(names) == 3 * 5 + 2  # 3 was the best before
    for link, iteration in (("latest", 6), ("best", 6)):
        assert (straight / "models" / f"{link}.json").samefile(straight / "models" / f"{iteration}.json")
    with open(straight / "log" / "train.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(r["iteration"]) for r in rows] == [1, 2, 3, 4, 5, 6] and float(rows[0]["G_loss"]) > 0
    with open(straight / "log" / "test.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(r["iteration"]) for r in rows] == [3, 6]
    assert {f"test.{m}{b}" for m in ("psnr", "ssim", "psnr_y", "ssim_y") for b in ("", "_bicubic")} <= set(rows[0])
    assert len(list((straight / "images").glob("*.png"))) == 2
    assert len(list((straight / "options").glob("straight_*.json"))) == 1
    assert "start    at iteration 0 of 6" in (straight / "log" / "train.log").read_text()


STOPS = [(signal.SIGINT, 1), (signal.SIGUSR1, 3)]  # each signal at more places: test_exact.py


@pytest.mark.parametrize("sig, at", STOPS, ids=[f"{s.name} in step {n}" for s, n in STOPS])
def test_a_signal_stops_after_the_step_and_the_same_command_goes_on(recipe, straight, tmp_path, monkeypatch, capsys,
                                                                    sig, at):
    path, real = recipe("stopped"), ModelVRT.optimize_parameters

    def interrupted(self, step):
        real(self, step)
        if step == at:
            os.kill(os.getpid(), sig)

    with monkeypatch.context() as patch:
        patch.setattr(ModelVRT, "optimize_parameters", interrupted)
        assert run("-opt", path) == 128 + sig
    said = capsys.readouterr().out
    assert f"stopped  by {sig.name} after iteration {at}; resume with: python main.py -opt {path}" in said
    assert run("-opt", path) == 0
    assert f"iteration {at} of 6" in capsys.readouterr().out
    assert_equal_runs(straight, tmp_path / "stopped")
    assert f"{at}.json" in os.listdir(tmp_path / "stopped/models") or at % 2  # superseded, unless it was due anyway


@pytest.mark.parametrize("workers", [(2, 0)], ids=["2 then 0 workers"])
def test_workers_may_change_at_resume(recipe, straight, tmp_path, monkeypatch, workers):
    def stop(self, path, real=checkpoint.commit):
        os.kill(os.getpid(), signal.SIGTERM)

    path = recipe("stopped", workers=workers[0])
    with monkeypatch.context() as patch:
        real = ModelVRT.feed_data
        patch.setattr(ModelVRT, "feed_data", lambda self, data: (real(self, data), stop(self, data)))
        assert run("-opt", path) == 143  # in the first step
    assert run("-opt", recipe("stopped", workers=workers[1])) == 0
    assert_equal_runs(straight, tmp_path / "stopped")


def test_a_signal_in_validation_repeats_it_whole(recipe, straight, tmp_path, monkeypatch):
    path, real = recipe("stopped"), ModelVRT.validate

    def interrupted(self, sample):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(self, sample)

    with monkeypatch.context() as patch:
        patch.setattr(ModelVRT, "validate", interrupted)
        assert run("-opt", path) == 143
    assert run("-opt", path) == 0
    assert_equal_runs(straight, tmp_path / "stopped")


def start_process(*arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen([sys.executable, str(ROOT / "main.py"), *map(str, arguments)], env=environment,
                            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@pytest.mark.parametrize("workers", [2])
def test_kill_9_anywhere_and_run_again(recipe, straight, tmp_path, workers):
    path = recipe("killed", workers=workers)
    process = start_process("-opt", path)
    deadline = time.monotonic() + 60
    while not (tmp_path / "killed/models/2.json").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait(20)
    assert not (tmp_path / "killed/models/6.json").exists()
    done = run_main("-opt", path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"resume   from .*/[24]\.json: iteration [24] of 6", done.stdout)
    assert_equal_runs(straight, tmp_path / "killed")


def test_the_second_ctrl_c_leaves_at_once(recipe, tmp_path):
    path = recipe("twice", train={"total_iter": 1000, "checkpoint_test": 5000})
    process = start_process("-opt", path)
    deadline = time.monotonic() + 60
    while not (tmp_path / "twice/models/2.json").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    time.sleep(2.2)
    process.send_signal(signal.SIGINT)
    assert process.wait(10) in (130, -signal.SIGINT)  # there, unless it had saved and ended before
    assert checkpoint.find_newest(tmp_path / "twice/models") is not None


def test_a_finished_run_says_so_and_goes_on_when_raised(recipe, straight, tmp_path, capsys):
    assert run("-opt", recipe("short", train={"total_iter": 4, "G_scheduler_periods": TOTAL})) == 0
    before = os.stat(tmp_path / "short/models/4.json").st_mtime_ns
    capsys.readouterr()
    assert run("-opt", tmp_path / "short.json") == 0
    said = capsys.readouterr().out
    assert "finished at iteration 4 of 4: nothing left to do" in said
    assert "iteration 4 of 4, epoch" in said and "next learning rate" not in said, "there is no next step"
    assert os.stat(tmp_path / "short/models/4.json").st_mtime_ns == before
    assert run("-opt", tmp_path / "short.json", "--set", f"train.total_iter={TOTAL}") == 0
    said = capsys.readouterr().out
    assert "options  train.total_iter: 4 -> 6" in said and "next learning rate" in said
    one, two = final(tmp_path / "short"), final(straight)
    two["state"]["history"].insert(1, one["state"]["history"][1])  # a run of 4 validates once more, at its end
    assert differing(one, two) == []


def test_epochs_count_for_total_and_intervals(recipe, tmp_path):
    assert run("-opt", recipe("epochs", train={"save_interval": 2, "eval_interval": 3}), "--epochs", 4) == 0
    assert [s.iteration for s in checkpoint.find_sets(tmp_path / "epochs/models")] == [4, 6, 8]  # 6: the best so far
    with open(tmp_path / "epochs/log/test.csv", newline="") as file:
        assert [r["iteration"] for r in csv.DictReader(file)] == ["6", "8"]


def test_resume_to_an_older_one_archives_the_newer(recipe, straight, tmp_path, capsys):
    kept = final(straight)
    assert run("-opt", tmp_path / "straight.json", "--resume", straight / "models/2_G.pth") == 0
    archives = list(straight.glob("models_*"))
    assert len(archives) == 1 and [s.iteration for s in checkpoint.find_sets(archives[0])] == [4, 6]
    assert differing(kept, final(straight)) == []
    assert "archived newer checkpoints" in capsys.readouterr().out
    with open(straight / "log" / "train.csv", newline="") as file:
        assert [int(r["iteration"]) for r in csv.DictReader(file)] == [1, 2, 3, 4, 5, 6]


def test_resume_from_another_folder_gives_the_same_end(recipe, straight, tmp_path):
    assert run("-opt", recipe("elsewhere"), "--resume", straight / "models/4.json") == 0
    one, two = final(straight), final(tmp_path / "elsewhere")
    assert differing(one, two) == []


def test_fresh_puts_everything_away_and_repeats_it(recipe, straight, tmp_path):
    kept = final(straight)
    assert run("-opt", tmp_path / "straight.json", "--fresh") == 0
    assert len(list(straight.glob("models_*"))) == 1
    assert differing(kept, final(straight)) == []


def test_init_from_takes_weights_only_and_starts_at_zero(recipe, straight, tmp_path, capsys):
    path = recipe("tuned", train={"total_iter": 1})
    assert run("-opt", path, "--init-from", straight / "models/6_E.pth") == 0
    said = capsys.readouterr().out
    assert "start    at iteration 0 of 1" in said and "dropped     0 tensors" in said
    assert run("-opt", path, "--init-from", straight / "models/6_E.pth") == 0  # the same command again goes on
    assert "nothing left to do" in capsys.readouterr().out
    with pytest.raises(checkpoint.CheckpointError, match="--init-from starts a new run"):
        run("-opt", path, "--init-from", straight / "models/4_E.pth")


def test_damaged_newest_is_said_and_the_one_before_leads_to_the_same_end(recipe, straight, capsys, tmp_path):
    kept = final(straight)
    victim = straight / "models/6_optimizerG.pth"
    os.truncate(victim, 1000)
    assert run("-opt", tmp_path / "straight.json") == 0
    said = capsys.readouterr().out
    assert "checkpoint 6 is not used: 6_optimizerG.pth: has 1000 bytes" in said and "iteration 4 of 6" in said
    assert differing(kept, final(straight)) == []


def test_none_usable_is_an_error_never_a_start_from_zero(recipe, straight, tmp_path):
    for path in (straight / "models").glob("*_G.pth"):
        os.truncate(path, 10)
    with pytest.raises(checkpoint.CheckpointError, match="there are checkpoints, but none is usable"):
        run("-opt", tmp_path / "straight.json")


def test_a_kair_folder_goes_on_and_says_what_is_absent(recipe, straight, tmp_path, capsys):
    folder = tmp_path / "kair/models"
    folder.mkdir(parents=True)
    for label in ("G", "E"):
        torch.save(final(straight, 4)[label], folder / f"4_{label}.pth")
    assert run("-opt", recipe("kair")) == 0
    said = capsys.readouterr().out
    assert "iteration 4 of 6" in said and "absent   optimizerG, state" in said


def test_command_line_learning_rate_wins_over_the_restored_optimizer(recipe, straight, tmp_path):
    assert run("-opt", recipe("straight", train={"total_iter": 8}), "--lr", "0.002",
               "--set", "train.G_scheduler_type=constant") == 0
    group = final(straight, 8)["optimizerG"]["param_groups"][0]
    assert group["lr"] == 0.002


def test_nan_stops_names_the_step_and_keeps_the_last_checkpoint(recipe, tmp_path, monkeypatch):
    real = ModelVRT.feed_data

    def poisoned(self, data, **kwargs):
        real(self, data, **kwargs)
        if self.netG.training and data["key"][0] and getattr(self, "steps", 0) == 2:
            self.degraded = self.degraded * float("nan")
        self.steps = getattr(self, "steps", 0) + 1

    monkeypatch.setattr(ModelVRT, "feed_data", poisoned)
    from train import NonFiniteLoss

    with pytest.raises(NonFiniteLoss, match=r"not finite at iteration 3: G_loss nan"):
        run("-opt", recipe("nan"))
    assert [s.iteration for s in checkpoint.find_sets(tmp_path / "nan/models")] == [2]
    assert all(v.isfinite().all() for v in final(tmp_path / "nan", 2)["G"].values())
    assert run("-opt", recipe("skip", train={"on_nan": "skip"})) == 0
    assert final(tmp_path / "skip")["state"]["skipped"] == 1
    assert all(v.isfinite().all() for v in final(tmp_path / "skip")["G"].values())


def test_a_full_disk_stops_with_a_line_or_warns_and_tries_again(recipe, tmp_path, monkeypatch, capsys):
    real, refusals = os.fsync, iter(range(100))

    def full_once(descriptor):
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if ".probe" not in path and path.endswith(".pth.tmp") and next(refusals) == 0:
            raise OSError(28, "No space left on device")
        return real(descriptor)

    monkeypatch.setattr(os, "fsync", full_once)
    assert run("-opt", recipe("warned", checkpoint={"on_save_error": "warn"})) == 0
    assert "warning  checkpoint 2 was not saved: [Errno 28] No space left" in capsys.readouterr().out
    assert [s.iteration for s in checkpoint.find_sets(tmp_path / "warned/models")] == [4, 6]
    refusals = iter(range(100))
    with pytest.raises(checkpoint.CheckpointError, match="No space left on device; older checkpoints are intact"):
        run("-opt", recipe("stopped"))
    assert not list((tmp_path / "stopped/models").iterdir())


def test_frozen_parts_thaw_in_mid_run_and_resume_exactly(recipe, tmp_path, monkeypatch):
    fixed = {"fix_iter": 4, "fix_keys": ["spynet", "deform"], "fix_lr_mul": 0.125}
    assert run("-opt", recipe("one", train=fixed)) == 0
    path, real = recipe("stopped", train=fixed), ModelVRT.optimize_parameters
    with monkeypatch.context() as patch:  # the thaw is between step 3 and the next
        patch.setattr(ModelVRT, "optimize_parameters", lambda self, step: (
            real(self, step), os.kill(os.getpid(), signal.SIGTERM) if step == 3 else None))
        assert run("-opt", path) == 143
    assert run("-opt", path) == 0
    assert_equal_runs(tmp_path / "one", tmp_path / "stopped")
    first, second = final(tmp_path / "one", 2)["G"], final(tmp_path / "one", 4)["G"]
    fixed_names = [k for k in first if "deform" in k or k.startswith("spynet.basic")]
    assert fixed_names and any(not torch.equal(first[k], second[k]) for k in fixed_names)  # step 4 trains them
    groups = final(tmp_path / "one")["optimizerG"]["param_groups"]
    assert [round(g["initial_lr"] / groups[0]["initial_lr"], 3) for g in groups] == [1, 0.125]


BAD = [
    (["--resume", "none.pth"], "none.pth: no such checkpoint"),
    (["--set", "train.totl_iter=1"], "did you mean 'total_iter'?"),
    (["--set", "datasets.train.dataroot_gt=nowhere"], "nowhere"),
    (["--set", "datasets.train.dataroot_gt=empty"], "empty"),
    (["--set", "datasets.test.dataroot_gt=nowhere"], "nowhere"),
    (["--set", "netG.spynet_path=spynet.pth"], "spynet.pth"),
    (["--set", "datasets.train.dataloader_batch_size=999"], "a batch of 999 can't be filled"),
    (["--set", "netG.upscale=2"], "scale 4 and netG.upscale 2 must be equal"),
    (["--set", "netG.num_heads=[3]"], "netG"),
    (["--device", "tpu"], "device"),
    (["--init-from", "none.pth"], "none.pth: no such file"),
    (["--set", "train.G_scheduler_periods=0"], "0 is not a whole number >= 1"),
    (["--set", "train.total_iter=0"], "0 is not a whole number >= 1"),
    (["--seed", "-1"], "-1 is not a whole number from 0 to"),
]


@pytest.mark.parametrize("arguments, words", BAD, ids=[" ".join(a) for a, _ in BAD])
def test_bad_input_is_one_line_and_makes_nothing(recipe, tmp_path, monkeypatch, arguments, words):
    path = recipe("bad")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises((options.OptionError, checkpoint.CheckpointError)) as caught:
        run("-opt", path, *arguments)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "bad").exists()


def test_weights_of_another_architecture_are_refused(recipe, straight, tmp_path):
    path = recipe("wide", netG={"img_size": [2, 16, 16], "embed_dims": [16] * 8, "num_heads": [2] * 8,
                                "deformable_groups": 2, "window_size": [2, 2, 2]})
    with pytest.raises(checkpoint.CheckpointError, match="of another architecture: .* instead of"):
        run("-opt", path, "--resume", straight / "models/4.json")
    assert not (tmp_path / "wide").exists()


def test_the_door_prints_one_line_and_exits_with_2(recipe, tmp_path):
    done = run_main("-opt", recipe("bad"), "--resume", tmp_path / "none.pth", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == (f"error: {tmp_path}/none.pth: no such checkpoint; "
                           "give a file, a commit record or a folder\n")


def test_an_unreadable_frame_ends_the_run_with_its_name_and_keeps_what_was_learnt(recipe, tmp_path):
    from torchvision.io import write_png

    clip = tmp_path / "video/clip"
    clip.mkdir(parents=True)
    for n in range(4):
        write_png(torch.randint(0, 255, (3, 64, 64), dtype=torch.uint8), str(clip / f"{n:08d}.png"))
    (clip / "00000003.png").write_bytes(b"no image")
    done = run_main("-opt", recipe("frames", workers=1), "--set", f"datasets.train.dataroot_gt={tmp_path / 'video'}",
                    "--batch_size", "1", "--set", "train.total_iter=50", timeout=60)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "00000003.png" in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert checkpoint.has_checkpoints(tmp_path / "frames/models") == ("iter " in done.stdout)
