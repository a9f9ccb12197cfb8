"""VRT training and testing: frozen flow at the start, long clips in overlapping windows.

Legend: B batch, T frames, C channels, h w input pixels, H W output pixels. Source: VRT, Liang et al. 2022
(arXiv:2201.12288); facts of cszn/KAIR models/model_vrt.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from models.model_plain import ModelPlain

TILE_OVERLAP = 20  # input pixels between neighbouring tiles, as KAIR
TILE_TRIM = 10  # output pixels dropped on a tile's inner edges, as KAIR: they know least of their surroundings


class ModelVRT(ModelPlain):
    """`ModelPlain` for clips: `degraded` (B, T, C, h, w) -> `restored` (B, T, C, H, W)."""

    @dataclass
    class TrainOptions(ModelPlain.TrainOptions):
        fix_iter: int = 0  # parameters named by fix_keys don't learn before this iteration
        fix_keys: list[str] = field(default_factory=list)  # substrings of parameter names, e.g. "spynet", "deform"
        fix_lr_mul: float = 1.0  # their learning rate afterwards, times G_optimizer_lr

    @dataclass
    class ValOptions(ModelPlain.ValOptions):
        num_frame_testing: int = 0  # frames per window in time; 0: the whole clip at once
        num_frame_overlapping: int = 2
        size_patch_testing: int = 0  # input pixels per tile; 0: the whole frame at once
        pad_seq: bool = False  # repeat the last frame once more
        flip_seq: bool = False  # average with the clip played backwards
        center_frame_only: bool = False

    def __init__(self, opt: Mapping[str, Any]):
        super().__init__(opt)
        upscale = opt["netG"].get("upscale", 4)
        if upscale != opt["scale"]:
            raise ValueError(f"{opt['opt_path']}: scale {opt['scale']} and netG.upscale {upscale} must be equal")
        t, v = opt["train"], opt["val"]
        if v["num_frame_testing"] and v["num_frame_overlapping"] >= v["num_frame_testing"]:
            raise ValueError(f"{opt['opt_path']}: val.num_frame_overlapping {v['num_frame_overlapping']} must be "
                             f"below val.num_frame_testing {v['num_frame_testing']}")
        if v["size_patch_testing"] and v["size_patch_testing"] <= TILE_OVERLAP:
            raise ValueError(f"{opt['opt_path']}: val.size_patch_testing must be above {TILE_OVERLAP}, or 0")
        fixed = t["fix_keys"] if t["fix_iter"] > 0 else []
        self.fixed = [p for name, p in self.netG.named_parameters() if any(key in name for key in fixed)]

    def parameter_groups(self) -> list[dict[str, Any]]:
        """KAIR's order: the others, then the fixed ones at their own rate; one group where that is the same."""
        t = self.opt_train
        if not self.fixed or t["fix_lr_mul"] == 1:
            return super().parameter_groups()
        fixed = {id(p) for p in self.fixed}
        return [{"params": [p for p in self.netG.parameters() if id(p) not in fixed]},
                {"params": self.fixed, "lr": t["G_optimizer_lr"] * t["fix_lr_mul"]}]

    def optimize_parameters(self, current_step: int) -> None:
        for parameter in self.fixed:  # a function of the step alone, so a resumed run agrees
            parameter.requires_grad_(current_step >= self.opt_train["fix_iter"])
        super().optimize_parameters(current_step)

    # ------------------------------------------------ testing

    def test(self) -> None:
        super().test()
        if self.opt["val"]["center_frame_only"]:
            middle = self.degraded.shape[1] // 2
            self.degraded = self.degraded[:, middle : middle + 1]
            self.restored = self.restored[:, middle : middle + 1]
            self.target = None if self.target is None else self.target[:, middle : middle + 1]

    def restore(self, network: nn.Module, degraded: Tensor) -> Tensor:
        """A clip of any length and size, (B, T, C, h, w) -> (B, T, C, H, W)."""
        val, frames = self.opt["val"], degraded.shape[1]
        if val["pad_seq"]:
            degraded = torch.cat([degraded, degraded[:, -1:]], dim=1)
        restored = self.restore_windows(network, degraded)
        if val["flip_seq"]:
            restored = (restored + self.restore_windows(network, degraded.flip(1)).flip(1)) / 2
        return restored[:, :frames]

    def restore_windows(self, network: nn.Module, degraded: Tensor) -> Tensor:
        """Windows of frames, averaged where they overlap."""
        size, overlap = self.opt["val"]["num_frame_testing"], self.opt["val"]["num_frame_overlapping"]
        frames = degraded.shape[1]
        total, weight = None, degraded.new_zeros(frames, 1, 1, 1)
        for start in starts(frames, size, overlap):
            window = slice(start, start + size if size else None)
            part = self.restore_tiles(network, degraded[:, window])
            total = part.new_zeros(part.shape[0], frames, *part.shape[2:]) if total is None else total
            total[:, window] += part
            weight[window] += 1
        return total / weight

    def restore_tiles(self, network: nn.Module, degraded: Tensor) -> Tensor:
        """Tiles of each frame, averaged where they overlap, their inner edges left out."""
        size, scale = self.opt["val"]["size_patch_testing"], self.opt["scale"]
        height, width = degraded.shape[-2:]
        if not size or (height <= size and width <= size):
            return network(degraded)
        total, weight = None, degraded.new_zeros(height * scale, width * scale)
        for top in starts(height, size, TILE_OVERLAP):
            for left in starts(width, size, TILE_OVERLAP):
                part = network(degraded[..., top : top + size, left : left + size])  # (B, T, C, tile H, tile W)
                total = part.new_zeros(*part.shape[:-2], *weight.shape) if total is None else total
                rows, part_rows = inner(top * scale, part.shape[-2], height * scale)
                columns, part_columns = inner(left * scale, part.shape[-1], width * scale)
                total[..., rows, columns] += part[..., part_rows, part_columns]
                weight[rows, columns] += 1
        return total / weight


def starts(length: int, size: int, overlap: int) -> list[int]:
    """Where windows of `size` with an overlap begin so that they cover `length`; the last one ends with it."""
    if not size or length <= size:
        return [0]
    return [*range(0, length - size, size - overlap), length - size]


def inner(start: int, size: int, length: int) -> tuple[slice, slice]:
    """A tile without its inner edges: where it goes in the whole, and that part of the tile."""
    first = TILE_TRIM if start > 0 else 0
    last = size - (TILE_TRIM if start + size < length else 0)
    return slice(start + first, start + last), slice(first, last)
