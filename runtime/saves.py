"""Write a run's checkpoints while it trains; `checkpoint.on_save_error` decides what a failed save does."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import options
from checkpoint import CheckpointError, CheckpointSet, Layout, Saver, what_is_kept
from log.run_log import RunLog
from runtime import distributed
from runtime.watchdog import SAY_AFTER, watch
from storage import files

FOLLOW_SECONDS = 300.0  # for what follows the last save: the copy in the mirror, and the command


def check_ranks(iteration: int, checksums: Sequence[int], folder: Path) -> None:
    """Compare the checksums of weights and moments of all ranks. Args: folder: of the run's checkpoints, for messages.

    Raises: CheckpointError: they are not equal; it names the ranks that most others differ from.
    """
    usual, count = Counter(checksums).most_common(1)[0]
    if count < len(checksums):
        odd = [str(rank) for rank, checksum in enumerate(checksums) if checksum != usual]
        who = f"rank {', '.join(odd)} differs from the others" if count > len(odd) else "the ranks differ"
        raise CheckpointError(f"after iteration {iteration} {who} in weights or moments: nothing is saved, "
                              f"{what_is_kept(folder)}; check the memory of that machine, and run the same command")


class Followers:
    """Does in the background what follows a commit: the copy in `path.mirror`, then `checkpoint.after_save`.

    While it is busy, the newest commit waits; an older one that waits is left out.

    Args: mirror: of the second folder. command: words, or a line for the shell. log: gets the failures.
    """

    def __init__(self, mirror: Saver | None, command: str | Sequence[str] | None, log: RunLog):
        self.mirror, self.log = mirror, log
        self.command = ["sh", "-c", f'{command} "$@"', "sh"] if isinstance(command, str) else command
        self.output: Path | None = None  # file that gets what the command prints
        self.thread: threading.Thread | None = None
        self.waiting: tuple[CheckpointSet, int | None] | None = None  # a set, and the iteration of the best
        self.problems: list[str] = []
        self.last: dict[str, Any] | None = None  # result of the command, for the report

    def put(self, found: CheckpointSet, best: int | None) -> None:
        """Begin with a set as soon as the previous one is done."""
        if self.mirror or self.command:
            self.waiting = found, best
            self.poll()

    def poll(self) -> None:
        """Log failures, and begin with the set that waits."""
        if self.thread and self.thread.is_alive():
            return
        while self.problems:
            self.log.warn(self.problems.pop(0))
        self.thread = None
        if self.waiting:
            self.thread = threading.Thread(target=self._follow, args=self.waiting, daemon=True)
            self.waiting = None
            self.thread.start()

    def finish(self) -> None:
        """Wait, but not for ever: a command that takes longer is left to itself."""
        names = ["path.mirror"] * bool(self.mirror) + ["checkpoint.after_save"] * bool(self.command)
        began, said = time.monotonic(), False
        self.poll()
        while self.thread and time.monotonic() < began + FOLLOW_SECONDS:
            watch.begin("wait", " and ".join(names))
            self.thread.join(min(0.5, FOLLOW_SECONDS))
            self.poll()
            if self.thread and not said and time.monotonic() > began + SAY_AFTER:
                self.log.line(f"waiting  for {' and '.join(names)}, at most {FOLLOW_SECONDS:.0f} s")
                said = True
        if self.thread:
            self.thread = self.waiting = None  # a second close neither waits nor starts what is left out
            self.log.warn(f"{' or '.join(names)} has not ended in {FOLLOW_SECONDS:.0f} s, and is left to itself")

    def _follow(self, found: CheckpointSet, best: int | None) -> None:
        if self.mirror:
            try:
                self.mirror.copy_from(found.folder, best)
            except (OSError, CheckpointError) as error:
                self.problems.append(f"path.mirror: checkpoint {found.iteration} was not copied: {error}; the next "
                                     "save tries again")
        if self.command and found.path.exists():
            began, files = time.monotonic(), [*found.files.values(), *([] if found.bundled else [found.path])]
            try:
                with open(self.output or os.devnull, "ab") as output:
                    code: Any = subprocess.run([*self.command, *(str(path.resolve()) for path in files)],
                                               stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                                               start_new_session=True).returncode  # Ctrl+C is not for it
            except OSError as error:
                code = f"{error.strerror}: {error.filename}"
            self.last = {"iteration": found.iteration, "code": code, "seconds": time.monotonic() - began}
            if code:
                self.problems.append(f"checkpoint.after_save failed for checkpoint {found.iteration} ({code}): see "
                                     f"{self.output}; training continues")


@contextlib.contextmanager
def saved_if_undone(run: Any) -> Iterator[None]:
    """Save the last finished step when the next one raises before it changes anything, as for lack of memory.

    Not with several ranks, which would all have to stop at it: there the others wait for this one in an exchange.
    """
    try:
        yield
    except Exception as error:
        if run.model.failed_step != run.iteration or distributed.world_size() > 1:
            raise
        traceback.clear_frames(error.__traceback__)  # they hold the memory of the step
        run.iteration -= 1
        run.model.update_learning_rate(max(run.iteration - 1, 0))
        try:
            run.save_surely("interrupted")
        except Exception as second:  # of a broken device, say: the first one is the cause
            run.log.warn(f"iteration {run.iteration} could not be saved: {second}")
        raise


class Saves:
    """Makes a run's saves, one at a time, and keeps the result of the last one.

    Args:
        opt: the run's options. folder: folder of its checkpoints. device_type: "cpu", "cuda", ...
        log: gets the results.
    Raises: OptionError for file names in the options that are not valid.
    """

    def __init__(self, opt: options.Section, folder: Path, device_type: str, log: RunLog):
        self.folder, self.log = folder, log
        keep = opt["checkpoint"]
        self.on_error, self.pause = keep["on_save_error"], 60 * keep["every_minutes"]
        self.since = time.monotonic()  # time of the last save, or of the start
        self.at: int | None = None  # iteration of the last save
        self.reason = "regular"  # of that save
        self.amending = False  # whether the last save only adds the metrics of its validation
        self.failure = ""  # why the last save failed; "" if it did not
        self.path: Path | None = None  # the file that stands for the last one
        background = device_type != "cpu" if keep["async"] == "auto" else keep["async"]
        try:
            self.layout = Layout(keep["layout"], keep["name"], keep["latest"], keep["best"], keep["interrupted"])
        except ValueError as error:
            raise options.OptionError(f"{opt['opt_path']}: checkpoint: {error}") from None
        self.saver = Saver(folder, self.layout, keep["keep_last_n"], background)
        command = keep["after_save"]
        empty = command is not None and not (command.strip() if isinstance(command, str) else command)
        if empty or isinstance(command, list) and not shutil.which(command[0]):
            what = "is empty" if empty else f"no program {command[0]} is found"
            raise options.OptionError(f"{options.origin_of(opt, 'checkpoint.after_save')}: checkpoint.after_save: "
                                      f"{what}; give a line for the shell, a list of a program and its arguments, or "
                                      "null")
        if opt["path"]["mirror"] == "":
            raise options.OptionError(f"{options.origin_of(opt, 'path.mirror')}: path.mirror: is empty; give another "
                                      "disk's folder, or null")
        mirror = opt["path"]["mirror"] and Path(opt["path"]["mirror"], opt["task"], "models")
        if mirror and mirror.resolve() == folder.resolve():
            raise options.OptionError(f"{opt['opt_path']}: path.mirror: {opt['path']['mirror']} leads to the run's own "
                                      "folder; give another disk's")
        self.mirror = Saver(mirror, self.layout, keep["keep_last_n"]) if mirror else None
        self.mirror_lock: files.FolderLock | None = None
        self.followers = Followers(self.mirror, command, log)
        watch.background, watch.written = background, lambda: files.written

    def places(self) -> list[Path]:
        """Return the folders that hold this run's checkpoints."""
        return [saver.folder.resolve() for saver in (self.saver, self.mirror) if saver]

    def tell(self) -> None:
        """Print where a stopped run was saved."""
        if self.path:
            self.log.line(f"Checkpoint saved to {self.path}")
            self.log.line(f"You can resume training using: --resume {self.path}, or the same command:")

    def due(self) -> bool:
        """Return whether `checkpoint.every_minutes` are over; on other ranks than 0 never."""
        return distributed.is_main() and 0 < self.pause <= time.monotonic() - self.since

    def write(self, iteration: int, parts: Mapping[str, Any], reason: str) -> None:
        """Start to write a checkpoint, or write it, depending on `checkpoint.async`."""
        state = parts["state"]
        if reason == "interrupted":
            self.log.line("Saving current state...")
        self.amending, self.failure = self.at == iteration, ""
        self.since, self.best = time.monotonic(), state["best"]
        self.at, self.reason = iteration, self.reason if self.amending else reason
        try:
            self.saver.save(iteration, parts, best=state["best"], longest=watch.longest.copy(),
                            amend=self.amending, reason=self.reason, epoch=state["epoch"], metric=state["metric"])
        except (OSError, RuntimeError) as error:
            self._handle_failure(error)
        self.poll()

    def finish(self) -> None:
        """Wait for the save in progress and log its result."""
        self.saver.wait()
        self.poll()

    def poll(self) -> None:
        """Log the result of a save, once; between two steps this costs no time."""
        try:
            saved = self.saver.poll()
        except (OSError, RuntimeError) as error:
            self._handle_failure(error)
            return
        self.followers.poll()
        if saved:
            self.followers.put(saved.found, self.best)
        if saved and not saved.amended:
            watch.measure("save", saved.seconds)
            self.path = saved.found.path
            waited = f", {saved.waited:.2f} s of it waited for" if self.saver.background else ""
            self.log.line(f"saved    {saved.found.path} in {saved.seconds:.1f} s{waited}")

    def close(self) -> None:
        """Wait for the save in progress, and for a limited time for what follows it."""
        self.saver.wait()
        self.followers.finish()
        if self.mirror_lock:
            self.mirror_lock.close()

    def _handle_failure(self, error: Exception) -> None:
        """Raise CheckpointError for a failed save, or log a warning (`on_save_error`); older sets are intact."""
        self.failure = str(error).splitlines()[0]
        problem = f"checkpoint {self.at} was not saved: {self.failure}"
        if self.amending:
            problem = f"checkpoint {self.at} is without the metrics of its validation: {self.failure}"
        if self.on_error == "stop":
            raise CheckpointError(f"{self.folder}: {problem}; older checkpoints are intact") from None
        if not self.amending:
            self.at = None
        self.log.warn(f"{problem}; the next interval tries again")
