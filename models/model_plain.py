"""The base of the recipes: one network, one loss, an optional moving average (EMA).

Source: `ModelPlain` of cszn/KAIR.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

import checkpoint
from data.frames import read_frame
from data.images import images_by_name
from data.resize import imresize
from data.synthetic import as_channels
from losses import LOSSES
from metrics.vrt import Eight, frame_metrics, in_8_bits
from models.model_base import ModelBase, mean_of
from options import Section, build
from runtime import determinism, distributed, schedules
from runtime.ranges import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, ProperFraction
from storage.foreign import extract_weights, unpack

ABSENT = -math.inf  # in a column of metrics: a frame without a value


class ModelPlain(ModelBase):
    """Train `netG` to restore `target` from `degraded`."""

    @dataclass
    class StepOptions(ModelBase.TrainOptions):
        E_decay: ProperFraction = 0.0  # share of the moving average (E) that a step keeps, usually 0.999; 0: no E
        G_optimizer_type: Literal["adam", "adamw"] = "adam"  # optimizer of G; adamw decouples the weight decay
        G_optimizer_lr: NonNegativeFloat = 1e-4  # learning rate of G at the start of the schedule
        # Decay rates of the gradient's first and second moment.
        G_optimizer_betas: tuple[ProperFraction, ProperFraction] = (0.9, 0.999)
        G_optimizer_wd: NonNegativeFloat = 0.0  # weight decay of the optimizer of G
        G_optimizer_clipgrad: PositiveFloat | None = None  # largest gradient norm of G; null: no clipping
        # Schedule of the learning rate: steps at milestones, restarting cosines, or constant.
        G_scheduler_type: Literal["MultiStepLR", "CosineAnnealingWarmRestarts", "constant"] = "constant"
        # Iterations at which MultiStepLR multiplies the learning rate by G_scheduler_gamma.
        G_scheduler_milestones: list[NonNegativeInt] = field(default_factory=list)
        G_scheduler_gamma: PositiveFloat = 0.1  # factor of the learning rate at each milestone
        G_scheduler_periods: PositiveInt | None = None  # iterations of the first cosine; null: total_iter
        G_scheduler_restart_weights: PositiveInt = 1  # length of a cosine divided by that of the previous one
        G_scheduler_eta_min: NonNegativeFloat = 0.0  # lowest learning rate of a cosine
        # Give each iteration the learning rate that follows it, as KAIR's loop does, which moves its scheduler first.
        G_scheduler_ahead: bool = False
        G_param_strict: bool = True  # require that path.pretrained_netG, or shapes in path.init_from, fit G
        E_param_strict: bool = True  # require that path.pretrained_netE fits E

    @dataclass
    class TrainOptions(StepOptions):
        G_lossfn_type: str = "l1"  # loss of G, a name of losses.LOSSES
        G_lossfn_weight: NonNegativeFloat = 1.0  # factor of the loss of G
        G_charbonnier_eps: NonNegativeFloat = 1e-9  # constant under the square root of the Charbonnier loss

    def __init__(self, opt: Mapping[str, Any]):
        super().__init__(opt)
        self.baselines: dict[tuple, tuple[str, dict[str, Tensor]]] = {}  # by sample: equal in each validation
        self.netG = self.networks["G"] = self.define_network("G")
        if self.opt_train["E_decay"] > 0:
            self.netE = self.networks["E"] = copy.deepcopy(self.netG).eval().requires_grad_(False)
        else:
            self.netE = None

    def init_train(self, parts: Mapping[str, Any] | None = None, source: str = "checkpoint") -> list[str]:
        """Load weights, and build loss, optimizer and schedule; see `ModelBase`."""
        reports = self.load(parts, source)
        self.netG.train()
        if self.opt["sync_batchnorm"]:
            distributed.synchronize_batchnorm(self.netG)
        self.forward_G = torch.compile(self.netG) if self.opt_train["compile"] else self.netG
        self.define_loss()
        self.define_optimizer()
        self.load_optimizers(parts, source)
        self.define_scheduler()
        return reports

    # ------------------------------------------------ before training

    def load(self, parts: Mapping[str, Any] | None = None, source: str = "checkpoint") -> list[str]:
        """Load weights from the parts of a checkpoint, or from `path.pretrained_*`. Returns report lines."""
        if parts:
            for label, network in self.networks.items():
                if label in parts:
                    self.load_weights(network, parts[label], strict=True, source=f"{source}: {label}")
            if self.netE is not None and "E" not in parts:
                self.update_E(0)
            return []
        reports, path = [], self.opt["path"]
        if path["init_from"] not in (None, "none"):
            weights, config = checkpoint.read_weights(path["init_from"], reports.append)
            strict = self.opt_train["G_param_strict"]
            reports += self.init_weights(self.netG, weights, path["init_from"], config.get("netG"), strict)
        elif path["pretrained_netG"]:
            reports.append(self.load_network(path["pretrained_netG"], self.netG, self.opt_train["G_param_strict"]))
        if self.netE is not None:
            if path["pretrained_netE"]:
                strict = self.opt_train["E_param_strict"]
                reports.append(self.load_network(path["pretrained_netE"], self.netE, strict, "params_ema"))
            else:
                self.update_E(0)
        return reports

    def load_optimizers(self, parts: Mapping[str, Any] | None = None, source: str = "checkpoint") -> None:
        """Load the states of all optimizers that a checkpoint has."""
        for label, optimizer in self.optimizers.items():
            if parts and label in parts:
                self.load_optimizer_state(optimizer, parts[label], f"{source}: {label}")

    def build_loss(self, options: Mapping[str, Any], type_key: str = "G_lossfn_type", section: str = "train",
                   **more: Any) -> nn.Module:
        """Build the loss that an option section names, on the device.

        Args:
            options: the section; keys that are no argument of the loss are ignored.
            type_key: key whose value is a name of losses.LOSSES.
            section: key path of the section, for messages.
            more: further arguments, which override the section's.
        Raises: OptionError: the name or a value is invalid.
        """
        options = Section({**options, **more})
        options.where = f"{self.opt['opt_path']}: {section}"
        return build(LOSSES, options, type_key).to(self.device)

    def define_loss(self) -> None:
        """Build the loss of G."""
        self.G_lossfn = self.build_loss(self.opt_train)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the parameter groups of the optimizer; the lr of a group overrides G_optimizer_lr."""
        return [{"params": [p for p in self.netG.parameters() if p.requires_grad]}]

    def build_optimizer(self, parameters: Any, lr: float) -> torch.optim.Optimizer:
        """Build an optimizer with the options of G and another learning rate."""
        t = self.opt_train
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[t["G_optimizer_type"]]
        optimizer = kind(parameters, lr=lr, betas=tuple(t["G_optimizer_betas"]), weight_decay=t["G_optimizer_wd"],
                         fused=True)
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        return optimizer

    def define_optimizer(self) -> None:
        """Build the optimizer of G."""
        self.G_optimizer = self.build_optimizer(self.parameter_groups(), self.opt_train["G_optimizer_lr"])
        self.optimizers["optimizerG"] = self.G_optimizer

    def define_scheduler(self) -> None:
        """Build the learning rate schedule of G."""
        self.schedules["optimizerG"] = build_schedule(self.opt_train)

    # ------------------------------------------------ training

    def feed_data(self, data: Mapping[str, Any], need_H: bool = True) -> None:
        """Move a batch to the device: `L` degraded, `H` target, (B, ..., C, H, W) in [0, 1]."""
        self.degraded = self.move(data["L"])
        self.target = self.move(data["H"]) if need_H and "H" in data else None

    def netG_forward(self) -> None:
        """Run G on `degraded`, into `restored`."""
        self.restored = self.forward_G(self.degraded)

    def losses(self, step: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Compute the loss of G."""
        with self.autocast():
            self.netG_forward()
        loss = self.opt_train["G_lossfn_weight"] * self.G_lossfn(self.restored.to(self.target.dtype), self.target)
        self.restored = self.restored.detach()  # else a step without a backward pass would keep its activations
        return {"optimizerG": loss}, {"G_loss": loss}

    # ------------------------------------------------ testing

    def load_for_inference(self, payload: Mapping[str, Any], source: str) -> str:
        """Load the moving average if there is one, else G; of a single file, its weights."""
        label = next((label for label in ("E", "G") if label in payload), None)
        unpacked = payload if label else unpack(payload, source)
        label = label or ("E" if "E" in unpacked else "G")
        weights = unpacked[label] if label in unpacked else payload
        self.netE = None
        self.networks = {"G": self.netG}
        return f"{label} of " + self.load_weights(self.netG, extract_weights(weights, source), True, source)

    def infer(self, source: str, truth: str | None, wanted: Callable[[str], bool]) -> Iterator[Any]:
        """Yield the restored picture NAME.png of each picture, with metrics where the truth has its name."""
        paths, targets = images_by_name(source), images_by_name(truth) if truth else {}
        yield len(paths)
        for name, path in paths.items():
            if wanted(f"{name}.png"):
                files = {"L": path, "H": targets.get(name)}
                self.feed_data({key: as_channels(read_frame(file), self.opt["n_channels"])[None].float() / 255
                                for key, file in files.items() if file})
                self.test()
                yield f"{name}.png", self.restored[0], self.metrics() if self.target is not None else None

    def test(self) -> None:
        """Restore `degraded` with the moving average if there is one, else with G."""
        with self.testing() as network:
            self.restored = self.restore(network, self.degraded)

    @contextlib.contextmanager
    def testing(self) -> Iterator[nn.Module]:
        """Yield the network to test, E or G, in evaluation mode and without gradients."""
        network = self.netE if self.netE is not None else self.netG
        training = network.training
        network.eval()
        try:
            with torch.no_grad():
                yield network
        finally:
            network.train(training)

    def restore(self, network: nn.Module, degraded: Tensor) -> Tensor:
        """Restore in one forward pass; a recipe with larger inputs overrides it."""
        return network(degraded)

    def baseline(self) -> tuple[str, Tensor]:
        """Return name and image of the baseline: the input, or its bicubic enlargement where it is smaller."""
        degraded = self.degraded[0, ..., : self.target.shape[-3], :, :]  # without a noise map
        if degraded.shape == self.target.shape[1:]:
            return "input", degraded
        with determinism.full_float32():
            return "bicubic", imresize(degraded, self.opt["scale"])

    def metrics(self) -> dict[str, float]:
        """Return PSNR and SSIM of `restored`, and as `<name>_<baseline>` of the baseline, averaged over frames."""
        border = self.opt["val"].get("crop_border", 0)
        restored, target = (in_8_bits(_frames(image), border) for image in (self.restored[0], self.target[0]))
        if (known := self.baselines.get(self.sample)) is None:
            name, plain = self.baseline()
            known = name, self.scores(in_8_bits(_frames(plain), border), target, f"_{name}")
            if self.sample:
                self.baselines[self.sample] = known
        self.baseline_name, columns = known
        columns = self.scores(restored, target, "") | columns
        values = torch.stack([column.double() for column in columns.values()], dim=1).tolist()  # one wait for a card
        self.frame_rows = [{name: value for name, value in zip(columns, row) if value != ABSENT} for row in values]
        return mean_of(self.frame_rows)

    def scores(self, frames: Eight, target: Eight, end: str) -> dict[str, Tensor]:
        """Return metrics (T,) of frames by name, to which `end` is appended; ABSENT where a frame has none."""
        return {f"{name}{end}": column for name, column in frame_metrics(frames, target).items()}

    def pictures(self) -> list[Tensor]:
        """Return baseline, restored and target of the middle frame, each (C, H, W)."""
        images = [self.baseline()[1], self.restored[0], self.target[0]]
        return [_frames(image)[len(_frames(image)) // 2] for image in images]

    def current_visuals(self, need_H: bool = True) -> dict[str, Tensor]:
        """Return the first sample by KAIR's keys: L degraded, E restored, H target; float, on the CPU."""
        visuals = {"L": self.degraded[0], "E": self.restored[0]}
        if need_H and self.target is not None:
            visuals["H"] = self.target[0]
        return {key: value.detach().float().cpu() for key, value in visuals.items()}


def _frames(image: Tensor) -> Tensor:
    """Return a clip as it is, a single image (C, H, W) as a clip of one frame."""
    return image.unsqueeze(0) if image.ndim == 3 else image


def window_starts(length: int, size: int, overlap: int) -> list[int]:
    """Return where overlapping windows of `size` begin so that they cover `length`; the last ends at `length`."""
    if not size or length <= size:
        return [0]
    return [*range(0, length - size, size - overlap), length - size]


def merge_tiles(predict: Callable[[Tensor], Tensor], image: Tensor, size: int, overlap: int,
                weights: Callable[[int, int, int], Tensor], scale: int = 1) -> Tensor:
    """Predict overlapping square tiles of an image and return the weighted mean.

    Args:
        predict: function of a tile (..., h, w) that returns (..., scale * h, scale * w).
        image: (..., H, W).
        size, overlap: side and overlap of the tiles, in pixels of the image.
        weights: function of (start, length, end) that returns the weights (length,) of a tile on one axis; start and
            length locate it, and end is the length of the axis, all in pixels of the result.
    Returns: (..., scale * H, scale * W).
    """
    height, width = image.shape[-2:]
    total, weight = None, image.new_zeros(height * scale, width * scale)
    for top in window_starts(height, size, overlap):
        for left in window_starts(width, size, overlap):
            part = predict(image[..., top : top + size, left : left + size])
            rows, columns = (slice(start * scale, start * scale + length)
                             for start, length in zip((top, left), part.shape[-2:]))
            ramp = torch.outer(*(weights(at.start, at.stop - at.start, end).to(image)
                                 for at, end in zip((rows, columns), weight.shape)))
            total = part.new_zeros(*part.shape[:-2], *weight.shape) if total is None else total
            total[..., rows, columns] += part * ramp
            weight[rows, columns] += ramp
    return total / weight


def build_schedule(t: Mapping[str, Any], periods: int | None = None) -> schedules.Schedule:
    """Build the learning rate schedule that the options of training name.

    Args:
        t: the `train` section.
        periods: equal parts of the run at whose ends CosineAnnealingLR moves; None: each iteration.
    """
    if t.get("G_scheduler_ahead"):
        schedule = build_schedule({**t, "G_scheduler_ahead": False}, periods)
        return lambda base, step: schedule(base, step + 1)
    total, kind, lowest = t["total_iter"], t["G_scheduler_type"], t["G_scheduler_eta_min"]
    if kind == "MultiStepLR":
        return schedules.multi_step(t["G_scheduler_milestones"], t["G_scheduler_gamma"])
    if kind == "CosineAnnealingWarmRestarts":
        first = total if t["G_scheduler_periods"] is None else t["G_scheduler_periods"]
        return schedules.cosine_warm_restarts(first, t["G_scheduler_restart_weights"], lowest)
    if kind == "CosineAnnealingLR":
        periods = periods or total
        cosine = schedules.cosine(periods, lowest)
        return lambda base, step: cosine(base, step * periods // total)
    if kind == "OneCycleLR":
        return schedules.one_cycle(total, t["G_scheduler_warmup"], t["G_scheduler_div_factor"],
                                   t["G_scheduler_final_div_factor"])
    return schedules.constant()
