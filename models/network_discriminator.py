"""PatchGAN discriminator: is each patch of an image real?

Source: Isola et al. 2017, "Image-to-Image Translation with Conditional Adversarial Networks", arXiv:1611.07004,
section 3.2.2; key names and initial values follow CompVis/taming-transformers. ActNorm: Kingma & Dhariwal 2018,
arXiv:1807.03039, section 3.1.
"""

import torch
from torch import Tensor, nn

from runtime.distributed import gather_rows
from runtime.ranges import PositiveInt


class ActNorm(nn.Module):
    """scale * (x + loc) for each channel; the first batch in training sets both so that it comes out normalised."""

    def __init__(self, channels: int):
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.scale = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.register_buffer("initialized", torch.tensor(0, dtype=torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        if self.training and not self.initialized:
            with torch.no_grad():
                batch = gather_rows(x)
                self.loc.copy_(-batch.mean(dim=(0, 2, 3), keepdim=True))
                self.scale.copy_(1 / (batch.std(dim=(0, 2, 3), keepdim=True) + 1e-6))
                self.initialized.fill_(1)
        return self.scale * (x + self.loc)


class NLayerDiscriminator(nn.Module):
    """Convolutions 4x4, the first n_layers of which halve the size; one logit for each patch comes out.

    Args:
        input_nc: channels of the images, with those of a condition if there is one.
        ndf: width of the first layer; it doubles from layer to layer, up to eightfold.
        n_layers: layers of stride 2. A logit sees 70 x 70 pixels with 3, 34 x 34 with 2.
        use_actnorm: use ActNorm instead of batch norm.

    Raises:
        ValueError: a count that is not positive.
    """

    def __init__(self, input_nc: PositiveInt = 3, ndf: PositiveInt = 64, n_layers: PositiveInt = 3,
                 use_actnorm: bool = False):
        super().__init__()
        if min(input_nc, ndf, n_layers) < 1:
            raise ValueError(f"input_nc, ndf and n_layers must be positive, got {input_nc}, {ndf} and {n_layers}")
        self.min_size = 3 * 2**n_layers  # two layers of stride 1 follow, each takes a pixel off
        norm = ActNorm if use_actnorm else nn.BatchNorm2d
        widths = [ndf * min(2**i, 8) for i in range(n_layers + 1)]
        layers = [nn.Conv2d(input_nc, ndf, 4, stride=2, padding=1), nn.LeakyReLU(0.2, inplace=True)]
        for i, (c_in, c_out) in enumerate(zip(widths, widths[1:]), start=1):
            stride = 2 if i < n_layers else 1
            layers += [nn.Conv2d(c_in, c_out, 4, stride, padding=1, bias=use_actnorm), norm(c_out),
                       nn.LeakyReLU(0.2, inplace=True)]
        self.main = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.apply(_start)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, input_nc, H, W) -> logits (B, 1, H / 2**n_layers - 2, W / 2**n_layers - 2)."""
        return self.main(x)


def _start(module: nn.Module) -> None:
    """The initial values of DCGAN."""
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
