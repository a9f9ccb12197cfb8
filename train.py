"""The training loop: learning rate, data, step, log, checkpoint, validation, stop."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import checkpoint
import options
from checkpoint import CheckpointError
from data import DATASETS
from data.loader import as_option_error, endless
from data.sampler import names_digest
from log.run_log import RunLog, SilentLog, start_log
from log.terminal import Pace
from models import MODELS
from models.model_base import ModelBase
from report import RunReport
from runtime import determinism, distributed
from runtime.determinism import fastest_kernels, prepare_machine
from runtime.evaluate import Progress, validate
from runtime.finite import FiniteCheck, NonFiniteLoss, compute_again
from runtime.history import History, LossMeans
from runtime.hooks import HookList, Hooks
from runtime.records import record, show_progress
from runtime.resume import find_source, open_folder, place, report_finished, restore_model
from runtime.saves import Saves, check_ranks, saved_if_undone
from runtime.signals import StopRequest
from runtime.watchdog import watch
from storage.files import FolderLock
from storage.tree import plain


def build_model(opt: options.Section) -> ModelBase:
    """Build the model that the options name.

    Raises: OptionError for invalid options, or when there is not enough memory.
    """
    try:
        return options.resolve(MODELS, opt["model"], "model")(opt)
    except (ValueError, FileNotFoundError) as error:
        raise options.OptionError(str(error)) from error
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "memory" not in str(error):
            raise
        raise options.OptionError(f"{opt['opt_path']}: netG: not enough memory for a network of this size") from None


class Run:
    """One launch of a run: its options, folder, model, data and log, and its position in the training."""

    def __init__(self, opt: options.Section, log: RunLog, hooks: Iterable[Hooks] = ()):
        self.opt, self.log, self.hooks = opt, log, HookList(hooks)
        self.iteration = self.started_at = 0
        self.length_key = "train.total_epochs" if opt["train"]["total_epochs"] else "train.total_iter"
        watch.begin("start", "scanning the data")
        self.train_set = options.build(DATASETS, opt["datasets"]["train"], "dataset_type")
        self.names = names_digest(self.train_set)
        self.test_sets = {name: options.build(DATASETS, section, "dataset_type")
                          for name, section in opt["datasets"].items() if section["phase"] == "test"}
        self.device = distributed.device_for(opt)
        for dataset in (self.train_set, *self.test_sets.values()):
            if hasattr(dataset, "encode_on"):  # before any sample is read
                dataset.encode_on(self.device)
        self.means = LossMeans()
        self.models, self.folder = Path(options.models_folder(opt)), Path(options.run_folder(opt))
        keep, (name, mode) = opt["checkpoint"], options.resolve(MODELS, opt["model"], "model").best_metric
        if keep["best_metric"] not in (None, name) and keep["best_mode"] is None:
            raise options.OptionError(f"{opt['opt_path']}: checkpoint.best_mode: missing; whether a larger or a "
                                      f'smaller {keep["best_metric"]} is better: "max" or "min"')
        self.history = History(keep["best_metric"] or name, keep["best_mode"] or mode)
        self.saves = Saves(opt, self.models, self.device.type, log)
        self.launch_file = self.folder / ".launch"  # identifies the last launch in this folder
        self.lock: FolderLock | None = None
        self.saved_config: Mapping[str, Any] = {}  # the options in the checkpoint that the run resumes from
        self.resumed_from: str | None = None  # the checkpoint of another run that --resume named
        self.remembered = False  # --resume names the checkpoint that this run already continued: use its own newest

    @cached_property
    def model(self) -> ModelBase:
        """Build the model when it is first used: a finished run answers without it."""
        watch.begin("start", f"building the model {self.opt['model']}")
        return build_model(self.opt)

    @cached_property
    def losses(self) -> FiniteCheck:
        return FiniteCheck(self.model.scaler, self.models)

    def claim(self) -> None:
        """Lock the run's folder if it exists."""
        if self.lock is None and os.path.isdir(self.folder) and distributed.is_main():
            self.lock = FolderLock(self.folder)

    def close(self) -> None:
        """Wait for the save in progress and unlock the folder."""
        self.saves.close()
        if self.lock:
            self.lock.close()

    def environment(self) -> dict[str, Any]:
        return {**determinism.environment(), "device": self.device.type, "processes": distributed.world_size()}

    # ------------------------------------------------ during training

    @property
    def position(self) -> tuple[int, int]:
        """Return `(epoch, offset)` in the data after the steps done so far."""
        return self.batches.after(self.iteration - self.started_at)

    @property
    def epochs_done(self) -> int:
        epoch, offset = self.position
        return epoch + (offset + self.batches.batch_size > self.batches.length)

    def state(self) -> dict[str, Any]:
        """Collect everything besides networks and optimizers that the next step depends on."""
        epoch, offset = self.position
        history = self.history
        validated = history.rows and history.rows[-1]["iteration"] == self.iteration
        return {"version": checkpoint.VERSION, "iteration": self.iteration, "epoch": self.epochs_done,
                "sampler_state": {"epoch": epoch, "offset": offset, "length": len(self.train_set),
                                  "names": self.names},
                "history": history.rows,
                "best": history.best,
                "metric": history.value(history.rows[-1]) if validated else None,
                "metadata": {"model": self.opt["model"], "stage": self.opt["stage"],
                             "best_metric": [history.metric, history.mode],
                             "resumed_from": self.resumed_from},
                "config": plain(self.opt), "environment": self.environment(), "timestamp": checkpoint.timestamp(),
                **self.model.extra_state(self.iteration)}

    def save(self, reason: str = "regular", amend: bool = False) -> None:
        """Commit a checkpoint of this iteration and apply retention. All ranks call it.

        Args:
            reason: why it is made if no regular one is due.
            amend: add the metrics of the validation to a checkpoint that is already committed.
        Raises: NonFiniteLoss before writing a state that training cannot continue from.
        """
        saved = distributed.from_main(lambda: self.saves.at == self.iteration)
        if self.iteration == 0 or saved and not amend:
            return
        watch.begin("rest" if saved else "save", f"save {self.iteration}")
        self.hooks.before_save(self)
        self.saves.finish()
        self.losses.check()
        if fault := distributed.from_main(self.model.find_non_finite):
            raise NonFiniteLoss(f"after iteration {self.iteration} {fault} is not finite, so no checkpoint of it is "
                                f"written; {checkpoint.what_is_kept(self.models)}; lower the learning rate, or set "
                                "train.G_optimizer_clipgrad")
        if distributed.world_size() > 1:
            check_ranks(self.iteration, distributed.gather(self.model.checksum()), self.models)
        state = self.state()
        distributed.from_main(lambda: self.saves.write(self.iteration, {**self.model.parts(), "state": state},
                                                       "regular" if self.save_due() else reason))
        watch.begin("rest", f"the end of save {self.iteration}")

    def save_surely(self, reason: str) -> None:
        """Save before the process ends. A failed save is retried for five seconds, whatever `on_save_error` is.

        Raises: CheckpointError when every attempt failed.
        """
        for pause in (0, 1, 4):
            time.sleep(pause)
            self.save(reason, amend=distributed.from_main(lambda: bool(self.saves.failure)))
            distributed.from_main(self.saves.finish)
            refusal = distributed.from_main(lambda: self.saves.failure)
            if self.iteration == 0 or not refusal:
                return
        raise CheckpointError(f"{self.models}: checkpoint {self.iteration} was not saved: {refusal}; older "
                              "checkpoints are intact; mend the disk and run the same command: it repeats the steps "
                              "since the newest one")

    def validate(self, stop: StopRequest) -> None:
        """Validate this iteration, see `runtime.evaluate`."""
        self.hooks.before_validation(self)
        validate(self, stop)

    def due(self, every: int, epochs: int | None) -> bool:
        """Return whether an interval, in iterations or in epochs, ends with this iteration."""
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
        """Return whether the validation of this iteration is due and not in the history, as after an interruption."""
        return self.validation_due() and not self.history.has(self.iteration)

    def loop(self, stop: StopRequest) -> None:
        """Train until the run is finished or a signal asks to stop."""
        self.shown = 0.0
        self.pace = Pace(self.iteration, self.opt["train"]["total_iter"])
        if self.validation_missing():
            self.validate(stop)  # the previous launch did not finish it
        else:
            Progress(self.folder / "log", None).close()  # of another iteration, which may be trained again differently
        samples = endless(self.train_set, self.batches, self.opt["datasets"]["train"]["dataloader_num_workers"],
                          pinned=self.device.type != "cpu")
        with contextlib.closing(samples), fastest_kernels(True):
            self.steps(samples, stop)

    def fetch(self, samples: Iterator[Mapping[str, Any]]) -> None:
        """Feed the next batch to the model.

        Raises: OptionError for any failure of the data.
        """
        with as_option_error():
            self.model.feed_data(next(samples))

    def steps(self, samples: Iterator[Mapping[str, Any]], stop: StopRequest) -> None:
        model, train, total = self.model, self.opt["train"], self.opt["train"]["total_iter"]
        while self.iteration < total and stop.all_ready(
                lambda: self.fetch(samples), self.iteration + 1, self.saves.due()):
            self.iteration += 1
            model.update_learning_rate(self.iteration - 1)
            self.hooks.before_step(self)
            with saved_if_undone(self):
                model.optimize_parameters(self.iteration)

            if train["on_nan"] == "stop":
                self.losses.add(self.iteration, dict(model.log_dict), dict(model.gradient_norms))
                if model.checks_each_step():
                    self.losses.check(lambda: compute_again(self))
            elif model.skipped_in_a_row >= min(train["nan_limit"], total):
                raise NonFiniteLoss(f"{model.skipped_in_a_row} steps in a row were skipped until iteration "
                                    f"{self.iteration}, each for a loss or gradient that is not finite; "
                                    f"{checkpoint.what_is_kept(self.models)}; lower the learning rate, "
                                    "or raise train.nan_limit")
            if not model.skipped_in_a_row:
                self.means.add(model.log_dict)
            self.hooks.after_step(self)
            show_progress(self)
            self.saves.poll()
            record(self, printed=self.due(train["checkpoint_print"], None))
            if self.save_due() or stop.save:
                self.save("clock")
            if self.validation_due():  # after the save, so that a failure in it costs no step
                self.losses.check()
                self.validate(stop)
                self.report.write()


def train(opt: options.Section, notices: list[str], *, resume: str | None = None, init_from: str | None = None,
          fresh: bool = False, command: str = "", preface: Sequence[str] = (), hooks: Iterable[Hooks] = ()) -> int:
    """Train, or resume the run of these options. Returns the exit code.

    Args:
        notices: lines for the user from reading the options.
        resume: the checkpoint to resume from instead of the newest one.
        init_from: path.init_from if the user set it for this launch: valid for a new run, or one started from it.
        fresh: archive what the run has and start over.
        command: the command that resumes this run, for printing.
        preface: lines to print first.
        hooks: called at fixed points of the run.
    Raises: OptionError or CheckpointError for a user's mistake or an unusable file, NonFiniteLoss.
    """
    prepare_machine(opt)
    with StopRequest(waits=False) as stop, contextlib.ExitStack() as stack:
        log = stack.enter_context(contextlib.closing(start_log(opt["log"], notices, preface, distributed.is_main())))
        watch.configure(opt, log)
        run = stack.enter_context(contextlib.closing(Run(opt, log, hooks)))
        run.claim()
        source = distributed.from_main(lambda: find_source(run, resume, init_from, fresh))
        place(run, source, named=bool(resume))
        if source and run.iteration >= opt["train"]["total_iter"] and (
                not resume or run.remembered) and not (
                source.committed and run.validation_missing()):
            if source.folder.resolve() in run.saves.places()[1:]:  # its own folder has lost what the mirror has
                distributed.from_main(lambda: open_folder(run, source, fresh))
            report_finished(run, source)
            return 0
        if resume and run.iteration > opt["train"]["total_iter"]:
            raise options.OptionError(f"{resume}: is at iteration {run.iteration}, past the end of the run, "
                                      f"iteration {opt['train']['total_iter']}; raise {run.length_key}")
        restore_model(run, source)
        run.hooks.before_training(run)
        stop.waits = True  # before this line there was nothing to save
        distributed.from_main(lambda: open_folder(run, source, fresh))
        run.report = stack.enter_context(RunReport(
            run.folder, run.models, log.line,
            lambda: {"iteration": run.iteration, "baseline": run.model.baseline_name,
                     "after_save": run.saves.followers.last},
            task=opt["task"], total=opt["train"]["total_iter"], command=command,
            metric=(run.history.metric, run.history.mode),
            origins=opt.origins)) if distributed.is_main() else SilentLog()
        with determinism.failures_named(run.model.device, lambda: "; then run the same command; "
                                                                  + checkpoint.what_is_kept(run.models)):
            watch.folder = run.folder / "log"
            run.loop(stop)
        run.save_surely("interrupted")
        run.saves.close()
        if stop.problem:
            kept = f"iteration {run.iteration} is saved" if run.iteration else "nothing was trained yet"
            raise options.OptionError(f"{stop.problem}; {kept}: mend this and run the same command")
        if stop.agreed and (run.iteration < opt["train"]["total_iter"] or run.validation_missing()):
            run.saves.tell()
            log.line(f"stopped  by {stop.agreed.name} after iteration {run.iteration}; resume with: {command}")
            run.report.end("interrupted", f"by {stop.agreed.name}")
            return stop.exit_code
        log.line(f"finished {opt['train']['total_iter']} iterations in {run.folder}")
        run.report.end("finished")
        return 0


if __name__ == "__main__":
    sys.exit("train.py is not a program; run: python main.py -opt options/train_vrt.json")
