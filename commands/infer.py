"""Use a trained model: `main.py --test` on the options' test sets, or on any files with --input and --output.

Each result is written as soon as it is computed, and atomically, so that the same command resumes partial output.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

import checkpoint
import options
from checkpoint import CheckpointError
from data import DATASETS
from data.folders import passed_over
from log.pictures import write_picture
from log.run_log import RunLog, start_log
from log.tables import write_table
from models import MODELS
from models.model_base import ModelBase
from runtime.determinism import prepare_machine
from runtime.evaluate import describe_losses, evaluate
from runtime.signals import StopRequest
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
        output: folder of the results; needed with `source`.
        truth: ground truth of `source`, for metrics.
        command: the command that resumes partial output, to be printed.
    Returns: the exit code.
    Raises: OptionError, CheckpointError: one line.
    """
    if (source is None) != (output is None):
        raise options.OptionError("--input and --output belong together: files to process, and a folder for results")
    prepare_machine(opt)
    options.resolve(MODELS, opt["model"], "model").prepare_inference(opt)
    model = build_model(opt)
    settings = {**opt["log"], "tensorboard": False}
    with contextlib.closing(start_log(settings, notices)) as log, StopRequest("this sample") as stop:
        log.line(f"weights  {load_weights(model, opt, resume, log)}; {model.device}, {torch.get_num_threads()} threads")
        if source is None:
            sets = {name: options.build(DATASETS, section, "dataset_type")
                    for name, section in opt["datasets"].items() if section["phase"] == "test"}
            if not sets:
                raise options.OptionError(f"{opt['opt_path']}: datasets.test: missing; or give --input and --output")
            pictures = model.save_dir.parent / "images" / "use" if opt["val"]["save_img"] else None
            evaluate(model, sets, log, None, stop, pictures)
            return stop.exit_code
        return write_results(model, opt, source, Path(output), truth, log, stop, command)


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


def write_results(model: ModelBase, opt: options.Section, source: str, output: Path, truth: str | None, log: RunLog,
                  stop: StopRequest, command: str) -> int:
    """Write the results for everything in `source` that `output` lacks. Returns the exit code."""
    if Path(source).resolve() == output.resolve():
        raise options.OptionError(f"--output {output}: is the input; name another folder")
    weights = {f"{label}.{key}": value for label, network in model.networks.items()
               for key, value in network.state_dict().items()}
    origin = {"task": opt["task"], "weights": checkpoint.fingerprint(weights), "source": os.path.realpath(source),
              "truth": truth and os.path.realpath(truth), **{key: opt["val"][key] for key in model.inference_options}}
    rows = Rows(output / "metrics.csv")
    try:
        results = model.infer(source, truth, lambda name: not (output / name).exists() or
                                bool(truth and name not in rows.rows))
        total = next(results)
        if note := passed_over():
            log.line(f"note     {note}")
        claim(output, origin)
        done = 0
        for name, content, metrics in results:
            done += 1
            if metrics:
                rows.add(name, metrics)
            (output / name).parent.mkdir(parents=True, exist_ok=True)
            write_result(output / name, content)
            log.progress(f"{name}: {total - done} to go")
            if stop.signal:
                log.line(f"stopped  by {stop.signal.name}; resume with: {command}")
                return stop.exit_code
    except (ValueError, FileNotFoundError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise options.OptionError(str(error)) from error
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
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise options.OptionError(f"--output {output}: is not empty and has no {MADE_BY}; name a new folder")
    try:
        output.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(origin, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise options.OptionError(f"--output {output}: can't be made: {error.strerror}") from None


class Rows:
    """The metrics of each result by name, in `metrics.csv`; a resumed command reads them back."""

    def __init__(self, path: Path):
        self.path, self.rows = path, {}
        with contextlib.suppress(FileNotFoundError), open(path, newline="", **ANY_NAMES) as file:
            for row in csv.DictReader(file):
                name = row.pop("name")
                with contextlib.suppress(TypeError, ValueError):  # a kill cut the last line short
                    self.rows[name] = {key: float(value) for key, value in row.items()}

    def add(self, name: str, metrics: Mapping[str, float]) -> None:
        """Append a row."""
        new = not self.path.exists()
        self.rows[name] = dict(metrics)
        with open(self.path, "a", newline="", **ANY_NAMES) as file:
            writer = csv.DictWriter(file, ["name", *metrics])
            if new:
                writer.writeheader()
            writer.writerow({"name": name, **metrics})

    def close(self) -> None:
        """Rewrite the file with all rows in order of name."""
        columns = list(next(iter(self.rows.values())))
        write_table(self.path, ["name", *columns], ({"name": name, **self.rows[name]} for name in sorted(self.rows)))
