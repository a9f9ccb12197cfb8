"""Resume a run: find its checkpoint, restore it, print the banner, and prepare its folder.

`run` is a `train.Run`.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import checkpoint
import options
from checkpoint import CheckpointError, CheckpointSet
from data import DATASETS
from data.sampler import EndlessBatches
from log.run_log import warn_on_write_error
from log.terminal import number
from models import MODELS, NETWORKS
from runtime import distributed
from runtime.evaluate import Progress
from runtime.watchdog import watch
from storage import files, foreign, sealed
from storage.tree import plain

WRITTEN = ("images", "inference", "log", "logs", "options")  # what a run writes in its folder besides checkpoints
OPTIONAL = ("skipped", "skipped_in_a_row", "scheduler_state_dict", "scaler_state_dict")  # keys of a state


def find_source(run: Any, resume: str | None, init_from: str | None, fresh: bool) -> CheckpointSet | None:
    """Find the set to resume from: the named one, else the newest intact one of this run, else None.

    `train.resume_checkpoint` counts as named until this run has a set that was trained from it. When a launcher repeats
    the command, --fresh, --resume and --init-from are not applied a second time.

    Raises: CheckpointError when there are checkpoints and none of them is usable.
    """
    watch.begin("start", f"looking for checkpoints in {run.models} and verifying the newest")
    again = distributed.restarted() and run.launch_file.exists()
    if again and run.launch_file.read_text() == distributed.launch():
        source = find_own(run, run.log.line)
        return find_named(run, resume) if resume and not source else source
    if resume:
        source = (None if fresh else resumed_before(run, resume)) or find_named(run, resume)
        if fresh and source.folder.resolve() in run.saves.places():
            raise CheckpointError(f"--fresh moves away what this run has, and {resume} is a part of it; leave "
                                  "--fresh out to go back to that checkpoint: newer ones are archived")
        return source
    if (named := run.opt["train"]["resume_checkpoint"]) and (init_from or fresh):
        raise CheckpointError(f"{'--fresh' if fresh else '--init-from'} starts at iteration 0, but "
                              f"train.resume_checkpoint is {named}; leave one of them out")
    if fresh:
        return None
    why: list[str] = []
    source = find_own(run, lambda line: (why.append(line), run.log.warn(line)))
    if source is None and (why or checkpoint.has_checkpoints(run.models)):
        raise CheckpointError(f"{run.models}: there are checkpoints, but none is usable"
                              f"{checkpoint.describe_faults(why)}; name another one with --resume, or start over "
                              "with --fresh, which archives them")
    config = source.load_state().get("config") if source and (init_from or named) else None
    config = config if options.is_perdure_config(config or {}) else {}
    if source and init_from and config.get("path", {}).get("init_from") != init_from:
        raise CheckpointError(f"--init-from starts a new run, but {run.models} holds iteration "
                              f"{source.iteration}, not started from it; leave it out to resume, or add --fresh")
    if named and config.get("train", {}).get("resume_checkpoint") != named:
        return checkpoint.locate(named, run.log.line)
    return source


def find_own(run: Any, report: checkpoint.Report = lambda line: None) -> CheckpointSet | None:
    """Return the newest intact set of this run, from `path.mirror` where that has a newer one than its own folder."""
    found = checkpoint.find_newest(run.models, report)
    for copy in reversed(checkpoint.find_sets(run.saves.mirror.folder) if run.saves.mirror else []):
        if found and copy.iteration <= (found.iteration or 0):
            break
        if not (fault := copy.fault()):
            run.log.line(f"note     {run.models} has {f'iteration {found.iteration}' if found else 'no checkpoint'}, "
                         f"the mirror has {copy.iteration}")
            return copy
        report(f"the copy of checkpoint {copy.iteration} in {copy.folder} is not used: {fault}")
    return found


def find_named(run: Any, resume: str) -> CheckpointSet:
    """Load the set that `--resume` names, and record it if it belongs to another run.

    The file of an interruption that a later save of this run replaced stands for its newest set.
    """
    interrupted = (run.models / run.saves.layout.interrupted).resolve()
    if not Path(resume).exists() and Path(resume).resolve() == interrupted and (found := find_own(run, run.log.warn)):
        run.log.line(f"note     {resume} was replaced by later saves of this run; it resumes from the newest")
        run.remembered = True
        return found
    found = checkpoint.locate(resume, run.log.warn)
    if found.folder.resolve() not in run.saves.places():
        run.resumed_from = str(Path(resume).resolve())
    return found


def resumed_before(run: Any, resume: str) -> CheckpointSet | None:
    """Find this run's newest set if the run was resumed from the same checkpoint before: the command is repeated."""
    own = find_own(run)
    metadata = own.load_state().get("metadata") if own else None
    if not isinstance(metadata, Mapping) or metadata.get("resumed_from") != str(Path(resume).resolve()):
        return None
    run.log.line(f"note     this run was resumed from {resume} before and is at iteration {own.iteration}; it "
                 "resumes from there. To go back to that file once more, add --fresh")
    run.remembered = True
    return own


def check_owner(run: Any, config: Mapping[str, Any]) -> None:
    """Raise CheckpointError where a folder that the options name holds the checkpoints of another run."""
    for key, name in (("task", "task"), ("opt_path", "option file"), ("stage", "stage")):
        then, now = (Path(one[key]).name if one.get(key) else None for one in (config, run.opt))
        if run.opt["path"]["models"] and key in config and then != now:
            raise CheckpointError(f"{run.models}: holds a run of {name} {then}, and this one is of {name} {now}; give "
                                  f"it a folder of its own (path.models), or resume that run with --resume "
                                  f"{run.models}, or archive it with --fresh")


def restore(run: Any, source: CheckpointSet | None, named: bool = False) -> None:
    """Restore data order, history and model from a set; None: start at iteration 0.

    Args: named: the user named the set, which may then be of another run.
    """
    place(run, source, named)
    restore_model(run, source)


def place(run: Any, source: CheckpointSet | None, named: bool = False) -> None:
    """Restore data order and history, see `restore`: this is enough to tell whether the run is finished."""
    watch.begin("start", f"reading {source.path if source else 'the first weights'}")
    opt, train = run.opt, run.opt["train"]
    state = source.load_state() if source else {}
    if source and not named and source.folder.resolve() == run.models.resolve():
        check_owner(run, state.get("config") or {})
    loader = opt["datasets"]["train"]
    length, size = len(run.train_set), loader["dataloader_batch_size"]
    per_epoch = max(1, length // size)
    run.iteration = source.iteration if source else 0
    if run.iteration is None:  # others count epochs only
        run.iteration = state["epoch"] * per_epoch
    run.started_at = run.iteration
    watch.inherit(source and source.record and source.record.get("longest"))
    run.history.rows = state["history"] if "history" in state else foreign.convert_validations(state, run.iteration)
    run.saved_config = state.get("config") or {}
    run.resumed_from = run.resumed_from or (state.get("metadata") or {}).get("resumed_from")
    seed, rank = train["manual_seed"], distributed.rank()
    position = state.get("sampler_state") or {"epoch": run.iteration // per_epoch, "offset": 0}
    if position.get("length", length) != length:
        run.log.line(f"data     {position['length']} -> {length} samples: the epoch starts over")
        position = {"epoch": position["epoch"], "offset": 0}
    elif position.get("names", run.names) != run.names:
        run.log.warn(f"the training set has {length} samples as before, but other ones, or in another order: "
                     "the steps from here on are not those of an uninterrupted run")
    try:
        run.batches = EndlessBatches(length, size, seed=seed, shuffle=loader["dataloader_shuffle"],
                                     position=(position["epoch"], position["offset"]), rank=rank,
                                     world_size=distributed.world_size())
        run.micro_batches = distributed.num_micro_batches(train["accumulate"])
        if size % run.micro_batches:
            raise ValueError(f"a batch of {size} can't be cut into {run.micro_batches} micro-batches; use a multiple")
    except ValueError as error:
        where = options.origin_of(opt, "datasets.train.dataloader_batch_size")
        raise options.OptionError(f"{where}: datasets.train: {error}") from None
    if train["total_epochs"] is not None:
        train["total_iter"] = run.iteration + run.batches.batches_until(train["total_epochs"])


def restore_model(run: Any, source: CheckpointSet | None) -> None:
    """Restore the model, see `restore`, and print what was restored."""
    parts = source.load() if source else None
    state = (parts or {}).get("state", {})
    run.reports = run.model.init_train(parts, str(source.path) if source else "")
    if source and (fault := run.model.find_non_finite()):
        raise CheckpointError(f"{source.path}: {fault} is not finite, so training cannot continue; name another "
                              "checkpoint with --resume")
    run.model.update_learning_rate(max(run.iteration - 1, 0))  # the rate of the last finished step, as in a checkpoint
    run.model.load_extra_state(state)
    banner(run, source, parts or {})


def banner(run: Any, source: CheckpointSet | None, parts: Mapping[str, Any]) -> None:
    """Print what runs, on what data, restored from where, and what differs or is absent."""
    state = parts.get("state", {})
    say, opt, train = run.log.line, run.opt, run.opt["train"]
    names = ", ".join(f"{label} {run.model.describe_network(net).splitlines()[0]}"
                      for label, net in run.model.networks.items())
    world = distributed.world_size()
    say(f"Perdure  {opt['task']} in {run.folder} | {names} | {f'{world} processes, ' if world > 1 else ''}"
        f"{run.model.device}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    if run.model.device.type == "cuda" and not opt["deterministic"]:
        say("note     on CUDA a resume is bit for bit only with deterministic: true; without it kernels sum in any "
            "order")
    tests = "; ".join(f"{name}: {len(dataset)} clips" for name, dataset in run.test_sets.items()) or "no test set"
    loader = opt["datasets"]["train"]
    say(f"data     {loader['dataset_type']}, {len(run.train_set)} samples, "
        f"{run.batches.batches_per_epoch} batches of {loader['dataloader_batch_size']} an epoch; {tests}")
    worlds = [2**k for k in range(run.micro_batches.bit_length()) if run.micro_batches % 2**k == 0]
    if run.micro_batches > 1:
        say(f"step     {run.micro_batches} micro-batches; equal bits on {', '.join(map(str, worlds))} processes"
            if world in worlds else
            f"step     {run.micro_batches} micro-batches; equal bits only on {world} processes")
    for report in run.reports:
        say(f"weights  {report}")
    if source is None:
        say(f"start    at iteration 0 of {train['total_iter']}, learning rate {learning_rate(run, 0):.3g}")
        return
    say(resumed(run, source)
        + (f", next epoch {run.epochs_done + 1}, next learning rate {learning_rate(run, run.iteration):.3g}"
           if run.iteration < train["total_iter"] else ""))
    wanted = [*run.model.networks, *run.model.optimizers, "state"]
    absent = [label for label in wanted if label not in parts]
    own = [name for name in run.model.extra_state(run.iteration) if name not in OPTIONAL]
    absent += [name for name in ("sampler_state", *own) if state and name not in state]
    if absent:
        say(f"absent   {', '.join(absent)}: starts over, so the run is not bit for bit the interrupted one")
    if "rng_state" in state:
        say("note     it is of a version that saved random generators: draws are new from here, so the run is not bit "
            "for bit the interrupted one")
    if state and "scheduler_state_dict" not in state:
        say("note     it has no scheduler, and none is needed: the learning rate follows from the iteration")
    if "sampler_state" not in state:
        banner_of_others(run, state)
    if state.get("config") and not options.is_perdure_config(state["config"]):
        say("note     its options are those of another program and are not compared")
    if not all(sealed.has_checksums(path) for path in source.files.values()):
        say("note     it is in torch's old layout, which has no checksums: damage in it cannot be detected")
    if not source.committed and torch.__version__ < (2, 10):  # CVE-2026-24747
        say(f"note     torch {torch.__version__} has a vulnerability in reading such files; before 2.10, read only "
            "files that you trust")
    then, now = state.get("environment", {}), run.environment()
    changed = [f"{key} {then[key]} -> {now[key]}" for key in now if key in then and then[key] != now[key]
               and not (key == "processes" and {then[key], now[key]} <= set(worlds))]  # which gives equal bits
    if changed:
        say(f"machine  changed, so results may differ in the last bits: {', '.join(changed)}")
    for line in differing_options(run):
        say(line)


def resumed(run: Any, source: CheckpointSet) -> str:
    """Return the line that says where the run resumes."""
    return f"resume   from {source.path}: iteration {run.iteration} of {run.opt['train']['total_iter']}, " \
           f"epoch {run.epochs_done} finished"


def report_finished(run: Any, source: CheckpointSet) -> None:
    """Print that the run has no steps left, and which options differ from those it was trained with."""
    for line in (resumed(run, source), *differing_options(run)):
        run.log.line(line)
    run.log.line(f"finished at iteration {run.iteration} of {run.opt['train']['total_iter']}: nothing left to do; "
                 f"raise {run.length_key} to train longer")


def banner_of_others(run: Any, state: Mapping[str, Any]) -> None:
    """Print what was taken over from another program's state, and what cannot be."""
    if rows := run.history.rows:
        best, metric = run.history.best, run.history.metric
        value = next((run.history.value(row) for row in rows if row["iteration"] == best), None)
        run.log.line(f"history  {len(rows)} validations taken over"
                     + (f", the best at iteration {best}: {metric} {number(value)}"
                        if best else f"; none of them has this run's metric, {metric}"))
    elif "metric" in state:
        run.log.line(f"note     its value {number(state['metric'])} is not from a validation of this run: the best "
                     "starts over")
    if found := foreign.describe_scheduler(state):
        rate, kind = found
        if abs(rate - learning_rate(run, run.iteration)) > 1e-3 * rate:
            run.log.line(f"note     its {kind} was at learning rate {rate:.3g}; here it follows from the "
                         f"options: {learning_rate(run, run.iteration):.3g}")


def learning_rate(run: Any, finished: int) -> float:
    """Return the learning rate of the step after this many finished ones."""
    label, optimizer = next(iter(run.model.optimizers.items()))
    return run.model.schedules[label](optimizer.param_groups[0]["initial_lr"], finished)


def differing_options(run: Any, most: int = 12) -> list[str]:
    """List the options that differ from the checkpoint's, a line each. Paths are not compared."""
    if not options.is_perdure_config(run.saved_config):
        return []
    a, b = options.flatten(run.saved_config), options.flatten(plain(run.opt))
    with contextlib.suppress(options.OptionError):  # an option that is newer than the checkpoint had its default
        a = options.flatten(options.parse("", [], MODELS, NETWORKS, DATASETS, tree=run.saved_config)[0]) | a
    keys = [k for k in {**a, **b} if a.get(k) != b.get(k) and k != "opt_path" and not k.startswith(("path.", "log."))]
    lines = [f"options  {k}: {' -> '.join(json.dumps(c[k]) if k in c else 'default' for c in (a, b))}" for k in keys]
    return lines if len(lines) <= most else [*lines[:most], f"options  ... and {len(lines) - most} more"]


def open_folder(run: Any, resumed_from: CheckpointSet | None, fresh: bool) -> None:
    """Create and lock the run's folder and open its log. Called after everything was found valid."""
    watch.begin("start", f"trying a save in {run.models}")
    if run.saves.mirror:
        lock_mirror(run)  # first, so that a mistake in it leaves nothing half-made
    try:
        run.models.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        where = options.origin_of(run.opt, "path.models" if run.opt["path"]["models"] else "path.root")
        raise CheckpointError(f"{where}: {run.models}: can't be made: {error.strerror}; give another folder") from None
    if run.lock is None:
        run.claim()
        if resumed_from is None and checkpoint.has_checkpoints(run.models):
            raise CheckpointError(f"{run.folder}: another process started this run just now; run the same command "
                                  "again to resume it")
    checkpoint.check_writable(run.models, run.saves.layout)
    for notice in files.notices:
        run.log.warn(notice)
    own = resumed_from is not None and resumed_from.folder.resolve() in run.saves.places()
    if launch := distributed.launch():
        run.launch_file.write_text(launch)
    written = [run.folder / name for name in WRITTEN if (run.folder / name).exists()] if fresh and not own else []
    archive = checkpoint.archive(run.models, after=run.iteration if own else -1, also=written)
    if archive:
        what = "all that the run had" if fresh and not own else f"{'newer' if own else 'other'} checkpoints"
        run.log.line(f"archived {what}: {archive}")
    for line in checkpoint.clean(run.models):
        run.log.warn(line)
    if run.saves.mirror:
        open_mirror(run, resumed_from if own else None)
    run.saves.followers.output = run.folder / "log" / "after_save.txt"
    if own:
        run.saves.saver.relink(run.history.best)  # what a kill or going back left undone
        run.saves.reason = (resumed_from.record or {}).get("reason", "regular")
    else:
        Progress(run.folder / "log", None).close()
    settings = options.flatten(plain(run.opt))
    run.log.open(run.folder / "log", run.iteration, settings, {"test": run.history.rows})
    record = run.folder / "options" / f"{Path(run.opt['opt_path']).stem}_{time.strftime('%y%m%d_%H%M%S')}.json"
    with warn_on_write_error(record, run.log.warn):
        record.parent.mkdir(exist_ok=True)
        record.write_text(json.dumps(plain(run.opt), indent=2) + "\n", encoding="utf-8")
    run.saves.at = run.iteration if own else None


def lock_mirror(run: Any) -> None:
    """Create and lock the second folder."""
    mirror = run.saves.mirror.folder
    try:
        mirror.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise mirror_error(mirror, error) from None
    run.saves.mirror_lock = files.FolderLock(mirror)


def mirror_error(mirror: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"{mirror}: path.mirror can't be written: {error.strerror or error}; mend it, or set it to "
                           "null")


def open_mirror(run: Any, own: CheckpointSet | None) -> None:
    """Prepare the second folder as the first one, and copy what only one of them has.

    Args: own: the run's newest set; None: it starts over.
    """
    mirror = run.saves.mirror.folder
    try:
        checkpoint.archive(mirror, after=run.iteration if own else -1)
        checkpoint.clean(mirror)
        wanted = {run.iteration, run.history.best} if own else ()
        here = {found.iteration for found in checkpoint.find_sets(run.models) if not found.fault()} if wanted else ()
        for copy in checkpoint.find_sets(mirror):
            if copy.iteration in wanted and copy.iteration not in here and not copy.fault():
                checkpoint.copy_set(copy, run.models)
                run.log.line(f"copied   checkpoint {copy.iteration} from {mirror}")
    except OSError as error:
        raise mirror_error(mirror, error) from None
    if own and own.folder.resolve() != mirror.resolve():
        run.saves.followers.put(own, run.history.best)
