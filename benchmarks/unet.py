"""Train the segmentation recipe with a plain U-Net, the yardstick of ResUNet-a in docs/results.md.

    python benchmarks/unet.py -opt options/train_segmentation.json [any argument of main.py]

Data, loss, loop and metrics are the recipe's; only the network differs. Its 12 channels make 274,862 weights; ResUNet-a
of the option file has 249,938 at image_size 96. Source: Ronneberger et al. 2015, arXiv:1505.04597, figure 1; with batch
norm, padded convolutions and nearest-neighbour enlargement.
Legend: B batch, C channels, K classes, H W pixels, h w those of a level.
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import main as door
import options
from commands import arguments
from models import NETWORKS
from runtime.ranges import PositiveInt, checked


class UNet(nn.Module):
    """Predict logits (B,K,H,W) of images (B,C,H,W) whose sides are multiples of 2**(depth - 1).

    Args:
        in_channels: channels C of the image.
        num_classes: number K of classes.
        depth: number of levels, each half the size of the previous one.
        width: channels of the first level; they double from level to level.
        image_size: side of the training images in pixels, without effect.
    """

    @checked
    def __init__(self, *, in_channels: PositiveInt = 3, num_classes: PositiveInt = 2, depth: PositiveInt = 4,
                 width: PositiveInt = 12, image_size: PositiveInt | None = None):
        super().__init__()
        widths = [width << level for level in range(depth)]
        self.encoder = nn.ModuleList(double(a, b) for a, b in zip([in_channels, *widths], widths))
        self.decoder = nn.ModuleList(double(3 * f, f) for f in widths[:-1])  # largest maps first
        self.head = nn.Conv2d(width, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for level, block in enumerate(self.encoder):
            x = block(F.max_pool2d(x, 2) if level else x)  # (B, width * 2^level, h, w)
            skips.append(x)
        for level in reversed(range(len(self.decoder))):
            x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
            x = self.decoder[level](torch.cat([x, skips[level]], dim=1))
        return self.head(x)


def double(c_in: int, c_out: int) -> nn.Sequential:
    """Build twice a 3x3 convolution, a batch norm and a ReLU."""
    layers = [layer for a in (c_in, c_out) for layer in (nn.Conv2d(a, c_out, 3, padding=1, bias=False),
                                                         nn.BatchNorm2d(c_out), nn.ReLU())]
    return nn.Sequential(*layers)


def main() -> None:
    """Run main.py with a U-Net as `netG`; later arguments override it. Another recipe is an error, before any work."""
    with contextlib.suppress(ValueError):  # main.py prints it
        args, _ = arguments.parser_for(options.FLAGS, description=__doc__).parse_known_args()
        tree = options.load(args.opt)[0] if args.opt else door.saved_options(args.resume) if args.resume else {}
        if tree.get("model") != "segmentation":
            arguments.print_error(f"{args.opt or args.resume or sys.argv[0]}: is for the segmentation recipe: "
                                  "-opt options/train_segmentation.json")
            sys.exit(2)
    NETWORKS["unet"] = "benchmarks.unet:UNet"
    door.program(["--set", "netG=" + json.dumps({"net_type": "unet"}), *sys.argv[1:]])


if __name__ == "__main__":
    main()
