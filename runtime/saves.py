"""Write a run's checkpoints while it trains; `checkpoint.on_save_error` decides what a failed save does."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import options
from checkpoint import CheckpointError, Layout, Saver
from log.run_log import RunLog
from runtime import distributed
from runtime.watchdog import watch
from storage import files


def check_ranks(iteration: int, checksums: Sequence[int]) -> None:
    """Compare the checksums of weights and moments of all ranks.

    Raises: CheckpointError: they are not equal; it names the ranks that most others differ from.
    """
    usual, count = Counter(checksums).most_common(1)[0]
    if count < len(checksums):
        odd = [str(rank) for rank, checksum in enumerate(checksums) if checksum != usual]
        who = f"rank {', '.join(odd)} differs from the others" if count > len(odd) else "the ranks differ"
        raise CheckpointError(f"after iteration {iteration} {who} in weights or moments: nothing is saved, the last "
                              "checkpoint is intact; check the memory of that machine, and run the same command")


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
        background = device_type != "cpu" if keep["async"] == "auto" else keep["async"]
        try:
            self.layout = Layout(keep["layout"], keep["name"], keep["latest"], keep["best"], keep["interrupted"])
        except ValueError as error:
            raise options.OptionError(f"{opt['opt_path']}: checkpoint: {error}") from None
        self.saver = Saver(folder, self.layout, keep["keep_last_n"], background)
        watch.background, watch.written = background, lambda: files.written

    def due(self) -> bool:
        """Return whether `checkpoint.every_minutes` are over; on other ranks than 0 never."""
        return distributed.is_main() and 0 < self.pause <= time.monotonic() - self.since

    def write(self, iteration: int, parts: Mapping[str, Any], reason: str) -> None:
        """Start to write a checkpoint, or write it, depending on `checkpoint.async`."""
        state = parts["state"]
        self.amending, self.failure = self.at == iteration, ""
        self.since = time.monotonic()
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
        if saved and not saved.amended:
            watch.measure("save", saved.seconds)
            waited = f", {saved.waited:.2f} s of it waited for" if self.saver.background else ""
            self.log.line(f"saved    {saved.found.path} in {saved.seconds:.1f} s{waited}")

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
