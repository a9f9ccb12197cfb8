"""`python -m checkpoint inspect | verify | compare | rank | convert`: the exit code is the answer.

    python -m checkpoint inspect experiments/train_vrt             list the sets: iterations, metrics, sizes
    python -m checkpoint verify experiments/train_vrt              0: every set is good, 1: one is not
    python -m checkpoint compare a/models/300.json b/models/300.json   0: every tensor is equal, 1: one is not
    python -m checkpoint rank sweep                                list runs by their best metric, with their options
    python -m checkpoint convert run/models/300.json --to weights vrt.pth      or --to safetensors, kair, bundle

A folder stands for its newest set; for all its sets in verify and inspect; for all runs below it in rank. Exit code 2:
the command could not be carried out.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

import checkpoint
from checkpoint import CheckpointError, CheckpointSet, models_of
from log.terminal import number
from options import flatten
from runtime.history import History
from storage import foreign, safetensors, trusted
from storage.files import format_bytes, save_file
from storage.sealed import find_fault, load_file, read_seal
from storage.tree import differences, flat

ARCHIVED = re.compile(r"_\d{8}_\d{6}(_\d+)?$")  # end of the name of a folder that checkpoint.archive made
UNCOMPARED = ("timestamp", "environment", "version")  # of a state; options are compared on their own


def main(argv: list[str]) -> int:
    """Run a command. Returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m checkpoint", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for command, words in ((inspect, "list the content"), (verify, "list each set as good or bad, with the reason"),
                           (compare, "list the tensors and options that differ"), (rank, "list runs, the best first"),
                           (convert, "write the set for another program")):
        one = commands.add_parser(command.__name__, help=words)
        one.set_defaults(command=command)
        if command is rank:
            one.add_argument("paths", type=Path, nargs="+", metavar="FOLDER", help="folder of a run, or of several")
        for name in {compare: ("a", "b"), rank: ()}.get(command, ("path",)):
            one.add_argument(name, type=Path, metavar=name.upper(), help="a file, a commit record or a folder")
        if command is inspect:
            one.add_argument("--options", action="store_true", help="print the options of its run")
            one.add_argument("--tensors", action="store_true", help="list every tensor")
        if command is convert:
            one.add_argument("--to", required=True, choices=("kair", "bundle", "taming", "weights", "safetensors"))
            one.add_argument("out", type=Path, metavar="OUT", help="a folder for kair, else a file")
            one.add_argument("--network", help="network to write: G, E, ...; default: E where there is one, else G")
            one.add_argument("--trust", action="store_true",
                             help="run the code in a pickled file to get at its tensors: only for files you trust")
    args = vars(parser.parse_args(argv))
    try:
        return args.pop("command")(**args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


# ---------------------------------------------------------------- inspect


def inspect(path: Path, options: bool, tensors: bool) -> int:
    """Print the parts of a set or file, with sizes and state; of a folder, its sets."""
    if path.is_dir() and not (options or tensors):
        return inspect_folder(models_of(path))
    parts = read(path)
    state = parts.get("state", {})
    print(f"{path}: {describe_kind(path)}")
    for name, value in (("iteration", state.get("iteration")), ("epochs done", state.get("epoch")),
                        ("metric", state.get("metric")), ("best at", state.get("best")),
                        ("saved", state.get("timestamp")), ("with", describe(state.get("environment")))):
        if value is not None:
            print(f"  {name:<12}{value}")
    for label, part in parts.items():
        if label != "state":
            found = {key: value for key, value in flat(part) if torch.is_tensor(value)}
            size = sum(value.numel() * value.element_size() for value in found.values())
            count = sum(value.numel() for value in found.values())
            print(f"  {label:<12}{len(found)} tensors, {count:,} numbers, {format_bytes(size)}")
            for key, value in found.items() if tensors else ():
                print(f"    {key}  {tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}")
    if state:
        held = [key for key in state if key not in ("iteration", "epoch", "metric", "best", "timestamp", "environment")]
        print(f"  {'state':<12}{', '.join(held)}")
    if options:
        print(json.dumps(state.get("config", {}), indent=2))
    return 0


def inspect_folder(folder: Path) -> int:
    """Print the sets in a folder, a line each."""
    sets, problems = sets_in(folder)
    for line in problems:
        print(f"bad   {line}")
    for found in sets:
        record = found.record or {}
        size = sum(path.stat().st_size for path in found.files.values() if path.is_file())
        metric = f"metric {record['metric']:.4f}" if isinstance(record.get("metric"), float) else ""
        iteration = "-" if found.iteration is None else found.iteration
        words = [f"{found.path.name:<24}", f"iteration {iteration:>8}", format_bytes(size),
                 f"{record.get('timestamp', 'not ours: no record')}", metric,
                 record.get("reason", "") if record.get("reason") != "regular" else "",
                 ", ".join(path.stem for path in found.names[1:])]
        print("  ".join(word for word in words if word))
    return 0


def sets_in(folder: Path) -> tuple[list[CheckpointSet], list[str]]:
    """Return the sets in a folder, and why other files make none. Raises CheckpointError where there is nothing."""
    problems: list[str] = []
    sets = checkpoint.find_sets(folder, problems.append)
    if not sets:
        sets, bad = checkpoint.find_foreign(folder)
        problems += bad.values()
    if not sets and not problems:
        raise CheckpointError(f"{folder}: no checkpoint in this folder")
    return sets, problems


def describe_kind(path: Path) -> str:
    """Return what a file is, with its size."""
    if path.is_dir() or path.suffix == ".json":
        return "a committed set"
    seal = read_seal(path)
    if seal is None:
        return f"written by another program, {format_bytes(path.stat().st_size)}"
    kind = "a bundle" if "parts" in seal else f"{seal['part']} of iteration {seal['iteration']}" if "part" in seal \
        else "weights"
    return f"{kind}, sealed and good, {format_bytes(path.stat().st_size)}"


def describe(facts: Mapping | None) -> str | None:
    """Return facts as 'key value, key value'."""
    return ", ".join(f"{key} {value}" for key, value in facts.items() if value is not None) if facts else None


# ---------------------------------------------------------------- verify


def verify(path: Path) -> int:
    """Print a line for each set, and last how many are bad."""
    if path.is_file() and path.suffix != ".json" and not checkpoint.MEMBER.fullmatch(path.name):
        fault = find_fault(path)
        print(f"bad   {path.name}: {fault}" if fault else f"good  {path.name}: {describe_kind(path)}")
        return 1 if fault else 0
    if path.is_file() or not path.exists():
        try:
            found = checkpoint.locate(path)
        except CheckpointError as error:
            print(f"bad   {error}")
            return 1 if path.exists() else 2
        print(f"good  {describe_set(found)}")
        return 0
    folder = models_of(path)
    sets, problems = sets_in(folder)
    faults = [(found, found.fault()) for found in sets]
    for found in (found for found, fault in faults if not fault):
        print(f"good  {describe_set(found)}")
    num_good = sum(not fault for _, fault in faults)
    problems += [f"{found.iteration}: {fault}" for found, fault in faults if fault]
    for line in problems:
        print(f"bad   {line}")
    for leftover in sorted(folder.glob("*.tmp")):
        print(f"note  {leftover.name}: left by an interrupted save; the next start of the run removes it")
    print(f"{num_good + len(problems)} set{'s' * (num_good + len(problems) > 1)}, {len(problems)} bad")
    return 1 if problems else 0


def describe_set(found: CheckpointSet) -> str:
    """Return a set's file, iteration, parts and size."""
    size = sum(path.stat().st_size for path in found.files.values())
    kind = "" if found.committed else ", no record: the zip archives' own checksums only"
    return f"{found.path.name}: iteration {found.iteration}, {', '.join(found.labels)}, {format_bytes(size)}{kind}"


# ---------------------------------------------------------------- compare


def compare(a: Path, b: Path) -> int:
    """Print a line for each tensor, value and option that differs, and last a summary."""
    one, two = read(a), read(b)
    if len(one) == len(two) == 1 and set(one) != set(two):  # one network against another, as G against E
        one, two = {"weights": next(iter(one.values()))}, {"weights": next(iter(two.values()))}
    configs = []
    for state in (parts.get("state", {}) for parts in (one, two)):
        configs.append(state.pop("config", {}))
        metadata = state.get("metadata")
        origin = metadata.pop("resumed_from", None) if isinstance(metadata, dict) else None
        configs[-1] |= {"resumed_from": origin} if configs[-1] else {}
        for key in UNCOMPARED:
            state.pop(key, None)
    lines = [f"{label}: only in {a if label in one else b}" for label in one.keys() ^ two.keys()]
    one, two = ({label: parts[label] for label in one.keys() & two.keys()} for parts in (one, two))
    lines += [f"{path}: {words}" for path, words in differences(one, two, (a, b))]
    for line in lines:
        print(f"differs  {line}")
    for path, words in differences(*configs, (a, b)) if all(configs) else ():
        print(f"option   {path}: {words}")
    left, right = ({path for path, value in flat(parts) if torch.is_tensor(value)} for parts in (one, two))
    print(f"{len(left & right)} tensors compared, "
          + (f"{len(lines)} difference{'s' * (len(lines) > 1)}" if lines else "all equal, bit for bit"))
    return 1 if lines else 0


# ---------------------------------------------------------------- rank


def rank(paths: list[Path]) -> int:
    """Print the runs below some folders by their best metric, in a table for each stage and metric."""
    tables: dict[tuple, list[tuple]] = {}
    for folder in dict.fromkeys(folder for path in paths for folder in runs_below(path)):
        state = checkpoint.find_newest(folder, print).load_state()
        name, mode = state.get("metadata", {}).get("best_metric", (None, None))
        history = History(name, mode, state.get("history", []))
        if history.best is None:
            print(f"left out {folder}: no validation yet")
            continue
        config = state.get("config", {})
        shown = folder.parent if folder.name == "models" else folder
        chosen = {key: value for key, value in flatten(config).items()
                  if not key.startswith(("path.", "opt_path", "task"))}
        when = f"at {history.best:,}, done {state['iteration']:,} of {config['train']['total_iter']:,}"
        tables.setdefault((state["metadata"].get("stage"), name, mode), []).append(
            (history.value(history.best_row), shown, when, chosen))
    for (stage, name, mode), rows in tables.items():
        rows.sort(key=lambda row: row[0], reverse=mode == "max")
        differing = [key for key in rows[0][3] if any(row[3].get(key) != rows[0][3][key] for row in rows)]
        lines = [("", name, "run", "", *differing)]
        lines += [(str(place), number(value), str(folder), when, *(json.dumps(config.get(key)) for key in differing))
                  for place, (value, folder, when, config) in enumerate(rows, 1)]
        widths = [max(map(len, column)) for column in zip(*lines)]
        print(f"{f'stage {stage}: ' if stage else ''}{name}, {'larger' if mode == 'max' else 'smaller'} is better")
        for line in lines:
            print("  ".join(f"{word:<{width}}" for word, width in zip(line, widths)).rstrip())
    if not tables:
        raise CheckpointError(f"{', '.join(map(str, paths))}: no run with a validation")
    return 0


def runs_below(path: Path) -> Iterator[Path]:
    """Yield the folders at or below a path that hold checkpoints, except archived ones."""
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder of runs")
    for folder, below, _ in os.walk(path):
        below[:] = sorted(name for name in below if not ARCHIVED.search(name))
        if checkpoint.find_newest(folder):
            yield Path(folder)


# ---------------------------------------------------------------- convert


def convert(path: Path, to: str, out: Path, network: str | None, trust: bool) -> int:
    """Write a set for another program; files that exist are not touched."""
    parts = read_trusted(path) if trust else read(path)
    out.parent.mkdir(parents=True, exist_ok=True)
    networks = [label for label in parts if label != "state" and not label.startswith("optimizer")]
    label = network or ("E" if "E" in parts and to != "taming" else "G" if "G" in parts else (networks or ["G"])[0])
    if label not in parts and to in ("weights", "safetensors", "taming"):
        raise CheckpointError(f"{path}: holds no network {label}; valid: {', '.join(networks) or 'none'}")
    if to in ("weights", "safetensors"):
        check_absent(out)
        weights = foreign.extract_weights(parts[label], path)
        save_file(out, weights if to == "weights" else safetensors.encode(weights))
        print(f"{out}: the weights of {label}, " + ("a bare state dict" if to == "weights" else "a safetensors file"))
        return 0
    iteration = parts.get("state", {}).get("iteration")
    if iteration is None:
        found = checkpoint.MEMBER.fullmatch(path.name)
        iteration = int(found[1]) if found else checkpoint.locate(path).iteration or 0
    if to == "taming":
        check_absent(out)
        save_file(out, foreign.pack_taming(parts, label, iteration))
        print(f"{out}: iteration {iteration}, with the keys of taming's scripts")
        return 0
    if to == "bundle":
        check_absent(out)
        parts.setdefault("state", {"iteration": iteration})
        checkpoint.save_bundle(out, parts, {"iteration": iteration, "timestamp": checkpoint.timestamp()})
        print(f"{out}: iteration {iteration}: {', '.join(sorted(parts))}")
        return 0
    files = {out / f"{iteration}_{label}.pth": part for label, part in parts.items() if label != "state"}
    for file in files:
        check_absent(file)
    out.mkdir(exist_ok=True)
    for file, part in files.items():
        save_file(file, part)
        print(file)
    return 0


def check_absent(path: Path) -> None:
    """Raise CheckpointError when a path exists."""
    if path.exists():
        raise CheckpointError(f"{path}: exists already; name another path or remove it")


# ---------------------------------------------------------------- shared


def read(path: Path) -> dict[str, Any]:
    """Load the parts of the set that a path names, or of the one file when it names a member or a weights file."""
    member = checkpoint.MEMBER.fullmatch(path.name)
    if member and path.is_file():
        return {member[2]: load_file(path)}
    if path.is_file() and path.suffix != ".json":
        payload = load_file(path)
        parts = foreign.unpack(payload, path)
        return parts or {"G": foreign.extract_weights(payload, path)}
    return checkpoint.locate(path).load()


def read_trusted(path: Path) -> dict[str, Any]:
    """Load the parts of one file as `read` does, after a process of its own ran the code in it."""
    if not path.is_file():
        raise CheckpointError(f"{path}: is not a file; --trust reads one pickled file")
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder, path.name)
        words = [sys.executable, trusted.__file__, str(path.resolve()), str(plain)]
        done = subprocess.run(words, cwd=path.resolve().parent, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:200]
            raise CheckpointError(f"{path}: its code failed ({reason}); its classes are looked for beside the file and "
                                  "in PYTHONPATH")
        return read(plain)
