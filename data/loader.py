"""Batches of datasets: loading in worker processes, with every failure as an error of one line."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing.connection
import os
import re
import signal
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, default_collate
from torch.utils.data._utils import signal_handling

from data.sampler import EndlessBatches
from options import OptionError
from runtime.determinism import lacks_memory
from runtime.signals import STOP_SIGNALS, Interrupted

LESS = "lower datasets.train.dataloader_num_workers or dataloader_batch_size"
SHARED = f"shared memory (/dev/shm) is full: give a container more with --shm-size=8g, or {LESS}"
REMEDIES = {errno.EIO: "the disk or the network share fails: look at dmesg", errno.ENOMEM: LESS,
            errno.ESTALE: "the network share was mounted again: start again", errno.EMFILE: "raise it with ulimit -n",
            errno.EACCES: "give this user the right to read it", errno.EPERM: "give this user the right to read it"}
DEATHS = {"SIGKILL": f"as by the system when memory runs out: {LESS}", "SIGBUS": SHARED,
          "SIGSEGV": "in a library that reads the data: find the sample with dataloader_num_workers 0"}


class Failure(str):
    """Hold the reason for a missing batch; workers cannot send every exception."""


def describe_error(error: BaseException) -> str:
    """Return what failed, where, and a remedy, in one line."""
    text = (str(error).strip().splitlines() or [type(error).__name__])[-1]
    if isinstance(error, OSError) and error.errno is not None:
        text = f"{f'{error.filename}: ' if error.filename else ''}{error.strerror}"
        return "; ".join([text, *([REMEDIES[error.errno]] if error.errno in REMEDIES else [])])
    if isinstance(error, (ValueError, FileNotFoundError)):
        return text  # already written for users
    if lacks_memory(error):
        return f"no memory is left for a sample: {LESS}"
    if re.search("shared memory|</torch_", str(error)):
        return SHARED
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {text}{where}"


@contextlib.contextmanager
def as_option_error() -> Iterator[None]:
    """Convert any exception inside to an OptionError of one line."""
    try:
        yield
    except OptionError:
        raise
    except Exception as error:
        raise OptionError(describe_error(error)) from error


class _OneThread(Dataset):
    """Compute samples in one thread in the main process, too, as torch does in workers, for equal bits."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key):
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return self.dataset[key]
        except Interrupted:
            raise
        except BaseException as error:  # also SystemExit and KeyboardInterrupt, which signals do not raise here
            return Failure(describe_error(error))
        finally:
            torch.set_num_threads(threads)


def _collate(samples: Sequence[Any]) -> Any:
    """Collate samples, or return the first failure."""
    for sample in samples:
        if isinstance(sample, Failure):
            return sample
    try:
        return default_collate(samples)
    except Exception as error:
        return Failure(f"the samples of a batch don't fit together: {describe_error(error)}")


def _begin_worker(complaints, _worker: int) -> None:
    """Prepare a worker: only its parent ends it, and a batch that cannot be sent is an error."""

    def not_sent(error: Exception, _batch: Any) -> None:
        complaints.put(f"a batch can't be sent by its worker: {describe_error(error)}")
        os._exit(1)

    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(not_sent)


class Batches:
    """Iterate over the batches of a loader, or over samples; `close` ends its workers."""

    def __init__(self, loader: Iterator, complaints=None):
        self.loader, self.complaints = loader, complaints
        self.workers: Sequence[Any] = getattr(loader, "_workers", ())

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> Any:
        """Return the next batch. Raises OptionError: it cannot be loaded."""
        with as_option_error():
            self.check_workers()
            try:
                batch = next(self.loader, self)
            except Exception:
                dying = multiprocessing.connection.wait([w.sentinel for w in self.workers], 1 if self.workers else 0)
                for worker in self.workers:  # errors of the loader, or of a partial message, hide the death of a worker
                    worker.join(1 if worker.sentinel in dying else 0)
                self.check_workers()
                raise
        if batch is self:
            raise StopIteration
        if isinstance(batch, Failure):
            raise OptionError(batch)
        return batch

    def check_workers(self) -> None:
        """Raise OptionError where a worker has ended."""
        for worker in self.workers:
            if (code := worker.exitcode) is not None:
                if not self.complaints.empty():
                    raise OptionError(self.complaints.get())
                if code >= 0:
                    raise OptionError(f"a data worker ended with exit code {code}; find the sample with "
                                      "datasets.train.dataloader_num_workers 0")
                name = signal.Signals(-code).name
                raise OptionError(f"a data worker was ended by {name}{', ' + DEATHS[name] if name in DEATHS else ''}")

    def close(self) -> None:
        """Kill the workers, which hold only data, even if they hang."""
        if thread := getattr(self.loader, "_pin_memory_thread", None):  # it reads from workers, and would raise
            self.loader._pin_memory_thread_done_event.set()
            self.loader._worker_result_queue.put((None, None))  # wakes it
            thread.join(1)
        for worker in self.workers:
            worker.kill()
        if self.workers:  # in a thread, since the loader may wait for a partial message
            end = threading.Thread(target=self.loader._shutdown_workers, daemon=True)
            end.start()
            end.join(5)
        self.workers = ()


def num_workers(wanted: int | str, cuda: bool) -> int:
    """Return the number of workers of this process; "auto": one per core that it has beyond its own, at most 8."""
    if wanted != "auto":
        return wanted
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(0, min(8, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1)) if cuda else 0


def endless(dataset, batches: EndlessBatches, workers: int | str, pinned: bool) -> Batches:
    """Return endless training batches, which draw nothing from the global generators.

    Args: workers: their number, or "auto". pinned: put batches into pinned memory, for CUDA.
    Raises: OptionError: the workers cannot start.
    """
    workers = num_workers(workers, pinned)
    complaints = multiprocessing.SimpleQueue() if workers else None
    loader = DataLoader(_OneThread(dataset), batch_sampler=batches, num_workers=workers, pin_memory=pinned,
                        collate_fn=_collate, worker_init_fn=partial(_begin_worker, complaints),
                        generator=torch.Generator().manual_seed(0))
    with as_option_error():
        made = Batches(iter(loader), complaints)
    if workers:  # torch's handler of SIGCHLD would raise anywhere in this thread, as in a save
        signal_handling._remove_worker_pids(id(made.loader))
        made.loader._worker_pids_set = False
    return made


def clips_of(dataset, indices: Sequence[int] | None = None) -> Batches:
    """Return the samples of a test set in order: lazy clips where it has them, else batches of one.

    Args: indices: of the samples; None: all.
    """
    indices = range(len(dataset)) if indices is None else indices
    if hasattr(dataset, "clip"):
        return Batches(dataset.clip(index) for index in indices)
    return Batches(iter(DataLoader(_OneThread(dataset), sampler=indices, collate_fn=_collate,
                                   generator=torch.Generator().manual_seed(0))))


def clip_name(sample: Any) -> str:
    """Return the name of a sample of a test set."""
    return str(sample["folder"][0]) if isinstance(sample, Mapping) else sample.name
