"""The main job stopped at random moments, by each signal, on drawn and on real video; 200 kills of short runs; random
schedules of launches on other numbers of processes.

Minutes long, so not part of the usual run:  python -m pytest -n 0 -s -m slow tests/test_campaign.py
"""

import os
import random
import signal
import subprocess
import sys
import time

import pytest

import checkpoint
from tests import world
from tests.conftest import ROOT, SHARED, run_main
from tests.runs import assert_equal_runs, differing, final
from tests.vrt import vrt_file

TOTAL = 24
STOPS = int(os.environ.get("PERDURE_STOPS", 2))  # how often each run is stopped before it is left alone
pytestmark = pytest.mark.slow


def arguments(folder, name, data, workers):
    """The shipped default, shortened; its own network, data and validation."""
    sets = [f"task={name}", f"path.root={folder}", f"train.total_iter={TOTAL}", "train.checkpoint_save=5",
            "train.checkpoint_test=12", "train.checkpoint_print=4", "num_threads=1",
            f"datasets.train.dataloader_num_workers={workers}"]
    if data == "real":
        sets += [f"datasets.train.dataroot_gt={SHARED}/data/video/train_GT",
                 f"datasets.test.dataroot_gt={SHARED}/data/video/test_GT"]
    return ["-opt", str(ROOT / "options/train_vrt.json"), *[word for text in sets for word in ("--set", text)]]


@pytest.fixture(scope="module", params=["drawn", "real"])
def straight(request, tmp_path_factory):
    """A run that was never stopped, its data, and how many seconds its steps took."""
    if request.param == "real" and not SHARED.is_dir():
        pytest.skip(f"{SHARED} is absent")
    folder = tmp_path_factory.mktemp(request.param)
    began = time.monotonic()
    done = run_main(*arguments(folder, "straight", request.param, 0))
    assert done.returncode == 0, done.stderr
    return folder, request.param, time.monotonic() - began


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda s: s.name)
def test_stopped_at_a_random_moment_and_run_again(straight, sig, workers):
    folder, data, seconds = straight
    name = f"{sig.name}_{workers}"
    command, stops = arguments(folder, name, data, workers), []
    for _ in range(STOPS):
        process = subprocess.Popen([sys.executable, "main.py", *command], cwd=ROOT, stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL)
        delay = random.uniform(2, 0.8 * seconds)
        try:
            process.wait(delay)
        except Exception:
            process.send_signal(sig)
            process.wait(60)
        stops.append((round(delay, 2), process.returncode))
    done = run_main(*command)
    assert done.returncode == 0, (stops, done.stderr)
    print(f"{data}, {name}: stopped after (seconds, exit code) {stops}")
    assert_equal_runs(folder / "straight", folder / name, TOTAL)


KILLS = int(os.environ.get("PERDURE_KILLS", 200))  # over all four ways to save


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Makes the option file of a small real run in 12 steps that validates twice; the first of them has run."""
    folder = tmp_path_factory.mktemp("killed")

    def make(name, keep):
        train = {"total_iter": 12, "checkpoint_save": 1, "checkpoint_test": 4}
        return ["-opt", str(vrt_file(folder, name, train=train, checkpoint=keep))], folder / name

    command, straight = make("straight", {})
    began = time.monotonic()
    assert run_main(*command).returncode == 0
    return make, straight, time.monotonic() - began


@pytest.mark.parametrize("background", [False, True], ids=["waiting", "in background"])
@pytest.mark.parametrize("layout", ["split", "bundle"])
def test_killed_at_random_points_again_and_again(small, layout, background):
    """Half of the kills at a random moment, half at a random file operation of a save. Nothing committed is lost."""
    make, straight, seconds = small
    expected, dice = final(straight, 12), random.Random(f"{layout}, {background}")
    kills = ended = 0
    reached, points = {}, []
    while kills < KILLS // 4 or reached:
        name = f"{layout}_{background}_{ended}"
        command, folder = make(name, {"layout": layout, "async": background, "keep_last_n": 2})
        at_operation = dice.random() < 0.5
        program = ["-m", "tests.tiny", *(["--die-at", str(dice.randint(1, 160))] if at_operation else []), *command]
        process = subprocess.Popen([sys.executable, *program], cwd=ROOT, stdout=subprocess.DEVNULL,
                                   stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
        try:
            process.wait(60 if at_operation or kills >= KILLS // 4 else dice.uniform(0.4 * seconds, 1.1 * seconds))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(20)
        assert process.returncode in (0, -signal.SIGKILL), process.stderr.read().decode()
        kills += process.returncode != 0
        problems = []
        sets = checkpoint.find_sets(folder / "models", problems.append)
        assert not problems and all(found.fault() is None for found in sets)
        newest = sets[-1].iteration if sets else 0
        assert newest >= reached.get(name, 0), f"{name}: {reached[name]} was committed, {newest} is left"
        reached[name] = newest
        points.append(newest)
        if process.returncode == 0:
            assert differing(final(folder, 12), expected) == []
            ended, reached = ended + 1, {}
    print(f"{layout}, {'in background' if background else 'waiting'}: {kills} kills, {ended} runs ended, all equal; "
          f"newest checkpoint after each kill: {points}")


SCHEDULES = int(os.environ.get("PERDURE_SCHEDULES", 2))  # for each recipe and choice of numbers of processes


def schedule(dice, sizes, total=6):
    """Draw launches until the end of a run, (processes, act); the act is (rank, step, signal), or None in the last one.

    After SIGKILL a run resumes from any save before this step, after SIGTERM from this step or the next.
    """
    launches, done = [], 0
    while len(launches) < dice.randint(1, 4) and done < total:
        size, step = dice.choice(sizes), dice.randint(done + 1, total)
        how = dice.choice(["SIGKILL", "SIGTERM"]) if step < total - 1 else "SIGKILL"
        launches.append((size, (dice.randrange(size), step, how)))
        done = step + 1 if how == "SIGTERM" else step - 1
    return [*launches, (dice.choice(sizes), None)]


def recipe(kind, folder, name, accumulate):
    """Make an option file with two rows in each micro-batch."""
    return world.recipe(kind, folder, name, train={"accumulate": accumulate},
                        datasets={"train": {"dataloader_batch_size": 2 * accumulate}})


@pytest.fixture(scope="module")
def never_stopped(tmp_path_factory):
    """Runs a recipe without a stop, once for each number of processes and micro-batches. Returns its folder."""
    runs = {}

    def launch(kind, size, accumulate):
        if (key := (kind, size, accumulate)) not in runs:
            folder = tmp_path_factory.mktemp("straight")
            path = recipe(kind, folder, "one", accumulate)
            codes, said = world.run(folder / "out", size, "-opt", path, seconds=600)
            assert codes == [0] * size, said
            runs[key] = folder / "one"
        return runs[key]

    return launch


@pytest.mark.parametrize("straight_size, sizes, accumulate", [(1, (1, 2, 4), 4), (3, (3,), 3), (6, (6,), 6)],
                         ids=["changing", "three", "six"])
@pytest.mark.parametrize("kind", world.RECIPES)
@pytest.mark.parametrize("number", range(SCHEDULES))
def test_a_random_schedule_of_launches_ends_with_the_same_bits(tmp_path, never_stopped, kind, straight_size, sizes,
                                                               accumulate, number):
    expected = never_stopped(kind, straight_size, accumulate)
    launches = schedule(random.Random(f"{kind}, {sizes}, {number}"), sizes)
    path = recipe(kind, tmp_path, "two", accumulate)
    print(f"{kind}, {number}: {launches}", flush=True)
    for size, act in launches:
        codes, said = world.run(tmp_path / "out", size, "-opt", path, acts=[act] if act else [], seconds=600)
        assert all(codes) if act else codes == [0] * size, (launches, said)
        sets = checkpoint.find_sets(tmp_path / "two/models")
        assert all(found.fault() is None for found in sets), launches
    assert_equal_runs(expected, tmp_path / "two", 6)
