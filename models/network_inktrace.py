"""UnifiedModel: it predicts strokes from ink, by a RepViT stem, a small transformer and a decoder.

The decoder has two paths: without skips it sees the tokens of the transformer only (structural pretraining); with
skips it attends to fine features, too (dense prediction).
Source: Fuwaki/InkTrace at a474eeb (encoder.py, decoder.py, dense_heads.py); RepViT, Wang et al. 2023, section 3.

Legend: B images, C channels, H W pixels (64), h w pixels of a feature map, E embedding, N tokens (64), D width of a
head. Ink is 1 on a background of 0.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runtime.ranges import PositiveInt, ProperFraction, checked

SIZE = 64  # side of the images: the position embedding is fixed
MAPS = {"skeleton": 1, "tangent": 2, "width": 1, "offset": 2, "keypoints": 2}  # name -> channels; structural: two
RARE = math.log(0.01 / 0.99)  # bias of a sigmoid that starts at 1 %, since few pixels belong to lines


def pack(maps: Mapping[str, Tensor]) -> Tensor:
    """Concatenate maps (..., C, H, W) along C in the order of MAPS."""
    return torch.cat([maps[name] for name in MAPS if name in maps], dim=-3)


def unpack(packed: Tensor) -> dict[str, Tensor]:
    """Invert `pack`, for 3 channels (structural) or 8."""
    maps, first = {}, 0
    for name, channels in MAPS.items():
        if first < packed.shape[-3]:
            maps[name] = packed.narrow(-3, first, channels)
        first += channels
    return maps


def keypoint_nms(heatmap: Tensor, threshold: float = 0.1) -> Tensor:
    """Set a heatmap (B, C, H, W) in [0, 1] to 0 except at 3x3 maxima above the threshold."""
    peak = heatmap == F.max_pool2d(heatmap, 3, stride=1, padding=1)
    return heatmap * (peak & (heatmap > threshold))


def extract_keypoints(heatmap: Tensor, threshold: float = 0.1, most: int = 100) -> list[Tensor]:
    """Return up to `most` peaks of each channel of a heatmap (C, H, W), best first, as rows (y, x, score)."""
    points = []
    for channel in keypoint_nms(heatmap[None], threshold)[0]:
        scores, places = channel.flatten().topk(min(most, channel.numel()))
        places, scores = places[scores > 0], scores[scores > 0]
        width = channel.shape[-1]
        points.append(torch.stack([(places // width).to(scores), (places % width).to(scores), scores], dim=1))
    return points


# ---------------------------------------------------------------- parts


def conv_bn(c_in: int, c_out: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Build a convolution `c` without bias and its batch norm `bn`, with padding that preserves the size."""
    conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(OrderedDict(c=conv, bn=nn.BatchNorm2d(c_out)))


def coordinates(x: Tensor) -> Tensor:
    """Return coordinates (B, 2, H, W) of the pixels of x: columns, then rows, each from -1 to 1."""
    rows, columns = (torch.linspace(-1, 1, side, dtype=x.dtype, device=x.device) for side in x.shape[-2:])
    return torch.stack(torch.meshgrid(columns, rows, indexing="xy")).expand(len(x), -1, -1, -1)


class SqueezeExcite(nn.Module):
    """Weight each channel by a function of the means of all channels."""

    def __init__(self, width: int):
        super().__init__()
        self.fc1 = nn.Conv2d(width, width // 4, 1)
        self.fc2 = nn.Conv2d(width // 4, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.fc2(F.relu(self.fc1(x.mean((2, 3), keepdim=True))))  # (B, C, 1, 1)
        return x * weight.sigmoid()


class RepVGGDW(nn.Module):
    """Sum a depthwise 3x3 and a 1x1 convolution and the identity: a convolution that trains more easily."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = conv_bn(width, width, 3, groups=width)
        self.conv1 = nn.Conv2d(width, width, 1, groups=width)
        self.bn = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x) + self.conv1(x) + x)


class Residual(nn.Module):
    """Compute x + m(x)."""

    def __init__(self, m: nn.Module):
        super().__init__()
        self.m = m

    def forward(self, x: Tensor) -> Tensor:
        return x + self.m(x)


class RepViTBlock(nn.Module):
    """Mix pixels, then channels. Source: RepViT, figure 4."""

    def __init__(self, width: int, stride: int, squeeze: bool):
        super().__init__()
        attend = SqueezeExcite(width) if squeeze else nn.Identity()
        if stride == 1:
            self.token_mixer = nn.Sequential(RepVGGDW(width), attend)
        else:
            self.token_mixer = nn.Sequential(conv_bn(width, width, 3, stride, width), attend, conv_bn(width, width))
        expand, project = conv_bn(width, 2 * width), conv_bn(2 * width, width)
        nn.init.zeros_(project.bn.weight)  # the block starts as identity
        self.channel_mixer = Residual(nn.Sequential(expand, nn.GELU(), project))

    def forward(self, x: Tensor) -> Tensor:
        return self.channel_mixer(self.token_mixer(x))


class NeXtBlock(nn.Module):
    """Add to x: depthwise 7x7, 1x1 to twice the width, GELU, 1x1. Source: ConvNeXt, figure 4, with batch norm."""

    def __init__(self, width: int):
        super().__init__()
        self.dwconv = conv_bn(width, width, 7, groups=width)
        self.pwconv1 = conv_bn(width, 2 * width)
        self.pwconv2 = conv_bn(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.pwconv2(F.gelu(self.pwconv1(self.dwconv(x))))


class GroundingBlock(nn.Module):
    """Let coarse features query fine ones by attention over all pixels; both gates start at 0."""

    def __init__(self, high: int, low: int, num_heads: int = 4):
        super().__init__()
        self.num_heads = num_heads
        self.gamma_attn = nn.Parameter(torch.zeros(1))
        self.gamma_ffn = nn.Parameter(torch.zeros(1))
        self.norm_high = nn.GroupNorm(1, high)
        self.norm_low = nn.GroupNorm(1, low)
        self.to_q = nn.Conv2d(high, low, 1, bias=False)
        self.to_k = nn.Conv2d(low, low, 1, bias=False)
        self.to_v = nn.Conv2d(low, low, 1, bias=False)
        self.proj = nn.Conv2d(low, low, 1, bias=False)
        self.ffn = nn.Sequential(nn.Conv2d(low, 2 * low, 1, bias=False), nn.GELU(),
                                 nn.Conv2d(2 * low, low, 1, bias=False))
        self.norm_ffn = nn.GroupNorm(1, low)

    def heads(self, x: Tensor) -> Tensor:
        """Split channels into heads: (B, C, h, w) -> (B, heads, h*w, D)."""
        x = x.unflatten(1, (self.num_heads, -1)).flatten(3).transpose(2, 3)
        return x.contiguous()  # otherwise attention takes the slow path, which stores h*w x h*w weights

    def forward(self, high: Tensor, low: Tensor) -> Tensor:
        """Return (B, low, h, w) from coarse features (B, high, h, w) and fine ones (B, low, h, w)."""
        coarse, fine = self.norm_high(high), self.norm_low(low)
        q, k, v = self.heads(self.to_q(coarse)), self.heads(self.to_k(fine)), self.heads(self.to_v(fine))
        seen = F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(low.shape)
        low = low + self.gamma_attn * self.proj(seen)
        return low + self.gamma_ffn * self.ffn(self.norm_ffn(low))


class ASPP(nn.Module):
    """Combine context of several sizes and of the full image. Source: DeepLabv3, Chen et al. 2017, section 3.3."""

    def __init__(self, c_in: int, width: int):
        super().__init__()

        def branch(c_in: int, dilation: int = 0) -> nn.Sequential:
            conv = nn.Conv2d(c_in, width, 3 if dilation else 1, padding=dilation, dilation=dilation or 1, bias=False)
            return nn.Sequential(conv, nn.BatchNorm2d(width), nn.GELU())

        self.branch1, self.branch2, self.branch3, self.branch4 = (branch(c_in, dilation) for dilation in (0, 2, 4, 6))
        self.branch5_conv = branch(c_in)
        self.fusion = branch(5 * width)

    def forward(self, x: Tensor) -> Tensor:
        image = self.branch5_conv(x.mean((2, 3), keepdim=True)).expand(-1, -1, *x.shape[2:])
        return self.fusion(torch.cat([self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x), image], 1))


# ---------------------------------------------------------------- encoder, decoder, heads


class StrokeEncoder(nn.Module):
    """Encode ink to features of three sizes and tokens."""

    def __init__(self, in_channels: int, embed_dim: int, num_heads: int, num_layers: int, dropout: float):
        super().__init__()
        self.pos_embed = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, (SIZE // 8) ** 2, embed_dim), std=0.02))
        self.stem1 = nn.Sequential(conv_bn(in_channels + 2, 32, 3, 2), nn.GELU())
        self.stem2 = nn.Sequential(conv_bn(32, 64, 3, 2), nn.GELU(), conv_bn(64, 128, 3))
        self.features = nn.Sequential(*(RepViTBlock(128, 2 if i == 0 else 1, i % 2 == 1) for i in range(6)))
        self.token_embed = nn.Linear(128, embed_dim)
        layer = nn.TransformerEncoderLayer(embed_dim, num_heads, 4 * embed_dim, dropout, "gelu", batch_first=True)
        self.transformer = nn.TransformerEncoder(layer, num_layers, enable_nested_tensor=False)
        for weight in self.transformer.parameters():
            if weight.ndim > 1:
                nn.init.xavier_uniform_(weight)  # TransformerEncoder copies the first layer
        self.norm = nn.LayerNorm(embed_dim)

    def forward(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return features [(B, 32, 32, 32), (B, 128, 16, 16), (B, E, 8, 8)] and tokens (B, N, E) of (B, C, 64, 64)."""
        f1 = self.stem1(torch.cat([x, coordinates(x)], dim=1))
        f2 = self.stem2(f1)
        f3 = self.features(f2)  # (B, 128, 8, 8)
        tokens = self.token_embed(f3.flatten(2).transpose(1, 2)) + self.pos_embed  # (B, N, E)
        tokens = self.norm(self.transformer(tokens))
        return [f1, f2, tokens.transpose(1, 2).unflatten(2, f3.shape[2:])], tokens


class Probability(nn.Sigmoid):
    """Compute a sigmoid in float32 or better: half precision has no values between 0.998 and 1."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(torch.promote_types(x.dtype, torch.float32)))


class DenseHeads(nn.Module):
    """Predict maps from features (B, 64, H, W): with `full` also width, offset and keypoints."""

    def __init__(self, full: bool):
        super().__init__()
        self.full = full
        self.shared_conv = nn.Sequential(conv_bn(64, 64, 3), nn.GELU())
        self.skeleton = nn.Sequential(nn.Conv2d(64, 1, 1), Probability())
        self.tangent = nn.Sequential(nn.Conv2d(64, 2, 1), nn.Tanh())
        nn.init.constant_(self.skeleton[0].bias, RARE)
        if full:
            self.width = nn.Sequential(nn.Conv2d(64, 1, 1), nn.Softplus())
            self.offset_conv = nn.Conv2d(64, 2, 1)
            self.geo_aspp = ASPP(66, 32)
            self.keypoints = nn.Sequential(nn.Conv2d(32, 2, 1), Probability())
            nn.init.constant_(self.keypoints[0].bias, RARE)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        shared = self.shared_conv(x)
        maps = {"skeleton": self.skeleton(shared), "tangent": self.tangent(shared)}
        if self.full:
            context = self.geo_aspp(torch.cat([x, coordinates(x)], dim=1))  # (B, 32, H, W)
            maps |= {"width": self.width(shared), "offset": 0.5 * self.offset_conv(shared).tanh(),
                     "keypoints": self.keypoints(context)}
        return maps


class UniversalDecoder(nn.Module):
    """Decode features to maps of full size, with or without the finer two features."""

    def __init__(self, embed_dim: int, full_heads: bool):
        super().__init__()
        self.f3_proj = nn.Identity() if embed_dim == 128 else nn.Conv2d(embed_dim, 128, 1)
        self.grounding1 = GroundingBlock(128, 128)
        self.fusion1_skip = nn.Sequential(nn.Conv2d(256, 128, 1, bias=False), nn.BatchNorm2d(128))
        self.conv1_shared = NeXtBlock(128)
        self.grounding2 = GroundingBlock(128, 32)
        self.fusion2_skip = nn.Sequential(nn.Conv2d(160, 64, 1, bias=False), nn.BatchNorm2d(64))
        self.fusion2_noskip = nn.Sequential(nn.Conv2d(128, 64, 1, bias=False), nn.BatchNorm2d(64))
        self.conv2_shared = NeXtBlock(64)
        self.conv3 = NeXtBlock(64)
        self.heads = DenseHeads(full_heads)

    def forward(self, features: list[Tensor], use_skips: bool) -> dict[str, Tensor]:
        f1, f2, f3 = features
        x = double(self.f3_proj(f3))  # (B, 128, 16, 16)
        if use_skips:
            x = self.fusion1_skip(torch.cat([x, self.grounding1(x, f2)], dim=1))
        x = double(self.conv1_shared(x))  # (B, 128, 32, 32)
        if use_skips:
            x = self.fusion2_skip(torch.cat([x, self.grounding2(x, f1)], dim=1))
        else:
            x = self.fusion2_noskip(x)
        x = double(self.conv2_shared(x))  # (B, 64, 64, 64)
        return self.heads(self.conv3(x))


def double(x: Tensor) -> Tensor:
    """Double the size by bilinear interpolation."""
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


class UnifiedModel(nn.Module):
    """Predict skeleton, tangent and, with full heads, width, offset and keypoints of strokes from ink.

    Args:
        in_channels: channels of the images.
        embed_dim: width E of the tokens; a multiple of num_heads.
        num_heads: attention heads of the transformer.
        num_layers: layers of the transformer.
        dropout: fraction of values that the transformer drops in training.
        full_heads: predict width, offset and keypoints, too; training needs micro-batches of two images or more.

    Raises: ValueError: a size out of range, or embed_dim is not a multiple of num_heads.

    Source: models.py and factory of the original, with its defaults. Differs: the layers of the transformer do not
    start as copies of one another.
    """

    @checked
    def __init__(self, in_channels: PositiveInt = 1, embed_dim: PositiveInt = 128, num_heads: PositiveInt = 4,
                 num_layers: PositiveInt = 4, dropout: ProperFraction = 0.1, full_heads: bool = True):
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim {embed_dim} must be a multiple of num_heads {num_heads}")
        self.encoder = StrokeEncoder(in_channels, embed_dim, num_heads, num_layers, dropout)
        self.decoder = UniversalDecoder(embed_dim, full_heads)

    def forward(self, x: Tensor, use_skips: bool = True) -> dict[str, Tensor]:
        """Predict the maps of strokes.

        Args:
            x: (B, C, 64, 64) in [0, 1].
            use_skips: whether the decoder sees fine features.
        Returns: maps (B, C, 64, 64): skeleton (1) and keypoints (2) in [0, 1], tangent (2) as cos and sin of twice the
            angle, width (1) in units of 10 pixels, offset (2) in pixels.
        Raises: ValueError: the images have another size.
        """
        if x.ndim != 4 or x.shape[2:] != (SIZE, SIZE):
            raise ValueError(f"images of shape {tuple(x.shape)}; (B, C, {SIZE}, {SIZE}) is needed")
        features, _ = self.encoder(x)
        return self.decoder(features, use_skips)
