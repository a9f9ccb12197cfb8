"""Write a file that is either complete or absent, link it, and lock its folder.

Atomic on POSIX (DESIGN 6): temporary name in the same folder, write, fsync, rename, fsync of the folder. Where a file
system lacks one of these calls, the file is written without it, and `notices` gets a line about it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from storage import system
from storage.sealed import CHUNK, CheckpointError, add_seal

UNSUPPORTED = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)  # errors of a call that is not implemented
written = 0  # bytes, of all files: it tells a long save from one that hangs
notices: list[str] = []  # what the file system lacks, once each; the run prints them


class _Writer:
    """Writes to a file and keeps the original OSError, which torch.save replaces by its own error."""

    def __init__(self, file):
        self.file, self.error = file, None

    def write(self, data) -> int:
        global written
        written += len(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def write_durably(path: Path, payload: Any, about: Mapping[str, Any] | None = None) -> dict[str, int]:
    """Create a file and force it to the disk; remove it when that fails.

    Args: payload: bytes, or an object for `torch.save`. about: plain values for the seal of a torch file.
    Returns: the size in bytes and, of a torch file, the seal's CRC-32. Raises: OSError.
    """
    facts = {}
    with removed_on_failure(path), open(path, "w+b", buffering=CHUNK) as file:
        writer = _Writer(file)
        if isinstance(payload, bytes):
            writer.write(payload)
        else:
            try:
                torch.save(payload, writer)
            except RuntimeError:
                raise writer.error or OSError("torch.save failed") from None
            facts = add_seal(writer, about or {})
        file.flush()
        with _unsupported_noted("files"):
            system.sync_file(file.fileno())
        return {"size": file.tell(), **facts}


def copy_durably(source: Path, target: Path) -> None:
    """Copy a file and force the copy to the disk; remove it when that fails. Raises: OSError."""
    with removed_on_failure(target), open(source, "rb") as original, open(target, "wb") as file:
        shutil.copyfileobj(original, _Writer(file), CHUNK)
        file.flush()
        with _unsupported_noted("files"):
            system.sync_file(file.fileno())


@contextlib.contextmanager
def removed_on_failure(path: Path) -> Iterator[None]:
    """Remove a file if the block that writes it fails."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """Force a folder's entries (renames, links, removals) to the disk; some CIFS, FUSE and DrvFs can't do that."""
    with _unsupported_noted("folders", errno.EBADF, errno.EACCES, errno.EPERM, errno.EISDIR):
        system.sync_folder(folder)


@contextlib.contextmanager
def _unsupported_noted(kind: str, *further: int) -> Iterator[None]:
    """Ignore and note that fsync is not supported; other errors are raised."""
    try:
        yield
    except OSError as error:
        if error.errno not in (*UNSUPPORTED, *further):
            raise
        notice = (f"this file system can't force {kind} to the disk (fsync: {error.strerror}): a kill loses nothing, "
                  "but a power cut may lose the newest checkpoint")
        if notice not in notices:
            notices.append(notice)


def save_file(path: Path | str, payload: Any, about: Mapping[str, Any] | None = None) -> dict[str, int]:
    """Replace a file by a complete new one, or leave it as it is. Takes and returns the same as `write_durably`."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    with removed_on_failure(temporary):
        facts = write_durably(temporary, payload, about)
        os.replace(temporary, path)
    sync_folder(path.parent)
    return facts


def link(source: Path, target: Path) -> None:
    """Make `target` a hard link to a file, in place of the previous one; a copy where links are not supported."""
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
    """Raise OSError (ENOSPC) when the folder's disk has less than `needed` bytes free."""
    usage = shutil.disk_usage(folder)
    if usage.free < needed and usage.total:  # 0: a network disk that does not report its size
        raise OSError(errno.ENOSPC, f"the disk of {folder} has {format_bytes(usage.free)} free, {format_bytes(needed)} "
                                    "are needed")


def format_bytes(size: float) -> str:
    """Return bytes in words: '512 B', '2.4 MB', '1.2 GB'."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


class FolderLock:
    """Locks a folder for one writing process. The system frees the lock when its owner ends, however it ends.

    Raises: CheckpointError naming the owner, or when the folder can't be written.
    """

    def __init__(self, folder: Path):
        path = folder / ".lock"
        try:
            self.file = open(path, "a+", encoding="utf-8")
        except OSError as error:
            raise CheckpointError(f"{folder}: can't be written: {error.strerror}") from None
        try:
            system.lock(self.file)
        except OSError as error:
            self.file.seek(0)
            owner = self.file.read().strip() or "another process"
            self.file.close()
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise CheckpointError(f"{folder}: {owner} is writing here; wait for it or stop it, or give this run "
                                      "another task or folder") from None
            return  # a file system without locks
        self.file.truncate(0)
        self.file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self.file.flush()

    def close(self) -> None:
        """Free the lock."""
        self.file.close()


def is_locked(folder: Path) -> bool:
    """Return whether another process has the folder's lock; True also where the file system can't tell.

    Not for the process that has the lock: closing the file here would free it.
    """
    try:
        path = folder / ".lock"
        with open(path, "r+b" if os.access(path, os.W_OK) else "rb") as file:
            return system.is_locked(file)
    except FileNotFoundError:
        return False
    except OSError:
        return True
