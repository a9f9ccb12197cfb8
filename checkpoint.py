"""Checkpoints that can't be lost: commit, verify, find, restore, keep.

A *set* holds everything of one iteration, by label: networks "G", "E", "D", optimizers "optimizerG", ..., and "state",
the rest of what the next step depends on. It lies on the disk in one of two layouts:

- split, as KAIR's scripts expect it: `{iter}_G.pth`, `{iter}_optimizerG.pth`, ..., `{iter}_state.pth`, and, renamed
  into place last, the commit record `{iter}.json` with the size and checksum of each. The set exists once its record
  does.
- bundle: one file with everything, under names from the options; its record is the file's own seal.

Folders that KAIR wrote (no record) and single files of other programs are read too, see storage/foreign.py.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from storage import foreign
from storage.files import check_space, copy_durably, link, removed_on_failure, save_file, sync_folder, write_durably
from storage.foreign import VERSION, extract_weights, is_optimizer
from storage.sealed import (
    MARK,
    CheckpointError,
    find_fault,
    load_file,
    read_seal,
    read_tail,
    read_torch,
    verified,
    with_checksum,
)
from storage.tree import Snapshot, num_bytes, to_cpu

__all__ = ["CheckpointError", "VERSION", "extract_weights", "is_optimizer", "load_file", "save_file"]  # of storage
MEMBER = re.compile(r"(\d+)_([A-Za-z][A-Za-z0-9]*)\.pth")
RECORD = re.compile(r"(\d+)\.json")
BASICSR = re.compile(r"net_([a-z])_(\d+)\.pth")  # its networks, beside ../training_states/{iter}.state
SUFFIXES = (".pt", ".pth", ".ckpt")  # of files that may be bundles
PASSING = ("interrupted", "clock")  # reasons of a save that the next one supersedes
ABOUT = ("timestamp", "epoch", "reason", "best", "metric")  # facts about a set, in its record and in each seal
Report = Callable[[str], None]


# ---------------------------------------------------------------- a set


@dataclass(frozen=True)
class CheckpointSet:
    """The files of one iteration: committed by us (with a record), or from another program (without)."""

    folder: Path
    iteration: int | None  # None: another program's file that does not hold it
    files: Mapping[str, Path]  # by label; a bundle is one file, "bundle"
    record: Mapping | None = field(default=None, compare=False)
    names: tuple[Path, ...] = field(default=(), compare=False)  # all hard links to the record or bundle in the folder
    _verified: list = field(default_factory=list, compare=False, repr=False)

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels of its parts: "G", "E", "optimizerG", "state", ..."""
        return tuple(self.record["parts"]) if self.bundled and self.record else tuple(self.files)

    @property
    def bundled(self) -> bool:
        return "bundle" in self.files

    @property
    def committed(self) -> bool:
        return self.record is not None

    @property
    def path(self) -> Path:
        """The file that stands for the set: its record, its bundle, or KAIR's G."""
        if self.bundled:
            return self.files["bundle"]
        return self.folder / f"{self.iteration}.json" if self.committed else self.files["G"]

    def facts(self, name: str) -> dict[str, Any] | None:
        """Return what the commit record says of a file; None: its own seal does."""
        if self.bundled or not self.committed:
            return None
        return {**self.record["files"][name], "iteration": self.iteration}

    def fault(self) -> str | None:
        """Compare each file with the record, or with its own seal. Returns what is wrong, or None."""
        if self._verified:
            return None
        for path in self.files.values():
            facts = self.facts(path.name)
            reason = find_fault(path, facts)
            if reason and facts and "before" in facts:  # an amendment was cut off between the record and this file
                reason = find_fault(path, facts["before"]) and reason
            if reason:
                return f"{path.name}: {reason}"
        self._verified.append(True)  # only success is remembered: a fault is looked for again
        return None

    def check(self) -> None:
        """Raise CheckpointError if a file is damaged."""
        if fault := self.fault():
            raise CheckpointError(f"{self.folder}: {fault}")

    def load_state(self) -> dict[str, Any]:
        """Verify every part, and load the state alone; {}: there is none. Bytes of other parts are not copied."""
        if self.bundled or not self.committed:
            return self.load(mapped=True).get("state", {})
        self.check()
        return foreign.migrate(read_torch(self.files["state"]), self.path)

    def load(self, mapped: bool = False) -> dict[str, Any]:
        """Verify and load every part, by label. Raises CheckpointError, also when there is no network.

        Args: mapped: leave tensors in the files, which are read where they are used.
        """
        self.check()
        parts = {label: read_torch(path, mapped) for label, path in self.files.items()}
        if self.bundled:
            payload = parts["bundle"]
            parts = foreign.unpack(payload, self.path)
            if "G" not in parts:
                raise foreign.no_network_error(payload, self.path)
        elif not self.committed:
            parts = foreign.unpack_members(parts, self.path)
        if "state" in parts:
            parts["state"] = foreign.migrate(parts["state"], self.path)
        return parts


@dataclass(frozen=True)
class Layout:
    """File names of a run's checkpoints. In the split layout latest and best are links to records.

    Raises: ValueError, one line, for names that a file can't have.
    """

    kind: str = "split"
    name: str | None = "epoch_{epoch:04d}.pt"  # a bundle's; None: only the latest and the best are kept
    latest: str | None = "latest.pt"
    best: str | None = "best.pt"
    interrupted: str = "interrupted.pt"

    def __post_init__(self):
        for key in ("name", "latest", "best", "interrupted"):
            name = getattr(self, key)
            try:
                example = name and name.format(epoch=1, iter=1)
            except (KeyError, IndexError, ValueError):
                raise ValueError(f"{key}: {name!r}: the fields are {{epoch}} and {{iter}}") from None
            if example and (Path(example).name != example or not example.endswith(SUFFIXES)
                            or MEMBER.fullmatch(example)):
                raise ValueError(f"{key}: {name!r} must be a file name that ends in one of {', '.join(SUFFIXES)}")
        if self.name and self.name.format(epoch=1, iter=1) == self.name.format(epoch=2, iter=2):
            raise ValueError(f"name: {self.name!r} needs the field {{epoch}} or {{iter}}, or null for only the latest")
        if self.kind == "bundle" and not (self.name or self.latest):
            raise ValueError("name and latest can't both be null")

    def file_name(self, iteration: int, epoch: int, reason: str) -> str:
        """Return the file name of a committed bundle."""
        if reason in PASSING:
            return self.interrupted
        return self.name.format(epoch=epoch, iter=iteration) if self.name else self.latest or self.interrupted

    def link_name(self, which: str) -> str | None:
        """Return the file name of the link "latest" or "best"; None: there is no such link."""
        name = getattr(self, which)
        return f"{Path(name).stem}.json" if name and self.kind == "split" else name


# ---------------------------------------------------------------- committing


def commit(folder: Path | str, iteration: int, parts: Mapping[str, Any], layout: Layout = Layout(),
           **info: Any) -> CheckpointSet:
    """Write the parts of an iteration and make them exist at once.

    Args: parts: label -> an object for `torch.save`. info: plain values for the record: epoch, reason, metric, ...
    Raises: OSError or RuntimeError when writing fails; then no file of the set remains, and older sets are intact.
    """
    folder = Path(folder)
    check_space(folder, num_bytes(parts))
    info = {"iteration": iteration, "timestamp": timestamp(), "epoch": 0, "reason": "regular", **info}
    if layout.kind == "bundle":
        return save_bundle(folder / layout.file_name(iteration, info["epoch"], info["reason"]), parts, info)
    return _commit_split(folder, iteration, parts, info)


def save_bundle(path: Path, parts: Mapping[str, Any], info: Mapping[str, Any]) -> CheckpointSet:
    """Write all parts to one file, with `info`, which has the iteration, in its seal."""
    save_file(path, foreign.pack(parts), {"name": path.name, "parts": sorted(parts), **info})
    return _bundle(path)


def _commit_split(folder: Path, iteration: int, parts: Mapping[str, Any], info: Mapping[str, Any]) -> CheckpointSet:
    """Write all files under temporary names, then rename them, the record last."""
    names = {label: f"{iteration}_{label}.pth" for label in parts}
    path = folder / f"{iteration}.json"
    temporary = {folder / name: folder / f"{name}.tmp" for name in (*names.values(), path.name)}
    renamed: list[Path] = []
    try:
        def write(label: str) -> dict[str, int]:
            return write_durably(folder / f"{names[label]}.tmp", parts[label], _member_seal(iteration, label, parts,
                                                                                           info))

        with ThreadPoolExecutor(4) as pool:  # torch.save frees the interpreter while it sums and writes
            files = dict(zip(names.values(), pool.map(write, names)))
        record = {"version": VERSION, **info, "files": files}
        write_durably(temporary[path], with_checksum(record, indent=1))
        sync_folder(folder)
        if path.exists():  # move away a set of the same iteration
            archive(folder, only=iteration)
        for final, written in temporary.items():
            if final == path:
                sync_folder(folder)  # the files are on the disk before their record is
            renamed.append(final)
            os.replace(written, final)
        sync_folder(folder)
    except BaseException:
        for leftover in (*reversed(renamed), *temporary.values()):  # the record first
            with contextlib.suppress(OSError):
                leftover.unlink(missing_ok=True)
        raise
    return CheckpointSet(folder, iteration, {label: folder / name for label, name in names.items()}, record)


def _member_seal(iteration: int, label: str, labels: Iterable[str], info: Mapping[str, Any]) -> dict[str, Any]:
    """Return the facts in a member's seal, with those about its set, from which a lost record is rebuilt."""
    return {"iteration": iteration, "part": label,
            "set": {**{key: info.get(key) for key in ABOUT}, "parts": sorted(labels)}}


def amend_state(folder: Path | str, iteration: int, parts: Mapping[str, Any], layout: Layout,
                relink: Callable[[CheckpointSet], None], **info: Any) -> CheckpointSet:
    """Replace the state of a committed set, e.g. to add the metrics of its validation; the set stays complete.

    A bundle is written again and replaced. Of a split set only the state is written: first its record is replaced by
    one that accepts both the new and the previous state, then the state.

    Args: parts, info: as `commit`, and equal to the set's but for "state". relink: renews the links to the record,
        which lead to the previous record until then.
    Raises: OSError or RuntimeError; the set is then unchanged.
    """
    folder, label = Path(folder), "state"
    path, name = folder / f"{iteration}.json", f"{iteration}_{label}.pth"
    if layout.kind == "bundle" or not path.exists():
        found = commit(folder, iteration, parts, layout, **info)
        relink(found)
        return found
    previous = _split(path).record
    temporary = folder / f"{name}.tmp"
    with removed_on_failure(temporary):
        labels = [MEMBER.fullmatch(member)[2] for member in previous["files"]]
        facts = write_durably(temporary, parts[label], _member_seal(iteration, label, labels, {**previous, **info}))
        old = dict(previous["files"][name])
        if (older := old.pop("before", None)) and find_fault(folder / name, old):
            old = older  # an earlier amendment was cut off before its state was in place
        _write_record(path, {**previous, **info, "files": {**previous["files"], name: {**facts, "before": old}}})
        found = _split(path)
        relink(found)
        os.replace(temporary, folder / name)
    sync_folder(folder)
    return found


def copy_set(found: CheckpointSet, folder: Path) -> None:
    """Copy a committed set into another folder; each copy is verified. Of a split set, files that are there stay.

    They get their names as in a commit, the record last, and an amended state as in `amend_state`.

    Raises: OSError or CheckpointError; then the set is not there, or as it was before.
    """
    folder.mkdir(parents=True, exist_ok=True)
    check_space(folder, sum(path.stat().st_size for path in found.files.values()))
    record, temporary = folder / f"{found.iteration}.json", {}
    amends = not found.bundled and _amends(found.record, record)
    if not found.bundled and not amends and record.exists():
        archive(folder, only=found.iteration)
    try:
        for path in found.files.values():
            final, facts = folder / path.name, found.facts(path.name)
            if facts and find_fault(final, facts) is None:
                continue
            temporary[final] = folder / f"{path.name}.tmp"
            copy_durably(path, temporary[final])
            if fault := find_fault(temporary[final], facts):
                raise CheckpointError(f"{temporary[final]}: {fault}")
        if amends:
            _write_record(record, found.record)
        for final, written in temporary.items():
            os.replace(written, final)
        sync_folder(folder)
        if not found.bundled and not amends:
            _write_record(record, found.record)
    finally:
        for leftover in temporary.values():
            leftover.unlink(missing_ok=True)


def _record_in(path: Path) -> Mapping[str, Any] | None:
    """Return a commit record or the seal of a bundle; None where there is none, or it is damaged."""
    try:
        return verified(path.read_bytes()) if path.suffix == ".json" else read_seal(path)
    except (OSError, ValueError):
        return None


def _amends(record: Mapping[str, Any], path: Path) -> bool:
    """Return whether a commit record is that of the set in a file, or accepts its state besides a newer one."""
    previous = (_record_in(path) or {}).get("files", {})
    bare = [{name: {key: value for key, value in facts.items() if key != "before"} for name, facts in files.items()}
            for files in (previous, record["files"])]
    return all(name in bare[0] and bare[0][name] in (bare[1][name], facts.get("before"))
               for name, facts in record["files"].items())


def _write_record(path: Path, record: Mapping[str, Any]) -> None:
    save_file(path, with_checksum(record, indent=1))


def _bundle(path: Path, names: tuple[Path, ...] = ()) -> CheckpointSet | None:
    """Return a bundle of ours as a set, or None. Raises CheckpointError for a damaged seal or a copy of another one."""
    seal = read_seal(path)
    if not seal or "parts" not in seal:
        return None
    names = tuple(sorted(names or (path,), key=lambda name: name.name != seal["name"]))
    path = names[0]  # the name of the commit rather than a link to it
    if path.name != seal["name"] and re.sub(r"\d+", "#", path.name) == re.sub(r"\d+", "#", seal["name"]):
        raise CheckpointError(f"{path}: holds what was committed as {seal['name']}")
    return CheckpointSet(path.parent, seal["iteration"], {"bundle": path}, seal, names)


def _split(path: Path, names: tuple[Path, ...] = ()) -> CheckpointSet:
    """Return the set of a valid commit record. Raises CheckpointError."""
    try:
        record = verified(path.read_bytes())
        iteration, files = record["iteration"], {}
        for name in record["files"]:  # a record must not lead out of its folder or to another iteration's files
            match = MEMBER.fullmatch(name)
            if not match or int(match[1]) != iteration or (path.parent / name).is_symlink():
                raise ValueError(f"it names {name!r}")
            files[match[2]] = path.parent / name
        if (match := RECORD.fullmatch(path.name)) and int(match[1]) != iteration:
            raise ValueError(f"it is of iteration {iteration}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path.name}: the commit record is damaged ({error})") from None
    return CheckpointSet(path.parent, iteration, files, record, names or (path,))


# ---------------------------------------------------------------- finding


def find_sets(folder: Path | str, report: Report | None = None) -> list[CheckpointSet]:
    """Return the sets in a folder, unverified, oldest first: ours, of either layout, and KAIR's.

    Args: report: called with a line for each file that makes no set.
    """
    folder, report, sets = Path(folder), report or (lambda line: None), []
    members, records, singles = _scan(folder)
    for names in records.values():
        try:
            sets.append(_split(names[0], names))
        except CheckpointError as error:
            report(str(error))
    for iteration, files in members.items():
        if iteration not in records and (found := _unrecorded(folder, iteration, files, report)):
            sets.append(found)
    sets += _basicsr_sets(folder)
    for names in singles:
        try:
            if found := _bundle(names[0], names):
                sets.append(found)
        except (CheckpointError, OSError) as error:
            if _may_be_checkpoint(names[0]):
                report(str(error).removeprefix(f"{folder}/"))
    return sorted(sets, key=lambda found: found.iteration)


def _unrecorded(folder: Path, iteration: int, files: Mapping[str, Path], report: Report) -> CheckpointSet | None:
    """Return the set of members without a record: KAIR's, or ours if the seals show that all of one save are there."""
    try:
        seals = {label: read_seal(path) for label, path in files.items()}
    except (CheckpointError, OSError) as error:
        report(str(error).removeprefix(f"{folder}/"))
        return None
    if not any("part" in (seal or {}) for seal in seals.values()):
        if "G" not in files:
            report(f"{iteration}: there is {', '.join(files)} of this iteration, but no G")
            return None
        return CheckpointSet(folder, iteration, files)
    own = {label: seal for label, seal in seals.items()
           if seal and (seal.get("iteration"), seal.get("part")) == (iteration, label)}
    about = {label: seal.get("set") or {} for label, seal in own.items()}
    saves = {json.dumps([facts.get(key) for key in ("timestamp", "epoch", "parts")]) for facts in about.values()}
    wanted = set(next(iter(about.values()), {}).get("parts") or ("G", "state", "optimizerG"))
    if wanted <= set(own) and len(saves) == 1:
        facts = {files[label].name: {"size": files[label].stat().st_size, "body_crc32": seal["body_crc32"]}
                 for label, seal in own.items()}
        record = {"version": VERSION, "iteration": iteration, "reason": "regular", **about["state"], "files": facts}
        record.pop("parts", None)
        return CheckpointSet(folder, iteration, {label: files[label] for label in own}, record)
    if not _cut_off(folder, iteration):
        strays = [f"{files[label].name} is {seal.get('part')} of iteration {seal.get('iteration')}"
                  for label, seal in seals.items() if seal and label not in own]
        missing = ", ".join(sorted(wanted - set(own)))
        report(f"{iteration}: there is no {iteration}.json, and it can't be rebuilt: "
               + ("; ".join(strays) or (f"{missing} is missing" if missing else "the files are of different saves")))
    return None


def _cut_off(folder: Path, iteration: int) -> Mapping[str, Mapping]:
    """Return the files, by name, of a commit or removal that was cut off: its record has a temporary name."""
    try:
        return verified((folder / f"{iteration}.json.tmp").read_bytes())["files"]
    except (OSError, ValueError, KeyError):
        return {}


def _basicsr_sets(folder: Path) -> list[CheckpointSet]:
    """Return BasicSR's networks in a folder, with the optimizers in `training_states` beside it."""
    sets: dict[int, dict[str, Path]] = {}
    for path in sorted(folder.glob("net_*_*.pth")):
        if (match := BASICSR.fullmatch(path.name)) and path.is_file():
            sets.setdefault(int(match[2]), {})[match[1].upper()] = path
    for iteration, files in sets.items():
        for place in (folder.parent / "training_states", folder):
            if (state := place / f"{iteration}.state").is_file():
                files.setdefault("state", state)
    return [CheckpointSet(folder, iteration, files) for iteration, files in sets.items() if "G" in files]


def _may_be_checkpoint(path: Path) -> bool:
    """Return whether an unreadable file may be a checkpoint by its name, rather than pretrained weights of a loss."""
    return bool(foreign.TRAINING.search(path.name) or not foreign.PRETRAINED.search(path.name))


def _scan(folder: Path) -> tuple[dict[int, dict[str, Path]], dict[int, tuple[Path, ...]], list[tuple[Path, ...]]]:
    """List files that may be checkpoints: members by iteration and label, records, others; each with its hard links."""
    members: dict[int, dict[str, Path]] = {}
    linked: dict[Any, list[Path]] = {}
    try:
        for path in sorted(folder.iterdir()):
            if match := MEMBER.fullmatch(path.name):
                if path.is_file():
                    members.setdefault(int(match[1]), {})[match[2]] = path
            elif (path.name.lower().endswith((*SUFFIXES, ".pth.tar")) or path.suffix == ".json") and path.is_file():
                facts = path.stat()  # without links an inode number means nothing on some file systems
                same = (facts.st_dev, facts.st_ino) if facts.st_nlink > 1 else path
                linked.setdefault(same, []).append(path)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise CheckpointError(f"{folder}: can't be looked into: {error.strerror}") from None
    groups = [tuple(sorted(names, key=lambda path: not RECORD.fullmatch(path.name))) for names in linked.values()]
    records = {int(match[1]): names for names in groups if (match := RECORD.fullmatch(names[0].name))}
    return members, records, [names for names in groups if names[0].suffix != ".json"]


def has_checkpoints(folder: Path | str) -> bool:
    """Return whether a folder holds anything that looks like a checkpoint, usable or not."""
    bad: list[str] = []
    return bool(find_sets(folder, bad.append) or bad or any(find_foreign(Path(folder))))


def what_is_kept(folder: Path | str) -> str:
    """Return the part of a message that says what a run that fails between two saves leaves in its folder."""
    return "the last checkpoint is intact" if has_checkpoints(folder) else "this run has no checkpoint yet"


def find_foreign(folder: Path) -> tuple[list[CheckpointSet], dict[Path, str]]:
    """Return other programs' training states in a folder, oldest first, and files that can't be used, with reasons."""
    found, bad = [], {}
    for (path, *_) in _scan(folder)[2]:
        try:
            if read_seal(path) is not None or BASICSR.fullmatch(path.name):
                continue
        except (CheckpointError, OSError):
            continue  # find_sets has reported it
        try:
            payload = load_file(path)
            parts = foreign.unpack(payload, path)
            state = parts.get("state")
            if state and "G" not in parts:
                raise foreign.no_network_error(payload, path)
            if state:
                found.append((state["iteration"] or 0, state["epoch"], path.stat().st_mtime, path))
        except CheckpointError as error:
            if _may_be_checkpoint(path):
                bad[path] = str(error).removeprefix(f"{folder}/")
    return [CheckpointSet(folder, iteration or None, {"bundle": path})
            for iteration, _, _, path in sorted(found)], bad


def find_newest(folder: Path | str, report: Report | None = None, before: int | None = None) -> CheckpointSet | None:
    """Return the newest set that is not damaged, or None.

    KAIR's folders may hold different iterations of G, E and the optimizer: then the newest iteration that has all of
    them is used, and the difference is reported.

    Args:
        report: called with a line for each newer set that is not used, with its reason.
        before: use only sets of earlier iterations than this; None: all.
    """
    report = report or (lambda line: None)
    sets = find_sets(folder, report)
    if not sets:
        sets, bad = find_foreign(Path(folder))
        for line in bad.values():
            report(line)
    if before is not None:
        sets = [s for s in sets if (s.iteration or 0) < before]
    kairs = [s for s in sets if not s.committed and not s.bundled]
    everything = set().union(*(s.labels for s in kairs))
    complete = [s.iteration for s in kairs if set(s.labels) == everything]
    for candidate in reversed(sets):
        if complete and candidate in kairs and set(candidate.labels) != everything:
            newest = {label: max(s.iteration for s in kairs if label in s.labels) for label in sorted(everything)}
            report(f"Checkpoint step mismatch: {', '.join(f'{label}={n}' for label, n in newest.items())}; "
                   f"{candidate.iteration} is not used, {max(complete)} has all of them")
        elif fault := candidate.fault():
            report(f"checkpoint {candidate.iteration} is not used: {fault}")
        else:
            return candidate
    return None


def find_best(folder: Path | str, report: Report | None = None) -> CheckpointSet | None:
    """Return the set of the best validation according to the newest set, else the newest set."""
    newest = find_newest(folder, report)
    if newest is None or newest.record is None or newest.record.get("best") in (None, newest.iteration):
        return newest
    others = (found for found in find_sets(folder) if found.iteration == newest.record["best"])
    return next((found for found in others if not found.fault()), newest)


def find_last_checkpoint(save_dir, net_type: str = "G", pretrained_path: str | None = None) -> tuple[int, str | None]:
    """Find the newest file of one kind, as KAIR does.

    Args: save_dir: folder of `{iter}_{net_type}.pth`. pretrained_path: what to return when there is none.
    Returns: (iteration, path), or (0, pretrained_path).
    Source: KAIR, utils/utils_option.py. Differs: other file names are ignored, uncommitted and damaged sets skipped.
    """
    for candidate in reversed(find_sets(save_dir)):
        if net_type in candidate.files and not candidate.fault():
            return candidate.iteration, str(candidate.files[net_type])
    return 0, pretrained_path


def locate(path: Path | str, report: Report | None = None) -> CheckpointSet:
    """Return the set that a path names: a folder, a commit record, a bundle, or a member other than an optimizer.

    Raises: CheckpointError, one line, also for a damaged set: a set that was named is never replaced by another.
    """
    path = Path(path)
    if path.is_dir():
        why: list[str] = []
        for folder in (path, path / "models", path / "checkpoints",
                       *([path.parent / "models"] if path.name == "training_states" else [])):
            if found := find_newest(folder, lambda line: (why.append(line), report and report(line))):
                return found
        raise CheckpointError(f"{path}: no usable checkpoint in this folder" + describe_faults(why))
    if not path.exists():
        raise CheckpointError(f"Checkpoint file not found: {path}; give a file, a commit record or a folder")
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path}: is empty, its writer was interrupted; name another checkpoint")
    found = _located_record(path) if path.suffix == ".json" else _located_file(path)
    if fault := found.fault():
        raise CheckpointError(f"{path.parent}: checkpoint {found.iteration} is damaged: {fault}")
    return found


def models_of(folder: Path) -> Path:
    """Return the folder of checkpoints in a run's folder, Lightning's too, or the folder itself where it has none."""
    return next((folder / name for name in ("models", "checkpoints") if (folder / name).is_dir()), folder)


def describe_faults(lines: list[str]) -> str:
    """Return the end of a message: why none of several checkpoints is usable."""
    return f" ({lines[-1]}{f'; and {len(lines) - 1} more' if len(lines) > 1 else ''})" if lines else ""


def _located_record(path: Path) -> CheckpointSet:
    try:
        return _split(path)
    except CheckpointError:
        if RECORD.fullmatch(path.name):
            raise
        raise CheckpointError(f"{path}: is not a commit record; one is named like 500.json") from None


def _located_file(path: Path) -> CheckpointSet:
    """Return the set of a member, or a bundle, of ours or of another program."""
    if path.suffix == ".state" or BASICSR.fullmatch(path.name):
        for folder in (path.parent, path.parent.parent / "models"):
            for candidate in _basicsr_sets(folder):
                if path.resolve() in [file.resolve() for file in candidate.files.values()]:
                    return candidate
        if path.suffix == ".state":
            raise CheckpointError(f"{path}: is a training state without a network; net_g_{path.stem}.pth is missing "
                                  f"beside it and in {path.parent.parent / 'models'}")
    if member := MEMBER.fullmatch(path.name):
        if member[2].startswith("optimizer"):
            raise CheckpointError(f"{path}: is an optimizer's state; to resume, name its set: {member[1]}_G.pth "
                                  "beside it")
        bad: list[str] = []
        for candidate in find_sets(path.parent, bad.append):
            if candidate.files.get(member[2]) == path:
                return candidate
        bad = [line for line in bad if line.startswith(f"{member[1]}.json")]
        reason = bad[0] if bad else f"there is no {member[1]}.json beside it"
        raise CheckpointError(f"{path}: belongs to no complete checkpoint ({reason})")
    if found := _bundle(path):
        return found
    payload = load_file(path)
    parts = foreign.unpack(payload, path)
    if "state" in parts:
        if "G" not in parts:
            raise foreign.no_network_error(payload, path)
        return CheckpointSet(path.parent, parts["state"]["iteration"], {"bundle": path})
    extract_weights(payload, path)  # raises for an optimizer or other content
    raise CheckpointError(f"{path}: holds weights only, no iteration; start from them with --init-from {path}")


def read_weights(path: Path | str, report: Report = lambda line: None) -> tuple[dict[str, torch.Tensor],
                                                                                Mapping[str, Any]]:
    """Return the weights that a path names, of G where there are several, and their options ({}: unknown).

    Args:
        path: a file of ours or of another program, a member, a commit record or a folder.
        report: called with a line where there is a moving average as well.
    Raises: CheckpointError, one line.
    """
    path = Path(path)
    if path.is_dir() or path.suffix == ".json":
        parts = locate(path).load()
        if "E" in parts:
            report(f"{path}: takes G, not the moving average E")
        return extract_weights(parts.get("G"), path), parts.get("state", {}).get("config", {})
    payload = load_file(path)
    member = MEMBER.fullmatch(path.name)
    state = path.with_name(f"{member[1]}_state.pth") if member else None
    about = load_file(state) if state and state.exists() else payload
    config = about.get("config") if isinstance(about, Mapping) else None
    return extract_weights(payload, path, report=report), config if isinstance(config, Mapping) else {}


# ---------------------------------------------------------------- keeping and archiving


def retained(sets: Sequence[CheckpointSet], keep_last_n: int | None, best: int | None) -> dict[int, list[str]]:
    """Return the iterations that retention keeps, each with the reasons.

    Kept are the newest set, the best, and the last n regular ones; a set that was saved only by the clock, because a
    run was interrupted, or for a best that has been surpassed, is superseded.

    Args: sets: oldest first. keep_last_n: None: all regular ones. best: iteration of the best validation.
    """
    regular = sorted({s.iteration for s in sets if s.committed and s.record.get("reason", "regular") == "regular"})
    kept: dict[int, list[str]] = {sets[-1].iteration: ["newest"]} if sets else {}
    if best is not None:
        kept.setdefault(best, []).append("best")
    for iteration in regular[-keep_last_n:] if keep_last_n else regular:
        kept.setdefault(iteration, []).append(f"one of the last {keep_last_n}" if keep_last_n else "regular")
    return kept


def num_retained(layout: Layout, keep_last_n: int | None, num_saves: int) -> int:
    """Return the most sets that are on the disk at a time, with the one that is being written, after so many saves."""
    if layout.kind == "bundle" and not layout.name:
        return min(num_saves, 3)  # the latest, the best, and the new one
    return min(num_saves, keep_last_n + 2) if keep_last_n else num_saves


def prune(folder: Path | str, keep_last_n: int | None, best: int | None = None) -> None:
    """Remove the sets that retention does not keep."""
    sets = [s for s in find_sets(folder) if s.committed]
    kept = retained(sets, keep_last_n, best)
    for old in sets:
        num_names = sum(len(other.names) for other in sets if other.iteration == old.iteration)
        linked = old.bundled and num_names > 1  # the link or copy that is called best remains
        if old.iteration not in kept or linked and kept[old.iteration] == ["best"]:
            remove(old)


def remove(old: CheckpointSet) -> None:
    """Delete a set: its record first, so that the set ceases to exist at once.

    Of a bundle only the name of its commit is deleted; links to it, as best, remain.
    """
    if old.bundled:
        (old.folder / old.record["name"]).unlink(missing_ok=True)
        return
    record = old.folder / f"{old.iteration}.json"
    leaving = record.with_name(f"{record.name}.tmp")
    with contextlib.suppress(FileNotFoundError):
        os.replace(record, leaving)  # names the files until they are deleted, see _cut_off
    sync_folder(old.folder)
    for path in old.files.values():
        path.unlink(missing_ok=True)
    sync_folder(old.folder)
    leaving.unlink(missing_ok=True)


def check_writable(folder: Path, layout: Layout = Layout()) -> None:
    """Commit, link, read and remove a tiny set in a subfolder, with the calls that a run's own checkpoints need.

    Raises: CheckpointError, one line with the cause and a remedy.
    """
    place = folder / ".probe"
    shutil.rmtree(place, ignore_errors=True)  # a kill may have left it
    try:
        place.mkdir()
        found = commit(place, 1, {"G": {"w": torch.ones(1)}, "state": {"iteration": 1}}, layout)
        link(found.path, place / f"link{found.path.suffix}")
        locate(place).load()
        remove(found)
    except (OSError, RuntimeError, CheckpointError) as error:
        number = getattr(error, "errno", None)
        remedy = "make room there, or set path.root to another disk" if number in (errno.ENOSPC, errno.EDQUOT) else \
            "give this user the right to write there, or set path.root to another folder" \
            if number in (errno.EACCES, errno.EPERM, errno.EROFS) else "set path.root to another disk"
        raise CheckpointError(f"{folder}: a checkpoint can't be written here: "
                              f"{getattr(error, 'strerror', None) or str(error).splitlines()[0]}; {remedy}") from None
    finally:
        shutil.rmtree(place, ignore_errors=True)


def clean(folder: Path | str) -> list[str]:
    """Repair what a kill left: delete temporary files, rebuild a lost record. Returns lines for the log.

    Files of ours that belong to no complete set are archived, not deleted.
    """
    folder, lines, strays = Path(folder), [], []
    members, records, _ = _scan(folder)
    for iteration, files in members.items():
        if iteration in records:
            continue
        leaving, found = _cut_off(folder, iteration), _unrecorded(folder, iteration, files, lambda line: None)
        if found and found.committed and not found.fault():
            _write_record(folder / f"{iteration}.json", found.record)
            if not leaving:
                lines.append(f"{iteration}.json was missing; rebuilt from the seals of its files, which are intact")
        elif found is None or found.committed:
            for path in files.values():
                facts = leaving.get(path.name)
                if facts and find_fault(path, facts) is None:
                    path.unlink()
                else:
                    strays.append(path)
    for path in folder.glob("*.tmp"):
        if path.stem.endswith((*SUFFIXES, ".json")):
            path.unlink(missing_ok=True)
    if strays:
        names = ", ".join(path.name for path in strays[:4]) + (f" and {len(strays) - 4} more" if strays[4:] else "")
        lines.append(f"archived files that belong to no checkpoint, {names}: {_move(strays, folder)}")
    return lines


def archive(folder: Path | str, after: int = -1, only: int | None = None, also: Iterable[Path] = ()) -> Path | None:
    """Move the sets newer than an iteration (or `only` one) into a dated folder beside it. Returns that, if any.

    With `after` -1 everything goes, also training files of other programs. Other files are never touched.

    Args: also: further files and folders to move.
    """
    folder = Path(folder)
    members, records, singles = _scan(folder)
    wanted = (lambda iteration: iteration == only) if only is not None else (lambda iteration: iteration > after)
    moved = [*also, *(path for iteration, files in members.items() if wanted(iteration) for path in files.values())]
    all_go = only is None and after < 0
    moved += [path for names in singles for path in names if wanted(_bundle_iteration(path, all_go))]
    if all_go:
        found, bad = find_foreign(folder)
        moved += [*bad, *(path for one in (*found, *_basicsr_sets(folder)) for path in one.files.values()
                          if path.parent == folder)]
    moved += [path for iteration, names in records.items() if wanted(iteration) for path in reversed(names)]
    return _move(moved, folder) if moved else None


def _move(paths: list[Path], folder: Path) -> Path:
    """Move files into a dated folder beside theirs. Returns it."""
    first = target = folder.parent / f"{folder.name}_{time.strftime('%Y%m%d_%H%M%S')}"
    number = 1
    while target.exists():
        number += 1
        target = first.with_name(f"{first.name}_{number}")
    target.mkdir()
    # Records come last: a set that is half moved is complete in neither place, but no file is lost.
    for path in dict.fromkeys(paths):
        os.replace(path, target / path.name)
    sync_folder(target)
    sync_folder(folder)
    return target


def _bundle_iteration(path: Path, all_go: bool) -> int:
    """Return the iteration of a bundle of ours; -2 for another file, the largest number for a damaged bundle.

    Args: all_go: whether any damaged file that may be a checkpoint counts as a bundle.
    """
    try:
        seal = read_seal(path)
        return seal["iteration"] if seal and "parts" in seal else -2
    except CheckpointError:
        ours = MARK in read_tail(path) or foreign.TRAINING.search(path.name) or (all_go and _may_be_checkpoint(path))
        return sys.maxsize if ours else -2


# ---------------------------------------------------------------- one run's checkpoints


@dataclass(frozen=True)
class Saved:
    """The result of a save."""

    found: CheckpointSet
    seconds: float  # from the snapshot to the commit
    waited: float  # seconds of these that training waited
    amended: bool = False  # whether only the state of an existing set was written


class Saver:
    """Commits a run's checkpoints in order, here or on a thread, links latest and best, and removes superseded ones.

    Args:
        folder: folder of the checkpoints. layout: their file names. keep_last_n: see `retained`.
        background: write on a thread, from a snapshot, while training continues.
    """

    def __init__(self, folder: Path, layout: Layout = Layout(), keep_last_n: int | None = None,
                 background: bool = False):
        self.folder, self.layout, self.keep_last_n, self.background = Path(folder), layout, keep_last_n, background
        self.snapshot, self.pool = Snapshot(), ThreadPoolExecutor(1)
        self.pending: Future | None = None

    def save(self, iteration: int, parts: Mapping[str, Any], best: int | None = None, amend: bool = False,
             **info: Any) -> None:
        """Commit a set; `poll` returns the result. Errors are raised here, or by `poll` when in the background.

        Args: best: iteration of the best set so far. amend: the set exists, only its state differs. info: see
            `commit`.
        """
        assert self.pending is None, "poll the previous save first"
        began = time.monotonic()
        if amend and self.layout.kind == "split":
            parts = {"state": parts["state"]}
        parts = self.snapshot.take(parts) if self.background else to_cpu(parts)
        waited = time.monotonic() - began

        def relink(found: CheckpointSet) -> None:
            self._link(found.path, latest=info.get("reason") not in PASSING, best=best == iteration)

        def write() -> Saved:
            if amend:
                found = amend_state(self.folder, iteration, parts, self.layout, relink, best=best, **info)
            else:
                found = commit(self.folder, iteration, parts, self.layout, best=best, **info)
                relink(found)
            prune(self.folder, self.keep_last_n, best)
            seconds = time.monotonic() - began
            return Saved(found, seconds, waited if self.background else seconds, amend)

        if self.background:
            self.pending = self.pool.submit(write)
        else:
            saved, self.pending = write(), Future()
            self.pending.set_result(saved)

    def relink(self, best: int | None, sets: Sequence[CheckpointSet] | None = None) -> None:
        """Renew the links latest and best, after a kill between a commit and its links, or after a rewind.

        Args: sets: of another folder of which this one is a copy; None: those in this one.
        """
        sets = [found for found in find_sets(self.folder) if found.committed] if sets is None else sets
        regular = [found for found in sets if found.record.get("reason") not in PASSING]
        for found in sets:
            self._link(self.folder / found.path.name, latest=found in regular[-1:], best=found.iteration == best)

    def _link(self, path: Path, latest: bool, best: bool) -> None:
        for which, wanted in (("latest", latest), ("best", best)):
            if wanted and path.exists() and (name := self.layout.link_name(which)):
                link(path, self.folder / name)

    def copy_from(self, folder: Path, best: int | None, again: bool = True) -> None:
        """Copy the sets of another folder that are not here, or not with the same record; links and retention as there.

        One that a validation rewrites meanwhile is copied again.

        Args: again: whether a copy that is damaged, though its record is the same, is made once more.
        Raises: OSError or CheckpointError.
        """
        sets = [found for found in find_sets(folder) if found.committed]
        for found in sets:
            try:
                if _record_in(self.folder / found.path.name) != found.record:
                    copy_set(found, self.folder)
            except (OSError, CheckpointError) as error:
                now = _record_in(found.path)
                if now is None and not found.path.exists():  # it was superseded meanwhile
                    continue
                rewritten = now not in (None, found.record)
                if not rewritten and not (again and isinstance(error, CheckpointError)):
                    raise
                time.sleep(0 if rewritten else 0.2)  # its record may be there already, and its state not yet
                return self.copy_from(folder, best, again and rewritten)
        self.relink(best, sets)
        prune(self.folder, self.keep_last_n, best)

    def poll(self) -> Saved | None:
        """Return the result of a save that has ended since the last call, or None. Raises the save's error."""
        if self.pending is None or not self.pending.done():
            return None
        ended, self.pending = self.pending, None
        return ended.result()

    def wait(self) -> None:
        """Wait for the save in progress."""
        if self.pending:
            wait([self.pending])


def fingerprint(weights: Mapping[str, torch.Tensor], *settings: Any) -> str:
    """Return a SHA-256 digest (hexadecimal) of weights, their names, and further plain values."""
    digest = hashlib.sha256(json.dumps(settings).encode())
    for name, value in weights.items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def timestamp() -> str:
    """Return the local time for a record."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


if __name__ == "__main__":
    from commands.checkpoints import main
    from storage import system

    system.end_quietly_in_pipes()
    sys.exit(main(sys.argv[1:]))
