"""LPIPS: the perceptual distance of two images, computed from features of VGG16.

Source: Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric",
arXiv:1801.03924; weights of richzhang/PerceptualSimilarity, version 0.1. Key names follow
CompVis/taming-transformers.

Legend: B images, C channels, H W pixels.
"""

from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor, nn

from checkpoint import extract_weights, load_file

VGG_URL = "https://download.pytorch.org/models/vgg16-397923af.pth"
LPIPS_URL = "https://github.com/richzhang/PerceptualSimilarity/raw/master/lpips/weights/v0.1/vgg.pth"
SLICES = ((0, 4), (4, 9), (9, 16), (16, 23), (23, 30))  # of torchvision's features; each ends in a ReLU
WIDTHS = (64, 128, 256, 512, 512)


class ScalingLayer(nn.Module):
    """Normalise images in [-1, 1] by the mean and standard deviation of the training of VGG16."""

    def __init__(self):
        super().__init__()
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.shift) / self.scale


class VGGFeatures(nn.Module):
    """Compute the features of VGG16 after relu1_2, relu2_2, relu3_3, relu4_3 and relu5_3, with torchvision's keys."""

    def __init__(self, state: dict[str, Tensor], path: str):
        from torchvision.models import vgg16  # slow to import

        super().__init__()
        with torch.device("meta"):  # no random draws, and no memory for the classifier
            features = vgg16(weights=None).features
        try:
            features.load_state_dict({k.removeprefix("features."): v.float() for k, v in state.items()
                                      if k.startswith("features.")}, assign=True)
        except RuntimeError as error:
            raise ValueError(f"vgg_path: {path} does not hold VGG16's weights, features.*; take {VGG_URL}") from error
        for n, (first, last) in enumerate(SLICES, start=1):
            layers = OrderedDict((str(i), features[i]) for i in range(first, last))
            self.add_module(f"slice{n}", nn.Sequential(layers))

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for part in self.children():
            x = part(x)
            maps.append(x)
        return maps


class Linear(nn.Module):
    """Sum weighted channels: (B, C, H, W) -> (B, 1, H, W)."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.model = nn.Sequential(nn.Dropout(), nn.Conv2d(weight.shape[1], 1, 1, bias=False, device="meta"))
        self.model[1].weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class LPIPS(nn.Module):
    """Compute the perceptual distance of images; weights are frozen, images get gradients.

    Args:
        vgg_path: file of VGG16 weights, as published by torchvision.
        lpips_path: file of the weights of the five linear layers.
        dropout: apply dropout in training mode, an error of taming.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged or holds other weights.

    Source: LPIPS of taming, with equal numbers. Differs: dropout is off; where all features are zero the gradient is
    zero, not NaN.
    """

    def __init__(self, vgg_path: str = "weights/vgg16-397923af.pth", lpips_path: str = "weights/lpips_vgg.pth",
                 dropout: bool = False):
        super().__init__()
        vgg, linear = (_read(*what) for what in
                       (("vgg_path", vgg_path, VGG_URL), ("lpips_path", lpips_path, LPIPS_URL)))
        self.dropout = dropout
        self.scaling_layer = ScalingLayer()
        self.net = VGGFeatures(vgg, vgg_path)
        for n, width in enumerate(WIDTHS):
            name = f"lin{n}.model.1.weight"
            if name not in linear or linear[name].shape != (1, width, 1, 1):
                raise ValueError(f"lpips_path: {lpips_path} does not hold LPIPS's weights for VGG16, {name} of "
                                 f"{(1, width, 1, 1)}; take {LPIPS_URL}")
            self.add_module(f"lin{n}", Linear(linear[name].float()))
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "LPIPS":
        """Stay in evaluation mode unless dropout is on."""
        return super().train(mode and self.dropout)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the distance of each pair of images.

        Args: x, y: (B, 3, H, W), RGB in [-1, 1], 16 x 16 pixels or more.

        Returns: (B, 1, 1, 1), 0 for equal images.
        """
        return sum(self.distances(self.net(self.scaling_layer(x)), self.net(self.scaling_layer(y))))

    def distances(self, x: list[Tensor], y: list[Tensor]) -> list[Tensor]:
        """Return the distances (B, 1, 1, 1) of the five layers, from the features of both images."""
        layers = [getattr(self, f"lin{n}") for n in range(len(WIDTHS))]
        return [layer((_unit(a) - _unit(b)).square()).mean(dim=(2, 3), keepdim=True)
                for layer, a, b in zip(layers, x, y)]


def _unit(x: Tensor) -> Tensor:
    """Normalise features at every pixel; at zero the gradient of vector_norm is zero, that of sqrt infinite."""
    return x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + 1e-10)


def _read(name: str, path: str, url: str) -> dict[str, Tensor]:
    """Read the file of an option `name`."""
    if not Path(path).expanduser().is_file():
        raise FileNotFoundError(f"{name}: {path} does not exist; download {url} to there, or set perceptual_weight "
                                "to 0 to train without a perceptual loss")
    return extract_weights(load_file(Path(path).expanduser()), path)
