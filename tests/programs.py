"""`python main.py ...` as a process that is forked from one that has imported everything: it starts in no time.

A process of its own takes four seconds to import torch. Where the interpreter's start is not the point, use these.
"""

import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tests import tiny
from tests.conftest import ROOT
from tests.world import CONTEXT

COUNTER = itertools.count()


def main_of(arguments: list[str], cwd: str, output: str, before: Callable | None) -> None:
    """Run main.py in this process, with the rows of tests/tiny.py in its tables."""
    os.chdir(cwd)
    for number, stream in ((1, "out"), (2, "err")):
        with open(f"{output}.{stream}", "w") as file:
            os.dup2(file.fileno(), number)
    sys.stdout = open(1, "w", buffering=1, closefd=False)
    sys.stderr = open(2, "w", buffering=1, closefd=False)
    multiprocessing.set_start_method("fork", force=True)  # of data workers, as everywhere else
    for table, name, row in tiny.ROWS:
        table[name] = row
    tiny.door.program(arguments, hooks=(before and before()) or ())


class Program:
    """A running main.py with the interface of subprocess.Popen as far as tests need it.

    Args: folder: gets files with what the process prints. before: a function of a module, called in the process
        first; it may return hooks.
    """

    def __init__(self, folder: Path, *arguments, cwd: Path = ROOT, before: Callable | None = None):
        self.output = folder / f"program{next(COUNTER)}"
        words = [str(argument) for argument in arguments]
        self.process = CONTEXT.Process(target=main_of, args=(words, str(cwd), str(self.output), before))
        self.process.start()
        self.pid = self.process.pid

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    @property
    def stdout(self) -> str:
        return self.output.with_suffix(".out").read_text()

    @property
    def stderr(self) -> str:
        return self.output.with_suffix(".err").read_text()

    def send_signal(self, number: int) -> None:
        if self.process.is_alive():
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float = 60) -> int:
        """Return the exit code. Raises TimeoutExpired after `timeout` seconds; the process is left running."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired("main.py", timeout)
        return self.process.exitcode


def run_program(folder: Path, *arguments, timeout: float = 60, **settings) -> Program:
    """Run main.py to its end. Returns the ended process; one that takes longer than `timeout` seconds is killed."""
    program = Program(folder, *arguments, **settings)
    try:
        program.wait(timeout)
    finally:
        program.kill()
    return program
