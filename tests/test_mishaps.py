"""Random mishaps over all recipes, with 0 and 2 workers, of one process and of two: none costs more than a step.

Minutes long, so not part of the usual run:  PERDURE_MISHAPS=200 python -m pytest -n 0 -s -m slow tests/test_mishaps.py
"""

import os
import random
import re
import signal
import time

import pytest

import checkpoint
from tests import tiny, world
from tests.conftest import write_json
from tests.runs import differing

TRIALS = int(os.environ.get("PERDURE_MISHAPS", 200))
TOTAL = 6
STOPS = ["SIGHUP", "SIGTERM", "SIGINT", "SIGUSR1", "press 0.3"]
DEATHS = ["SIGKILL", "SIGKILL at validation", "dies at file operation"]  # nothing can be saved then
SAMPLES = ["sample EIO", "sample MemoryError", "sample ZeroDivisionError", "sample is local", "sample full shm"]
WORKERS = ["sample SIGKILL", "sample SIGSEGV", "sample SIGBUS", "sample can't be sent"]
OTHERS = ["sample hangs", "bad validation", "SIGTERM at validation", "images can't be written"]


def option_file(kind, folder, name, workers, **over):
    over["datasets"] = {"train": {"dataloader_num_workers": workers}}
    if kind != "tiny":
        return world.recipe(kind, folder, name, **over)
    tree = tiny.options(folder, name, train={"total_iter": TOTAL}, workers=workers)
    return write_json(folder / f"{name}.json", tree | {key: over[key] for key in over if key != "datasets"})


def final(folder):
    found = checkpoint.find_newest(folder / "models")
    assert found and found.iteration == TOTAL
    return found.load()


def newest(folder):
    found = checkpoint.find_newest(folder / "models") if (folder / "models").is_dir() else None
    return found.iteration if found else 0


@pytest.mark.slow
def test_no_mishap_costs_more_than_the_step_under_way(tmp_path):
    straight, seen = {}, []
    for trial in range(TRIALS):
        dice = random.Random(trial)
        kind, size, workers = dice.choice(["tiny", *world.RECIPES]), dice.choice([1, 2]), dice.choice([0, 2])
        what = dice.choice([*STOPS, *DEATHS, *SAMPLES, *(WORKERS if workers else []), *OTHERS])
        rank, step = dice.randrange(size), dice.randint(2, TOTAL - 1)
        if "validation" in what:
            step = dice.choice([3, TOTAL])
        name, act = f"trial{trial}", what
        if what == "dies at file operation":
            rank, act = 0, f"{what} {dice.randint(1, 25)}"
        if (kind, size) not in straight:
            codes, said = world.run(tmp_path / "out", size, "-opt", option_file(kind, tmp_path, f"{kind} {size}", 0))
            assert codes == [0] * size, said
            straight[kind, size] = final(tmp_path / f"{kind} {size}")
        path, folder = option_file(kind, tmp_path, name, workers), tmp_path / name
        if what == "images can't be written":
            path = option_file(kind, tmp_path, name, workers, val={"save_img": True})
            folder.mkdir()
            (folder / "images").write_text("no folder")
        run = world.World(tmp_path / "out", size, "-opt", path, acts=[(rank, step, act)])
        if what == "sample hangs":
            run.wait_for(f"iter {step - 1:>7,}", seconds=120)
            time.sleep(dice.uniform(0, 1))
            run.signal(signal.SIGTERM, dice.randrange(size))
        codes, said = run.finish(180), run.report()
        done = max([0, *map(int, re.findall(r"\niter +(\d+) ", run.said(0)))])
        committed = max([0, *map(int, re.findall(r"\nsaved .*/(\d+)\.json in", run.said(0)))])
        left = newest(folder)
        about = f"{trial}: {kind}, {size} processes, {workers} workers, {act} in step {step} of rank {rank}"
        print(f"{about}: codes {codes}, {done} finished, {left} saved", flush=True)
        assert "Traceback" not in said, f"{about}\n{said}"
        if any(codes):
            assert left >= (committed if what in DEATHS else done), f"{about}\n{said}"
        if what == "images can't be written":
            (folder / "images").unlink(missing_ok=True)
        codes, again = world.run(tmp_path / "out", size, "-opt", path)
        assert codes == [0] * size, f"{about}\n{said}\n{again}"
        assert "nothing left" in again[0] or not left or f"iteration {left} of {TOTAL}" in again[0], f"{about}\n{again}"
        assert differing(final(folder), straight[kind, size]) == [], f"{about}\n{said}\n{again}"
        seen.append(done - left)
    print(f"{TRIALS} mishaps; steps lost: {seen}")
