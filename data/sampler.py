"""The order of samples as a pure function of (seed, position), and the random generators of samples.

No global generator is involved, so neither the number of workers nor an interruption changes a draw. Source: the
permutation per epoch follows torch's DistributedSampler.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch

Key = tuple[int, int]  # (epoch, index) of a sample


def sample_rng(seed: int, epoch: int, index: int, *stream: int) -> np.random.Generator:
    """Return the generator of one sample's augmentation.

    Args:
        seed, epoch, index: integers >= 0.
        stream: integers >= 0 that number independent generators of one sample, e.g. one for each frame.
    Returns: a generator that depends on these numbers alone.
    """
    return np.random.default_rng(np.random.SeedSequence((seed, epoch, index), spawn_key=stream))


def cpu_generator(seed: int, epoch: int, index: int, *stream: int) -> torch.Generator:
    """Return a torch generator on the CPU that depends on these numbers alone, as `sample_rng` does."""
    return torch.Generator().manual_seed(int(sample_rng(seed, epoch, index, *stream).integers(2**63)))


def order(seed: int, epoch: int, length: int, shuffle: bool = True) -> list[int]:
    """Return the order of an epoch: a permutation of range(length) seeded by (seed, epoch), or range(length)."""
    # Three numbers would collide with the seeds of sample_rng; the fourth makes this stream distinct.
    return np.random.default_rng((seed, epoch, 0, 1)).permutation(length).tolist() if shuffle else list(range(length))


def names_digest(dataset) -> str | None:
    """Return a digest of the sample names of a dataset in their order, or None for drawn data, which has no names.

    Names are relative to the folder of the data, so the folder may move.
    """
    names = dataset.sample_names() if hasattr(dataset, "sample_names") else None
    return hashlib.sha256("\n".join(names).encode(errors="surrogateescape")).hexdigest()[:16] if names else None


def describe_samples(dataset, keys: Sequence[Key], most: int = 8) -> str:
    """Name samples: their files, if they have some, epochs from 1 as in the log, and indices from 0.

    Args: most: how many are named; of the rest the number is.
    """
    names = dataset.sample_names() if hasattr(dataset, "sample_names") else None
    words = [f"{names[index]} (epoch {epoch + 1}, index {index})" if names else f"index {index} of epoch {epoch + 1}"
             for epoch, index in keys[:most]]
    return ", ".join(words) + (f" and {len(keys) - most} more" if len(keys) > most else "")


class EndlessBatches:
    """Yield batches of keys `(epoch, index)` from a position on, epoch after epoch, without end.

    The sequence of batches does not depend on the world size: rank r takes the r-th of world_size equal parts of a
    batch. The last samples of an epoch that do not fill a batch are dropped; each epoch drops others.

    Args:
        length: number of samples in the dataset.
        batch_size: samples per batch over all ranks.
        seed: seed of the order.
        shuffle: whether to permute each epoch.
        position: `(epoch, offset)` to start at; offset counts the samples of that epoch that are already used.
        rank, world_size: of this process.
    Raises: ValueError: the dataset is smaller than a batch, or the world size does not divide the batch.
    """

    def __init__(self, length: int, batch_size: int, *, seed: int = 0, shuffle: bool = True,
                 position: tuple[int, int] = (0, 0), rank: int = 0, world_size: int = 1):
        if batch_size > length:
            raise ValueError(f"a batch of {batch_size} can't be filled: the training set has {length} samples")
        if batch_size % world_size:
            raise ValueError(f"a batch of {batch_size} can't be shared by {world_size} processes; use a multiple")
        self.length, self.batch_size, self.seed, self.shuffle = length, batch_size, seed, shuffle
        self.position, self.rank, self.world_size = position, rank, world_size

    @property
    def batches_per_epoch(self) -> int:
        """Return the number of batches of an epoch."""
        return self.length // self.batch_size

    def after(self, batches: int) -> tuple[int, int]:
        """Return the position `(epoch, offset)` after a number of batches from `self.position` on."""
        epoch, offset = self.position
        left = (self.length - offset) // self.batch_size  # full batches left in the first epoch
        if batches <= left:
            return epoch, offset + batches * self.batch_size
        epochs, rest = divmod(batches - left - 1, self.batches_per_epoch)
        return epoch + 1 + epochs, (rest + 1) * self.batch_size

    def batches_until(self, epochs: int) -> int:
        """Count the batches from `self.position` to the end of that many epochs; 0 if it is past."""
        epoch, offset = self.position
        left = (self.length - offset) // self.batch_size
        return max(0, left + (epochs - epoch - 1) * self.batches_per_epoch)

    def ends_epoch(self, batches: int, every: int = 1) -> bool:
        """Tell whether batch number `batches` ends an epoch whose number, from 1, is a multiple of `every`."""
        epoch, offset = self.after(batches)
        return offset + self.batch_size > self.length and (epoch + 1) % every == 0

    def keys_of(self, number: int) -> list[Key]:
        """Return the keys of this rank in batch `number` from `self.position` on, from 1."""
        there = copy.copy(self)
        there.position = self.after(number - 1)
        return next(iter(there))

    def __iter__(self) -> Iterator[list[Key]]:
        (epoch, offset), share = self.position, self.batch_size // self.world_size
        while True:
            indices = order(self.seed, epoch, self.length, self.shuffle)
            for start in range(offset, self.length - self.batch_size + 1, self.batch_size):
                batch = indices[start : start + self.batch_size]
                yield [(epoch, index) for index in batch[self.rank * share : (self.rank + 1) * share]]
            epoch, offset = epoch + 1, 0
