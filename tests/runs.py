"""Runs of this process: straight, stopped and resumed, and whether two of them ended equal."""

import contextlib
import csv
import os
import signal

import torch

import checkpoint
import main as door
from commands import infer
from runtime.hooks import Hooks
from tests import tiny

VARYING = ("timestamp", "config", "environment", "resumed_from")  # keys of a state that equal runs may differ in


def run(*arguments, hooks=()):
    """Run main.py in this process: as quick as a call, with the same entry point."""
    return door.main([str(argument) for argument in arguments], hooks=hooks)


class StopInCall(Hooks):
    """Sends this process a signal in the count-th call of a method of the run's model, e.g. "test"."""

    def __init__(self, method, count=1, sig=signal.SIGTERM):
        self.method, self.left, self.sig = method, count, sig

    def before_training(self, run):
        real = getattr(run.model, self.method)

        def call(*args, **kwargs):
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), self.sig)
            return real(*args, **kwargs)

        setattr(run.model, self.method, call)


@contextlib.contextmanager
def stopped_after_file(monkeypatch, name):
    """Send this process SIGTERM when `--test --input` has written its output of this name."""
    real = infer.write_result

    def interrupted(target, picture):
        real(target, picture)
        if target.name == name:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(infer, "write_result", interrupted)
        yield


def second_writer(monkeypatch, command):
    """Call `command` in a second process when `--test --input` has written its first output; [what it was told]."""
    real, told = infer.write_result, []

    def written(target, picture):
        real(target, picture)
        if told:
            return
        end, start = os.pipe()
        if not (child := os.fork()):
            signal.alarm(60)
            told.append("")
            try:
                os.write(start, f"ended with {command()}".encode())
            except checkpoint.CheckpointError as error:
                os.write(start, str(error).encode())
            finally:
                os._exit(0)
        os.close(start)
        told.append(os.read(end, 10_000).decode())
        os.waitpid(child, 0)

    monkeypatch.setattr(infer, "write_result", written)
    return told


def run_until(stop, *arguments, sig=signal.SIGTERM):
    """Run until a signal stops it: after the step of this number, or where a hook sends it. None: to the end."""
    hooks = [] if stop is None else [stop if isinstance(stop, Hooks) else tiny.stop_after(stop, sig)]
    assert run(*arguments, hooks=hooks) == (0 if stop is None else 128 + sig)


def straight_and_stopped(write, stops, launch=run_until):
    """Run once straight, and once stopped at each of `stops` and resumed by the same command.

    Args: write: makes the option file folder/NAME.json of the run folder/NAME: write(name, launch), launches from 0.
        launch: launch(stop, "-opt", path) runs until a stop, or to the end where it is None.

    Returns: the folders of both runs.
    """
    one = write("one", 0)
    launch(None, "-opt", one)
    for count, stop in enumerate([*stops, None]):
        two = write("two", count)
        launch(stop, "-opt", two)
    return one.with_suffix(""), two.with_suffix("")


def final(folder, iteration=None):
    """The parts of a run's newest checkpoint, which is of this iteration."""
    found = checkpoint.find_newest(folder / "models")
    assert found and iteration in (None, found.iteration)
    return found.load()


def rows(folder, table="train"):
    """The rows of log/train.csv or log/test.csv."""
    with open(folder / f"log/{table}.csv", newline="") as file:
        return list(csv.DictReader(file))


def differing(a, b, path=""):
    """Paths at which two states differ."""
    if isinstance(a, torch.Tensor):
        return [] if torch.equal(a, b) else [path]
    if isinstance(a, dict):
        keys = [key for key in {**a, **b} if key not in VARYING]
        return [d for key in keys
                for d in (differing(a[key], b[key], f"{path}.{key}") if key in a and key in b else [f"{path}.{key}"])]
    if isinstance(a, (list, tuple)):
        same = len(a) == len(b)
        return [d for i, (x, y) in enumerate(zip(a, b)) for d in differing(x, y, f"{path}[{i}]")] if same else [path]
    return [] if a == b else [path]


def assert_equal_runs(one, two, iteration=None):
    """Everything in the last checkpoints and in the tables is equal."""
    a, b = final(one, iteration), final(two, iteration)
    assert set(a) == set(b) and differing(a, b) == []
    assert (one / "log/test.csv").read_text() == (two / "log/test.csv").read_text()
    both = list(zip(rows(one), rows(two), strict=True))
    assert all(a["iteration"] == b["iteration"] and (a == b or a["steps"] != b["steps"]) for a, b in both)
