"""What operating systems differ in: the core of the program without POSIX, and what macOS does its own way."""

import fcntl
import os
import resource
import subprocess
import sys

from main import resume_command
from storage import system
from tests.conftest import ROOT


def test_training_stopping_resuming_and_reporting_need_no_posix(tmp_path):
    done = subprocess.run([sys.executable, "-m", "tests.no_posix", str(tmp_path)], cwd=ROOT, capture_output=True,
                          text=True, timeout=400)
    assert done.returncode == 0 and "all of it works" in done.stdout, done.stdout + done.stderr
    assert "stopped  by SIGINT after iteration 4" in done.stdout and "not measured on this system" in done.stdout


def test_macos_writes_through_the_drive_and_counts_memory_in_bytes(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", lambda descriptor, command: seen.append(command))
    monkeypatch.setattr(os, "fsync", lambda descriptor: seen.append("fsync"))
    with open(tmp_path / "file", "w") as file:
        system.sync_file(file.fileno())
        assert seen == [51]

        def not_there(descriptor, command):
            raise OSError(45, "Operation not supported")

        monkeypatch.setattr(fcntl, "fcntl", not_there)  # a network disk
        system.sync_file(file.fileno())
        assert seen == [51, "fsync"]
        assert not system.is_locked(file)  # without Linux's question: the lock is free
    assert system.peak_memory() == resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def test_the_end_of_a_process_is_seen_by_its_parent():
    for call, code in (("die()", system.KILLED), ("end_by_signal(15)", -15)):
        assert subprocess.run([sys.executable, "-c", f"from storage import system; system.{call}"],
                              cwd=ROOT).returncode == code


def test_the_printed_command_is_the_one_that_was_typed(monkeypatch):
    """Interpreter, its flags and the path of main.py: no environment is active, another folder is current."""
    monkeypatch.setattr(sys, "orig_argv", [".venv/bin/python", "-u", "../perdure/main.py", "-opt", "a b.json"])
    monkeypatch.setattr(sys, "argv", ["../perdure/main.py", "-opt", "a b.json"])
    assert resume_command(sys.argv[1:], False) == ".venv/bin/python -u ../perdure/main.py -opt 'a b.json'"
    monkeypatch.setattr(sys, "argv", ["-m", "pytest"])
    assert resume_command(["-opt", "a.json"], False) == "python main.py -opt a.json"
