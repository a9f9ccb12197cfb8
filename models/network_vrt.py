"""VRT, the video restoration transformer: attention in and between frames, alignment along optical flow.

Source: Liang et al. 2022, "VRT: A Video Restoration Transformer", arXiv:2201.12288. Arguments, key names and
numbers follow KAIR, so published weights load strictly; VRT describes what differs.

Legend: B batch, D frames, C channels, H W pixels; K windows of a clip, N tokens of a window, h heads, P pairs
of frames. Transformers see (B, D, H, W, C), convolutions see frames, (B*D, C, H, W).
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.network_spynet import SpyNet, chain_flows, deform_conv, warp_frames
from runtime.ranges import Fraction, NonNegativeInt, PositiveFloat, PositiveInt, ProperFraction, checked

Size = tuple[int, int, int]  # frames, rows, columns
SCALES = (0, 1, 2, 3, 2, 1, 0)  # stage i + 1 works at 1 / 2**SCALES[i]; stage 8 at full size
NUM_STAGES = len(SCALES)
HEAD_WIDTH = 64


# ---- windows and attention ---------------------------------------------------


def to_windows(x: Tensor, window: Size) -> Tensor:
    """Split (B, D, H, W, C), whose sizes are multiples of the window, into windows (B, K, N, C)."""
    (b, d, h, w, c), (wd, wh, ww) = x.shape, window
    x = x.view(b, d // wd, wd, h // wh, wh, w // ww, ww, c)
    return x.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(b, -1, wd * wh * ww, c)


def from_windows(x: Tensor, window: Size, size: Size) -> Tensor:
    """Invert to_windows: (B, K, N, C) -> (B, D, H, W, C)."""
    (d, h, w), (wd, wh, ww) = size, window
    x = x.view(x.shape[0], d // wd, h // wh, w // ww, wd, wh, ww, x.shape[-1])
    return x.permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(x.shape[0], d, h, w, x.shape[-1])


def shift_regions(size: Size, window: Size, shift: Size, device: torch.device) -> Tensor:
    """Number the tokens (K, N) 0..7: tokens that are neighbours only by the cyclic shift differ."""
    padded = [s + -s % w for s, w in zip(size, window)]
    # True where a token wrapped around the edge
    d, h, w = (torch.arange(p, device=device) >= p - s for p, s in zip(padded, shift))
    region = 4 * d[:, None, None] + 2 * h[:, None] + w
    return to_windows(region[None, ..., None], window)[0, ..., 0]


def shift_mask(regions: Tensor, like: Tensor) -> Tensor:
    """Return the mask (K, N, N) of regions (K, N): -100 between different regions, else 0."""
    return (regions[:, :, None] != regions[:, None, :]).to(like.dtype) * -100


def shift_code(regions: Tensor, scale: float) -> Tensor:
    """Return channels (K, N, 3, 2) of q, k and v that have the effect of shift_mask, from regions (K, N).

    Regions are eight points of a circle. A point times itself exceeds its product with the next one by 100, so scores
    within a region are 100 or more above those across. Softmax ignores a constant that all scores of a query share.
    """
    angle, radius = regions * (math.pi / 4), math.sqrt(100 / (1 - math.cos(math.pi / 4)))
    code = radius * torch.stack((angle.cos(), angle.sin()), dim=-1)
    return torch.stack((code / scale, code, torch.zeros_like(code)), dim=-2)


def fused(x: Tensor) -> bool:
    """Tell whether to use attention that stores no N x N scores: on CUDA; on CPU it is slower at all sizes of VRT."""
    return x.is_cuda


def attention(qkv: Tensor, scale: float, biases: Sequence[Tensor] = (), swap: bool = False) -> Tensor:
    """Compute softmax(q k^T * scale + biases) v with stored scores, biases broadcast to (..., h, N, N).

    qkv (..., N, 3, h, C) -> (..., N, h, C). With swap each frame (axis 2) has the queries of the other one.
    """
    q, k, v = qkv.transpose(-4, -2).unbind(-3)  # (..., h, N, C)
    scores = ((q.flip(2) if swap else q) * scale) @ k.transpose(-2, -1)
    for bias in biases:
        scores += bias
    return (scores.softmax(dim=-1) @ v).transpose(-3, -2)


def fused_attention(qkv: Tensor, scale: float, bias: Tensor | None = None, code: Tensor | None = None,
                    swap: bool = False) -> Tensor:
    """Compute `attention` without stored scores, for inputs where `fused` is true.

    The kernel needs heads of a multiple of 16 bytes and a bias of the type of q. So heads are padded with zeros, and
    the bias (h, N, N) is converted before it is expanded. code (..., N, 3, 2) of shift_code replaces the mask.
    """
    width = qkv.shape[-1]
    used = width if code is None else width + 2
    extra = used + -used % (16 // qkv.element_size()) - width
    if code is not None:
        code = F.pad(code, (0, extra - 2)).to(qkv.dtype).unsqueeze(-2)
        qkv = torch.cat((qkv, code.expand(*qkv.shape[:-1], extra)), dim=-1)
    elif extra:
        qkv = F.pad(qkv, (0, extra))
    q, k, v = qkv.transpose(-4, -2).unbind(-3)  # (..., h, N, C)
    shape = k.shape
    q, k, v = (t.flatten(0, -4) for t in (q.flip(2) if swap else q, k, v))
    if bias is not None:
        bias = bias.to(q.dtype).expand(len(q), -1, -1, -1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    return out.view(shape)[..., :width].transpose(-3, -2)


def as_multiplied(x: Tensor) -> Tensor:
    """Convert x to the type of autocast once, before it is rearranged, instead of at each linear layer."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if kind != "meta" and torch.is_autocast_enabled(kind) else x


def relative_index(window: Size) -> Tensor:
    """Return the row (N, N) of the bias table of each pair (query, key), given by its difference of positions."""
    index = 0
    for position, size in zip(torch.meshgrid(*(torch.arange(s) for s in window), indexing="ij"), window):
        position = position.flatten()
        index = index * (2 * size - 1) + position[:, None] - position[None, :] + size - 1
    return index


def sine_code(height: int, width: int, dim: int) -> Tensor:
    """Return a fixed position code (1, H*W, C), half of the channels for rows, half for columns."""
    half = dim // 2
    frequency = 10000.0 ** (2 * (torch.arange(half) // 2) / half)

    def encode(size: int) -> Tensor:
        angle = torch.arange(1, size + 1)[:, None] / (size + 1e-6) * (2 * math.pi) / frequency
        return torch.stack((angle[:, 0::2].sin(), angle[:, 1::2].cos()), dim=2).flatten(1)  # (size, half)

    rows, columns = encode(height)[:, None], encode(width)[None]
    code = torch.cat((rows.expand(height, width, half), columns.expand(height, width, half)), dim=2)
    return code.view(1, height * width, 2 * half)


class WindowAttention(nn.Module):
    """Apply self attention to the tokens of a window, and with mutual also attention between its two frames.

    In mutual attention the queries of a frame meet keys and values of the other frame, which matches and warps it.
    """

    def __init__(self, dim: int, window: Size, num_heads: int, mutual: bool, qkv_bias: bool,
                 qk_scale: float | None):
        super().__init__()
        self.window, self.num_heads, self.mutual = window, num_heads, mutual
        self.scale = qk_scale or (dim // num_heads) ** -0.5
        table = torch.zeros(math.prod(2 * s - 1 for s in window), num_heads)
        self.relative_position_bias_table = nn.Parameter(nn.init.trunc_normal_(table, std=0.02))
        self.register_buffer("relative_position_index", relative_index(window))
        if mutual:
            self.register_buffer("position_bias", sine_code(*window[1:], dim))
        self.qkv_self = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(2 * dim if mutual else dim, dim)
        if mutual:
            self.qkv_mut = nn.Linear(dim, 3 * dim, bias=qkv_bias)

    def forward(self, x: Tensor, window: Size, mask: Tensor | None) -> Tensor:
        """Attend in x (B, K, N, C), with the window that fits a small input and the mask of prepare_mask."""
        n = x.shape[2]
        out = self._attend(self.qkv_self(x), self._relative_bias(window), mask).view(x.shape)
        if self.mutual:
            frames = x.unflatten(2, (2, n // 2)) + self.position_bias  # (B, K, 2, N/2, C)
            # the corner of one frame: tokens that a shift in time wraps around stay unmasked, as published
            corner = None if mask is None else mask[:, : n // 2] if fused(x) else mask[:, : n // 2, : n // 2]
            other = self._attend(self.qkv_mut(frames), None, corner, swap=True).view(x.shape)
            out = torch.cat((other, out), dim=-1)
        return self.proj(out)

    def prepare_mask(self, regions: Tensor, like: Tensor) -> Tensor:
        """Return the mask of regions (K, N) for attention: (K, N, N), or for fused attention (K, N, 3, 2)."""
        return shift_code(regions, self.scale) if fused(like) else shift_mask(regions, like)

    def _attend(self, qkv: Tensor, bias: Tensor | None, mask: Tensor | None, swap: bool = False) -> Tensor:
        """Attend with qkv (..., N, 3*C) and bias (h, N, N); swap gives each frame (axis 2) the queries of the other."""
        if swap and mask is not None:
            mask = mask[:, None]  # both frames share the mask
        heads = qkv.unflatten(-1, (3, self.num_heads, -1))
        if fused(qkv):
            return fused_attention(heads, self.scale, bias, mask, swap).flatten(-2)
        biases = [*([] if bias is None else [bias]), *([] if mask is None else [mask.unsqueeze(-3)])]
        return attention(heads, self.scale, biases, swap).flatten(-2)

    def _relative_bias(self, window: Size) -> Tensor:
        """Return the bias (h, N, N) of a window, which may be smaller than the trained one."""
        index = self.relative_position_index
        if window != self.window:
            d, h, w = window
            index = index.view(*self.window, *self.window)[:d, :h, :w, :d, :h, :w].reshape(d * h * w, -1)
        return F.embedding(index, self.relative_position_bias_table).permute(2, 0, 1).contiguous()


class GatedMLP(nn.Module):
    """Apply a feed-forward layer with a gate: fc2(GELU(fc11(x)) * fc12(x))."""

    def __init__(self, dim: int, hidden: int, out: int):
        super().__init__()
        self.fc11 = nn.Linear(dim, hidden)
        self.fc12 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc11(x)) * self.fc12(x))


class Block(nn.Module):
    """Apply a transformer block: add window attention to x, then a gated feed-forward layer."""

    def __init__(self, dim: int, window: Size, num_heads: int, mutual: bool, mlp_ratio: float, qkv_bias: bool,
                 qk_scale: float | None, drop_path: float, checkpoint_attn: bool, checkpoint_ffn: bool):
        super().__init__()
        self.drop_path = drop_path
        self.checkpoint_attn, self.checkpoint_ffn = checkpoint_attn, checkpoint_ffn
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, window, num_heads, mutual, qkv_bias, qk_scale)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = GatedMLP(dim, int(dim * mlp_ratio), dim)

    def forward(self, x: Tensor, window: Size, shift: Size, mask: Tensor | None) -> Tensor:
        """Return (B, D, H, W, C) of x (B, D, H, W, C); windows are shifted if there is a mask."""
        x = x + self._drop(self._run(self.checkpoint_attn, self._attend, x, window, shift, mask))
        return x + self._drop(self._run(self.checkpoint_ffn, self._feed_forward, x))

    def _attend(self, x: Tensor, window: Size, shift: Size, mask: Tensor | None) -> Tensor:
        x = as_multiplied(self.norm1(x))
        d, h, w = x.shape[1:4]
        pad_d, pad_h, pad_w = (-s % side for s, side in zip((d, h, w), window))
        if pad_d or pad_h or pad_w:  # zeros, which act as keys and values, as published
            x = F.pad(x, (0, 0, 0, pad_w, 0, pad_h, 0, pad_d))
        size = x.shape[1:4]
        if mask is not None:
            x = x.roll([-s for s in shift], dims=(1, 2, 3))
        x = from_windows(self.attn(to_windows(x, window), window, mask), window, size)
        if mask is not None:
            x = x.roll(shift, dims=(1, 2, 3))
        return x[:, :d, :h, :w]

    def _feed_forward(self, x: Tensor) -> Tensor:
        return self.mlp(as_multiplied(self.norm2(x)))

    def _run(self, recompute: bool, function: Callable[..., Tensor], *args) -> Tensor:
        """Call a function; with recompute, training stores only its inputs and calls it again for the gradient."""
        if recompute and self.training and torch.is_grad_enabled():
            return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)  # it draws nothing
        return function(*args)

    def _drop(self, branch: Tensor) -> Tensor:
        """Drop a branch for random samples in training and scale it for the others (stochastic depth)."""
        if not self.training or self.drop_path == 0:
            return branch
        keep = 1 - self.drop_path
        return branch * branch.new_empty(len(branch), 1, 1, 1, 1).bernoulli_(keep).div_(keep)


class Group(nn.Module):
    """Apply blocks at one scale; every second block has windows shifted by half."""

    def __init__(self, depth: int, window: Size, drop_path: Sequence[float], **block):
        super().__init__()
        self.window = window
        rates = drop_path[:depth]
        self.blocks = nn.ModuleList(Block(window=window, drop_path=rate, **block) for rate in rates)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, D, H, W, C) of x (B, D, H, W, C)."""
        size = tuple(x.shape[1:4])
        window = tuple(min(s, w) for s, w in zip(size, self.window))
        shift = tuple(w // 2 if s > w else 0 for s, w in zip(size, self.window))  # 0 where one window covers the axis
        mask = None
        if any(shift) and len(self.blocks) > 1:
            mask = self.blocks[0].attn.prepare_mask(shift_regions(size, window, shift, x.device), x)
        for i, block in enumerate(self.blocks):
            x = block(x, window, shift, mask if i % 2 else None)
        return x


# ---- between frames ----------------------------------------------------------


def channels_last(x: Tensor) -> Tensor:
    """Store (B, C, H, W) with channels innermost: CPU convolutions take up to 40 % less time."""
    return x.contiguous(memory_format=torch.channels_last)


class FrameConv(nn.Conv3d):
    """Convolve frames (B*D, C, H, W) 3x3; the weight has the published shape (C_out, C_in, 1, 3, 3)."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__(c_in, c_out, kernel_size=(1, 3, 3), padding=(0, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(channels_last(x), self.weight.squeeze(2), self.bias, padding=1)


class LastConv(FrameConv):
    """Convolve to few channels, merged with the FrameConv before it, since no activation separates them.

    The taps are the channels of the merged convolution and are summed at their positions: less than half of the work.
    """

    def forward(self, x: Tensor, inner: FrameConv | None = None) -> Tensor:
        if inner is None:
            return super().forward(x)
        taps = self.weight.squeeze(2).flip(2, 3).permute(0, 2, 3, 1).flatten(0, 2)  # (C_out * 9, C)
        weight = (taps @ inner.weight.flatten(1)).unflatten(1, (-1, 3, 3))
        x = F.conv2d(channels_last(x), weight, taps @ inner.bias, padding=1)
        return F.fold(x.flatten(2), x.shape[2:], kernel_size=3, padding=1) + self.bias[:, None, None]


class ReflectConv(nn.Conv2d):
    """Convolve with reflected borders; reflection padding has no deterministic gradient on CUDA."""

    def forward(self, x: Tensor) -> Tensor:
        for dim, size in zip((2, 3), self.kernel_size):
            inner = x.narrow(dim, 1, x.shape[dim] - 2)
            ends = inner.narrow(dim, 0, size // 2), inner.narrow(dim, inner.shape[dim] - size // 2, size // 2)
            x = torch.cat((ends[0].flip(dim), x, ends[1].flip(dim)), dim)
        return super().forward(x)


def pad_frames(x: Tensor, count: int) -> Tensor:
    """Append `count` frames of zeros to (B, D, C, H, W)."""
    return F.pad(x, (0, 0, 0, 0, 0, 0, 0, count)) if count else x


def both_directions(x: Tensor) -> Tensor:
    """Concatenate a clip (B, D, ...) and the reversed clip, as (2*B, D, ...)."""
    return torch.cat((x, x.flip(1)))


def backward_and_forward(x: Tensor) -> tuple[Tensor, Tensor]:
    """Invert both_directions: split (2*B, D, ...) into two (B, D, ...) in the order of the clip."""
    backward, forward = x.chunk(2)
    return backward, forward.flip(1)


class DeformableAlignment(nn.Module):
    """Align the features of the next frames with each frame, by a deformable convolution around the flow.

    Source: parallel warping, section 3.3 of the paper. All frames pass through one convolution.
    """

    def __init__(self, dim: int, num_sources: int, deformable_groups: int, max_residue: float):
        super().__init__()
        self.num_sources, self.max_residue = num_sources, max_residue
        self.splits = (18 * deformable_groups, 9 * deformable_groups)  # offsets, modulations
        bound = (9 * dim) ** -0.5
        self.weight = nn.Parameter(torch.empty(dim, dim, 3, 3).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(dim))
        widths = ((1 + num_sources) * dim + 2 * num_sources, dim, dim, dim, sum(self.splits))
        layers = []
        for c_in, c_out in zip(widths, widths[1:]):
            layers += [nn.Conv2d(c_in, c_out, kernel_size=3, padding=1), nn.LeakyReLU(0.1, inplace=True)]
        self.conv_offset = nn.Sequential(*layers[:-1])
        nn.init.zeros_(self.conv_offset[-1].weight)
        nn.init.zeros_(self.conv_offset[-1].bias)

    def forward(self, clip: Tensor, flows: Sequence[Tensor]) -> Tensor:
        """Return aligned features (B, D, C, H, W), zeros for the last frame, of a clip and flows of chain_flows."""
        pairs = (clip.shape[0], clip.shape[1] - 1)  # P = B * (D-1)
        # zeros replace sources beyond the end of the clip
        sources = [pad_frames(clip[:, n:], n - 1) for n in range(1, self.num_sources + 1)]
        flows = [pad_frames(flow, n) for n, flow in enumerate(flows)]
        warped = [warp_frames(source, flow) for source, flow in zip(sources, flows)]
        seen = torch.cat((*warped, clip[:, :-1], *flows), dim=2).flatten(0, 1)
        offset, modulation = self.conv_offset(channels_last(seen)).contiguous().split(self.splits, dim=1)
        # (dy, dx) of each group and tap; equal numbers of groups start from the flow of each source
        offset = self.max_residue * offset.tanh().unflatten(1, (self.num_sources, -1, 2))
        offset = offset + torch.stack(flows, dim=2).flatten(0, 1).flip(2).unsqueeze(2)
        sources = torch.cat(sources, dim=2).flatten(0, 1)  # (P, num_sources * C, H, W)
        aligned = deform_conv(sources, offset.flatten(1, 3), modulation.sigmoid(), self.weight, self.bias)
        return pad_frames(aligned.unflatten(0, pairs), 1)


# ---- stages ------------------------------------------------------------------


class SpaceToDepth(nn.Module):
    """Fold 2x2 pixels into channels, columns first: (B, D, H, W, C) -> (B, D, H/2, W/2, 4*C)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).permute(0, 1, 2, 4, 5, 3, 6).flatten(4)


class DepthToSpace(nn.Module):
    """Invert SpaceToDepth: (B, D, H, W, 4*C) -> (B, D, 2*H, 2*W, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(4, (2, 2, -1)).permute(0, 1, 2, 5, 3, 4, 6).flatten(4, 5).flatten(2, 3)


def change_scale(i: int, dims: Sequence[int]) -> nn.Sequential:
    """Build the first layers of stage i + 1, which keep, halve or double the size."""
    if i == 0:
        return nn.Sequential(nn.Identity(), nn.LayerNorm(dims[0]))
    down = SCALES[i] > SCALES[i - 1]
    width = dims[i - 1] * 4 if down else dims[i - 1] // 4
    fold = SpaceToDepth() if down else DepthToSpace()
    return nn.Sequential(fold, nn.LayerNorm(width), nn.Linear(width, dims[i]))


class Stage(nn.Module):
    """Apply one scale of the U: mutual attention on pairs of frames, self attention on more, parallel warping."""

    def __init__(self, reshape: nn.Module, dim: int, depth: int, num_mutual: int, window: Size,
                 drop_path: Sequence[float], pa_frames: int, deformable_groups: int, max_residue: float,
                 **block):
        super().__init__()
        self.reshape = reshape
        pair = (2, *window[1:])
        self.residual_group1 = Group(num_mutual, pair, drop_path, dim=dim, mutual=True, **block)
        self.linear1 = nn.Linear(dim, dim)
        # drop_path starts from its first rate again, as published
        self.residual_group2 = Group(depth - num_mutual, window, drop_path, dim=dim, mutual=False, **block)
        self.linear2 = nn.Linear(dim, dim)
        if pa_frames:
            self.pa_deform = DeformableAlignment(dim, pa_frames // 2, deformable_groups, max_residue)
            self.pa_fuse = GatedMLP(3 * dim, 3 * dim, dim)

    def forward(self, x: Tensor, flows: Sequence[Tensor] | None) -> Tensor:
        """Return (B, D, H, W, C) of x (B, D, H', W', C') and flows of both directions at the scale of the result."""
        x = self.reshape(x)
        x = x + self.linear1(self.residual_group1(x))
        x = x + self.linear2(self.residual_group2(x))
        if flows is None:
            return x
        aligned = self.pa_deform(both_directions(x.permute(0, 1, 4, 2, 3)), flows)
        aligned = backward_and_forward(aligned.permute(0, 1, 3, 4, 2))
        return self.pa_fuse(torch.cat((x, *aligned), dim=-1))


class ReconstructionGroup(nn.Module):
    """Apply a member of stage 8: add to x a linear layer of blocks with self attention."""

    def __init__(self, dim: int, depth: int, window: Size, drop_path: Sequence[float], **block):
        super().__init__()
        self.residual_group = Group(depth, window, drop_path, dim=dim, mutual=False, **block)
        self.linear = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(self.residual_group(x))


def upsampler(upscale: int) -> nn.Sequential:
    """Build the upsampling (B*D, 64, H, W) -> (B*D, 64, H * upscale, W * upscale), with published layer numbers."""
    factors = [3] if upscale == 3 else [2] * int(math.log2(upscale))
    layers = OrderedDict()
    for i, factor in enumerate(factors):
        layers[f"{5 * i}"] = FrameConv(HEAD_WIDTH, HEAD_WIDTH * factor**2)
        layers[f"{5 * i + 2}"] = nn.PixelShuffle(factor)
        layers[f"{5 * i + 4}"] = nn.LeakyReLU(0.1, inplace=True)
    layers[f"{5 * len(factors)}"] = FrameConv(HEAD_WIDTH, HEAD_WIDTH)
    return nn.Sequential(layers)


class VRT(nn.Module):
    """Restore video by a transformer: super-resolution, deblurring, denoising, or frame interpolation.

    Inputs may have any size: where the network needs more frames or pixels, the last frame, row and column are
    repeated, and the result is cropped.

    Args:
        upscale: size of the output relative to the input: 1, 3, or a power of two.
        in_chans: channels of a frame, 3 (RGB).
        out_chans: channels of an output frame, 3; with pa_frames 0 three for each interpolated frame.
        img_size: frames, rows, columns of a training sample; only frames have an effect, with pa_frames 0.
        window_size: frames, rows, columns of an attention window.
        depths: number of blocks of stages 1 to 7, then of each member of stage 8.
        indep_reconsts: indices of the entries of depths whose windows hold a single frame.
        embed_dims: number of channels for each entry of depths.
        num_heads: attention heads for each entry of depths.
        mul_attn_ratio: fraction of the blocks of stages 1 to 7 with mutual attention, rounded down.
        mlp_ratio: hidden width of feed-forward layers divided by embed_dims.
        qkv_bias: whether queries, keys and values have a bias.
        qk_scale: factor of query-key products; None: 1 / sqrt(channels of a head).
        drop_path_rate: probability that a sample skips the last block in training, linear from 0 at the first.
        spynet_path: file of pretrained SPyNet weights; None: training starts from zero flow.
        pa_frames: number of neighbours aligned to a frame; 0: frame interpolation, without flow and alignment.
        deformable_groups: number of groups of channels with separate offsets.
        recal_all_flows: key of KAIR's option files, without effect.
        nonblind_denoising: take the noise level as one more input channel.
        use_checkpoint_attn: recompute attention for the gradient: less memory, more time.
        use_checkpoint_ffn: recompute feed-forward layers for the gradient: less memory, more time.
        no_checkpoint_attn_blocks: indices of the entries of depths without use_checkpoint_attn.
        no_checkpoint_ffn_blocks: indices of the entries of depths without use_checkpoint_ffn.

    Raises: ValueError: options are out of range or do not fit each other.

    Source: models/network_vrt.py of KAIR, with equal weights and numbers. Differs: inputs of any size; correct relative
    positions in windows that shrink in space; checkpointing only as the options set it; zero flow at the start.
    """

    @checked
    def __init__(
        self,
        upscale: PositiveInt = 4,
        in_chans: PositiveInt = 3,
        out_chans: PositiveInt = 3,
        img_size: Sequence[PositiveInt] = (6, 64, 64),
        window_size: Sequence[PositiveInt] = (6, 8, 8),
        depths: Sequence[PositiveInt] = (8,) * 7 + (4,) * 6,
        indep_reconsts: Sequence[NonNegativeInt] = (11, 12),
        embed_dims: Sequence[PositiveInt] = (120,) * 7 + (180,) * 6,
        num_heads: Sequence[PositiveInt] = (6,) * 13,
        mul_attn_ratio: Fraction = 0.75,
        mlp_ratio: PositiveFloat = 2.0,
        qkv_bias: bool = True,
        qk_scale: PositiveFloat | None = None,
        drop_path_rate: ProperFraction = 0.2,
        spynet_path: str | None = None,
        pa_frames: Literal[0, 2, 4, 6] = 2,
        deformable_groups: NonNegativeInt = 16,
        recal_all_flows: bool = False,
        nonblind_denoising: bool = False,
        use_checkpoint_attn: bool = False,
        use_checkpoint_ffn: bool = False,
        no_checkpoint_attn_blocks: Sequence[NonNegativeInt] = (),
        no_checkpoint_ffn_blocks: Sequence[NonNegativeInt] = (),
    ):
        super().__init__()
        num_mutual = [int(depth * mul_attn_ratio) for depth in depths[:NUM_STAGES]]
        check_task(upscale, in_chans, out_chans, img_size, pa_frames, nonblind_denoising)
        check_stages(depths, embed_dims, num_heads, num_mutual, window_size)
        if pa_frames:
            check_alignment(embed_dims[:NUM_STAGES], pa_frames // 2, deformable_groups)
        self.upscale, self.pa_frames, self.num_frames = upscale, pa_frames, img_size[0]
        self.in_chans, self.nonblind_denoising = in_chans, nonblind_denoising
        window, first, last = tuple(window_size), embed_dims[0], embed_dims[-1]
        # the sine code of mutual attention has a fixed size, so its windows cannot shrink
        coarsest = max((2**scale for scale, count in zip(SCALES, num_mutual) if count), default=0)
        self.min_size = (coarsest * window[1], coarsest * window[2])
        self.min_frames = max(1 + pa_frames // 2, 2 if coarsest else 1)
        rates = [drop_path_rate * i / (sum(depths) - 1) for i in range(sum(depths))]

        def options(i: int) -> dict:
            """Return the arguments of the blocks of entry i of depths."""
            start = sum(depths[:i])
            return {
                "dim": embed_dims[i], "depth": depths[i], "drop_path": rates[start : start + depths[i]],
                "num_heads": num_heads[i], "mlp_ratio": mlp_ratio, "qkv_bias": qkv_bias, "qk_scale": qk_scale,
                "checkpoint_attn": use_checkpoint_attn and i not in no_checkpoint_attn_blocks,
                "checkpoint_ffn": use_checkpoint_ffn and i not in no_checkpoint_ffn_blocks,
            }

        self.conv_first = FrameConv((9 if pa_frames else 1) * in_chans + nonblind_denoising, first)
        if pa_frames:
            self.spynet = SpyNet(spynet_path)
        for i, scale in enumerate(SCALES):
            self.add_module(f"stage{i + 1}", Stage(
                change_scale(i, embed_dims), num_mutual=num_mutual[i], window=window,
                pa_frames=pa_frames, deformable_groups=deformable_groups, max_residue=10 / 2**scale,
                **options(i)))
        widen = nn.Sequential(nn.Identity(), nn.LayerNorm(first), nn.Linear(first, embed_dims[NUM_STAGES]))
        self.stage8 = nn.Sequential(widen, *(
            ReconstructionGroup(window=(1, *window[1:]) if i in indep_reconsts else window, **options(i))
            for i in range(NUM_STAGES, len(depths))))
        self.norm = nn.LayerNorm(last)
        self.conv_after_body = nn.Linear(last, first)
        self._add_head(first, out_chans)

    def _add_head(self, dim: int, out_chans: int) -> None:
        """Add the layers from features to frames."""
        if not self.pa_frames:
            self.linear_fuse = nn.Conv2d(dim * self.num_frames, HEAD_WIDTH, 1)
            self.conv_last = ReflectConv(HEAD_WIDTH, out_chans, 7)
        elif self.upscale == 1:
            self.conv_last = LastConv(dim, out_chans)
        else:
            self.conv_before_upsample = nn.Sequential(FrameConv(dim, HEAD_WIDTH), nn.LeakyReLU(0.01))
            self.upsample = upsampler(self.upscale)
            self.conv_last = LastConv(HEAD_WIDTH, out_chans)

    def forward(self, x: Tensor) -> Tensor:
        """Restore a clip, or interpolate its frames.

        Args: x: (B, D, 3, H, W), RGB in [0, 1]; with nonblind_denoising a fourth channel, the noise level.

        Returns: (B, D, 3, H * upscale, W * upscale), not clipped; with pa_frames 0 (B, out_chans / 3, 3, H, W).

        Raises: ValueError: the shape is not that of a clip, or with pa_frames 0 not of img_size[0] frames.
        """
        channels = self.in_chans + self.nonblind_denoising
        require(x.ndim == 5 and x.shape[2] == channels and x.numel() > 0,
                f"input must be (batch, frames, {channels}, height, width), got {tuple(x.shape)}")
        frames, height, width = x.shape[1], x.shape[3], x.shape[4]
        require(self.pa_frames or frames == self.num_frames,
                f"with pa_frames 0 input must have img_size[0] = {self.num_frames} frames, got {frames}")
        x = self._pad(x)
        x = self._restore(x)[:, :frames] if self.pa_frames else self._interpolate(x)
        return x[..., : height * self.upscale, : width * self.upscale]

    def _pad(self, x: Tensor) -> Tensor:
        """Repeat the last frame, row and column up to a size that the network takes."""
        b, d, _, h, w = x.shape
        pad_h, pad_w = (math.ceil(max(s, least) / 8) * 8 - s for s, least in zip((h, w), self.min_size))
        if pad_h or pad_w:
            x = F.pad(x.flatten(0, 1), (0, pad_w, 0, pad_h), mode="replicate").unflatten(0, (b, d))
        if d < self.min_frames:
            x = torch.cat((x, x[:, -1:].expand(-1, self.min_frames - d, -1, -1, -1)), dim=1)
        return x

    def _restore(self, x: Tensor) -> Tensor:
        """Restore (B, D, C, H, W) to (B, D, 3, H * upscale, W * upscale)."""
        frames, noise = x[:, :, : self.in_chans], x[:, :, self.in_chans :]
        clip = both_directions(frames)
        flows = self._flows(clip)
        neighbours = pad_frames(warp_frames(clip[:, 1:], flows[0][0], "nearest4"), 1)
        x = self._body(torch.cat((frames, *backward_and_forward(neighbours), noise), dim=2), flows)
        base = frames.flatten(0, 1)
        if self.upscale > 1:
            *layers, inner = self.upsample
            x = nn.Sequential(self.conv_before_upsample, *layers)(x)
            base = F.interpolate(base, scale_factor=self.upscale, mode="bilinear", align_corners=False)
        x = self.conv_last(x, inner) if self.upscale > 1 else self.conv_last(x)
        return (x + base).unflatten(0, frames.shape[:2])

    def _interpolate(self, x: Tensor) -> Tensor:
        """Interpolate (B, D, C, H, W) to (B, out_chans / 3, 3, H, W)."""
        mean = x.mean(dim=(1, 3, 4), keepdim=True)
        y = self._body(x - mean, flows=[None] * 4)
        y = self.linear_fuse(y.unflatten(0, x.shape[:2]).flatten(1, 2))  # all frames at once, as channels
        return self.conv_last(F.leaky_relu(y, 0.2)).unflatten(1, (-1, 3)) + mean

    def _flows(self, clip: Tensor) -> list[list[Tensor]]:
        """Return flows of a clip (2*B, D, 3, H, W) to 1..pa_frames/2 frames ahead, for scales 1, 1/2, 1/4, 1/8."""
        flows = self.spynet(clip[:, :-1].flatten(0, 1), clip[:, 1:].flatten(0, 1))
        pairs = (clip.shape[0], clip.shape[1] - 1)
        return [chain_flows(flow.unflatten(0, pairs), self.pa_frames // 2) for flow in flows]

    def _body(self, x: Tensor, flows: Sequence[list[Tensor] | None]) -> Tensor:
        """Return features (B*D, C, H, W) of (B, D, C', H, W): a convolution, plus the U and stage 8."""
        first = self.conv_first(x.flatten(0, 1))
        x = first.unflatten(0, x.shape[:2]).permute(0, 1, 3, 4, 2)
        x1 = self.stage1(x, flows[0])
        x2 = self.stage2(x1, flows[1])
        x3 = self.stage3(x2, flows[2])
        x = self.stage4(x3, flows[3])
        x = self.stage5(x, flows[2]) + x3
        x = self.stage6(x, flows[1]) + x2
        x = self.stage7(x, flows[0]) + x1
        x = self.conv_after_body(self.norm(self.stage8(x)))
        return first + x.permute(0, 1, 4, 2, 3).flatten(0, 1)


# ---- options -----------------------------------------------------------------


def require(valid: bool, message: str) -> None:
    """Raise ValueError unless a condition holds."""
    if not valid:
        raise ValueError(f"VRT: {message}")


def check_task(upscale, in_chans, out_chans, img_size, pa_frames, nonblind_denoising) -> None:
    """Check the options of inputs and outputs."""
    require(in_chans == 3, f"in_chans must be 3 (nonblind_denoising adds the noise level), got {in_chans}")
    require(len(img_size) == 3, f"img_size must be [frames, rows, columns], got {list(img_size)}")
    if pa_frames:
        power = upscale & (upscale - 1) == 0
        require(power or upscale == 3, f"upscale must be 1, 3, or a power of two, got {upscale}")
        require(out_chans == 3, f"out_chans must be 3, got {out_chans}")
        return
    require(upscale == 1, f"upscale must be 1 with pa_frames 0, got {upscale}")
    require(out_chans % 3 == 0, f"out_chans must be 3 for each interpolated frame, got {out_chans}")
    require(img_size[0] > 1, f"img_size[0] must be 2 frames or more with pa_frames 0, got {img_size[0]}")
    require(not nonblind_denoising, "nonblind_denoising must be false with pa_frames 0")


def check_stages(depths, dims, heads, num_mutual, window) -> None:
    """Check that widths can be added, split into heads, folded in space, and coded by position."""
    counts = (len(depths), len(dims), len(heads))
    require(len(set(counts)) == 1 and counts[0] > NUM_STAGES,
            f"depths, embed_dims and num_heads must have equally many entries, 8 or more, got {counts}")
    require(len(window) == 3, f"window_size must be [frames, rows, columns], got {list(window)}")
    for up, down in ((4, 2), (5, 1), (6, 0)):
        require(dims[up] == dims[down],
                f"embed_dims[{up}] must equal embed_dims[{down}] = {dims[down]}, got {dims[up]}")
    for i, dim in enumerate(dims):
        require(dim % heads[i] == 0,
                f"embed_dims[{i}] must be a multiple of num_heads[{i}] = {heads[i]}, got {dim}")
        fourfold = i in (3, 4, 5) or (i < NUM_STAGES and num_mutual[i] > 0)
        require(not fourfold or dim % 4 == 0, f"embed_dims[{i}] must be a multiple of 4, got {dim}")


def check_alignment(dims, num_sources, groups) -> None:
    """Check that the deformable convolution can group the channels."""
    even = " and even" if num_sources == 2 else ""
    require(groups and 9 * groups % num_sources == 0,
            f"deformable_groups must be positive{even} with pa_frames {2 * num_sources}, got {groups}")
    for i, dim in enumerate(dims):
        require(dim % num_sources == 0,
                f"embed_dims[{i}] must be a multiple of {num_sources} (pa_frames / 2), got {dim}")
        require(dim * num_sources % groups == 0,
                f"embed_dims[{i}] * pa_frames / 2 = {dim * num_sources} must be a multiple of "
                f"deformable_groups = {groups}")
