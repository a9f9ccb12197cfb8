"""What the same command does when it is run again, or with --resume, --fresh and --init-from; and VRT, stopped."""

import os
import re
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch
from torchvision.io import write_png

import checkpoint
import options
from data import DATASETS
from models import MODELS, NETWORKS
from runtime.resume import differing_options
from storage.tree import plain
from tests import tiny
from tests.conftest import run_main
from tests.programs import run_program
from tests.runs import assert_equal_runs, differing, final, rows, run, run_until, straight_and_stopped
from tests.vrt import vrt_file

TOTAL = 9  # 11 samples in batches of 4: epochs of 2 steps
pytestmark = pytest.mark.usefixtures("tiny_tables")


@pytest.fixture(scope="module")
def never_stopped(tmp_path_factory):
    """A run that was never stopped: its folder, where `straight` may not be changed by a test."""
    folder = tmp_path_factory.mktemp("never_stopped")
    with pytest.MonkeyPatch.context() as patch:
        tiny.add_rows(patch)
        assert run("-opt", tiny.write(folder, "straight")) == 0
    return folder / "straight"


@pytest.fixture
def straight(tmp_path, never_stopped):
    """The same run for one test alone: `straight.json` leads to its folder."""
    tiny.write(tmp_path, "straight")
    shutil.copytree(never_stopped, tmp_path / "straight")
    for which in ("latest", "best"):  # hard links, which copying takes apart
        link = tmp_path / f"straight/models/{which}.json"
        iteration = checkpoint.locate(link).iteration
        link.unlink()
        os.link(link.with_name(f"{iteration}.json"), link)
    return tmp_path / "straight"


# ---------------------------------------------------------------- VRT


FROZEN = {"fix_iter": 4, "fix_keys": ["spynet", "deform"], "fix_lr_mul": 0.125}


@pytest.fixture(scope="module")
def vrt(tmp_path_factory):
    """VRT in 6 steps, straight, and stopped in the last before its frozen parts train."""
    folder = tmp_path_factory.mktemp("vrt")
    return straight_and_stopped(lambda name, launch: vrt_file(folder, name, workers=launch % 2, train=FROZEN), [3])


def test_vrt_with_parts_that_thaw_in_mid_run_resumes_exactly(vrt):
    assert_equal_runs(*vrt, 6)
    parts = {at: checkpoint.locate(vrt[0] / f"models/{at}.json").load() for at in (2, 4, 6)}
    fixed = [key for key in parts[2]["G"] if "deform" in key or key.startswith("spynet.basic")]
    assert fixed and any(not torch.equal(parts[2]["G"][key], parts[4]["G"][key]) for key in fixed)  # step 4 trains them
    groups = parts[6]["optimizerG"]["param_groups"]
    assert [round(group["initial_lr"] / groups[0]["initial_lr"], 3) for group in groups] == [1, 0.125]


def test_a_run_leaves_what_it_promises(vrt):
    folder = vrt[0]
    names = set(os.listdir(folder / "models"))
    assert {f"{n}_{part}.pth" for n in (2, 4, 6) for part in ("G", "E", "optimizerG", "state")} <= names
    assert {"2.json", "4.json", "6.json"} <= names and len(names) == 3 * 5 + 2  # 3 was the best before
    for link, iteration in (("latest", 6), ("best", 6)):
        assert (folder / "models" / f"{link}.json").samefile(folder / "models" / f"{iteration}.json")
    train, test = rows(folder), rows(folder, "test")
    assert [int(row["iteration"]) for row in train] == [1, 2, 3, 4, 5, 6] and float(train[0]["G_loss"]) > 0
    assert [int(row["iteration"]) for row in test] == [3, 6]
    assert {f"test.{m}{b}" for m in ("psnr", "ssim", "psnr_y", "ssim_y") for b in ("", "_bicubic")} <= set(test[0])
    assert len(list((folder / "images").glob("*.png"))) == 2
    assert len(list((folder / "options").glob("one_*.json"))) == 1
    assert "start    at iteration 0 of 6" in (folder / "log" / "train.log").read_text()


# ---------------------------------------------------------------- the same command again


def die_in_step_5():
    return [tiny.stop_after(5, signal.SIGKILL)]


def test_a_run_that_was_killed_resumes_from_its_last_commit(straight, tmp_path, capsys):
    path = tiny.write(tmp_path, "killed", workers=2)
    assert run_program(tmp_path, "-opt", path, before=die_in_step_5).returncode == -signal.SIGKILL
    assert run("-opt", path) == 0
    assert f"killed/models/4.json: iteration 4 of {TOTAL}" in capsys.readouterr().out
    assert_equal_runs(straight, tmp_path / "killed")


def test_a_finished_run_says_so_and_resumes_when_its_total_is_raised(straight, tmp_path, capsys):
    assert run("-opt", tiny.write(tmp_path, "short", train={"total_iter": 4, "G_scheduler_periods": TOTAL})) == 0
    before = os.stat(tmp_path / "short/models/4.json").st_mtime_ns
    capsys.readouterr()
    assert run("-opt", tmp_path / "short.json") == 0
    said = capsys.readouterr().out
    assert "finished at iteration 4 of 4: nothing left to do" in said
    assert "iteration 4 of 4, epoch" in said and "next learning rate" not in said, "there is no next step"
    assert os.stat(tmp_path / "short/models/4.json").st_mtime_ns == before
    assert run("-opt", tmp_path / "short.json", "--set", f"train.total_iter={TOTAL}") == 0
    said = capsys.readouterr().out
    assert f"options  train.total_iter: 4 -> {TOTAL}" in said and "next learning rate" in said
    one, two = final(tmp_path / "short"), final(straight)
    two["state"]["history"].insert(1, one["state"]["history"][1])  # a run of 4 validates once more, at its end
    assert differing(one, two) == []


def test_epochs_count_for_total_and_intervals(tmp_path):
    assert run("-opt", tiny.write(tmp_path, train={"save_interval": 2, "eval_interval": 3}), "--epochs", 4) == 0
    assert [int(row["iteration"]) for row in rows(tmp_path / "run", "test")] == [6, 8]
    best = checkpoint.locate(tmp_path / "run/models/best.json").iteration
    assert [s.iteration for s in checkpoint.find_sets(tmp_path / "run/models")] == sorted({4, best, 8})


def test_epochs_are_counted_from_1_in_the_table_the_log_and_the_line_of_a_resume(tmp_path, capsys):
    path = tiny.write(tmp_path, train={"total_iter": 5})
    run_until(3, "-opt", path)
    assert run("-opt", path) == 0
    said = capsys.readouterr().out
    assert "3.json: iteration 3 of 5, epoch 1 finished, next epoch 2, " in said
    assert re.findall(r"^iter +(\d) \| epoch (\d) ", said, re.M) == list(zip("12345", "11223"))
    assert [row["epoch"] for row in rows(tmp_path / "run")] == list("11223")
    table = tmp_path / "run/log/train.csv"  # as versions until d595e12 wrote it
    table.write_text(re.sub(r"(?m)^(\d),(\d)", lambda found: f"{found[1]},{int(found[2]) - 1}", table.read_text()))
    assert [row["epoch"] for row in rows(tmp_path / "run")] == list("00112")
    assert run("-opt", path, "--set", "train.total_iter=7") == 0
    assert [row["epoch"] for row in rows(tmp_path / "run")] == list("1122334")


def test_an_option_newer_than_the_checkpoint_had_its_default(tmp_path):
    def lines(forgotten, *changes):
        opt, _ = options.parse(str(tiny.write(tmp_path, netG={"net_type": "tiny", "width": 4})), [
            (key, value, "--set") for key, value in changes], MODELS, NETWORKS, DATASETS)
        saved = plain(options.parse(str(tmp_path / "run.json"), [], MODELS, NETWORKS, DATASETS)[0])
        section, _, key = forgotten.partition(".")
        del saved[section][key]
        return differing_options(SimpleNamespace(opt=opt, saved_config=saved))

    assert lines("train.G_scheduler_ahead") == lines("checkpoint.every_minutes") == []
    assert lines("train.G_scheduler_ahead", ("train.G_scheduler_ahead", True)) == [
        "options  train.G_scheduler_ahead: false -> true"]
    assert lines("netG.width") == ["options  netG.width: default -> 4"]


def test_fresh_and_a_resume_from_the_folder_that_it_moves_away_contradict_each_other(straight, tmp_path, capsys):
    path = tiny.write(tmp_path, train={"total_iter": 4})
    assert run("-opt", path) == 0
    before = sorted(tmp_path.rglob("*"))
    for named in ("models/2.json", "models", "."):
        with pytest.raises(checkpoint.CheckpointError, match="--fresh moves away what this run has") as e:
            run("-opt", path, "--fresh", "--resume", tmp_path / "run" / named)
        assert "\n" not in str(e.value) and sorted(tmp_path.rglob("*")) == before
    assert run("-opt", path, "--fresh", "--resume", straight / "models/2.json") == 0  # of another run: it is archived
    assert len(list((tmp_path / "run").glob("models_*"))) == 1


def test_resume_from_another_folder_gives_the_same_end(straight, tmp_path):
    assert run("-opt", tiny.write(tmp_path, "elsewhere"), "--resume", straight / "models/4.json") == 0
    assert differing(final(straight), final(tmp_path / "elsewhere")) == []


def test_init_from_takes_weights_only_and_starts_at_zero(straight, tmp_path, capsys):
    path = tiny.write(tmp_path, "tuned", train={"total_iter": 1})
    assert run("-opt", path, "--init-from", straight / "models/9_E.pth") == 0
    said = capsys.readouterr().out
    assert "start    at iteration 0 of 1" in said and "dropped     0 tensors" in said
    assert run("-opt", path, "--init-from", straight / "models/9_E.pth") == 0  # the same command again resumes
    assert "nothing left to do" in capsys.readouterr().out
    with pytest.raises(checkpoint.CheckpointError, match="--init-from starts a new run"):
        run("-opt", path, "--init-from", straight / "models/4_E.pth")


def test_damaged_newest_is_said_and_the_one_before_leads_to_the_same_end(straight, capsys, tmp_path):
    kept = final(straight)
    os.truncate(straight / "models/9_optimizerG.pth", 1000)
    assert run("-opt", tmp_path / "straight.json") == 0
    said = capsys.readouterr().out
    assert "checkpoint 9 is not used: 9_optimizerG.pth: has 1000 bytes" in said and f"iteration 8 of {TOTAL}" in said
    assert differing(kept, final(straight)) == []


def test_none_usable_is_an_error_never_a_start_from_zero(straight, tmp_path):
    for path in (straight / "models").glob("*_G.pth"):
        os.truncate(path, 10)
    with pytest.raises(checkpoint.CheckpointError, match="there are checkpoints, but none is usable"):
        run("-opt", tmp_path / "straight.json")


def test_a_kair_folder_is_resumed_and_what_is_absent_is_said(straight, tmp_path, capsys):
    folder = tmp_path / "kair/models"
    folder.mkdir(parents=True)
    for label in ("G", "E"):
        torch.save(checkpoint.locate(straight / "models/4.json").load()[label], folder / f"4_{label}.pth")
    assert run("-opt", tiny.write(tmp_path, "kair")) == 0
    said = capsys.readouterr().out
    assert f"iteration 4 of {TOTAL}" in said and "absent   optimizerG, state" in said


def test_command_line_learning_rate_wins_over_the_restored_optimizer(straight, tmp_path):
    assert run("-opt", tmp_path / "straight.json", "--lr", "0.002", "--set", "train.G_scheduler_type=constant",
               "--set", "train.total_iter=10") == 0
    assert final(straight, 10)["optimizerG"]["param_groups"][0]["lr"] == 0.002


def test_a_full_disk_stops_with_a_line_or_warns_and_tries_again(tmp_path, monkeypatch, capsys):
    real, refusals = os.fsync, iter(range(100))

    def full_once(descriptor):
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if ".probe" not in path and path.endswith(".pth.tmp") and next(refusals) == 0:
            raise OSError(28, "No space left on device")
        return real(descriptor)

    monkeypatch.setattr(os, "fsync", full_once)
    assert run("-opt", tiny.write(tmp_path, "warned", checkpoint={"on_save_error": "warn"})) == 0
    assert "warning  checkpoint 2 was not saved: [Errno 28] No space left" in capsys.readouterr().out
    assert [s.iteration for s in checkpoint.find_sets(tmp_path / "warned/models")] == [4, 6, 8, 9]
    refusals = iter(range(100))
    with pytest.raises(checkpoint.CheckpointError, match="No space left on device; older checkpoints are intact"):
        run("-opt", tiny.write(tmp_path, "stopped"))
    assert not list((tmp_path / "stopped/models").iterdir())


# ---------------------------------------------------------------- mistakes


BAD = [
    (["--resume", "none.pth"], "Checkpoint file not found: none.pth; give"),
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
def test_bad_input_is_one_line_and_makes_nothing(tmp_path, monkeypatch, arguments, words):
    path = vrt_file(tmp_path, "bad")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises((options.OptionError, checkpoint.CheckpointError)) as caught:
        run("-opt", path, *arguments)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "bad").exists()


def test_weights_of_another_architecture_are_refused(straight, tmp_path):
    path = tiny.write(tmp_path, "wide", netG={"net_type": "tiny", "width": 16})
    with pytest.raises(checkpoint.CheckpointError, match="of another architecture: .* instead of"):
        run("-opt", path, "--resume", straight / "models/4.json")
    assert not (tmp_path / "wide").exists()


def test_main_prints_one_line_and_exits_with_2(tmp_path):
    """In a process of its own, as a user runs it."""
    done = run_main("-opt", vrt_file(tmp_path, "bad"), "--resume", tmp_path / "none.pth", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == (f"error: Checkpoint file not found: {tmp_path}/none.pth; "
                           "give a file, a commit record or a folder\n")


def test_an_unreadable_frame_ends_the_run_with_its_name_and_keeps_what_was_learnt(tmp_path):
    clip = tmp_path / "video/clip"
    clip.mkdir(parents=True)
    for n in range(4):
        write_png(torch.randint(0, 255, (3, 64, 64), dtype=torch.uint8), str(clip / f"{n:08d}.png"))
    (clip / "00000003.png").write_bytes(b"no image")
    done = run_program(tmp_path, "-opt", vrt_file(tmp_path, "frames", workers=1), "--batch_size", "1",
                       "--set", f"datasets.train.dataroot_gt={tmp_path / 'video'}", "--set", "train.total_iter=50")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "00000003.png" in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert checkpoint.has_checkpoints(tmp_path / "frames/models") == ("iter " in done.stdout)
