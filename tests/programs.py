"""`python main.py ...` as a process that is forked from one that has imported everything: it starts in no time.

A process of its own takes four seconds to import torch. Where the interpreter's start is not the point, use these.
"""

import itertools
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from runtime.hooks import Hooks
from tests import tiny
from tests.conftest import ROOT

CONTEXT = multiprocessing.get_context("forkserver")
if os.environ.get("PERDURE_TEST_CUDA"):  # a card does not work in a forked process
    CONTEXT = multiprocessing.get_context("spawn")
else:
    CONTEXT.set_forkserver_preload(["tests.world", "tests.runs"])
COUNTER = itertools.count()


def fork(target: Callable, *args) -> multiprocessing.Process:
    """Start a function in a forked process. The server that forks starts in the checkout, where its imports are."""
    process, folder = CONTEXT.Process(target=target, args=args), os.getcwd()
    os.chdir(ROOT)
    try:
        process.start()
    finally:
        os.chdir(folder)
    return process


def print_to(out: str, err: str | None = None) -> None:
    """Let this process print into files; both streams into one if there is no other."""
    with open(out, "w") as file, open(err or out, "a") as errors:
        os.dup2(file.fileno(), 1)
        os.dup2(errors.fileno() if err else 1, 2)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))


def run_main_here(arguments: list[str], out: str, err: str | None = None, hooks: Iterable[Hooks] = ()) -> None:
    """Run main.py in this forked process, with the rows of tests/tiny.py in its tables, and exit."""
    print_to(out, err)
    multiprocessing.set_start_method("fork", force=True)  # of data workers, as everywhere else
    torch.set_num_threads(1)
    for table, name, row in tiny.ROWS:
        table[name] = row
    tiny.door.program(arguments, hooks=hooks)


def main_of(arguments: list[str], cwd: str, output: str, before: Callable | None) -> None:
    """Be the process of a `Program`."""
    os.chdir(cwd)
    run_main_here(arguments, f"{output}.out", f"{output}.err", (before and before()) or ())


class Program:
    """A running main.py with the interface of subprocess.Popen as far as tests need it.

    Args: folder: gets files with what the process prints. before: a function of a module, called in the process
        first; it may return hooks.
    """

    def __init__(self, folder: Path, *arguments, cwd: Path = ROOT, before: Callable | None = None):
        self.output = folder / f"program{next(COUNTER)}"
        self.process = fork(main_of, [str(argument) for argument in arguments], str(cwd), str(self.output), before)
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

    def kill(self) -> None:
        self.process.kill()

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
