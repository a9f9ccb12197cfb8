"""Copy, measure, flatten and compare nested states: dicts and lists of tensors and plain values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch


class Snapshot:
    """Copies a nested state to host memory, into buffers that are allocated once."""

    def __init__(self):
        self.buffers: dict[tuple, torch.Tensor] = {}  # by the path of keys to the tensor

    def take(self, tree: Any) -> Any:
        """Return the copy; it overwrites the previous one."""
        copied = self._copy(tree, ())
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        return copied

    def _copy(self, tree: Any, path: tuple) -> Any:
        if isinstance(tree, torch.Tensor):
            buffer = self.buffers.get(path)
            if buffer is None or buffer.shape != tree.shape or buffer.dtype != tree.dtype:
                buffer = self.buffers[path] = torch.empty_like(
                    tree, device="cpu", memory_format=torch.contiguous_format, pin_memory=tree.is_cuda)
            return buffer.copy_(tree.detach(), non_blocking=True)
        if isinstance(tree, Mapping):
            return {key: self._copy(value, (*path, key)) for key, value in tree.items()}
        if isinstance(tree, (list, tuple)):
            return [self._copy(value, (*path, i)) for i, value in enumerate(tree)]
        return tree


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
