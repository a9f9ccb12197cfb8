"""What the benchmarks share: a recipe's run without a log, a folder or a checkpoint, and its batches."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import options
import train
from data import DATASETS
from data.loader import endless
from log.run_log import SilentLog
from models import MODELS, NETWORKS
from runtime import determinism, resume

ROOT = Path(__file__).resolve().parent.parent
WARM_UP = 3  # the first steps allocate, choose kernels and connect


def parser_for(doc: str) -> argparse.ArgumentParser:
    """Build a command line with an option file, --steps and --set."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("option_file")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    return parser


def values_in(words: list[str]) -> dict[str, Any]:
    """Parse KEY=VALUE words of --set."""
    return {key: options.parse_value(value) for key, _, value in (word.partition("=") for word in words)}


def read_options(file: str, changes: Mapping[str, Any], stage: str | None = None) -> options.Section:
    """Read an option file of the repository or elsewhere, and set these keys."""
    triples = [(key, value, "the benchmark") for key, value in changes.items()]
    return options.parse(str(ROOT / file), triples, MODELS, NETWORKS, DATASETS, stage)[0]


def build_run(opt: options.Section) -> train.Run:
    """Build a run with new weights, ready to train."""
    determinism.prepare_machine(opt)
    run = train.Run(opt, SilentLog())
    resume.restore(run, None)
    return run


@contextlib.contextmanager
def batches_of(run: train.Run) -> Iterator[Iterator[Mapping[str, Any]]]:
    """Open the endless batches that the run would train on."""
    workers, cuda = run.opt["datasets"]["train"]["dataloader_num_workers"], run.model.device.type == "cuda"
    with contextlib.closing(endless(run.train_set, run.batches, workers, pinned=cuda)) as samples:
        yield samples
