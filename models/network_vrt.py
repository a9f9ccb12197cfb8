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

from models.network_spynet import SpyNet, flow_warp, sample

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


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, biases: Sequence[Tensor], fused: bool) -> Tensor:
    """softmax(q k^T * scale + biases) v over (..., h, N, C); each bias broadcasts to (..., h, N, N)."""
    if fused:  # never stores N x N; on CPU it was slower at all of VRT's sizes
        bias = sum(biases).expand(*q.shape[:-1], q.shape[-2]).flatten(0, -4) if biases else None
        q, k, v = (t.flatten(0, -4) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    scores = (q * scale) @ k.transpose(-2, -1)
    for bias in biases:
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
        n = x.shape[2]
        query, key, value = self._heads(self.qkv_self(x))  # (B, K, h, N, C/h)
        biases = [self._relative_bias(window)] if mask is None else [self._relative_bias(window), mask[:, None]]
        out = self._merge(attention(query, key, value, self.scale, biases, x.is_cuda), x)
        if self.mutual:
            frames = x.unflatten(2, (2, n // 2)) + self.position_bias
            query, key, value = self._heads(self.qkv_mut(frames))  # (B, K, 2, h, N/2, C/h)
            # the mask is one frame's corner: what the shift wraps around in time is not masked here, as published
            biases = [] if mask is None else [mask[:, None, None, : n // 2, : n // 2]]
            warped = self._merge(attention(query.flip(2), key, value, self.scale, biases, x.is_cuda), x)
            out = torch.cat((warped, out), dim=-1)
        return self.proj(out)

    @staticmethod
    def _merge(heads: Tensor, x: Tensor) -> Tensor:
        """(..., h, N, C/h) -> the shape of x, (B, K, N, C)."""
        return heads.transpose(-3, -2).reshape(x.shape)

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


def channels_last(x: Tensor) -> Tensor:
    """The same (B, C, H, W) with channels innermost in memory: convolutions on CPU run a tenth to a third faster."""
    return x.contiguous(memory_format=torch.channels_last)


class FrameConv(nn.Conv3d):
    """3x3 convolution of single frames (B*D, C, H, W); its weight keeps the published shape (C_out, C_in, 1, 3, 3)."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__(c_in, c_out, kernel_size=(1, 3, 3), padding=(0, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(channels_last(x), self.weight.squeeze(2), self.bias, padding=1)


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
        self.splits = (18 * deformable_groups, 9 * deformable_groups)  # offsets, modulations
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

        offset = self.conv_offset(channels_last(torch.cat((*warped, target, *flows), dim=1))).contiguous()
        offset, modulation = offset.split(self.splits, dim=1)
        offset = self.max_residue * offset.tanh().unflatten(1, (self.num_sources, -1, 2))  # (dy, dx) of each group and tap
        offset = offset + torch.stack(flows, dim=1).flip(2).unsqueeze(2)  # a share of the groups follows each source's flow
        aligned = deform_conv(
            torch.cat(sources, dim=1), offset.flatten(1, 3), modulation.sigmoid(), self.weight, self.bias
        )  # (P, C, H, W)
        return pad_frames(aligned.unflatten(0, (b, d - 1)), 1)


def deform_conv(x: Tensor, offset: Tensor, modulation: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Modulated deformable 3x3 convolution, stride 1, padding 1.

    torchvision's kernel is used on CUDA. Its CPU kernel runs in one thread and takes half of a training step; reading all
    taps at once with grid_sample gives the same numbers 5 to 10 times faster.

    Args:
        x: (P, C_in, H, W).
        offset: (P, g*9*2, H, W), pixels, (dy, dx) for each of g groups of channels and each tap.
        modulation: (P, g*9, H, W), a factor for each tap.
        weight: (C_out, C_in / G, 3, 3), for G groups of channels.
        bias: (C_out,).

    Returns:
        (P, C_out, H, W).
    """
    if x.is_cuda:
        return deform_conv2d(x, offset, weight, bias, padding=1, mask=modulation)
    p, c, h, w = x.shape
    groups, weight_groups = modulation.shape[1] // 9, c // weight.shape[1]
    offset = offset.view(p * groups, 9, 2, h, w)
    tap = torch.arange(9, device=x.device)[:, None, None]
    rows = offset[:, :, 0] + (tap // 3 - 1 + torch.arange(h, device=x.device)[:, None])
    columns = offset[:, :, 1] + (tap % 3 - 1 + torch.arange(w, device=x.device))
    taps = sample(x.view(p * groups, -1, h, w), columns.flatten(1, 2), rows.flatten(1, 2))  # (P*g, C_in/g, 9*H, W)
    taps = taps.view(p, groups, -1, 9, h * w) * modulation.view(p, groups, 1, 9, h * w)
    out = weight.view(weight_groups, weight.shape[0] // weight_groups, -1) @ taps.view(p, weight_groups, -1, h * w)
    return out.view(p, -1, h, w) + bias[:, None, None]


# ------------------------------------------------------------------------------------------------------------ stages


class SpaceToDepth(nn.Module):
    """(B, D, H, W, C) -> (B, D, H/2, W/2, 4*C); of the 2x2 offsets the column is the slow one."""

    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).permute(0, 1, 2, 4, 5, 3, 6).flatten(4)


class DepthToSpace(nn.Module):
    """(B, D, H, W, 4*C) -> (B, D, 2*H, 2*W, C); undoes SpaceToDepth."""

    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(4, (2, 2, -1)).permute(0, 1, 2, 5, 3, 4, 6).flatten(4, 5).flatten(2, 3)


class Stage(nn.Module):
    """One scale of the U: change of scale, mutual and self attention, alignment of the neighbouring frames and their fusion.

    group1 holds the blocks with mutual attention, in windows of two frames; group2 those with self attention alone.
    """

    def __init__(
        self, reshape: nn.Module, dim: int, depth: int, num_mutual: int, window: Size, drop_path: Sequence[float],
        pa_frames: int, deformable_groups: int, max_residue: float, **block,
    ):  # fmt: skip
        super().__init__()
        self.reshape = reshape
        self.residual_group1 = Group(num_mutual, (2, *window[1:]), drop_path, dim=dim, mutual=True, **block)
        self.linear1 = nn.Linear(dim, dim)
        # group2 counts its rates from the stage's first again: the published recipe
        self.residual_group2 = Group(depth - num_mutual, window, drop_path, dim=dim, mutual=False, **block)
        self.linear2 = nn.Linear(dim, dim)
        self.pa_frames = pa_frames
        if pa_frames:
            self.pa_deform = DeformableAlignment(dim, pa_frames // 2, deformable_groups, max_residue)
            self.pa_fuse = GatedMLP(3 * dim, 3 * dim, dim)

    def forward(self, x: Tensor, flows: Sequence[Tensor]) -> Tensor:
        """x (B, D, H', W', C'), flows of both directions at this scale -> (B, D, H, W, C)."""
        x = self.reshape(x)
        x = x + self.linear1(self.residual_group1(x))
        x = x + self.linear2(self.residual_group2(x))
        if not self.pa_frames:
            return x
        clip = both_directions(x.permute(0, 1, 4, 2, 3))
        aligned = self.pa_deform(clip, flows).permute(0, 1, 3, 4, 2)
        return self.pa_fuse(torch.cat((x, *backward_and_forward(aligned)), dim=-1))


class ReconstructionGroup(nn.Module):
    """A member of stage 8: x + linear(self-attention blocks)."""

    def __init__(self, dim: int, depth: int, window: Size, drop_path: Sequence[float], **block):
        super().__init__()
        self.residual_group = Group(depth, window, drop_path, dim=dim, mutual=False, **block)
        self.linear = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(self.residual_group(x))


class VRT(nn.Module):
    """Video restoration transformer: super-resolution, deblurring, denoising, or frame interpolation.

    Any size of input works: where the network itself needs more frames or pixels, the last frame, row and column are repeated
    and the result is cut back.

    Args:
        upscale: factor of the output's size: 1, 3, or a power of two.
        in_chans: channels of a frame, 3 (RGB).
        out_chans: channels of an output frame, 3; for pa_frames 0 three for each frame in between.
        img_size: frames, rows, columns of a training sample; only the number of frames matters, and only for pa_frames 0.
        window_size: frames, rows, columns of an attention window.
        depths: number of blocks of the seven stages, then of each member of stage 8.
        indep_reconsts: entries of depths whose windows hold one frame only.
        embed_dims: number of channels, one for each entry of depths.
        num_heads: attention heads, one for each entry of depths.
        mul_attn_ratio: share of blocks with mutual attention in the seven stages, rounded down.
        mlp_ratio: hidden width of the feed-forward layers relative to the number of channels.
        qkv_bias: whether queries, keys and values have a bias.
        qk_scale: factor on query-key products; None: head width ** -0.5.
        drop_path_rate: stochastic depth of the last block; grows linearly from 0.
        norm_layer: normalisation over channels.
        spynet_path: pretrained SPyNet weights; None: the flow is trained from zero.
        pa_frames: neighbours that are aligned to each frame, 2, 4 or 6; 0: frame interpolation, without flow or alignment.
        deformable_groups: groups of channels with an offset of their own.
        recal_all_flows: accepted for KAIR's option files; without effect, as there.
        nonblind_denoising: the input has one more channel, the noise level.
        use_checkpoint_attn: recompute attention in the backward pass: less memory, more time.
        use_checkpoint_ffn: the same for feed-forward layers.
        no_checkpoint_attn_blocks: entries of depths left out of use_checkpoint_attn.
        no_checkpoint_ffn_blocks: entries of depths left out of use_checkpoint_ffn.

    Raises:
        ValueError: options that fit no network, with what would.

    Source: models/network_vrt.py in KAIR; weights and numbers are the same. What differs: inputs of any size; a spatially
    shrunken window keeps the right relative positions; only the options decide about checkpointing; flow from zero without
    a SPyNet file.
    """

    def __init__(
        self,
        upscale: int = 4,
        in_chans: int = 3,
        out_chans: int = 3,
        img_size: Sequence[int] = (6, 64, 64),
        window_size: Sequence[int] = (6, 8, 8),
        depths: Sequence[int] = (8,) * 7 + (4,) * 6,
        indep_reconsts: Sequence[int] = (11, 12),
        embed_dims: Sequence[int] = (120,) * 7 + (180,) * 6,
        num_heads: Sequence[int] = (6,) * 13,
        mul_attn_ratio: float = 0.75,
        mlp_ratio: float = 2.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        drop_path_rate: float = 0.2,
        norm_layer: type[nn.Module] = nn.LayerNorm,
        spynet_path: str | None = None,
        pa_frames: int = 2,
        deformable_groups: int = 16,
        recal_all_flows: bool = False,
        nonblind_denoising: bool = False,
        use_checkpoint_attn: bool = False,
        use_checkpoint_ffn: bool = False,
        no_checkpoint_attn_blocks: Sequence[int] = (),
        no_checkpoint_ffn_blocks: Sequence[int] = (),
    ):
        super().__init__()
        num_mutual = [int(depth * mul_attn_ratio) for depth in depths[:NUM_STAGES]]
        check_stages(depths, embed_dims, num_heads, num_mutual, window_size, mul_attn_ratio, drop_path_rate)
        check_task(upscale, in_chans, out_chans, img_size, pa_frames, nonblind_denoising)
        if pa_frames:
            check_alignment(embed_dims[:NUM_STAGES], pa_frames, deformable_groups)
        self.upscale, self.in_chans, self.out_chans = upscale, in_chans, out_chans
        self.pa_frames, self.num_frames, self.nonblind_denoising = pa_frames, img_size[0], nonblind_denoising
        window = tuple(window_size)
        # the sine code of mutual attention can't follow a window that shrinks: the least input that keeps it whole
        mutual_scales = [2**scale for scale, count in zip(SCALES, num_mutual) if count]
        self.min_size = tuple(max(mutual_scales, default=1) * side for side in window[1:])
        self.min_frames = max(pa_frames // 2 + 1 if pa_frames else 1, 2 if mutual_scales else 1)

        rates = [drop_path_rate * i / max(sum(depths) - 1, 1) for i in range(sum(depths))]

        def options(i: int) -> dict:
            """What entry i of depths passes on to its blocks."""
            start = sum(depths[:i])
            return dict(
                dim=embed_dims[i], depth=depths[i], drop_path=rates[start : start + depths[i]], num_heads=num_heads[i],
                mlp_ratio=mlp_ratio, qkv_bias=qkv_bias, qk_scale=qk_scale, norm_layer=norm_layer,
                checkpoint_attn=use_checkpoint_attn and i not in no_checkpoint_attn_blocks,
                checkpoint_ffn=use_checkpoint_ffn and i not in no_checkpoint_ffn_blocks,
            )  # fmt: skip

        first, last = embed_dims[0], embed_dims[-1]
        self.conv_first = FrameConv((9 if pa_frames else 1) * in_chans + nonblind_denoising, first)
        if pa_frames:
            self.spynet = SpyNet(spynet_path)
        for i in range(NUM_STAGES):
            stage = Stage(
                change_scale(i, embed_dims, norm_layer), num_mutual=num_mutual[i], window=window, pa_frames=pa_frames,
                deformable_groups=deformable_groups, max_residue=10 / 2 ** SCALES[i], **options(i),
            )  # fmt: skip
            self.add_module(f"stage{i + 1}", stage)
        self.stage8 = nn.Sequential(
            nn.Sequential(nn.Identity(), norm_layer(first), nn.Linear(first, embed_dims[NUM_STAGES])),
            *(
                ReconstructionGroup(window=(1, *window[1:]) if i in indep_reconsts else window, **options(i))
                for i in range(NUM_STAGES, len(depths))
            ),
        )
        self.norm = norm_layer(last)
        self.conv_after_body = nn.Linear(last, first)
        self._add_head(first)

    def _add_head(self, dim: int) -> None:
        if not self.pa_frames:
            self.linear_fuse = nn.Conv2d(dim * self.num_frames, HEAD_WIDTH, 1)
            self.conv_last = nn.Conv2d(HEAD_WIDTH, self.out_chans, 7, padding=3, padding_mode="reflect")
            return
        if self.upscale > 1:
            self.conv_before_upsample = nn.Sequential(FrameConv(dim, HEAD_WIDTH), nn.LeakyReLU(0.01, inplace=True))
            self.upsample = upsampler(self.upscale)
        self.conv_last = FrameConv(HEAD_WIDTH if self.upscale > 1 else dim, self.out_chans)

    def forward(self, x: Tensor) -> Tensor:
        """Restore a clip, or make the frames in between.

        Args:
            x: (B, D, C, H, W), RGB in [0, 1]; with nonblind_denoising C is 4, the last being the noise level.

        Returns:
            (B, D, 3, H * upscale, W * upscale), not clipped; with pa_frames 0 (B, out_chans / 3, 3, H, W).

        Raises:
            ValueError: a shape that fits no clip; with pa_frames 0 another number of frames than img_size says.
        """
        channels = self.in_chans + self.nonblind_denoising
        if x.ndim != 5 or x.shape[2] != channels:
            raise ValueError(f"VRT: the input must be (batch, frames, {channels}, height, width), got {tuple(x.shape)}")
        if not self.pa_frames and x.shape[1] != self.num_frames:
            raise ValueError(f"VRT: pa_frames 0 takes img_size[0] = {self.num_frames} frames, got {x.shape[1]}")
        frames, height, width = x.shape[1], x.shape[3] * self.upscale, x.shape[4] * self.upscale
        x = self._pad(x)
        y = self._restore(x)[:, :frames] if self.pa_frames else self._interpolate(x)
        return y[..., :height, :width]

    def _pad(self, x: Tensor) -> Tensor:
        """Repeat the last frame, row and column up to a size that the network can take."""
        b, d, _, h, w = x.shape
        pad_h, pad_w = (max(side, least) for side, least in zip((h, w), self.min_size))
        pad_h, pad_w = pad_h + -pad_h % 8 - h, pad_w + -pad_w % 8 - w
        if pad_h or pad_w:
            x = F.pad(x.flatten(0, 1), (0, pad_w, 0, pad_h), mode="replicate").unflatten(0, (b, d))
        if d < self.min_frames:
            x = torch.cat((x, x[:, -1:].expand(-1, self.min_frames - d, -1, -1, -1)), dim=1)
        return x

    def _restore(self, x: Tensor) -> Tensor:
        """(B, D, C, H, W) -> (B, D, 3, H * upscale, W * upscale)."""
        b, d = x.shape[:2]
        frames, noise = x.split((self.in_chans, x.shape[2] - self.in_chans), dim=2)
        clip = both_directions(frames)
        flows = self._flows(clip)
        neighbours = flow_warp(
            clip[:, 1:].flatten(0, 1), flows[0][0].flatten(0, 1).permute(0, 2, 3, 1), interpolation="nearest4"
        )  # (P, 4*C, H, W)
        neighbours = backward_and_forward(pad_frames(neighbours.unflatten(0, (2 * b, d - 1)), 1))
        x = self._body(torch.cat((frames, *neighbours, noise), dim=2), flows)  # (B*D, C, H, W)
        frames = frames.flatten(0, 1)
        if self.upscale > 1:
            x = self.upsample(self.conv_before_upsample(x))
            frames = F.interpolate(frames, scale_factor=self.upscale, mode="bilinear", align_corners=False)
        return (self.conv_last(x) + frames).unflatten(0, (b, d))

    def _interpolate(self, x: Tensor) -> Tensor:
        """(B, D, C, H, W) -> (B, out_chans / 3, 3, H, W), frames in between."""
        b = x.shape[0]
        mean = x.mean(dim=(1, 3, 4), keepdim=True)
        x = self._body(x - mean, flows=[None] * 4)
        x = self.linear_fuse(x.reshape(b, -1, *x.shape[-2:]))
        return self.conv_last(F.leaky_relu(x, 0.2)).unflatten(1, (-1, 3)) + mean

    def _flows(self, clip: Tensor) -> list[list[Tensor]]:
        """clip (2B, D, 3, H, W) in both directions -> for scales 1, 1/2, 1/4, 1/8 the flows over 1 to pa_frames / 2 frames."""
        pairs = (len(clip), clip.shape[1] - 1)
        flows = self.spynet(clip[:, :-1].flatten(0, 1), clip[:, 1:].flatten(0, 1))
        return [chain_flows(flow.unflatten(0, pairs), self.pa_frames // 2) for flow in flows]

    def _body(self, x: Tensor, flows: list) -> Tensor:
        """(B, D, C_in, H, W) -> (B*D, C, H, W): first convolution, the U of stages 1..7, stage 8, and a skip around them."""
        first = self.conv_first(x.flatten(0, 1))
        x = first.unflatten(0, x.shape[:2]).permute(0, 1, 3, 4, 2)
        x1 = self.stage1(x, flows[0])
        x2 = self.stage2(x1, flows[1])
        x3 = self.stage3(x2, flows[2])
        x4 = self.stage4(x3, flows[3])
        x = self.stage5(x4, flows[2])
        x = self.stage6(x + x3, flows[1])
        x = self.stage7(x + x2, flows[0])
        x = self.stage8(x + x1)
        x = self.conv_after_body(self.norm(x))
        return first + x.permute(0, 1, 4, 2, 3).flatten(0, 1)


def change_scale(i: int, dims: Sequence[int], norm_layer: type[nn.Module]) -> nn.Sequential:
    """How stage i + 1 begins: at the scale it is given, at half of it, or at twice of it."""
    if i == 0:
        return nn.Sequential(nn.Identity(), norm_layer(dims[0]))
    down = SCALES[i] > SCALES[i - 1]
    width = dims[i - 1] * 4 if down else dims[i - 1] // 4
    return nn.Sequential(SpaceToDepth() if down else DepthToSpace(), norm_layer(width), nn.Linear(width, dims[i]))


def upsampler(upscale: int) -> nn.Sequential:
    """(B*D, 64, H, W) -> (B*D, 64, H * upscale, W * upscale); layers bear the published numbers."""
    factors = [3] if upscale == 3 else [2] * int(math.log2(upscale))
    layers = OrderedDict()
    for i, factor in enumerate(factors):
        layers[f"{5 * i}"] = FrameConv(HEAD_WIDTH, HEAD_WIDTH * factor**2)
        layers[f"{5 * i + 2}"] = nn.PixelShuffle(factor)
        layers[f"{5 * i + 4}"] = nn.LeakyReLU(0.1, inplace=True)
    layers[f"{5 * len(factors)}"] = FrameConv(HEAD_WIDTH, HEAD_WIDTH)
    return nn.Sequential(layers)


# ----------------------------------------------------------------------------------------------------------- options


def require(valid: bool, message: str) -> None:
    if not valid:
        raise ValueError(f"VRT: {message}")


def check_stages(depths, embed_dims, num_heads, num_mutual, window_size, mul_attn_ratio, drop_path_rate) -> None:
    """Widths that skip sums, heads, changes of scale and the sine code can be made of."""
    counts = (len(depths), len(embed_dims), len(num_heads))
    require(
        len(set(counts)) == 1 and counts[0] > NUM_STAGES,
        f"depths, embed_dims and num_heads need the same number of entries, at least {NUM_STAGES + 1}; got {counts}",
    )
    positive = all(n > 0 for n in (*depths, *embed_dims, *num_heads, *window_size))
    require(positive, "depths, embed_dims, num_heads and window_size must be positive")
    require(len(window_size) == 3, f"window_size must be [frames, rows, columns], got {list(window_size)}")
    require(0 <= mul_attn_ratio <= 1, f"mul_attn_ratio must be in [0, 1], got {mul_attn_ratio}")
    require(0 <= drop_path_rate < 1, f"drop_path_rate must be in [0, 1), got {drop_path_rate}")
    for up, down in ((4, 2), (5, 1), (6, 0)):
        require(
            embed_dims[up] == embed_dims[down],
            f"embed_dims[{up}] must equal embed_dims[{down}] (they are added), got {embed_dims[up]} and {embed_dims[down]}",
        )
    for i, (dim, heads) in enumerate(zip(embed_dims, num_heads)):
        require(dim % heads == 0, f"embed_dims[{i}] = {dim} must be a multiple of num_heads[{i}] = {heads}")
        fourfold = i in (3, 4, 5) or (i < NUM_STAGES and num_mutual[i] > 0)
        require(dim % 4 == 0 or not fourfold, f"embed_dims[{i}] must be a multiple of 4, got {dim}")


def check_task(upscale, in_chans, out_chans, img_size, pa_frames, nonblind_denoising) -> None:
    """Options that say what is restored."""
    require(pa_frames in (0, 2, 4, 6), f"pa_frames must be 2, 4, 6, or 0 for frame interpolation; got {pa_frames}")
    require(in_chans == 3, f"in_chans must be 3 (RGB), got {in_chans}; nonblind_denoising adds the noise level by itself")
    require(
        upscale == 3 or (upscale > 0 and upscale & (upscale - 1) == 0), f"upscale must be 1, 2, 3, 4, 8, ..., got {upscale}"
    )
    require(len(img_size) == 3, f"img_size must be [frames, rows, columns], got {list(img_size)}")
    if pa_frames:
        require(out_chans == 3, f"out_chans must be 3 (RGB), got {out_chans}")
        return
    require(upscale == 1, f"upscale must be 1 with pa_frames 0, got {upscale}")
    require(not nonblind_denoising, "nonblind_denoising needs pa_frames 2, 4 or 6")
    require(out_chans > 0 and out_chans % 3 == 0, f"out_chans must be 3 for each frame in between, got {out_chans}")
    require(img_size[0] > 1, f"img_size[0], the number of frames, must be at least 2 with pa_frames 0, got {img_size[0]}")


def check_alignment(embed_dims, pa_frames, deformable_groups) -> None:
    """Groups of the deformable convolution."""
    sources = pa_frames // 2
    require(
        deformable_groups > 0 and 9 * deformable_groups % sources == 0,
        f"deformable_groups must be positive{' and even' if sources == 2 else ''} with pa_frames {pa_frames}, got {deformable_groups}",
    )
    for i, dim in enumerate(embed_dims):
        require(
            dim * sources % deformable_groups == 0,
            f"embed_dims[{i}] * pa_frames / 2 = {dim * sources} must be a multiple of deformable_groups = {deformable_groups}",
        )
        require(dim % sources == 0, f"embed_dims[{i}] must be a multiple of pa_frames / 2 = {sources}, got {dim}")
