"""Use a trained model: `main.py --test` on the options' test sets, or on files of one's own with --input and --output.

What a model makes of an input is written piece by piece, each file complete or not at all, so that the same command
goes on with a half-done output folder.
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
from log.run_log import RunLog
from log.tables import write_table
from models import MODELS
from models.model_base import ModelBase
from runtime.determinism import prepare_machine
from runtime.evaluate import describe_losses, evaluate
from runtime.signals import StopRequest

MADE_BY = "made_by.json"
ANY_NAMES = {"encoding": "utf-8", "errors": "surrogateescape"}  # files are called by whatever bytes


def infer(opt: options.Section, notices: list[str], *, resume: str | None = None, source: str | None = None,
          output: str | None = None, truth: str | None = None, command: str = "") -> int:
    """Test a model, or let it work on `source` into the folder `output`. Returns the exit code.

    Args:
        resume: a checkpoint or weights file; None: the run's best, else its newest, else path.pretrained_netG.
        truth: ground truth of `source`, for metrics. command: what goes on with a half-done output, to be printed.
    Raises: OptionError, CheckpointError: one line.
    """
    if (source is None) != (output is None):
        raise options.OptionError("--input and --output belong together: what to work on, and the folder for results")
    prepare_machine(opt)
    kind = options.resolve(MODELS, opt["model"], "model")
    kind.prepare_use(opt)
    try:
        model = kind(opt)
    except ValueError as error:
        raise options.OptionError(str(error)) from error
    log = RunLog(quiet=opt["log"]["quiet"])
    with contextlib.closing(log), StopRequest("this sample") as stop:
        for notice in notices:
            log.line(f"note     {notice}")
        log.line(f"weights  {load(model, opt, resume, log)}; {model.device}, {torch.get_num_threads()} threads")
        if source is None:
            sets = {name: options.build(DATASETS, section, "dataset_type")
                    for name, section in opt["datasets"].items() if section["phase"] == "test"}
            if not sets:
                raise options.OptionError(f"{opt['opt_path']}: datasets.test: missing; or give --input and --output")
            pictures = model.save_dir.parent / "images" / "use" if opt["val"]["save_img"] else None
            evaluate(model, sets, log, None, stop, pictures)
            return stop.exit_code
        return work(model, opt, source, Path(output), truth, log, stop, command)


def load(model: ModelBase, opt: Mapping[str, Any], resume: str | None, log: RunLog) -> str:
    """Give the model its weights. Returns what they are, for the log."""
    if resume and Path(resume).is_file() and not resume.endswith(".json"):
        return model.load_use(checkpoint.load_file(resume), resume)  # exactly this file
    if resume:
        found = checkpoint.locate(resume, log.warn)
    else:
        found = checkpoint.find_best(model.save_dir, log.warn)
        if found is None and opt["path"]["pretrained_netG"]:
            path = opt["path"]["pretrained_netG"]
            return model.load_use(checkpoint.load_file(path), path)
        if found is None:
            raise CheckpointError(f"{model.save_dir}: no checkpoint yet; train first, or name weights with --resume")
    return model.load_use(found.load(), str(found.path))


def work(model: ModelBase, opt: options.Section, source: str, output: Path, truth: str | None, log: RunLog,
         stop: StopRequest, command: str) -> int:
    """Results of everything in `source` that `output` does not hold yet."""
    if Path(source).resolve() == output.resolve():
        raise options.OptionError(f"--output {output}: is the input; name another folder")
    weights = {f"{label}.{key}": value for label, network in model.networks.items()
               for key, value in network.state_dict().items()}
    mine = {"task": opt["task"], "weights": checkpoint.fingerprint(weights), "source": os.path.realpath(source),
            "truth": truth and os.path.realpath(truth), **{key: opt["val"][key] for key in model.result_options}}
    rows = Rows(output / "metrics.csv")
    try:
        results = model.results(source, truth, lambda name: not (output / name).exists() or
                                bool(truth and name not in rows.rows))
        total = next(results)
        if note := passed_over():
            log.line(f"note     {note}")
        claim(output, mine)
        done = 0
        for name, content, metrics in results:
            done += 1
            if metrics:
                rows.add(name, metrics)
            (output / name).parent.mkdir(parents=True, exist_ok=True)
            write_result(output / name, content)
            log.progress(f"{name}: {total - done} to go")
            if stop.signal:
                log.line(f"stopped  by {stop.signal.name}; go on with: {command}")
                return stop.exit_code
    except (ValueError, FileNotFoundError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise options.OptionError(str(error)) from error
    log.line(f"done     {done} written, {total - done} were there: {output}")
    if rows.rows:
        rows.close()
        log.line(f"metrics  {describe_losses(model.summarize_results(rows.rows))}: {rows.path}")
    return 0


def write_result(path: Path, content: Any) -> None:
    """A picture (C, H, W) in [0, 1] as PNG, or arrays by name as .npz: complete or not there."""
    if not isinstance(content, Mapping):
        write_picture(path, content)
        return
    file = io.BytesIO()
    np.savez(file, **{key: np.asarray(value) for key, value in content.items()})
    checkpoint.save_file(path, file.getvalue())


def claim(output: Path, mine: Mapping[str, Any]) -> None:
    """Keep results of different weights or inputs apart."""
    path = output / MADE_BY
    if path.exists():
        others = json.loads(path.read_text(encoding="utf-8"))
        if differing := [key for key in mine if others.get(key) != mine[key]]:
            raise options.OptionError(f"--output {output}: holds results of another {', '.join(differing)} "
                                      f"({MADE_BY}); name another folder, or remove it")
        return
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise options.OptionError(f"--output {output}: is not empty and not from here; name a new folder")
    try:
        output.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(mine, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise options.OptionError(f"--output {output}: can't be made: {error.strerror}") from None


class Rows:
    """`metrics.csv`: a row for each result, by name; read again when a half-done output is gone on with."""

    def __init__(self, path: Path):
        self.path, self.rows = path, {}
        with contextlib.suppress(FileNotFoundError), open(path, newline="", **ANY_NAMES) as file:
            for row in csv.DictReader(file):
                name = row.pop("name")
                with contextlib.suppress(TypeError, ValueError):  # a kill tore the last line
                    self.rows[name] = {key: float(value) for key, value in row.items()}

    def add(self, name: str, metrics: Mapping[str, float]) -> None:
        new = not self.path.exists()
        self.rows[name] = dict(metrics)
        with open(self.path, "a", newline="", **ANY_NAMES) as file:
            writer = csv.DictWriter(file, ["name", *metrics])
            if new:
                writer.writeheader()
            writer.writerow({"name": name, **metrics})

    def close(self) -> None:
        """Write all rows in order of name."""
        columns = list(next(iter(self.rows.values())))
        write_table(self.path, ["name", *columns], ({"name": name, **self.rows[name]} for name in sorted(self.rows)))
