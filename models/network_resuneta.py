"""ResUNet-a: a U-Net of residual blocks with parallel dilated branches, pyramid pooling, and a conditioned head.

Source: Diakogiannis et al. 2020, arXiv:1904.00592 (d6: its table 1), with facts of feevos/resuneta where the paper is
silent: norms before activations, two normed scales of halves, f/4 filters for each pooled scale.
Legend: B batch, C channels, K classes, H W pixels, h w those of a level: H / 2^i.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runtime.ranges import PositiveInt, Range

Norm = Literal["batch", "instance", "layer"]
D6 = ((1, 3, 15, 31), (1, 3, 15, 31), (1, 3, 15), (1, 3, 15), (1,), (1,))


class ResUNetA(nn.Module):
    """Logits of K classes for each pixel of an RGB image of any size.

    Args:
        in_channels: channels C of the image.
        num_classes: number K of classes; 1 stands for a single map of foreground.
        depth: number of levels, each of half the size of the one before; null: as many as `dilations` has.
        width: channels of the first level; each next one has twice as many.
        dilations: rates of the parallel branches of each level of the encoder.
        decoder_dilations: rates of the decoder's levels, the largest maps first, one level less; null: {1} everywhere.
        image_size: side of the images it will be trained on, in pixels; rates whose kernel, 2 d + 1 wide, does not
            fit into the level's map are left out, and a side too small for the depth is an error. null: neither.
        layer_norm: normalisation over the batch, over each channel of an image, or over each whole image.
        multitask: use the conditioned head, which also predicts boundary, distance and colour.
    Raises: ValueError, one line.
    Source: d6 at its defaults; the paper's decoder. Pooled parts need no map that is a multiple of 8: the last part of
        a row may be smaller. Images whose side is no multiple of 2^(depth - 1) are padded, and the result is cut.
    """

    def __init__(self, *, in_channels: PositiveInt = 3, num_classes: Annotated[int, Range(ge=1, le=255)] = 2,
                 depth: PositiveInt | None = None, width: PositiveInt = 32,
                 dilations: Sequence[Sequence[PositiveInt]] = D6,
                 decoder_dilations: Sequence[Sequence[PositiveInt]] | None = None,
                 image_size: PositiveInt | None = None, layer_norm: Norm = "batch", multitask: bool = False):
        super().__init__()
        depth = len(dilations) if depth is None else depth
        check(depth, width, num_classes, dilations, decoder_dilations, image_size)
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
        """Logits of each pixel.

        Args: x: (B,C,H,W) RGB in [0,1]; the first norm makes up for any other scale.
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
            x = enlarge(self.up[level](x), 2, 2).relu()  # a 1x1 convolution costs less before than after
            x = self.decoder[level](self.combine[level](torch.cat([x, skips[level]], dim=1)))
        both = torch.cat([x, first], dim=1)  # (B,2*width,H,W)
        features = self.pool(both).relu()
        x = self.head(features, both) if self.multitask else self.head(features)
        return x[..., :height, :width]


class ResBlockA(nn.Module):
    """x + the sum of branches, one for each rate: twice norm, ReLU, 3x3 convolution of that dilation."""

    def __init__(self, channels: int, dilations: Sequence[int], kind: Norm):
        super().__init__()
        self.branches = nn.ModuleList(nn.Sequential(
            norm(kind, channels), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=d, dilation=d, bias=False),
            norm(kind, channels), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=d, dilation=d))
            for d in dilations)

    def forward(self, x: Tensor) -> Tensor:
        return x + sum(branch(x) for branch in self.branches)


class PSPPooling(nn.Module):
    """Largest values of 1, 2x2, 4x4 and 8x8 parts of the map, each convolved to a quarter, beside the map itself."""

    scales = (1, 2, 4, 8)

    def __init__(self, in_channels: int, out_channels: int, kind: Norm):
        super().__init__()
        quarter = out_channels // len(self.scales)
        self.parts = nn.ModuleList(conv_norm(in_channels, quarter, kind) for _ in self.scales)
        self.merge = conv_norm(in_channels + quarter * len(self.scales), out_channels, kind)

    def forward(self, x: Tensor) -> Tensor:
        """(B,C,h,w) -> (B,out_channels,h,w)"""
        pooled = [part(largest_of_parts(x, n)) for part, n in zip(self.parts, self.scales)]
        return self.merge(torch.cat([x, *pooled], dim=1))


class ConditionedHead(nn.Module):
    """Distance first, then the boundary that it suggests, then the segmentation that both suggest; colour beside.

    Source: the authors' causal head (cmtsk).
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
        """Pooled features (B,width,H,W) and what they were pooled from (B,2*width,H,W) -> (B,3K+3,H,W) logits."""
        distance = self.distance(both)
        far = distance.sigmoid() if self.num_classes == 1 else distance.softmax(1)
        boundary = self.boundary(torch.cat([features, far], dim=1))
        segmentation = self.segmentation(torch.cat([features, boundary.sigmoid(), far], dim=1))
        return torch.cat([segmentation, boundary, distance, self.color(both)], dim=1)


# ---------------------------------------------------------------- pieces


def norm(kind: Norm, channels: int) -> nn.Module:
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    return nn.GroupNorm(channels if kind == "instance" else 1, channels)


def conv_norm(in_channels: int, out_channels: int, kind: Norm) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, bias=False), norm(kind, out_channels))


def conv_norm_relu(in_channels: int, out_channels: int, kind: Norm) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False), norm(kind, out_channels),
                         nn.ReLU())


def enlarge(x: Tensor, down: int, right: int) -> Tensor:
    """Every value repeated: (B,C,h,w) -> (B,C,h*down,w*right). Exact on CUDA too, where interpolation is not."""
    batch, channels, height, width = x.shape
    x = x[:, :, :, None, :, None].expand(-1, -1, -1, down, -1, right)
    return x.reshape(batch, channels, height * down, width * right)


def largest_of_parts(x: Tensor, n: int) -> Tensor:
    """The largest value of each of n x n parts of the map, everywhere in that part: (B,C,h,w) -> the same shape."""
    height, width = x.shape[-2:]
    tall, wide = -(-height // n), -(-width // n)  # of a part, rounded up: the last ones of a row may be smaller
    padded = F.pad(x, (0, -width % wide, 0, -height % tall), value=float("-inf"))
    parts = padded.unflatten(3, (-1, wide)).unflatten(2, (-1, tall)).amax((3, 5))  # (B,C,<=n,<=n)
    return enlarge(parts, tall, wide)[..., :height, :width]


def fitting(dilations: Sequence[int], level: int, image_size: int | None) -> list[int]:
    """The rates whose kernel fits into the map of a level; 1 at least."""
    if image_size is None:
        return list(dilations)
    return [d for d in dilations if 2 * d + 1 <= image_size >> level] or [1]


def check(depth: int, width: int, num_classes: int, dilations: Sequence[Sequence[int]],
          decoder_dilations: Sequence[Sequence[int]] | None, image_size: int | None) -> None:
    """Raises ValueError, one line, for what no network can be made of."""
    if not 2 <= depth <= len(dilations):
        raise ValueError(f"depth {depth} must be in 2..{len(dilations)}: dilations has that many levels")
    if decoder_dilations is not None and len(decoder_dilations) < depth - 1:
        raise ValueError(f"decoder_dilations has {len(decoder_dilations)} levels; depth {depth} needs {depth - 1}")
    for name, levels in (("dilations", dilations), ("decoder_dilations", decoder_dilations or ())):
        if not all(rates and min(rates) >= 1 for rates in levels):
            raise ValueError(f"{name} {[list(rates) for rates in levels]}: each level needs rates, all of them >= 1")
    if width < 4 or width % 4:
        raise ValueError(f"width {width} must be a multiple of 4: pooling shares it among four scales")
    if num_classes < 1:
        raise ValueError(f"num_classes {num_classes} must be >= 1")
    if image_size is not None and image_size < 2**depth:
        raise ValueError(f"image_size {image_size} leaves nothing at depth {depth}; give at least {2**depth}, or a "
                         "smaller depth")
