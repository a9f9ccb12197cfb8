"""The main job stopped at random moments, by each signal, on drawn and on real video, with and without workers.

Minutes long, so not part of the usual run:  python -m pytest -m slow tests/test_campaign.py
"""

import os
import random
import signal
import time

import pytest

from tests.conftest import ROOT, SHARED, run_main
from tests.test_resume import assert_equal_runs, start_process

TOTAL = 24
STOPS = int(os.environ.get("PERDURE_STOPS", 2))  # how often each run is stopped before it is left alone
pytestmark = pytest.mark.slow


def arguments(folder, name, data, workers):
    """The shipped default, shortened; its own network, data and validation."""
    sets = [f"task={name}", f"path.root={folder}", f"train.total_iter={TOTAL}", "train.checkpoint_save=5",
            "train.checkpoint_test=12", "train.checkpoint_print=4", "num_threads=2",
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
        process = start_process(*command)
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
