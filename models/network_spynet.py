"""Optical flow for video restoration: SPyNet, a coarse-to-fine pyramid of small networks, and the warp that uses its flow.

Source: Ranjan & Black 2017, "Optical Flow Estimation using a Spatial Pyramid Network", arXiv:1611.00850; key names, buffers
and the scales that are returned follow KAIR, so that its weights and BasicSR's load strictly.

Legend: N pairs of frames, C channels, H W pixels; a flow holds pixels, channel 0 = dx (to the right), channel 1 = dy (down).
"""
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NUM_LEVELS = 6  # basic_module[0] sees 1/32 of the size, basic_module[5] the full size
STRIDE = 2 ** (NUM_LEVELS - 1)
SOURCE_OF_WEIGHTS = (
    "download spynet_sintel_final-3d2a1287.pth from the model_zoo of KAIR's release v1.0 (see KAIR's README) and put it there, "
    "or set spynet_path to null, which trains the flow from zero"
)


def flow_warp(
    x: Tensor, flow: Tensor, interpolation: str = "bilinear", padding_mode: str = "zeros", align_corners: bool = True
) -> Tensor:
    """Pull x along a flow: the result at pixel p is x at p + flow(p).

    Args:
        x: (N, C, H, W), what is sampled.
        flow: (N, H, W, 2), pixels, (dx, dy).
        interpolation: "bilinear", "nearest", or "nearest4": the four pixels around the point, unblended, as 4*C channels in the
            order left-top, left-bottom, right-top, right-bottom; no gradient reaches the flow then.
        padding_mode: what lies outside of x: "zeros", "border" or "reflection".
        align_corners: as in torch.nn.functional.grid_sample.

    Returns:
        (N, C, H, W), or (N, 4*C, H, W) for "nearest4".

    Raises:
        ValueError: flow and x differ in size, or an unknown interpolation or padding.

    Source: flow_warp in KAIR and BasicSR, same numbers.
    """
    height, width = x.shape[-2:]
    if flow.shape[1:] != (height, width, 2):
        raise ValueError(f"flow must be (N, {height}, {width}, 2) to warp x of {tuple(x.shape)}, got {tuple(flow.shape)}")
    columns = flow[..., 0] + torch.arange(width, dtype=flow.dtype, device=flow.device)
    rows = flow[..., 1] + torch.arange(height, dtype=flow.dtype, device=flow.device)[:, None]
    if interpolation != "nearest4":
        return sample(x, columns, rows, interpolation, padding_mode, align_corners)
    corners = [(c, r) for c in (columns.floor(), columns.ceil()) for r in (rows.floor(), rows.ceil())]
    return torch.cat([sample(x, c, r, "nearest", padding_mode, align_corners) for c, r in corners], dim=1)


def sample(
    x: Tensor, columns: Tensor, rows: Tensor, mode: str = "bilinear", padding_mode: str = "zeros", align_corners: bool = True
) -> Tensor:
    """x (N, C, H, W) at points (N, h, w) given in pixels -> (N, C, h, w)."""
    height, width = x.shape[-2:]
    grid = torch.stack((2 * columns / max(width - 1, 1) - 1, 2 * rows / max(height - 1, 1) - 1), dim=-1)  # to [-1, 1]
    return F.grid_sample(x, grid, mode=mode, padding_mode=padding_mode, align_corners=align_corners)


class BasicModule(nn.Module):
    """One level of the pyramid: (N, 8, H, W) of target, warped source and flow so far -> (N, 2, H, W) correction of the flow."""

    def __init__(self):
        super().__init__()
        widths = (8, 32, 64, 32, 16, 2)
        layers = []
        for c_in, c_out in zip(widths, widths[1:]):
            layers += [nn.Conv2d(c_in, c_out, 7, padding=3), nn.ReLU(inplace=True)]
        self.basic_module = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        return self.basic_module(x.contiguous(memory_format=torch.channels_last))  # a tenth faster on CPU


class SpyNet(nn.Module):
    """Optical flow between pairs of frames, at four scales.

    Args:
        load_path: file of pretrained weights (KAIR's or BasicSR's, bare or under "params"). None or "": the last layer of each
            level starts at zero, so that training starts from zero flow and learns it.

    Raises:
        ValueError: the file is missing, damaged, or holds something else.

    Source: SpyNet in KAIR. What differs: without a file KAIR starts from random flow; with a missing file it downloads; frames
    of up to 32 pixels, where its first flow has no pixels and fails, work here.
    """

    def __init__(self, load_path: str | None = None):
        super().__init__()
        self.basic_module = nn.ModuleList(BasicModule() for _ in range(NUM_LEVELS))
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1))
        if load_path:
            self.load_state_dict(self._read(Path(load_path).expanduser()))
        else:
            for level in self.basic_module:
                nn.init.zeros_(level.basic_module[-1].weight)
                nn.init.zeros_(level.basic_module[-1].bias)

    def _read(self, path: Path) -> dict[str, Tensor]:
        """Read a weight file and make sure that it is SPyNet's, so that what is wrong fits in one line."""
        if not path.is_file():
            raise ValueError(f"spynet_path: no file {path}; {SOURCE_OF_WEIGHTS}")
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever a damaged file provokes in the unpickler
            reason = str(error).partition("\n")[0][:80] or type(error).__name__
            raise ValueError(f"spynet_path: {path} is damaged or no weight file ({reason}); {SOURCE_OF_WEIGHTS}") from error
        if isinstance(state, dict):
            state = state.get("params", state)
        expected = self.state_dict()
        if isinstance(state, dict):
            state = {"mean": expected["mean"], "std": expected["std"], **state}  # constants, absent from the original file
            shapes = {key: getattr(value, "shape", None) for key, value in state.items()}
            if shapes == {key: value.shape for key, value in expected.items()}:
                return state
        raise ValueError(f"spynet_path: {path} does not hold SPyNet's weights (basic_module.*); {SOURCE_OF_WEIGHTS}")

    def forward(self, ref: Tensor, supp: Tensor) -> list[Tensor]:
        """Flow on the grid of ref that pulls supp onto ref when given to flow_warp.

        Args:
            ref: (N, 3, H, W), RGB in [0, 1].
            supp: (N, 3, H, W), RGB in [0, 1].

        Returns:
            Four flows (N, 2, H // s, W // s) for s = 1, 2, 4, 8, in pixels of their own scale.
        """
        height, width = ref.shape[-2:]
        size = (height + -height % STRIDE, width + -width % STRIDE)
        ref, supp = self._pyramid(ref, size), self._pyramid(supp, size)
        flow = ref[0].new_zeros(ref[0].shape[0], 2, *ref[0].shape[-2:])
        flows = []
        for level, estimate in enumerate(self.basic_module):
            if level:
                flow = 2 * F.interpolate(flow, scale_factor=2, mode="bilinear", align_corners=True)
            warped = flow_warp(supp[level], flow.permute(0, 2, 3, 1), padding_mode="border")
            flow = flow + estimate(torch.cat((ref[level], warped, flow), dim=1))
            flows.append(flow)
        return [resize_flow(flow, height // 2**i, width // 2**i) for i, flow in enumerate(flows[:1:-1])]

    def _pyramid(self, x: Tensor, size: tuple[int, int]) -> list[Tensor]:
        """Normalised frames, coarsest first: H/32, ... H/2, H."""
        if x.shape[-2:] != size:
            x = F.interpolate(x, size=size, mode="bilinear", align_corners=False)
        levels = [(x - self.mean) / self.std]
        for _ in range(NUM_LEVELS - 1):
            levels.append(F.avg_pool2d(levels[-1], kernel_size=2))
        return levels[::-1]


def resize_flow(flow: Tensor, height: int, width: int) -> Tensor:
    """Resize a flow (N, 2, H, W) and scale its vectors along: pixels of the new size."""
    old_height, old_width = flow.shape[-2:]
    if (old_height, old_width) == (height, width):
        return flow
    flow = F.interpolate(flow, size=(height, width), mode="bilinear", align_corners=False)
    dx, dy = flow.split(1, dim=1)
    return torch.cat((dx * (width / old_width), dy * (height / old_height)), dim=1)
