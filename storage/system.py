"""What operating systems differ in: signals, file locks, forced writes, memory. Only the standard library is imported.

Each function uses the POSIX call where it exists and a portable form elsewhere (Windows), and looks for it when it is
called.
"""

from __future__ import annotations

import contextlib
import os
import signal
import struct
import sys
from collections.abc import Callable
from typing import Any

OWNER = 1 << 30  # byte that msvcrt locks: far behind the text, which others may read
KILLED = -9 if hasattr(signal, "SIGKILL") else 137  # exit code, for its parent, of a process that `die` ended


def named_signals(*names: str) -> tuple[signal.Signals, ...]:
    """Return the signals of these names that the system has."""
    return tuple(getattr(signal, name) for name in names if hasattr(signal, name))


def send_to_self(number: int) -> None:
    """Send a signal to this process, whose handler then runs."""
    if hasattr(signal, "SIGKILL"):
        os.kill(os.getpid(), number)
    else:
        signal.raise_signal(number)  # os.kill would end the process


def end_by_signal(number: int) -> None:
    """End this process by a signal, so that its parent sees it; without POSIX by the exit code 128 + number."""
    if hasattr(signal, "SIGKILL"):
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    os._exit(128 + number)


def die() -> None:
    """End this process at once, as `kill -9` does: no handler runs and no buffer is written."""
    if hasattr(signal, "SIGKILL"):
        os.kill(os.getpid(), signal.SIGKILL)
    os._exit(KILLED)


def end_quietly_in_pipes() -> None:
    """End this program without a message when the program that reads its output has ended, as `head` does."""
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)


def at_fork(**callbacks: Callable[[], None]) -> None:
    """Register callbacks (`before`, `after_in_child`) for forks, where processes fork."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(**callbacks)


# ---------------------------------------------------------------- files


def read_at(descriptor: int, size: int, offset: int) -> bytes:
    """Read at most `size` bytes from an offset. The position of the file may change."""
    if hasattr(os, "pread"):
        return os.pread(descriptor, size, offset)
    os.lseek(descriptor, offset, os.SEEK_SET)
    return os.read(descriptor, size)


def sync_file(descriptor: int) -> None:
    """Force a file to the disk. Raises: OSError."""
    if sys.platform == "darwin":
        import fcntl

        with contextlib.suppress(OSError):  # not on network disks
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)  # fsync there leaves bytes in the drive's cache
            return
    os.fsync(descriptor)


def sync_folder(folder: Any) -> None:
    """Force a folder's entries to the disk; nothing where folders can't be opened. Raises: OSError."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock(file: Any) -> None:
    """Lock an open file for this process until it is closed.

    A POSIX record lock: unlike flock's it is not inherited by data workers, which may outlive a killed parent.

    Raises: OSError: another process has the lock (EACCES or EAGAIN), or the file system has none.
    """
    try:
        import fcntl
    except ImportError:
        import msvcrt

        os.lseek(file.fileno(), OWNER, os.SEEK_SET)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def is_locked(file: Any) -> bool:
    """Tell whether another process has the lock of an open, writable file.

    Linux is asked; elsewhere the lock is taken for a moment. Raises: OSError: the file system can't tell.
    """
    if sys.platform == "linux" and struct.calcsize("P") == 8:
        with contextlib.suppress(ImportError):
            import fcntl

            query = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)  # a struct flock
            return struct.unpack_from("h", fcntl.fcntl(file, fcntl.F_GETLK, query))[0] != fcntl.F_UNLCK
    try:
        lock(file)
    except BlockingIOError:
        return True
    except PermissionError:
        return True
    return False


# ---------------------------------------------------------------- memory


def total_memory() -> int | None:
    """Return the bytes of this machine's memory, or None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError):
        return None


def peak_memory() -> int | None:
    """Return the largest number of bytes that this process has had in memory, or None where the system does not say."""
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
