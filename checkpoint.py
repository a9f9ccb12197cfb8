"""Checkpoints that can't be lost: commit, verify, find, restore, keep.

A *set* is everything of one iteration, by label: networks "G", "E", "D", optimizers "optimizerG", ..., and "state",
which is what else makes the next step. It lies on the disk in one of two layouts:

- split, as KAIR's scripts know it: `{iter}_G.pth`, `{iter}_optimizerG.pth`, ..., `{iter}_state.pth`, and, renamed into
  place last, the commit record `{iter}.json` with the size and checksum of each. The set exists once its record does.
- bundle: one file with everything, under names that the options choose; its record is the file's own seal.

Folders that KAIR wrote (no record) and single files that others wrote are read too, see storage/foreign.py.
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
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from storage import foreign
from storage.files import check_space, link, removed_on_failure, save_file, sync_folder, write_durably
from storage.foreign import VERSION, is_optimizer, weights_in
from storage.sealed import (
    MARK,
    CheckpointError,
    find_fault,
    load_file,
    read_seal,
    read_torch,
    tail_of,
    verified,
    with_checksum,
)
from storage.tree import Snapshot, num_bytes, to_cpu

__all__ = ["CheckpointError", "VERSION", "is_optimizer", "load_file", "save_file", "weights_in"]  # of storage
MEMBER = re.compile(r"(\d+)_([A-Za-z][A-Za-z0-9]*)\.pth")
RECORD = re.compile(r"(\d+)\.json")
BASICSR = re.compile(r"net_([a-z])_(\d+)\.pth")  # its networks, beside ../training_states/{iter}.state
SUFFIXES = (".pt", ".pth", ".ckpt")  # of files that may be bundles
# in a state, and easily done without
OF_EVERY_MODEL = ("skipped", "skipped_in_a_row", "scheduler_state_dict", "scaler_state_dict")
ABOUT = ("timestamp", "epoch", "reason", "best", "metric")  # of a set, in its record and in each seal
Report = Callable[[str], None]


# ---------------------------------------------------------------- a set


@dataclass(frozen=True)
class CheckpointSet:
    """The files of one iteration: committed by us (with a record), or as others leave them (without)."""

    folder: Path
    iteration: int | None  # None: the file of others does not say
    files: Mapping[str, Path]  # by label; a bundle is one file, "bundle"
    record: Mapping | None = field(default=None, compare=False)
    names: tuple[Path, ...] = field(default=(), compare=False)  # of the record or bundle: every hard link to it there
    _checked: list = field(default_factory=list, compare=False, repr=False)

    @property
    def labels(self) -> tuple[str, ...]:
        """What is in it: "G", "E", "optimizerG", "state", ..."""
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

    @property
    def ours(self) -> bool:
        """Whether this program wrote it: sealed or recorded, or of a version that did neither."""
        return self.committed or "state" in self.files and self.files["state"].suffix == ".pth"

    def fault(self) -> str | None:
        """What is wrong with the set, or None: each file's size and checksum against the record, or its own."""
        if self._checked:
            return None
        for path in self.files.values():
            facts = None
            if self.committed and not self.bundled:
                facts = {**self.record["files"][path.name], "iteration": self.iteration}
            reason = find_fault(path, facts)
            if reason and facts and "before" in facts:  # an amendment was cut off between the record and this file
                reason = find_fault(path, facts["before"]) and reason
            if reason:
                return f"{path.name}: {reason}"
        self._checked.append(None)  # good; what is bad is looked at again
        return None

    def load(self) -> dict[str, Any]:
        """Every part, by label, verified first. Raises CheckpointError, also when there is no network to load."""
        if fault := self.fault():
            raise CheckpointError(f"{self.folder}: {fault}")
        parts = {label: read_torch(path) for label, path in self.files.items()}
        if self.bundled:
            payload = parts["bundle"]
            parts = foreign.unpack(payload, self.path)
            if "G" not in parts:
                raise foreign.no_network(payload, self.path)
        elif not self.committed:
            parts = foreign.unpack_members(parts, self.path)
        if "state" in parts:
            parts["state"] = foreign.migrate(parts["state"], self.path)
        return parts


@dataclass(frozen=True)
class Layout:
    """How the files of a run's checkpoints are called. In the split layout latest and best are links to records."""

    kind: str = "split"
    name: str | None = "epoch_{epoch:04d}.pt"  # a bundle's; None: there is only the latest
    latest: str | None = "latest.pt"
    best: str | None = "best.pt"
    interrupted: str = "interrupted.pt"

    def __post_init__(self):
        """Raises ValueError, one line, for names that no file could have."""
        for key in ("name", "latest", "best", "interrupted"):
            name = getattr(self, key)
            try:
                tried = name and name.format(epoch=1, iter=1)
            except (KeyError, IndexError, ValueError):
                raise ValueError(f"{key}: {name!r}: the fields are {{epoch}} and {{iter}}") from None
            if tried and (Path(tried).name != tried or not tried.endswith(SUFFIXES) or MEMBER.fullmatch(tried)):
                raise ValueError(f"{key}: {name!r} must be a file name that ends in one of {', '.join(SUFFIXES)}")
        if self.name and self.name.format(epoch=1, iter=1) == self.name.format(epoch=2, iter=2):
            raise ValueError(f"name: {self.name!r} needs the field {{epoch}} or {{iter}}, or null for only the latest")
        if self.kind == "bundle" and not (self.name or self.latest):
            raise ValueError("name and latest can't both be null")

    def file_name(self, iteration: int, epoch: int, reason: str) -> str:
        """What a committed bundle is called."""
        if reason == "interrupted":
            return self.interrupted
        return self.name.format(epoch=epoch, iter=iteration) if self.name else self.latest or self.interrupted

    def link_name(self, which: str) -> str | None:
        """What the link "latest" or "best" is called."""
        name = getattr(self, which)
        return f"{Path(name).stem}.json" if name and self.kind == "split" else name


def commit(folder: Path | str, iteration: int, parts: Mapping[str, Any], layout: Layout = Layout(),
           **info: Any) -> CheckpointSet:
    """Write the parts of an iteration and make them exist at once.

    Args: parts: label -> what `torch.save` writes. info: plain values for the record: epoch, reason, metric, ...
    Raises: OSError or RuntimeError when the disk refuses; then nothing of the set is left, and every older one is.
    """
    folder = Path(folder)
    check_space(folder, num_bytes(parts))
    info = {"iteration": iteration, "timestamp": timestamp(), "epoch": 0, "reason": "regular", **info}
    if layout.kind == "bundle":
        return save_bundle(folder / layout.file_name(iteration, info["epoch"], info["reason"]), parts, info)
    return _commit_split(folder, iteration, parts, info)


def save_bundle(path: Path, parts: Mapping[str, Any], info: Mapping[str, Any]) -> CheckpointSet:
    """One file with all parts; `info`, with the iteration, goes into its seal."""
    save_file(path, foreign.pack(parts), {"name": path.name, "parts": sorted(parts), **info})
    return _bundle(path)


def _commit_split(folder: Path, iteration: int, parts: Mapping[str, Any], info: Mapping[str, Any]) -> CheckpointSet:
    """All files under temporary names, then renamed; the record last."""
    names = {label: f"{iteration}_{label}.pth" for label in parts}
    path = folder / f"{iteration}.json"
    temporary = {folder / name: folder / f"{name}.tmp" for name in (*names.values(), path.name)}
    renamed: list[Path] = []
    try:
        def write(label: str) -> dict[str, int]:
            return write_durably(folder / f"{names[label]}.tmp", parts[label], _about(iteration, label, parts, info))

        with ThreadPoolExecutor(4) as pool:  # torch.save leaves other threads room while it sums and writes
            files = dict(zip(names.values(), pool.map(write, names)))
        record = {"version": VERSION, **info, "files": files}
        write_durably(temporary[path], with_checksum(record, indent=1))
        sync_folder(folder)
        if path.exists():  # a set of the same iteration gives way as a whole
            put_away(folder, only=iteration)
        for final, written in temporary.items():
            if final == path:
                sync_folder(folder)  # the files are there before what speaks for them
            renamed.append(final)
            os.replace(written, final)
        sync_folder(folder)
    except BaseException:
        for leftover in (*reversed(renamed), *temporary.values()):  # the record first
            with contextlib.suppress(OSError):
                leftover.unlink(missing_ok=True)
        raise
    return CheckpointSet(folder, iteration, {label: folder / name for label, name in names.items()}, record)


def _about(iteration: int, label: str, labels: Iterable[str], info: Mapping[str, Any]) -> dict[str, Any]:
    """What the seal of a member tells, also of its set, should the record get lost."""
    return {"iteration": iteration, "part": label,
            "set": {**{key: info.get(key) for key in ABOUT}, "parts": sorted(labels)}}


def amend(folder: Path | str, iteration: int, parts: Mapping[str, Any], layout: Layout,
          relink: Callable[[CheckpointSet], None], **info: Any) -> CheckpointSet:
    """Commit another state of a set that exists, e.g. with the metrics of its validation; it is whole at any moment.

    A bundle is written again and replaced. Of a split set only the state is written: first its record is replaced by
    one that accepts both the new state and the one before, then the state.

    Args: parts, info: as `commit`, and equal to the set's but for "state". relink: renews the links to the record,
        which name the one before until then.
    Raises: OSError or RuntimeError; the set is then as it was.
    """
    folder, label = Path(folder), "state"
    path, name = folder / f"{iteration}.json", f"{iteration}_{label}.pth"
    if layout.kind == "bundle" or not path.exists():
        found = commit(folder, iteration, parts, layout, **info)
        relink(found)
        return found
    before = _split(path).record
    temporary = folder / f"{name}.tmp"
    with removed_on_failure(temporary):
        labels = [MEMBER.fullmatch(member)[2] for member in before["files"]]
        facts = write_durably(temporary, parts[label], _about(iteration, label, labels, {**before, **info}))
        old = dict(before["files"][name])
        if (older := old.pop("before", None)) and find_fault(folder / name, old):
            old = older  # an earlier amendment was cut off before its state was in place
        record = {**before, **info, "files": {**before["files"], name: {**facts, "before": old}}}
        save_file(path, with_checksum(record, indent=1))
        found = _split(path)
        relink(found)
        os.replace(temporary, folder / name)
    sync_folder(folder)
    return found


def _bundle(path: Path, names: tuple[Path, ...] = ()) -> CheckpointSet | None:
    """A file of ours as a set, or None when it is none. Raises CheckpointError for a damaged seal or another's file."""
    seal = read_seal(path)
    if not seal or "parts" not in seal:
        return None
    names = tuple(sorted(names or (path,), key=lambda name: name.name != seal["name"]))
    path = names[0]  # what it was committed as, rather than a link to it
    if path.name != seal["name"] and _alike(path.name, seal["name"]):
        raise CheckpointError(f"{path}: holds what was committed as {seal['name']}")
    return CheckpointSet(path.parent, seal["iteration"], {"bundle": path}, seal, names)


def _split(path: Path, names: tuple[Path, ...] = ()) -> CheckpointSet:
    """The set of a commit record that can be trusted. Raises CheckpointError."""
    try:
        record = verified(path.read_bytes())
        iteration, files = record["iteration"], {}
        for name in record["files"]:  # a record must not lead out of its folder or to another iteration's files
            match = MEMBER.fullmatch(name)
            if not match or int(match[1]) != iteration or (path.parent / name).is_symlink():
                raise ValueError(f"it names {name!r}")
            files[match[2]] = path.parent / name
        if (match := RECORD.fullmatch(path.name)) and int(match[1]) != iteration:
            raise ValueError(f"it speaks for {iteration}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path.name}: the commit record is damaged ({error})") from None
    return CheckpointSet(path.parent, iteration, files, record, names or (path,))


# ---------------------------------------------------------------- finding


def find_sets(folder: Path | str, report: Report | None = None) -> list[CheckpointSet]:
    """The sets in a folder, oldest first: ours, of either layout, and KAIR's, unverified. Bad records are reported."""
    report, sets = report or (lambda line: None), []
    members, records, singles = _scan(Path(folder))
    for names in records.values():
        try:
            sets.append(_split(names[0], names))
        except CheckpointError as error:
            report(str(error))
    for iteration, files in members.items():
        if iteration not in records and (found := _unrecorded(Path(folder), iteration, files, report)):
            sets.append(found)
    sets += _basicsrs(Path(folder))
    for names in singles:
        try:
            found = _bundle(names[0], names)
        except (CheckpointError, OSError) as error:
            if counts(names[0]):
                report(str(error).removeprefix(f"{folder}/"))
            continue
        if found:
            sets.append(found)
    return sorted(sets, key=lambda found: found.iteration)


def _unrecorded(folder: Path, iteration: int, files: Mapping[str, Path], report: Report) -> CheckpointSet | None:
    """The set that members without a record make: KAIR's, or ours where their seals say that all are there."""
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
    saves = {json.dumps([told.get(key) for key in ("timestamp", "epoch", "parts")]) for told in about.values()}
    wanted = set(next(iter(about.values()), {}).get("parts") or ("G", "state", "optimizerG"))
    if wanted <= set(own) and len(saves) == 1:
        facts = {label: {"size": files[label].stat().st_size, "body_crc32": seal["body_crc32"]}
                 for label, seal in own.items()}
        record = {"version": VERSION, "iteration": iteration, "reason": "regular", **about["state"],
                  "files": {files[label].name: facts[label] for label in own}}
        record.pop("parts", None)
        return CheckpointSet(folder, iteration, {label: files[label] for label in own}, record)
    if not _cut_off(folder, iteration):
        strays = [f"{files[label].name} is {seal.get('part')} of iteration {seal.get('iteration')}"
                  for label, seal in seals.items() if seal and label not in own]
        report(f"{iteration}: there is no {iteration}.json, and to do without it "
               + ("; ".join(strays) or f"{', '.join(sorted(wanted - set(own)) or ['one save of all'])} is missing"))
    return None


def _cut_off(folder: Path, iteration: int) -> Mapping[str, Mapping]:
    """Files by name that belong to a commit or removal which a kill cut off: its record has a temporary name."""
    try:
        return verified((folder / f"{iteration}.json.tmp").read_bytes())["files"]
    except (OSError, ValueError, KeyError):
        return {}


def _basicsrs(folder: Path) -> list[CheckpointSet]:
    """BasicSR's networks in a folder, with the optimizers in `training_states` beside it."""
    sets: dict[int, dict[str, Path]] = {}
    for path in sorted(folder.glob("net_*_*.pth")):
        if (match := BASICSR.fullmatch(path.name)) and path.is_file():
            sets.setdefault(int(match[2]), {})[match[1].upper()] = path
    for iteration, files in sets.items():
        for place in (folder.parent / "training_states", folder):
            if (state := place / f"{iteration}.state").is_file():
                files.setdefault("state", state)
    return [CheckpointSet(folder, iteration, files) for iteration, files in sets.items() if "G" in files]


def counts(path: Path) -> bool:
    """Whether a file that can't be read may be a checkpoint by its name, rather than a loss's or codec's weights."""
    return bool(foreign.TRAINING.search(path.name) or not foreign.HELPERS.search(path.name))


def _alike(a: str, b: str) -> bool:
    """Whether two names differ in their numbers only: then the file is another's copy, not itself."""
    return re.sub(r"\d+", "#", a) == re.sub(r"\d+", "#", b)


def _scan(folder: Path) -> tuple[dict[int, dict[str, Path]], dict[int, tuple[Path, ...]], list[tuple[Path, ...]]]:
    """Files that may be checkpoints, by name: members by iteration and label, records, others; each with its links."""
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


def has_traces(folder: Path | str) -> bool:
    """Whether anything in the folder looks like a checkpoint, good or not."""
    bad: list[str] = []
    return bool(find_sets(folder, bad.append) or bad or any(_find_foreign(Path(folder))))


def _find_foreign(folder: Path) -> tuple[list[CheckpointSet], dict[Path, str]]:
    """Single files of others that hold a training state, oldest first; and those that may, but can't be used: why."""
    found, bad = [], {}
    for (path, *_) in _scan(folder)[2]:
        try:
            if read_seal(path) is not None or BASICSR.fullmatch(path.name):
                continue
        except (CheckpointError, OSError):
            continue  # find_sets has said so
        try:
            payload = load_file(path)
            parts = foreign.unpack(payload, path)
            state = parts.get("state")
            if state and "G" not in parts:
                raise foreign.no_network(payload, path)
            if state:
                found.append((state["iteration"] or 0, state["epoch"], path.stat().st_mtime, path))
        except CheckpointError as error:
            if counts(path):
                bad[path] = str(error).removeprefix(f"{folder}/")
    return [CheckpointSet(folder, iteration or None, {"bundle": path})
            for iteration, _, _, path in sorted(found)], bad


def find_newest(folder: Path | str, report: Report | None = None) -> CheckpointSet | None:
    """The newest set that verifies, or None; each newer one that does not is reported with its reason.

    KAIR's folders may hold different iterations of G, E and the optimizer: then the newest iteration that has
    all of them is used, and the difference is reported.
    """
    report = report or (lambda line: None)
    sets = find_sets(folder, report)
    if not sets:
        sets, bad = _find_foreign(Path(folder))
        for line in bad.values():
            report(line)
    kairs = [s for s in sets if not s.committed and not s.bundled]
    everything = set().union(*(s.labels for s in kairs)) if kairs else set()
    for candidate in reversed(sets):
        if candidate in kairs and set(candidate.labels) != everything:
            complete = [s.iteration for s in kairs if set(s.labels) == everything]
            if complete:
                report(f"{candidate.iteration}: only {', '.join(candidate.labels)} of this iteration; "
                       f"{', '.join(sorted(everything))} are together at {max(complete)}")
                continue
        if fault := candidate.fault():
            report(f"checkpoint {candidate.iteration} is not used: {fault}")
            continue
        return candidate
    return None


def find_best(folder: Path | str, report: Report | None = None) -> CheckpointSet | None:
    """The set of the best validation as the newest one knows it, else the newest."""
    newest = find_newest(folder, report)
    if newest is None or newest.record is None or newest.record.get("best") in (None, newest.iteration):
        return newest
    others = (found for found in find_sets(folder) if found.iteration == newest.record["best"])
    return next((found for found in others if not found.fault()), newest)


def find_last_checkpoint(save_dir, net_type: str = "G", pretrained_path: str | None = None) -> tuple[int, str | None]:
    """KAIR's scan for the newest file of one kind.

    Args: save_dir: folder of `{iter}_{net_type}.pth`. pretrained_path: what to return when there is none.
    Returns: (iteration, path); (0, pretrained_path) if none is left. Differs from KAIR: names that do not
    match are ignored, uncommitted and damaged sets are skipped.
    """
    for candidate in reversed(find_sets(save_dir)):
        if net_type in candidate.files and not candidate.fault():
            return candidate.iteration, str(candidate.files[net_type])
    return 0, pretrained_path


def locate(path: Path | str, report: Report | None = None) -> CheckpointSet:
    """The set that a user names by a folder, a commit record, a bundle, or a member other than an optimizer.

    Raises: CheckpointError in one line, also for a damaged set: what was named is never replaced silently.
    """
    path = Path(path)
    if path.is_dir():
        why: list[str] = []
        for folder in (path, path / "models", *([path.parent / "models"] if path.name == "training_states" else [])):
            if found := find_newest(folder, lambda line: (why.append(line), report and report(line))):
                return found
        raise CheckpointError(f"{path}: no usable checkpoint in this folder" + reasons(why))
    if not path.exists():
        raise CheckpointError(f"{path}: no such checkpoint; give a file, a commit record or a folder")
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path}: is empty, its writer was interrupted; name another checkpoint")
    found = _located_record(path) if path.suffix == ".json" else _located_file(path)
    if fault := found.fault():
        raise CheckpointError(f"{path.parent}: checkpoint {found.iteration} is damaged: {fault}")
    return found


def models_of(folder: Path) -> Path:
    """A run's folder stands for the models folder in it."""
    return folder / "models" if (folder / "models").is_dir() else folder


def reasons(lines: list[str]) -> str:
    """Why nothing was usable, as the end of a line."""
    return f" ({lines[-1]}{f'; and {len(lines) - 1} more' if len(lines) > 1 else ''})" if lines else ""


def _located_record(path: Path) -> CheckpointSet:
    try:
        return _split(path)
    except CheckpointError:
        if RECORD.fullmatch(path.name):
            raise
        raise CheckpointError(f"{path}: is no commit record; one is named like 500.json") from None


def _located_file(path: Path) -> CheckpointSet:
    """The set of a member, or a bundle, ours or of others."""
    if path.suffix == ".state" or BASICSR.fullmatch(path.name):
        for folder in (path.parent, path.parent.parent / "models"):
            for candidate in _basicsrs(folder):
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
            raise foreign.no_network(payload, path)
        return CheckpointSet(path.parent, parts["state"]["iteration"], {"bundle": path})
    weights_in(payload, path)  # an optimizer or rubbish is named as such
    raise CheckpointError(f"{path}: holds weights only, no iteration; start from them with --init-from {path}")


def read_weights(path: Path | str) -> tuple[dict[str, torch.Tensor], Mapping[str, Any]]:
    """The weights that a path names, of G where there are more, and the options they were trained with ({}: unknown).

    Args: path: a file of ours or of others, a member, a commit record or a folder.
    Raises: CheckpointError, one line.
    """
    path = Path(path)
    if path.is_dir() or path.suffix == ".json":
        parts = locate(path).load()
        return weights_in(parts.get("G"), path), parts.get("state", {}).get("config", {})
    payload = load_file(path)
    member = MEMBER.fullmatch(path.name)
    state = path.with_name(f"{member[1]}_state.pth") if member else None
    about = load_file(state) if state and state.exists() else payload
    config = about.get("config") if isinstance(about, Mapping) else None
    return weights_in(payload, path), config if isinstance(config, Mapping) else {}


# ---------------------------------------------------------------- keeping and putting away


def try_out(folder: Path, layout: Layout = Layout()) -> None:
    """Commit, link, read and remove a tiny set in a folder of its own below `folder`, as a run does with its own.

    Raises: CheckpointError, one line with the cause and a remedy.
    """
    place = folder / ".probe"
    shutil.rmtree(place, ignore_errors=True)  # of a kill
    try:
        place.mkdir()
        found = commit(place, 1, {"G": {"w": torch.ones(1)}, "state": {"iteration": 1}}, layout)
        link(found.path, place / f"link{found.path.suffix}")
        find_newest(place, report=print).load()
        remove(found)
    except (OSError, RuntimeError, CheckpointError, AttributeError) as error:
        number = getattr(error, "errno", None)
        remedy = "make room there, or set path.root to another disk" if number in (errno.ENOSPC, errno.EDQUOT) else \
            "give this user the right to write there, or set path.root to another folder" \
            if number in (errno.EACCES, errno.EPERM, errno.EROFS) else "set path.root to another disk"
        raise CheckpointError(f"{folder}: a checkpoint can't be written here: "
                              f"{getattr(error, 'strerror', None) or str(error).splitlines()[0]}; {remedy}") from None
    finally:
        shutil.rmtree(place, ignore_errors=True)


def remove(old: CheckpointSet) -> None:
    """Delete a set: its record first, so that it is gone at once.

    Of a bundle only the name that it was committed under goes: links to it, as best, stay.
    """
    if old.bundled:
        (old.folder / old.record["name"]).unlink(missing_ok=True)
        return
    record = old.folder / f"{old.iteration}.json"
    leaving = record.with_name(f"{record.name}.tmp")
    with contextlib.suppress(FileNotFoundError):
        os.replace(record, leaving)  # speaks for the files until they are gone, see _cut_off
    sync_folder(old.folder)
    for path in old.files.values():
        path.unlink(missing_ok=True)
    sync_folder(old.folder)
    leaving.unlink(missing_ok=True)


def clean(folder: Path | str) -> list[str]:
    """End what a kill cut off: remove temporary files, write a lost record anew. Returns lines to be said.

    Nothing else is deleted: members of ours that no record speaks for, and that make no set, are put aside.
    """
    folder, said, strays = Path(folder), [], []
    members, records, _ = _scan(folder)
    for iteration, files in members.items():
        if iteration in records:
            continue
        leaving, found = _cut_off(folder, iteration), _unrecorded(folder, iteration, files, lambda line: None)
        if found and found.committed and not found.fault():
            save_signed(folder / f"{iteration}.json", found.record)
            if not leaving:
                said.append(f"{iteration}.json was missing; written anew from the seals of its files, which are whole")
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
        said.append(f"put aside what belongs to no checkpoint, {names}: {_move(strays, folder)}")
    return said


def save_signed(path: Path, facts: Mapping[str, Any]) -> None:
    """Write a commit record."""
    save_file(path, with_checksum(facts, indent=1))


def prune(folder: Path | str, keep_last_n: int | None, best: int | None = None) -> None:
    """After a commit: drop what it supersedes, never best or newest.

    That is all but the newest n regular sets, and those that were saved only as interrupted or best, and aren't now.
    """
    sets = [s for s in find_sets(folder) if s.committed]
    regular = sorted({s.iteration for s in sets if s.record.get("reason", "regular") == "regular"})
    kept = {*(regular[-keep_last_n:] if keep_last_n else regular), *(s.iteration for s in sets[-1:])}
    for old in sets:
        names = sum(len(other.names) for other in sets if other.iteration == old.iteration)
        outlives = old.bundled and names > 1  # under the name of best or latest, a link or a copy
        if old.iteration not in kept and (old.iteration != best or outlives):
            remove(old)


def put_away(folder: Path | str, after: int = -1, only: int | None = None) -> Path | None:
    """Move what is newer than an iteration (or `only` one) into a dated folder beside it. Returns that, if any.

    Where all goes (`after` is -1), so do training files of others; what is no checkpoint is never touched.
    """
    folder = Path(folder)
    members, records, singles = _scan(folder)
    wanted = (lambda iteration: iteration == only) if only is not None else (lambda iteration: iteration > after)
    moved = [path for iteration, files in members.items() if wanted(iteration) for path in files.values()]
    all_go = only is None and after < 0
    moved += [path for names in singles for path in names if wanted(_iteration_of(path, all_go))]
    if all_go:
        found, bad = _find_foreign(folder)
        moved += [*bad, *(path for one in (*found, *_basicsrs(folder)) for path in one.files.values()
                          if path.parent == folder)]
    moved += [path for iteration, names in records.items() if wanted(iteration) for path in reversed(names)]
    return _move(moved, folder) if moved else None


def _move(paths: list[Path], folder: Path) -> Path:
    """Move files into a dated folder beside theirs. Returns it."""
    archive = unused_name(folder.parent / f"{folder.name}_{time.strftime('%Y%m%d_%H%M%S')}")
    archive.mkdir()
    # Records come last: a set half moved is whole in neither place, but none is lost; a rerun moves the rest.
    for path in dict.fromkeys(paths):
        os.replace(path, archive / path.name)
    sync_folder(archive)
    sync_folder(folder)
    return archive


def _iteration_of(path: Path, doubtful: bool) -> int:
    """Of a bundle of ours; a damaged one counts as newer than anything, a file of others as older.

    Args: doubtful: so does a damaged file that may have been anything but a loss's or codec's weights.
    """
    try:
        seal = read_seal(path)
        return seal["iteration"] if seal and "parts" in seal else -2
    except CheckpointError:
        ours = MARK in tail_of(path) or foreign.TRAINING.search(path.name) or (doubtful and counts(path))
        return sys.maxsize if ours else -2


def unused_name(path: Path) -> Path:
    """`path`, or `path_2`, `path_3`, ... whichever does not exist yet."""
    candidate, n = path, 1
    while candidate.exists():
        n += 1
        candidate = path.with_name(f"{path.name}_{n}")
    return candidate


# ---------------------------------------------------------------- one run's checkpoints


@dataclass(frozen=True)
class Saved:
    """What became of a save."""

    found: CheckpointSet
    seconds: float  # from the snapshot to the commit
    waited: float  # of these, how long training stood still
    amended: bool = False  # whether only the state was written, to a set that was there


class Saver:
    """Commits a run's checkpoints in order, here or on a thread, links latest and best, keeps what is to be kept.

    Args:
        folder: where they lie. layout: how they are called. keep_last_n: how many stay; None: all.
        background: write on a thread, from a snapshot; training goes on meanwhile.
    """

    def __init__(self, folder: Path, layout: Layout = Layout(), keep_last_n: int | None = None,
                 background: bool = False):
        self.folder, self.layout, self.keep_last_n, self.background = Path(folder), layout, keep_last_n, background
        self.snapshot, self.pool = Snapshot(), ThreadPoolExecutor(1)
        self.pending: Future | None = None

    def save(self, iteration: int, parts: Mapping[str, Any], best: int | None = None, amend: bool = False,
             **info: Any) -> None:
        """Commit a set. What becomes of it, `poll` says; when not in background, what it meets is raised here.

        Args: best: iteration of the best set so far. amend: the set is there, only its state differs. info: see
            `commit`.
        """
        assert self.pending is None, "wait for the save before and poll it"
        began = time.monotonic()
        if amend and self.layout.kind == "split":
            parts = {"state": parts["state"]}
        if self.background:
            copied = self.snapshot.take(parts)
            waited = time.monotonic() - began
            self.pending = self.pool.submit(self._commit, iteration, copied, best, amend, info, began, waited)
        else:
            saved, self.pending = self._commit(iteration, to_cpu(parts), best, amend, info, began, None), Future()
            self.pending.set_result(saved)

    def _commit(self, iteration: int, parts: Mapping[str, Any], best: int | None, amends: bool, info: Mapping[str, Any],
                began: float, waited: float | None) -> Saved:
        def relink(found: CheckpointSet) -> None:
            if info.get("reason") != "interrupted" and (name := self.layout.link_name("latest")):
                link(found.path, self.folder / name)
            if best == iteration:
                self.mark_best(found)

        if amends:
            found = amend(self.folder, iteration, parts, self.layout, relink, best=best, **info)
        else:
            found = commit(self.folder, iteration, parts, self.layout, best=best, **info)
            relink(found)
        prune(self.folder, self.keep_last_n, best)
        seconds = time.monotonic() - began
        return Saved(found, seconds, seconds if waited is None else waited, amends)

    def relink(self, best: int | None) -> None:
        """Make latest and best name what they should, after a kill between a commit and its links, or a rewind."""
        sets = [found for found in find_sets(self.folder) if found.committed]
        regular = [found for found in sets if found.record.get("reason") != "interrupted"]
        if regular and (name := self.layout.link_name("latest")):
            link(regular[-1].path, self.folder / name)
        for found in sets:
            if found.iteration == best:
                self.mark_best(found)

    def mark_best(self, found: CheckpointSet) -> None:
        if name := self.layout.link_name("best"):
            link(found.path, self.folder / name)

    def poll(self) -> Saved | None:
        """What ended since the last look; raises the error that a save met. Costs nothing when there is none."""
        if self.pending is None or not self.pending.done():
            return None
        ended, self.pending = self.pending, None
        return ended.result()

    def wait(self) -> None:
        """Until the save under way has ended."""
        if self.pending:
            wait([self.pending])


def fingerprint(weights: Mapping[str, torch.Tensor], *settings: Any) -> str:
    """A digest of weights, their names, and plain values that matter as well."""
    digest = hashlib.sha256(json.dumps(settings).encode())
    for name, value in weights.items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


# ---------------------------------------------------------------- what else makes the next step


def timestamp() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


if __name__ == "__main__":
    import signal

    from commands.checkpoints import main

    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # end quietly when piped into head
    sys.exit(main(sys.argv[1:]))
