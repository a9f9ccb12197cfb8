"""Copy, measure, flatten and compare nested states: dicts and lists of tensors and plain values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

BUFFER = 1 << 28  # most bytes of a buffer of several tensors; torch rounds pinned memory up to a power of two


class Snapshot:
    """Copies a nested state to host memory, into parts of a few large buffers that are allocated once."""

    def __init__(self):
        self.rooms: dict[tuple, torch.Tensor] = {}  # by the path of keys to the tensor
        self.rest: dict[bool, torch.UntypedStorage] = {}  # what is left of a buffer, pinned or not

    def take(self, tree: Any) -> Any:
        """Return the copy; it overwrites the previous one."""
        self.devices, self.left = set(), num_bytes(tree)
        copied = self._copy(tree, ())
        for device in self.devices:
            torch.cuda.current_stream(device).synchronize()
        return copied

    def _copy(self, tree: Any, path: tuple) -> Any:
        if isinstance(tree, torch.Tensor):
            room = self.rooms.get(path)
            if room is None or room.shape != tree.shape or room.dtype != tree.dtype:
                room = self.rooms[path] = self._room_for(tree)
            self.left -= tree.nbytes
            self.devices |= {tree.device} if tree.is_cuda else set()
            return room.copy_(tree.detach(), non_blocking=True)
        if isinstance(tree, Mapping):
            return {key: self._copy(value, (*path, key)) for key, value in tree.items()}
        if isinstance(tree, (list, tuple)):
            return [self._copy(value, (*path, i)) for i, value in enumerate(tree)]
        return tree

    def _room_for(self, value: torch.Tensor) -> torch.Tensor:
        """Return room for a tensor, in a storage of its own: torch.save writes whole storages."""
        room, pinned = torch.empty(0, dtype=value.dtype), value.is_cuda
        kept = self.rest.get(pinned, room.untyped_storage())
        buffer = kept if value.nbytes <= len(kept) else torch.empty(
            max(value.nbytes, min(BUFFER, self.left)), dtype=torch.uint8, pin_memory=pinned).untyped_storage()
        rest = buffer[-(-value.nbytes // 64) * 64 :]
        self.rest[pinned] = rest if buffer is kept else max(rest, kept, key=len)
        return room.set_(buffer[: value.nbytes], 0, value.shape) if value.nbytes else room.new_empty(value.shape)


def to_cpu(tree: Any) -> Any:
    """Return a nested state with every tensor on the CPU; containers are new, CPU tensors are not copied."""
    if isinstance(tree, torch.Tensor):
        return tree.detach().cpu()
    if isinstance(tree, Mapping):
        return {key: to_cpu(value) for key, value in tree.items()}
    return [to_cpu(value) for value in tree] if isinstance(tree, (list, tuple)) else tree


def num_bytes(tree: Any) -> int:
    """Return the bytes that a nested state takes on the disk, rounded up."""
    if isinstance(tree, torch.Tensor):
        return tree.numel() * tree.element_size() + 512
    if isinstance(tree, Mapping):
        tree = [*tree.keys(), *tree.values()]
    return sum(num_bytes(value) for value in tree) + 64 if isinstance(tree, (list, tuple)) else 64


def differences(one: Any, two: Any, names: Sequence[str] = ("the first", "the second")) -> Iterator[tuple[str, str]]:
    """Yield the path of each leaf in which two nested states differ, and how; NaN equals NaN."""
    one, two = dict(flat(one)), dict(flat(two))
    for path in {**one, **two}:
        if path not in one or path not in two:
            yield path, f"only in {names[path in two]}"
        elif words := _difference(one[path], two[path]):
            yield path, words


def _difference(a: Any, b: Any) -> str | None:
    if not (torch.is_tensor(a) and torch.is_tensor(b)):
        equal = not torch.is_tensor(a) and not torch.is_tensor(b) and (a == b or a != a and b != b)
        return None if equal else f"{a!r} and {b!r}"
    if a.shape != b.shape or a.dtype != b.dtype:
        return f"{tuple(a.shape)} {a.dtype} and {tuple(b.shape)} {b.dtype}"
    if torch.equal(a, b):
        return None
    if not (a.is_floating_point() or a.is_complex()):
        return f"{int((a != b).sum())} of {a.numel()} values"
    unequal = (a != b) & ~(a.isnan() & b.isnan())
    if not unequal.any():
        return None
    return f"{int(unequal.sum())} of {a.numel()} values, by at most {float((a.double() - b.double()).abs().max()):.3e}"


def flat(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the path and value of every leaf of a nested state."""
    if isinstance(tree, Mapping):
        tree = tree.items()
    elif isinstance(tree, (list, tuple)):
        tree = enumerate(tree)
    else:
        yield path, tree
        return
    for key, value in tree:
        yield from flat(value, f"{path}.{key}" if path else str(key))


def plain(tree: Any) -> Any:
    """Return options as plain dicts and lists, for files."""
    if isinstance(tree, Mapping):
        return {key: plain(value) for key, value in tree.items()}
    return [plain(value) for value in tree] if isinstance(tree, (list, tuple)) else tree
