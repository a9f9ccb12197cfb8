"""PatchGAN discriminator: it judges whether each patch of an image is real.

Source: Isola et al. 2017, "Image-to-Image Translation with Conditional Adversarial Networks", arXiv:1611.07004,
section 3.2.2; key names and initial values follow CompVis/taming-transformers. ActNorm: Kingma & Dhariwal 2018,
arXiv:1807.03039, section 3.1.
"""

import torch
from torch import Tensor, nn

from runtime.ranges import PositiveInt, checked


class ActNorm(nn.Module):
    """Apply scale * (x + loc) per channel; the first training batch sets both so that its output is normalised."""

    def __init__(self, channels: int):
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.scale = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.register_buffer("initialized", torch.tensor(0, dtype=torch.uint8))
        self.surely = False  # whether it is initialized, without a question that waits for the device

    def _load_from_state_dict(self, *args) -> None:
        super()._load_from_state_dict(*args)
        self.surely = bool(self.initialized)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and not self.surely and not self.initialized:
            with torch.no_grad():
                self.loc.copy_(-x.mean(dim=(0, 2, 3), keepdim=True))
                self.scale.copy_(1 / (x.std(dim=(0, 2, 3), keepdim=True) + 1e-6))
                self.initialized.fill_(1)
        return self.scale * (x + self.loc)


class NLayerDiscriminator(nn.Module):
    """Compute one logit per patch by 4x4 convolutions, of which the first n_layers halve the size.

    Args:
        input_nc: channels of the images and of the condition, if there is one.
        ndf: width of the first layer; widths double up to 8 * ndf.
        n_layers: number of layers of stride 2; 2 see patches of 34 x 34 pixels, 3 of 70 x 70.
        use_actnorm: use ActNorm instead of batch norm.
    """

    @checked
    def __init__(self, input_nc: PositiveInt = 3, ndf: PositiveInt = 64, n_layers: PositiveInt = 3,
                 use_actnorm: bool = False):
        super().__init__()
        self.min_size = 3 * 2**n_layers  # two layers of stride 1 follow, which crop a pixel each
        norm = ActNorm if use_actnorm else nn.BatchNorm2d
        widths = [ndf * min(2**i, 8) for i in range(n_layers + 1)]
        layers = [nn.Conv2d(input_nc, ndf, 4, stride=2, padding=1), nn.LeakyReLU(0.2, inplace=True)]
        for i, (c_in, c_out) in enumerate(zip(widths, widths[1:]), start=1):
            stride = 2 if i < n_layers else 1
            layers += [nn.Conv2d(c_in, c_out, 4, stride, padding=1, bias=use_actnorm), norm(c_out),
                       nn.LeakyReLU(0.2, inplace=True)]
        self.main = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.apply(_initialize)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, 1, H / 2**n_layers - 2, W / 2**n_layers - 2) of images (B, input_nc, H, W)."""
        return self.main(x)


def _initialize(module: nn.Module) -> None:
    """Draw the initial weights of DCGAN."""
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
