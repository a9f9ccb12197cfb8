"""Train, stop by Ctrl+C, resume, verify, inspect, report in a process from which the names that Windows lacks are gone.

    python -m tests.no_posix FOLDER

Torch and the standard library are imported first, for they use some of the names here; Perdure comes after.
"""

import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import types
from multiprocessing import popen_fork
from pathlib import Path

import torch  # noqa: F401
import torch._dynamo  # noqa: F401
import torch.utils.data  # noqa: F401
import torchvision.io  # noqa: F401

GONE = {os: ("register_at_fork", "fdatasync", "pread", "preadv", "O_DIRECTORY", "sysconf", "fork", "forkpty", "killpg",
             "setsid", "mkfifo", "nice", "sched_getaffinity", "wait3", "wait4", "getuid"),
        signal: ("SIGKILL", "SIGUSR1", "SIGUSR2", "SIGHUP", "SIGPIPE", "SIGBUS", "SIGALRM", "SIGSTOP",
                 "SIGCONT", "setitimer", "alarm", "pthread_kill", "sigwait")}
OTHER = """import fcntl, sys, time
file = open(sys.argv[1], "a+")
fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 1 << 30)
print("locked", flush=True)
time.sleep(60)"""


def lock_a_byte(descriptor, mode, size):
    """Be msvcrt.locking, by what this system has."""
    import fcntl_of_this_system as fcntl

    assert size == 1 and os.lseek(descriptor, 0, os.SEEK_CUR) > 1000, "the text of the lock file would be locked"
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 0, os.SEEK_CUR)
    except BlockingIOError:
        raise PermissionError(errno.EACCES, "Permission denied") from None


def take_away():
    """Remove the names that are not on Windows."""
    import fcntl

    sys.modules["fcntl_of_this_system"] = fcntl
    for module, names in GONE.items():
        for name in names:
            if hasattr(module, name):
                delattr(module, name)
    sys.modules["fcntl"] = sys.modules["resource"] = None
    sys.modules["msvcrt"] = types.SimpleNamespace(locking=lock_a_byte, LK_NBLCK=2)
    popen_fork.Popen.kill = lambda self: os.kill(self.pid, 9)  # the standard library's own use of SIGKILL here
    multiprocessing.set_start_method("spawn", force=True)


if __name__ in ("__main__", "__mp_main__"):  # the latter is a data worker
    take_away()
if __name__ == "__main__":
    from commands import checkpoints
    from report import main as report
    from storage.files import FolderLock, is_locked
    from storage.sealed import CheckpointError
    from tests import tiny
    from tests.runs import assert_equal_runs, run

    for table, name, row in tiny.ROWS:
        table[name] = row
    folder = Path(sys.argv[1])
    one, two = (tiny.write(folder, name, workers=0) for name in ("one", "two"))
    assert run("-opt", one) == 0
    assert run("-opt", two, hooks=[tiny.stop_after(4, signal.SIGINT)]) == 130
    tiny.write(folder, "two", workers=1)  # spawned
    assert run("-opt", two) == 0
    assert_equal_runs(folder / "one", folder / "two", 9)
    assert run("-opt", two, "--set", "train.total_iter=12", "--set", "datasets.train.dataloader_num_workers=0",
               "--dry-run") == 0
    for words in (["verify", folder / "two"], ["inspect", folder / "two"]):
        assert checkpoints.main([str(word) for word in words]) == 0
    assert report([str(folder / "one"), str(folder / "two"), "--out", str(folder / "page.html")]) == 0
    assert not is_locked(folder / "one")
    other = subprocess.Popen([sys.executable, "-c", OTHER, str(folder / "one/.lock")], stdout=subprocess.PIPE)
    other.stdout.readline()
    assert is_locked(folder / "one")
    try:
        FolderLock(folder / "one")
        raise AssertionError("two processes have the lock of one folder")
    except CheckpointError as error:
        assert "is writing here" in str(error)
    finally:
        other.terminate()
    print("all of it works")
