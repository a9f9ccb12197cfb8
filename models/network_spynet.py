"""Optical flow for video restoration: SPyNet, and warping and deformable convolution along a flow.

Source: Ranjan & Black 2017, "Optical Flow Estimation using a Spatial Pyramid Network", arXiv:1611.00850.
Key names, buffers and scales of the result follow KAIR, so that weights of KAIR and BasicSR load strictly.

Legend: N pairs of frames, B batch, D frames, C channels, H W pixels. A flow is in pixels: channel 0 is dx
(right), channel 1 is dy (down).
"""

from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from storage.foreign import extract_weights
from storage.sealed import CheckpointError, load_file

# In the backward pass; the values read at each point would otherwise be stored, up to 36 times x. Nothing is drawn.
computed_again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
NUM_LEVELS = 6  # basic_module[0] works at 1/32 of the size, basic_module[5] at full size
STRIDE = 2 ** (NUM_LEVELS - 1)
REMEDY = (
    "fetch github.com/JingyunLiang/VRT/releases/download/v0.0/spynet_sintel_final-3d2a1287.pth to there, "
    "or set spynet_path to null to train the flow from zero"
)


def flow_warp(x: Tensor, flow: Tensor, interpolation: str = "bilinear", padding_mode: str = "zeros",
              align_corners: bool = True) -> Tensor:
    """Warp x along a flow: pixel p of the result is x at p + flow(p).

    Args:
        x: (N, C, H, W), is sampled.
        flow: (N, H, W, 2), pixels, (dx, dy).
        interpolation: "bilinear", "nearest", or "nearest4": the four pixels around the point, unweighted, as
            4*C channels: left top, left bottom, right top, right bottom; the flow gets no gradient.
        padding_mode: values outside of x: "zeros", "border" or "reflection".
        align_corners: as in torch.nn.functional.grid_sample.

    Returns: (N, C, H, W), or (N, 4*C, H, W) for "nearest4".

    Raises: ValueError: sizes of flow and x differ, or interpolation or padding_mode is unknown.

    Source: flow_warp of KAIR and BasicSR, with equal numbers.
    """
    height, width = x.shape[-2:]
    if flow.shape[1:] != (height, width, 2):
        raise ValueError(f"flow_warp: x of {tuple(x.shape)} needs a flow of (N, {height}, {width}, 2), "
                         f"got {tuple(flow.shape)}")
    columns = flow[..., 0] + torch.arange(width, dtype=flow.dtype, device=flow.device)
    rows = flow[..., 1] + torch.arange(height, dtype=flow.dtype, device=flow.device)[:, None]
    if interpolation != "nearest4":
        return sample(x, columns, rows, interpolation, padding_mode, align_corners)
    corners = [(c, r) for c in (columns.floor(), columns.ceil()) for r in (rows.floor(), rows.ceil())]
    return torch.cat([sample(x, c, r, "nearest", padding_mode, align_corners) for c, r in corners], dim=1)


def sample(x: Tensor, columns: Tensor, rows: Tensor, mode: str = "bilinear", padding_mode: str = "zeros",
           align_corners: bool = True) -> Tensor:
    """Sample x (N, C, H, W) at points (N, h, w) in pixels, as (N, C, h, w)."""
    height, width = x.shape[-2:]
    if needs_fixed_order(x) and align_corners and padding_mode != "reflection":
        return computed_again(sample_by_gather, x, columns, rows, mode, padding_mode)
    grid = (2 * columns / max(width - 1, 1) - 1, 2 * rows / max(height - 1, 1) - 1)  # pixels to [-1, 1]
    return F.grid_sample(x, torch.stack(grid, dim=-1), mode, padding_mode, align_corners)


def needs_fixed_order(x: Tensor) -> bool:
    """Tell whether to avoid kernels whose gradients add in any order, as those of grid_sample and deform_conv2d."""
    return (x.is_cuda and torch.is_grad_enabled() and torch.are_deterministic_algorithms_enabled()
            and not torch.is_deterministic_algorithms_warn_only_enabled())  # warnings are to name these kernels


def sample_by_gather(x: Tensor, columns: Tensor, rows: Tensor, mode: str = "bilinear",
                     padding_mode: str = "zeros") -> Tensor:
    """Sample as `sample` does, by operations whose gradients add in a fixed order in deterministic mode.

    Rows of all channels are read, as the gradient sorts the places that are read: C times fewer than single values.
    """
    (height, width), rows_of_x = x.shape[-2:], x.flatten(2).mT.flatten(0, 1)  # (N*H*W, C)
    first = torch.arange(len(x), device=x.device)[:, None, None] * (height * width)
    if padding_mode == "border":
        columns, rows = columns.clamp(0, width - 1), rows.clamp(0, height - 1)
    if mode == "nearest":
        columns, rows = columns.round(), rows.round()
    left, top = columns.detach().floor(), rows.detach().floor()
    total = 0
    for column, across in ((left, 1 - (columns - left)), (left + 1, columns - left)):
        for row, down in ((top, 1 - (rows - top)), (top + 1, rows - top)):
            inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
            # a NaN index would abort the process on CUDA; as a factor below it stays NaN
            line, at = (t.clamp(0, size - 1).nan_to_num().long() for t, size in ((row, height), (column, width)))
            value = F.embedding(first + line * width + at, rows_of_x).movedim(-1, 1)  # (N, C, h, w)
            total = total + value * (across * down * inside)[:, None]
    return total


def resize_flow(flow: Tensor, height: int, width: int) -> Tensor:
    """Resize a flow (N, 2, H, W) and scale its vectors to pixels of the new size."""
    old_height, old_width = flow.shape[-2:]
    if (old_height, old_width) == (height, width):
        return flow
    dx, dy = F.interpolate(flow, size=(height, width), mode="bilinear", align_corners=False).split(1, dim=1)
    return torch.cat((dx * (width / old_width), dy * (height / old_height)), dim=1)


def warp_frames(x: Tensor, flow: Tensor, interpolation: str = "bilinear") -> Tensor:
    """Warp x (B, D, C, H, W) along flow (B, D, 2, H, W)."""
    warped = flow_warp(x.flatten(0, 1), flow.flatten(0, 1).permute(0, 2, 3, 1), interpolation)
    return warped.unflatten(0, x.shape[:2])


def chain_flows(flow: Tensor, steps: int) -> list[Tensor]:
    """Chain a flow (B, D-1, 2, H, W) of frame t+1 onto t to flows (B, D-n, 2, H, W) of frame t+n, n = 1..steps."""
    flows = [flow]
    for n in range(1, steps):
        near, far = flows[-1][:, :-1], flow[:, n:]  # t+n onto t, and t+n+1 onto t+n
        flows.append(near + warp_frames(far, near))
    return flows


def deform_conv(x: Tensor, offset: Tensor, modulation: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Compute a modulated deformable 3x3 convolution, stride 1, padding 1.

    On CUDA this is torchvision's kernel, except in deterministic mode. On CPU grid_sample reads the taps: equal
    numbers, 5 to 10 times faster than torchvision's CPU kernel, which is serial and took over half of a training step.

    Args:
        x: (N, C_in, H, W).
        offset: (N, g*9*2, H, W), pixels, (dy, dx) for each of g groups of channels and each tap.
        modulation: (N, g*9, H, W), a factor for each tap.
        weight: (C_out, C_in / G, 3, 3) for G groups of the convolution.
        bias: (C_out,).

    Returns: (N, C_out, H, W).
    """
    if needs_fixed_order(x) or not x.is_cuda and 1 in x.shape[-2:]:  # such an axis is one place to grid_sample
        return computed_again(deform_conv_by_gather, x, offset, modulation, weight, bias)
    if x.is_cuda:
        from torchvision.ops import deform_conv2d  # slow to import

        return deform_conv2d(x, offset, weight, bias, padding=1, mask=modulation)
    n, c, h, w = x.shape
    groups, weight_groups = modulation.shape[1] // 9, c // weight.shape[1]
    out = TapSum.apply(x.reshape(n, groups, -1, h, w), offset.reshape(n, groups, 9, 2, h * w),
                       modulation.reshape(n, groups, 1, 9, h * w), weight.view(weight_groups, -1, weight[0].numel()))
    return out.view(n, -1, h, w) + bias[:, None, None]


def deform_conv_by_gather(x: Tensor, offset: Tensor, modulation: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Compute `deform_conv` by operations whose gradients add in a fixed order in deterministic mode."""
    n, c, h, w = x.shape
    groups, weight_groups = modulation.shape[1] // 9, c // weight.shape[1]
    x, offset, weight, bias = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (x, offset, weight, bias))
    tap, row, column = (torch.arange(size, device=x.device) for size in (9, h, w))
    dy, dx = offset.view(n * groups, 9, 2, h, w).unbind(2)
    rows = dy + (tap[:, None, None] // 3 - 1 + row[:, None])
    columns = dx + (tap[:, None, None] % 3 - 1 + column)
    taps = sample_by_gather(x.view(n * groups, -1, h, w), columns.flatten(2), rows.flatten(2))  # (N*g, C/g, 9, H*W)
    taps = (taps * modulation.view(n * groups, 1, 9, h * w)).reshape(n, weight_groups, -1, h * w)
    out = weight.view(weight_groups, -1, weight[0].numel()) @ taps
    return out.view(n, -1, h, w) + bias[:, None, None]


class TapSum(torch.autograd.Function):
    """Multiply the taps of deform_conv by modulation and weight.

    All taps are 9 times as large as x, and autograd would store them several times. Here the backward pass reads them
    again, and both passes handle one sample at a time, which fits into the cache.

    x (N, g, C_in / g, H, W), offset (N, g, 9, 2, H*W), modulation (N, g, 1, 9, H*W),
    weight (G, C_out / G, C_in / G * 9) -> (N, G, C_out / G, H*W).
    """

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.float32)  # half precision is too coarse for coordinates
    def forward(ctx, x: Tensor, offset: Tensor, modulation: Tensor, weight: Tensor) -> Tensor:
        h, w = x.shape[-2:]
        tap, row, column = (torch.arange(size, device=x.device) for size in (9, h, w))
        tap, row = tap[:, None, None], row[:, None]
        rows, columns = (tap // 3 - 1 + row).expand(9, h, w), (tap % 3 - 1 + column).expand(9, h, w)
        # pixels to [-1, 1]; as rows come first in an offset, it is x's transpose that is sampled
        ctx.scale = offset.new_tensor([2 / max(h - 1, 1), 2 / max(w - 1, 1)])[:, None]
        points = torch.stack((rows, columns), dim=1).flatten(2).to(ctx.scale) * ctx.scale - 1  # (9, 2, H*W)
        grid = torch.addcmul(points, offset, ctx.scale).mT
        ctx.save_for_backward(x.mT, grid, modulation, weight)
        return torch.stack([weight @ taps(*pair).mul_(factor).view(len(weight), -1, h * w)
                            for *pair, factor in zip(x.mT, grid, modulation)])

    @staticmethod
    @once_differentiable
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, ...]:
        """Return the gradients of all inputs."""
        *saved, weight = ctx.saved_tensors
        to_weight, to_samples = torch.zeros_like(weight), []
        for x, grid, modulation, to_out in zip(*saved, gradient):
            bare = taps(x, grid)
            modulated = (bare * modulation).view(len(weight), -1, to_out.shape[-1])
            to_weight += to_out @ modulated.mT
            to_taps = torch.matmul(weight.mT, to_out, out=modulated).view(bare.shape)
            to_modulation = bare.mul_(to_taps).sum(dim=1, keepdim=True)
            to_x, to_grid = torch.ops.aten.grid_sampler_2d_backward(
                to_taps.mul_(modulation), x, grid, 0, 0, True, [True, True])
            to_samples.append((to_x.mT, to_grid.mT * ctx.scale, to_modulation))
        return *(torch.stack(gradients) for gradients in zip(*to_samples)), to_weight


def taps(x: Tensor, grid: Tensor) -> Tensor:
    """Sample x (g, C, W, H) at grid (g, 9, H*W, 2), as (g, C, 9, H*W)."""
    return F.grid_sample(x, grid, align_corners=True)


class BasicModule(nn.Module):
    """Predict the correction (N, 2, H, W) of one level from target, warped source and flow (N, 3 + 3 + 2, H, W)."""

    def __init__(self):
        super().__init__()
        widths = (8, 32, 64, 32, 16, 2)
        layers = []
        for c_in, c_out in zip(widths, widths[1:]):
            layers += [nn.Conv2d(c_in, c_out, kernel_size=7, padding=3), nn.ReLU(inplace=True)]
        self.basic_module = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        return self.basic_module(x)


class SpyNet(nn.Module):
    """Estimate the optical flow between two frames at four scales.

    Args:
        load_path: file of pretrained weights of KAIR or BasicSR, bare or under "params". None or "": the last layer of
            each level starts at zero, so that training starts from zero flow.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is damaged or holds other weights.

    Source: SpyNet of KAIR. Differs: without a file KAIR starts from a random flow, and it downloads a missing file;
    frames of 32 pixels or less work here.
    """

    def __init__(self, load_path: str | None = None):
        super().__init__()
        self.basic_module = nn.ModuleList(BasicModule() for _ in range(NUM_LEVELS))
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1))
        if load_path:
            self.load_state_dict(self._read(Path(load_path).expanduser()))
            return
        for level in self.basic_module:
            nn.init.zeros_(level.basic_module[-1].weight)
            nn.init.zeros_(level.basic_module[-1].bias)

    def _read(self, path: Path) -> dict[str, Tensor]:
        """Read the weights of a file. Raises FileNotFoundError or ValueError of one line."""
        if not path.is_file():
            raise FileNotFoundError(f"spynet_path: {path} does not exist; {REMEDY}")
        try:
            state = extract_weights(load_file(path), path)
        except CheckpointError as error:
            raise ValueError(f"spynet_path: {error}; {REMEDY}") from None
        wanted = self.state_dict()
        state = {"mean": wanted["mean"], "std": wanted["std"], **state}  # constants that files may lack
        if {key: value.shape for key, value in state.items()} == {key: value.shape for key, value in wanted.items()}:
            return state
        raise ValueError(f"spynet_path: {path} does not hold SPyNet's weights, basic_module.*; {REMEDY}")

    def forward(self, ref: Tensor, supp: Tensor) -> list[Tensor]:
        """Return the flow on the grid of ref with which flow_warp warps supp onto ref.

        Args:
            ref: (N, 3, H, W), RGB in [0, 1].
            supp: (N, 3, H, W), RGB in [0, 1].

        Returns: Flows (N, 2, H // s, W // s) for s = 1, 2, 4, 8, each in pixels of its scale.
        """
        if ref.device.type != "meta" and torch.is_autocast_enabled(ref.device.type):
            with torch.autocast(ref.device.type, enabled=False):  # half precision is too coarse for coordinates
                return self(ref.float(), supp.float())
        height, width = ref.shape[-2:]
        ref, supp = self._pyramid(ref), self._pyramid(supp)
        flow, flows = torch.zeros_like(ref[0][:, :2]), []
        for i, level in enumerate(self.basic_module):
            if i:
                flow = 2 * F.interpolate(flow, scale_factor=2, mode="bilinear", align_corners=True)
            warped = flow_warp(supp[i], flow.permute(0, 2, 3, 1), padding_mode="border")
            flow = flow + level(torch.cat((ref[i], warped, flow), dim=1))
            flows.append(flow)
        return [resize_flow(flow, height // 2**i, width // 2**i) for i, flow in enumerate(flows[:1:-1])]

    def _pyramid(self, x: Tensor) -> list[Tensor]:
        """Return normalised frames at 1/32, ..., 1/2, 1 of the next size that 32 divides."""
        height, width = x.shape[-2:]
        size = (height + -height % STRIDE, width + -width % STRIDE)
        if size != (height, width):
            x = F.interpolate(x, size=size, mode="bilinear", align_corners=False)
        levels = [(x - self.mean) / self.std]
        for _ in range(NUM_LEVELS - 1):
            levels.append(F.avg_pool2d(levels[-1], kernel_size=2))
        return levels[::-1]
