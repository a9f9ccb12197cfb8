"""The VRT recipe: training with a flow that is frozen at first, inference in overlapping windows and tiles.

Source: VRT, Liang et al. 2022, arXiv:2201.12288; cszn/KAIR models/model_vrt.py.
Legend: B batch, T frames, C channels, h w input pixels, H W output pixels.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from data.video import FrameFolder
from losses.lpips import LPIPS
from metrics.vrt import Eight
from models.model_base import mean_of
from models.model_plain import ABSENT, ModelPlain, merge_tiles, window_starts
from models.network_spynet import SpyNet, flow_warp
from runtime.ranges import NonNegativeFloat, NonNegativeInt, Range

TILE_OVERLAP = 20  # input pixels that neighbouring tiles share, as in KAIR
TILE_TRIM = 10  # output pixels dropped on inner edges of a tile, as in KAIR: they have the least context


class ModelVRT(ModelPlain):
    """Train VRT to restore clips: `degraded` (B, T, C, h, w) -> `restored` (B, T, C, H, W)."""

    inference_options = ("num_frame_testing", "num_frame_overlapping", "size_patch_testing", "size_patch_overlapping",
                         "pad_seq", "flip_seq")

    @dataclass
    class TrainOptions(ModelPlain.TrainOptions):
        # Number of first iterations that freeze the parameters named by fix_keys; 0 or -1: none.
        fix_iter: Annotated[int, Range(ge=-1)] = 0
        fix_keys: list[str] = field(default_factory=list)  # parts of names of parameters, e.g. "spynet", "deform"
        fix_lr_mul: NonNegativeFloat = 1.0  # factor of G_optimizer_lr for the parameters named by fix_keys

    @dataclass
    class ValOptions(ModelPlain.ValOptions):
        """Declare windows and tiles of the inference."""

        num_frame_testing: NonNegativeInt = 0  # frames restored at once; 0: all of a clip
        num_frame_overlapping: NonNegativeInt = 2  # frames that successive windows share
        size_patch_testing: NonNegativeInt = 0  # side of tiles in input pixels; 0: full frames
        # Input pixels that neighbouring tiles share; other values than 20 drop a quarter on each inner edge.
        size_patch_overlapping: NonNegativeInt = TILE_OVERLAP
        pad_seq: bool = False  # repeat the last frame once before restoring
        flip_seq: bool = False  # average the result with that of the reversed clip
        center_frame_only: bool = False  # compute metrics of the middle frame of each clip only
        crop_border: NonNegativeInt = 0  # output pixels on each side that metrics leave out, as KAIR and BasicSR do
        vgg_path: str | None = None  # file of VGG16's weights for the metric LPIPS; null: no LPIPS
        lpips_path: str | None = None  # file of LPIPS's weights of VGG16 for the metric; null: no LPIPS
        # File of SPyNet's weights for the flow of the metric `warp`, the warping error; null: no warping error.
        warp_path: str | None = None

    def __init__(self, opt: Mapping[str, Any]):
        super().__init__(opt)
        upscale = opt["netG"].get("upscale", 4)
        if upscale != opt["scale"]:
            raise ValueError(f"{opt['opt_path']}: scale {opt['scale']} and netG.upscale {upscale} must be equal")
        t, v = opt["train"], opt["val"]
        if v["num_frame_testing"] and v["num_frame_overlapping"] >= v["num_frame_testing"]:
            raise ValueError(f"{opt['opt_path']}: val.num_frame_overlapping {v['num_frame_overlapping']} must be "
                             f"below val.num_frame_testing {v['num_frame_testing']}")
        if v["size_patch_testing"] and not 0 <= v["size_patch_overlapping"] < v["size_patch_testing"]:
            raise ValueError(f"{opt['opt_path']}: val.size_patch_testing {v['size_patch_testing']} must be 0 or above "
                             f"val.size_patch_overlapping {v['size_patch_overlapping']}")
        self.lpips = None
        if v["vgg_path"] and v["lpips_path"]:
            self.lpips = LPIPS(v["vgg_path"], v["lpips_path"]).to(self.device)
        self.flow = SpyNet(v["warp_path"]).eval().to(self.device) if v["warp_path"] else None
        self.before: dict[str, tuple[Tensor, Tensor]] = {}  # the previous frame and its target, of the next frames
        fixed = t["fix_keys"] if t["fix_iter"] > 0 else []
        self.fixed = [p for name, p in self.netG.named_parameters() if any(key in name for key in fixed)]

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return KAIR's groups: first other parameters, then frozen ones; one group where their rates are equal."""
        t = self.opt_train
        if not self.fixed or t["fix_lr_mul"] == 1:
            return super().parameter_groups()
        fixed = {id(p) for p in self.fixed}
        return [{"params": [p for p in self.netG.parameters() if id(p) not in fixed]},
                {"params": self.fixed, "lr": t["G_optimizer_lr"] * t["fix_lr_mul"]}]

    def begin_step(self, step: int) -> None:
        """Freeze parameters in the first iterations."""
        for parameter in self.fixed:
            parameter.requires_grad_(step >= self.opt_train["fix_iter"])

    # ------------------------------------------------ testing

    def feed_data(self, data: Mapping[str, Any], need_H: bool = True) -> None:
        """Move a batch to the device; `target_frame` is the index in L of the only frame of H, where H has one."""
        super().feed_data(data, need_H)
        self.target_frame = int(data["target_frame"]) if "target_frame" in data else -1

    def test(self) -> None:
        """Restore the clip, and keep only the frames to compare."""
        super().test()
        frames, shown = self.degraded.shape[1], self.restored.shape[1]
        if self.target is not None and self.target.shape[1] < shown and self.target_frame >= 0:
            kept = slice(self.target_frame, self.target_frame + 1)
        elif self.opt["val"]["center_frame_only"] and shown == frames:
            kept = slice(frames // 2, frames // 2 + 1)
            self.target = None if self.target is None else self.target[:, kept]
        else:
            return
        self.degraded, self.restored = self.degraded[:, kept], self.restored[:, kept]

    def validate(self, sample: Any) -> dict[str, float]:
        """Return the metrics of a clip; a `LazyClip` is read and tested window by window."""
        self.before.clear()
        if isinstance(sample, Mapping):
            return super().validate(sample)
        rows, frames, which = [], range(len(sample.frames)), self.sample
        middle = len(frames) // 2
        with self.testing() as network:
            for t, data, restored in self.restore_frames(network, sample.read, len(frames)):
                if self.opt["val"]["center_frame_only"] and t != middle:
                    continue
                self.degraded, self.target = (data[side][None, None].to(self.device) for side in "LH")
                self.restored, self.sample = restored[None], which and (*which, t)
                rows.append(self.metrics())
                if t == middle:
                    self.shown = self.pictures()
        self.frame_rows = rows
        return mean_of(rows)

    def scores(self, frames: Eight, target: Eight, end: str) -> dict[str, Tensor]:
        """Add LPIPS, and 1000 times the warping error, where their weights are given."""
        columns = super().scores(frames, target, end)
        pairs = list(zip(frames.rgb / 255, target.rgb / 255))
        with torch.no_grad():
            if self.lpips:
                columns[f"lpips{end}"] = torch.stack([self.lpips(*(2 * x[None] - 1 for x in pair)).flatten()[0]
                                                      for pair in pairs])
            if self.flow:
                previous = [self.before.get(end), *pairs[:-1]]
                columns[f"warp{end}"] = torch.stack([
                    pair[0].new_tensor(ABSENT) if last is None else 1000 * warping_error(self.flow, *pair, *last)
                    for pair, last in zip(pairs, previous)])
                self.before[end] = pairs[-1]
        return columns

    def baseline(self) -> tuple[str, Tensor]:
        """Return name and frames of the baseline: for interpolation the mean of the two neighbours."""
        if self.degraded.shape[1] == self.target.shape[1]:
            return super().baseline()
        after = self.degraded.shape[1] // 2
        return "average", self.degraded[0, after - 1 : after + 1, :3].mean(0, keepdim=True)

    @staticmethod
    def prepare_inference(opt: Mapping[str, Any]) -> None:
        """Remove the file of flow weights, which trained weights contain."""
        opt["netG"]["spynet_path"] = None

    def infer(self, source: str, truth: str | None, wanted: Callable[[str], bool]) -> Iterator[Any]:
        """Yield the restored frames of a clip or of a folder of clips, under the names of the input."""
        if not self.netG.pa_frames:
            raise ValueError("frame interpolation does not support --input; omit it")
        level = next((section["sigma"] for section in self.opt["datasets"].values() if section.get("sigma")), None)
        folder = FrameFolder(source, truth, scale=self.opt["scale"],
                             sigma=level if self.opt["netG"].get("nonblind_denoising") else None)
        clips = [folder.clip(index) for index in range(len(folder))]
        single = len(clips) == 1 and Path(clips[0].paths[0]).parent == Path(source)  # the source is one clip
        clips[0].read(0, 1)  # errors of the input show before any output
        yield sum(len(clip.frames) for clip in clips)
        with self.testing() as network:
            for clip in clips:
                self.before.clear()
                names = [f"{frame}.png" if single else f"{clip.name}/{frame}.png" for frame in clip.frames]
                missing, last = {t for t, name in enumerate(names) if wanted(name)}, -1
                for t, data, restored in self.restore_frames(network, clip.read, len(names), missing):
                    metrics = None
                    if "H" in data:
                        self.degraded, self.target = (data[side][None, None].to(self.device) for side in "LH")
                        self.restored = restored[None]
                        if last != t - 1:
                            self.before.clear()
                        metrics, last = self.metrics(), t
                    yield names[t], restored[0], metrics

    def summarize_inference(self, rows: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
        """Return the mean over clips of each clip's mean over frames, as KAIR does."""
        clips: dict[str, list[Mapping[str, float]]] = {}
        for name, row in rows.items():
            clips.setdefault(os.path.dirname(name), []).append(row)
        return mean_of([mean_of(clip) for clip in clips.values()])

    def restore(self, network: nn.Module, degraded: Tensor) -> Tensor:
        """Restore a clip (1, T, C, h, w) of any length and size to (1, T, C, H, W), or interpolate its frames."""
        if not self.get_bare_model(network).pa_frames:
            return self.restore_tiles(network, degraded)

        def read(start: int, stop: int) -> dict[str, Tensor]:
            return {"L": degraded[0, start:stop]}

        return torch.stack([frame for _, _, frame in self.restore_frames(network, read, degraded.shape[1])], dim=1)

    def restore_frames(self, network: nn.Module, read: Callable[[int, int], dict[str, Tensor]], frames: int,
                       wanted: Collection[int] | None = None) -> Iterator[tuple[int, dict[str, Tensor], Tensor]]:
        """Restore a clip in overlapping windows, which are averaged, and yield each frame when it is complete.

        Args:
            read: function of (start, stop) that returns {"L": (t, C, h, w), ...} of these frames.
            frames: number of frames of the clip.
            wanted: indices of the frames to restore; None: all.
        Yields: index, data of `read`, and restored frame (1, C, H, W).
        """
        val, wanted = self.opt["val"], range(frames) if wanted is None else wanted
        length = frames + val["pad_seq"]  # pad_seq repeats the last frame
        size = min(val["num_frame_testing"] or length, length)
        directions = (False, True) if val["flip_seq"] else (False,)  # whether backwards
        windows = sorted((length - start - size if backwards else start, backwards) for backwards in directions
                         for start in window_starts(length, size, val["num_frame_overlapping"]))
        held: dict[int, dict[str, Tensor]] = {}
        sums: dict[tuple[int, bool], tuple[Tensor, int]] = {}  # (frame, backwards) -> sum, number of windows
        for at, (start, backwards) in enumerate(windows):
            if any(t in wanted for t in range(start, start + size)):
                data = read(start, min(start + size, frames))
                held |= {start + i: {key: value[i] for key, value in data.items()} for i in range(len(data["L"]))}
                part = data["L"].to(self.device)
                if len(part) < size:
                    part = torch.cat([part, part[-1:]])
                part = self.restore_tiles(network, part.flip(0)[None] if backwards else part[None])
                for i, frame in enumerate((part.flip(1) if backwards else part).unbind(1)):
                    total, count = sums.get((start + i, backwards), (0, 0))
                    sums[start + i, backwards] = total + frame, count + 1
            finished = windows[at + 1][0] if at + 1 < len(windows) else length
            for t in sorted(t for t in held if t < finished):
                found = [sums.pop((t, backwards)) for backwards in directions if (t, backwards) in sums]
                means = [total / count for total, count in found]
                data = held.pop(t)
                if t in wanted:
                    yield t, data, sum(means) / len(means)

    def restore_tiles(self, network: nn.Module, degraded: Tensor) -> Tensor:
        """Restore tiles of each frame and average their overlaps, without their inner edges."""
        size, scale = self.opt["val"]["size_patch_testing"], self.opt["scale"]
        overlap = self.opt["val"]["size_patch_overlapping"]
        trim = TILE_TRIM if overlap == TILE_OVERLAP else overlap * scale // 4
        if not size or max(degraded.shape[-2:]) <= size:
            return network(degraded)

        def without_inner_edges(start: int, length: int, end: int) -> Tensor:
            kept = torch.ones(length)
            kept[: trim if start > 0 else 0] = 0
            kept[length - (trim if start + length < end else 0) :] = 0
            return kept

        return merge_tiles(network, degraded, size, overlap, without_inner_edges, scale)


def warping_error(flow: nn.Module, frame: Tensor, target: Tensor, frame_before: Tensor,
                  target_before: Tensor) -> Tensor:
    """Return the mean squared difference of a frame and the one before it, moved along the motion of the target.

    Pixels count by how well the target itself follows that motion, which leaves out those that come into view.

    Args: flow: estimates the motion. The frames are (3,H,W) in [0,1].
    Source: Lai et al. 2018, "Learning Blind Video Temporal Consistency", arXiv:1808.00449, equations 4 and 5.
    """
    motion = flow(target[None], target_before[None])[0].permute(0, 2, 3, 1)
    moved = [x - flow_warp(before[None], motion)[0] for x, before in ((frame, frame_before), (target, target_before))]
    squares, own = (x.square().mean(0) for x in moved)
    weights = torch.exp(-150 * own)  # 50 for the sum over channels
    return (weights * squares).sum() / weights.sum()
