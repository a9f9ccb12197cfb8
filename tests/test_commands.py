"""Every command of README and docs/, as it is printed and in its order, in one checkout; runs are only shortened.

Placeholders such as FOLDER and CLIPS are drawn. The commands take several minutes together:

    python -m pytest -m slow -n 0 -s tests/test_commands.py
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from data.image_files import encode
from tests.conftest import ROOT
from tests.test_docs import PAGES

LEFT_OUT = {  # commands that this test can't run, and what tests them
    r"^python3 -m venv|^git clone|^source ": "sets up an environment: .ci/run does it",
    r"pip install": "no network in tests",
    r"^sbatch": "tests/test_distributed.py has a Slurm of its own",
    r"-m pytest|ruff check|^bash benchmarks/gpu.sh|tests\.mutate|checkpoints/write": "tests, and what tests run",
    r"their-program": "tests/test_safetensors.py",
    r"--kair|--taming": "the original programs are not here; tests/test_benchmarks.py",
}
SHORT = ["train.total_epochs=null", "train.total_iter=2", "train.save_interval=null", "train.eval_interval=null",
         "train.checkpoint_save=1", "train.checkpoint_test=2", "train.checkpoint_print=1"]
FAILS = {  # commands that must end with one line about data that is not here
    "options/vrt/001_8gb.json": "trainsets/REDS",
}


def commands():
    """(page, command) of every indented line that begins like a command; comments after three spaces are cut off.

    A paragraph that makes files for the commands below, or is a loop, is one command.
    """
    for page in PAGES:
        if page.name == "CONTRIBUTING.md":
            continue
        text = page.read_text().replace("\\\n", " ")
        text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
        made = r"    (?:[A-Z]=|cat >|ls|mkdir|for )[^\n]*\n(?:    .*\n)*"
        for makes, line in re.findall(rf"^({made})|^    ( *\S.*)$", text, re.MULTILINE):
            if makes:
                yield page.name, re.sub("^    ", "", makes, flags=re.MULTILINE)
            line = re.sub(r"(?<=\S)\s{3,}.*$|\s+# .*$", "", re.sub(r"  +(?=--)", " ", line.strip()))
            if re.match(r"(\.venv/bin/|python|torchrun|sbatch|bash|git|pip|source|[A-Z_]+=\S* python)", line):
                yield page.name, line


def shortened(command):
    """The command with a run of two steps; a replayed step is the second; `kill -9` is left out."""
    if not re.search(r"main\.py|unet\.py", command):
        for shown, here in (("experiments/one experiments/two", "experiments/train_vrt experiments/my_video"),
                            ("a/models/300.json b/models/300.json", "a/train_vrt b/train_vrt"),
                            (".json --processes 1 2", ".json --steps 1 --processes 1 2"),
                            ("step_time.py options/train_vrt.json", "step_time.py options/train_vrt.json --steps 1"),
                            ("performance.py", "performance.py --quick --output PAGE")):
            command = command.replace(shown, here)
        return command
    command = re.sub(r" & sleep.*", "", re.sub(r"--replay \d+", "--replay 2", command))
    more = SHORT if not re.search("prove-resume|--resume", command) else []
    for placeholder, path in (("--image_path DIR", "--image_path DIR/images"), ("--gt_path DIR", "--gt_path DIR/masks"),
                              ("--image_size 256", "--image_size 32"), (" 24 60 120;", " 24;")):
        command = command.replace(placeholder, path)
    return re.sub(r"(?:main|unet)\.py .*", lambda found: " ".join([found[0], *(f"--set {word}" for word in more)]),
                  command)


def draw(path, number, size=64):
    """A picture that no other number has."""
    wave = torch.linspace(0, 3 + number % 7, size)
    picture = torch.stack([torch.outer(wave.sin(), wave.cos()) * 0.5 + 0.5, wave.expand(size, size) / 10,
                           torch.full((size, size), number % 10 / 10)])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode((picture * 255).byte()))


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the files under version control, with what the placeholders of the pages name."""
    folder = tmp_path_factory.mktemp("checkout") / "perdure"
    for name in subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    for number in range(16):
        for place in ("FOLDER", "PICTURES", "DIR/images"):
            draw(folder / place / f"{number:02d}.png", number)
        draw(folder / "FRAMES" / f"{number:04d}.png", number, 32)
        for split in ("train", "test"):
            for style in ("cgi", "ink", "dusk"):
                draw(folder / "STYLES" / split / style / f"{number:02d}.png", number + len(style), 128)
            for clip in ("a", "b"):
                draw(folder / "CLIPS" / split / clip / f"{number:04d}.png", number, 128)
        draw(folder / "trainsets/DVD/train_GT/clip" / f"{number:05d}.png", number)
        mask = torch.zeros(1, 64, 64)
        mask[:, 8 + number : 40] = 1
        (folder / "DIR/masks").mkdir(exist_ok=True)
        (folder / "DIR/masks" / f"{number:02d}.png").write_bytes(encode((mask * 255).byte()))
    if shutil.which("ffmpeg"):
        for name in ("clip.mp4", "CLIP.mp4"):
            subprocess.run(["ffmpeg", "-v", "error", "-f", "lavfi", "-i", "testsrc=size=48x32:rate=5:duration=2", "-f",
                            "lavfi", "-i", "sine=duration=2", "-pix_fmt", "yuv420p", name], cwd=folder, check=True)
    recipe = re.findall(r"```(?:python|json)\n(.*?)```", (ROOT / "docs/recipe.md").read_text(), re.DOTALL)
    places = "models/network_smoother.py", "data/noisy.py", None, "options/train_smoother.json"
    for fenced, name in zip(recipe, places):
        if name:
            (folder / name).write_text(fenced)
        else:
            for table, row in zip(("models/__init__.py", "data/__init__.py"), fenced.splitlines()):
                text = (folder / table).read_text()
                start = re.search(r"^(NETWORKS|DATASETS)\b.*\{$", text, re.MULTILINE).end()
                (folder / table).write_text(f"{text[:start]}\n{row}{text[start:]}")
    programs = folder.parent / "bin"
    programs.mkdir()
    for name, words in (("python", ""), ("torchrun", " -m torch.distributed.run")):
        (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}"{words} "$@"\n')
        (programs / name).chmod(0o755)
    shared = ROOT.parent / "shared"
    if shared.exists():
        (folder.parent / "shared").symlink_to(shared)
    return folder


@pytest.mark.slow
def test_every_printed_command_works_in_its_order(checkout):
    failed, left_out = [], []
    environment = {**os.environ, "PATH": f"{checkout.parent / 'bin'}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    for page, command in commands():
        reason = next((reason for pattern, reason in LEFT_OUT.items() if re.search(pattern, command)), None)
        if "../shared" in command and not (checkout.parent / "shared").exists():
            reason = "no ../shared here"
        for package in ("lmdb", "tensorboard", "wandb"):
            if re.search(rf" (--)?{package}\b", command) and not importlib.util.find_spec(package):
                reason = f"{package} is not installed here"
        if ".mp4" in command and not shutil.which("ffmpeg"):
            reason = "ffmpeg is not installed here"
        if reason:
            left_out.append((page, command, reason))
            continue
        words = shortened(command)
        done = subprocess.run(["bash", "-c", words], cwd=checkout, env=environment, capture_output=True, text=True,
                              timeout=600)
        print(f"{done.returncode} {page}: {words}", flush=True)
        expected = next((name for file, name in FAILS.items() if file in command), None)
        lines = done.stderr.strip().splitlines() or [""]
        if expected:
            good = done.returncode == 2 and lines[0].startswith("error: ") and expected in lines[0]
        else:
            good = done.returncode == 0
        if not good:
            failed.append(f"{page}: {words}\n    {done.returncode}: {lines[-1]}")
    assert not failed, "\n".join(failed)
    assert Path(checkout / "experiments/train_vrt/models").is_dir() and len(left_out) < 25, left_out
