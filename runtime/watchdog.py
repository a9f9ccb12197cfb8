"""Watch over a run's time: name what takes long at the start, stop in time, end a process that hangs.

`watch.begin` divides the main thread's time into units, and a thread looks at them twice a second. Both know only the
standard library, because runtime/signals.py starts them before the imports of main.py.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from storage import system

STOP = system.named_signals("SIGUSR1", "SIGTERM")[0]  # what train.stop_after sends
LOOK_EVERY = 0.5  # seconds between two looks
SAY_AFTER = 2.0  # seconds after which a phase of the start is named
PATIENCE = 1800.0  # default of train.watchdog with several processes: compiling, or a huge sample, takes less
HUNG = 75  # exit code of a process that hangs: "try again" in sysexits.h
DUMP_SECONDS = 10.0  # for writing the stacks, on a disk that may be what hangs
REMEDIES = {"a step": "lower datasets.train.dataloader_batch_size",
            "a validation sample": "validate smaller pieces (val.tile, val.size_patch_testing, val.num_frame_testing)",
            "the save in progress": "set checkpoint.async to false", "a save": "put path.root on a faster disk"}
MEASURED = {"step": "a step", "sample": "a validation sample", "rest": "work between them", "save": "a save"}


def print_now(text: str, always: bool = False) -> None:
    """Write a line without the buffers that the main thread may be using.

    Args: always: also in a process that is not the main one.
    """
    if always or int(os.environ.get("RANK", 0)) == 0:
        with contextlib.suppress(OSError):
            os.write(2, f"{chr(13) + chr(27) + '[K' if os.isatty(2) else ''}{text}\n".encode())


def end_of(stop_after: str | float, began: float) -> float:
    """Return the monotonic time at which `train.stop_after` is over.

    Args: began: monotonic time of the start. Raises: ValueError: one line, with what would be valid.
    """
    if stop_after == "slurm":
        end = os.environ.get("SLURM_JOB_END_TIME", "")
        if not end.isdigit():
            raise ValueError('train.stop_after: "slurm" needs the variable SLURM_JOB_END_TIME, which Slurm sets since '
                             '22.05; elsewhere give a time as "11h30m"')
        return time.monotonic() + int(end) - time.time()
    found = re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+(?:\.\d+)?)s?)?", str(stop_after))
    numbers = [float(number or 0) for number in found.groups()] if found else [0.0]
    if not any(numbers):
        raise ValueError(f'train.stop_after: {stop_after!r} is not a time as "11h30m", "90m" or 5400 (seconds), or '
                         '"slurm"')
    return began + sum(number * unit for number, unit in zip(numbers, (86400, 3600, 60, 1)))


class Watch:
    """The units of this process's time, and the thread that looks at them."""

    def __init__(self):
        self.looks: list[Callable[[float], None]] = []  # of other modules: called with the seconds since the last look
        self.written: Callable[[], int] = lambda: 0  # bytes written to files: a long save is not a hang
        self.tell: Callable[[str, int], bool] = lambda cause, code: True  # tells all ranks; whether this is the first
        self.waits: Callable[[], bool] = lambda: False  # whether this rank only waits for one that may still finish
        self.reset()

    def reset(self) -> None:
        self.began = time.monotonic()
        self.now = ("wait", "the start", self.began)  # unit in progress: kind, place, monotonic time of its begin
        self.finished = 0  # units
        self.still, self.progress = 0.0, -1  # seconds since what was finished or written last changed
        self.patience = PATIENCE if int(os.environ.get("WORLD_SIZE", 1)) > 1 else 0.0
        self.log: Any = None
        self.folder: Path | None = None
        self.said: Any = None  # the phase of the start that was named
        self.end: float | None = None
        self.grace: float | None = None
        self.background = self.warned = False
        self.longest: dict[str, float] = {}  # seconds by kind of unit
        self.counts: Counter = Counter()  # of measured units

    def start(self) -> None:
        """Begin to look. The clock of `train.stop_after` starts here."""
        self.reset()
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._look, daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.ended.set()
        self.thread.join()

    def configure(self, opt: Mapping[str, Any], log: Any) -> None:
        """Apply the options of a run. Raises: OptionError for an invalid `train.stop_after`."""
        from options import OptionError  # imports more than this module may

        train = opt["train"]
        try:
            self.end = end_of(train["stop_after"], self.began) if train["stop_after"] is not None else None
        except ValueError as error:
            raise OptionError(f"{opt['opt_path']}: {error}") from None
        self.grace, self.log = train["grace"], log
        self.patience = self.patience if train["watchdog"] is None else train["watchdog"]
        self.longest, self.counts, self.warned = {}, Counter(), False

    # ------------------------------------------------ what the main thread does

    def begin(self, kind: str, place: str) -> None:
        """End the unit in progress and begin another one.

        Args: kind: "start", "wait" for data, or a key of MEASURED. place: what is done, for messages.
        """
        before, _, since = self.now
        if before in MEASURED:
            self.measure(before, time.monotonic() - since)
        self.now = (kind, place, time.monotonic())
        self.finished += 1

    def measure(self, kind: str, seconds: float) -> None:
        """Add a unit to `longest`: what this process measures replaces what a checkpoint said."""
        self.counts[kind] += 1
        first = self.counts[kind] <= (2 if kind == "step" else 1)  # the first step compiles and allocates
        self.longest[kind] = seconds if first else max(seconds, self.longest[kind])

    def inherit(self, longest: Any) -> None:
        """Take over what an earlier launch measured, until this one has its own."""
        known = longest if isinstance(longest, Mapping) else {}
        self.longest |= {kind: float(known[kind]) for kind in MEASURED if isinstance(known.get(kind), (int, float))}

    def terms(self) -> dict[str, float]:
        """Return what a stop may wait for, in seconds: the longest unit of work, a save in the background, a save."""
        kind, _, since = self.now
        work = {name: seconds for name, seconds in self.longest.items() if name != "save"}
        if kind in MEASURED and kind != "save" and (kind != "step" or self.counts[kind]):
            work[kind] = max(work.get(kind, 0.0), time.monotonic() - since)
        longest, save = max(work, key=work.get, default="step"), self.longest.get("save", 0.0)
        waited = {"the save in progress": save} if self.background else {}
        return {MEASURED[longest]: work.get(longest, 0.0), **waited, MEASURED["save"]: save}

    def describe_stop(self) -> str:
        """Return how long a stop takes at most, from the signal to the checkpoint, and of what that consists."""
        terms = self.terms()
        return f"{sum(terms.values()):.1f} s ({', '.join(f'{name} {seconds:.1f}' for name, seconds in terms.items())})"

    def find_grace_problem(self, grace: float | None) -> str | None:
        """Return what to do where a stop may take longer than `train.grace`, or None."""
        terms = self.terms()
        if not grace or sum(terms.values()) <= grace:
            return None
        remedy = REMEDIES.get(max(terms, key=terms.get), REMEDIES["a save"])
        return f"a stop may take {self.describe_stop()} until its checkpoint is written, more than train.grace " \
               f"{grace:g}: {remedy}, or let the scheduler grant more"

    def compare_grace(self, passed: float = 0.0) -> None:
        """Warn once if a stop may take longer than `train.grace`; the first step, which compiles, does not count."""
        if not self.warned and self.counts["step"] != 1 and (problem := self.find_grace_problem(self.grace)):
            self.warned = True
            (self.say if passed else self.log.line)(f"warning  {problem}")

    # ------------------------------------------------ what the thread looks at

    def _look(self) -> None:
        last = time.monotonic()
        while not self.ended.wait(LOOK_EVERY):
            now = time.monotonic()
            passed, last = min(now - last, 2 * LOOK_EVERY), now  # less the time in which this process was suspended
            for look in (self._name_phase, self._stop_in_time, self.compare_grace, self._find_hang, *self.looks):
                look(passed)

    def say(self, text: str) -> None:
        """Print a line from the watching thread, which must not wait for a disk that hangs."""
        threading.Thread(target=self.log.line if self.log else print_now, args=(text,), daemon=True).start()

    def _name_phase(self, passed: float) -> None:
        kind, place, since = unit = self.now
        if kind == "start" and unit is not self.said and time.monotonic() - since > SAY_AFTER:
            self.said = unit
            self.say(f"start    {place} ...")

    def _stop_in_time(self, passed: float) -> None:
        """Ask the run to stop by a signal while there is time: half of it is used in any case."""
        if self.end is None:
            return
        left, stop = self.end - time.monotonic(), sum(self.terms().values())
        if left <= min(1.25 * stop + 1, (self.end - self.began) / 2):
            self.end = None
            self.say(f"time     {max(left, 0):.1f} s are left of train.stop_after, and a stop takes up to {stop:.1f} s")
            system.send_to_self(STOP)

    def _find_hang(self, passed: float) -> None:
        progress = self.finished + self.written()
        self.still = self.still + passed if progress == self.progress else 0.0
        self.progress = progress
        if 0 < self.patience < self.still and not self.waits():
            rank = os.environ.get("RANK", "0")
            cause = f"rank {rank} hangs: nothing was finished for {self.still:.0f} s (train.watchdog) in: {self.now[1]}"
            self.leave(f"error: {cause}" if self.tell(cause, HUNG) else "")

    def leave(self, cause: str = "") -> None:
        """Write the stacks and a line, and end this process, also where the disk hangs."""
        def report() -> None:
            place = self.dump()
            if cause:
                print_now(f"{cause}; the stacks of all threads are in {place}; run the same command again", always=True)

        last = threading.Thread(target=report, daemon=True)
        last.start()
        last.join(DUMP_SECONDS)
        end_process(HUNG)

    def dump(self) -> str:
        """Append the stacks of all threads to a file in the log folder. Returns its path, or "the lines above"."""
        path = self.folder and self.folder / f"stacks_{os.environ.get('RANK', '0')}.txt"
        try:
            with open(path or os.devnull, "a") as file:
                file.write(f"\n{time.strftime('%Y-%m-%d %H:%M:%S')} process {os.getpid()} in: {self.now[1]}\n")
                file.flush()
                faulthandler.dump_traceback(file if path else sys.__stderr__, all_threads=True)
            return str(path or "the lines above")
        except (OSError, ValueError):
            faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
            return "the lines above"


def end_process(code: int) -> None:
    """Exit without the interpreter's cleanup, and end the data workers, which may hang, too."""
    for worker in multiprocessing.active_children():
        worker.kill()
    os._exit(code)


watch = Watch()
