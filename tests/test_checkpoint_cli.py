"""`python -m checkpoint`: what people ask about a file, answered on the console and by the exit code."""

import os
import shutil

import pytest
import torch

import checkpoint
from checkpoint import commit, find_newest, locate
from commands.checkpoints import main
from tests import tiny
from tests.conftest import write_json
from tests.runs import differing, run
from tests.test_checkpoint import flip

pytestmark = pytest.mark.usefixtures("tiny_tables")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two equal runs in different layouts and one with another seed."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        tiny.add_rows(patch)
        for name, keep, seed in (("split", {}, 0), ("bundle", {"layout": "bundle", "keep_last_n": 2}, 0), ("c", {}, 1)):
            tree = tiny.options(folder, name, checkpoint=keep, train={"manual_seed": seed})
            assert run("-opt", write_json(folder / f"{name}.json", tree)) == 0
    return folder


def ask(capsys, *words):
    """Exit code and lines of a command."""
    code = main([str(word) for word in words])
    said = capsys.readouterr()
    return code, (said.out + said.err).splitlines()


def test_inspect_tells_what_is_in_a_folder_and_in_a_file(runs, capsys):
    code, lines = ask(capsys, "inspect", runs / "bundle")
    assert code == 0 and len(lines) == 2
    assert lines[-1].startswith("epoch_0004.pt") and "iteration        9" in lines[-1] and "best, latest" in lines[-1]
    code, lines = ask(capsys, "inspect", runs / "bundle/models/latest.pt", "--tensors", "--options")
    text = "\n".join(lines)
    for part in ("a bundle, sealed and good", "iteration   9", "epochs done 4", "body.4.weight  (3, 8, 3, 3) float32",
                 '"net_type": "tiny"', "sampler_state", "optimizerG"):
        assert part in text
    code, lines = ask(capsys, "inspect", runs / "split/models/6_E.pth")
    assert code == 0 and "E of iteration 6, sealed and good" in lines[0]


def test_verify_says_good_or_what_is_wrong(runs, tmp_path, capsys):
    for layout, victim in (("split", "6_optimizerG.pth"), ("bundle", "epoch_0003.pt")):
        folder = tmp_path / layout
        shutil.copytree(runs / layout, folder)
        count = len(checkpoint.find_sets(folder / "models"))
        assert ask(capsys, "verify", folder)[0] == 0
        flip(folder / "models" / victim)
        (folder / "models/10_G.pth.tmp").touch()
        code, lines = ask(capsys, "verify", folder)
        assert code == 1 and lines[-1] == f"{count} sets, 1 bad"
        assert sum(victim in line and "damaged" in line and line.startswith("bad") for line in lines) == 1
        assert any(line.startswith("note  10_G.pth.tmp: left by an interrupted save") for line in lines)
        assert ask(capsys, "verify", folder / "models" / victim)[0] == 1
        assert ask(capsys, "verify", find_newest(folder / "models").path)[0] == 0
    assert ask(capsys, "verify", tmp_path / "none")[0] == 2
    (tmp_path / "empty").mkdir()
    code, lines = ask(capsys, "verify", tmp_path / "empty")
    assert code == 2 and lines == [f"error: {tmp_path / 'empty'}: no checkpoint in this folder"]


def test_compare_names_tensors_and_options_that_differ(runs, capsys):
    code, lines = ask(capsys, "compare", runs / "split", runs / "bundle")
    assert code == 0 and lines[-1].endswith("all equal, bit for bit")
    assert "option   checkpoint.layout: 'split' and 'bundle'" in lines
    code, lines = ask(capsys, "compare", runs / "split/models/9.json", runs / "c/models/9.json")
    assert code == 1 and "option   train.manual_seed: 0 and 1" in lines
    assert any(line.startswith("differs  G.body.0.weight: 216 of 216 values, by at most") for line in lines)
    code, lines = ask(capsys, "compare", runs / "split/models/9_G.pth", runs / "split/models/9_E.pth")
    assert code == 1 and lines[0].startswith("differs  weights.body.0.weight")
    assert ask(capsys, "compare", runs / "split/models/9_G.pth", runs / "bundle/models/none.pt")[0] == 2


def test_where_a_run_was_resumed_from_is_listed_and_not_counted(runs, tmp_path, capsys):
    path, source = tiny.write(tmp_path, "moved"), runs / "split/models/6.json"
    assert run("-opt", path, "--resume", source) == 0
    capsys.readouterr()
    code, lines = ask(capsys, "compare", runs / "split", tmp_path / "moved")
    assert code == 0 and lines[-1].endswith("all equal, bit for bit"), lines
    assert f"option   resumed_from: None and {str(source)!r}" in lines


def test_compare_sees_a_single_bit(runs, tmp_path, capsys):
    weights = checkpoint.load_file(runs / "split/models/9_G.pth")
    torch.save(weights, tmp_path / "a.pth")
    weights["body.0.bias"].view(torch.int32)[3] ^= 1
    torch.save(weights, tmp_path / "b.pth")
    code, lines = ask(capsys, "compare", tmp_path / "a.pth", tmp_path / "b.pth")
    assert code == 1 and lines[0].startswith("differs  G.body.0.bias: 1 of 8 values")
    assert lines[-1].endswith("tensors compared, 1 difference")
    assert ask(capsys, "compare", tmp_path / "a.pth", tmp_path / "a.pth")[0] == 0


def test_convert_makes_what_others_read_and_touches_nothing(runs, tmp_path, capsys):
    bundle = runs / "bundle/models/latest.pt"
    assert ask(capsys, "convert", bundle, "--to", "kair", tmp_path / "kair")[0] == 0
    assert sorted(os.listdir(tmp_path / "kair")) == ["9_E.pth", "9_G.pth", "9_optimizerG.pth"]
    assert checkpoint.find_last_checkpoint(tmp_path / "kair") == (9, str(tmp_path / "kair/9_G.pth"))
    assert not locate(tmp_path / "kair").committed
    assert ask(capsys, "convert", runs / "split", "--to", "bundle", tmp_path / "all.pt")[0] == 0
    assert differing(locate(tmp_path / "all.pt").load(), locate(runs / "split").load()) == []
    assert ask(capsys, "convert", tmp_path / "kair", "--to", "bundle", tmp_path / "kair.pt")[0] == 0
    assert locate(tmp_path / "kair.pt").iteration == 9
    for words, label in (((), "E"), (("--network", "G"), "G")):
        out = tmp_path / f"weights_{label}.pth"
        assert ask(capsys, "convert", bundle, "--to", "weights", out, *words)[0] == 0
        weights = torch.load(out, weights_only=True)
        assert differing(weights, locate(bundle).load()[label]) == []
    before = (tmp_path / "all.pt").read_bytes()
    for kind, out in (("bundle", "all.pt"), ("weights", "weights_G.pth"), ("kair", "kair")):
        code, lines = ask(capsys, "convert", bundle, "--to", kind, tmp_path / out)
        assert code == 2 and "exists already; name another" in lines[-1]
    assert (tmp_path / "all.pt").read_bytes() == before
    code, lines = ask(capsys, "convert", bundle, "--to", "weights", tmp_path / "x.pth", "--network", "D")
    assert code == 2 and lines == [f"error: {bundle}: holds no network D; valid: G, E"]


def test_a_bundle_made_of_kairs_folder_resumes_and_says_what_it_lacks(runs, tmp_path, capsys):
    assert ask(capsys, "convert", runs / "split", "--to", "kair", tmp_path / "kair")[0] == 0
    assert ask(capsys, "convert", tmp_path / "kair", "--to", "bundle", tmp_path / "kair.pt")[0] == 0
    path = tiny.write(tmp_path, "two", train={"total_iter": 10})
    assert run("-opt", path, "--resume", tmp_path / "kair.pt") == 0
    said = capsys.readouterr().out
    assert "iteration 9 of 10" in said and "absent   sampler_state" in said


def test_a_damaged_file_is_never_converted(tmp_path, capsys):
    from tests.test_checkpoint import parts

    commit(tmp_path, 1, parts(1))
    flip(tmp_path / "1_G.pth")
    for source in (tmp_path / "1.json", tmp_path / "1_G.pth"):
        code, lines = ask(capsys, "convert", source, "--to", "weights", tmp_path / "out.pth")
        assert code == 2 and "damaged" in lines[-1] and not (tmp_path / "out.pth").exists()
