"""Read and write safetensors files: the header's length, a JSON header, then the bytes of all tensors.

Source: the format as huggingface/safetensors describes it; `encode` writes the same bytes as that package.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

SUFFIX = ".safetensors"
MAX_HEADER = 25_000_000  # bytes, a quarter million tensors; parsed they take some twenty times as much memory
_TORCH = {"U64": "uint64", "I64": "int64", "F64": "float64", "C64": "complex64", "F32": "float32", "U32": "uint32",
          "I32": "int32", "BF16": "bfloat16", "F16": "float16", "U16": "uint16", "I16": "int16",
          "F8_E8M0": "float8_e8m0fnu", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "I8": "int8",
          "U8": "uint8", "BOOL": "bool"}  # in the order of a file; torch 2.6 lacks one
TYPES = {name: getattr(torch, dtype) for name, dtype in _TORCH.items() if hasattr(torch, dtype)}
NAMES = {dtype: name for name, dtype in TYPES.items()}


def is_safetensors(path: Path) -> bool:
    """Return whether a file is one by its name or its first bytes."""
    if path.suffix.lower() == SUFFIX:
        return True
    with open(path, "rb") as file:
        head, size = file.read(9), file.seek(0, os.SEEK_END)
    return head[8:] == b"{" and struct.unpack("<Q", head[:8])[0] <= size - 8


def read_header(file: Any) -> list[tuple[str, torch.dtype, list[int]]]:
    """Read and check the header of an open file, and leave the file where the data begin.

    Returns: name, type and shape of each tensor in the order of their data, which then fill the file to its end.
    Raises: ValueError, in a few words, for anything else.
    """
    size = os.fstat(file.fileno()).st_size
    head = file.read(8)
    length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
    if length > min(size - 8, MAX_HEADER):
        raise ValueError(f"its header takes {length:,} bytes; the file has {size:,}, at most {MAX_HEADER:,} are read")
    try:
        header = json.loads(file.read(length).decode(), object_pairs_hook=_without_duplicates)
    except RecursionError:
        raise ValueError("its header is nested too deeply") from None
    if not isinstance(header, dict):
        raise ValueError("its header is not a table of tensors")
    header.pop("__metadata__", None)  # texts that nothing here needs
    found, end = [], 0
    for name, entry in sorted(header.items(), key=_offsets):
        dtype, shape, (start, stop) = TYPES.get(str(entry.get("dtype"))), entry.get("shape"), entry["data_offsets"]
        if not dtype:
            raise ValueError(f"{name[:60]!r} is of type {str(entry.get('dtype'))[:20]!r}; valid: {', '.join(TYPES)}")
        if not isinstance(shape, list) or len(shape) > 64 or not all(_is_count(n) for n in shape) or \
                math.prod(shape) * dtype.itemsize != stop - start:
            raise ValueError(f"the shape of {name[:60]!r} does not fit its {stop - start:,} bytes")
        if start != end:
            raise ValueError(f"{name[:60]!r} overlaps another tensor or leaves a gap")
        end = stop
        found.append((name, dtype, shape))
    if 8 + length + end != size:
        raise ValueError(f"its tensors take {end:,} bytes and {size - 8 - length:,} are there")
    return found


def _is_count(number: Any) -> bool:
    return type(number) is int and 0 <= number < 1 << 62


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = dict(pairs)
    if len(names) < len(pairs):
        raise ValueError("its header has a name twice")
    return names


def _offsets(item: tuple[str, Any]) -> list[int]:
    name, entry = item
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)) or \
            offsets[0] > offsets[1]:
        raise ValueError(f"{name[:60]!r} has no valid data_offsets")
    return offsets


def find_fault(path: Path) -> str | None:
    """Return what is wrong with a file's header, or None. The format has no checksum of the data."""
    try:
        with open(path, "rb") as file:
            read_header(file)
    except ValueError as error:
        return str(error)
    return None


def read(path: Path) -> dict[str, torch.Tensor]:
    """Read all tensors of a file that `read_header` accepts, each into memory of its own."""
    tensors = {}
    with open(path, "rb") as file:
        for name, dtype, shape in read_header(file):
            data = bytearray(math.prod(shape) * dtype.itemsize)
            if file.readinto(data) != len(data):
                raise ValueError("the file ends too early")
            flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
            tensors[name] = flat.reshape(shape)
    return tensors


def encode(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """Return a file with these tensors. Raises ValueError for a type that the format lacks."""
    if unknown := [name for name, value in tensors.items() if value.dtype not in NAMES]:
        raise ValueError(f"{unknown[0]} is {tensors[unknown[0]].dtype}, which safetensors files don't hold")
    order = list(NAMES)
    header, data = {"__metadata__": {"format": "pt"}}, []
    end = 0
    for name in sorted(tensors, key=lambda name: (order.index(tensors[name].dtype), name)):
        value = tensors[name]
        data.append(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        header[name] = {"dtype": NAMES[value.dtype], "shape": list(value.shape),
                        "data_offsets": [end, end := end + len(data[-1])]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return b"".join((struct.pack("<Q", len(text)), text, *data))
