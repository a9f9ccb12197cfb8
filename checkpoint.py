"""Checkpoints that can't be lost: commit, verify, find, restore, keep.

A *set* is everything of one iteration: `{iter}_G.pth`, `{iter}_optimizerG.pth`, ..., `{iter}_state.pth`, and, renamed
into place last, the commit record `{iter}.json` with the size and checksum of each. A set exists once its record
does. The weights are bare CPU state dicts that KAIR's scripts load as they are; folders that KAIR wrote (no record)
are read too.

Atomic on POSIX (DESIGN 4): temporary name in the same folder, write, fsync, rename, fsync of the folder.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import random
import re
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

VERSION = 1  # of the state file and the record
MEMBER = re.compile(r"(\d+)_([A-Za-z][A-Za-z0-9]*)\.pth")
RECORD = re.compile(r"(\d+)\.json")
WRAPPERS = re.compile(r"^(?:module\.|_orig_mod\.)+")  # DistributedDataParallel's and torch.compile's, in any nesting
WEIGHT_KEYS = ("params", "params_ema", "state_dict", "model_state_dict", "model")  # where files keep a state dict
Report = Callable[[str], None]


class CheckpointError(ValueError):
    """A checkpoint that can't be read, trusted or written: one line that says which and why."""


# ---------------------------------------------------------------- one file


class _Counted:
    """A binary file that remembers the size and CRC-32 of what went through it."""

    def __init__(self, file):
        self.file, self.size, self.crc32 = file, 0, 0

    def write(self, data) -> int:
        self.file.write(data)
        self.crc32 = zlib.crc32(data, self.crc32)
        self.size += len(data)
        return len(data)

    def flush(self) -> None:
        self.file.flush()


def write_durably(path: Path, write: Callable[[Any], None]) -> dict[str, int]:
    """Create a file and force it to the disk. Returns its size in bytes and CRC-32; removes it when that fails."""
    try:
        with open(path, "wb", buffering=1 << 20) as file:
            counted = _Counted(file)
            write(counted)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        raise
    return {"size": counted.size, "crc32": counted.crc32}


def sync_folder(folder: Path) -> None:
    """Force a folder's entries (renames, links, removals) to the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_file(path: Path | str, payload: Any) -> dict[str, int]:
    """`torch.save` that leaves either the old file or the complete new one. Returns size and CRC-32."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    facts = write_durably(temporary, lambda file: torch.save(payload, file))
    os.replace(temporary, path)
    sync_folder(path.parent)
    return facts


def load_file(path: Path | str) -> Any:
    """Read a torch file to the CPU, tensors and plain types only: code in it is never run.

    Raises: CheckpointError in one line: missing, empty, truncated, not a torch file, or refused.
    """
    path = Path(path)
    if path.is_dir():
        raise CheckpointError(f"{path}: is a folder; name a .pth file in it")
    try:
        if path.stat().st_size == 0:
            raise CheckpointError(f"{path}: is empty, its writer was interrupted; name another checkpoint")
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except pickle.UnpicklingError as error:
        blamed = re.search(r"GLOBAL (\S+)|Unsupported (?:global|class|operand)[: ]+(?:GLOBAL )?(\S+)", str(error))
        what = f"it asks for {blamed.group(1) or blamed.group(2)}" if blamed else "it is no plain torch file"
        raise CheckpointError(f"{path}: refused: {what}; only tensors and plain values are read") from None
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, IndexError, AttributeError, TypeError) as error:
        if isinstance(error, CheckpointError):
            raise
        reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{path}: can't be read as a torch file: {reason}") from None


def weights_in(payload: Any, path: Path | str, param_key: str = "params") -> dict[str, torch.Tensor]:
    """The state dict of a network in a loaded file, without wrappers' prefixes.

    Understood: a bare dict, or one below `param_key` or any of WEIGHT_KEYS.
    Raises: CheckpointError for an optimizer, or when there are no weights.
    """
    if not isinstance(payload, Mapping):
        raise CheckpointError(f"{path}: holds a {type(payload).__name__}, not the weights of a network")
    if is_optimizer(payload):
        raise CheckpointError(f"{path}: is an optimizer's state, not a network; name the weights (_G.pth)")
    for key in (param_key, *WEIGHT_KEYS):
        if isinstance(payload.get(key), Mapping):
            payload = payload[key]
            break
    if not payload or not all(isinstance(v, torch.Tensor) for v in payload.values()):
        raise CheckpointError(f"{path}: holds no weights, neither bare nor below {', '.join(WEIGHT_KEYS)}")
    return {WRAPPERS.sub("", key): value for key, value in payload.items()}


def is_optimizer(payload: Any) -> bool:
    return isinstance(payload, Mapping) and {"state", "param_groups"} <= set(payload)


# ---------------------------------------------------------------- a set


@dataclass(frozen=True)
class CheckpointSet:
    """The files of one iteration, committed (with a record) or as KAIR leaves them (without)."""

    folder: Path
    iteration: int
    labels: tuple[str, ...]  # "G", "E", "optimizerG", "state", ...
    record: dict | None = field(default=None, compare=False)

    def path(self, label: str) -> Path:
        return self.folder / f"{self.iteration}_{label}.pth"

    @property
    def record_path(self) -> Path:
        return self.folder / f"{self.iteration}.json"

    @property
    def committed(self) -> bool:
        return self.record is not None

    def fault(self) -> str | None:
        """What is wrong with the set, or None: each file's size and checksum against the record, or its own CRCs."""
        for label in self.labels:
            path = self.path(label)
            try:
                reason = _fault(path, self.record["files"][path.name] if self.record else None)
            except OSError as error:
                reason = error.strerror or str(error)
            if reason:
                return f"{path.name}: {reason}"
        return None

    def load(self) -> dict[str, Any]:
        """Every file of a set that was found good, by label. Raises CheckpointError."""
        return {label: load_file(self.path(label)) for label in self.labels}


def _fault(path: Path, facts: Mapping | None) -> str | None:
    if not path.is_file():
        return "is missing"
    size = path.stat().st_size
    if facts is None:  # foreign: a zip's own records are all there is to check
        try:
            broken = zipfile.ZipFile(path).testzip() if zipfile.is_zipfile(path) else load_file(path) and None
        except (zipfile.BadZipFile, CheckpointError) as error:
            return f"damaged ({error})"
        return f"damaged (record {broken})" if broken else None
    if size != facts["size"]:
        return f"has {size} bytes, was committed with {facts['size']}"
    crc = 0
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            crc = zlib.crc32(chunk, crc)
    return None if crc == facts["crc32"] else "damaged (checksum differs)"


def _seal(record: Mapping) -> int:
    """Checksum of a record's own content, so that a flipped bit in it is noticed as well."""
    return zlib.crc32(json.dumps({k: v for k, v in record.items() if k != "seal"}, sort_keys=True).encode())


def _read_record(path: Path) -> dict:
    """A commit record that can be trusted. Raises CheckpointError."""
    try:
        record = json.loads(path.read_bytes())
        files, iteration = record["files"], record["iteration"]
        if record["seal"] != _seal(record):
            raise ValueError("checksum differs")
        for name in files:  # a record must not lead out of its folder or to another iteration's files
            match = MEMBER.fullmatch(name)
            if not match or int(match[1]) != iteration or (path.parent / name).is_symlink():
                raise ValueError(f"it names {name!r}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path.name}: the commit record is damaged ({error})") from None
    return record


def commit(folder: Path | str, iteration: int, parts: Mapping[str, Any], **info: Any) -> CheckpointSet:
    """Write the parts of an iteration and make them exist at once, by the rename of their record.

    Args: parts: label -> what `torch.save` writes. info: plain values kept in the record.
    Raises: OSError or RuntimeError when the disk refuses; then nothing of the set is left.
    """
    folder = Path(folder)
    # The state is renamed first: without a record it marks a set as begun by us, not left by KAIR.
    names = {label: f"{iteration}_{label}.pth" for label in sorted(parts, key=lambda label: label != "state")}
    record_path = folder / f"{iteration}.json"
    temporary = {name: folder / f"{name}.tmp" for name in (*names.values(), record_path.name)}
    try:
        files = {name: write_durably(temporary[name], lambda file, part=parts[label]: torch.save(part, file))
                 for label, name in names.items()}
        record = {"version": VERSION, "iteration": iteration, "timestamp": timestamp(), **info, "files": files}
        record["seal"] = _seal(record)
        text = json.dumps(record, indent=1).encode()
        write_durably(temporary[record_path.name], lambda file: file.write(text))
        record_path.unlink(missing_ok=True)  # of a set with the same number, which is replaced as a whole
        sync_folder(folder)
        for name in names.values():
            os.replace(temporary[name], folder / name)
        sync_folder(folder)
        os.replace(temporary[record_path.name], record_path)
        sync_folder(folder)
    except BaseException:
        for path in temporary.values():
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
        raise
    return CheckpointSet(folder, iteration, tuple(names), record)


def find_sets(folder: Path | str, report: Report | None = None) -> list[CheckpointSet]:
    """The sets in a folder, oldest first: committed ones and KAIR's, unverified. Damaged records are reported."""
    folder, labels, records = Path(folder), {}, {}
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for entry in os.scandir(folder):
            if (match := MEMBER.fullmatch(entry.name)) and entry.is_file():
                labels.setdefault(int(match[1]), set()).add(match[2])
            elif (match := RECORD.fullmatch(entry.name)) and entry.is_file():
                records[int(match[1])] = folder / entry.name
    sets = []
    for iteration in sorted(labels.keys() | records.keys()):
        if path := records.get(iteration):
            try:
                record = _read_record(path)
            except CheckpointError as error:
                if report:
                    report(str(error))
                continue
            found = tuple(MEMBER.fullmatch(name)[2] for name in record["files"])
            sets.append(CheckpointSet(folder, iteration, found, record))
        elif "state" not in labels[iteration] and "G" in labels[iteration]:
            sets.append(CheckpointSet(folder, iteration, tuple(sorted(labels[iteration]))))
    return sets


def has_traces(folder: Path | str) -> bool:
    """Whether anything in the folder looks like a checkpoint, good or not."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return any(RECORD.fullmatch(name) for name in os.listdir(folder)) or bool(find_sets(folder))
    return False


def find_newest(folder: Path | str, report: Report | None = None) -> CheckpointSet | None:
    """The newest set that verifies, or None; each newer one that does not is reported with its reason.

    KAIR's folders may hold different iterations of G, E and the optimizer: then the newest iteration that has
    all of them is used, and the difference is reported.
    """
    report = report or (lambda line: None)
    sets = find_sets(folder, report)
    foreign = [s for s in sets if not s.committed]
    everything = set().union(*(s.labels for s in foreign)) if foreign else set()
    for candidate in reversed(sets):
        if not candidate.committed and set(candidate.labels) != everything:
            complete = [s.iteration for s in foreign if set(s.labels) == everything]
            if complete:
                report(f"{candidate.iteration}: only {', '.join(candidate.labels)} of this iteration; "
                       f"{', '.join(sorted(everything))} are together at {max(complete)}")
                continue
        if fault := candidate.fault():
            report(f"checkpoint {candidate.iteration} is not used: {fault}")
            continue
        return candidate
    return None


def find_last_checkpoint(save_dir, net_type: str = "G", pretrained_path: str | None = None) -> tuple[int, str | None]:
    """KAIR's scan for the newest file of one kind.

    Args: save_dir: folder of `{iter}_{net_type}.pth`. pretrained_path: what to return when there is none.
    Returns: (iteration, path); (0, pretrained_path) if none is left. Differs from KAIR: names that do not
    match are ignored, uncommitted and damaged sets are skipped.
    """
    for candidate in reversed(find_sets(save_dir)):
        if net_type in candidate.labels and not candidate.fault():
            return candidate.iteration, str(candidate.path(net_type))
    return 0, pretrained_path


def locate(path: Path | str, report: Report | None = None) -> CheckpointSet:
    """The set that a user names by a folder, a commit record, or a member other than an optimizer.

    Raises: CheckpointError in one line, also for a damaged set: what was named is never replaced silently.
    """
    path = Path(path)
    if path.is_dir():
        for folder in (path, path / "models"):
            if found := find_newest(folder, report):
                return found
        raise CheckpointError(f"{path}: no usable checkpoint in this folder")
    if not path.exists():
        raise CheckpointError(f"{path}: no such checkpoint; give a file, a commit record or a folder")
    member, record = MEMBER.fullmatch(path.name), RECORD.fullmatch(path.name)
    if member and member[2].startswith("optimizer"):
        raise CheckpointError(f"{path}: is an optimizer's state; to resume, name its set: {member[1]}_G.pth beside it")
    if not (member or record):
        if path.suffix == ".json":
            raise CheckpointError(f"{path}: is no commit record; one is named like 500.json")
        payload = load_file(path)
        weights_in(payload, path)  # an optimizer or rubbish is named as such
        raise CheckpointError(f"{path}: holds weights only, no iteration; start from them with --init-from {path}")
    if member and path.stat().st_size == 0:
        raise CheckpointError(f"{path}: is empty, its writer was interrupted; name another checkpoint")
    iteration = int((member or record)[1])
    for candidate in find_sets(path.parent, report):
        if candidate.iteration == iteration and (record or member[2] in candidate.labels):
            if fault := candidate.fault():
                raise CheckpointError(f"{path.parent}: checkpoint {iteration} is damaged: {fault}")
            return candidate
    raise CheckpointError(f"{path}: belongs to no complete checkpoint (there is no good {iteration}.json beside it)")


# ---------------------------------------------------------------- keeping and putting away


def remove(old: CheckpointSet) -> None:
    """Delete a set: its record first, so that it is gone at once; its state last, so that the rest stays known."""
    old.record_path.unlink(missing_ok=True)
    sync_folder(old.folder)
    for label in sorted(old.labels, key=lambda label: label == "state"):
        old.path(label).unlink(missing_ok=True)


def clean(folder: Path | str) -> None:
    """Remove what an interrupted save left: temporary files, and members that no record speaks for."""
    folder = Path(folder)
    for path in folder.glob("*.tmp"):
        if MEMBER.fullmatch(path.stem) or RECORD.fullmatch(path.stem):
            path.unlink(missing_ok=True)
    for path in folder.glob("*_state.pth"):
        match = MEMBER.fullmatch(path.name)
        if match and not (folder / f"{match[1]}.json").exists():
            labels = [m[2] for p in folder.glob(f"{match[1]}_*.pth") if (m := MEMBER.fullmatch(p.name))]
            remove(CheckpointSet(folder, int(match[1]), tuple(labels)))


def prune(folder: Path | str, keep_last_n: int | None, best: int | None = None) -> None:
    """After a commit: drop interrupted saves that it supersedes, and all but the newest n. Never best or newest."""
    sets = [s for s in find_sets(folder) if s.committed]
    newest = sets[-1:]
    regular = [s for s in sets if s.record.get("reason") != "interrupted"]
    kept = regular[-keep_last_n:] if keep_last_n else regular
    for old in sets:
        if old not in kept and old not in newest and old.iteration != best:
            remove(old)


def put_away(folder: Path | str, after: int = -1) -> Path | None:
    """Move what is newer than an iteration into a dated folder beside it. Returns that folder, if any."""
    folder = Path(folder)
    newer = [p for p in sorted(folder.iterdir()) if (m := MEMBER.fullmatch(p.name) or RECORD.fullmatch(p.name))
             and int(m[1]) > after] if folder.is_dir() else []
    if not newer:
        return None
    archive = unused_name(folder.parent / f"{folder.name}_{time.strftime('%Y%m%d_%H%M%S')}")
    archive.mkdir()
    # Records go last: a set that is half moved stays whole in neither place, but none is lost; a rerun moves the rest.
    for path in sorted(newer, key=lambda p: p.suffix == ".json"):
        os.replace(path, archive / path.name)
    sync_folder(archive)
    sync_folder(folder)
    return archive


def unused_name(path: Path) -> Path:
    """`path`, or `path_2`, `path_3`, ... whichever does not exist yet."""
    candidate, n = path, 1
    while candidate.exists():
        n += 1
        candidate = path.with_name(f"{path.name}_{n}")
    return candidate


# ---------------------------------------------------------------- what else makes the next step


def rng_state() -> dict[str, Any]:
    """State of every global generator, as tensors and plain types."""
    version, internal, gauss = random.getstate()
    name, keys, *rest = np.random.get_state()
    state = {"python": [version, list(internal), gauss],
             "numpy": [name, torch.from_numpy(keys.astype(np.int64)), *rest],
             "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Put every global generator back to what `rng_state` returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


@contextlib.contextmanager
def rng_untouched() -> Iterator[None]:
    """Whatever is drawn inside, training goes on as if it had not been."""
    state = rng_state()
    try:
        yield
    finally:
        set_rng_state(state)


def environment() -> dict[str, Any]:
    """What exactness depends on besides the options and the state."""
    return {"torch": str(torch.__version__), "numpy": np.__version__, "num_threads": torch.get_num_threads(),
            "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None}


def timestamp() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
