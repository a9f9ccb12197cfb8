"""Which samples a step trains on, as a pure function of (seed, position): seeking costs nothing.

No state of a global generator is involved, so neither the number of workers nor the moment of an interruption
can change what is drawn. Source: DESIGN 5; the permutation per epoch follows torch's DistributedSampler.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np

Key = tuple[int, int]  # (epoch, index): what a dataset is asked for


def sample_rng(seed: int, epoch: int, index: int, *stream: int) -> np.random.Generator:
    """The generator a dataset draws the augmentation of one sample from.

    Args: seed, epoch, index, stream: integers >= 0; stream numbers independent generators of one sample, e.g. one
        for each frame. Returns: a generator that depends on nothing else.
    """
    return np.random.default_rng(np.random.SeedSequence((seed, epoch, index), spawn_key=stream))


def order(seed: int, epoch: int, length: int, shuffle: bool = True) -> list[int]:
    """The order of an epoch: a permutation of range(length) seeded by (seed, epoch), or plain counting."""
    # 3 numbers would collide with sample_rng's seeds; the fourth sets this stream apart.
    return np.random.default_rng((seed, epoch, 0, 1)).permutation(length).tolist() if shuffle else list(range(length))


def names_digest(dataset) -> str | None:
    """A digest of the names of a dataset's samples, in their order; None if it has no `sample_names`, e.g. drawn data.

    The names are relative to the data's folder, which may be moved.
    """
    names = dataset.sample_names() if hasattr(dataset, "sample_names") else None
    return hashlib.sha256("\n".join(names).encode(errors="surrogateescape")).hexdigest()[:16] if names else None


class EndlessBatches:
    """Batches of keys `(epoch, index)` from a position onwards, epoch after epoch, without end.

    The global sequence does not depend on the world size: each batch is cut for all ranks at once and rank r
    takes every world_size-th key of it. An epoch's last samples that do not fill a batch are left out
    (another permutation leaves out others).

    Args:
        length: number of samples in the dataset.
        batch_size: samples per batch over all ranks.
        seed, shuffle: of the order.
        position: `(epoch, offset)`, offset = samples of that epoch that are already used up.
        rank, world_size: which share of each batch this process gets.
    Raises:
        ValueError: the dataset is smaller than a batch, or the batch can't be shared evenly.
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
        return self.length // self.batch_size

    def after(self, batches: int) -> tuple[int, int]:
        """The position `(epoch, offset)` once this many batches have been used, counted from `self.position`."""
        epoch, offset = self.position
        left = (self.length - offset) // self.batch_size  # whole batches left of the epoch that we start in
        if batches <= left:
            return epoch, offset + batches * self.batch_size
        epochs, rest = divmod(batches - left - 1, self.batches_per_epoch)
        return epoch + 1 + epochs, (rest + 1) * self.batch_size

    def batches_until(self, epochs: int) -> int:
        """How many batches from `self.position` to the end of that many epochs; 0 if it lies behind."""
        epoch, offset = self.position
        left = (self.length - offset) // self.batch_size
        return max(0, left + (epochs - epoch - 1) * self.batches_per_epoch)

    def ends_epoch(self, batches: int, every: int = 1) -> bool:
        """Whether the batch counted so ends an epoch, and the number of finished epochs is a multiple of `every`."""
        epoch, offset = self.after(batches)
        return offset + self.batch_size > self.length and (epoch + 1) % every == 0

    def __iter__(self) -> Iterator[list[Key]]:
        epoch, offset = self.position
        while True:
            indices = order(self.seed, epoch, self.length, self.shuffle)
            for start in range(offset, self.length - self.batch_size + 1, self.batch_size):
                batch = indices[start : start + self.batch_size]
                yield [(epoch, index) for index in batch[self.rank :: self.world_size]]
            epoch, offset = epoch + 1, 0
