"""Validate a model on its test sets. An interrupted validation resumes at the next sample."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
import traceback
from collections.abc import Container, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from data.loader import clip_name, clips_of
from log.run_log import RunLog
from log.terminal import duration, number
from models.model_base import ModelBase
from options import OptionError
from runtime import distributed
from runtime.determinism import fastest_kernels, lacks_memory, no_memory
from runtime.signals import Interrupted, StopRequest
from runtime.watchdog import watch
from storage.files import save_file
from storage.sealed import verified, with_checksum
from storage.tree import plain

WRITE_EVERY = 5.0  # seconds between two writes of the metrics so far
MOST_ATTEMPTS = 3  # launches in a row that finish no sample of a validation; then it is skipped
CLIP, FRAMES = "clip name", "frame rows"  # in a sample's row, beside its metrics
NAME_BYTES = 120  # longest sample name in a picture's file name; file systems allow 255 bytes in all


class ValidationError(OptionError):
    """A validation that failed on any rank: one line that names the sample and the cause."""


class Progress:
    """Stores the metrics of finished samples in `log/validation_<rank>.json` until the validation ends.

    Each rank writes its own file. A resumed validation reads all of them, also with another world size. If a file
    cannot be written, its samples are validated again.

    Args:
        folder: where the files lie.
        about: everything the metrics depend on (iteration, options). Files with another value are ignored.
    """

    def __init__(self, folder: Path, about: Any):
        self.path = folder / f"validation_{distributed.rank()}.json"
        self.folder = folder
        self.about = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()
        self.rows: dict[str, dict[int, dict[str, float]]] = {}  # by test set and sample index, of all ranks
        self.own: dict[str, dict[int, dict[str, float]]] = {}  # of this rank, in all launches
        self.attempts = 0  # launches in a row that finished no sample of it
        self.wrote = time.monotonic()

    def open(self) -> Progress:
        """Read the metrics of earlier launches. All ranks call it."""
        found = distributed.from_main(self._read)
        self.rows = {name: {index: row for part in found["parts"] for index, row in part.get(name, {}).items()}
                     for name in {name for part in found["parts"] for name in part}}
        self.own = found["parts"][distributed.rank()] if distributed.rank() < len(found["parts"]) else {}
        if distributed.is_main():  # take over the files of ranks that no longer exist
            self.own = {name: dict(rows) for name, rows in self.rows.items()}
        self.attempts = found["attempts"] + 1
        distributed.from_main(self.flush)
        return self

    def _read(self) -> dict[str, Any]:
        parts, attempts = [], 0
        for rank in range(1024):
            path = self.folder / f"validation_{rank}.json"
            if not path.exists():
                break
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                kept = verified(path.read_bytes())
                if kept["about"] == self.about:
                    parts.append({name: {int(index): row for index, row in rows.items()}
                                  for name, rows in kept["rows"].items()})
                    attempts = max(attempts, kept["attempts"])
        return {"parts": parts, "attempts": attempts}

    def add(self, name: str, index: int, row: dict[str, float]) -> None:
        """Add the metrics of a finished sample."""
        self.rows.setdefault(name, {})[index] = self.own.setdefault(name, {})[index] = row
        self.attempts = 0
        if time.monotonic() - self.wrote > WRITE_EVERY:
            self.flush()

    def flush(self) -> None:
        """Write the metrics of this rank."""
        kept = {"about": self.about, "attempts": self.attempts, "rows": self.own}
        with contextlib.suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file(self.path, with_checksum(json.loads(json.dumps(kept))))
        self.wrote = time.monotonic()

    def close(self) -> None:
        """Remove the files of a finished validation."""
        if distributed.is_main():
            for path in self.folder.glob("validation_*.json"):
                with contextlib.suppress(OSError):
                    path.unlink()


def evaluate(model: ModelBase, test_sets: Mapping[str, Any], log: RunLog, iteration: int | None,
             stop: StopRequest, pictures: Path | None,
             progress: Progress | None = None, clips: list[dict[str, Any]] | None = None) -> dict[str, float] | None:
    """Validate every test set. The ranks share the samples, and each writes the pictures of its own.

    Args:
        iteration: None outside training.
        pictures: path prefix of the pictures; None: write none.
        progress: metrics of earlier launches, to which new ones are added; None: start over.
        clips: gets a row for each sample, and for each of its frames.
    Returns: {"<set>.<metric>": mean over its samples}, or None after a stop request.
    Raises: ValidationError on all ranks when a sample fails on any.
    """
    means: dict[str, float] = {}
    shared = model.shares_tests  # else rank 0 needs the pictures of all samples
    progress = progress if shared else None
    for name, dataset in test_sets.items():
        began, rows = time.monotonic(), {}
        known = dict(progress.rows.get(name, {})) if progress else {}
        if len(known) == len(dataset):  # `summarize` may need the state after a sample
            del known[max(known)]
        left = [index for index in range(len(dataset)) if index not in known]
        own = left[distributed.rank() :: distributed.world_size()]
        if not shared:
            own = left if distributed.is_main() else []
        most = model.opt["val"]["num_img"]
        failure, sample = None, None
        try:
            samples = clips_of(dataset, own)
            for index in own:
                sample = stop.fetch(partial(next, samples), "sample", f"sample {index} of {name}")  # or is interrupted
                log.progress(f"validating {name}: {len(known) + len(rows)} of {len(dataset)}")
                model.frame_rows, model.sample = [], (name, index)
                rows[index] = {**model.validate(sample), FRAMES: model.frame_rows, CLIP: clip_name(sample)}
                if progress:
                    progress.add(name, index, rows[index])
                if pictures and model.shown and (most is None or index < most):
                    clip = short_name(clip_name(sample))
                    path = pictures.with_name(f"{pictures.name}_{name}_{clip}.png")
                    log.pictures(path, model.shown, f"{name}/{clip}", iteration)
                sample = None
        except Interrupted:
            rows, sample = None, None
        except Exception as error:
            failure = error
            traceback.clear_frames(error.__traceback__)  # what they hold may fill a card, and the save needs room
        watch.begin("wait", f"the other ranks' samples of {name}")
        where = f"test set {name}" if sample is None else f"test set {name}, {clip_name(sample)}"
        gathered = distributed.gather((rows, failure and f"{where}: {explain(failure, model.opt['val'])}"))
        watch.begin("rest", f"the metrics of {name}")
        if progress and (failure or None in [part for part, _ in gathered]):
            progress.flush()
        if failures := [reason for _, reason in gathered if reason]:
            raise ValidationError(failures[0]) from failure
        if None in [part for part, _ in gathered]:
            return None
        for part, _ in gathered:
            known |= part
        rows = [dict(known[index]) for index in sorted(known)]
        for row in rows:
            clip, frames = row.pop(CLIP, ""), row.pop(FRAMES, [])
            if clips is not None:
                clips.append({"set": name, "clip": clip, "frame": "", **row})
                clips += [{"set": name, "clip": clip, "frame": i, **frame} for i, frame in enumerate(frames)]
        summarize = partial(model.summarize, name, rows)
        metrics = summarize() if shared else distributed.from_main(summarize)
        means |= {f"{name}.{key}": value for key, value in metrics.items()}
        printed = {key: value for key, value in metrics.items() if model.is_printed(key)}
        when = "metrics " if iteration is None else f"test     {iteration:,}"
        log.line(f"{when} {name}: {describe_metrics(printed, model.baseline_name)} "
                 f"({duration(time.monotonic() - began)})")
    return means


def validate(run: Any, stop: StopRequest) -> None:
    """Validate the run's test sets, then add the metrics to this iteration's checkpoint, or save it as the best.

    A stop request ends the validation after the current sample, and the
    resumed run finishes the rest. If it fails, the steps so far are saved first.
    """
    began = time.monotonic()
    about = [run.iteration, plain(run.opt["val"]), {name: plain(run.opt["datasets"][name])
                                                    for name in run.test_sets}]
    clips: list[dict[str, Any]] = []
    progress = Progress(run.folder / "log", about).open()
    if progress.attempts > MOST_ATTEMPTS:
        run.log.warn(f"the validation of iteration {run.iteration} was interrupted {MOST_ATTEMPTS} times before it "
                     "finished a sample, and is skipped; give the job more time, or test on less data")
        return
    try:
        with fastest_kernels(False):
            means = evaluate(run.model, run.test_sets, run.log, run.iteration, stop,
                             run.folder / "images" / f"{run.iteration:06d}" if run.opt["val"]["save_img"]
                             else None, progress, clips)
    except ValidationError as error:
        run.save(reason="interrupted")
        distributed.from_main(run.saves.finish)
        if not (lacks_memory(error.__cause__) or isinstance(error.__cause__, (ValueError, OSError, type(None)))):
            run.log.record_traceback(error.__cause__)  # an unexpected error is a fault in the code
        raise ValidationError(f"the validation of iteration {run.iteration} failed: {error}; the steps so far are "
                              "saved; mend this and run the same command") from None
    if means is None:
        stop.agree()
        return
    progress.close()
    run.pace.paused += time.monotonic() - began
    run.history.rows.append({"iteration": run.iteration, **means})
    run.log.row("test", run.history.rows[-1])
    run.log.replace_rows("test_clips", run.iteration, clips)
    if run.history.value(run.history.rows[-1]) is None:
        run.save(reason="interrupted")
        raise OptionError(f"{run.opt['opt_path']}: checkpoint.best_metric: {run.history.metric!r} is not "
                          f"a metric of this run; valid: {', '.join(means)}")
    if distributed.from_main(lambda: run.saves.at == run.iteration):
        run.save(amend=True)
    elif run.history.best == run.iteration:
        run.save(reason="best")


def explain(error: BaseException, val: Container[str]) -> str:
    """Describe an error in one line, with a remedy by options of this `val` section if it is about memory."""
    text = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    if lacks_memory(error):
        keys = [f"val.{key}" for key in ("num_frame_testing", "size_patch_testing", "tile") if key in val]
        pieces = f"pieces ({', '.join(keys)}) or smaller " if keys else ""
        return f"{no_memory(error)}; test on smaller {pieces}pictures"
    return text if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: {text}"


def short_name(name: str) -> str:
    """Shorten a sample's name to a part of a file name: no separators, at most NAME_BYTES bytes, unique by a digest."""
    name = name.replace(os.sep, "_")
    text = os.fsencode(name)
    if len(text) <= NAME_BYTES:
        return name
    digest = hashlib.sha256(text).hexdigest()[:8]
    return f"{os.fsdecode(text[: NAME_BYTES - 9]).encode(errors='ignore').decode(errors='ignore')}_{digest}"


def describe_losses(losses: Mapping[str, float]) -> str:
    """Format loss terms: 'G_loss 0.0123  D_loss 0.4560'."""
    return "  ".join(f"{name} {number(value)}" for name, value in losses.items())


def describe_metrics(metrics: Mapping[str, float], baseline: str) -> str:
    """Format the metrics of a test set: 'psnr 31.20 (bicubic 30.80), ssim ...'.

    Args: baseline: metrics named `<metric>_<baseline>` go into the parentheses.
    """
    words = []
    for key, value in metrics.items():
        if not (baseline and key.endswith(f"_{baseline}")):
            base = metrics.get(f"{key}_{baseline}")
            words.append(f"{key} {value:.4f}" + (f" ({baseline} {base:.4f})" if base is not None else ""))
    return ", ".join(words)
