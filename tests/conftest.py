"""What tests share: the repository on the path, pinned threads, real data where it lies beside the repository."""

import gc
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

# Before torch looks, for this process and those that it starts: one thread each, as two test processes share the
# machine; and the CPU, unless a card is asked for. Torch is imported later: the process that only starts the other two
# needs none, and they start two seconds earlier.
os.environ["OMP_NUM_THREADS"] = "1"
if not os.environ.get("PERDURE_TEST_CUDA"):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SHARED = Path(os.environ.get("PERDURE_SHARED", ROOT.parent / "shared"))


def pytest_collection_finish():
    """Leave what the imports made, half a million objects, out of all later garbage collections."""
    gc.freeze()


@pytest.fixture(autouse=True)
def same_start():
    """Let no test inherit another's number of threads, random numbers or missing features of a disk."""
    import torch

    from storage import files

    torch.set_num_threads(1)
    torch.manual_seed(0)
    files.notices.clear()


OLD_TORCH = pytest.mark.skipif(version("torch").startswith("2.6."), reason="torch 2.6 rounds or fakes CUDA otherwise")


@pytest.fixture
def shared():
    """The folder of goldens and small real data; the test is skipped where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is absent; set PERDURE_SHARED to run this test")
    return SHARED


@pytest.fixture
def tiny_tables(monkeypatch):
    """The rows of tests/tiny.py, for runs in this process."""
    from tests import tiny

    tiny.add_rows(monkeypatch)


def run_main(*arguments, cwd=ROOT, timeout=240, **kwargs):
    """`python main.py ...` as a user runs it: a process of its own. Returns the finished process."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([sys.executable, str(ROOT / "main.py"), *map(str, arguments)], cwd=cwd, timeout=timeout,
                          env=environment, capture_output=True, text=True, **kwargs)


def write_json(path, tree):
    path.write_text(json.dumps(tree))
    return path
