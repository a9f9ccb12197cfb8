"""Use a trained model: `main.py --test` on the options' test sets, or on any files with --input and --output.

Each result is written as soon as it is computed, and atomically, so that the same command resumes partial output.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import shutil
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import checkpoint
import options
from checkpoint import CheckpointError
from data import DATASETS, movie
from data.folders import unsupported_files
from log.pictures import write_picture
from log.run_log import RunLog, start_log
from log.tables import write_table
from models import MODELS
from models.model_base import ModelBase
from runtime import distributed
from runtime.determinism import lacks_memory, prepare_machine
from runtime.evaluate import describe_losses, evaluate, explain
from runtime.signals import StopRequest
from storage.files import FolderLock, sync_folder
from train import build_model

MADE_BY = "made_by.json"
ANY_NAMES = {"encoding": "utf-8", "errors": "surrogateescape"}  # a file's name may hold any bytes


def infer(opt: options.Section, notices: list[str], *, resume: str | None = None, source: str | None = None,
          output: str | None = None, truth: str | None = None, command: str = "") -> int:
    """Test a model on the options' test sets, or write its results for `source` into the folder `output`.

    Args:
        notices: lines for the user from reading the options.
        resume: a checkpoint or weights file; None: the run's best, else its newest, else path.pretrained_netG.
        source: files or folder to process; None: the test sets.
        output: folder of the results, or a video where the source is one; needed with `source`.
        truth: ground truth of `source`, for metrics.
        command: the command that resumes partial output, to be printed.
    Returns: the exit code.
    Raises: OptionError, CheckpointError: one line.
    """
    if (source is None) != (output is None):
        raise options.OptionError("--input and --output belong together: files to process, and a folder for results")
    with as_option_error():
        videos = movie.outputs(source, Path(output)) if source else []
    prepare_machine(opt)
    options.resolve(MODELS, opt["model"], "model").prepare_inference(opt)
    model = build_model(opt)
    settings = {**opt["log"], "tensorboard": False, "wandb": False}
    with contextlib.closing(start_log(settings, notices)) as log, StopRequest("this sample") as stop:
        log.line(f"weights  {load_weights(model, opt, resume, log)}; {model.device}, {torch.get_num_threads()} threads")
        if source is None:
            sets = {name: options.build(DATASETS, section, "dataset_type")
                    for name, section in opt["datasets"].items() if section["phase"] == "test"}
            if not sets:
                raise options.OptionError(f"{opt['opt_path']}: datasets.test: missing; or give --input and --output")
            pictures = Path(options.run_folder(opt)) / "images" / "use" if opt["val"]["save_img"] else None
            clips: list[dict[str, Any]] = []
            evaluate(model, sets, log, None, stop, pictures, clips=clips)
            if pictures and clips and distributed.is_main():
                columns = list(dict.fromkeys(key for row in clips for key in row))
                write_table(pictures.with_name(f"{pictures.name}_clips.csv"), columns, clips)
            return stop.exit_code
        weights = checkpoint.fingerprint({f"{label}.{key}": value for label, network in model.networks.items()
                                          for key, value in network.state_dict().items()})
        whole = {"task": opt["task"], "weights": weights, **{key: opt["val"][key] for key in model.inference_options}}
        for clip, path in videos:
            origin = whole | origin_of(clip, truth if clip == source else truth and beside(clip, truth))
            if code := write_video(model, origin, path, log, stop, command):
                return code
        if videos:
            return 0
        if Path(source).resolve() == Path(output).resolve():
            raise options.OptionError(f"--output {output}: is the input; name another folder")
        with as_option_error(), owned(Path(output)):
            return write_results(model, whole | origin_of(source, truth), Path(output), log, stop, command)


@contextlib.contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Make a folder for results if there is none, and lock it for this process; it goes again if it stays empty.

    Raises: OSError: it can't be made. CheckpointError: it can't be written, or another process is writing there.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    lock = FolderLock(folder)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows keeps a file that is open
            (folder / ".lock").unlink()
        lock.close()
        with contextlib.suppress(OSError):
            for path in made:
                path.rmdir()


def load_weights(model: ModelBase, opt: Mapping[str, Any], resume: str | None, log: RunLog) -> str:
    """Load the model's weights. Returns a description of them for the log. Raises CheckpointError."""
    if resume and Path(resume).is_file() and not resume.endswith(".json"):
        return model.load_for_inference(checkpoint.load_file(resume), resume)  # exactly this file
    found = checkpoint.locate(resume, log.warn) if resume else checkpoint.find_best(model.save_dir, log.warn)
    if found:
        return model.load_for_inference(found.load(), str(found.path))
    if path := opt["path"]["pretrained_netG"]:
        return model.load_for_inference(checkpoint.load_file(path), path)
    raise CheckpointError(f"{model.save_dir}: no checkpoint yet; train first, or name weights with --resume")


def origin_of(source: str, truth: str | None) -> dict[str, Any]:
    """Return which files results come from."""
    return {"source": os.path.realpath(source), "truth": truth and os.path.realpath(truth)}


def beside(clip: str, folder: str) -> str:
    """Return the video of a folder that has the name of a clip, with any extension. Raises OptionError."""
    with as_option_error():
        found = [path for path in movie.videos_in(folder) if Path(path).stem == Path(clip).stem]
    if not found:
        raise options.OptionError(f"--truth {folder}: has no video named {Path(clip).stem}, as {clip}")
    return found[0]


@contextlib.contextmanager
def as_option_error(val: Container[str] = ()) -> Iterator[None]:
    """Raise errors of a user's files and disk, and lack of memory, as OptionError. Args: val: keys of that section."""
    try:
        yield
    except (CheckpointError, options.OptionError):
        raise
    except Exception as error:
        if lacks_memory(error):
            raise options.OptionError(explain(error, val)) from error
        if isinstance(error, (ValueError, OSError)):
            raise options.OptionError(str(error)) from error
        raise


def write_video(model: ModelBase, origin: Mapping[str, Any], path: Path, log: RunLog, stop: StopRequest,
                command: str) -> int:
    """Write the results for a video as a video; until it is complete, they lie in a folder beside it.

    Returns: the exit code. Raises: OptionError.
    """
    source, kept = origin["source"], path.with_name(f"{path.name}.frames")
    mark = f"made by {checkpoint.fingerprint({}, *origin.items())[:16]}"  # no paths in a file that is published
    if path.resolve() == Path(source):
        raise options.OptionError(f"--output {path}: is the input; name another file")
    with as_option_error():
        if path.exists():
            if movie.mark_of(str(path)) != mark:
                raise options.OptionError(f"--output {path}: exists, and is not the result of these weights, options "
                                          "and input; name another file, or remove it")
            log.line(f"done     {path} was there")
            return 0
        with owned(kept):
            movie.try_writing(path, source)
            names = [model.shown_output.format(name) for name in movie.frame_paths(source)]
            if code := write_results(model, origin, kept, log, stop, command, names):
                return code
            partial = kept / f"{os.getpid()}{path.suffix}"  # a killed command's ffmpeg may live for a moment
            movie.write_video(partial, ((kept / name).read_bytes() for name in names), source, mark)
            os.replace(partial, path)
            if (kept / "metrics.csv").exists():
                os.replace(kept / "metrics.csv", path.with_suffix(".csv"))
            sync_folder(path.parent)
            shutil.rmtree(kept, ignore_errors=True)  # Windows keeps the lock's file, which is open
    log.line(f"video    {path}: {len(names)} frames")
    return 0


def write_results(model: ModelBase, origin: Mapping[str, Any], output: Path, log: RunLog, stop: StopRequest,
                  command: str, names: Sequence[str] | None = None) -> int:
    """Write the results for everything in the source that `output` lacks.

    Args: origin: what the results depend on, with "source" and "truth". names: of the results to write; None: all.
    Returns: the exit code.
    """
    source, truth = origin["source"], origin["truth"]
    rows, chosen = Rows(output / "metrics.csv"), set(names or ())
    with as_option_error(model.opt["val"]):
        results = model.infer(source, truth, lambda name: (not names or name in chosen) and (
            not (output / name).exists() or bool(truth and name not in rows.rows)))
        total = next(results)
        total = len(names) if names else total
        if note := unsupported_files():
            log.line(f"note     {note}")
        claim(output, origin)
        done = 0
        for name, content, metrics in results:
            if metrics:
                rows.add(name, metrics)
            if names and name not in chosen:
                continue
            done += 1
            (output / name).parent.mkdir(parents=True, exist_ok=True)
            write_result(output / name, content)
            log.progress(f"{name}: {total - done} to go")
            if stop.signal:
                log.line(f"stopped  by {stop.signal.name}; resume with: {command}")
                return stop.exit_code
    log.line(f"done     {done} written, {total - done} were there: {output}")
    if rows.rows:
        rows.close()
        log.line(f"metrics  {describe_losses(model.summarize_inference(rows.rows))}: {rows.path}")
    return 0


def write_result(path: Path, content: Any) -> None:
    """Write a picture (C, H, W) in [0, 1] as PNG, or arrays by name as .npz, atomically."""
    if not isinstance(content, Mapping):
        write_picture(path, content)
        return
    file = io.BytesIO()
    np.savez(file, **{key: np.asarray(value) for key, value in content.items()})
    checkpoint.save_file(path, file.getvalue())


def claim(output: Path, origin: Mapping[str, Any]) -> None:
    """Record in the folder which weights and inputs its results come from. Raises OptionError if it has others."""
    path = output / MADE_BY
    if path.exists():
        recorded = json.loads(path.read_text(encoding="utf-8"))
        if differing := [key for key in origin if recorded.get(key) != origin[key]]:
            raise options.OptionError(f"--output {output}: holds results of another {', '.join(differing)} "
                                      f"({MADE_BY}); name another folder, or remove it")
        return
    if any(file.name != ".lock" for file in output.iterdir()):
        raise options.OptionError(f"--output {output}: is not empty and has no {MADE_BY}; name a new folder")
    path.write_text(json.dumps(origin, indent=1) + "\n", encoding="utf-8")


class Rows:
    """The metrics of each result by name, in `metrics.csv`; a resumed command reads them back."""

    def __init__(self, path: Path):
        self.path, self.rows, self.columns = path, {}, []
        with contextlib.suppress(FileNotFoundError), open(path, newline="", **ANY_NAMES) as file:
            for row in csv.DictReader(file):
                name = row.pop("name")
                with contextlib.suppress(ValueError):
                    if None not in row.values():  # else a kill cut the last line short
                        self.rows[name] = {key: float(value) for key, value in row.items() if value}
                        self.columns = list(row)

    def add(self, name: str, metrics: Mapping[str, float]) -> None:
        """Append a row; where it has more columns than those before, write the file again."""
        self.rows[name] = dict(metrics)
        if set(metrics) - set(self.columns) or not self.path.exists():
            self.close()
            return
        with open(self.path, "a", newline="", **ANY_NAMES) as file:
            csv.DictWriter(file, ["name", *self.columns]).writerow({"name": name, **metrics})

    def close(self) -> None:
        """Rewrite the file with all rows in order of name."""
        self.columns = list(dict.fromkeys(key for row in self.rows.values() for key in row))
        rows = ({"name": name, **self.rows[name]} for name in sorted(self.rows))
        write_table(self.path, ["name", *self.columns], rows)
