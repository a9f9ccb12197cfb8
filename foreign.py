"""The one dictionary that holds a whole training state: ours, older ones of ours, and those of other programs.

Understood besides our own: KAIR, BasicSR (`params`), taming and PyTorch Lightning (`state_dict`, `global_step`,
`optimizer_states`), InkTrace, LGT and plain scripts (`model_state_dict`, `optimizer_state_dict`, `epoch`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from durable import CheckpointError

VERSION = 2  # of the state, see MIGRATIONS
WRAPPERS = re.compile(r"^(?:module\.|_orig_mod\.)+")  # DistributedDataParallel's and torch.compile's, in any nesting
WEIGHT_KEYS = ("params", "params_ema", "state_dict", "model_state_dict", "model")  # where files keep a state dict
TRAINING = re.compile(r"epoch|check|ckpt|latest|last|best|step|iter|interrupt", re.IGNORECASE)  # in names of files

# label -> names under which single files keep it, ours first
NAMES = {
    "G": ("model_state_dict", "state_dict", "params", "model"),
    "E": ("ema_state_dict", "params_ema"),
    "optimizerG": ("optimizer_state_dict", "optimizer"),
    "optimizerD": ("optimizerD_state_dict", "optimizer_disc", "discriminator_optimizer_state_dict"),
    "D": ("D_state_dict", "discriminator_state_dict"),
}
OTHER = re.compile(r"([A-Z]|optimizer[A-Z])_state_dict")  # of further networks and optimizers
STEP_KEYS = ("iter", "iteration", "global_step", "steps", "step")


# ---------------------------------------------------------------- weights


def weights_in(payload: Any, path: Path | str, param_key: str = "params") -> dict[str, torch.Tensor]:
    """The state dict of a network in a loaded file, without wrappers' prefixes.

    Understood: a bare dict, or one below `param_key` or any of WEIGHT_KEYS.
    Raises: CheckpointError for an optimizer, or when there are no weights.
    """
    if not isinstance(payload, Mapping):
        raise CheckpointError(f"{path}: holds a {type(payload).__name__}, not the weights of a network")
    if is_optimizer(payload):
        raise CheckpointError(f"{path}: is an optimizer's state, not a network; name the weights (_G.pth)")
    for key in (param_key, *WEIGHT_KEYS):
        if isinstance(payload.get(key), Mapping):
            payload = payload[key]
            break
    if not payload or not all(isinstance(v, torch.Tensor) for v in payload.values()):
        raise CheckpointError(f"{path}: holds no weights, neither bare nor below {', '.join(WEIGHT_KEYS)}")
    return {WRAPPERS.sub("", key): value for key, value in payload.items()}


def is_optimizer(payload: Any) -> bool:
    return isinstance(payload, Mapping) and {"state", "param_groups"} <= set(payload)


# ---------------------------------------------------------------- whole states


def pack(parts: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of a set as one dictionary (DESIGN 4): networks and optimizers under the names people expect."""
    state = dict(parts.get("state", {}))
    head = {"version": state.pop("version", VERSION), "epoch": state.pop("epoch", 0), "iter": state.pop("iteration", 0)}
    named = {NAMES[label][0] if label in NAMES else f"{label}_state_dict": part
             for label, part in parts.items() if label != "state"}
    return head | named | {"scheduler_state_dict": {}, "scaler_state_dict": {}} | state


def unpack(payload: Any, path: Path | str) -> dict[str, Any]:
    """The parts in one dictionary, by label. There is a "state" only when it says how far the training came.

    A state of others has `iteration` None where only epochs are known; `epoch` counts finished ones.
    """
    if not isinstance(payload, Mapping) or is_optimizer(payload):
        return {}
    found = {label: next((key for key in keys if isinstance(payload.get(key), Mapping)), None)
             for label, keys in NAMES.items()}
    found |= {match[1]: key for key in payload if (match := OTHER.fullmatch(str(key))) and match[1] not in found}
    parts = {label: payload[key] for label, key in found.items() if key}
    if "sampler_state" in payload:  # ours: all the rest is the state
        rest = {key: value for key, value in payload.items() if key not in found.values() and key != "iter"}
        return parts | {"state": {**rest, "iteration": payload["iter"]}}
    for i, optimizer in enumerate(payload.get("optimizer_states") or []):  # Lightning's; taming's second is D's
        parts.setdefault(f"optimizer{'GD'[i]}" if i < 2 else f"optimizer{i}", optimizer)
    if "G" in parts:
        parts |= _taming(parts.pop("G"))
    iteration = next((payload[key] for key in STEP_KEYS if isinstance(payload.get(key), int)), None)
    if isinstance(payload.get("epoch"), int) or iteration is not None:
        epoch = payload.get("epoch", 0) + (iteration is None and not _counts_from_1(payload))
        parts["state"] = {"version": VERSION, "iteration": iteration, "epoch": epoch}
        kept = ("config", "metadata", "scheduler_state_dict")
        parts["state"] |= {key: payload[key] for key in kept if isinstance(payload.get(key), Mapping)}
        if metric := next((payload[key] for key in ("metric", "loss") if key in payload), None):
            parts["state"]["metric"] = metric
    return parts


def _counts_from_1(payload: Mapping[str, Any]) -> bool:
    """Whether the epoch that was just finished is its own number, as LGT's; of others, that begin with 0, one less.

    A scheduler that is stepped once an epoch counts the finished ones.
    """
    scheduler = payload.get("scheduler_state_dict")
    return isinstance(scheduler, Mapping) and scheduler.get("last_epoch") == payload["epoch"]


def _taming(weights: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """G, and D where the state dict carries it with the loss, as taming's `loss.discriminator.*`; else all is G."""
    weights = {WRAPPERS.sub("", key): value for key, value in weights.items()}
    mark = "loss.discriminator."  # at the start, or below a prefix
    critic = {key.rpartition(mark)[2]: value for key, value in weights.items() if mark in key}
    own = {key: value for key, value in weights.items() if not re.search(r"(?:^|\.)loss\.", key)} if critic else weights
    return {"G": own} | ({"D": critic} if critic else {})


# ---------------------------------------------------------------- older versions of ours


def _from_1(state: dict[str, Any]) -> dict[str, Any]:
    """Version 1 (0.1.0): one process's generators; no best, no scheduler or scaler entries."""
    return state | {"rng_state": [state["rng_state"]]} if "rng_state" in state else state


MIGRATIONS = {1: _from_1}


def migrate(state: Mapping[str, Any], path: Path | str) -> dict[str, Any]:
    """A state of any version as one of this. Raises CheckpointError for one that is newer."""
    state = dict(state)
    version = state.get("version", VERSION)
    if version > VERSION:
        raise CheckpointError(f"{path}: was written by a newer Perdure (version {version}; this one reads up to "
                              f"{VERSION}); update it")
    while version < VERSION:
        state, version = MIGRATIONS[version](state), version + 1
    return state | {"version": VERSION}
