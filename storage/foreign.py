"""The one dictionary that holds a whole training state: ours, older ones of ours, and those of other programs.

Understood besides our own: KAIR, BasicSR (`params`, and its `.state`), taming and PyTorch Lightning (`state_dict`,
`global_step`, `optimizer_states`), InkTrace, LGT and plain scripts (`model_state_dict`, `optimizer_state_dict`,
`epoch`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from storage.inert import Unread, unread_in
from storage.sealed import CheckpointError

VERSION = 2  # of the state, see MIGRATIONS
WRAPPERS = re.compile(r"^(?:module\.|_orig_mod\.)+")  # DistributedDataParallel's and torch.compile's, in any nesting
TRAINING = re.compile(r"epoch|check|ckpt|latest|last|best|step|iter|interrupt", re.IGNORECASE)  # in names of files
HELPERS = re.compile(r"vgg|resnet|alexnet|squeezenet|inception|lpips|spynet|raft|vae|clip|dino|i3d", re.IGNORECASE)

# label -> names under which single files keep it, ours first; of those after None only one may be there
NAMES = {
    "G": ("model_state_dict", "state_dict", "params", "model", None, "net", "netG", "net_g", "network", "generator",
          "weights", "G", "G_state_dict", "netG_state_dict", "net_state_dict", "generator_state_dict", "model_state"),
    "E": ("ema_state_dict", "params_ema", None, "ema", "netE", "net_g_ema", "model_ema", "ema_model"),
    "optimizerG": ("optimizer_state_dict", "optimizer", None, "optim", "optimizer_g", "optimizer_G", "optimizerG",
                   "optim_g", "optimizer_gen", "generator_optimizer_state_dict"),
    "optimizerD": ("optimizerD_state_dict", "optimizer_disc", "discriminator_optimizer_state_dict", None,
                   "optimizer_d", "optimizer_D", "optimizerD", "optim_d"),
    "D": ("D_state_dict", "discriminator_state_dict", None, "netD", "net_d", "discriminator", "netD_state_dict"),
}
OTHER = re.compile(r"([A-Z]|optimizer[A-Z])_state_dict")  # of further networks and optimizers
STEP_KEYS = ("iter", "iteration", "global_step", "steps", "step", "current_iter", "n_iter", "iters", "current_step")
SCHEDULERS = ("scheduler_state_dict", "scheduler", "lr_scheduler", "lr_scheduler_state_dict", "lr_schedulers",
              "schedulers")
HISTORIES = ("train_losses", "val_losses", "train_metrics_history", "val_metrics_history")  # a value each epoch


# ---------------------------------------------------------------- weights


def weights_in(payload: Any, path: Path | str, param_key: str = "params") -> dict[str, torch.Tensor]:
    """The state dict of a network in a loaded file, without wrappers' prefixes.

    Understood: a bare dict, or one below `param_key` or a name of a network in NAMES.
    Raises: CheckpointError for an optimizer, or when there are no weights.
    """
    if isinstance(payload, Unread):
        raise CheckpointError(f"{path}: is a whole object ({payload.name}), which only the program that wrote it can "
                              "read; there, torch.save(model.state_dict(), FILE) writes what can be read here")
    if not isinstance(payload, Mapping):
        raise CheckpointError(f"{path}: holds a {type(payload).__name__}, not the weights of a network")
    if is_optimizer(payload):
        raise CheckpointError(f"{path}: is an optimizer's state, not a network; name the weights (_G.pth)")
    found = param_key if _is_network(payload.get(param_key)) else _key_of("G", payload) or _key_of("E", payload)
    weights = payload[found] if found else payload
    if not weights or not all(isinstance(v, torch.Tensor) for v in weights.values()):
        raise no_network(payload, path)
    return {WRAPPERS.sub("", key): value for key, value in weights.items()}


def _key_of(label: str, payload: Mapping[str, Any]) -> str | None:
    """Under which name a file keeps a part; None also where it is not clear which one."""
    fits = is_optimizer if label.startswith("optimizer") else _is_network
    first, _, further = (NAMES[label][: (at := NAMES[label].index(None))], None, NAMES[label][at + 1 :])
    sure = [key for key in first if fits(payload.get(key))]
    others = [key for key in further if fits(payload.get(key))]
    return sure[0] if sure else others[0] if len(others) == 1 else None


def _is_network(payload: Any) -> bool:
    return isinstance(payload, Mapping) and any(isinstance(value, torch.Tensor) for value in payload.values())


def no_network(payload: Any, path: Path | str) -> CheckpointError:
    """What to say of a file that has no network where one could be looked for: its keys, and a way out."""
    holds = []
    for key, value in payload.items() if isinstance(payload, Mapping) else ():
        count = sum(isinstance(part, torch.Tensor) for part in value.values()) if isinstance(value, Mapping) else 0
        what = repr(value) if isinstance(value, Unread) else f"{count} tensors" if count else ""
        holds.append((count, f"{key} ({what})" if what else str(key)))
    most = max(holds, default=(0, ""))
    said = ", ".join(text for _, text in holds[:12]) + (f" and {len(holds) - 12} more" if len(holds) > 12 else "")
    name = most[1].rpartition(" (")[0]
    way = (f"; if its network is {name}, write its weights alone to a file and start with them: python -c \"import "
           f"torch; torch.save(torch.load('{path}', weights_only=True)['{name}'], 'weights.pth')\", then --init-from "
           "weights.pth" if most[0] and sum(count > 0 for count, _ in holds) < 9 else "")
    return CheckpointError(f"{path}: holds no weights under a known key ({', '.join(filter(None, NAMES['G']))}), only "
                           f"{said or 'nothing'}{way}")


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
    Raises: CheckpointError where a part that is needed can't be read.
    """
    if not isinstance(payload, Mapping) or is_optimizer(payload):
        return {}
    found = {label: _key_of(label, payload) for label in NAMES}
    found |= {match[1]: key for key in payload if (match := OTHER.fullmatch(str(key))) and match[1] not in found}
    parts = {label: payload[key] for label, key in found.items() if key}
    if "sampler_state" in payload:  # ours: all the rest is the state
        rest = {key: value for key, value in payload.items() if key not in found.values() and key != "iter"}
        return parts | {"state": {**rest, "iteration": payload["iter"]}}
    optimizers = payload.get("optimizer_states") or payload.get("optimizers")  # Lightning's, BasicSR's; second: D's
    for i, optimizer in enumerate(optimizers if isinstance(optimizers, (list, tuple)) else []):
        parts.setdefault(f"optimizer{'GD'[i]}" if i < 2 else f"optimizer{i}", optimizer)
    needed = parts | {key: payload[key] for label in NAMES if label not in parts for key in NAMES[label]
                      if isinstance(payload.get(key), Unread)}
    for label, part in needed.items():
        if thing := unread_in(part):
            raise CheckpointError(f"{path}: refused: {label} holds an object ({thing.name}), and only tensors and "
                                  "plain values are read; in the program that wrote it save state_dict() instead, or "
                                  "start with the weights alone: --init-from")
    if "G" in parts:
        parts |= _taming(parts.pop("G"))
    iteration = _loops(payload, len(optimizers or ()))
    if iteration is None:
        iteration = next((count for key in STEP_KEYS if (count := _count(payload.get(key))) is not None), None)
    if (epoch := _count(payload.get("epoch"))) is not None or iteration is not None:
        finished = (epoch or 0) + (iteration is None and not _counts_from_1(payload, epoch))
        parts["state"] = {"version": VERSION, "iteration": iteration, "epoch": finished, **_kept(payload)}
    return parts


def _count(value: Any) -> int | None:
    """A number of steps or epochs, which some keep in a tensor, or as 5.0."""
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    value = int(value) if isinstance(value, float) and value.is_integer() else value
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _loops(payload: Mapping[str, Any], num_optimizers: int) -> int | None:
    """Steps that Lightning's loop has done: with several optimizers its `global_step` counts the steps of each.

    `processed` is counted up before checkpoints are written, `completed` after it.
    """
    try:
        done = _count(payload["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["processed"])
        return min(done, _count(payload["global_step"])) if num_optimizers > 1 else None
    except (KeyError, TypeError):
        return None


def _kept(payload: Mapping[str, Any]) -> dict[str, Any]:
    """Of another program's file what else is of use, under our names, as far as it is plain."""
    state = {key: payload[key] for key in ("config", "metadata") if isinstance(payload.get(key), Mapping)}
    for key in SCHEDULERS:
        value = payload.get(key)
        value = value[0] if isinstance(value, (list, tuple)) and value else value
        if isinstance(value, Mapping) and value:
            state["scheduler_state_dict"] = value
            break
    scaler = payload.get("scaler_state_dict", payload.get("scaler"))
    if isinstance(scaler, Mapping) and {"scale", "growth_factor", "_growth_tracker"} <= set(scaler):
        state["scaler_state_dict"] = scaler
    if isinstance(payload.get("val_losses"), (list, tuple)):
        state |= {key: _rows(payload[key]) for key in HISTORIES if key in payload}
    for key in ("metric", "best_val_loss", "best_loss", "loss"):
        if isinstance(payload.get(key), (int, float)):
            state["metric"] = payload[key]
            break
    return {key: value for key, value in state.items() if not unread_in(value)}


def _rows(history: Any) -> list:
    """A history with an entry an epoch, also from a dict of such lists."""
    if isinstance(history, Mapping):
        return [dict(zip(history, values)) for values in zip(*history.values())]
    return [value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value for value in history]


def validations(state: Mapping[str, Any], iteration: int) -> list[dict[str, Any]]:
    """The validations in a state of others as rows of a run's history, spread evenly over the iterations so far."""
    losses, scores = state.get("val_losses", []), state.get("val_metrics_history", [])
    rows = []
    for i, loss in enumerate(losses):
        row = {"iteration": (i + 1) * iteration // len(losses), "test.loss": loss}
        if i < len(scores) and isinstance(scores[i], Mapping):
            row |= {f"test.{key}": value for key, value in scores[i].items() if isinstance(value, (int, float))}
        rows.append(row)
    return rows


def describe_scheduler(state: Mapping[str, Any]) -> tuple[float, str] | None:
    """The learning rate at which another program's scheduler stood, and what it was; None where it does not say."""
    scheduler = state.get("scheduler_state_dict") or {}
    rates = scheduler.get("_last_lr")
    if not isinstance(rates, (list, tuple)) or not rates or not isinstance(rates[0], (int, float)):
        return None
    kind = "ReduceLROnPlateau" if "num_bad_epochs" in scheduler else "scheduler"
    facts = ", ".join(f"{key} {scheduler[key]}" for key in
                      ("factor", "patience", "T_max", "T_0", "eta_min", "step_size", "gamma", "milestones")
                      if isinstance(scheduler.get(key), (int, float)))
    return float(rates[0]), f"{kind} ({facts})" if facts else kind


def unpack_members(parts: Mapping[str, Any], path: Path | str) -> dict[str, Any]:
    """The parts in files of their own that others wrote: KAIR's, or BasicSR's networks and `.state`."""
    found = {}
    for label, payload in parts.items():
        if label == "state":
            found |= unpack(payload, path) if "sampler_state" not in payload else {"state": payload}
        elif label.startswith("optimizer"):
            if thing := unread_in(payload):
                raise CheckpointError(f"{path}: refused: {label} holds an object ({thing.name})")
            if not is_optimizer(payload):
                raise CheckpointError(f"{path}: its {label} is not an optimizer's state; move that file elsewhere to "
                                      "resume without it")
            found[label] = payload
        else:
            found[label] = weights_in(payload, path)
            if label == "G" and _is_network(payload.get("params")) and _is_network(payload.get("params_ema")):
                found.setdefault("E", weights_in(payload, path, "params_ema"))
    return found


def _counts_from_1(payload: Mapping[str, Any], epoch: int | None) -> bool:
    """Whether the epoch that was just finished is its own number, as LGT's; of others, that begin with 0, one less.

    A scheduler that is stepped once an epoch counts the finished ones.
    """
    scheduler = payload.get("scheduler_state_dict")
    return isinstance(scheduler, Mapping) and scheduler.get("last_epoch") == epoch


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
