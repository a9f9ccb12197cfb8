"""Before the first hour is lost: what can be known to go wrong later is looked at now.

`look` is what every start affords: samples of the data, room on the disk. Training after it is bit for bit the training
without it. `dry_run` tries everything once, in a process that trains nothing: steps, a validation, a save and its load.
"""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

import checkpoint
import options
from data import DATASETS
from data.folders import passed_over
from data.loader import clips_of, endless
from log.run_log import RunLog
from log.terminal import duration
from models import MODELS
from runtime import determinism, distributed
from runtime.determinism import fastest_kernels, prepare_machine
from runtime.evaluate import describe_losses
from runtime.resume import find_source
from runtime.signals import StopRequest
from storage import tree
from storage.files import format_bytes
from storage.tree import differ, flat, is_tensor, same
from train import Run

LOOK = 0.5  # seconds that a start affords for samples of each data set; a slow first one may take longer
TRY = 2.0, 10.0  # the same of a dry run, and for its steps
Finding = tuple[str, str]  # "ok", "warn" or "fail", and the text


# ---------------------------------------------------------------- every start


def look(run: Run) -> None:
    """Read samples of every data set, weigh the checkpoints to come against the disk, and say so in a line.

    Raises: OptionError for data that can't be read.
    """
    began = time.monotonic()
    with determinism.rng_untouched():
        read = [read_training(run, LOOK), *(read_test(run, name) for name in run.test_sets)]
        status, room = weigh(run, estimate(run))
    if status != "ok":
        run.log.warn(room)
    if note := passed_over():
        run.log.line(f"note     {note}")
    run.log.line(f"checked  {', '.join(read)}{f'; {room}' if status == 'ok' else ''} "
                 f"({time.monotonic() - began:.1f} s)")


def read_training(run: Run, seconds: float, most: int = 32) -> str:
    """Samples from all over the training set, as many as there is time for."""
    length, count, began = len(run.train_set), 0, time.monotonic()
    most = min(most, length)
    keys = [(run.batches.position[0], i * (length - 1) // max(1, most - 1)) for i in range(most)]
    with contextlib.closing(endless(run.train_set, [[key] for key in keys], 0, pinned=False)) as samples:
        for _ in samples:
            count += 1
            if time.monotonic() - began > seconds:
                break
    return f"{count} of {length} training samples read"


def read_test(run: Run, name: str) -> str:
    """The first sample of a test set."""
    sample = next(clips_of(run.test_sets[name]), None)
    if sample is None:
        raise options.OptionError(f"{run.opt['opt_path']}: datasets.{name}: has no samples")
    if hasattr(sample, "read"):
        sample.read(0, 1)
    return f"1 of {len(run.test_sets[name])} of {name}"


def estimate(run: Run) -> int:
    """Bytes of a checkpoint. Moments that an optimizer has not yet are two for each parameter, as Adam's."""
    moments = sum(2 * p.numel() * p.element_size() for optimizer in run.model.optimizers.values()
                  for group in optimizer.param_groups for p in group["params"] if p not in optimizer.state)
    return moments + tree.num_bytes({**run.model.parts(), "state": run.state()})


def weigh(run: Run, size: int) -> Finding:
    """The checkpoints that the run will come to keep, `size` bytes each, against the room on its disk."""
    saves, keep = times_due(run, "save"), run.opt["checkpoint"]
    saves = checkpoint.num_retained(run.saves.layout, keep["keep_last_n"], saves)
    place = nearest(run.models)
    free = shutil.disk_usage(place).free
    text = f"checkpoints to come: {saves} of {format_bytes(size)}, {format_bytes(free)} free"
    if free < saves * size:
        return "fail" if free < 2 * size else "warn", f"{text} on the disk of {place}: make room, or set " \
            "checkpoint.keep_last_n, or path.root to another disk"
    return "ok", text


def times_due(run: Run, what: str) -> int:
    """How often there will be a "save" or "test" from here to the end of the run."""
    train, left = run.opt["train"], run.opt["train"]["total_iter"] - run.iteration
    epochs = train["save_interval" if what == "save" else "eval_interval"]
    every = epochs * run.batches.batches_per_epoch if epochs else train[f"checkpoint_{what}"]
    return (left - 1) // every + 1 if every and left > 0 else min(left, 1)  # the last iteration is always one


def nearest(path: Path) -> Path:
    """The path, or the nearest folder above it that exists. Raises: CheckpointError."""
    for folder in (path.absolute(), *path.absolute().parents):
        if folder.is_dir():
            return folder
        if folder.exists():
            raise checkpoint.CheckpointError(f"{path}: can't be made: {folder} is no folder; is path.root right?")
    raise AssertionError("there is a root")


# ---------------------------------------------------------------- --dry-run


def dry_run(opt: options.Section, notices: list[str], *, resume: str | None = None, init_from: str | None = None,
            fresh: bool = False, command: str = "", preface: Sequence[str] = ()) -> int:
    """Try everything that the run will do, once, and print a table. Nothing is left behind.

    Args: as of `train.train`. Returns: 0, or 2 where something has to be mended first; 128 + a signal that ended it.
    Raises: OptionError for options that no machine could run.
    """
    prepare_machine(opt)
    log = RunLog(quiet=opt["log"]["quiet"], tensorboard=opt["log"]["tensorboard"])
    with contextlib.closing(log), StopRequest("this check") as stop:
        for text in (*preface, *(f"note     {notice}" for notice in notices)):
            log.line(text)
        count = {"ok": 0, "warn": 0, "fail": 0}
        for name, check in checks(opt, log, resume, init_from, fresh):
            if stop.signal:
                log.line(f"stopped  by {stop.signal.name}")
                return stop.exit_code
            try:
                status, text = check()
            except (ValueError, OSError, RuntimeError) as error:  # OptionError, CheckpointError, NonFiniteLoss, memory
                status, text = "fail", explain(error, opt)
            count[status] += 1
            log.line(f"{status:<4} {name:<11}{text}")
        log.line(f"finished the dry run: {count['ok']} ok, {count['warn']} warnings, {count['fail']} to be mended; "
                 "nothing was trained or kept")
        return 2 if count["fail"] else 0


def checks(opt: options.Section, log: RunLog, resume: str | None, init_from: str | None,
           fresh: bool) -> Iterator[tuple[str, Callable[[], Finding]]]:
    """What to check, by name, in an order in which each can rely on those before."""
    try:
        run = Run(opt, log)
    except (ValueError, OSError) as error:
        yield from each_part(opt, error)
        return
    if note := passed_over():
        log.line(f"note     {note}")
    with contextlib.closing(run), tempfile.TemporaryDirectory(prefix="perdure_") as scratch:
        run.model.save_dir = Path(scratch) / "models"  # what a recipe itself writes goes there
        trial = Trial(run)
        yield "start", lambda: trial.start(resume, init_from, fresh)
        if not trial.started:
            return
        yield "data", lambda: ("ok", read_training(run, TRY[0], len(run.train_set)))
        for name in run.test_sets:
            yield f"data {name}", lambda name=name: ("ok", read_test(run, name) + " read")
        if run.iteration < opt["train"]["total_iter"]:
            yield "steps", trial.steps
            if trial.step_time:
                for name in run.test_sets:
                    yield f"use {name}", lambda name=name: trial.validate(name)
                yield "memory", trial.memory
            yield "save", trial.save
            yield "disk", lambda: weigh(run, trial.size or estimate(run))
            if trial.step_time:
                yield "duration", trial.duration


def each_part(opt: options.Section, error: Exception) -> Iterator[tuple[str, Callable[[], Finding]]]:
    """What a run is made of, one by one, so that all that is wrong is told at once."""
    told = []

    def make(what: Callable[[], object]) -> Finding:
        try:
            what()
        except ValueError as found:
            told.append(str(found))
            raise
        return "ok", "can be made"

    for name, section in opt["datasets"].items():
        yield f"data {name}", lambda section=section: make(lambda: options.build(DATASETS, section, "dataset_type"))
    yield "model", lambda: make(lambda: options.resolve(MODELS, opt["model"], "model")(opt))
    if not told:
        yield "run", lambda: ("fail", explain(error, opt))


class Trial:
    """What a dry run does with a run: everything once, and then it is thrown away."""

    def __init__(self, run: Run):
        self.run, self.opt, self.cuda = run, run.opt, run.model.device.type == "cuda"
        self.started = False
        self.step_time = self.validation_time = self.save_time = 0.0  # seconds
        self.size = 0  # of a checkpoint, bytes

    def start(self, resume: str | None, init_from: str | None, fresh: bool) -> Finding:
        """Weights of every kind: a checkpoint's, pretrained ones, and those that losses need."""
        source = find_source(self.run, resume, init_from, fresh)
        self.run.restore(source)
        self.started = True
        iteration, total = self.run.iteration, self.opt["train"]["total_iter"]
        if iteration >= total:
            return "warn", f"iteration {iteration} of {total} is done: nothing left to do; raise train.total_iter"
        if source:
            return "ok", f"goes on from {source.path} after iteration {iteration} of {total}"
        return "ok", f"at iteration 0 of {total}, {'; '.join(self.run.reports) or 'no weights named to begin with'}"

    def steps(self) -> Finding:
        """The run's next step, its last one, and some between: not all cost the same."""
        run, began, took = self.run, time.monotonic(), []
        left = range(run.iteration + 1, self.opt["train"]["total_iter"] + 1)
        between = [left[len(left) * i // 6] for i in range(1, 6)]
        samples = endless(run.train_set, run.batches, self.opt["datasets"]["train"]["dataloader_num_workers"],
                          pinned=self.cuda)
        with contextlib.closing(samples), fastest_kernels(True):
            for iteration in (left[0], left[-1], *between):
                at = time.monotonic()
                data = next(samples)
                run.model.update_learning_rate(iteration - 1)
                run.model.feed_data(data)
                run.model.optimize_parameters(iteration)
                losses = run.model.current_log()  # this waits for the device
                took.append(time.monotonic() - at)
                if iteration == left[0]:
                    first = losses
                    run.losses.add(iteration, losses, {})
                    run.losses.check()
                elif time.monotonic() - began > TRY[1]:
                    break
        self.step_time = sum(took[1:]) / len(took[1:])  # the first allocates and chooses kernels
        return "ok", f"{len(took)} of {len(left)}: {self.step_time:.3g} s each; first {describe_losses(first)}"

    def validate(self, name: str) -> Finding:
        """One sample, as in a validation."""
        dataset, began, model = self.run.test_sets[name], time.monotonic(), self.run.model
        metrics = model.validate(next(clips_of(dataset)))
        took = time.monotonic() - began
        self.validation_time += took * len(dataset)
        return "ok", f"{took:.3g} s a sample, {len(dataset)} in all; {len(metrics)} metrics"

    def memory(self) -> Finding:
        """The most that was in use so far."""
        if not self.cuda:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        else:
            peak, whole = torch.cuda.max_memory_reserved(), torch.cuda.get_device_properties(None).total_memory
        text = f"{format_bytes(peak)} at the most, of {format_bytes(whole)}"
        return ("warn", f"{text}: little is left; {LESS_MEMORY}") if peak > 0.9 * whole else ("ok", text)

    def save(self) -> Finding:
        """A checkpoint where the run's will lie, written, verified, read back, compared, removed."""
        run, place, began = self.run, nearest(self.run.models), time.monotonic()
        parts = {**run.model.parts(), "state": run.state()}
        with tempfile.TemporaryDirectory(prefix=".dry_run_", dir=place) as folder:
            found = checkpoint.commit(folder, max(1, run.iteration), tree.to_cpu(parts), run.saves.layout)
            self.save_time = time.monotonic() - began
            self.size = sum(path.stat().st_size for path in Path(folder).iterdir())
            kept = dict(flat(found.load()))
        if differing := [key for key, value in flat(tree.to_cpu(parts)) if not equal(value, kept.get(key))]:
            return "fail", f"{place}: {', '.join(differing[:3])} is not read as it was written; is the disk sound?"
        return "ok", f"{format_bytes(self.size)} written in {self.save_time:.2g} s and read back equal, in {place}"

    def duration(self) -> Finding:
        run, left = self.run, self.opt["train"]["total_iter"] - self.run.iteration
        saves, tests = times_due(run, "save"), times_due(run, "test") if run.test_sets else 0
        seconds = left * self.step_time + tests * self.validation_time + saves * self.save_time
        return "ok", f"about {duration(seconds)}: {left} steps of {self.step_time:.3g} s, {tests} validations of " \
                     f"{self.validation_time:.3g} s, {saves} saves of {self.save_time:.2g} s"


def equal(a: object, b: object) -> bool:
    return differ(a, b) is None if is_tensor(a) and is_tensor(b) else not is_tensor(b) and same(a, b)


# ---------------------------------------------------------------- words

LESS_MEMORY = "raise train.accumulate, set train.amp, or lower datasets.train.dataloader_batch_size"


def explain(error: Exception, opt: options.Section) -> str:
    """An error in one line, with what helps where its own words do not say so."""
    text = next(iter(str(error).strip().splitlines()), type(error).__name__)
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text:
        return f"out of memory: {text[:160]}; {LESS_MEMORY}"
    if "does not have a deterministic implementation" in text:
        return (f"{text.split()[0]} has no deterministic kernel on {distributed.device_for(opt)}; "
                "set deterministic to false")
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}; is path.root right?"
    return text
