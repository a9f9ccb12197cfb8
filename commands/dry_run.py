"""Find problems before training: unreadable data, too little memory or disk, a validation that fails.

`FirstLook` is part of every start: it reads samples and checks the disk, and does not change the training by a bit.
`dry_run` tries everything once without training: steps, a validation, a save and loading it back.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch

import checkpoint
import options
from data import DATASETS
from data.folders import unsupported_files
from data.loader import clips_of, endless
from log.pictures import save_pictures
from log.run_log import RunLog, start_log
from log.terminal import duration
from models import MODELS
from runtime import distributed
from runtime.determinism import LESS_MEMORY, failures_named, fastest_kernels, prepare_machine
from runtime.evaluate import describe_losses
from runtime.hooks import Hooks
from runtime.resume import find_source, restore
from runtime.signals import StopRequest
from runtime.watchdog import end_of, watch
from storage import system, tree
from storage.files import format_bytes
from train import Run

LOOK = 0.5  # seconds for reading samples of each dataset at every start; one slow sample may take longer
TRY = 2.0, 10.0  # seconds for reading samples and for steps in a dry run
Finding = tuple[str, str]  # "ok", "warn" or "fail", and the text


# ---------------------------------------------------------------- every start


class FirstLook(Hooks):
    """Takes the first look before training."""

    def before_training(self, run: Run) -> None:
        look(run)
        if run.opt["train"]["grace"]:
            measure(run)
            watch.compare_grace()


def look(run: Run) -> None:
    """Read samples of every dataset, compare future checkpoints with the free disk space, and log one line.

    Raises: OptionError for data that can't be read.
    """
    began = time.monotonic()
    watch.begin("start", "reading samples")
    read = [read_training(run, LOOK), *(read_test(run, name) for name in run.test_sets)]
    status, room = check_disk(run, estimate(run))
    if status != "ok":
        run.log.warn(room)
    if note := unsupported_files():
        run.log.line(f"note     {note}")
    run.log.line(f"checked  {', '.join(read)}{f'; {room}' if status == 'ok' else ''} "
                 f"({time.monotonic() - began:.1f} s)")


def measure(run: Run) -> None:
    """Measure a sample and a save where no earlier launch did: `train.grace` is compared with them before training."""
    trial, known = Trial(run), set(watch.longest)
    for name in run.test_sets if "sample" not in known else ():
        trial.validate(name)
    if "save" not in known and distributed.is_main():
        trial.save()


def read_training(run: Run, seconds: float, most: int = 32) -> str:
    """Read samples spread over the training set until the time is up. Returns a summary."""
    length, count, began = len(run.train_set), 0, time.monotonic()
    most = min(most, length)
    keys = [(run.batches.position[0], i * (length - 1) // max(1, most - 1)) for i in range(most)]
    with contextlib.closing(endless(run.train_set, [[key] for key in keys], 0, pinned=False)) as samples:
        for _ in samples:
            count += 1
            if time.monotonic() - began > seconds:
                break
    return f"{count} of {length} training samples read"


def show_samples(run: Run, most: int = 10) -> str:
    """Write pictures of samples, the degraded frame beside the sharp one, outside the run's folder."""
    folder = Path(tempfile.mkdtemp(prefix=f"dry_run_{Path(run.opt['task']).name}_"))
    count = min(most, len(run.train_set))
    for index in range(count):
        sample = run.train_set[0, index]
        lq, gt = (sample[side][len(sample[side]) // 2] if sample[side].ndim == 4 else sample[side] for side in "LH")
        scale = gt.shape[-1] // lq.shape[-1]
        large = lq[:3].repeat_interleave(scale, -1).repeat_interleave(scale, -2)
        save_pictures(folder / f"{index:02d}.png", [large, gt])
    return f"{count} samples, degraded and sharp: {folder}"


def read_test(run: Run, name: str) -> str:
    """Read the first sample of a test set. Returns a summary."""
    sample = next(clips_of(run.test_sets[name]), None)
    if sample is None:
        raise options.OptionError(f"{run.opt['opt_path']}: datasets.{name}: has no samples")
    if hasattr(sample, "read"):
        sample.read(0, 1)
    return f"1 of {len(run.test_sets[name])} of {name}"


def estimate(run: Run) -> int:
    """Estimate the size of a checkpoint in bytes. An optimizer without state is counted like Adam, with two moments."""
    moments = sum(2 * p.numel() * p.element_size() for optimizer in run.model.optimizers.values()
                  for group in optimizer.param_groups for p in group["params"] if p not in optimizer.state)
    return moments + tree.num_bytes({**run.model.parts(), "state": run.state()})


def check_disk(run: Run, size: int) -> Finding:
    """Compare the checkpoints that retention will keep, `size` bytes each, with the free disk space."""
    saves, keep = times_due(run, "save"), run.opt["checkpoint"]
    saves = checkpoint.num_retained(run.saves.layout, keep["keep_last_n"], saves) + (keep["every_minutes"] > 0)
    place = nearest(run.models)
    free = shutil.disk_usage(place).free
    text = f"checkpoints to come: {saves} of {format_bytes(size)}, {format_bytes(free)} free"
    if free < saves * size:
        return "fail" if free < 2 * size else "warn", f"{text} on the disk of {place}: make room, or set " \
            "checkpoint.keep_last_n, or path.root to another disk"
    return "ok", text


def times_due(run: Run, what: str) -> int:
    """Count the "save" or "test" events from here to the end of the run."""
    train, left = run.opt["train"], run.opt["train"]["total_iter"] - run.iteration
    epochs = train["save_interval" if what == "save" else "eval_interval"]
    every = epochs * run.batches.batches_per_epoch if epochs else train[f"checkpoint_{what}"]
    return (left - 1) // every + 1 if every and left > 0 else min(left, 1)  # the last iteration always has one


def nearest(path: Path) -> Path:
    """Return the path or its nearest existing parent folder. Raises CheckpointError if a file is in the way."""
    for folder in (path.absolute(), *path.absolute().parents):
        if folder.is_dir():
            return folder
        if folder.exists():
            raise checkpoint.CheckpointError(f"{path}: can't be made: {folder} is not a folder; is path.root right?")
    raise AssertionError("there is a root")


# ---------------------------------------------------------------- --dry-run


def dry_run(opt: options.Section, notices: list[str], *, resume: str | None = None, init_from: str | None = None,
            fresh: bool = False, command: str = "", preface: Sequence[str] = (), hooks: Iterable[Hooks] = ()) -> int:
    """Try everything that the run will do, once, and print a table. Leaves no files.

    Args: as for `train.train`.
    Returns: 0, or 2 if something must be mended first, or 128 + the signal that ended it.
    Raises: OptionError for a device that is unknown or absent.
    """
    prepare_machine(opt)
    with contextlib.closing(start_log(opt["log"], notices, preface)) as log, StopRequest("this check") as stop:
        count = {"ok": 0, "warn": 0, "fail": 0}
        for name, check in checks(opt, log, resume, init_from, fresh, hooks):
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
           fresh: bool, hooks: Iterable[Hooks]) -> Iterator[tuple[str, Callable[[], Finding]]]:
    """Yield the checks by name, in an order in which each can rely on the previous ones."""
    try:
        run = Run(opt, log, hooks)
        assert run.model  # building it finds faults, too
    except (ValueError, OSError) as error:
        yield from each_part(opt, error)
        return
    if note := unsupported_files():
        log.line(f"note     {note}")
    with contextlib.closing(run), tempfile.TemporaryDirectory(prefix="perdure_") as scratch:
        run.model.save_dir = Path(scratch) / "models"  # for files that a recipe writes itself
        trial = Trial(run)
        yield "start", lambda: trial.start(resume, init_from, fresh)
        if not trial.started:
            return
        yield "data", lambda: ("ok", read_training(run, TRY[0], len(run.train_set)))
        if opt["datasets"]["train"].get("degradation"):
            yield "pictures", lambda: ("ok", show_samples(run))
        for name in run.test_sets:
            yield f"data {name}", lambda name=name: ("ok", read_test(run, name) + " read")
        if run.iteration < opt["train"]["total_iter"]:
            yield "steps", trial.steps
            if trial.step_time:
                for name in run.test_sets:
                    yield f"use {name}", lambda name=name: trial.validate(name)
                yield "memory", trial.memory
            yield "save", trial.save
            yield "disk", lambda: check_disk(run, trial.size or estimate(run))
            if trial.step_time:
                yield "duration", trial.duration
                yield "stop", trial.stop


def each_part(opt: options.Section, error: Exception) -> Iterator[tuple[str, Callable[[], Finding]]]:
    """Build the parts of a run one by one, so that all faults are reported in one dry run."""
    faults = []

    def make(what: Callable[[], object]) -> Finding:
        try:
            what()
        except ValueError as found:
            faults.append(str(found))
            raise
        return "ok", "can be made"

    for name, section in opt["datasets"].items():
        yield f"data {name}", lambda section=section: make(lambda: options.build(DATASETS, section, "dataset_type"))
    yield "model", lambda: make(lambda: options.resolve(MODELS, opt["model"], "model")(opt))
    if not faults:
        yield "run", lambda: ("fail", explain(error, opt))


class Trial:
    """The checks of a dry run that need a complete run; the run is discarded afterwards."""

    def __init__(self, run: Run):
        self.run, self.opt, self.cuda = run, run.opt, run.model.device.type == "cuda"
        self.started = False
        self.step_time = self.validation_time = self.save_time = 0.0  # seconds
        self.size = 0  # of a checkpoint, bytes

    def start(self, resume: str | None, init_from: str | None, fresh: bool) -> Finding:
        """Load weights of every kind: a checkpoint's, pretrained ones, and those of losses."""
        source = find_source(self.run, resume, init_from, fresh)
        restore(self.run, source)
        self.started = True
        iteration, total = self.run.iteration, self.opt["train"]["total_iter"]
        if iteration >= total:
            return "warn", f"iteration {iteration} of {total} is done: nothing left to do; raise train.total_iter"
        if source:
            return "ok", f"resumes from {source.path} after iteration {iteration} of {total}"
        return "ok", f"at iteration 0 of {total}, {'; '.join(self.run.reports) or 'no initial weights are named'}"

    def steps(self) -> Finding:
        """Time the run's next step, its last one, and some in between, because not all cost the same."""
        run, began, took = self.run, time.monotonic(), []
        left = range(run.iteration + 1, self.opt["train"]["total_iter"] + 1)
        between = [left[len(left) * i // 6] for i in range(1, 6)]
        samples = endless(run.train_set, run.batches, self.opt["datasets"]["train"]["dataloader_num_workers"],
                          pinned=self.cuda)
        with contextlib.closing(samples), fastest_kernels(True), failures_named(run.model.device):
            for iteration in (left[0], left[-1], *between):
                at = time.monotonic()
                data = next(samples)
                run.model.update_learning_rate(iteration - 1)
                run.model.feed_data(data)
                run.hooks.before_step(run)
                run.model.optimize_parameters(iteration)
                losses = run.model.current_log()  # this waits for the device
                took.append(time.monotonic() - at)
                watch.measure("step", took[-1])
                if iteration == left[0]:
                    first = losses
                    run.losses.add(iteration, losses, {})
                    run.losses.check()
                elif time.monotonic() - began > TRY[1]:
                    break
        self.step_time = sum(took[1:]) / len(took[1:])  # the first allocates and chooses kernels
        return "ok", f"{len(took)} of {len(left)}: {self.step_time:.3g} s each; first {describe_losses(first)}"

    def validate(self, name: str) -> Finding:
        """Validate one sample."""
        dataset, began, model = self.run.test_sets[name], time.monotonic(), self.run.model
        if self.cuda:
            torch.cuda.empty_cache()  # else what the steps need, which is kept for more, would count as well
        metrics = model.validate(next(clips_of(dataset)))
        took = time.monotonic() - began
        watch.measure("sample", took)
        self.validation_time += took * len(dataset)
        return "ok", f"{took:.3g} s a sample, {len(dataset)} in all; {len(metrics)} metrics"

    def memory(self) -> Finding:
        """Report the peak memory so far."""
        if not self.cuda:
            peak, whole = system.peak_memory(), system.total_memory()
            if peak is None or whole is None:
                return "ok", "not measured on this system"
        else:
            peak, whole = torch.cuda.max_memory_reserved(), torch.cuda.get_device_properties(None).total_memory
        text = f"{format_bytes(peak)} at the most, of {format_bytes(whole)}"
        return ("warn", f"{text}: little is left; {LESS_MEMORY}") if peak > 0.9 * whole else ("ok", text)

    def save(self) -> Finding:
        """Write, verify, read back, compare and remove a checkpoint on the run's own disk."""
        run, place, began = self.run, nearest(self.run.models), time.monotonic()
        parts = {**run.model.parts(), "state": run.state()}
        with tempfile.TemporaryDirectory(prefix=".dry_run_", dir=place) as folder:
            found = checkpoint.commit(folder, max(1, run.iteration), tree.to_cpu(parts), run.saves.layout)
            self.save_time = time.monotonic() - began
            watch.measure("save", self.save_time)
            self.size = sum(path.stat().st_size for path in Path(folder).iterdir())
            differing = [path for path, _ in tree.differences(tree.to_cpu(parts), found.load())]
        if differing:
            return "fail", f"{place}: {', '.join(differing[:3])} is not read as it was written; is the disk sound?"
        return "ok", f"{format_bytes(self.size)} written in {self.save_time:.2g} s and read back equal, in {place}"

    def duration(self) -> Finding:
        run, left = self.run, self.opt["train"]["total_iter"] - self.run.iteration
        saves, tests = times_due(run, "save"), times_due(run, "test") if run.test_sets else 0
        seconds = left * self.step_time + tests * self.validation_time + saves * self.save_time
        return "ok", f"about {duration(seconds)}: {left} steps of {self.step_time:.3g} s, {tests} validations of " \
                     f"{self.validation_time:.3g} s, {saves} saves of {self.save_time:.2g} s"

    def stop(self) -> Finding:
        """Compare the longest time from a stop request to a committed checkpoint with `train.grace`."""
        train = self.opt["train"]
        if train["stop_after"] is not None:
            end_of(train["stop_after"], time.monotonic())
        if problem := watch.find_grace_problem(train["grace"]):
            return "warn", problem
        granted = f"train.grace is {train['grace']:g} s" if train["grace"] else "train.grace is not set"
        return "ok", f"at most {watch.describe_stop()} from a signal to a committed checkpoint; {granted}"


# ---------------------------------------------------------------- messages

def explain(error: Exception, opt: options.Section) -> str:
    """Describe an error in one line, with a remedy where its own message has none."""
    text = next(iter(str(error).strip().splitlines()), type(error).__name__)
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}; is path.root right?"
    return text
