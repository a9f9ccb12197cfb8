"""Make a step repeatable: device, threads, kernels, seeds and random generators of this process."""

from __future__ import annotations

import contextlib
import os
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import options
from runtime import distributed

DRIVER = Path("/proc/driver/nvidia/version")
LESS_MEMORY = "raise train.accumulate, set train.amp, or lower datasets.train.dataloader_batch_size"


def environment() -> dict[str, Any]:
    """Return the versions and settings that exactness depends on, besides options and state."""
    found = {"torch": str(torch.__version__), "numpy": np.__version__, "num_threads": torch.get_num_threads(),
             "cuda": None}
    if torch.cuda.is_available():
        driver = re.search(r"\d+(\.\d+)+", DRIVER.read_text()) if DRIVER.exists() else None
        found |= {"cuda": torch.cuda.get_device_name(), "cuda_version": torch.version.cuda,
                  "cudnn": torch.backends.cudnn.version(), "driver": driver and driver[0]}
    return found


def prepare_machine(opt: dict) -> None:
    """Set threads, device, kernels and seeds from the options.

    Raises: OptionError for a device that is unknown or absent.
    """
    if opt["num_threads"]:
        torch.set_num_threads(opt["num_threads"])
    try:
        device = distributed.device_for(opt)
    except RuntimeError:
        raise options.OptionError(f"{options.origin_of(opt, 'device')}: device: {opt['device']!r} is unknown; valid: "
                                  "auto, cpu, cuda, cuda:N") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise options.OptionError(f"device: {device}: torch sees no CUDA device here; use --device cpu")
        if device.index >= torch.cuda.device_count():
            raise options.OptionError(f"device: {device}: torch sees {torch.cuda.device_count()} CUDA devices here, "
                                      "numbered from 0; each process needs its own")
        torch.cuda.set_device(device)
    distributed.use_device(device)
    if opt["deterministic"]:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # no code here reads memory before writing it
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, which repeats itself
    seed_generators(opt["train"]["manual_seed"])


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Multiply and convolve in float32 on CUDA, not in TF32, which confuses values that lie close together."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


@contextlib.contextmanager
def fastest_kernels(wanted: bool) -> Iterator[None]:
    """Let cuDNN time its kernels for each new shape, which pays in training, where shapes repeat.

    Another run may choose other kernels, so `deterministic` disables it.
    """
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = wanted and not torch.are_deterministic_algorithms_enabled()
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def missing_kernel(error: BaseException) -> str | None:
    """Return the name of the operation that has no deterministic kernel, if that is what an error says."""
    text = str(error)
    return text.split()[0] if "does not have a deterministic implementation" in text else None


def lacks_memory(error: BaseException) -> bool:
    """Tell whether an error says that the memory of this machine or of its card is full."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or bool(
        re.search("can't allocate memory|CUDA (error: )?out of memory|_STATUS_ALLOC_FAILED", str(error)))


def no_memory(error: BaseException) -> str:
    """Describe an error about memory in one line, without torch's account of its allocator."""
    text = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return f"out of memory: {text.partition('. Of the')[0][:200]}"


@contextlib.contextmanager
def failures_named(device: torch.device, kept: Callable[[], str] = str) -> Iterator[None]:
    """Turn errors about memory and missing deterministic kernels into an OptionError that names the remedy.

    Args: kept: returns the end of the message about memory, e.g. "; the last checkpoint is intact".
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if lacks_memory(error):
            raise options.OptionError(f"{no_memory(error)}; {LESS_MEMORY}{kept()}") from None
        if operation := missing_kernel(error):
            raise options.OptionError(f"deterministic: {operation} has no deterministic kernel on {device}; set "
                                      "deterministic to false, or use --device cpu") from None
        raise


def seed_micro_batch(seed: int, step: int, number: int) -> None:
    """Seed all generators for one micro-batch, so that its draws depend on nothing that happened before.

    Args: seed: of the run. step: from 1. number: of the micro-batch among those of all ranks, from 0.
    """
    seed_generators(int(np.random.SeedSequence([seed, step, number]).generate_state(1, np.uint64)[0] >> 1))


def seed_generators(seed: int) -> None:
    """Seed the generators of python, numpy and torch, on every device. Args: seed: in [0, 2**63)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
