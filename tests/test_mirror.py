"""What follows a save in the background: a copy in a second folder, and a command; both leave the training alone."""

import filecmp
import json
import os
import shutil

import pytest

import checkpoint
from checkpoint import CheckpointError
from options import OptionError
from runtime import saves
from tests import tiny
from tests.runs import assert_equal_runs, final, run, run_until, straight_and_stopped

TOTAL = 9
LAYOUTS = {"split": {"keep_last_n": 2}, "bundle": {"layout": "bundle", "keep_last_n": 2},
           "latest only": {"layout": "bundle", "name": None}}

pytestmark = pytest.mark.usefixtures("tiny_tables")


def write(folder, name, layout="split", **over):
    """A run in folder/fast/NAME whose mirror is folder/slow; "one" has none."""
    path = {"root": str(folder / "fast"), **({"mirror": str(folder / "slow")} if name != "one" else {})}
    return tiny.write(folder, name, path=path, checkpoint={**LAYOUTS[layout], **over})


def mirror_of(folder, name="two"):
    return folder / "slow" / name / "models"


def assert_equal_folders(one, two):
    names = [sorted(name for name in os.listdir(place) if name != ".lock") for place in (one, two)]
    assert names[0] == names[1] and filecmp.cmpfiles(one, two, names[0], shallow=False)[0] == names[0]


@pytest.mark.parametrize("background", [False, True], ids=["waiting", "in background"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_mirror_holds_the_same_files_and_changes_no_bit(tmp_path, layout, background):
    """The metrics of validations, retention, the links latest and best among them, over stops and resumes."""
    straight_and_stopped(lambda name, _: write(tmp_path, name, layout, **{"async": background}), [3, 5])
    assert_equal_runs(tmp_path / "fast/one", tmp_path / "fast/two", TOTAL)
    assert_equal_folders(tmp_path / "fast/two/models", mirror_of(tmp_path))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_whose_disk_was_wiped_resumes_from_the_mirror(tmp_path, layout, capsys):
    def launch(stop, *words):
        run_until(stop, *words)
        if stop:
            shutil.rmtree(tmp_path / "fast/two")

    straight_and_stopped(lambda name, _: write(tmp_path, name, layout), [5, 7], launch)
    said = capsys.readouterr().out
    assert f"resume   from {mirror_of(tmp_path)}" in said
    assert f"copied   checkpoint 7 from {mirror_of(tmp_path)}" in said
    one, two = (final(tmp_path / "fast" / name, TOTAL) for name in ("one", "two"))
    assert tiny.torch.equal(one["G"]["body.0.weight"], two["G"]["body.0.weight"])
    assert one["state"]["history"] == two["state"]["history"]
    assert_equal_folders(tmp_path / "fast/two/models", mirror_of(tmp_path))


def test_a_finished_run_gets_its_lost_checkpoints_back(tmp_path, capsys):
    path = write(tmp_path, "two", keep_last_n=None)
    assert run("-opt", path) == 0
    kept = {found.iteration for found in checkpoint.find_sets(mirror_of(tmp_path))}
    shutil.rmtree(tmp_path / "fast/two/models")
    capsys.readouterr()
    assert run("-opt", path) == 0
    said = capsys.readouterr().out
    assert f"copied   checkpoint 9 from {mirror_of(tmp_path)}" in said and "finished at iteration 9 of 9" in said
    assert final(tmp_path / "fast/two", TOTAL)
    assert {found.iteration for found in checkpoint.find_sets(mirror_of(tmp_path))} == kept


def test_the_newest_intact_one_of_both_folders_counts(tmp_path, capsys):
    path = write(tmp_path, "two")
    run_until(4, "-opt", path)
    kept = shutil.copytree(mirror_of(tmp_path), tmp_path / "older")
    run_until(6, "-opt", path)
    damaged = tmp_path / "fast/two/models/6_G.pth"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    run_until(7, "-opt", path)
    said = capsys.readouterr().out
    assert "warning  checkpoint 6 is not used: 6_G.pth" in said and "has iteration 4, the mirror has 6" in said
    assert checkpoint.locate(damaged).iteration == 6  # mended from the mirror
    shutil.rmtree(mirror_of(tmp_path))
    shutil.copytree(kept, mirror_of(tmp_path))
    assert run("-opt", path) == 0
    said = capsys.readouterr().out
    assert "the mirror has" not in said and "iteration 7 of 9" in said  # never an older one
    run_until(None, "-opt", write(tmp_path, "one"))
    assert_equal_runs(tmp_path / "fast/one", tmp_path / "fast/two", TOTAL)


def test_going_back_and_starting_over_leave_no_newer_copy(tmp_path):
    path = write(tmp_path, "two", keep_last_n=None)
    assert run("-opt", path) == 0
    run_until(5, "-opt", path, "--resume", tmp_path / "fast/two/models/4.json")
    assert [found.iteration for found in checkpoint.find_sets(mirror_of(tmp_path))][-1] == 5
    run_until(1, "-opt", path, "--fresh")
    assert [found.iteration for found in checkpoint.find_sets(mirror_of(tmp_path))] == [1]


def test_a_copy_that_fails_is_a_warning_and_the_next_save_tries_again(tmp_path, monkeypatch, capsys):
    real, failed = checkpoint.copy_durably, []

    def full_once(source, target):
        if not failed:
            failed.append(target)
            raise OSError(28, "No space left on device")
        real(source, target)

    def damaged(source, target):
        real(source, target)
        target.write_bytes(target.read_bytes()[:-1])

    monkeypatch.setattr(checkpoint, "copy_durably", full_once)
    assert run("-opt", write(tmp_path, "two")) == 0
    assert capsys.readouterr().out.count("warning  path.mirror: checkpoint 2 was not copied: [Errno 28] No space") == 1
    assert_equal_folders(tmp_path / "fast/two/models", mirror_of(tmp_path))
    monkeypatch.setattr(checkpoint, "copy_durably", damaged)
    assert run("-opt", write(tmp_path, "other")) == 0
    assert "was not copied" in capsys.readouterr().out
    assert os.listdir(mirror_of(tmp_path, "other")) == [".lock"]


@pytest.mark.parametrize("event", ["record", "state"])
def test_a_set_that_is_rewritten_while_it_is_copied_is_copied_again(tmp_path, monkeypatch, event):
    """The copy begins before the amendment writes its record, or between that and its state."""
    layout, real, copy = checkpoint.Layout(), os.replace, checkpoint.copy_durably
    parts = {"G": {"w": tiny.torch.ones(1)}, "state": {"iteration": 1}}
    (tmp_path / "one").mkdir()
    checkpoint.commit(tmp_path / "one", 1, parts, layout)
    mirror = checkpoint.Saver(tmp_path / "two", layout)
    amended = {**parts, "state": {"iteration": 1, "metric": [1.0] * 99}}
    held = []  # what is left to do of the amendment

    def replace(source, target):
        if event == "state" and str(target).endswith("one/1_state.pth"):
            held.append((source, target))
        else:
            real(source, target)

    def meanwhile(source, target):
        if event == "record" and not held:
            held.append(checkpoint.amend_state(tmp_path / "one", 1, amended, layout, lambda found: None))
        copy(source, target)

    with monkeypatch.context() as patch:
        if event == "state":
            patch.setattr(os, "replace", replace)
            checkpoint.amend_state(tmp_path / "one", 1, amended, layout, lambda found: None)
            patch.setattr(checkpoint.time, "sleep", lambda seconds: real(*held[0]))
        patch.setattr(checkpoint, "copy_durably", meanwhile)
        mirror.copy_from(tmp_path / "one", None)
    assert held and checkpoint.find_newest(tmp_path / "two").load()["state"]["metric"] == [1.0] * 99


@pytest.mark.parametrize("count", [1, 3, 5])
def test_a_copy_that_is_cut_off_is_no_set(tmp_path, monkeypatch, count):
    """As by a kill before the count-th file gets its name: the commit record is the last of them."""
    assert run("-opt", tiny.write(tmp_path, train={"total_iter": 3, "checkpoint_test": 0})) == 0
    found, real, left = checkpoint.locate(tmp_path / "run/models/2.json"), os.replace, iter(range(count - 1, -1, -1))

    def cut_off(*names):
        if next(left) == 0:
            raise KeyboardInterrupt
        real(*names)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", cut_off)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.copy_set(found, tmp_path / "copy")
    assert not (tmp_path / "copy/2.json").exists()
    checkpoint.copy_set(found, tmp_path / "copy")
    assert checkpoint.find_newest(tmp_path / "copy").fault() is None
    assert sorted(os.listdir(tmp_path / "copy")) == sorted([path.name for path in found.files.values()] + ["2.json"])


@pytest.mark.parametrize("mirror, kind, reason", [
    (".", OptionError, "run.json: path.mirror: .* leads to the run's own folder"),
    ("", OptionError, "run.json: path.mirror: is empty"),
    ("run.json", CheckpointError, "path.mirror can't be written: Not a directory"),
    ("/proc/none", CheckpointError, "path.mirror can't be written: No such file")])
def test_a_mirror_that_cannot_be_is_one_line(tmp_path, mirror, kind, reason):
    with pytest.raises(kind, match=reason):
        run("-opt", tiny.write(tmp_path, path={"root": str(tmp_path), "mirror": mirror and str(tmp_path / mirror)}))
    assert os.listdir(tmp_path) == ["run.json"]


# ---------------------------------------------------------------- checkpoint.after_save


def status(folder):
    return json.loads((folder / "run/log/status.json").read_text())["after_save"]


@pytest.mark.parametrize("layout", ["split", "bundle"])
@pytest.mark.parametrize("shell", [False, True], ids=["words", "line"])
def test_a_command_gets_the_files_of_each_set_the_record_last(tmp_path, layout, shell, capsys):
    script = tmp_path / "script.sh"
    script.write_text(f'for file; do test -f "$file" && echo "$file"; done >> {tmp_path}/seen; echo spoken')
    command = f"sh {script}" if shell else ["sh", str(script)]
    keep = {"layout": layout, "after_save": command, "name": "it{iter}.pt"}
    assert run("-opt", tiny.write(tmp_path, checkpoint=keep, train={"total_iter": 2, "checkpoint_test": 0})) == 0
    names = ["2_G.pth", "2_E.pth", "2_optimizerG.pth", "2_state.pth", "2.json"] if layout == "split" else ["it2.pt"]
    lines = (tmp_path / "seen").read_text().splitlines()
    assert lines[:len(names)] == [str(tmp_path / "run/models" / name) for name in names]
    assert status(tmp_path)["iteration"] == 2 and status(tmp_path)["code"] == 0
    assert "spoken" in (tmp_path / "run/log/after_save.txt").read_text() and "after_save" not in capsys.readouterr().out


@pytest.mark.parametrize("command, reason", [("exit 3;", "3"), (["./program"], "No such file or directory: ./program")])
def test_a_command_that_fails_is_a_warning_and_in_the_report(tmp_path, command, reason, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "program").write_text("#!/no/interpreter")
    (tmp_path / "program").chmod(0o755)
    path = tiny.write(tmp_path, checkpoint={"after_save": command}, train={"total_iter": 2})
    assert run("-opt", path) == 0
    assert f"warning  checkpoint.after_save failed for checkpoint 2 ({reason}" in capsys.readouterr().out
    assert str(status(tmp_path)["code"]).startswith(reason)


@pytest.mark.parametrize("command, reason", [("", "is empty"), (" ", "is empty"), ([], "is empty"),
                                             (["/no/program", "x"], "no program /no/program is found")])
def test_a_command_that_cannot_be_is_one_line(tmp_path, command, reason):
    with pytest.raises(OptionError, match=f"run.json: checkpoint.after_save: {reason}; give a line"):
        run("-opt", tiny.write(tmp_path, checkpoint={"after_save": command}))
    assert not (tmp_path / "run").exists()


def test_a_command_holds_up_neither_training_nor_for_ever_its_end(tmp_path, monkeypatch, capsys):
    """It hangs in the first save, and the newest one that waits is given up with it: it is not started again."""
    monkeypatch.setattr(saves, "FOLLOW_SECONDS", 0.1)
    monkeypatch.setattr(saves, "SAY_AFTER", 0.0)
    command = f"echo >> {tmp_path}/begun; until [ -f {tmp_path}/end ]; do sleep 0.1; done; true"
    try:
        assert run("-opt", tiny.write(tmp_path, checkpoint={"after_save": command})) == 0
    finally:
        (tmp_path / "end").touch()
    said = capsys.readouterr().out
    assert said.count("warning  checkpoint.after_save has not ended in 0 s, and is left to itself") == 1
    assert said.count("waiting  for checkpoint.after_save, at most 0 s") == 1
    assert (tmp_path / "begun").read_text() == "\n"


def test_a_command_that_is_stored_in_a_checkpoint_is_not_run(tmp_path):
    """Options that come from a checkpoint may be another person's."""
    path = tiny.write(tmp_path, checkpoint={"after_save": f"touch {tmp_path}/ran;"}, train={"total_iter": 2})
    assert run("-opt", path) == 0
    (tmp_path / "ran").unlink()
    assert run("--resume", tmp_path / "run/models", "--set", "train.total_iter=3") == 0
    assert final(tmp_path / "run", 3) and not (tmp_path / "ran").exists()
