"""VRT, the video restoration transformer: attention within and between frames, joined by flow-guided alignment.

Source: Liang et al. 2022, "VRT: A Video Restoration Transformer", arXiv:2201.12288. Arguments, key names and numbers follow
KAIR, so published weights load strictly; what differs is said at the class.

Legend: B batch, D frames, C channels, H W pixels; K windows in a clip, N tokens in a window, h heads; P pairs of frames.
Features travel channels-last, (B, D, H, W, C), from the first to the last transformer; convolutions see (B*D, C, H, W).
"""
import math
from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import deform_conv2d

from models.network_spynet import SpyNet, flow_warp

Size = tuple[int, int, int]  # frames, rows, columns
NUM_STAGES = 7  # the U: 1, 1/2, 1/4, 1/8, 1/4, 1/2, 1; later entries of depths belong to stage 8
SCALES = (0, 1, 2, 3, 2, 1, 0)  # log2 of the downscaling of stages 1..7
HEAD_WIDTH = 64


# ---------------------------------------------------------------------------------------------- windows and attention


def to_windows(x: Tensor, window: Size) -> Tensor:
    """(B, D, H, W, C), sizes multiples of the window -> (B, K, N, C)."""
    b, d, h, w, c = x.shape
    wd, wh, ww = window
    x = x.view(b, d // wd, wd, h // wh, wh, w // ww, ww, c)
    return x.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(b, -1, wd * wh * ww, c)


def from_windows(x: Tensor, window: Size, size: Size) -> Tensor:
    """(B, K, N, C) -> (B, D, H, W, C); undoes to_windows."""
    wd, wh, ww = window
    d, h, w = size
    x = x.view(x.shape[0], d // wd, h // wh, w // ww, wd, wh, ww, x.shape[-1])
    return x.permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(x.shape[0], d, h, w, x.shape[-1])


def shift_mask(size: Size, window: Size, shift: Size, like: Tensor) -> Tensor:
    """(K, N, N): -100 where the cyclic shift put tokens into one window that are no neighbours, else 0."""
    padded = [s + -s % w for s, w in zip(size, window)]
    d, h, w = (torch.arange(p, device=like.device) >= p - s for p, s in zip(padded, shift))  # True: came round the edge
    region = 4 * d[:, None, None] + 2 * h[:, None] + w
    region = to_windows(region[None, ..., None], window)[0, ..., 0]  # (K, N)
    return (region[:, :, None] != region[:, None, :]).to(like.dtype) * -100.0


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None, fused: bool) -> Tensor:
    """softmax(q k^T * scale + bias) v over (..., h, N, C); bias broadcasts to (..., h, N, N)."""
    if fused:  # never stores N x N, but slower on CPU
        bias = None if bias is None else bias.expand(*q.shape[:-1], q.shape[-2]).flatten(0, -4)
        flat = [t.flatten(0, -4) for t in (q, k, v)]
        return F.scaled_dot_product_attention(*flat, attn_mask=bias, scale=scale).view(q.shape)
    scores = (q * scale) @ k.transpose(-2, -1)
    if bias is not None:
        scores += bias
    return scores.softmax(dim=-1) @ v


def relative_index(window: Size) -> Tensor:
    """(N, N) row of the bias table for each pair (query, key) of a window: one row per difference of positions."""
    axes = torch.meshgrid(*(torch.arange(s) for s in window), indexing="ij")
    index = 0
    for position, size in zip(axes, window):
        position = position.flatten()
        index = index * (2 * size - 1) + position[:, None] - position[None, :] + size - 1
    return index


def sine_code(height: int, width: int, dim: int) -> Tensor:
    """(1, H*W, dim) fixed position code: first half of the channels from the row, second half from the column."""
    half = dim // 2
    frequency = 10000.0 ** (2 * (torch.arange(half) // 2) / half)

    def encode(size: int) -> Tensor:
        angle = torch.arange(1, size + 1)[:, None] / (size + 1e-6) * (2 * math.pi) / frequency  # (size, half)
        return torch.stack((angle[:, 0::2].sin(), angle[:, 1::2].cos()), dim=2).flatten(1)

    rows = encode(height)[:, None].expand(height, width, half)
    columns = encode(width)[None].expand(height, width, half)
    return torch.cat((rows, columns), dim=2).view(1, height * width, 2 * half)


class WindowAttention(nn.Module):
    """Self attention within a window of several frames; with mutual, also attention between its two frames.

    In mutual attention each frame's queries meet the other frame's keys and values: implicit motion estimation and warping.
    """

    def __init__(self, dim: int, window: Size, num_heads: int, qkv_bias: bool, qk_scale: float | None, mutual: bool):
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
        """x: (B, K, N, C); window: the size in force, which small inputs shrink; mask: (K, N, N)."""
        b, k, n, c = x.shape
        bias = self._relative_bias(window)  # (h, N, N)
        if mask is not None:
            bias = bias + mask[:, None]  # (K, h, N, N)
        query, key, value = self._heads(self.qkv_self(x))
        out = attention(query, key, value, self.scale, bias, x.is_cuda).transpose(-3, -2).reshape(x.shape)
        if self.mutual:
            frames = self.qkv_mut(x.view(b, k, 2, n // 2, c) + self.position_bias)
            query, key, value = self._heads(frames)  # (B, K, 2, h, N/2, C/h)
            if mask is not None:  # one frame's corner of the mask: a wrap-around in time is not masked here, as published
                mask = mask[:, None, None, : n // 2, : n // 2]
            warped = attention(query.flip(2), key, value, self.scale, mask, x.is_cuda).transpose(-3, -2).reshape(x.shape)
            out = torch.cat((warped, out), dim=-1)
        return self.proj(out)

    def _heads(self, qkv: Tensor) -> tuple[Tensor, ...]:
        """(..., N, 3*C) -> three of (..., h, N, C/h)."""
        return qkv.unflatten(-1, (3, self.num_heads, -1)).transpose(-4, -2).unbind(-3)

    def _relative_bias(self, window: Size) -> Tensor:
        """Bias (h, N, N) of the window in force. Pairs keep their difference of positions when a window shrinks on any axis."""
        index = self.relative_position_index
        if window != self.window:
            d, h, w = window
            index = index.view(*self.window, *self.window)[:d, :h, :w, :d, :h, :w].reshape(d * h * w, -1)
        return F.embedding(index, self.relative_position_bias_table).permute(2, 0, 1)


class GatedMLP(nn.Module):
    """Feed-forward layer with a gate: fc2(GELU(fc11(x)) * fc12(x))."""

    def __init__(self, dim: int, hidden: int, out: int | None = None):
        super().__init__()
        self.fc11 = nn.Linear(dim, hidden)
        self.fc12 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, out or dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc11(x)) * self.fc12(x))


class Block(nn.Module):
    """Transformer block: x + attention within windows, then x + gated feed-forward."""

    def __init__(
        self, dim: int, window: Size, num_heads: int, mutual: bool, mlp_ratio: float, qkv_bias: bool, qk_scale: float | None,
        drop_path: float, norm_layer: type[nn.Module], checkpoint_attn: bool, checkpoint_ffn: bool,
    ):  # fmt: skip
        super().__init__()
        self.drop_path, self.checkpoint_attn, self.checkpoint_ffn = drop_path, checkpoint_attn, checkpoint_ffn
        self.norm1 = norm_layer(dim)
        self.attn = WindowAttention(dim, window, num_heads, qkv_bias, qk_scale, mutual)
        self.norm2 = norm_layer(dim)
        self.mlp = GatedMLP(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, window: Size, shift: Size, mask: Tensor | None) -> Tensor:
        x = x + self._drop(self._run(self.checkpoint_attn, self._attend, x, window, shift, mask))
        return x + self._drop(self._run(self.checkpoint_ffn, self._feed_forward, x))

    def _attend(self, x: Tensor, window: Size, shift: Size, mask: Tensor | None) -> Tensor:
        x = self.norm1(x)
        d, h, w = x.shape[1:4]
        pad_d, pad_h, pad_w = (-s % size for s, size in zip((d, h, w), window))
        if pad_d or pad_h or pad_w:  # zeros that are keys and values like any other token, as published
            x = F.pad(x, (0, 0, 0, pad_w, 0, pad_h, 0, pad_d))
        size = tuple(x.shape[1:4])
        if mask is not None:
            x = x.roll([-s for s in shift], dims=(1, 2, 3))
        x = from_windows(self.attn(to_windows(x, window), window, mask), window, size)
        if mask is not None:
            x = x.roll(shift, dims=(1, 2, 3))
        return x[:, :d, :h, :w]

    def _feed_forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.norm2(x))

    def _run(self, recompute: bool, function, *args) -> Tensor:
        """Call the function; in training with recompute, keep only its input and compute it again in the backward pass."""
        if recompute and self.training and torch.is_grad_enabled():
            return checkpoint(function, *args, use_reentrant=False)
        return function(*args)

    def _drop(self, branch: Tensor) -> Tensor:
        """Stochastic depth: in training, drop the branch for some samples and scale it up for the others."""
        if not self.training or self.drop_path == 0.0:
            return branch
        keep = branch.new_empty(len(branch), 1, 1, 1, 1).bernoulli_(1 - self.drop_path)
        return branch * keep.div_(1 - self.drop_path)


class Group(nn.Module):
    """Blocks at one resolution; every second one with its windows shifted by half."""

    def __init__(self, depth: int, window: Size, drop_path: Sequence[float], **block):
        super().__init__()
        self.window = window
        self.blocks = nn.ModuleList(Block(window=window, drop_path=drop_path[i], **block) for i in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        size = tuple(x.shape[1:4])
        window = tuple(min(s, w) for s, w in zip(size, self.window))  # an axis of one window needs neither padding nor shift
        shift = tuple(w // 2 if s > w else 0 for s, w in zip(size, self.window))
        shifts = any(shift) and len(self.blocks) > 1
        mask = shift_mask(size, window, shift, x) if shifts else None  # made once for all blocks of this forward pass
        for i, block in enumerate(self.blocks):
            x = block(x, window, shift, mask if i % 2 else None)
        return x


# ---------------------------------------------------------------------------------------------------- between frames


class FrameConv(nn.Conv3d):
    """3x3 convolution of single frames (B*D, C, H, W); its weight keeps the published shape (C_out, C_in, 1, 3, 3)."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__(c_in, c_out, kernel_size=(1, 3, 3), padding=(0, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight.squeeze(2), self.bias, padding=1)


def pad_frames(x: Tensor, count: int) -> Tensor:
    """(B, D, C, H, W) -> (B, D + count, C, H, W): zeros for frames that do not exist."""
    return F.pad(x, (0, 0, 0, 0, 0, 0, 0, count)) if count else x


def both_directions(x: Tensor) -> Tensor:
    """(B, D, ...) -> (2B, D, ...): the clip and its time reverse, so that "from the next frame" serves for the previous too."""
    return torch.cat((x, x.flip(1)))


def backward_and_forward(x: Tensor) -> tuple[Tensor, Tensor]:
    """(2B, D, ...) -> two of (B, D, ...) in the clip's own order; undoes both_directions."""
    backward, forward = x.chunk(2)
    return backward, forward.flip(1)


def chain_flows(flow: Tensor, steps: int) -> list[Tensor]:
    """Flows over 1..steps frames from those over one.

    Args:
        flow: (B, D-1, 2, H, W), entry t pulls frame t+1 onto frame t.
        steps: how many, at most D-1.

    Returns:
        steps tensors; number n is (B, D-n, 2, H, W), entry t pulls frame t+n onto frame t.
    """
    flows = [flow]
    for n in range(1, steps):
        near, far = flows[-1][:, :-1], flow[:, n:]  # t+n -> t and t+n+1 -> t+n
        grid = near.flatten(0, 1).permute(0, 2, 3, 1)
        flows.append(near + flow_warp(far.flatten(0, 1), grid).view_as(near))
    return flows


class DeformableAlignment(nn.Module):
    """Pull the features of the following frames onto each frame by a deformable convolution around the flow.

    Source: parallel warping, section 3.3 of the paper. All frames of both directions go through one convolution.
    """

    def __init__(self, dim: int, num_sources: int, deformable_groups: int, max_residue: float):
        super().__init__()
        self.num_sources, self.max_residue = num_sources, max_residue
        bound = (9 * dim) ** -0.5
        self.weight = nn.Parameter(torch.empty(dim, dim, 3, 3).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(dim))
        widths = ((1 + num_sources) * dim + 2 * num_sources, dim, dim, dim, 27 * deformable_groups)
        layers = []
        for c_in, c_out in zip(widths, widths[1:]):
            layers += [nn.Conv2d(c_in, c_out, 3, padding=1), nn.LeakyReLU(0.1, inplace=True)]
        self.conv_offset = nn.Sequential(*layers[:-1])
        nn.init.zeros_(self.conv_offset[-1].weight)
        nn.init.zeros_(self.conv_offset[-1].bias)

    def forward(self, clip: Tensor, flows: Sequence[Tensor]) -> Tensor:
        """clip (B, D, C, H, W), flows as from chain_flows -> (B, D, C, H, W); zeros for the last frame, which nothing follows."""
        b, d = clip.shape[:2]
        # P = B*(D-1) pairs; where only the farther source does not exist, zeros are warped in its place
        target = clip[:, :-1].flatten(0, 1)
        sources = [pad_frames(clip[:, n:], n - 1).flatten(0, 1) for n in range(1, self.num_sources + 1)]
        flows = [pad_frames(flow, n).flatten(0, 1) for n, flow in enumerate(flows)]
        warped = [flow_warp(source, flow.permute(0, 2, 3, 1)) for source, flow in zip(sources, flows)]

        residue, modulation = self.conv_offset(torch.cat((*warped, target, *flows), dim=1)).tensor_split((-9,), dim=1)
        raise NotImplementedError


