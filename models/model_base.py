"""The base class of all models: networks and optimizers by label, saving, loading; the step is in models/step.py.

Source: cszn/KAIR models/model_base.py, whose verbs these are. Differs in two ways: a checkpoint is restored from one
verified set, and the learning rate is a function of the step, so no scheduler has state.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

import checkpoint
from models import NETWORKS
from models.step import TrainingStep
from options import build, models_folder
from runtime import distributed
from runtime.ranges import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Seed
from runtime.schedules import Schedule
from storage import tree


class ModelBase(TrainingStep):
    """Hold `networks` {"G": ...} and `optimizers` {"optimizerG": ...}, which a subclass defines and trains."""

    @dataclass
    class TrainOptions:
        """Declare the keys of the `train` section that the training loop reads; subclasses add theirs."""

        total_iter: PositiveInt = 300_000  # optimizer steps of G in the whole run
        total_epochs: PositiveInt | None = None  # length of the run in epochs, instead of total_iter; null: total_iter
        checkpoint_print: NonNegativeInt = 200  # iterations between two lines of losses; 0: no lines
        checkpoint_save: NonNegativeInt = 5000  # iterations between two checkpoints; 0: only the last
        checkpoint_test: NonNegativeInt = 5000  # iterations between two validations; 0: only the last
        save_interval: PositiveInt | None = None  # epochs between two checkpoints, instead of checkpoint_save
        eval_interval: PositiveInt | None = None  # epochs between two validations, instead of checkpoint_test
        resume_checkpoint: str | None = None  # checkpoint that the first start resumes from; later the newest
        manual_seed: Seed = 0  # seed of weights, data order and all random draws; equal seeds repeat a run
        on_nan: Literal["stop", "skip"] = "stop"  # at a non-finite loss stop the run, or skip the step
        nan_limit: PositiveInt = 20  # consecutive skipped steps after which the run stops
        amp: Literal["bf16", "fp16"] | None = None  # precision of forward passes; null: float32, as weights and loss
        # Time from the start by which the run must have stopped, as by SIGUSR1, and saved: "11h30m", "90m", seconds, or
        # "slurm" for the end of the job; null: no limit.
        stop_after: str | PositiveFloat | None = None
        # Seconds that a scheduler grants between its signal and the kill; a start warns where a stop may take longer.
        grace: PositiveFloat | None = None
        # Seconds without the end of a step, sample or save after which a process counts as hung and is ended; 0: never;
        # null: 1800 with several processes, else never.
        watchdog: NonNegativeFloat | None = None
        compile: bool = False  # compile G's forward pass (torch.compile): a slow start, then faster
        accumulate: PositiveInt = 1  # micro-batches per optimizer step, over all processes; more need less memory

    @dataclass
    class ValOptions:
        """Declare the keys of the `val` section; subclasses add theirs."""

        save_img: bool = True  # write a PNG of each validated sample: input | restored | target
        num_img: NonNegativeInt | None = None  # samples of each test set that get a picture; null: all

    def __init__(self, opt: Mapping[str, Any]):
        super().__init__()
        self.opt = opt
        self.opt_train = opt["train"]
        self.save_dir = Path(models_folder(opt))
        self.device = distributed.device_for(opt)
        self.networks: dict[str, nn.Module] = {}
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        self.schedules: dict[str, Schedule] = {}
        self.baseline_name = ""  # suffix of the metrics of the baseline, e.g. "bicubic"
        self.sample: tuple | None = None  # test set and number of the sample that is validated
        self.shown: list[Tensor] = []  # pictures of the last validated sample, (C, H, W) in [0, 1]
        self.frame_rows: list[dict[str, float]] = []  # metrics of each frame of the last validated sample, if it is one
        self.scaler = torch.amp.GradScaler(self.device.type) if self.opt_train["amp"] == "fp16" else None

    # ------------------------------------------------ what a subclass implements

    def init_train(self, parts: Mapping[str, Any] | None = None, source: str = "checkpoint") -> list[str]:
        """Prepare for training, with weights of a checkpoint or of `path.pretrained_*`.

        Args:
            parts: state dicts of a checkpoint by label; None: there is none.
            source: name of the checkpoint in messages.
        Returns: report lines for the log.
        """
        raise NotImplementedError

    def feed_data(self, data: Mapping[str, Any], need_H: bool = True) -> None:
        """Move a batch to the device; without `need_H` its targets are ignored."""
        raise NotImplementedError

    def close_epoch(self) -> dict[str, float]:
        """Return the means of the epoch that ended with the last step, for the log; {}: the recipe counts none."""
        return {}

    def test(self) -> None:
        """Run the network on the batch of `feed_data` without gradients."""
        raise NotImplementedError

    def validate(self, sample: Any) -> dict[str, float]:
        """Return the metrics of one sample of a test set, and keep its pictures in `shown`."""
        self.feed_data(sample)
        self.test()
        self.shown = self.pictures()
        return self.metrics()

    def metrics(self) -> dict[str, float]:
        """Return metrics of the last `test` by name; names of the baseline's metrics end in `_{baseline_name}`."""
        raise NotImplementedError

    def summarize(self, name: str, rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """Return the metrics of a test set: here the mean over its samples.

        Args: name: of the test set. rows: metrics of all its samples, from all ranks.
        """
        return mean_of(rows)

    def is_printed(self, metric: str) -> bool:
        """Tell whether the log line of a test set shows a metric; `test.csv` has all."""
        return True

    def pictures(self) -> list[Tensor]:
        """Return the images (C, H, W) in [0, 1] that show the last `test` side by side."""
        raise NotImplementedError

    # ------------------------------------------------ inference on a user's files (--test --input)

    @staticmethod
    def prepare_inference(opt: Mapping[str, Any]) -> None:
        """Remove options that only training needs, such as files of initial weights."""

    def load_for_inference(self, payload: Mapping[str, Any], source: str) -> str:
        """Load weights from the parts of a checkpoint or from a loaded file. Returns a report line."""
        raise checkpoint.CheckpointError(f"model {self.opt['model']!r} does not support inference on files")

    def infer(self, source: str, truth: str | None, wanted: Callable[[str], bool]) -> Iterator[Any]:
        """Yield the number of output files, then (file name, content, metrics) of each wanted one.

        A content is a picture (C, H, W) in [0, 1], or for a .npz file arrays by name.

        Args:
            source: input folder or file.
            truth: folder of ground truth; None: metrics are None.
            wanted: tells by file name whether an output is to be computed.
        """
        raise ValueError(f"model {self.opt['model']!r} does not support inference on files; omit --input")

    def summarize_inference(self, rows: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
        """Return the metrics of all outputs, computed from `rows` (by file name) as `summarize` does."""
        return mean_of(list(rows.values()))

    shown_output = "{}.png"  # name of the output of a video's frame that a video of outputs shows
    inference_options: Sequence[str] = ()  # keys of `val` that outputs depend on; a folder holds outputs of equal ones
    shares_tests = True  # whether all ranks share the samples of a test set; else rank 0 tests all
    best_metric = "psnr", "max"  # test metric that selects the best checkpoint, and its better direction

    # ------------------------------------------------ networks

    def define_network(self, label: str) -> nn.Module:
        """Build network `label` from the option section `net{label}`, on the device."""
        return build(NETWORKS, self.opt[f"net{label}"], "net_type").to(self.device)

    @staticmethod
    def get_bare_model(network: nn.Module) -> nn.Module:
        """Return a network without the wrappers of torch.compile and DataParallel."""
        while isinstance(inner := getattr(network, "module", getattr(network, "_orig_mod", None)), nn.Module):
            network = inner
        return network

    def describe_network(self, network: nn.Module) -> str:
        """Return name, number of parameters and structure of a network, for the log."""
        bare = self.get_bare_model(network)
        count = sum(p.numel() for p in bare.parameters())
        return f"{type(bare).__name__}, {count:,} parameters\n{bare}"

    # ------------------------------------------------ saving

    def parts(self) -> dict[str, Any]:
        """Return the state dicts of all networks and optimizers by label, neither copied nor moved."""
        states = {label: self.get_bare_model(net).state_dict() for label, net in self.networks.items()}
        return states | {label: optimizer.state_dict() for label, optimizer in self.optimizers.items()}

    def extra_state(self, finished: int) -> dict[str, Any]:
        """Return the extra state needed to resume after n finished steps: plain types and tensors."""
        rates = {label: [self.schedules[label](group["initial_lr"], finished) for group in optimizer.param_groups]
                 for label, optimizer in self.optimizers.items()}  # for other programs: here rates follow from the step
        return {"skipped": self.skipped, "skipped_in_a_row": self.skipped_in_a_row,
                "scheduler_state_dict": {k: {"last_epoch": finished, "_last_lr": v} for k, v in rates.items()},
                "scaler_state_dict": self.scaler.state_dict() if self.scaler else {}}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Restore the state of `extra_state`; absent entries leave the current value."""
        self.skipped, self.skipped_in_a_row = state.get("skipped", 0), state.get("skipped_in_a_row", 0)
        if self.scaler and state.get("scaler_state_dict"):
            self.scaler.load_state_dict(state["scaler_state_dict"])

    # A run commits checkpoints by `Run.save`. These are KAIR's verbs, for other programs that use a model: rank 0
    # writes bare files without a record.

    def save(self, iter_label: int | str) -> None:
        """Write all networks and optimizers to the folder of checkpoints, each by the verb below of its kind."""
        for label, network in self.networks.items():
            self.save_network(self.save_dir, network, label, iter_label)
        for label, optimizer in self.optimizers.items():
            self.save_optimizer(self.save_dir, optimizer, label, iter_label)

    def save_network(self, save_dir: str | Path, network: nn.Module, network_label: str, iter_label: int | str) -> None:
        """Write the weights of one network as `{iter}_{label}.pth` in any folder, e.g. label "G"."""
        self._save_part(self.get_bare_model(network), Path(save_dir) / f"{iter_label}_{network_label}.pth")

    def save_optimizer(self, save_dir: str | Path, optimizer: torch.optim.Optimizer, optimizer_label: str,
                       iter_label: int | str) -> None:
        """Write the state of one optimizer as `{iter}_{label}.pth` in any folder, e.g. label "optimizerG"."""
        self._save_part(optimizer, Path(save_dir) / f"{iter_label}_{optimizer_label}.pth")

    @staticmethod
    def _save_part(part: nn.Module | torch.optim.Optimizer, path: Path) -> None:
        if distributed.is_main():
            checkpoint.save_file(path, tree.to_cpu(part.state_dict()))

    # ------------------------------------------------ loading

    def load_network(self, load_path: str, network: nn.Module, strict: bool = True, param_key: str = "params") -> str:
        """Load the weights of one network from a file of Perdure, KAIR, BasicSR, Lightning or a similar program.

        Args:
            strict: whether every name and shape must fit. False: tensors that fit by name and shape are loaded; if
                some don't fit, but all shapes agree in order, all are loaded by position.
            param_key: entry of the file that holds the weights, where it has several.
        Returns: a one-line report.
        Raises: CheckpointError: the file is unreadable or its weights do not fit.
        """
        weights = checkpoint.extract_weights(checkpoint.load_file(load_path), load_path, param_key)
        return self.load_weights(network, weights, strict, str(load_path))

    def load_weights(self, network: nn.Module, weights: Mapping[str, Tensor], strict: bool, source: str) -> str:
        """Load weights as `load_network` does, from a state dict; `source` is its name in messages."""
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
        """Initialize a network with weights of another run, by name and shape.

        Args:
            source: name of the weights in messages.
            architecture: options of the network that the weights belong to, if known.
            strict: raise an error for a tensor of fitting name and other shape, instead of dropping it.
        Returns: report lines: a table of loaded, new and dropped tensors.
        Raises: CheckpointError: no tensor fits, or with `strict` one has another shape.
        """
        own = self.get_bare_model(network).state_dict()
        if reshaped := [k for k, v in weights.items() if k in own and v.shape != own[k].shape]:
            label = next(label for label, known in self.networks.items() if known is network)
            then, now = architecture or {}, self.opt[f"net{label}"]
            differences = [f"net{label}.{key} {then.get(key, 'default')} against {now.get(key, 'default')} here"
                       for key in {**then, **now} if then and then.get(key) != now.get(key)]
            if strict:
                raise checkpoint.CheckpointError(
                    f"{source}: is of another architecture: " + (", ".join(differences) + "; " if differences else "")
                    + f"{_mismatch(own, weights, [], reshaped)}; set train.G_param_strict to false to drop them")
        report = self.load_weights(network, weights, False, source)
        if "by name" not in report or " below " in report:
            return [report]
        loaded = [k for k in own if k in weights and k not in reshaped]
        groups = (("loaded", loaded), ("new", [k for k in own if k not in loaded]),
                  ("dropped", [k for k in weights if k not in loaded]))
        return [source, *(f"{name:<8}{len(keys):>5} tensors" + (f"  {_by_module(keys)}" if keys else "")
                          for name, keys in groups)]

    def load_optimizer(self, load_path: str | Path, optimizer: torch.optim.Optimizer) -> None:
        """Load the state of one optimizer from a file of `save_optimizer` or KAIR; it goes to its parameters' device.

        Raises: CheckpointError: the file is unreadable or its state does not fit.
        """
        state = checkpoint.load_file(load_path)
        if not isinstance(state, Mapping) or not {"state", "param_groups"} <= set(state):
            raise checkpoint.CheckpointError(f"{load_path}: is not the state of an optimizer; name an _optimizerG.pth")
        self.load_optimizer_state(optimizer, state, str(load_path))

    def load_optimizer_state(self, optimizer: torch.optim.Optimizer, state: Mapping[str, Any], source: str) -> None:
        """Load the state of an optimizer, except the hyper-parameters, which the options set."""
        chosen = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        saved = [len(group["params"]) for group in state["param_groups"]]
        if saved != [len(group["params"]) for group in optimizer.param_groups]:
            raise checkpoint.CheckpointError(
                f"{source}: parameter groups of {saved} tensors do not match this optimizer's "
                f"{[len(g['params']) for g in optimizer.param_groups]}; was it saved with other options?")
        numbers = [n for group in state["param_groups"] for n in group["params"]]
        for number, parameter in zip(numbers, (p for group in optimizer.param_groups for p in group["params"])):
            for name, value in state["state"].get(number, {}).items():
                if isinstance(value, Tensor) and value.ndim and value.shape != parameter.shape:
                    raise checkpoint.CheckpointError(f"{source}: {name} {tuple(value.shape)} does not fit a parameter "
                                                     f"of {tuple(parameter.shape)}; was it saved with other options?")
        # The options override the saved groups. They also decide the device of `step`: a fused kernel needs it on the
        # parameter's device, and most other programs save it on the CPU.
        groups = [{**group, **options} for group, options in zip(state["param_groups"], chosen)]
        optimizer.load_state_dict({"state": state["state"], "param_groups": groups})
        for parameter, values in optimizer.state.items():
            for name, value in values.items():  # a fused step needs a moment in the memory layout of its parameter
                if isinstance(value, Tensor) and value.ndim and value.stride() != parameter.stride():
                    values[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)

    # ------------------------------------------------ checks before a save

    def find_non_finite(self) -> str | None:
        """Return the name of a non-finite weight or moment, or of a NaN buffer, else None. Waits for the device."""
        named = {f"{label}.{name}": value.detach() for label, network in self.networks.items()
                 for name, value in (*network.named_parameters(), *network.named_buffers())}
        named |= {f"{label}.{i}.{name}": value for label, optimizer in self.optimizers.items()
                  for i, values in enumerate(optimizer.state.values()) for name, value in values.items()
                  if isinstance(value, Tensor) and value.ndim}
        named = {name: value for name, value in named.items() if value.is_floating_point() and value.numel()}
        if named and self.device.type == "cpu":  # what is not finite has no finite sum, which is quicker
            sums = torch.stack([value.sum().float() for value in named.values()]).isfinite().tolist()
            named = {name: value for (name, value), finite in zip(named.items(), sums) if not finite}
        if not named:
            return None

        def largest(device: torch.device | str) -> list[float]:
            norms = torch._foreach_norm([value.to(device) for value in named.values()], float("inf"))
            return torch.stack([norm.float() for norm in norms]).tolist()

        try:
            norms = largest(self.device)
        except torch.OutOfMemoryError:  # a step that raised left the card full
            norms = largest("cpu")
        buffers = {f"{label}.{name}" for label, network in self.networks.items() for name, _ in network.named_buffers()}
        return next((name for name, value in zip(named, norms)
                     if value != value or value == float("inf") and name not in buffers), None)

    def checksum(self) -> int:
        """Return a sum over the bits of all weights, buffers and moments. Waits for the device."""
        sums = []
        with torch.inference_mode():
            for _, value in tree.flat(self.parts()):
                if isinstance(value, Tensor) and value.numel():
                    if not value.is_contiguous():  # channels last: in the order of memory nothing is copied
                        value = value.permute(sorted(range(value.ndim), key=value.stride, reverse=True))
                    bits = value.reshape(-1)
                    wide = bits.nbytes % 8 == bits.storage_offset() * bits.element_size() % 8 == 0
                    sums.append((bits if wide else bits.double()).view(torch.int64).sum().to(self.device))
            return int((torch.stack(sums) * torch.arange(1, len(sums) + 1, device=self.device)).sum())

    # ------------------------------------------------ learning rate and log

    def update_learning_rate(self, n: int) -> None:
        """Set all learning rates for the step that follows n finished ones."""
        for label, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = self.schedules[label](group["initial_lr"], n)

    def current_learning_rate(self) -> float:
        """Return the learning rate of the first group of the first optimizer."""
        return next(iter(self.optimizers.values())).param_groups[0]["lr"]

    def current_log(self) -> dict[str, float]:
        """Return the loss terms of the last step as numbers. Waits for the device."""
        return {name: float(value) for name, value in self.log_dict.items()}


def mean_of(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean of each column of a non-empty table over the rows that have it."""
    columns = {key: [row[key] for row in rows if key in row] for key in dict.fromkeys(k for row in rows for k in row)}
    return {key: sum(values) / len(values) for key, values in columns.items()}


def _common_prefix(own: Mapping, weights: Mapping) -> str:
    """Return the prefix that a file adds to every key of a network, e.g. Lightning's "model."; "" if there is none."""
    first = next(iter(own), "")
    if first not in weights:
        for key in weights:
            prefix = key.removesuffix(first)
            if key.endswith(f".{first}") and all(f"{prefix}{k}" in weights for k in own):
                return prefix
    return ""


def _by_module(keys: list[str]) -> str:
    """Count keys by module, as in "encoder.stem1 (6), encoder.features (40)", for at most 8 modules."""
    for depth in (4, 3, 2, 1):
        counts = Counter(".".join(key.split(".")[:-1][:depth]) or key for key in keys)
        if len(counts) <= 8:
            break
    words = [f"{module} ({count})" for module, count in counts.most_common(8)]
    return ", ".join(words) + (f", and {len(counts) - 8} more modules" if len(counts) > 8 else "")


def _some(keys: list[str], most: int = 3) -> str:
    return ", ".join(keys[:most]) + (", ..." if len(keys) > most else "")


def _mismatch(own: Mapping, weights: Mapping, missing: list[str], skipped: list[str]) -> str:
    """Describe in one line why weights do not fit a network."""
    reshaped = [f"{k} {tuple(weights[k].shape)} instead of {tuple(own[k].shape)}" for k in skipped if k in own]
    absent = [k for k in missing if k not in weights]
    unknown = [k for k in skipped if k not in own]
    problems = [f"{len(keys)} {what}: {_some(keys, 2)}" for what, keys in
               (("of another shape", reshaped), ("missing", absent), ("unknown", unknown)) if keys]
    return "; ".join(problems)
