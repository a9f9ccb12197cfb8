"""Every script in benchmarks/ runs to its end: one tiny round each."""

import contextlib
import importlib
import io
import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import checkpoint
import main as door
from benchmarks import against_originals
from benchmarks.scaling import KEY
from models import NETWORKS
from models.network_resuneta import ResUNetA
from tests import originals, world
from tests.conftest import OLD_TORCH, ROOT
from tests.programs import print_to


@pytest.fixture
def script(monkeypatch, capsys):
    """Runs a script's main in this process; returns what it printed."""

    monkeypatch.setitem(NETWORKS, "unet", "")  # benchmarks/unet.py adds this row: gone after the test

    def run(name, *words):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, words)])
        importlib.import_module(f"benchmarks.{name}").main()
        return capsys.readouterr().out

    return run


def test_the_page_of_all_benchmarks(monkeypatch, tmp_path, capsys):
    from benchmarks import performance

    monkeypatch.setattr(performance, "launch", lambda words: call(words)[1])
    monkeypatch.setitem(performance.SECTIONS, "Step", ("", [("step_time", [world.recipe("vqvae", tmp_path, "run")], [
        "--steps", "1"])]))
    monkeypatch.setattr(sys, "argv", ["performance.py", "--quick", "--output", str(tmp_path / "page.md")])
    performance.main()
    page = (tmp_path / "page.md").read_text()
    for found in (r"\n    help +[\d.]+ s +[\d.]+ s +0\.\d\d ", r"optimizer +[\d.]+ s",
                  r"bundle +[\d.]+ s +[\d.]+ of torch.save", r"verified bundle .* of torch.load",
                  r"middle +500 samples .* of start", r"metrics +[\d.]+% of the validation"):
        assert re.search(found, page), page
    assert f"`python benchmarks/performance.py --quick --output {tmp_path}/page.md`" in page
    assert [line for line in page.splitlines() if line.startswith("## ")] == [f"## {name}" for name in
                                                                             performance.SECTIONS]


def test_a_quick_try_of_all_benchmarks_does_not_overwrite_the_page(monkeypatch, capsys):
    from benchmarks import performance

    monkeypatch.setattr(performance, "launch", None)
    monkeypatch.setattr(sys, "argv", ["performance.py", "--quick"])
    with pytest.raises(SystemExit) as caught:
        performance.main()
    said = capsys.readouterr().err
    assert caught.value.code == 2 and said.count("\n") == 1 and "name another file with --output" in said


def test_a_run_whose_start_is_measured_ends_before_its_first_step(tmp_path):
    from benchmarks.startup import EndAtFirstStep

    path = world.recipe("vqvae", tmp_path, "run")
    with pytest.raises(SystemExit):
        door.main(["-opt", str(path)], hooks=[EndAtFirstStep()])
    assert (tmp_path / "run/options").exists() and not list((tmp_path / "run/models").iterdir())


@OLD_TORCH
def test_the_step_benchmark_against_the_straightforward_way(script, tmp_path):
    said = script("step_time", world.recipe("vrt", tmp_path, "run"), "--steps", 1, "--against", "straightforward",
                  "--set", "datasets.train.dataloader_batch_size=1", "--set", "train.fix_iter=0")
    assert "after one step in float64 the two differ by" in said and "ratio step" in said and "ratio memory" in said


def test_the_step_benchmark_against_tamings_loop(script, tmp_path):
    said = script("step_time", world.recipe("vqgan", tmp_path, "run"), "--steps", 2, "--against", "straightforward",
                  "--set", "train.lossconfig.disc_start=0")
    assert "ratio step" in said and "ratio backward" in said and "ratio memory" in said


def test_the_scaling_benchmark_of_a_single_process(script, tmp_path, monkeypatch):
    """The measurement of a process; its launcher only starts several of them."""
    monkeypatch.setenv("WORLD_SIZE", "1")
    found = json.loads(script("scaling", world.recipe("vqvae", tmp_path, "run"), "--steps", 1).splitlines()[-1])
    assert found["seconds"] > 0 and found["bytes"] > 0


def rank_of_benchmark(rank, size, port, arguments, output, _):
    """One of several processes of benchmarks/against_ddp.py."""
    world.join(rank, size, port)
    print_to(output)
    from benchmarks import against_ddp

    sys.argv = ["against_ddp.py", *arguments]
    against_ddp.main()


def test_the_benchmark_against_ddp(tmp_path):
    """Two ranks; the launcher only starts them."""
    path = world.recipe("vqgan", tmp_path, "run", train={"accumulate": 4})
    ranks = world.World(tmp_path / "out", 2, path, "--steps", 1, "--set", f"{KEY}=4", "--set", "train.disc_every=1",
                        member=rank_of_benchmark)
    assert ranks.finish() == [0, 0], ranks.report()
    found = json.loads(ranks.said(0).splitlines()[-1])
    assert found["ours"] > 0 and found["usual"] > 0 and found["micro_batches"] == 4


def test_the_u_net_trains_in_the_place_of_the_recipes_network(script, tmp_path, monkeypatch):
    """The loop is the recipe's, and the file's netG is replaced; a later argument sets a key of the new one."""
    monkeypatch.setattr(door, "program", door.main)  # which would end this process
    said = script("unet", "-opt", world.recipe("segmentation", tmp_path, "run"), "--set", "netG.width=4",
                  "--set", "train.total_iter=2")
    assert "G UNet, 30,854 parameters" in said and (tmp_path / "run/models/2_G.pth").exists()


@pytest.mark.parametrize("words, said", [
    (["-opt", "{vqvae}"], "{vqvae}"), (["--seed", "1"], "unet.py"), (["--resume", "{lgt}"], "{lgt}")])
def test_the_u_net_of_another_recipe_is_one_line(script, tmp_path, capsys, monkeypatch, words, said):
    monkeypatch.setattr(door, "program", None)
    places = {"vqvae": world.recipe("vqvae", tmp_path, "run"), "lgt": tmp_path / "lgt.pt"}
    lgt = dict.fromkeys(["task", "datasets", "netG", "train"]) | {"model": "lgt", "path": {"models": str(tmp_path)}}
    state = {"G": {"w": torch.zeros(1)}, "state": {"iteration": 1, "config": lgt}}
    checkpoint.save_bundle(places["lgt"], state, {"iteration": 1})
    with pytest.raises(SystemExit) as caught:
        script("unet", *(word.format(**places) for word in words))
    assert caught.value.code == 2 and capsys.readouterr().err == (
        f"error: {said.format(**places)}: is for the segmentation recipe: -opt options/train_segmentation.json\n")


def test_the_u_net_is_as_large_as_its_page_says():
    from benchmarks import unet

    for network in (unet.UNet(), ResUNetA(depth=4, width=8, image_size=96)):
        assert f"{sum(p.numel() for p in network.parameters()):,}" in unet.__doc__
    assert unet.UNet(num_classes=3)(torch.zeros(2, 3, 16, 24)).shape == (2, 3, 16, 24)


@pytest.mark.slow
def test_the_comparison_of_restarts(script, tmp_path):
    """One peer, for the others need packages: two kills, two restarts, and a count of what they cost."""
    said = script("resume_peers", "--peers", "plain", "composer", "--trials", 1, "--steps", 20, "--folder", tmp_path)
    plain, composer = said.splitlines()[-2:]
    row = r"\| plain \| [01] of 1 \| [\d.e+-]+ \| [01] \| \d+ \| [\d.]+ \| \d+ \| [\d.]+ s \| \d+ ms \|"
    assert re.fullmatch(row, plain)
    assert composer.startswith("| composer | not run: ")


# ---------------------------------------------------------------- against_originals.py


@pytest.mark.parametrize("kind", ["kair", "taming"])
def test_the_original_and_ours_part_by_rounding_only(kind, monkeypatch, capsys):
    """Where a checkout of the original is named: a few steps in float64, and one in float32."""
    path = os.environ.get(f"PERDURE_{kind.upper()}")
    if not path:
        pytest.skip(f"set PERDURE_{kind.upper()} to a checkout of the original program to run this test")
    monkeypatch.setattr(sys, "argv", ["against_originals.py", f"--{kind}", path, "--steps", "1", "--double", "6"])
    assert against_originals.main() == 0, capsys.readouterr().out
    assert "float64, 6 steps: losses differ by" in capsys.readouterr().out


def checkout(folder, source):
    """A folder that passes for KAIR, whose file of the model is this."""
    for name in originals.KNOWN["kair"]["files"]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("")
    (folder / "models/model_vrt.py").write_text(source)
    return folder


def test_the_originals_modules_hide_ours_only_while_they_are_imported(tmp_path):
    from models import model_vrt

    root = checkout(tmp_path, "import cv2, models.network_vrt\nname = cv2.INTER, models.network_vrt.__file__")
    with originals.original("kair", root):
        theirs = importlib.import_module("models.model_vrt")
    assert theirs.name[1] == str(root / "models/network_vrt.py") and sys.modules["models.model_vrt"] is model_vrt
    assert "cv2" not in sys.modules and "utils" not in sys.modules and str(root) not in sys.path


@pytest.mark.parametrize("source, message", [
    (None, "is not a checkout of kair: it has no models/model_vrt.py"),
    ("import no_such_package.of_any", "needs the package no_such_package: pip install no_such_package")])
def test_a_folder_without_the_original_is_refused_in_one_line(source, message, tmp_path, monkeypatch, capsys):
    if source:
        checkout(tmp_path, source)
    monkeypatch.setattr(sys, "argv", ["against_originals.py", "--kair", str(tmp_path)])
    monkeypatch.setattr(originals, "importlib", SimpleNamespace(
        import_module=lambda name: importlib.import_module("models.model_vrt")))
    assert against_originals.main() == 2
    assert capsys.readouterr().err == f"--kair {tmp_path}: {message}\n"


@pytest.mark.parametrize("size", ["tiny", "small", "middle"])
@pytest.mark.parametrize("kind", ["kair", "taming"])
def test_every_size_beside_the_originals_fits_the_option_files(kind, size):
    args = SimpleNamespace(kind=kind, speed=size, steps=1, double=1, changes={})
    sides = against_originals.Sides(args, [])
    assert sides.batch(1)["H"].shape[0] == sides.opt["datasets"]["train"]["dataloader_batch_size"]
    for changes in (originals.KNOWN[kind]["switches"], *originals.KNOWN[kind]["phases"].values()):
        against_originals.options_of(args, changes)


def test_the_differences_of_two_curves_and_of_two_states():
    assert against_originals.relative(0.0, 0.0) == 0 and against_originals.relative(1.0, 2.0) == 0.5
    a = {"G.small": torch.tensor([1e-3, 0]), "G.large": torch.tensor([100.0, 1])}
    b = {"G.small": torch.tensor([1e-3, 1e-4]), "G.large": torch.tensor([100.0, 2])}
    far, name = against_originals.worst_tensor(a, b)
    assert name == "G.small" and far == pytest.approx(0.1)  # of the tensor's largest value, not of each number


# ---------------------------------------------------------------- gpu.py


def test_the_device_check_says_that_there_is_no_device(capsys, monkeypatch, tmp_path):
    """The script starts the program in the checkout; the program ends with 2."""
    from benchmarks import gpu

    (tmp_path / "python").write_text('#!/bin/sh\necho "$PWD $PYTHONUNBUFFERED $*"\nexit 3\n')
    (tmp_path / "python").chmod(0o755)
    done = subprocess.run(["bash", ROOT / "benchmarks/gpu.sh", "fit", "--cpu"], capture_output=True, text=True,
                          cwd=tmp_path, env={"PATH": "/usr/bin:/bin", "PYTHON": str(tmp_path / "python")})
    assert (done.returncode, done.stdout) == (3, f"{ROOT} 1 benchmarks/gpu.py fit --cpu\n"), done.stderr
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2 and capsys.readouterr().out.startswith("no CUDA device here")


@pytest.fixture
def gpu(monkeypatch):
    """The script, whose programs run as calls, on the smallest recipes."""
    from benchmarks import gpu

    monkeypatch.setattr(gpu, "launch", call)
    return gpu


def call(words, seconds=0):
    """A program of the repository in this process."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        if words[0] == "main.py":
            return door.main([str(word) for word in words[1:]]), said.getvalue()
        argv, sys.argv = sys.argv, [str(word) for word in words]
        try:
            importlib.import_module(f"benchmarks.{words[0].split('/')[1].removesuffix('.py')}").main()
        finally:
            sys.argv = argv
        return 0, said.getvalue()


def test_every_section_that_has_a_cpu_form_runs(gpu, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "ThreadPoolExecutor", lambda count: contextlib.nullcontext(SimpleNamespace(map=map)))
    monkeypatch.setattr(gpu, "RECIPES", {**gpu.RECIPES, "vqvae": [world.recipe("vqvae", tmp_path, "run")]})
    sections = [name for name in gpu.SECTIONS if name not in ("step", "world", "prove")]  # tests/test_keeping.py proves
    code = gpu.main(["--cpu", *sections, "--recipes", "vqvae"])
    said = capsys.readouterr().out
    assert code == 0 and "everything required holds" in said, said
    for name in ("optimizer", "snapshot", "attention", "fit", "waits", "amp", "saves"):
        assert f"\n{name} " in said


@pytest.mark.slow
def test_every_recipe_trains_alone(gpu, tmp_path):
    """A later stage does not wait for the weights of an earlier one."""
    machine = gpu.Machine(False, list(gpu.RECIPES), 0)
    for name in gpu.RECIPES:
        code, said = gpu.run_main(name, gpu.short_run(machine, str(tmp_path), name, 4))
        assert code == 0, said


def test_a_finding_that_does_not_hold_fails_and_an_aim_that_is_missed_does_not(gpu, monkeypatch, capsys):
    def section(machine):
        yield gpu.Finding("one", "holds", "1", True)
        yield gpu.Finding("one", "is aimed at", "2", False, aim=True)
        yield gpu.Finding("one", "informs", "3")

    def broken(machine):
        yield gpu.Finding("two", "does not", "4", False)
        raise RuntimeError("no such thing")

    monkeypatch.setattr(gpu, "SECTIONS", {"one": section, "two": broken})
    assert gpu.main(["--cpu", "one"]) == 0 and "missed" in capsys.readouterr().out
    assert gpu.main(["--cpu"]) == 1
    said = capsys.readouterr().out
    assert "FAILS" in said and "no such thing" in said and "2 of 5 findings fail" in said


def test_collectives_are_called_in_a_world_of_one(gpu):
    (finding,) = gpu.world(gpu.Machine(False, ["segmentation"], 0))
    assert finding.holds and "gloo" in finding.value and not torch.distributed.is_initialized()
