"""One file that is whole or absent: write it to the disk, link it, lock its folder.

Atomic on POSIX (DESIGN 6): temporary name in the same folder, write, fsync, rename, fsync of the folder. Where a disk
lacks one of these calls, the file is written without it, and `notices` says so.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import socket
import struct
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from storage.sealed import CHUNK, CheckpointError, add_seal

LACKS = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)  # what a call that a disk does not have answers
notices: list[str] = []  # what a disk does not have, once each; a run says them


class _Refusable:
    """A file to write to that remembers why the disk refused: torch.save hides it behind an error of its own."""

    def __init__(self, file):
        self.file, self.refusal = file, None

    def write(self, data) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.refusal = error
            raise

    def flush(self) -> None:
        self.file.flush()


@contextlib.contextmanager
def _written_back(descriptor: int) -> Iterator[None]:
    """The disk takes a file while it is still being written, so that little is left for the fsync at the end."""
    done, errors = threading.Event(), []

    def write_back() -> None:
        try:
            while not done.wait(0.02):
                os.fdatasync(descriptor)
        except OSError as error:  # told once and only here: the data may be gone, so the file is
            if error.errno not in LACKS:  # else there is the fsync at the end
                errors.append(error)

    thread = threading.Thread(target=write_back, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    if errors:
        raise errors[0]


def write_durably(path: Path, payload: Any, about: Mapping[str, Any] | None = None) -> dict[str, int]:
    """Create a file and force it to the disk; when that fails, there is none.

    Args: payload: bytes, or what `torch.save` writes. about: of a torch file, plain values for its seal.
    Returns: its size in bytes and, of a torch file, the seal's CRC-32. Raises: OSError as the disk says.
    """
    facts = {}
    with removed_on_failure(path), open(path, "w+b", buffering=CHUNK) as file:
        if isinstance(payload, bytes):
            _Refusable(file).write(payload)
        else:
            with _written_back(file.fileno()):
                writer = _Refusable(file)
                try:
                    torch.save(payload, writer)
                except RuntimeError:
                    raise writer.refusal or OSError("torch.save failed") from None
                facts = add_seal(writer, about or {})
        file.flush()
        with _lacking("files"):
            os.fsync(file.fileno())
        return {"size": file.tell(), **facts}


@contextlib.contextmanager
def removed_on_failure(path: Path) -> Iterator[None]:
    """What can't be finished is not left behind."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """Force a folder's entries (renames, links, removals) to the disk, where it can (not all CIFS, FUSE, DrvFs can)."""
    with _lacking("folders", errno.EBADF, errno.EACCES, errno.EPERM, errno.EISDIR):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def _lacking(what: str, *further: int) -> Iterator[None]:
    """Do without fsync where the disk has none, and note it; other errors are errors."""
    try:
        yield
    except OSError as error:
        if error.errno not in (*LACKS, *further):
            raise
        notice = (f"this disk can't be told to write {what} down at once (fsync: {error.strerror}): a kill loses "
                  "nothing, a power cut may lose the newest checkpoint")
        if notice not in notices:
            notices.append(notice)


def save_file(path: Path | str, payload: Any, about: Mapping[str, Any] | None = None) -> dict[str, int]:
    """Leave either the old file or the complete new one (see `write_durably`)."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    with removed_on_failure(temporary):
        facts = write_durably(temporary, payload, about)
        os.replace(temporary, path)
    sync_folder(path.parent)
    return facts


def link(source: Path, target: Path) -> None:
    """Make `target` another name of a file, replacing what it named before at once; a copy where links fail."""
    if target.exists() and target.samefile(source):
        return
    temporary = target.with_name(target.name + ".tmp")
    temporary.unlink(missing_ok=True)
    with removed_on_failure(temporary):
        try:
            os.link(source, temporary)
        except OSError:
            write_durably(temporary, source.read_bytes())
        os.replace(temporary, target)
    sync_folder(target.parent)


def check_space(folder: Path, needed: int) -> None:
    """Raise OSError (ENOSPC) when the folder's disk has less room than `needed` bytes."""
    usage = shutil.disk_usage(folder)
    free = usage.free
    if free < needed and usage.total:  # some network disks do not say
        raise OSError(errno.ENOSPC, f"the disk of {folder} has {in_units(free)} free, {in_units(needed)} are needed")


def in_units(size: float) -> str:
    """Bytes for people: '512 B', '2.4 MB', '1.2 GB'."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    raise AssertionError


class FolderLock:
    """One process at a time writes in a folder. The system frees the lock when its owner ends, however it ends.

    A POSIX record lock: unlike flock's it is not inherited by data workers, which may outlive a killed parent.
    Raises: CheckpointError naming the owner, or when the folder can't be written.
    """

    def __init__(self, folder: Path):
        path = folder / ".lock"
        try:
            self.file = open(path, "a+", encoding="utf-8")
        except OSError as error:
            raise CheckpointError(f"{folder}: can't be written: {error.strerror}") from None
        try:
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.file.seek(0)
            owner = self.file.read().strip() or "another process"
            self.file.close()
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise CheckpointError(f"{folder}: {owner} is writing here; wait for it or stop it, or give this run "
                                      "another task name") from None
            return  # a file system without locks: nothing to be had
        self.file.truncate(0)
        self.file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


def is_locked(folder: Path) -> bool:
    """Whether another process has the folder's lock, or may have: a disk that can't tell counts as yes.

    Not for a process that has it itself: asking would free it.
    """
    query = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)  # a struct flock
    try:
        with open(folder / ".lock", "rb") as file:
            return struct.unpack_from("h", fcntl.fcntl(file, fcntl.F_GETLK, query))[0] != fcntl.F_UNLCK
    except FileNotFoundError:
        return False
    except OSError:
        return True
