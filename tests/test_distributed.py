"""Several processes: equal to one, stopped and resumed exactly, all ended by one failure, never a hang."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

import checkpoint
from data.sampler import EndlessBatches
from tests import tiny, world
from tests.conftest import ROOT, write_json
from tests.test_resume import differing

TOTAL = 6
SIZES = (2, 3, 4)


def final(folder, iteration=TOTAL):
    found = checkpoint.find_newest(folder / "models")
    assert found and found.iteration == iteration
    return found.load()


def assert_equal(one, two, iteration=TOTAL):
    a, b = final(one, iteration), final(two, iteration)
    assert set(a) == set(b) and differing(a, b) == []
    for table in ("train", "test"):
        assert (one / "log" / f"{table}.csv").read_text() == (two / "log" / f"{table}.csv").read_text()


def tiny_file(folder, name, **over):
    train = {"total_iter": TOTAL, **over.pop("train", {})}
    path = write_json(folder / f"{name}.json", tiny.options(folder, name, train=train, **over))
    return path


def resumed(folder, size, make, stops):
    """Folders of a run never stopped and of one stopped by each of `stops`, (rank, step, how), and run again."""
    straight, other = make("straight"), make("other")
    codes, said = world.run(folder / "out", size, "-opt", straight)
    assert codes == [0] * size, said
    for stop in stops:
        codes, said = world.run(folder / "out", size, "-opt", other, acts=[stop])
        assert all(codes), said
        if stop[2] == "SIGTERM":
            assert codes == [143] * size, said
            assert re.search(r"stopped  by SIGTERM after iteration", said[0]) and "stopped" not in "".join(said[1:])
    codes, said = world.run(folder / "out", size, "-opt", other)
    assert codes == [0] * size, said
    assert "resume   from" in said[0] and not "".join(said[1:])
    return folder / "straight", folder / "other"


# ---------------------------------------------------------------- exact


def test_killed_and_stopped_runs_end_equal(tmp_path):
    """At 4 processes plain DistributedDataParallel is not exact: its buckets are rebuilt after the first step."""
    over = {"workers": 1, "netG": {"net_type": "tiny", "width": 64}}
    stops = [(3, 3, "SIGKILL"), (2, 3, "SIGTERM")]
    assert_equal(*resumed(tmp_path, 4, lambda name: tiny_file(tmp_path, name, **over), stops))
    state = final(tmp_path / "straight")["state"]
    generators = [generator["torch"] for generator in state["rng_state"]]
    assert len(generators) == 4 and not torch.equal(generators[0], generators[3])


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", world.RECIPES)
def test_every_recipe_ends_equal(tmp_path, kind, size):
    stops = [(size - 1, 3, "SIGKILL"), (1, 4, "SIGTERM")]
    assert_equal(*resumed(tmp_path, size, lambda name: world.recipe(kind, tmp_path, name), stops))
