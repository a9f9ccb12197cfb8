"""What a start does not import: the time of a start is that of its imports. benchmarks/startup.py measures it."""

import subprocess
import sys

import pytest
import torch

from tests import world
from tests.conftest import ROOT
from tests.runs import run

SLOW = ("torchvision", "torch._dynamo", "sympy", "tensorboard", "PIL", "multiprocessing.pool")
ANSWERS = """
import sys, main, options
vrt, segmentation, *files = sys.argv[1:]
for file in files:
    try:
        sys.exit(f"{file}: {main.main(['-opt', file, '--set', 'train.total=1'])}")
    except options.OptionError as error:
        assert "did you mean 'total_iter'" in str(error), error
sys.modules["models.network_vrt"].VRT.__new__ = None  # building one fails
assert main.main(["-opt", vrt]) == main.main(["-opt", segmentation]) == 0
print("imported", *sys.modules)
"""


def fresh(*words, code=0):
    """Run a new interpreter; what it printed."""
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("words, code, said", [
    (["--help"], 0, "option file, e.g. options/train_vrt.json"),
    (["-opt", "options/train_vrt.json", "--help"], 0, "--test_data"),
    (["-opt", "options/train_vrt.json", "--epoch", "3"], 2, "unrecognized arguments: --epoch"),
    (["-opt", "options/none.json"], 2, "no such option file"),
    ([], 2, "which run?"),
    (["-opt", "options"], 2, "options: is a folder; name an option file, e.g. options/train_inktrace.json"),
    (["-opt", "options/train_vrt.json", "--set", "a"], 2, "--set a: write it as section.key=value"),
    (["-opt", "options/train_vrt.json", "--dist", "True", "--launcher", "pytorch"], 2, "torchrun starts several"),
    (["-opt", "options/train_vrt.json", "--output", "x"], 2, "--input, --output and --truth go with --test"),
])
def test_help_and_mistakes_in_arguments_are_answered_without_torch(words, code, said):
    lines = fresh("-X", "importtime", "main.py", *words, code=code)
    found = {line.split("|")[-1].strip() for line in lines.splitlines() if line.startswith("import time")}
    assert said in lines and "commands.arguments" in found and not found & {"torch", "numpy"}, lines


def test_option_errors_and_a_finished_run_are_answered_without_torchs_compiler(tmp_path):
    """Nor torchvision, which imports it too: each takes as long to import as torch. The network is not built."""
    done = [world.recipe(name, tmp_path, name, train={"total_iter": 2}) for name in ("vrt", "segmentation")]
    assert [run("-opt", path) for path in done] == [0, 0]
    said = fresh("-c", ANSWERS, *done, *sorted((ROOT / "options").glob("*.json")))
    assert said.count("finished at iteration 2 of 2: nothing left to do") == 2
    found = said[said.index("imported ") :].split()
    theirs = {"sympy"} if torch.__version__.startswith("2.6.") else set()  # torch.utils.checkpoint's there
    assert "torch" in found and not {name for name in found if name in SLOW} - theirs
