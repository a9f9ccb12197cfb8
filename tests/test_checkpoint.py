"""A set exists once its record does; reading verifies first; nothing is ever replaced silently."""

import json
import os
import random
import re
import shutil

import numpy as np
import pytest
import torch

import checkpoint
from checkpoint import CheckpointError, commit, find_last_checkpoint, find_newest, find_sets, locate
from runtime import determinism


def parts(value=0.0):
    return {"G": {"w": torch.full((64,), value), "b": torch.zeros(3)},
            "optimizerG": {"state": {0: {"exp_avg": torch.ones(64)}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
            "state": {"version": checkpoint.VERSION, "iteration": int(value), "list": [1, 2.5, None, "text"]}}


def flip(path, at=0.5):
    data = bytearray(path.read_bytes())
    data[int(len(data) * at)] ^= 4
    path.write_bytes(data)


def test_commit_writes_kairs_names_and_bare_weights(tmp_path):
    commit(tmp_path, 7, parts(7.0), reason="regular")
    assert sorted(os.listdir(tmp_path)) == ["7.json", "7_G.pth", "7_optimizerG.pth", "7_state.pth"]
    weights = torch.load(tmp_path / "7_G.pth", weights_only=True)  # as KAIR's scripts do
    assert list(weights) == ["w", "b"] and torch.equal(weights["w"], torch.full((64,), 7.0))
    record = json.loads((tmp_path / "7.json").read_text())
    assert record["files"]["7_G.pth"]["size"] == (tmp_path / "7_G.pth").stat().st_size
    loaded = find_newest(tmp_path).load()
    assert loaded["state"] == parts(7.0)["state"] and checkpoint.is_optimizer(loaded["optimizerG"])


def test_nine_comes_before_ten_and_other_names_are_ignored(tmp_path):
    for n in (9, 10, 2):
        commit(tmp_path, n, parts(n))
    for name in ("latest_G.pth", "run7_500_G.pth", "99_G.pth.tmp", "11_G.pt", "_G.pth"):
        shutil.copy(tmp_path / "2_G.pth", tmp_path / name)
    (tmp_path / "700_G.pth").mkdir()
    assert [s.iteration for s in find_sets(tmp_path)] == [2, 9, 10]
    assert find_last_checkpoint(tmp_path) == (10, str(tmp_path / "10_G.pth"))
    assert find_last_checkpoint(str(tmp_path), "optimizerG") == (10, str(tmp_path / "10_optimizerG.pth"))
    assert find_last_checkpoint(tmp_path, "E", "pre.pth") == (0, "pre.pth")
    assert find_last_checkpoint(tmp_path / "none", "G") == (0, None)


@pytest.mark.parametrize("damage", ["bit", "empty", "missing", "record"])
def test_a_damaged_set_is_reported_and_the_one_before_is_used(tmp_path, damage):
    """Every kind of damage: tests/test_attacks.py."""
    for n in (1, 2):
        commit(tmp_path, n, parts(n))
    victim = tmp_path / "2_optimizerG.pth"
    if damage == "bit":
        flip(victim)
    elif damage == "empty":
        os.truncate(victim, 0)
    elif damage == "missing":
        victim.unlink()
    elif damage == "record":
        text = (tmp_path / "2.json").read_text()
        (tmp_path / "2.json").write_text(text.replace('"iteration": 2', '"iteration": 3'))
    said = []
    assert find_newest(tmp_path, said.append).iteration == 1
    assert len(said) == 1 and "2" in said[0]
    assert find_last_checkpoint(tmp_path)[0] == 1
    if damage != "record":
        with pytest.raises(CheckpointError, match="is damaged|is empty"):
            locate(tmp_path / "2_G.pth")


def test_kairs_folder_is_read_and_differing_iterations_are_said(tmp_path):
    for n, labels in ((5, ("G", "E", "optimizerG")), (10, ("G", "E", "optimizerG")), (15, ("G",))):
        for label in labels:
            torch.save(parts(n).get(label, parts(n)["G"]), tmp_path / f"{n}_{label}.pth")
    said = []
    found = find_newest(tmp_path, said.append)
    assert found.iteration == 10 and not found.committed
    assert "15" in said[0] and "10" in said[0]
    flip(tmp_path / "10_optimizerG.pth")
    assert find_newest(tmp_path).iteration == 5


def test_kairs_folder_with_weights_only(tmp_path):
    torch.save({"w": torch.zeros(2)}, tmp_path / "300_G.pth")
    assert find_newest(tmp_path).labels == ("G",)


def test_locate_takes_members_records_and_folders_but_no_optimizer(tmp_path):
    models = tmp_path / "run" / "models"
    models.mkdir(parents=True)
    commit(models, 3, parts(3))
    commit(models, 4, parts(4))
    for named, iteration in (("3_G.pth", 3), ("3_state.pth", 3), ("3.json", 3), ("", 4), ("../", 4)):
        assert locate(models / named).iteration == iteration
    torch.save(parts()["optimizerG"], tmp_path / "adam.pth")
    torch.save(parts()["G"], tmp_path / "weights.pth")
    (tmp_path / "8_G.pth").touch()
    (tmp_path / "notes.txt").write_text("hello")
    for named, words in (("run/models/3_optimizerG.pth", "is an optimizer's state"),
                         ("none.pth", "Checkpoint file not found"), ("adam.pth", "is an optimizer's state"),
                         ("8_G.pth", "is empty"), ("weights.pth", "start from them with --init-from"),
                         ("notes.txt", "notes.txt")):
        with pytest.raises(CheckpointError, match=words) as caught:
            locate(tmp_path / named)
        assert "\n" not in str(caught.value)
    (tmp_path / "bare").mkdir()
    with pytest.raises(CheckpointError, match="no usable checkpoint"):
        locate(tmp_path / "bare")


def test_retention_keeps_the_newest_and_drops_superseded_interruptions(tmp_path):
    for n, reason in ((1, "regular"), (2, "regular"), (3, "interrupted")):
        commit(tmp_path, n, parts(n), reason=reason)
    checkpoint.prune(tmp_path, keep_last_n=1)
    assert [s.iteration for s in find_sets(tmp_path)] == [2, 3]  # the newest is never dropped
    commit(tmp_path, 4, parts(4), reason="regular")
    checkpoint.prune(tmp_path, None)
    assert [s.iteration for s in find_sets(tmp_path)] == [2, 4]
    checkpoint.prune(tmp_path, keep_last_n=1, best=2)
    assert [s.iteration for s in find_sets(tmp_path)] == [2, 4]
    checkpoint.prune(tmp_path, keep_last_n=1)
    assert sorted(os.listdir(tmp_path)) == ["4.json", "4_G.pth", "4_optimizerG.pth", "4_state.pth"]


def test_a_disk_holds_as_many_sets_as_are_predicted(tmp_path):
    layout, most = checkpoint.Layout(), 0
    for n in range(1, 7):
        commit(tmp_path, n, parts(n))
        most = max(most, len(find_sets(tmp_path)))
        assert most == checkpoint.num_retained(layout, keep_last_n=2, num_saves=n)
        checkpoint.prune(tmp_path, keep_last_n=2, best=1)
    assert most == 4 and checkpoint.num_retained(layout, None, 6) == 6


def test_putting_away_moves_whole_sets(tmp_path):
    models = tmp_path / "models"
    models.mkdir()
    for n in (1, 2, 3):
        commit(models, n, parts(n))
    first = checkpoint.archive(models, after=1)
    assert [s.iteration for s in find_sets(first)] == [2, 3] and [s.iteration for s in find_sets(models)] == [1]
    assert all(s.fault() is None for s in find_sets(first))
    second = checkpoint.archive(models)
    assert second != first and not list(models.iterdir()) and checkpoint.archive(models) is None


def test_draws_of_a_micro_batch_depend_on_its_numbers_alone():
    def draw(*numbers):
        determinism.seed_micro_batch(*numbers)
        return random.gauss(0, 1), random.random(), np.random.normal(), np.random.rand(), torch.rand(3).tolist()

    first = draw(0, 5, 1)
    random.gauss(0, 1), np.random.normal(), torch.rand(7)  # leaves a cached second value behind
    assert draw(0, 5, 1) == first
    others = [draw(1, 5, 1), draw(0, 6, 1), draw(0, 5, 2), draw(0, 1, 5)]
    assert all(a != b for one in others for a, b in zip(one, first))


@pytest.mark.parametrize("wrap", ["params", "params_ema", "state_dict", "model_state_dict", "model", None])
def test_weights_are_found_below_the_usual_keys_without_prefixes(tmp_path, wrap):
    weights = {"module._orig_mod.a.module.w": torch.ones(2), "_orig_mod.module.b": torch.zeros(1)}
    payload = {wrap: weights, "epoch": 3} if wrap else weights
    assert list(checkpoint.extract_weights(payload, "x")) == ["a.module.w", "b"]


def test_a_file_without_a_network_is_rejected_by_name():
    for payload, words in ((parts()["optimizerG"], "optimizer"), ([1], "holds a list"), ({"a": 1}, "no weights")):
        with pytest.raises(CheckpointError, match=words):
            checkpoint.extract_weights(payload, "x.pth")


# ---------------------------------------------------------------- what lies there besides


def files_in(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("sealed", [True, False], ids=["as now", "as before the seals told the set"])
def test_a_lost_record_is_rebuilt_from_the_seals_of_whole_members(tmp_path, monkeypatch, sealed):
    models = tmp_path / "models"
    models.mkdir()
    if not sealed:
        write = checkpoint.write_durably
        monkeypatch.setattr(checkpoint, "write_durably", lambda path, payload, about=None: write(
            path, payload, {key: value for key, value in (about or {}).items() if key != "set"} or None))
    commit(models, 7, parts(7.0), epoch=3, best=7, metric=0.5)
    if sealed:  # and validated since
        checkpoint.amend_state(models, 7, parts(7.0), checkpoint.Layout(), lambda found: None, best=7, metric=0.25)
    record = json.loads((models / "7.json").read_text())
    (models / "7.json").unlink()
    found = find_newest(models)
    assert found.iteration == 7 and torch.equal(found.load()["G"]["w"], torch.full((64,), 7.0))
    assert checkpoint.clean(models) == ["7.json was missing; rebuilt from the seals of its files, which are intact"]
    again = json.loads((models / "7.json").read_text())
    record["files"]["7_state.pth"].pop("before", None)
    assert again["files"] == record["files"] and find_newest(models).fault() is None
    if sealed:
        assert {key: again[key] for key in checkpoint.ABOUT} == {key: record[key] for key in checkpoint.ABOUT}
    assert checkpoint.clean(models) == []


@pytest.mark.parametrize("damage, says", [
    ("flipped", "20_G.pth: damaged"), ("one missing", "20: .* state is missing"),
    ("of another save", "20: .* of different saves"), ("copied from another iteration", "15_E.pth is G of")])
def test_members_that_make_no_set_are_said_and_put_aside_not_deleted(tmp_path, damage, says):
    models = tmp_path / "models"
    models.mkdir()
    commit(models, 20, parts(20))
    names = ["20_G.pth"]
    if damage == "copied from another iteration":
        shutil.copy(models / "20_G.pth", models / "15_E.pth")
        names = ["15_E.pth"]
    else:
        (models / "20.json").unlink()
        if damage == "flipped":
            flip(models / "20_G.pth", 0.4)
        elif damage == "one missing":
            (models / "20_state.pth").unlink()
        else:
            shutil.copy(models / "20_G.pth", tmp_path / "kept")
            commit(models, 20, parts(20), epoch=5)
            (models / "20.json").unlink()
            os.replace(tmp_path / "kept", models / "20_G.pth")
    before, said = files_in(models), []
    found = find_newest(models, said.append)
    assert len(said) == 1 and re.search(says, said[0]) and checkpoint.has_checkpoints(models)
    assert (found is not None) == (damage == "copied from another iteration")
    (line,) = checkpoint.clean(models)
    archive = checkpoint.Path(line.rpartition(": ")[2])
    assert "archived files that belong to no checkpoint" in line and set(names) <= set(os.listdir(archive))
    assert files_in(models) | files_in(archive) == before


def test_what_a_kill_left_of_a_commit_or_a_removal_is_removed_quietly(tmp_path, monkeypatch):
    models = tmp_path / "models"
    models.mkdir()
    commit(models, 1, parts(1))
    real = os.replace

    def killed(source, target):
        if str(target).endswith("2_state.pth"):
            raise KeyboardInterrupt
        real(source, target)

    for call in ("commit", "remove"):
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint.Path, "unlink", lambda *_, **__: (_ for _ in ()).throw(OSError(5, "no")))
            if call == "commit":
                patch.setattr(os, "replace", killed)
                with pytest.raises(KeyboardInterrupt):
                    commit(models, 2, parts(2))
            else:
                commit(models, 2, parts(2))
                with pytest.raises(OSError):
                    checkpoint.remove(find_newest(models))
                os.unlink(models / "2_G.pth")
        said = []
        assert find_newest(models, said.append).iteration == 1 and said == []
        assert checkpoint.clean(models) == []
        assert sorted(os.listdir(tmp_path)) == ["models"] and len(os.listdir(models)) == 4


def test_files_of_others_beside_the_checkpoints_are_not_touched(tmp_path):
    models = tmp_path / "models"
    models.mkdir()
    for n in (1, 2, 3):
        commit(models, n, parts(n))
    others = {"vgg16.pth": b"not even a torch file", "notes.txt": b"x", "config.json": b"{}", "lpips.pt": b""}
    for name, content in others.items():
        (models / name).write_bytes(content)
    torch.save({"features.0.weight": torch.ones(3)}, models / "resnet50.pth")
    torch.save({"state_dict": {"w": torch.ones(3)}}, models / "pretrained.ckpt")
    others = {name: content for name, content in files_in(models).items() if not name[0].isdigit()}
    said = []
    assert find_newest(models, said.append).iteration == 3 and said == []
    checkpoint.clean(models)
    checkpoint.prune(models, 1)
    commit(models, 4, parts(4))
    archives = [checkpoint.archive(models, after=3), checkpoint.archive(models)]
    assert all(archives) and files_in(models) == others
    assert not checkpoint.has_checkpoints(models)  # a new run may start among them


@pytest.mark.parametrize("left", ["only E", "only an optimizer", "a folder as record", "state without the rest"])
def test_a_folder_with_traces_and_nothing_usable_is_never_taken_for_empty(tmp_path, left):
    if left == "only E":
        torch.save(parts()["G"], tmp_path / "300_E.pth")
    elif left == "only an optimizer":
        torch.save(parts()["optimizerG"], tmp_path / "300_optimizerG.pth")
    else:
        commit(tmp_path, 300, parts())
        (tmp_path / "300.json").unlink()
        (tmp_path / ("300_G.pth" if left == "a folder as record" else "300_optimizerG.pth")).unlink()
        (tmp_path / "300.json").mkdir()
    said = []
    assert find_newest(tmp_path, said.append) is None and "300" in said[0] and checkpoint.has_checkpoints(tmp_path)
    with pytest.raises(CheckpointError, match="no usable checkpoint in this folder .*300"):
        locate(tmp_path)


def test_a_folder_that_cant_be_looked_into_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint.Path, "iterdir", lambda _: (_ for _ in ()).throw(PermissionError(13, "Permission")))
    with pytest.raises(CheckpointError, match="can't be looked into: Permission"):
        find_newest(tmp_path)


def test_files_are_distinguished_where_a_disk_has_one_inode_number_for_all(tmp_path, monkeypatch):
    """Some FUSE and CIFS mounts give each file the same inode number."""
    real = os.stat

    def same_number(path, *args, **kwargs):
        facts = real(path, *args, **kwargs)
        return os.stat_result((facts.st_mode, 7, *facts[2:]))

    for n in (1, 2):
        commit(tmp_path, n, parts(n))
    monkeypatch.setattr(os, "stat", same_number)
    assert [found.iteration for found in find_sets(tmp_path)] == [1, 2]
