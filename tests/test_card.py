"""CUDA's own code, run on a stand-in for cards: waits, devices, late copies, lack of memory, several cards.

See tests/card. Kernels of a real card are checked by benchmarks/gpu.sh alone.
"""

import json
import os
import re
import subprocess
import sys

import pytest

from tests import card, world
from tests.conftest import ROOT
from tests.runs import assert_equal_runs

RECIPES = ["vqvae", *(pytest.param(kind, marks=pytest.mark.slow) for kind in world.RECIPES if kind != "vqvae")]


@pytest.fixture(scope="session")
def libraries(tmp_path_factory):
    folder = tmp_path_factory.mktemp("card")
    if reason := card.build(folder):
        pytest.skip(f"no stand-in for a card here: {reason}")
    return folder


@pytest.fixture
def run(libraries):
    """Runs Python with cards. Returns the exit code and what it printed."""
    def started(*words, seconds=200, **cards):
        done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, timeout=seconds, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, text=True,
                              env={**os.environ, **card.environment(libraries, **cards)})
        return done.returncode, done.stdout

    return started


# Programs that end by os._exit, as main.py does: torch's threads may abort a process whose card has gone before them.
LOOKS = """
import json, os, torch
from torch import nn

def refused(act):
    try:
        act()
    except Exception as error:
        return f"{type(error).__name__}: {error}"

found, x = {}, torch.arange(4.0).pin_memory()
y = torch.full((4,), -1.0).pin_memory()
y.copy_(x.cuda() + 1, non_blocking=True)
early = y.tolist()
torch.cuda.synchronize()
found["late"] = early, y.tolist()

z = x.to("cuda", non_blocking=True)
x.fill_(7)  # a card may read it only now
found["overwritten"] = z.cpu().tolist()

found["devices"] = refused(lambda: torch.ones(4, device="cuda") + torch.ones(4))
found["memory"] = refused(lambda: torch.ones(2**28, device="cuda"))
mask = z > 0
torch.cuda.set_sync_debug_mode("error")
found["waits"] = {name: refused(act) for name, act in {
    "item": lambda: z.sum().item(), "mask": lambda: z[mask], "cpu": z.cpu, "index": lambda: z[torch.tensor([1])],
    "nonzero": lambda: z.nonzero(), "from pageable memory": lambda: torch.ones(3).cuda(), "nothing": lambda: z + 1,
    "assignment": lambda: z.__setitem__(mask, 0.0), "pinned": lambda: x.to("cuda", non_blocking=True)}.items()}
torch.cuda.set_sync_debug_mode("default")

def trained(device):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.GELU(), nn.Conv2d(8, 8, 3)).to(device)
    data = torch.randn(2, 3, 8, 8).to(device)
    adam = torch.optim.Adam(net.parameters(), fused=True)
    for _ in range(3):
        out = net(data).flatten(2).mT[:, None]
        loss = nn.functional.scaled_dot_product_attention(out, out, out, out @ out.mT).square().mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
    return torch.cat([p.detach().cpu().flatten() for p in net.parameters()])

found["apart"] = (trained("cpu") - trained("cuda")).abs().max().item()
print(json.dumps(found), flush=True)
os._exit(0)
"""


def test_the_stand_in_refuses_and_delays_as_a_card_does(run):
    code, text = run("-c", LOOKS, memory=500)
    assert code == 0, text
    found = json.loads(text.splitlines()[-1])
    early, late = found["late"]
    assert early != late == [1, 2, 3, 4] and found["overwritten"] == [7, 7, 7, 7]
    assert "same device" in found["devices"] and found["memory"].startswith("OutOfMemoryError: CUDA out of memory")
    free = {name for name, error in found["waits"].items() if error is None}
    assert free == {"nothing", "assignment", "pinned"}
    assert found["apart"] < 1e-5


@pytest.mark.slow  # tests/test_cuda.py looks for waits on the meta device
def test_no_step_of_any_recipe_waits_for_a_card(run):
    code, text = run("benchmarks/gpu.py", "waits", idle=True)
    assert code == 0 and len(re.findall("^ok .*no step waits$", text, re.MULTILINE)) == 7, text


STEPS = """
import os
import sys
from pathlib import Path
from benchmarks import common
from runtime import determinism
from tests import world

for kind in world.RECIPES:
    flows = {"fix_iter": 0} if kind == "vrt" else {}  # train them from the start
    path = world.recipe(kind, Path(sys.argv[1]), kind.replace(" ", "_"), train=flows)
    opt = common.read_options(str(path), {"device": "cuda", "deterministic": True})
    determinism.prepare_machine(opt)
    run = common.build_run(opt)
    with common.batches_of(run) as batches:
        for number in (1, 2):
            run.model.feed_data(next(batches))
            run.model.update_learning_rate(number - 1)
            run.model.optimize_parameters(number)
os._exit(0)
"""


def test_every_operation_of_a_step_has_a_deterministic_kernel(run, tmp_path):
    """Torch's own code for a card raises before it launches one that is not; what kernels compute is not needed."""
    code, text = run("-c", STEPS, tmp_path, idle=True)
    assert code == 0, text


FILLS = """
import sys
import torch
import main as door
from tests import tiny

held = []

def fill(run):
    for size in (2**24, 2**20, 2**14, 2**9):
        try:
            while True:
                held.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
        except torch.OutOfMemoryError:
            pass

door.program(sys.argv[1:], hooks=[tiny.At("before_step", 4, fill)])
"""


def test_a_card_that_is_full_in_a_step_costs_no_step(run, tmp_path):
    changes = {"device": "cuda", "train": {"checkpoint_save": 100, "checkpoint_test": 100}}
    one, two = (world.recipe("segmentation", tmp_path, name, **changes) for name in ("one", "two"))
    code, text = run("-c", FILLS, "-opt", two, memory=100)
    assert code == 2 and "Traceback" not in text and "two/models/3.json" in text, text
    assert re.search("^error: out of memory: CUDA out of memory.* raise train.accumulate", text, re.MULTILINE)
    for path in (one, two):
        code, text = run("main.py", "-opt", path)
        assert code == 0, text
    assert re.search(r"^resume .*iteration 3 of 6", text, re.MULTILINE)
    assert_equal_runs(tmp_path / "one", tmp_path / "two")


KILLED = f"""
import os
import sys
sys.path.insert(0, {str(ROOT)!r})
import main as door
from tests import world

door.program(sys.argv[1:], hooks=[world.Acts({{(3, "SIGKILL")}} if os.environ["RANK"] == "1" else set())])
"""


@pytest.mark.parametrize("kind", RECIPES)
def test_two_cards_killed_and_resumed_end_with_the_bits_of_one(run, tmp_path, kind):
    """NCCL's process group, states gathered from cards, background saves."""
    changes = {"device": "cuda", "deterministic": True, "train": {"accumulate": 2},
               "checkpoint": {"layout": "split", "async": True}}
    one, two = (world.recipe(kind, tmp_path, name, **changes) for name in ("one", "two"))
    torchrun = "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    code, text = run(*torchrun, script, "-opt", two, cards=2)
    assert code == 1 and "has ended without a word, as by SIGKILL" in text, text
    for words in ([*torchrun, "main.py", "-opt", two], ["main.py", "-opt", one]):
        code, text = run(*words, cards=2)
        assert code == 0, text
    assert_equal_runs(tmp_path / "one", tmp_path / "two")
