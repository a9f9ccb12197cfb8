"""The one loop: set the learning rate, feed, optimize, log, validate, save, stop if asked."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import checkpoint
import options
from checkpoint import CheckpointError, CheckpointSet, Layout, Saver
from data import DATASETS
from data.loader import endless, told
from data.sampler import EndlessBatches, names_digest, sample_rng
from log.pictures import save_pictures
from log.run_log import RunLog, tolerated
from log.terminal import Pace, number
from models import MODELS
from report import RunReport
from runtime import determinism, distributed
from runtime.determinism import fastest_kernels, prepare_machine, seed_generators
from runtime.evaluate import MOST_ATTEMPTS, Progress, ValidationError, describe_losses, evaluate
from runtime.signals import StopRequest
from storage import files, foreign, sealed
from storage.files import FolderLock
from storage.tree import plain

LEAST_SCALE = 2.0**-10  # of fp16's loss scale: it begins at 2**16 and is halved by each step that is left out


class NonFiniteLoss(RuntimeError):
    """The loss became NaN or infinite; the last checkpoint is from before."""


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


# ---------------------------------------------------------------- before the first step


class Run:
    """One launch of a run: its options, folder, model, data and log, and what it has done so far."""

    def __init__(self, opt: options.Section, log: RunLog):
        self.opt, self.log = opt, log
        self.iteration = self.started_at = 0
        self.saved_at: int | None = None  # iteration of the last save
        self.saved_as = "regular"  # the reason of that save
        self.amending = False  # whether the last save only adds the metrics of its validation
        self.refusal = ""  # why the last save failed; "" if it did not
        self.history: list[dict[str, Any]] = []  # metrics of every validation
        # losses and gradient norms of the steps that are not checked yet
        self.pending: list[tuple[int, dict[str, torch.Tensor], dict[str, torch.Tensor]]] = []
        self.train_set = options.build(DATASETS, opt["datasets"]["train"], "dataset_type")
        self.names = names_digest(self.train_set)
        self.test_sets = {name: options.build(DATASETS, section, "dataset_type")
                          for name, section in opt["datasets"].items() if section["phase"] == "test"}
        try:
            self.model = options.resolve(MODELS, opt["model"], "model")(opt)
        except ValueError as error:
            raise options.OptionError(str(error)) from error
        self.models = self.model.save_dir
        self.folder = self.models if opt["path"]["models"] else self.models.parent
        self.best_metric = self.choose_metric()
        keep = opt["checkpoint"]
        background = self.model.device.type != "cpu" if keep["async"] == "auto" else keep["async"]
        try:
            name = keep["name"] if keep["mode"] == "epochs" else None
            layout = Layout(keep["layout"], name, keep["latest"], keep["best"], keep["interrupted"])
        except ValueError as error:
            raise options.OptionError(f"{opt['opt_path']}: checkpoint: {error}") from None
        self.saver = Saver(self.models, layout, keep["keep_last_n"], background)
        self.launch_file = self.folder / ".launch"  # which launch began here last
        self.lock: FolderLock | None = None
        self.resumed_from: str | None = None  # what elsewhere this run was resumed from, by --resume
        self.remembered = False  # --resume names what this run was resumed from before: it goes on from its own

    def choose_metric(self) -> tuple[str, str]:
        """Name and mode ("max" or "min") of the test metric that says which checkpoint is the best."""
        keep, (name, mode) = self.opt["checkpoint"], self.model.best_metric
        if keep["best_metric"] not in (None, name) and keep["best_mode"] is None:
            raise options.OptionError(f"{self.opt['opt_path']}: checkpoint.best_mode: missing; whether a larger or a "
                                      f'smaller {keep["best_metric"]} is better: "max" or "min"')
        return keep["best_metric"] or name, keep["best_mode"] or mode

    def claim(self) -> None:
        """Keep other processes out of the run's folder, once there is one."""
        if self.lock is None and os.path.isdir(self.folder) and distributed.is_main():
            self.lock = FolderLock(self.folder)

    def close(self) -> None:
        """End what is under way; the folder is free again."""
        self.saver.wait()
        if self.lock:
            self.lock.close()

    # ------------------------------------------------ restore

    def find_source(self, resume: str | None, init_from: str | None, fresh: bool) -> CheckpointSet | None:
        """The set to go on from: the one named, else the newest good one of this run, else none.

        `train.resume_checkpoint` counts as named until this run has a set that was made with it.

        A launcher that repeats the command must not begin anew, or go back, once more.

        Raises: CheckpointError when there are checkpoints and none of them can be used.
        """
        again = distributed.restarted() and self.launch_file.exists()
        if again and self.launch_file.read_text() == distributed.launch():
            source = checkpoint.find_newest(self.models, self.log.line)
            return self.named(resume) if resume and not source else source
        if resume:
            return (None if fresh else self.resumed_before(resume)) or self.named(resume)
        if (named := self.opt["train"]["resume_checkpoint"]) and (init_from or fresh):
            raise CheckpointError(f"{'--fresh' if fresh else '--init-from'} starts at iteration 0, but "
                                  f"train.resume_checkpoint is {named}; leave one of them out")
        if fresh:
            return None
        why: list[str] = []
        source = checkpoint.find_newest(self.models, lambda line: (why.append(line), self.log.warn(line)))
        if source is None and (why or checkpoint.has_traces(self.models)):
            raise CheckpointError(f"{self.models}: there are checkpoints, but none is usable{checkpoint.reasons(why)}; "
                                  "name another one with --resume, or start over with --fresh, which puts them aside")
        config = source.load().get("state", {}).get("config") if source and (init_from or named) else None
        config = config if options.is_ours(config or {}) else {}
        if source and init_from and config.get("path", {}).get("init_from") != init_from:
            raise CheckpointError(f"--init-from starts a new run, but {self.models} holds iteration "
                                  f"{source.iteration}, not begun from it; leave it out to go on, or add --fresh")
        if named and config.get("train", {}).get("resume_checkpoint") != named:
            return checkpoint.locate(named, self.log.line)
        return source

    def named(self, resume: str) -> CheckpointSet:
        """The set that `--resume` names; where it is not this run's own, it is remembered."""
        found = checkpoint.locate(resume, self.log.warn)
        if found.folder.resolve() != self.models.resolve():
            self.resumed_from = str(Path(resume).resolve())
        return found

    def resumed_before(self, resume: str) -> CheckpointSet | None:
        """This run's own newest set, if it was resumed from the same place before: the command is being repeated."""
        own = checkpoint.find_newest(self.models)
        metadata = own.load().get("state", {}).get("metadata") if own else None
        if not isinstance(metadata, Mapping) or metadata.get("resumed_from") != str(Path(resume).resolve()):
            return None
        self.log.line(f"note     this run was resumed from {resume} before and is at iteration {own.iteration}; it "
                      "resumes from there. To go back to that file once more, add --fresh")
        self.remembered = True
        return own

    def restore(self, source: CheckpointSet | None) -> None:
        """Bring model, data order, history and generators to where the set was saved."""
        opt, train = self.opt, self.opt["train"]
        parts = source.load() if source else None
        state = (parts or {}).get("state", {})
        loader = opt["datasets"]["train"]
        length, size = len(self.train_set), loader["dataloader_batch_size"]
        per_epoch = max(1, length // size)
        self.iteration = source.iteration if source else 0
        if self.iteration is None:  # others count epochs only
            self.iteration = state["epoch"] * per_epoch
        self.started_at = self.iteration
        self.history = state["history"] if "history" in state else foreign.validations(state, self.iteration)
        self.resumed_from = self.resumed_from or (state.get("metadata") or {}).get("resumed_from")
        seed, rank = train["manual_seed"], distributed.rank()
        position = state.get("sampler_state") or {"epoch": self.iteration // per_epoch, "offset": 0}
        if position.get("length", length) != length:
            self.log.line(f"data     {position['length']} -> {length} samples: the epoch is begun anew")
            position = {"epoch": position["epoch"], "offset": 0}
        elif position.get("names", self.names) != self.names:
            self.log.warn(f"the training set has {length} samples as before, but others, or in another order: the "
                          "steps from here on are not those of a run that was never stopped")
        try:
            self.batches = EndlessBatches(length, size, seed=seed, shuffle=loader["dataloader_shuffle"],
                                          position=(position["epoch"], position["offset"]), rank=rank,
                                          world_size=distributed.world_size())
        except ValueError as error:
            raise options.OptionError(f"{loader.where}: {error}") from None
        if train["total_epochs"] is not None:
            train["total_iter"] = self.iteration + self.batches.batches_until(train["total_epochs"])
        self.reports = self.model.init_train(parts, str(source.path) if source else "")
        self.model.update_learning_rate(max(self.iteration - 1, 0))  # of the last finished step, as a checkpoint has it
        self.model.load_extra_state(state)
        if "ranks" in state:
            self.model.load_local_state(state["ranks"])
        self.banner(source, parts or {})
        # Restored last: nothing after this line may draw from a global generator but the training itself.
        generators = state.get("rng_state", [])
        if rank < len(generators):
            determinism.set_rng_state(generators[rank])
        elif rank:  # each process draws for itself
            seed_generators(int(sample_rng(seed, self.iteration, rank).integers(2**63)))

    def banner(self, source: CheckpointSet | None, parts: Mapping[str, Any]) -> None:
        """What runs, on what data, restored from where, and what is different or absent."""
        state = parts.get("state", {})
        say, opt, train = self.log.line, self.opt, self.opt["train"]
        names = ", ".join(f"{label} {self.model.describe_network(net).splitlines()[0]}"
                          for label, net in self.model.networks.items())
        world = distributed.world_size()
        say(f"Perdure  {opt['task']} in {self.folder} | {names} | {f'{world} processes, ' if world > 1 else ''}"
            f"{self.model.device}, {torch.get_num_threads()} threads, torch {torch.__version__}")
        if self.model.device.type == "cuda" and not opt["deterministic"]:
            say("note     on CUDA a resume is bit for bit only with deterministic: true; without it kernels add in any "
                "order")
        if world > 2 and (opt["use_static_graph"] or not opt["find_unused_parameters"]):
            say("note     find_unused_parameters false and use_static_graph sum the first step's gradients in another "
                "order: a resumed run may differ in the last bits")
        tests = "; ".join(f"{name}: {len(dataset)} clips" for name, dataset in self.test_sets.items()) or "no test set"
        loader = opt["datasets"]["train"]
        say(f"data     {loader['dataset_type']}, {len(self.train_set)} samples, "
            f"{self.batches.batches_per_epoch} batches of {loader['dataloader_batch_size']} an epoch; {tests}")
        for report in self.reports:
            say(f"weights  {report}")
        if source is None:
            say(f"start    at iteration 0 of {train['total_iter']}, learning rate {self.rate(0):.3g}")
            return
        say(f"resume   from {source.path}: iteration {self.iteration} of {train['total_iter']}, "
            f"epoch {self.batches.position[0]}"
            + (f", next learning rate {self.rate(self.iteration):.3g}" if self.iteration < train["total_iter"] else ""))
        wanted = [*self.model.networks, *self.model.optimizers, "state"]
        absent = [label for label in wanted if label not in parts]
        own = [name for name in self.model.extra_state(self.iteration) if name not in checkpoint.OF_EVERY_MODEL]
        absent += [name for name in ("rng_state", "sampler_state", *own) if state and name not in state]
        if absent:
            say(f"absent   {', '.join(absent)}: begun anew, so not bit for bit the run that was interrupted")
        if state and "scheduler_state_dict" not in state:
            say("note     no scheduler in it, and none is needed: the learning rate follows from the iteration")
        if "sampler_state" not in state:
            self.banner_of_others(state)
        if state.get("config") and not options.is_ours(state["config"]):
            say("note     its options are another program's and are not compared")
        if not all(sealed.has_checksums(path) for path in source.files.values()):
            say("note     it is in torch's old layout, which has no checksums: damage in it can't be noticed")
        if not source.committed and torch.__version__ < (2, 10):  # CVE-2026-24747
            say(f"note     torch {torch.__version__} can be harmed by files made to harm; before 2.10, read only those "
                "you trust")
        then, now = state.get("environment", {}), self.environment()
        changed = [f"{key} {then[key]} -> {now[key]}" for key in now if key in then and then[key] != now[key]]
        if changed:
            say(f"machine  changed, so results may differ in the last bits: {', '.join(changed)}")
        for line in differences(state.get("config", {}), opt):
            say(f"options  {line}")

    def banner_of_others(self, state: Mapping[str, Any]) -> None:
        """What of another program's state was taken over, and what can't be."""
        if self.history:
            best = next(row for row in self.history if row["iteration"] == self.best) if self.best else {}
            self.log.line(f"history  {len(self.history)} validations taken over"
                          + (f", the best at iteration {self.best}: {self.best_metric[0]} {number(self.metric(best))}"
                             if best else f"; none of them has this run's metric, {self.best_metric[0]}"))
        elif "metric" in state:
            self.log.line(f"note     its own value {number(state['metric'])} is of no validation of this run: the best "
                          "starts over")
        if found := foreign.describe_scheduler(state):
            rate, kind = found
            if abs(rate - self.rate(self.iteration)) > 1e-3 * rate:
                self.log.line(f"note     its {kind} stood at learning rate {rate:.3g}; here it follows from the "
                              f"options: {self.rate(self.iteration):.3g}")

    def environment(self) -> dict[str, Any]:
        return {**determinism.environment(), "device": self.model.device.type, "processes": distributed.world_size()}

    def rate(self, finished: int) -> float:
        """The learning rate of the step after so many finished ones."""
        label, optimizer = next(iter(self.model.optimizers.items()))
        return self.model.schedules[label](optimizer.param_groups[0]["initial_lr"], finished)

    # ------------------------------------------------ during training

    @property
    def position(self) -> tuple[int, int]:
        """`(epoch, offset)` in the data after the steps done so far."""
        return self.batches.after(self.iteration - self.started_at)

    @property
    def epochs_done(self) -> int:
        epoch, offset = self.position
        return epoch + (offset + self.batches.batch_size > self.batches.length)

    def metric(self, row: Mapping[str, Any]) -> float | None:
        """The metric that counts, in a row of the history."""
        name = self.best_metric[0]
        return next((value for key, value in row.items() if key == name or key.endswith(f".{name}")), None)

    @property
    def best(self) -> int | None:
        """The iteration of the best validation so far."""
        rows = [row for row in self.history if self.metric(row) is not None and math.isfinite(self.metric(row))]
        choose = max if self.best_metric[1] == "max" else min
        return choose(rows, key=self.metric)["iteration"] if rows else None

    def state(self) -> dict[str, Any]:
        """Everything but networks and optimizers that makes the next step. All processes ask together."""
        epoch, offset = self.position
        validated = self.history and self.history[-1]["iteration"] == self.iteration
        several = {"ranks": distributed.gather(self.model.local_state())} if distributed.world_size() > 1 else {}
        return {"version": checkpoint.VERSION, "iteration": self.iteration, "epoch": self.epochs_done,
                "sampler_state": {"epoch": epoch, "offset": offset, "length": len(self.train_set),
                                  "names": self.names},
                "rng_state": distributed.gather(determinism.rng_state()), "history": self.history, "best": self.best,
                "metric": self.metric(self.history[-1]) if validated else None,
                "metadata": {"model": self.opt["model"], "stage": self.opt["stage"],
                             "best_metric": list(self.best_metric), "resumed_from": self.resumed_from},
                "config": plain(self.opt), "environment": self.environment(), "timestamp": checkpoint.timestamp(),
                **self.model.extra_state(self.iteration), **several}

    def save(self, reason: str = "regular", amend: bool = False) -> None:
        """Commit a checkpoint of this iteration, then drop what it supersedes. All processes come together for it.

        Args: amend: the checkpoint is there already, and the metrics of its validation are to be in it, too.
        Raises: NonFiniteLoss before anything is written that training could not continue from.
        """
        saved = distributed.from_main(lambda: self.saved_at == self.iteration)
        if self.iteration == 0 or saved and not amend:
            return
        self.finish_save()
        self.check_finite()
        if fault := distributed.from_main(self.model.find_non_finite):
            raise NonFiniteLoss(f"after iteration {self.iteration} {fault} is not finite, so no checkpoint of it is "
                                "written; the last one is intact; lower the learning rate, or set "
                                "train.G_optimizer_clipgrad")
        state = self.state()
        distributed.from_main(lambda: self.write(state, "regular" if self.save_due() else reason))

    def write(self, state: dict[str, Any], reason: str) -> None:
        """Begin to write a checkpoint, or do it, as the options say."""
        self.amending, self.refusal = self.saved_at == self.iteration, ""
        self.saved_at, self.saved_as = self.iteration, self.saved_as if self.amending else reason
        try:
            self.saver.save(self.iteration, {**self.model.parts(), "state": state}, best=state["best"],
                            amend=self.amending, reason=self.saved_as, epoch=state["epoch"], metric=state["metric"])
        except (OSError, RuntimeError) as error:
            self.save_failed(error)
        self.look_at_save()

    def save_surely(self, reason: str) -> None:
        """Save before the process ends; a save that fails is tried again for some seconds, whatever the options say.

        Raises: CheckpointError when it fails to the end.
        """
        for pause in (0, 1, 4):
            time.sleep(pause)
            self.save(reason, amend=distributed.from_main(lambda: bool(self.refusal)))
            distributed.from_main(self.finish_save)
            if self.iteration == 0 or not distributed.from_main(lambda: self.refusal):
                return
        raise CheckpointError(f"{self.models}: checkpoint {self.iteration} was not saved: "
                              f"{distributed.from_main(lambda: self.refusal)}; older checkpoints are intact; mend the "
                              "disk and run the same command: it repeats the steps since the newest one")

    def finish_save(self) -> None:
        """Wait for the save under way and say what became of it."""
        self.saver.wait()
        self.look_at_save()

    def look_at_save(self) -> None:
        """Say what became of a save, once; between two steps this costs nothing."""
        try:
            saved = self.saver.poll()
        except (OSError, RuntimeError) as error:
            self.save_failed(error)
            return
        if saved and not saved.amended:
            waited = f", {saved.waited:.2f} s of it waited for" if self.saver.background else ""
            self.log.line(f"saved    {saved.found.path} in {saved.seconds:.1f} s{waited}")

    def save_failed(self, error: Exception) -> None:
        """A save that failed: the run ends, or continues without, as the options say. Older ones are intact."""
        self.refusal = str(error).splitlines()[0]
        problem = f"checkpoint {self.saved_at} was not saved: {self.refusal}"
        if self.amending:
            problem = f"checkpoint {self.saved_at} is without the metrics of its validation: {self.refusal}"
        if self.opt["checkpoint"]["on_save_error"] == "stop":
            raise CheckpointError(f"{self.models}: {problem}; older checkpoints are intact") from None
        if not self.amending:
            self.saved_at = None
        self.log.warn(f"{problem}; the next interval tries again")

    def check_finite(self) -> None:
        """Stop at a NaN or infinite loss. Looks at all steps since the last look: the device is waited for rarely."""
        scaler = self.model.scaler
        if self.pending and scaler and scaler.get_scale() < LEAST_SCALE:
            raise NonFiniteLoss(f"the gradient was not finite in so many steps until iteration {self.iteration} that "
                                f"fp16's loss scale fell to {scaler.get_scale():.1e}: nothing is learnt any more; the "
                                'last checkpoint is intact; set train.amp to "bf16", or lower the learning rate')
        pending, self.pending = self.pending, []
        for iteration, losses, norms in pending:
            values = {name: float(value) for name, value in {**losses, **norms}.items()}
            if not all(math.isfinite(value) for value in values.values()):
                terms = ", ".join(f"{name} {value}" for name, value in values.items())
                what = "loss" if not all(math.isfinite(values[name]) for name in losses) else "gradient"
                raise NonFiniteLoss(f"the {what} is not finite at iteration {iteration}: {terms}; the last checkpoint "
                                    'is intact; lower the learning rate, or set train.on_nan to "skip"')

    def record(self) -> None:
        """A log line and a CSV row of this iteration."""
        losses, rate = distributed.means(self.model.current_log()), self.model.current_learning_rate()
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
        return self.validation_due() and self.iteration not in [row["iteration"] for row in self.history]

    def validate(self, stop: StopRequest) -> None:
        """Metrics and pictures of every test set; then the checkpoint of this iteration is marked, or the best saved.

        The training's generators are left as they are. A stop request ends it after the current sample, and the
        resumed run finishes the rest. Whatever fails in it, the steps so far are saved first.
        """
        began = time.monotonic()
        for network in self.model.networks.values():
            distributed.share_buffers(network)
        about = [self.iteration, plain(self.opt["val"]), {name: plain(self.opt["datasets"][name])
                                                          for name in self.test_sets}]
        progress = Progress(self.folder / "log", about).open()
        if progress.attempts > MOST_ATTEMPTS:
            self.log.warn(f"the validation of iteration {self.iteration} was cut off {MOST_ATTEMPTS} times before it "
                          "finished a sample, and is left out; give the job more time, or test on less")
            return
        try:
            with determinism.rng_untouched(), fastest_kernels(False):
                means = evaluate(self.model, self.test_sets, self.log, self.iteration, stop,
                                 self.folder / "images" / f"{self.iteration:06d}" if self.opt["val"]["save_img"]
                                 else None, progress)
        except ValidationError as error:
            self.save(reason="interrupted")
            distributed.from_main(self.finish_save)
            if not isinstance(error.__cause__, (ValueError, OSError, MemoryError, torch.OutOfMemoryError, type(None))):
                self.log.record_traceback(error.__cause__)  # of a fault in the code somebody has to find the place
            raise ValidationError(f"the validation of iteration {self.iteration} failed: {error}; the steps so far are "
                                  "saved; mend this and run the same command") from None
        if means is None:
            stop.settle()
            return
        progress.close()
        self.pace.paused += time.monotonic() - began
        self.history.append({"iteration": self.iteration, **means})
        self.log.row("test", self.history[-1])
        if self.metric(self.history[-1]) is None:
            self.save(reason="interrupted")
            raise options.OptionError(f"{self.opt['opt_path']}: checkpoint.best_metric: {self.best_metric[0]!r} is not "
                                      f"a metric of this run; valid: {', '.join(means)}")
        if distributed.from_main(lambda: self.saved_at == self.iteration):
            self.save(amend=True)
        elif self.best == self.iteration:
            self.save(reason="best")

    # ------------------------------------------------ the loop

    def begin(self, resumed_from: CheckpointSet | None, fresh: bool) -> None:
        """Make the folder: nothing was created before everything was found to be valid."""
        try:
            self.models.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"{self.models}: can't be made: {error.strerror}; is path.root right?") from None
        if self.lock is None:
            self.claim()
            if resumed_from is None and checkpoint.has_traces(self.models):
                raise CheckpointError(f"{self.folder}: another process began this run just now; run the same command "
                                      "again to go on from there")
        checkpoint.try_out(self.models, self.saver.layout)
        for notice in files.notices:
            self.log.warn(notice)
        own = resumed_from is not None and resumed_from.folder.resolve() == self.models.resolve()
        if launch := distributed.launch():
            self.launch_file.write_text(launch)
        archive = checkpoint.put_away(self.models, after=self.iteration if own else -1)
        if archive:
            self.log.line(f"archived {'all' if fresh else 'other' if not own else 'newer'} checkpoints: {archive}")
        for line in checkpoint.clean(self.models):
            self.log.warn(line)
        if own:
            self.saver.relink(self.best)  # what a kill or going back left undone
            self.saved_as = (resumed_from.record or {}).get("reason", "regular")
        else:
            Progress(self.folder / "log", None).close()
        settings = options.flatten(plain(self.opt))
        self.log.open(self.folder / "log", self.iteration, settings, {"test": self.history})
        record = self.folder / "options" / f"{Path(self.opt['opt_path']).stem}_{time.strftime('%y%m%d_%H%M%S')}.json"
        with tolerated(record, self.log.warn):
            record.parent.mkdir(exist_ok=True)
            record.write_text(json.dumps(plain(self.opt), indent=2) + "\n", encoding="utf-8")
        self.saved_at = self.iteration if own else None

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
                self.pending.append((self.iteration, dict(model.log_dict), dict(model.gradient_norms)))
                if model.device.type == "cpu":
                    self.check_finite()
            elif model.skipped_in_a_row >= train["nan_limit"]:
                raise NonFiniteLoss(f"{model.skipped_in_a_row} steps in a row were left out until iteration "
                                    f"{self.iteration}, each for a loss or gradient that is not finite; the last "
                                    "checkpoint is intact; lower the learning rate, or raise train.nan_limit")
            self.show_progress()
            self.look_at_save()
            if self.due(train["checkpoint_print"], None):
                self.check_finite()
                self.record()
            if self.save_due():
                self.save()
            if self.validation_due():  # after the save: whatever happens in it, the steps are safe
                self.check_finite()
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
        source = distributed.from_main(lambda: run.find_source(resume, init_from, fresh))
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
        distributed.from_main(lambda: run.begin(source, fresh))
        run.report = stack.enter_context(RunReport(
            run.folder, run.models, log.line,
            lambda: {"iteration": run.iteration, "baseline": run.model.baseline_name},
            task=opt["task"], total=opt["train"]["total_iter"], command=command, metric=run.best_metric,
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


# ---------------------------------------------------------------- words


def differences(saved: Mapping, now: Mapping, most: int = 12) -> list[str]:
    """Which options are not those of the checkpoint, a line each; where files lie does not count."""
    if not options.is_ours(saved):
        return []
    a, b = options.flatten(saved), options.flatten(plain(now))
    keys = [k for k in {**a, **b} if a.get(k) != b.get(k) and k != "opt_path" and not k.startswith(("path.", "log."))]
    lines = [f"{k}: {json.dumps(a.get(k))} -> {json.dumps(b.get(k))}" for k in keys]
    return lines if len(lines) <= most else [*lines[:most], f"... and {len(lines) - most} more"]


if __name__ == "__main__":
    sys.exit("train.py is no program; run: python main.py -opt options/train_vrt.json")
