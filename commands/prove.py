"""Prove that a run of these options resumes exactly: compare N steps with N steps that were killed halfway.

Both runs are processes of their own in a temporary folder, with the options' own data and without test sets. If they
differ, a third run, not stopped, shows whether this machine repeats results at all, and a fourth names the operations
that have no deterministic kernel.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

import checkpoint
import options
import train
from checkpoint import CheckpointError
from data import DATASETS
from models import MODELS, NETWORKS
from runtime.determinism import missing_kernel
from runtime.hooks import Hooks
from storage import system
from storage.tree import differences, flat

IGNORED = ("config", "timestamp", "environment", "history", "best", "metric")  # keys of a state not compared
Override = tuple[str, Any, str]
CHILD = f"import sys; sys.path[0] = {str(Path(__file__).parents[1])!r}; from commands import prove; prove.child()"


def prove(option_file: str, overrides: Iterable[Override], steps: int, stage: str | None = None, say=print) -> int:
    """Compare N steps with N steps that a kill divides. Returns 0 if all tensors are equal, else 1.

    Raises: OptionError with the message of a run that failed; CheckpointError when the killed run did not resume at
        the expected iteration, so that nothing was proved.
    """
    if steps < 2:
        raise options.OptionError(f"--prove-resume {steps}: must be >= 2: a step before the kill and one after")
    middle, overrides = steps // 2, list(overrides)
    with tempfile.TemporaryDirectory(prefix="perdure_") as folder:
        def run(name: str, kill: bool = False, look: bool = False) -> str:
            return _run(folder, name, option_file, overrides, stage, steps, middle if kill else None, look)

        say(f"proving  {steps} steps straight, and {steps} steps killed after step {middle}, in processes of their own")
        run("straight")
        run("killed", kill=True)
        started = re.search(r"^STARTED (\d+)$", run("killed"), re.MULTILINE)
        if not started or int(started[1]) != middle:
            raise CheckpointError(f"--prove-resume: the killed run started again at iteration "
                                  f"{started[1] if started else '?'} instead of {middle}, so nothing was proved")
        one, two = _final(folder, "straight", steps), _final(folder, "killed", steps)
        if not (differing := list(differences(one, two))):
            tensors = sum(map(torch.is_tensor, one.values()))
            say(f"exact    all {tensors} tensors and the rest of the state are equal, bit for bit")
            return 0
        say(f"differs  {len(differing)} of {len(one)} parts of the state; first {': '.join(differing[0])}")
        for reason in _reasons(run, folder, one, steps):
            say(f"because  {reason}")
        return 1


def _reasons(run, folder: str, one: dict[str, Any], steps: int) -> Iterable[str]:
    """Find why the states differ: something this machine does not repeat, or something missing in the checkpoint."""
    threads = {name: checkpoint.find_newest(_models(folder, name)).load_state()["environment"]["num_threads"]
               for name in ("straight", "killed")}
    if len(set(threads.values())) > 1:
        yield f"the thread count was {threads['straight']}, then {threads['killed']}; set num_threads"
    run("again")
    named = re.findall(r"^NONDETERMINISTIC (.+)$", run("looked at", look=True), re.MULTILINE)  # other kernels' results
    for operation in sorted(set(named)):
        yield f"{operation} has no deterministic kernel on this device"
    if list(differences(one, _final(folder, "again", steps))):
        yield "two uninterrupted runs differ as well: the cause is the computation, not the resume; set deterministic"
    else:
        yield "an uninterrupted run repeats itself, so the checkpoint lacks something that the next step depends on: " \
              "a variable or a random generator of the model, the loss or the dataset"


def _models(folder: str, name: str) -> Path:
    return Path(folder) / name / "models"


def _final(folder: str, name: str, steps: int) -> dict[str, Any]:
    found = checkpoint.find_newest(_models(folder, name))
    assert found and found.iteration == steps
    parts = found.load()
    parts["state"] = {key: value for key, value in parts["state"].items() if key not in IGNORED}
    return dict(flat(parts))


def _run(folder: str, name: str, option_file: str, overrides: list[Override], stage: str | None, steps: int,
         kill_after: int | None, look: bool) -> str:
    """Run once in a new process. Returns its output."""
    task = json.dumps([option_file, overrides, stage, folder, name, steps, kill_after, look])
    done = subprocess.run([sys.executable, "-c", CHILD, task], capture_output=True, text=True)
    if done.returncode != (system.KILLED if kill_after else 0):
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise options.OptionError((lines[-1] if lines else f"the run ended with {done.returncode}")
                                  .removeprefix("error: "))
    return done.stdout + done.stderr


# ---------------------------------------------------------------- in the process of a run


class Witness(Hooks):
    """Prints the iteration at which a run starts, and kills the process after the step `kill_after` + 1.

    The checkpoint of `kill_after` is committed by then, also in the background.
    """

    def __init__(self, kill_after: int | None):
        self.kill_after = kill_after

    def before_training(self, run: train.Run) -> None:
        print(f"STARTED {run.started_at}", flush=True)

    def after_step(self, run: train.Run) -> None:
        if self.kill_after is not None and run.iteration > self.kill_after:
            run.saves.saver.wait()
            system.die()


def _child(option_file: str, overrides: list[Override], stage: str | None, folder: str, name: str, steps: int,
           kill_after: int | None, look: bool) -> int:
    opt, notices = options.parse(option_file, overrides, MODELS, NETWORKS, DATASETS, stage)
    opt["task"] = name
    opt["path"] |= {"root": folder, "models": None, "init_from": None}
    opt["datasets"] = {"train": opt["datasets"]["train"]}
    opt["train"] |= {"total_iter": steps, "total_epochs": None, "checkpoint_save": steps // 2, "save_interval": None,
                     "resume_checkpoint": None}
    opt["checkpoint"] |= {"layout": "split", "keep_last_n": None, "on_save_error": "stop"}
    with warnings.catch_warnings(record=True) as seen:
        if look:
            warnings.simplefilter("always")
            torch.use_deterministic_algorithms(True, warn_only=True)
        code = train.train(opt, notices, hooks=[Witness(kill_after)])
    for warning in seen:
        if operation := missing_kernel(warning.message):
            print(f"NONDETERMINISTIC {operation}")
    return code


def child() -> None:
    """Run the task that `_run` passed to this process."""
    try:
        sys.exit(_child(*json.loads(sys.argv[1])))
    except (ValueError, RuntimeError) as problem:
        sys.exit(f"error: {problem}")
