"""What every model shares: networks and optimizers by label, saving, loading, learning rate, wrappers.

KAIR's verbs (cszn/KAIR models/model_base.py), with two differences: what is restored comes from one verified set,
and the learning rate is a function of the step, so there is no scheduler to restore.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

import checkpoint
from models import NETWORKS
from options import build, models_folder
from runtime import distributed
from runtime.ranges import NonNegativeInt, PositiveInt, Seed
from runtime.schedules import Schedule
from storage import tree


class ModelBase:
    """Holds `networks` {"G": ...} and `optimizers` {"optimizerG": ...}; a subclass says what they are and do."""

    @dataclass
    class TrainOptions:
        """The `train` section: what the loop reads. Subclasses add their own keys."""

        total_iter: PositiveInt = 300_000  # optimizer steps of G in the whole run
        total_epochs: PositiveInt | None = None  # length of the run in epochs, instead of total_iter; null: total_iter
        checkpoint_print: NonNegativeInt = 200  # iterations from one line of losses to the next; 0: no lines
        checkpoint_save: NonNegativeInt = 5000  # iterations from one checkpoint to the next; 0: only after the last one
        checkpoint_test: NonNegativeInt = 5000  # iterations from one validation to the next; 0: only after the last one
        save_interval: PositiveInt | None = None  # epochs from one checkpoint to the next, instead of checkpoint_save
        eval_interval: PositiveInt | None = None  # epochs from one validation to the next, instead of checkpoint_test
        resume_checkpoint: str | None = None  # checkpoint to resume from once, as with --resume; then the run's newest
        manual_seed: Seed = 0  # seed of weights, data order and all random draws; equal seeds repeat a run
        on_nan: Literal["stop", "skip"] = "stop"  # stop at a non-finite loss, or skip that step and count it
        nan_limit: PositiveInt = 20  # steps skipped in a row (on_nan "skip") at which the run stops
        amp: Literal["bf16", "fp16"] | None = None  # half precision of forward passes; weights and loss stay in float32
        compile: bool = False  # compile the forward pass of G (torch.compile): minutes at the start, then faster
        accumulate: PositiveInt = 1  # micro-batches per step: more take less memory for the same batch

    @dataclass
    class ValOptions:
        """The `val` section."""

        save_img: bool = True  # write a picture of each validated clip: input | restored | target, as PNG
        num_img: NonNegativeInt | None = None  # clips of each test set that get a picture; null: all

    def __init__(self, opt: Mapping[str, Any]):
        self.opt = opt
        self.opt_train = opt["train"]
        self.save_dir = Path(models_folder(opt))
        self.device = distributed.device_for(opt)
        self.networks: dict[str, nn.Module] = {}
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        self.schedules: dict[str, Schedule] = {}
        self.averaged: tuple | None = None  # parameters and buffers of E and G, side by side
        self.baseline_name = ""  # of what a result has to beat, in the names of metrics
        self.shown: list[Tensor] = []  # pictures of what was validated last, (C, H, W) in [0, 1]
        self.log_dict: dict[str, Tensor] = OrderedDict()  # loss terms of the last step, still tensors
        self.gradient_norms: dict[str, Tensor] = {}  # of the last step, by optimizer, still tensors
        self.skipped = self.skipped_in_a_row = 0  # steps left out because of train.on_nan
        self.scaler = torch.amp.GradScaler(self.device.type) if self.opt_train["amp"] == "fp16" else None

    # ------------------------------------------------ a subclass says

    def init_train(self, parts: Mapping[str, Any] | None = None, source: str = "checkpoint") -> list[str]:
        """Make ready to train, from a checkpoint's parts or from `path.pretrained_*`. Returns report lines.

        Args: source: where the parts come from, for messages.
        """
        raise NotImplementedError

    def feed_data(self, data: Mapping[str, Any], need_H: bool = True) -> None:
        raise NotImplementedError

    def optimize_parameters(self, current_step: int) -> None:
        raise NotImplementedError

    def test(self) -> None:
        raise NotImplementedError

    def validate(self, sample: Any) -> dict[str, float]:
        """Metrics of one sample of a test set, which leaves its pictures in `shown`."""
        self.feed_data(sample)
        self.test()
        self.shown = self.pictures()
        return self.metrics()

    def metrics(self) -> dict[str, float]:
        """Of what `test` left: name -> value; those of a baseline, if any, end in `_` and `baseline_name`."""
        raise NotImplementedError

    def summarize(self, name: str, rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """Metrics of the test set of this name from those of its samples: their means, unless a recipe counts.

        Each process has tested some of the samples, but here are the rows of all.
        """
        return mean_of(rows)

    def is_printed(self, metric: str) -> bool:
        """Whether a metric stands in the line about a test set, too, not only in `test.csv`."""
        return True

    def pictures(self) -> list[Tensor]:
        """Of what `test` left: (C, H, W) images in [0, 1], shown side by side."""
        raise NotImplementedError

    # ------------------------------------------------ a subclass that can be used on files of one's own says

    @staticmethod
    def prepare_use(opt: Mapping[str, Any]) -> None:
        """Take out of the options what only training needs, as files that weights begin with."""

    def load_use(self, payload: Mapping[str, Any], source: str) -> str:
        """Take the weights to use from a set's parts or from a loaded file. Returns a report line."""
        raise checkpoint.CheckpointError(f"model {self.opt['model']!r} can't be used on its own yet")

    def results(self, source: str, truth: str | None, wanted: Callable[[str], bool]) -> Iterator[Any]:
        """First how many results `source` leads to, then of each that is wanted (file name, content, metrics).

        A content is a picture (C, H, W) in [0, 1], or arrays by name, for a file that ends in .npz.

        Args: truth: what the results should be; None: unknown, and metrics are None. wanted: by file name.
        """
        raise ValueError(f"model {self.opt['model']!r} can't be used on files of one's own yet; leave --input out")

    def summarize_results(self, rows: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
        """Metrics of all results from those of each, by file name: the same way as `summarize` for a test set."""
        return mean_of(list(rows.values()))

    result_options: Sequence[str] = ()  # keys of `val` that results depend on: with others they are kept apart
    shares_tests = True  # whether each process tests some of a set's samples; else the main one tests all
    best_metric = "psnr", "max"  # which test metric says that a checkpoint is the best, and which way

    # ------------------------------------------------ networks

    def define_network(self, label: str) -> nn.Module:
        """Build `net{label}` from its option section and put it on the device."""
        return build(NETWORKS, self.opt[f"net{label}"], "net_type").to(self.device)

    def share(self, network: nn.Module) -> nn.Module:
        """What to call in training instead of the network, so that several processes learn as one."""
        if self.opt["sync_batchnorm"]:
            distributed.synchronize_batchnorm(network)
        return distributed.wrap(network, self.opt["find_unused_parameters"], self.opt["use_static_graph"])

    @staticmethod
    def get_bare_model(network: nn.Module) -> nn.Module:
        """The network itself, below DistributedDataParallel and torch.compile in any nesting."""
        while isinstance(inner := getattr(network, "module", getattr(network, "_orig_mod", None)), nn.Module):
            network = inner
        return network

    def describe_network(self, network: nn.Module) -> str:
        """Name, parameter count and structure, for the log."""
        bare = self.get_bare_model(network)
        count = sum(p.numel() for p in bare.parameters())
        return f"{type(bare).__name__}, {count:,} parameters\n{bare}"

    def update_E(self, decay: float = 0.999) -> None:
        """E = decay * E + (1 - decay) * G over the parameters; buffers are copied."""
        pair = tuple(self.get_bare_model(self.networks[label]) for label in ("E", "G"))
        if self.averaged is None or self.averaged[0] != pair:  # to walk through modules takes longer than to average
            self.averaged = pair, [list(net.parameters()) for net in pair], [list(net.buffers()) for net in pair]
        _, (kept, current), (kept_buffers, buffers) = self.averaged
        with torch.no_grad():
            torch._foreach_lerp_(kept, current, 1 - decay)
            if buffers:
                torch._foreach_copy_(kept_buffers, buffers)

    # ------------------------------------------------ saving

    def parts(self) -> dict[str, Any]:
        """State dicts of every network (bare) and optimizer, by label, as they are: on their device, not copied."""
        states = {label: self.get_bare_model(net).state_dict() for label, net in self.networks.items()}
        return states | {label: optimizer.state_dict() for label, optimizer in self.optimizers.items()}

    def extra_state(self, finished: int) -> dict[str, Any]:
        """What else of the model makes the step after n finished ones, plain types and tensors; recipes add to it."""
        rates = {label: [self.schedules[label](group["initial_lr"], finished) for group in optimizer.param_groups]
                 for label, optimizer in self.optimizers.items()}  # for others: ours follow from the step
        return {"skipped": self.skipped, "skipped_in_a_row": self.skipped_in_a_row,
                "scheduler_state_dict": {k: {"last_epoch": finished, "_last_lr": v} for k, v in rates.items()},
                "scaler_state_dict": self.scaler.state_dict() if self.scaler else {}}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """The same back; what is absent stays as it is."""
        self.skipped, self.skipped_in_a_row = state.get("skipped", 0), state.get("skipped_in_a_row", 0)
        if self.scaler and state.get("scaler_state_dict"):
            self.scaler.load_state_dict(state["scaler_state_dict"])

    def local_state(self) -> dict[str, Any]:
        """Of `extra_state` what each process has of its own, besides generators; it is saved of each."""
        return {}

    def load_local_state(self, states: Sequence[Mapping[str, Any]]) -> None:
        """The same back, from all processes that there were; how many there are now may differ."""

    def save_network(self, save_dir: str, network: nn.Module, network_label: str, iter_label: int | str) -> None:
        """Write one network's weights as `{iter}_{label}.pth`."""
        path = os.path.join(save_dir, f"{iter_label}_{network_label}.pth")
        checkpoint.save_file(path, tree.to_cpu(self.get_bare_model(network).state_dict()))

    def save_optimizer(self, save_dir: str, optimizer, optimizer_label: str, iter_label: int | str) -> None:
        """Write one optimizer's state as `{iter}_{label}.pth`."""
        path = os.path.join(save_dir, f"{iter_label}_{optimizer_label}.pth")
        checkpoint.save_file(path, tree.to_cpu(optimizer.state_dict()))

    # ------------------------------------------------ loading

    def load_network(self, load_path: str, network: nn.Module, strict: bool = True, param_key: str = "params") -> str:
        """Load weights from a file that we, KAIR, BasicSR, Lightning or the like wrote. Returns a one-line report.

        Lenient (strict False) goes by name and shape, and by position only if every shape agrees in order.
        Raises: CheckpointError, one line.
        """
        weights = checkpoint.extract_weights(checkpoint.load_file(load_path), load_path, param_key)
        return self.load_weights(network, weights, strict, str(load_path))

    def load_weights(self, network: nn.Module, weights: Mapping[str, Tensor], strict: bool, source: str) -> str:
        """The same from a state dict in memory."""
        bare = self.get_bare_model(network)
        own, all_keys = bare.state_dict(), list(weights)
        prefix = _common_prefix(own, weights)
        weights = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
        fitting = {k: v for k, v in weights.items() if k in own and v.shape == own[k].shape}
        how = "by name"
        same_order = [v.shape for v in weights.values()] == [v.shape for v in own.values()]
        if not strict and len(fitting) < len(own) and same_order:
            fitting, how = dict(zip(own, weights.values())), "by position"
        missing = [k for k in own if k not in fitting]
        skipped = [k for k in weights if k not in fitting] if how == "by name" else []
        if strict and (missing or skipped):
            raise checkpoint.CheckpointError(f"{source}: the weights are of another architecture: "
                                             + _mismatch(own, weights, missing, skipped))
        if not fitting:
            raise checkpoint.CheckpointError(f"{source}: no tensor fits {type(bare).__name__} by name and shape")
        bare.load_state_dict(fitting, strict=False)
        report = f"{source}: {len(fitting)} of {len(own)} tensors loaded {how}"
        if prefix:
            report += f" below {prefix!r}"
            skipped += [k for k in all_keys if not k.startswith(prefix)]
        for name, keys in (("missing", missing), ("skipped", skipped)):
            report += f"; {name} {len(keys)}: {_some(keys)}" if keys else ""
        return report

    def init_weights(self, network: nn.Module, weights: Mapping[str, Tensor], source: str,
                     architecture: Mapping[str, Any] | None, strict: bool) -> list[str]:
        """Begin with weights of another run, by name and shape. Returns a table: loaded, new, dropped.

        Args:
            architecture: options of the network that the weights are of, if known.
            strict: refuse a tensor whose name fits and whose shape does not, rather than drop it.
        Raises: CheckpointError, one line.
        """
        own = self.get_bare_model(network).state_dict()
        if reshaped := [k for k, v in weights.items() if k in own and v.shape != own[k].shape]:
            label = next(label for label, known in self.networks.items() if known is network)
            then, now = architecture or {}, self.opt[f"net{label}"]
            reasons = [f"net{label}.{key} {then.get(key, 'default')} against {now.get(key, 'default')} here"
                       for key in {**then, **now} if then and then.get(key) != now.get(key)]
            if strict:
                raise checkpoint.CheckpointError(
                    f"{source}: is of another architecture: " + (", ".join(reasons) + "; " if reasons else "")
                    + f"{_mismatch(own, weights, [], reshaped)}; set train.G_param_strict to false to begin without it")
        report = self.load_weights(network, weights, False, source)
        if "by name" not in report or " below " in report:
            return [report]
        loaded = [k for k in own if k in weights and k not in reshaped]
        groups = (("loaded", loaded), ("new", [k for k in own if k not in loaded]),
                  ("dropped", [k for k in weights if k not in loaded]))
        return [source, *(f"{name:<8}{len(keys):>5} tensors" + (f"  {_by_module(keys)}" if keys else "")
                          for name, keys in groups)]

    def load_optimizer(self, load_path: str, optimizer: torch.optim.Optimizer) -> None:
        """Load an optimizer's state; the options' hyper-parameters stay in force."""
        payload = checkpoint.load_file(load_path)
        if not checkpoint.is_optimizer(payload):
            raise checkpoint.CheckpointError(f"{load_path}: is no optimizer's state (no 'state' and 'param_groups')")
        self.load_optimizer_state(optimizer, payload, str(load_path))

    def load_optimizer_state(self, optimizer: torch.optim.Optimizer, state: Mapping[str, Any], source: str) -> None:
        """The same from a state dict in memory."""
        chosen = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        saved = [len(group["params"]) for group in state["param_groups"]]
        if saved != [len(group["params"]) for group in optimizer.param_groups]:
            raise checkpoint.CheckpointError(
                f"{source}: parameter groups of {saved} tensors don't fit this optimizer's "
                f"{[len(g['params']) for g in optimizer.param_groups]}; was it made with other options?")
        numbers = [n for group in state["param_groups"] for n in group["params"]]
        for number, parameter in zip(numbers, (p for group in optimizer.param_groups for p in group["params"])):
            for name, value in state["state"].get(number, {}).items():
                if isinstance(value, Tensor) and value.ndim and value.shape != parameter.shape:
                    raise checkpoint.CheckpointError(f"{source}: {name} {tuple(value.shape)} does not fit a parameter "
                                                     f"of {tuple(parameter.shape)}; was it made with other options?")
        # What the options say wins over what was saved, and decides where `step` lies: a fused kernel wants it on the
        # parameter's device, and most other programs save it on the CPU.
        groups = [{**group, **options} for group, options in zip(state["param_groups"], chosen)]
        optimizer.load_state_dict({"state": state["state"], "param_groups": groups})
        for parameter, values in optimizer.state.items():
            for name, value in values.items():  # fused steps walk through memory: a moment lies as its parameter does
                if isinstance(value, Tensor) and value.ndim and value.stride() != parameter.stride():
                    values[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)

    # ------------------------------------------------ a step

    def autocast(self) -> torch.autocast:
        """For forward passes: half precision as `train.amp` says."""
        kind = {"bf16": torch.bfloat16, "fp16": torch.float16, None: None}[self.opt_train["amp"]]
        return torch.autocast(self.device.type, dtype=kind, enabled=kind is not None)

    def backward(self, loss: Tensor) -> None:
        """Add a loss's gradients, scaled where fp16 needs it."""
        (self.scaler.scale(loss) if self.scaler else loss).backward()

    def step(self, optimizer: torch.optim.Optimizer, clip: float | None = None) -> bool:
        """Make one optimizer step, the norm of its whole gradient limited to `clip`.

        Returns: whether it was made: a gradient that is not finite would spoil weights and moments for good. Where
        looking costs nothing or was asked for (see `unusable`) the step is left out; else the loop looks at the norms
        before the next checkpoint. With fp16 the scaler leaves such steps out by itself.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if self.scaler:
            if clip:
                self.scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(parameters, clip)
            self.scaler.step(optimizer)
            self.scaler.update()
            return True
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        label = next((label for label, own in self.optimizers.items() if own is optimizer), "optimizer")
        self.gradient_norms[f"gradient norm of {label}"] = norm
        if self.unusable(norm):
            return False
        if clip:
            torch.nn.utils.clip_grads_with_norm_(parameters, clip, norm)
        optimizer.step()
        return True

    @contextlib.contextmanager
    def skipping(self) -> Iterator[None]:
        """Around a step: with `on_nan` "skip", put back the buffers that a step that is left out has spoilt."""
        if self.opt_train["on_nan"] != "skip":
            yield
            return
        moving = [tensor for network in self.networks.values()
                  for tensor in (*network.buffers(), *(p for p in network.parameters() if not p.requires_grad))
                  if tensor.is_floating_point()]
        kept, skipped = [tensor.clone() for tensor in moving], self.skipped
        yield
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if self.skipped > skipped else 0
        if self.skipped_in_a_row:
            with torch.no_grad():
                for tensor, before in zip(moving, kept):
                    if not tensor.isfinite().all():
                        tensor.copy_(before)

    def find_non_finite(self) -> str | None:
        """The name of a weight or moment that is NaN or infinite, or of a buffer that is NaN; waits for the device."""
        named = {f"{label}.{name}": value.detach() for label, network in self.networks.items()
                 for name, value in (*network.named_parameters(), *network.named_buffers())}
        named |= {f"{label}.{i}.{name}": value for label, optimizer in self.optimizers.items()
                  for i, values in enumerate(optimizer.state.values()) for name, value in values.items()
                  if isinstance(value, Tensor) and value.ndim}
        named = {name: value for name, value in named.items() if value.is_floating_point() and value.numel()}
        norms = torch._foreach_norm(list(named.values()), float("inf"))
        largest = torch.stack([norm.to(self.device, torch.float32) for norm in norms]).cpu()
        buffers = {f"{label}.{name}" for label, network in self.networks.items() for name, _ in network.named_buffers()}
        return next((name for name, value in zip(named, largest.tolist())
                     if value != value or value == float("inf") and name not in buffers), None)

    # ------------------------------------------------ learning rate and log

    def unusable(self, loss: Tensor) -> bool:
        """Whether to leave this step out for a NaN or infinite loss; to be asked before its backward pass.

        Looks where it costs nothing (CPU, where NaN coordinates would crash grid_sample's backward kernel) or was
        asked for ("skip"); else the loop looks at the losses later, all at once.
        """
        skip = self.opt_train["on_nan"] == "skip"
        if not (skip or loss.device.type == "cpu"):
            return False
        bad = not torch.isfinite(loss)
        if not (distributed.any_rank(bad) if skip else bad):  # all processes leave a step out, or none
            return False
        self.skipped += skip
        return True

    def update_learning_rate(self, n: int) -> None:
        """Set every learning rate for the step after n finished ones."""
        for label, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = self.schedules[label](group["initial_lr"], n)

    def current_learning_rate(self) -> float:
        """The first optimizer's, first group's."""
        return next(iter(self.optimizers.values())).param_groups[0]["lr"]

    def current_log(self) -> dict[str, float]:
        """Loss terms of the last step as numbers: this waits for the device."""
        return {name: float(value) for name, value in self.log_dict.items()}


def mean_of(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each column."""
    return {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}


def _common_prefix(own: Mapping, weights: Mapping) -> str:
    """What stands before every key of a network in a file that holds more, as Lightning's "model."; "" if nothing."""
    first = next(iter(own), "")
    if first not in weights:
        for key in weights:
            prefix = key.removesuffix(first)
            if key.endswith(f".{first}") and all(f"{prefix}{k}" in weights for k in own):
                return prefix
    return ""


def _by_module(keys: list[str]) -> str:
    """'encoder.stem1 (6), encoder.features (40)': the modules that keys belong to, as deep as few words allow."""
    for depth in (4, 3, 2, 1):
        counts = Counter(".".join(key.split(".")[:-1][:depth]) or key for key in keys)
        if len(counts) <= 8:
            break
    words = [f"{module} ({count})" for module, count in counts.most_common(8)]
    return ", ".join(words) + (f", and {len(counts) - 8} modules more" if len(counts) > 8 else "")


def _some(keys: list[str], most: int = 3) -> str:
    return ", ".join(keys[:most]) + (", ..." if len(keys) > most else "")


def _mismatch(own: Mapping, weights: Mapping, missing: list[str], skipped: list[str]) -> str:
    """Why weights do not fit a network, in one line."""
    reshaped = [f"{k} {tuple(weights[k].shape)} instead of {tuple(own[k].shape)}" for k in skipped if k in own]
    absent = [k for k in missing if k not in weights]
    unknown = [k for k in skipped if k not in own]
    reasons = [f"{len(keys)} {what}: {_some(keys, 2)}" for what, keys in
               (("of another shape", reshaped), ("missing", absent), ("unknown", unknown)) if keys]
    return "; ".join(reasons)
