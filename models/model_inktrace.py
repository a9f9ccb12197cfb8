"""The InkTrace recipe: structural pretraining on ink with hidden blocks, then dense prediction of all maps.

Source: Fuwaki/InkTrace at a474eeb (train_structural.py, train_dense.py); ModelInkTrace lists what differs.
Legend: B images, C channels, S side of an image (64).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from data.sampler import cpu_generator
from metrics.inktrace import direction_error, f1, matches, overlap
from models.model_base import ModelBase
from models.model_plain import ModelPlain
from models.network_inktrace import SIZE, extract_keypoints, keypoint_nms, pack, unpack
from runtime import distributed, schedules
from runtime.ranges import Fraction, NonNegativeFloat, PositiveFloat, PositiveInt, ProperFraction, Range

ENLARGE = 4  # enlargement of the pictures


class ModelInkTrace(ModelPlain):
    """Train the network to predict maps, packed along C: `image` (B, 1, S, S) -> `restored` (B, 3 or 8, S, S).

    What differs from the original: hidden blocks depend on (seed, step) alone, and the schedule on the step; fp16
    losses are scaled; the skeletons of a validation set select the best checkpoint, instead of the training loss.
    """

    @dataclass
    class TrainOptions(ModelPlain.TrainOptions):
        G_lossfn_type: Literal["structural", "dense"] = "structural"  # training mode; dense needs netG.full_heads
        skeleton_weight: NonNegativeFloat | None = None  # factor of the skeleton loss; null: 1 structural, 10 dense
        tangent_weight: NonNegativeFloat | None = None  # factor of the tangent loss; null: 1
        keypoints_weight: NonNegativeFloat | None = None  # factor of the keypoint loss, dense only; null: 5
        width_weight: NonNegativeFloat | None = None  # factor of the stroke width loss, dense only; null: 1
        offset_weight: NonNegativeFloat | None = None  # factor of the offset loss, dense only; null: 1
        keypoint_sigma: NonNegativeFloat = 0.0  # sigma of keypoint targets in pixels, dense only; 0: one pixel
        mask_ratio: ProperFraction = 0.6  # fraction of hidden blocks of an image, structural only
        mask_block: PositiveInt = 8  # side of a hidden block in pixels, a divisor of 64; structural only
        G_optimizer_type: Literal["adam", "adamw"] = "adamw"
        G_optimizer_lr: NonNegativeFloat = 1e-3
        G_optimizer_wd: NonNegativeFloat = 1e-4
        G_optimizer_clipgrad: PositiveFloat | None = 1.0
        # Schedule of the learning rate: one cycle, one cosine, steps at milestones, restarting cosines, or constant.
        G_scheduler_type: Literal["OneCycleLR", "CosineAnnealingLR", "MultiStepLR", "CosineAnnealingWarmRestarts",
                                  "constant"] = "OneCycleLR"
        G_scheduler_warmup: Annotated[float, Range(gt=0, lt=1)] = 0.3  # fraction of the run in which OneCycleLR rises
        G_scheduler_div_factor: PositiveFloat = 25.0  # highest learning rate of OneCycleLR divided by its first
        G_scheduler_final_div_factor: PositiveFloat = 1e4  # first learning rate of OneCycleLR divided by its last
        # Lowest and highest first beta of OneCycleLR; null: that of G_optimizer_betas.
        G_scheduler_momentum: tuple[ProperFraction, ProperFraction] | None = (0.85, 0.95)

    @dataclass
    class ValOptions(ModelPlain.ValOptions):
        skeleton_threshold: Fraction = 0.5  # probability above which a pixel is skeleton
        keypoint_threshold: Fraction = 0.3  # probability above which a peak is a keypoint
        keypoint_radius: NonNegativeFloat = 2.0  # largest distance of a found keypoint, in pixels

    infer = ModelBase.infer  # only on test sets
    best_metric = "skeleton_f1", "max"
    batch = "image", "target"

    def __init__(self, opt: Mapping[str, Any]):
        t, net = opt["train"], opt["netG"]
        self.dense = t["G_lossfn_type"] == "dense"
        full = net.get("full_heads", True)
        if self.dense and not full:
            raise ValueError(f"{opt['opt_path']}: netG.full_heads: must be true where train.G_lossfn_type is dense")
        if SIZE % t["mask_block"]:
            raise ValueError(f"{opt['opt_path']}: train.mask_block: {t['mask_block']} must divide {SIZE}")
        batch, num = opt["datasets"]["train"]["dataloader_batch_size"], distributed.num_micro_batches(t["accumulate"])
        if full and batch // num < 2:
            raise ValueError(f"{opt['opt_path']}: a batch of {batch} in {num} micro-batches leaves a single image in "
                             "each, too few for full_heads; use a larger dataloader_batch_size")
        super().__init__(opt)
        self.terms: dict[str, Tensor] = {}  # loss terms of the last micro-batch

    # ------------------------------------------------ before training

    def define_loss(self) -> None:
        """Build the loss of the training mode; a null weight stands for the default of that mode."""
        self.criterion = self.build_loss({key: value for key, value in self.opt_train.items() if value is not None})

    def G_lossfn(self, restored: Tensor, target: Tensor) -> Tensor:
        """Return the weighted sum of all terms, and keep the terms for the log."""
        terms = self.criterion(unpack(restored), unpack(target))
        self.terms = {name: term for name, term in terms.items() if name != "total"}
        return terms["total"]

    def define_scheduler(self) -> None:
        """Build the schedules of the learning rate and, with OneCycleLR, of the first beta."""
        super().define_scheduler()
        t, self.beta1 = self.opt_train, None
        if t["G_scheduler_type"] == "OneCycleLR" and t["G_scheduler_momentum"]:
            lowest, highest = t["G_scheduler_momentum"]
            momentum = schedules.one_cycle_momentum(t["total_iter"], t["G_scheduler_warmup"], highest)
            self.beta1 = lambda n: momentum(lowest, n)

    def update_learning_rate(self, n: int) -> None:
        """Set learning rates and first betas for the step that follows n finished ones."""
        super().update_learning_rate(n)
        if self.beta1:
            for group in self.G_optimizer.param_groups:
                group["betas"] = (self.beta1(n), group["betas"][1])

    # ------------------------------------------------ training

    def feed_data(self, data: Mapping[str, Any], need_H: bool = True) -> None:
        """Move a batch to the device: `L` ink (B, 1, S, S) in [0, 1], `H` packed maps (B, 8, S, S)."""
        super().feed_data(data, need_H)
        self.image = self.degraded
        self.index = int(data["index"][0]) if "index" in data else 0

    def hide(self, generator: torch.Generator | None = None) -> None:
        """Hide blocks of `image` at random in structural mode, into `degraded`."""
        if self.dense:
            self.degraded = self.image
        else:
            t = self.opt_train
            self.mask = self.move(hidden_blocks(len(self.image), t["mask_ratio"], generator, t["mask_block"]))
            self.degraded = self.image * (1 - self.mask)

    def netG_forward(self) -> None:
        """Run G on `degraded`, into `restored`."""
        self.restored = self.restore(self.forward_G, self.degraded)

    def losses(self, step: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Compute the loss of maps of an image with hidden blocks."""
        self.hide()
        losses, terms = super().losses(step)
        return losses, terms | self.terms

    # ------------------------------------------------ testing

    def test(self) -> None:
        """Predict the maps of the batch, with hidden blocks in structural mode."""
        self.hide(cpu_generator(self.opt_train["manual_seed"], 1, self.index, 1))
        super().test()
        self.restored = self.restored.float()

    def restore(self, network: nn.Module, degraded: Tensor) -> Tensor:
        """Predict packed maps; only dense mode uses skips."""
        return pack(network(degraded, use_skips=self.dense))

    def metrics(self) -> dict[str, float]:
        """Return overlap of the skeletons and, on the true skeleton, errors of the tangent (degrees).

        In dense mode also the F1 of the keypoints and, on the true skeleton, errors of width and offset (pixels).
        """
        val, found, true = self.opt["val"], unpack(self.restored[0]), unpack(self.target[0])
        line = true["skeleton"][0] > 0.5  # (S, S)
        skeleton = overlap(found["skeleton"][0] > val["skeleton_threshold"], line)
        values = {"skeleton_iou": skeleton["iou"], "skeleton_f1": skeleton["f1"],
                  "tangent_error": direction_error(found["tangent"][:, line], true["tangent"][:, line])}
        if self.dense:
            pairs = list(zip(extract_keypoints(found["keypoints"], val["keypoint_threshold"]),
                             extract_keypoints(true["keypoints"])))
            hits = sum(matches(a[:, :2], b[:, :2], val["keypoint_radius"]) for a, b in pairs)
            values["keypoint_f1"] = f1(hits, sum(len(a) for a, _ in pairs), sum(len(b) for _, b in pairs))
            for name, unit in (("width", 10), ("offset", 1)):
                error = (found[name] - true[name])[:, line].abs()
                values[f"{name}_error"] = unit * error.mean().item() if error.numel() else 0.0
        return values

    def pictures(self) -> list[Tensor]:
        """Return input, input with hidden blocks in grey (structural only), truth, prediction, each (3, 4S, 4S)."""
        found = unpack(self.restored[0])
        true = {name: channels for name, channels in unpack(self.target[0]).items() if name in found}
        images = [self.image[0]] if self.dense else [self.image[0], self.degraded[0] + 0.25 * self.mask[0]]
        images = [image.expand(3, -1, -1) for image in images]
        images += [draw(true), draw(found, self.opt["val"]["keypoint_threshold"])]
        return [image.repeat_interleave(ENLARGE, 1).repeat_interleave(ENLARGE, 2) for image in images]


def hidden_blocks(count: int, ratio: float, generator: torch.Generator, block: int = 8, size: int = SIZE) -> Tensor:
    """Draw masks (count, 1, size, size) that are 1 where blocks are hidden, else 0.

    Args:
        count: number of images; each hides other blocks.
        ratio: fraction of blocks to hide, rounded down.
        block: side of a block in pixels, a divisor of size.
    Source: the original hides the first blocks of a permutation of each image.
    """
    side = size // block
    mask = torch.zeros(count, side * side)
    for row in mask:
        row[torch.randperm(side * side, generator=generator)[: int(side * side * ratio)]] = 1
    mask = mask.view(count, 1, side, side)
    return mask.repeat_interleave(block, 2).repeat_interleave(block, 3)


def draw(maps: Mapping[str, Tensor], threshold: float = 0.1) -> Tensor:
    """Draw maps as a picture (3, S, S): brightness is the skeleton, hue the tangent, white the keypoints."""
    angles = torch.arange(3) * (2 * math.pi / 3)
    wheel = torch.stack([angles.cos(), angles.sin()], dim=1).to(maps["tangent"])  # (3, 2): directions of R, G and B
    picture = maps["skeleton"] * (0.5 + 0.5 * torch.einsum("rc,chw->rhw", wheel, maps["tangent"]))
    if "keypoints" in maps:
        peaks = keypoint_nms(maps["keypoints"][None], threshold)[0].amax(0) > 0
        picture = picture.masked_fill(peaks, 1)
    return picture
