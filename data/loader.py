"""From a dataset to batches: workers that can't disturb the run, errors in one line."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from data.sampler import EndlessBatches
from options import OptionError

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class _OneThread(Dataset):
    """A dataset that computes in one thread wherever it runs, as torch does in workers: the same bits everywhere."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key):
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return self.dataset[key]
        finally:
            torch.set_num_threads(threads)


def _ignore_signals(_worker: int) -> None:
    for number in STOP_SIGNALS:  # the parent says when to end
        signal.signal(number, signal.SIG_IGN)


def _one_line(loader: Iterator) -> Iterator[Mapping[str, Any]]:
    """Batches of a loader; a dataset's complaint, also one that a worker wraps in a traceback, as one line.

    To be closed when done with.
    """
    try:
        while True:
            try:
                batch = next(loader)
            except StopIteration:
                return
            except (ValueError, FileNotFoundError) as error:
                complaint = str(error).strip().splitlines()[-1]
                complaint = complaint.removeprefix("ValueError: ").removeprefix("FileNotFoundError: ")
                raise OptionError(complaint) from None
            yield batch
    finally:
        # Python waits for its children at exit, and these ignore its SIGTERM: they must be told in the loader's own
        # way. It does so when it is freed, but a traceback may hold it until it is too late.
        if end := getattr(loader, "_shutdown_workers", None):
            end()


def endless(dataset, batches: EndlessBatches, workers: int, pinned: bool) -> Iterator[Mapping[str, Any]]:
    """Training batches without end. Making and using them draws nothing from the global generators.

    Raises: OptionError when a sample can't be made.
    """
    return _one_line(iter(DataLoader(_OneThread(dataset), batch_sampler=batches, num_workers=workers, pin_memory=pinned,
                                     worker_init_fn=_ignore_signals, generator=torch.Generator().manual_seed(0))))


def clips_of(dataset, indices: Sequence[int] | None = None) -> Iterator[Any]:
    """The samples of a test set in order: clips to be read piece by piece where it has them, else batches of one.

    Args: indices: of the samples; None: all.
    """
    indices = range(len(dataset)) if indices is None else indices
    if hasattr(dataset, "clip"):
        return _one_line(dataset.clip(index) for index in indices)
    return _one_line(iter(DataLoader(_OneThread(dataset), sampler=indices,
                                     generator=torch.Generator().manual_seed(0))))


def clip_name(sample: Any) -> str:
    """What a sample of a test set is called."""
    return str(sample["folder"][0]) if isinstance(sample, Mapping) else sample.name
