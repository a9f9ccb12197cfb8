"""One network, one loss, an optional moving average: what most recipes need, and KAIR's `ModelPlain`."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

import checkpoint
from data.resize import imresize
from losses import LOSSES
from metrics.vrt import video_metrics
from models.model_base import ModelBase
from options import Section, build
from runtime import distributed, schedules
from runtime.ranges import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, ProperFraction
from storage.foreign import extract_weights, unpack


class ModelPlain(ModelBase):
    """Restores a target from a degraded input: `netG(degraded)` against `target`."""

    @dataclass
    class StepOptions(ModelBase.TrainOptions):
        """Without the loss, for recipes that have their own."""

        E_decay: ProperFraction = 0.0  # share of the old moving average that a step keeps, usually 0.999; 0: no average
        G_optimizer_type: Literal["adam", "adamw"] = "adam"  # optimizer of G: Adam, or with decoupled weight decay
        G_optimizer_lr: NonNegativeFloat = 1e-4  # learning rate of G at the start of the schedule
        # Shares of the gradient's first and second moment that a step keeps.
        G_optimizer_betas: tuple[ProperFraction, ProperFraction] = (0.9, 0.999)
        G_optimizer_wd: NonNegativeFloat = 0.0  # weight decay of G
        G_optimizer_clipgrad: PositiveFloat | None = None  # largest norm of the whole gradient of G; null: no limit
        # Learning rate over time: in steps, in cosines that start over, or constant.
        G_scheduler_type: Literal["MultiStepLR", "CosineAnnealingWarmRestarts", "constant"] = "constant"
        # Iterations after which MultiStepLR multiplies the learning rate by G_scheduler_gamma.
        G_scheduler_milestones: list[NonNegativeInt] = field(default_factory=list)
        G_scheduler_gamma: PositiveFloat = 0.1  # factor of the learning rate at each milestone
        G_scheduler_periods: PositiveInt | None = None  # iterations of the first cosine; null: the whole run
        G_scheduler_restart_weights: PositiveInt = 1  # factor from the length of a cosine to that of the next
        G_scheduler_eta_min: NonNegativeFloat = 0.0  # lowest learning rate of a cosine
        G_param_strict: bool = True  # refuse path.pretrained_netG, and shapes of path.init_from, that do not fit G
        E_param_strict: bool = True  # refuse path.pretrained_netE where names or shapes do not fit E

    @dataclass
    class TrainOptions(StepOptions):
        G_lossfn_type: str = "l1"  # loss of G, a name of losses.LOSSES
        G_lossfn_weight: NonNegativeFloat = 1.0  # factor of the loss of G
        G_charbonnier_eps: NonNegativeFloat = 1e-9  # constant below the root of the Charbonnier loss

    def __init__(self, opt: Mapping[str, Any]):
        super().__init__(opt)
        self.netG = self.networks["G"] = self.define_network("G")
        if self.opt_train["E_decay"] > 0:
            self.netE = self.networks["E"] = copy.deepcopy(self.netG).eval().requires_grad_(False)
        else:
            self.netE = None

    def init_train(self, parts: Mapping[str, Any] | None = None, source: str = "checkpoint") -> list[str]:
        reports = self.load(parts, source)
        self.netG.train()
        shared = self.share(self.netG)
        self.forward_G = torch.compile(shared) if self.opt_train["compile"] else shared
        self.define_loss()
        self.define_optimizer()
        self.load_optimizers(parts, source)
        self.define_scheduler()
        return reports

    # ------------------------------------------------ before training

    def load(self, parts: Mapping[str, Any] | None = None, source: str = "checkpoint") -> list[str]:
        """Weights from a checkpoint's parts, or from `path.pretrained_*`. Returns a report line for each file."""
        if parts:
            for label, network in self.networks.items():
                if label in parts:
                    self.load_weights(network, parts[label], strict=True, source=f"{source}: {label}")
            if self.netE is not None and "E" not in parts:
                self.update_E(0)
            return []
        reports, path = [], self.opt["path"]
        if path["init_from"] not in (None, "none"):
            weights, config = checkpoint.read_weights(path["init_from"])
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
        for label, optimizer in self.optimizers.items():
            if parts and label in parts:
                self.load_optimizer_state(optimizer, parts[label], f"{source}: {label}")

    def define_loss(self) -> None:
        section = Section(G_lossfn_type=self.opt_train["G_lossfn_type"])
        section.where = f"{self.opt['opt_path']}: train"
        self.G_lossfn = build(LOSSES, section, "G_lossfn_type",
                              G_charbonnier_eps=self.opt_train["G_charbonnier_eps"]).to(self.device)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What the optimizer is given; a group's lr overrides G_optimizer_lr."""
        return [{"params": [p for p in self.netG.parameters() if p.requires_grad]}]

    def define_optimizer(self) -> None:
        t = self.opt_train
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[t["G_optimizer_type"]]
        self.G_optimizer = kind(self.parameter_groups(), lr=t["G_optimizer_lr"], betas=tuple(t["G_optimizer_betas"]),
                                weight_decay=t["G_optimizer_wd"], fused=True)
        for group in self.G_optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        self.optimizers["optimizerG"] = self.G_optimizer

    def define_scheduler(self) -> None:
        t = self.opt_train
        if t["G_scheduler_type"] == "MultiStepLR":
            schedule = schedules.multi_step(t["G_scheduler_milestones"], t["G_scheduler_gamma"])
        elif t["G_scheduler_type"] == "CosineAnnealingWarmRestarts":
            periods = t["total_iter"] if t["G_scheduler_periods"] is None else t["G_scheduler_periods"]
            schedule = schedules.cosine_warm_restarts(periods, t["G_scheduler_restart_weights"],
                                                      t["G_scheduler_eta_min"])
        else:
            schedule = schedules.constant()
        self.schedules["optimizerG"] = schedule

    # ------------------------------------------------ training

    def feed_data(self, data: Mapping[str, Any], need_H: bool = True) -> None:
        """Take a batch: `L` degraded, `H` target, (B, ..., C, H, W) in [0, 1]."""
        self.degraded = data["L"].to(self.device, non_blocking=True)
        self.target = data["H"].to(self.device, non_blocking=True) if need_H and "H" in data else None

    def netG_forward(self) -> None:
        self.restored = self.forward_G(self.degraded)

    def optimize_parameters(self, current_step: int) -> None:
        t, whole = self.opt_train, (self.degraded, self.target)
        self.G_optimizer.zero_grad(set_to_none=True)
        losses, parts = [], list(zip(*(tensor.chunk(t["accumulate"]) for tensor in whole)))
        for number, (self.degraded, self.target) in enumerate(parts, start=1):
            with distributed.no_sync(self.forward_G, last=number == len(parts)):
                with self.autocast():
                    self.netG_forward()
                share = len(self.degraded) / len(whole[0])
                loss = t["G_lossfn_weight"] * share * self.G_lossfn(self.restored.to(self.target.dtype), self.target)
                losses.append(loss.detach())
                if self.unusable(loss):
                    break
                self.backward(loss)
        else:
            if self.step(self.G_optimizer, t["G_optimizer_clipgrad"]) and self.netE is not None:
                self.update_E(t["E_decay"])
        self.log_dict["G_loss"] = sum(losses)
        self.degraded, self.target = whole

    # ------------------------------------------------ testing

    def load_use(self, payload: Mapping[str, Any], source: str) -> str:
        """The moving average if there is one, else G; of a single file, what is in it."""
        label = next((label for label in ("E", "G") if label in payload), None)
        unpacked = payload if label else unpack(payload, source)
        label = label or ("E" if "E" in unpacked else "G")
        weights = unpacked[label] if label in unpacked else payload
        self.netE = None
        self.networks = {"G": self.netG}
        return f"{label} of " + self.load_weights(self.netG, extract_weights(weights, source), True, source)

    def test(self) -> None:
        """Restore `degraded` with the moving average if there is one, else with G."""
        with self.testing() as network:
            self.restored = self.restore(network, self.degraded)

    @contextlib.contextmanager
    def testing(self) -> Iterator[torch.nn.Module]:
        """The network that is tested, in evaluation mode and without gradients."""
        network = self.netE if self.netE is not None else self.netG
        training = network.training
        network.eval()
        try:
            with torch.no_grad():
                yield network
        finally:
            network.train(training)

    def restore(self, network: torch.nn.Module, degraded: Tensor) -> Tensor:
        """One forward pass; a recipe whose input can be too large for that overrides it."""
        return network(degraded)

    def baseline(self) -> tuple[str, Tensor]:
        """What restoring has to beat, by name: the input, upscaled by bicubic interpolation where it is smaller."""
        degraded = self.degraded[0, ..., : self.target.shape[-3], :, :]  # without a noise map
        if degraded.shape == self.target.shape[1:]:
            return "input", degraded
        return "bicubic", imresize(degraded, self.opt["scale"])

    def metrics(self) -> dict[str, float]:
        """PSNR and SSIM of `restored`, and under `<name>_<baseline>` of the baseline, averaged over frames."""
        restored, target = self.restored[0], self.target[0]
        name, plain = self.baseline()
        self.baseline_name = name
        values = video_metrics(_frames(restored), _frames(target))
        return values | {f"{k}_{name}": v for k, v in video_metrics(_frames(plain), _frames(target)).items()}

    def pictures(self) -> list[Tensor]:
        """Input | restored | target of the middle frame, each (C, H, W)."""
        images = [self.baseline()[1], self.restored[0], self.target[0]]
        return [_frames(image)[len(_frames(image)) // 2] for image in images]

    def current_visuals(self, need_H: bool = True) -> dict[str, Tensor]:
        """KAIR's keys: L degraded, E restored, H target; the first of the batch, float, on the CPU."""
        visuals = {"L": self.degraded[0], "E": self.restored[0]}
        if need_H and self.target is not None:
            visuals["H"] = self.target[0]
        return {key: value.detach().float().cpu() for key, value in visuals.items()}


def _frames(image: Tensor) -> Tensor:
    """(T, C, H, W) of a clip or of a single image (C, H, W)."""
    return image.unsqueeze(0) if image.ndim == 3 else image


def starts(length: int, size: int, overlap: int) -> list[int]:
    """Where windows of `size` with an overlap begin so that they cover `length`; the last one ends with it."""
    if not size or length <= size:
        return [0]
    return [*range(0, length - size, size - overlap), length - size]
