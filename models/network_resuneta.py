"""ResUNet-a: a U-Net of residual blocks with parallel dilated branches, pyramid pooling, and a conditioned head.

Source: Diakogiannis et al. 2020, arXiv:1904.00592 (d6: table 1), and feevos/resuneta for details that the paper omits:
norms before activations, two norms per upsampling, f/4 filters for each pooled scale.
Legend: B batch, C channels, K classes, H W pixels, h w those of a level: H / 2^i.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runtime.ranges import PositiveInt, Range, checked

Norm = Literal["batch", "instance", "layer"]
D6 = ((1, 3, 15, 31), (1, 3, 15, 31), (1, 3, 15), (1, 3, 15), (1,), (1,))


class ResUNetA(nn.Module):
    """Predict logits of K classes for each pixel of an RGB image of any size.

    Args:
        in_channels: channels C of the image.
        num_classes: number K of classes; 1: a single map of the foreground.
        depth: number of levels, each half the size of the previous one; null: the number of `dilations`.
        width: channels of the first level; they double from level to level. A multiple of 4.
        dilations: dilation rates of the parallel branches, for each level of the encoder.
        decoder_dilations: dilation rates of the decoder, largest maps first, one level less; null: 1 everywhere.
        image_size: side of the training images in pixels; rates whose kernel, 2 * rate + 1 wide, exceeds the map of a
            level are dropped, and a side below 2**depth is an error. null: neither.
        layer_norm: normalisation over the batch, per channel of an image ("instance"), or per image ("layer").
        multitask: use the conditioned head, which also predicts boundary, distance and colour.
    Raises: ValueError: values that do not fit each other or are out of range.
    Source: d6 with its defaults; the decoder of the paper. Pooled maps need not be multiples of 8: the last part of a
        row may be smaller. Images whose side is not a multiple of 2**(depth - 1) are padded, and the result is cropped.
    """

    @checked
    def __init__(self, *, in_channels: PositiveInt = 3, num_classes: Annotated[int, Range(ge=1, le=255)] = 2,
                 depth: PositiveInt | None = None, width: PositiveInt = 32,
                 dilations: Sequence[Sequence[PositiveInt]] = D6,
                 decoder_dilations: Sequence[Sequence[PositiveInt]] | None = None,
                 image_size: PositiveInt | None = None, layer_norm: Norm = "batch", multitask: bool = False):
        super().__init__()
        depth = len(dilations) if depth is None else depth
        check(depth, width, dilations, decoder_dilations, image_size)
        widths = [width << level for level in range(depth)]
        rates = [fitting(dilations[level], level, image_size) for level in range(depth)]
        back = [fitting(decoder_dilations[level], level, image_size) if decoder_dilations else [1]
                for level in range(depth - 1)]
        self.stride = 2 ** (depth - 1)
        self.stem = nn.Sequential(nn.Conv2d(in_channels, width, 1, bias=False), norm(layer_norm, width), nn.ReLU())
        self.down = nn.ModuleList(nn.Conv2d(f, 2 * f, 1, stride=2) for f in widths[:-1])
        self.encoder = nn.ModuleList(ResBlockA(f, d, layer_norm) for f, d in zip(widths, rates))
        self.bridge = PSPPooling(widths[-1], widths[-1], layer_norm)
        # The decoder's lists begin with the largest maps too, so that one index is one level.
        self.up = nn.ModuleList(conv_norm(2 * f, f, layer_norm) for f in widths[:-1])
        self.combine = nn.ModuleList(conv_norm(2 * f, f, layer_norm) for f in widths[:-1])
        self.decoder = nn.ModuleList(ResBlockA(f, d, layer_norm) for f, d in zip(widths, back))
        self.pool = PSPPooling(2 * width, width, layer_norm)
        self.head = ConditionedHead(width, num_classes, layer_norm) if multitask else nn.Conv2d(width, num_classes, 1)
        self.multitask = multitask

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of each pixel.

        Args: x: (B,C,H,W) RGB in [0,1].
        Returns: (B,K,H,W); with `multitask` (B,3K+3,H,W): segmentation, boundary, distance (K each), colour (3).
        """
        height, width = x.shape[-2:]
        x = F.pad(x, (0, -width % self.stride, 0, -height % self.stride), mode="replicate")
        x = first = self.stem(x)
        skips = []
        for level, block in enumerate(self.encoder):
            x = block(self.down[level - 1](x) if level else x)  # (B, width * 2^level, h, w)
            skips.append(x)
        x = self.bridge(x).relu()
        for level in reversed(range(len(self.decoder))):
            x = enlarge(self.up[level](x), 2, 2).relu()  # a 1x1 convolution is cheaper before the enlargement
            x = self.decoder[level](self.combine[level](torch.cat([x, skips[level]], dim=1)))
        both = torch.cat([x, first], dim=1)  # (B,2*width,H,W)
        features = self.pool(both).relu()
        x = self.head(features, both) if self.multitask else self.head(features)
        return x[..., :height, :width]


class ResBlockA(nn.Module):
    """Add to x one branch per dilation rate: twice norm, ReLU, dilated 3x3 convolution."""

    def __init__(self, channels: int, dilations: Sequence[int], kind: Norm):
        super().__init__()
        self.branches = nn.ModuleList(nn.Sequential(
            norm(kind, channels), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=d, dilation=d, bias=False),
            norm(kind, channels), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=d, dilation=d))
            for d in dilations)

    def forward(self, x: Tensor) -> Tensor:
        return x + sum(branch(x) for branch in self.branches)


class PSPPooling(nn.Module):
    """Concatenate a map with the maxima of its 1, 2x2, 4x4 and 8x8 parts, each convolved to a quarter of the width."""

    scales = (1, 2, 4, 8)

    def __init__(self, in_channels: int, out_channels: int, kind: Norm):
        super().__init__()
        quarter = out_channels // len(self.scales)
        self.parts = nn.ModuleList(conv_norm(in_channels, quarter, kind) for _ in self.scales)
        self.merge = conv_norm(in_channels + quarter * len(self.scales), out_channels, kind)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B,out_channels,h,w) of (B,C,h,w)."""
        pooled = [part(largest_of_parts(x, n)) for part, n in zip(self.parts, self.scales)]
        return self.merge(torch.cat([x, *pooled], dim=1))


class ConditionedHead(nn.Module):
    """Predict the distance, from it the boundary, from both the segmentation, and the colour independently.

    Source: the causal head (cmtsk) of feevos/resuneta.
    """

    def __init__(self, width: int, num_classes: int, kind: Norm):
        super().__init__()
        self.num_classes = num_classes
        self.distance = nn.Sequential(conv_norm_relu(2 * width, width, kind), conv_norm_relu(width, width, kind),
                                      nn.Conv2d(width, num_classes, 1))
        self.boundary = nn.Sequential(conv_norm_relu(width + num_classes, width, kind),
                                      nn.Conv2d(width, num_classes, 1))
        self.color = nn.Conv2d(2 * width, 3, 1)
        self.segmentation = nn.Sequential(conv_norm_relu(width + 2 * num_classes, width, kind),
                                          conv_norm_relu(width, width, kind), nn.Conv2d(width, num_classes, 1))

    def forward(self, features: Tensor, both: Tensor) -> Tensor:
        """Return logits (B,3K+3,H,W) of pooled features (B,width,H,W) and their source (B,2*width,H,W)."""
        distance = self.distance(both)
        far = distance.sigmoid() if self.num_classes == 1 else distance.softmax(1)
        boundary = self.boundary(torch.cat([features, far], dim=1))
        segmentation = self.segmentation(torch.cat([features, boundary.sigmoid(), far], dim=1))
        return torch.cat([segmentation, boundary, distance, self.color(both)], dim=1)


# ---------------------------------------------------------------- pieces


def norm(kind: Norm, channels: int) -> nn.Module:
    """Build a normalisation layer."""
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    return nn.GroupNorm(channels if kind == "instance" else 1, channels)


def conv_norm(in_channels: int, out_channels: int, kind: Norm) -> nn.Sequential:
    """Build a 1x1 convolution with a norm."""
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, bias=False), norm(kind, out_channels))


def conv_norm_relu(in_channels: int, out_channels: int, kind: Norm) -> nn.Sequential:
    """Build a 3x3 convolution with a norm and a ReLU."""
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False), norm(kind, out_channels),
                         nn.ReLU())


def enlarge(x: Tensor, down: int, right: int) -> Tensor:
    """Repeat every value: (B,C,h,w) -> (B,C,h*down,w*right). Deterministic on CUDA, unlike interpolation."""
    batch, channels, height, width = x.shape
    x = x[:, :, :, None, :, None].expand(-1, -1, -1, down, -1, right)
    return x.reshape(batch, channels, height * down, width * right)


def largest_of_parts(x: Tensor, n: int) -> Tensor:
    """Set each of n x n parts of a map (B,C,h,w) to its largest value."""
    height, width = x.shape[-2:]
    tall, wide = -(-height // n), -(-width // n)  # size of a part, rounded up: the last of a row may be smaller
    padded = F.pad(x, (0, -width % wide, 0, -height % tall), value=float("-inf"))
    parts = padded.unflatten(3, (-1, wide)).unflatten(2, (-1, tall)).amax((3, 5))  # (B,C,<=n,<=n)
    return enlarge(parts, tall, wide)[..., :height, :width]


def fitting(dilations: Sequence[int], level: int, image_size: int | None) -> list[int]:
    """Return the dilation rates whose kernel fits into the map of a level, or [1] if none does."""
    if image_size is None:
        return list(dilations)
    return [d for d in dilations if 2 * d + 1 <= image_size >> level] or [1]


def check(depth: int, width: int, dilations: Sequence[Sequence[int]],
          decoder_dilations: Sequence[Sequence[int]] | None, image_size: int | None) -> None:
    """Raise ValueError for values that do not fit each other."""
    if not 2 <= depth <= len(dilations):
        raise ValueError(f"depth {depth} must be in 2..{len(dilations)}: dilations has that many levels")
    if decoder_dilations is not None and len(decoder_dilations) < depth - 1:
        raise ValueError(f"decoder_dilations has {len(decoder_dilations)} levels; depth {depth} needs {depth - 1}")
    for name, levels in (("dilations", dilations), ("decoder_dilations", decoder_dilations or ())):
        if not all(levels):
            raise ValueError(f"{name} {[list(rates) for rates in levels]}: each level needs rates")
    if width % 4:
        raise ValueError(f"width {width} must be a multiple of 4: pooling divides it among four scales")
    if image_size is not None and image_size < 2**depth:
        raise ValueError(f"image_size {image_size} leaves nothing at depth {depth}; give at least {2**depth}, or a "
                         "smaller depth")
