"""The one loop: set the learning rate, feed, optimize, log, validate, save, stop if asked."""

from __future__ import annotations

import contextlib
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import checkpoint
import options
from checkpoint import CheckpointError, CheckpointSet
from data import DATASETS
from data.loader import endless, told
from data.sampler import names_digest
from log.pictures import save_pictures
from log.run_log import RunLog, tolerated
from log.terminal import Pace
from models import MODELS
from models.model_base import ModelBase
from report import RunReport
from runtime import determinism, distributed
from runtime.determinism import fastest_kernels, prepare_machine
from runtime.evaluate import Progress, describe_losses, validate
from runtime.finite import FiniteCheck, NonFiniteLoss
from runtime.history import History
from runtime.resume import find_source, open_folder, restore
from runtime.saves import Saves
from runtime.signals import StopRequest
from storage.files import FolderLock
from storage.tree import plain


class Silence:
    """Stands for a `RunLog` in all processes but the one that writes."""

    live = False

    def pictures(self, path: Path, pictures: Sequence[torch.Tensor], *_: Any) -> None:
        """Each process writes those of its own clips; the main one warns when the disk takes none."""
        with tolerated(path, lambda text: None):
            save_pictures(path, pictures)

    def record_traceback(self, error: BaseException) -> None:
        traceback.print_exception(error)

    def __getattr__(self, name: str) -> Callable:
        return lambda *args, **kwargs: None


def build_model(opt: options.Section) -> ModelBase:
    """Build the model that the options name. Raises OptionError, also where memory does not suffice for it."""
    try:
        return options.resolve(MODELS, opt["model"], "model")(opt)
    except ValueError as error:
        raise options.OptionError(str(error)) from error
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "memory" not in str(error):
            raise
        raise options.OptionError(f"{opt['opt_path']}: netG: no memory for a network so large") from None


class Run:
    """One launch of a run: its options, folder, model, data and log, and what it has done so far."""

    def __init__(self, opt: options.Section, log: RunLog):
        self.opt, self.log = opt, log
        self.iteration = self.started_at = 0
        self.train_set = options.build(DATASETS, opt["datasets"]["train"], "dataset_type")
        self.names = names_digest(self.train_set)
        self.test_sets = {name: options.build(DATASETS, section, "dataset_type")
                          for name, section in opt["datasets"].items() if section["phase"] == "test"}
        self.model = build_model(opt)
        self.losses = FiniteCheck(self.model.scaler)
        self.models = self.model.save_dir
        self.folder = self.models if opt["path"]["models"] else self.models.parent
        keep, (name, mode) = opt["checkpoint"], self.model.best_metric
        if keep["best_metric"] not in (None, name) and keep["best_mode"] is None:
            raise options.OptionError(f"{opt['opt_path']}: checkpoint.best_mode: missing; whether a larger or a "
                                      f'smaller {keep["best_metric"]} is better: "max" or "min"')
        self.history = History(keep["best_metric"] or name, keep["best_mode"] or mode)
        self.saves = Saves(opt, self.models, self.model.device.type, log)
        self.launch_file = self.folder / ".launch"  # which launch began here last
        self.lock: FolderLock | None = None
        self.resumed_from: str | None = None  # what elsewhere this run was resumed from, by --resume
        self.remembered = False  # --resume names what this run was resumed from before: it goes on from its own

    def claim(self) -> None:
        """Keep other processes out of the run's folder, once there is one."""
        if self.lock is None and os.path.isdir(self.folder) and distributed.is_main():
            self.lock = FolderLock(self.folder)

    def close(self) -> None:
        """End what is under way; the folder is free again."""
        self.saves.saver.wait()
        if self.lock:
            self.lock.close()

    def restore(self, source: CheckpointSet | None) -> None:
        """Bring model, data order, history and generators to where the set was saved."""
        restore(self, source)

    def environment(self) -> dict[str, Any]:
        return {**determinism.environment(), "device": self.model.device.type, "processes": distributed.world_size()}

    # ------------------------------------------------ during training

    @property
    def position(self) -> tuple[int, int]:
        """`(epoch, offset)` in the data after the steps done so far."""
        return self.batches.after(self.iteration - self.started_at)

    @property
    def epochs_done(self) -> int:
        epoch, offset = self.position
        return epoch + (offset + self.batches.batch_size > self.batches.length)

    def state(self) -> dict[str, Any]:
        """Everything but networks and optimizers that makes the next step. All processes ask together."""
        epoch, offset = self.position
        history = self.history
        validated = history.rows and history.rows[-1]["iteration"] == self.iteration
        several = {"ranks": distributed.gather(self.model.local_state())} if distributed.world_size() > 1 else {}
        return {"version": checkpoint.VERSION, "iteration": self.iteration, "epoch": self.epochs_done,
                "sampler_state": {"epoch": epoch, "offset": offset, "length": len(self.train_set),
                                  "names": self.names},
                "rng_state": distributed.gather(determinism.rng_state()), "history": history.rows,
                "best": history.best,
                "metric": history.value(history.rows[-1]) if validated else None,
                "metadata": {"model": self.opt["model"], "stage": self.opt["stage"],
                             "best_metric": [history.metric, history.mode],
                             "resumed_from": self.resumed_from},
                "config": plain(self.opt), "environment": self.environment(), "timestamp": checkpoint.timestamp(),
                **self.model.extra_state(self.iteration), **several}

    def save(self, reason: str = "regular", amend: bool = False) -> None:
        """Commit a checkpoint of this iteration, then drop what it supersedes. All processes come together for it.

        Args: amend: the checkpoint is there already, and the metrics of its validation are to be in it, too.
        Raises: NonFiniteLoss before anything is written that training could not continue from.
        """
        saved = distributed.from_main(lambda: self.saves.at == self.iteration)
        if self.iteration == 0 or saved and not amend:
            return
        self.saves.finish()
        self.losses.check()
        if fault := distributed.from_main(self.model.find_non_finite):
            raise NonFiniteLoss(f"after iteration {self.iteration} {fault} is not finite, so no checkpoint of it is "
                                "written; the last one is intact; lower the learning rate, or set "
                                "train.G_optimizer_clipgrad")
        state = self.state()
        distributed.from_main(lambda: self.saves.write(self.iteration, {**self.model.parts(), "state": state},
                                                       "regular" if self.save_due() else reason))

    def save_surely(self, reason: str) -> None:
        """Save before the process ends; a save that fails is tried again for some seconds, whatever the options say.

        Raises: CheckpointError when it fails to the end.
        """
        for pause in (0, 1, 4):
            time.sleep(pause)
            self.save(reason, amend=distributed.from_main(lambda: bool(self.saves.refusal)))
            distributed.from_main(self.saves.finish)
            refusal = distributed.from_main(lambda: self.saves.refusal)
            if self.iteration == 0 or not refusal:
                return
        raise CheckpointError(f"{self.models}: checkpoint {self.iteration} was not saved: {refusal}; older "
                              "checkpoints are intact; mend the disk and run the same command: it repeats the steps "
                              "since the newest one")

    def record(self) -> None:
        """A log line and a CSV row of this iteration."""
        losses, rate = distributed.mean_over_ranks(self.model.current_log()), self.model.current_learning_rate()
        epoch = self.position[0]
        self.log.row("train", {"iteration": self.iteration, "epoch": epoch, "lr": rate, **losses})
        terms = describe_losses(losses)
        terms += f" | {self.model.skipped} steps skipped" if self.model.skipped else ""
        self.log.line(f"iter {self.iteration:>7,} | epoch {epoch} | lr {rate:.3e} | {terms} | "
                      f"{self.pace.describe(self.iteration)}")

    def show_progress(self) -> None:
        if self.log.live and time.monotonic() - self.shown > 0.5:
            terms = describe_losses(self.model.current_log())
            self.log.progress(f"iter {self.iteration:,}/{self.opt['train']['total_iter']:,} | "
                              f"{self.pace.describe(self.iteration)} | {terms} | "
                              f"lr {self.model.current_learning_rate():.3e}")
            self.shown = time.monotonic()

    def validate(self, stop: StopRequest) -> None:
        """Validate this iteration, see `runtime.evaluate`."""
        validate(self, stop)

    def due(self, every: int, epochs: int | None) -> bool:
        """Whether an interval, in iterations or else in epochs, ends with this iteration."""
        if epochs:
            return self.batches.ends_epoch(self.iteration - self.started_at, epochs)
        return bool(every) and self.iteration % every == 0

    def save_due(self) -> bool:
        train = self.opt["train"]
        return self.due(train["checkpoint_save"], train["save_interval"]) or self.iteration == train["total_iter"]

    def validation_due(self) -> bool:
        train = self.opt["train"]
        return bool(self.test_sets) and self.iteration > 0 and (
            self.due(train["checkpoint_test"], train["eval_interval"]) or self.iteration == train["total_iter"])

    def validation_missing(self) -> bool:
        """Whether the validation of this iteration is due and not in the history: it was cut off, or never began."""
        return self.validation_due() and not self.history.has(self.iteration)

    def loop(self, stop: StopRequest) -> None:
        """Steps until the run is finished or a signal asked to stop."""
        self.shown = 0.0
        self.pace = Pace(self.iteration, self.opt["train"]["total_iter"])
        if self.validation_missing():
            self.validate(stop)  # the previous launch did not finish it
        else:
            Progress(self.folder / "log", None).close()  # of another iteration, which may be trained again differently
        samples = endless(self.train_set, self.batches, self.opt["datasets"]["train"]["dataloader_num_workers"],
                          pinned=self.model.device.type != "cpu")
        with contextlib.closing(samples), fastest_kernels(True):
            self.steps(samples, stop)

    def fetch(self, samples: Iterator[Mapping[str, Any]]) -> None:
        """Hand the next batch to the model. Raises: OptionError, one line, whatever is wrong."""
        with told():
            self.model.feed_data(next(samples))

    def steps(self, samples: Iterator[Mapping[str, Any]], stop: StopRequest) -> None:
        model, train, total = self.model, self.opt["train"], self.opt["train"]["total_iter"]
        while self.iteration < total and stop.all_ready(lambda: self.fetch(samples)):
            self.iteration += 1
            model.update_learning_rate(self.iteration - 1)
            with model.skipping():
                model.optimize_parameters(self.iteration)

            if train["on_nan"] == "stop":
                self.losses.add(self.iteration, dict(model.log_dict), dict(model.gradient_norms))
                if model.device.type == "cpu":
                    self.losses.check()
            elif model.skipped_in_a_row >= min(train["nan_limit"], total):
                raise NonFiniteLoss(f"{model.skipped_in_a_row} steps in a row were left out until iteration "
                                    f"{self.iteration}, each for a loss or gradient that is not finite; the last "
                                    "checkpoint is intact; lower the learning rate, or raise train.nan_limit")
            self.show_progress()
            self.saves.look()
            if self.due(train["checkpoint_print"], None):
                self.losses.check()
                self.record()
            if self.save_due():
                self.save()
            if self.validation_due():  # after the save: whatever happens in it, the steps are safe
                self.losses.check()
                self.validate(stop)
                self.report.write()


def train(opt: options.Section, notices: list[str], *, resume: str | None = None, init_from: str | None = None,
          fresh: bool = False, command: str = "", preface: Sequence[str] = (),
          check: Callable[[Run], None] = lambda run: None) -> int:
    """Train as the options say, from where the run stands. Returns the exit code.

    Args:
        notices: lines for the user from reading the options.
        resume: a checkpoint to go on from instead of the newest. init_from: what path.init_from was set to by hand:
            only a new run, or one that began with it, may go on.
        fresh: put away what the run has and begin anew. command: what resumes this run, to be printed.
        preface: lines to be said first. check: called before anything is made; may raise.
    Raises: OptionError, CheckpointError (a user's mistake or a bad file, one line), NonFiniteLoss.
    """
    prepare_machine(opt)
    told = opt["log"]
    log = RunLog(quiet=told["quiet"], tensorboard=told["tensorboard"]) if distributed.is_main() else Silence()
    with StopRequest(waits=False) as stop, contextlib.closing(log), contextlib.ExitStack() as stack:
        for text in (*preface, *(f"note     {notice}" for notice in notices)):
            log.line(text)
        run = stack.enter_context(contextlib.closing(Run(opt, log)))
        run.claim()
        source = distributed.from_main(lambda: find_source(run, resume, init_from, fresh))
        run.restore(source)
        if source and run.iteration >= opt["train"]["total_iter"] and (
                not resume or run.remembered) and not (
                source.committed and run.validation_missing()):
            log.line(f"finished at iteration {run.iteration} of {opt['train']['total_iter']}: nothing left to do; "
                     "raise train.total_iter to go on")
            return 0
        if resume and run.iteration > opt["train"]["total_iter"]:
            raise options.OptionError(f"{resume}: is at iteration {run.iteration}, past train.total_iter "
                                      f"{opt['train']['total_iter']}; raise that")
        check(run)
        stop.waits = True  # until now there was nothing to lose
        distributed.from_main(lambda: open_folder(run, source, fresh))
        run.report = stack.enter_context(RunReport(
            run.folder, run.models, log.line,
            lambda: {"iteration": run.iteration, "baseline": run.model.baseline_name},
            task=opt["task"], total=opt["train"]["total_iter"], command=command,
            metric=(run.history.metric, run.history.mode),
            origins=opt.origins)) if distributed.is_main() else Silence()
        try:
            run.loop(stop)
        except RuntimeError as error:
            if "does not have a deterministic implementation" not in str(error):
                raise
            raise options.OptionError(f"deterministic: {str(error).split()[0]} has no deterministic kernel on "
                                      f"{run.model.device}; set deterministic to false, or use --device cpu") from None
        run.save_surely("interrupted")
        if stop.problem:
            kept = f"iteration {run.iteration} is saved" if run.iteration else "nothing was trained yet"
            raise options.OptionError(f"{stop.problem}; {kept}: mend this and run the same command")
        if stop.agreed and (run.iteration < opt["train"]["total_iter"] or run.validation_missing()):
            log.line(f"stopped  by {stop.agreed.name} after iteration {run.iteration}; go on with: {command}")
            run.report.end("interrupted", f"by {stop.agreed.name}")
            return stop.exit_code
        log.line(f"finished {opt['train']['total_iter']} iterations in {run.folder}")
        run.report.end("finished")
        return 0


if __name__ == "__main__":
    sys.exit("train.py is no program; run: python main.py -opt options/train_vrt.json")
