"""Take the tensors out of a pickled file by running the code in it: the own process of `convert --trust`.

    python storage/trusted.py FILE OUT

It must be given only files from people one trusts. Classes are looked for in the folder of FILE and in PYTHONPATH.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch


def plain(value: Any) -> Any:
    """Return the tensors, texts and numbers of a value in dicts and lists, an object as its state dict; else None."""
    if callable(getattr(value, "state_dict", None)) and not isinstance(value, type):
        value = value.state_dict()
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {key: plain(part) for key, part in value.items() if isinstance(key, (str, int))}
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    return value if isinstance(value, (str, int, float, type(None))) else None


if __name__ == "__main__":
    sys.path[0] = ""  # not storage/, whose modules would hide others
    source, target = sys.argv[1:]
    torch.save(plain(torch.load(source, map_location="cpu", weights_only=False)), target)
