"""The one dictionary that holds a complete training state: ours, older versions of ours, and those of other programs.

Understood besides our own: KAIR, BasicSR (`params`, and its `.state`), taming and PyTorch Lightning (`state_dict`,
`global_step`, `optimizer_states`), InkTrace, LGT and plain scripts (`model_state_dict`, `optimizer_state_dict`,
`epoch`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from storage.inert import Unread, unread_in
from storage.sealed import CheckpointError

TRUST = "; or, if you trust its author, run its code: python -m checkpoint convert --trust"  # end of a message
VERSION = 3  # of the state: 1 and 2 also had the states of random generators
WRAPPERS = re.compile(r"^(?:module\.|_orig_mod\.)+")  # DistributedDataParallel's and torch.compile's, in any nesting
TRAINING = re.compile(r"epoch|check|ckpt|latest|last|best|step|iter|interrupt", re.IGNORECASE)  # in names of files
PRETRAINED = re.compile(r"vgg|resnet|alexnet|squeezenet|inception|lpips|spynet|raft|vae|clip|dino|i3d", re.IGNORECASE)
TAMING_LOSS = re.compile(r"(?:^|\.)(?:loss\.|colorize$)")  # keys in taming's files that are not the autoencoder's
TAMING_DISCRIMINATOR = "loss.discriminator."  # where such a file keeps the discriminator, perhaps below a prefix

# label -> keys under which single files keep it, ours first; then keys of which only one may be present
KEYS = {
    "G": (("model_state_dict", "state_dict", "params", "model"),
          ("net", "netG", "net_g", "network", "generator", "weights", "G", "G_state_dict", "netG_state_dict",
           "net_state_dict", "generator_state_dict", "model_state")),
    "E": (("ema_state_dict", "params_ema"), ("ema", "netE", "net_g_ema", "model_ema", "ema_model")),
    "optimizerG": (("optimizer_state_dict", "optimizer"),
                   ("optim", "optimizer_g", "optimizer_G", "optimizerG", "optim_g", "optimizer_gen",
                    "generator_optimizer_state_dict")),
    "optimizerD": (("optimizerD_state_dict", "optimizer_disc", "discriminator_optimizer_state_dict"),
                   ("optimizer_d", "optimizer_D", "optimizerD", "optim_d")),
    "D": (("D_state_dict", "discriminator_state_dict"), ("netD", "net_d", "discriminator", "netD_state_dict")),
}
OTHER = re.compile(r"([A-Z]|optimizer[A-Z])_state_dict")  # keys of further networks and optimizers
STEP_KEYS = ("iter", "iteration", "global_step", "steps", "step", "current_iter", "n_iter", "iters", "current_step")
SCHEDULERS = ("scheduler_state_dict", "scheduler", "lr_scheduler", "lr_scheduler_state_dict", "lr_schedulers",
              "schedulers")
HISTORIES = ("train_losses", "val_losses", "train_metrics_history", "val_metrics_history")  # one value per epoch


# ---------------------------------------------------------------- weights


def extract_weights(payload: Any, path: Path | str, param_key: str = "params",
                    report: Callable[[str], Any] = lambda line: None) -> dict[str, torch.Tensor]:
    """Return the state dict of the network in a loaded file, without the prefixes of wrappers.

    Args:
        payload: what the file holds: a bare state dict, or one under `param_key` or a key in KEYS.
        path: the file, for messages.
        report: called with a line where the file has a moving average, too, or nothing else.
    Raises: CheckpointError for an optimizer, or when there are no weights.
    """
    if isinstance(payload, Unread):
        raise CheckpointError(f"{path}: is a pickled object ({payload.name}), which only the program that wrote it can "
                              f"read; there, torch.save(model.state_dict(), FILE) writes what can be read here{TRUST}")
    if not isinstance(payload, Mapping):
        raise CheckpointError(f"{path}: holds a {type(payload).__name__}, not the weights of a network")
    if is_optimizer(payload):
        raise CheckpointError(f"{path}: is an optimizer's state, not a network; name the weights (_G.pth)")
    key = param_key if _is_network(payload.get(param_key)) else _find_key("G", payload) or _find_key("E", payload)
    weights = payload[key] if key else payload
    if not weights or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise no_network_error(payload, path)
    if averages := [one for one in KEYS["E"][0] if _is_network(payload.get(one))]:
        report(f"{path}: takes {key}" + (f", not the moving average in {averages[0]}" if key not in averages else ""))
    return {WRAPPERS.sub("", name): value for name, value in weights.items()}


def _find_key(label: str, payload: Mapping[str, Any]) -> str | None:
    """Return the key under which a file keeps a part, or None: it is absent, or two keys may be it."""
    fits = is_optimizer if label.startswith("optimizer") else _is_network
    certain, possible = ([key for key in keys if fits(payload.get(key))] for keys in KEYS[label])
    return certain[0] if certain else possible[0] if len(possible) == 1 else None


def _is_network(payload: Any) -> bool:
    return isinstance(payload, Mapping) and any(isinstance(value, torch.Tensor) for value in payload.values())


def is_optimizer(payload: Any) -> bool:
    """Return whether a value is the state dict of an optimizer."""
    return isinstance(payload, Mapping) and {"state", "param_groups"} <= set(payload)


def no_network_error(payload: Any, path: Path | str) -> CheckpointError:
    """Return the error for a file without a network under a known key: it names the keys, and a way out."""
    counts, words = {}, []
    for key, value in payload.items() if isinstance(payload, Mapping) else ():
        parts = value.values() if isinstance(value, Mapping) else ()
        counts[key] = sum(isinstance(part, torch.Tensor) for part in parts)
        kind = repr(value) if isinstance(value, Unread) else f"{counts[key]} tensors" if counts[key] else ""
        words.append(f"{key} ({kind})" if kind else str(key))
    listed = ", ".join(words[:12]) + (f" and {len(words) - 12} more" if len(words) > 12 else "")
    largest = max(counts, key=counts.get, default=None)
    remedy = ""
    if largest is not None and 0 < sum(count > 0 for count in counts.values()) < 9:
        remedy = (f"; if its network is {largest}, write its weights alone to a file and start with them: python -c "
                  f"\"import torch; torch.save(torch.load('{path}', weights_only=True)['{largest}'], 'weights.pth')\", "
                  "then --init-from weights.pth")
    return CheckpointError(f"{path}: holds no weights under a known key ({', '.join(sum(KEYS['G'], ()))}), only "
                           f"{listed or 'nothing'}{remedy}")


def split_taming(weights: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the weights of the autoencoder and of the discriminator in a state dict of taming's.

    Both are without the prefixes of wrappers. The second is empty where the file carries no discriminator.
    """
    weights = {WRAPPERS.sub("", key): value for key, value in weights.items()}
    discriminator = {key.rpartition(TAMING_DISCRIMINATOR)[2]: value for key, value in weights.items()
                     if TAMING_DISCRIMINATOR in key}
    return {key: value for key, value in weights.items() if not TAMING_LOSS.search(key)}, discriminator


# ---------------------------------------------------------------- complete states


def pack(parts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parts of a set as one dictionary (DESIGN 6), with the usual keys for networks and optimizers."""
    state = dict(parts.get("state", {}))
    head = {"version": state.pop("version", VERSION), "epoch": state.pop("epoch", 0), "iter": state.pop("iteration", 0)}
    named = {KEYS[label][0][0] if label in KEYS else f"{label}_state_dict": part
             for label, part in parts.items() if label != "state"}
    return head | named | {"scheduler_state_dict": {}, "scaler_state_dict": {}} | state


def pack_taming(parts: Mapping[str, Any], network: str, steps: int) -> dict[str, Any]:
    """Return the parts of a set under the keys of training scripts around taming; the discriminator is in `state_dict`.

    Args: network: label of the network to write, G or E. steps: finished iterations.
    """
    weights = parts[network] | {f"{TAMING_DISCRIMINATOR}{key}": value for key, value in parts.get("D", {}).items()}
    scheduler = parts.get("state", {}).get("scheduler_state_dict", {})
    named = {"optimizer": parts.get("optimizerG"), "optimizer_disc": parts.get("optimizerD"),
             "scheduler": scheduler.get("optimizerG")}
    return {"steps": steps, "state_dict": weights, **{key: part for key, part in named.items() if part}}


def unpack(payload: Any, path: Path | str) -> dict[str, Any]:
    """Return the parts in one dictionary, by label; "state" is among them only if the file has its iteration or epoch.

    In a state of another program `iteration` is None where only epochs are known; `epoch` counts finished ones.

    Raises: CheckpointError where a part that is needed can't be read.
    """
    if not isinstance(payload, Mapping) or is_optimizer(payload) or \
            all(isinstance(value, torch.Tensor) for value in payload.values()):  # weights, whatever their names
        return {}
    keys = {label: _find_key(label, payload) for label in KEYS}
    keys |= {match[1]: key for key in payload if (match := OTHER.fullmatch(str(key))) and match[1] not in keys}
    parts = {label: payload[key] for label, key in keys.items() if key}
    if "sampler_state" in payload:  # ours: all the rest is the state
        rest = {key: value for key, value in payload.items() if key not in keys.values() and key != "iter"}
        return parts | {"state": {**rest, "iteration": payload["iter"]}}
    optimizers = payload.get("optimizer_states") or payload.get("optimizers")  # Lightning's, BasicSR's; second: D's
    for i, optimizer in enumerate(optimizers if isinstance(optimizers, (list, tuple)) else []):
        parts.setdefault(f"optimizer{'GD'[i]}" if i < 2 else f"optimizer{i}", optimizer)
    needed = parts | {key: payload[key] for label in KEYS if label not in parts for key in sum(KEYS[label], ())
                      if isinstance(payload.get(key), Unread)}
    for label, part in needed.items():
        if found := unread_in(part):
            raise CheckpointError(f"{path}: refused: {label} holds an object ({found.name}), and only tensors and "
                                  "plain values are read; in the program that wrote it save state_dict() instead, or "
                                  f"start with the weights alone: --init-from{TRUST}")
    if "G" in parts:
        own, discriminator = split_taming(parts["G"])
        parts |= {"G": own, "D": discriminator} if discriminator else {
            "G": {WRAPPERS.sub("", key): value for key, value in parts["G"].items()}}
    iteration = _lightning_steps(payload, len(optimizers or ()))
    if iteration is None:
        iteration = next((count for key in STEP_KEYS if (count := _count(payload.get(key))) is not None), None)
    if (epoch := _count(payload.get("epoch"))) is not None or iteration is not None:
        finished = (epoch or 0) + (iteration is None and not _counts_epochs_from_1(payload, epoch))
        parts["state"] = {"version": VERSION, "iteration": iteration, "epoch": finished, **_other_values(payload)}
    return parts


def unpack_members(parts: Mapping[str, Any], path: Path | str) -> dict[str, Any]:
    """Return the parts that another program wrote to a file each: KAIR's, or BasicSR's networks and `.state`."""
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
            found[label] = extract_weights(payload, path)
            if label == "G" and _is_network(payload.get("params")) and _is_network(payload.get("params_ema")):
                found.setdefault("E", extract_weights(payload, path, "params_ema"))
    return found


def _count(value: Any) -> int | None:
    """Return a number of steps or epochs, which some programs keep as a tensor or as 5.0; None for anything else."""
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    value = int(value) if isinstance(value, float) and value.is_integer() else value
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _lightning_steps(payload: Mapping[str, Any], num_optimizers: int) -> int | None:
    """Return the finished batches of Lightning's loop, or None where `global_step` is their number.

    With several optimizers its `global_step` counts the steps of each. `processed` is counted up before checkpoints are
    written, `completed` after it.
    """
    try:
        done = _count(payload["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["processed"])
        return min(done, _count(payload["global_step"])) if num_optimizers > 1 else None
    except (KeyError, TypeError):
        return None


def _counts_epochs_from_1(payload: Mapping[str, Any], epoch: int | None) -> bool:
    """Return whether `epoch` is the number of finished epochs, as LGT writes it; most programs write one less.

    A scheduler that is stepped once an epoch counts the finished ones.
    """
    scheduler = payload.get("scheduler_state_dict")
    return isinstance(scheduler, Mapping) and scheduler.get("last_epoch") == epoch


def _other_values(payload: Mapping[str, Any]) -> dict[str, Any]:
    """Return what else of another program's file is used, under our keys, without objects that were not read."""
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
        state |= {key: _history_rows(payload[key]) for key in HISTORIES if key in payload}
    for key in ("metric", "best_val_loss", "best_loss", "loss"):
        if isinstance(payload.get(key), (int, float)):
            state["metric"] = payload[key]
            break
    return {key: value for key, value in state.items() if not unread_in(value)}


def _history_rows(history: Any) -> list:
    """Return a history as a list with an entry for each epoch, also from a dict of lists."""
    if isinstance(history, Mapping):
        return [dict(zip(history, values)) for values in zip(*history.values())]
    return [value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value for value in history]


def convert_validations(state: Mapping[str, Any], iteration: int) -> list[dict[str, Any]]:
    """Return another program's validations as rows of a run's history, spread evenly over the iterations so far."""
    losses, scores = state.get("val_losses", []), state.get("val_metrics_history", [])
    rows = []
    for i, loss in enumerate(losses):
        row = {"iteration": (i + 1) * iteration // len(losses), "test.loss": loss}
        if i < len(scores) and isinstance(scores[i], Mapping):
            row |= {f"test.{key}": value for key, value in scores[i].items() if isinstance(value, (int, float))}
        rows.append(row)
    return rows


def describe_scheduler(state: Mapping[str, Any]) -> tuple[float, str] | None:
    """Return the learning rate of another program's scheduler and a description of it; None where it holds no rate."""
    scheduler = state.get("scheduler_state_dict") or {}
    rates = scheduler.get("_last_lr")
    if not isinstance(rates, (list, tuple)) or not rates or not isinstance(rates[0], (int, float)):
        return None
    kind = "ReduceLROnPlateau" if "num_bad_epochs" in scheduler else "scheduler"
    facts = ", ".join(f"{key} {scheduler[key]}" for key in
                      ("factor", "patience", "T_max", "T_0", "eta_min", "step_size", "gamma", "milestones")
                      if isinstance(scheduler.get(key), (int, float)))
    return float(rates[0]), f"{kind} ({facts})" if facts else kind


# ---------------------------------------------------------------- versions of ours


def migrate(state: Mapping[str, Any], path: Path | str) -> dict[str, Any]:
    """Return a state of any version as one of this. Raises CheckpointError for a newer version."""
    version = state.get("version", VERSION)
    if version > VERSION:
        raise CheckpointError(f"{path}: was written by a newer Perdure (version {version}; this one reads up to "
                              f"{VERSION}); update it")
    return {**state, "version": VERSION}
