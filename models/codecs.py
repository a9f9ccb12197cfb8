"""Latent codecs: what turns images into the latents that LGT works on, and back.

A codec is a frozen nn.Module with `channels`, `factor` (image pixels per latent pixel), `fingerprint` (of its weights;
"" when it has none and nothing is worth caching), `encode` and `decode`.

Legend: B images, H W pixels, c channels, h w latent pixels (H / factor, W / factor); images in [-1, 1].
"""

from __future__ import annotations

import importlib
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import checkpoint
from models import NETWORKS
from options import check, resolve, schema_of
from runtime.ranges import PositiveFloat, PositiveInt

CODECS = {
    "pixel": "models.codecs:PixelCodec",
    "vqgan": "models.codecs:VQGANCodec",
    "sd-vae": "models.codecs:SDVAECodec",
}
INSTALL = "pip install diffusers"


def build_codec(section: Mapping[str, Any] | None, where: str = "codec") -> nn.Module:
    """The codec of an option section, e.g. {"type": "vqgan", "path": ...}; None: pixels.

    Raises: OptionError, CheckpointError: one line.
    """
    section = dict(section or {"type": "pixel"})
    component = resolve(CODECS, section.pop("type", None), f"{where}.type")
    keywords = check(section, schema_of(component), "codec", lambda _: where.removesuffix(": codec"), [])
    try:
        return component(**keywords).eval().requires_grad_(False)
    except ValueError as error:
        raise type(error)(f"{where}: {error}") from error


class PixelCodec(nn.Module):
    """Squares of pixels as channels: nothing to learn, nothing lost.

    Args:
        factor: side of a square in pixels.
    """

    fingerprint = ""

    def __init__(self, factor: PositiveInt = 4):
        super().__init__()
        if factor < 1:
            raise ValueError(f"factor must be at least 1, got {factor}")
        self.factor, self.channels = factor, 3 * factor**2

    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 3 * factor^2, h, w), exactly."""
        return F.pixel_unshuffle(images, self.factor)

    def decode(self, latents: Tensor) -> Tensor:
        """The inverse of encode."""
        return F.pixel_shuffle(latents, self.factor)


class VQGANCodec(nn.Module):
    """Encoder and decoder of a VQGAN that our own recipe trained.

    Args:
        path: checkpoint of the VQGAN: a folder, a set's member or record, or a bundle; its moving average is used if it
            has one.
        net: section `netG` it was trained with, for a file that does not say; e.g. {"net_type": "vqgan", ...}.
        scale: factor of the latents; None: 1 / standard deviation of the codes, which depends on the weights alone.
        quantize: snap latents to their nearest codes before decoding, which is what the decoder was trained on.

    Raises:
        ValueError: the checkpoint is no VQGAN's, or does not say how it was built.
    """

    def __init__(self, path: str, net: dict | None = None, scale: PositiveFloat | None = None, quantize: bool = True):
        super().__init__()
        weights, net = trained(path, net)
        network = resolve(NETWORKS, net.pop("net_type", None), f"{path}: netG.net_type")
        try:
            self.net = network(**net)
            self.net.load_state_dict(weights)
            codes = self.net.quantize.embedding.weight
        except (AttributeError, TypeError, RuntimeError) as error:
            raise ValueError(f"{path}: is no VQGAN of this network: {' '.join(str(error).split())[:160]}") from None
        self.scale = float(1 / codes.detach().std()) if scale is None else scale
        self.quantize, self.channels, self.factor = quantize, codes.shape[1], self.net.factor
        self.fingerprint = checkpoint.fingerprint(self.net.state_dict(), "vqgan", self.scale)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, c, h, w), not quantized."""
        return self.net.quant_conv(self.net.encoder(images)) * self.scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """(B, c, h, w) -> (B, 3, H, W), not clipped."""
        latents = latents.float() / self.scale
        return self.net.decode(self.net.quantize(latents)[0] if self.quantize else latents)


class SDVAECodec(nn.Module):
    """Stable Diffusion's autoencoder, from diffusers.

    Args:
        path: local folder of the autoencoder, or its name on the hub, e.g. "stabilityai/sd-vae-ft-mse".
        scale: factor of the latents.
        posterior: latents drawn by a generator that depends on the image alone ("sample", as LGT was trained), or the
            "mean".

    Raises:
        ValueError: diffusers is not installed, or there is no such autoencoder.
    """

    def __init__(self, path: str = "stabilityai/sd-vae-ft-mse", scale: PositiveFloat = 0.18215,
                 posterior: Literal["sample", "mean"] = "sample"):
        super().__init__()
        try:
            diffusers = importlib.import_module("diffusers")
        except ImportError:
            raise ValueError(f"sd-vae needs diffusers, which is not installed; {INSTALL}") from None
        try:
            self.net = diffusers.AutoencoderKL.from_pretrained(path)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"{path}: no autoencoder of diffusers: {reason}") from None
        self.scale, self.posterior, self.channels = scale, posterior, self.net.config.latent_channels
        self.factor = 2 ** (len(self.net.config.block_out_channels) - 1)
        self.fingerprint = checkpoint.fingerprint(self.net.state_dict(), "sd-vae", scale, posterior)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, c, h, w)."""
        posterior = self.net.encode(images).latent_dist
        latents = posterior.mean
        if self.posterior == "sample":
            noise = [torch.randn(mean.shape, generator=torch.Generator().manual_seed(crc32(image)))
                     for mean, image in zip(latents, images)]
            latents = latents + posterior.std * torch.stack(noise).to(latents)
        return latents * self.scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """(B, c, h, w) -> (B, 3, H, W), not clipped."""
        return self.net.decode(latents / self.scale).sample


def trained(path: str, net: dict | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights of a checkpoint, and the section of the network that they are of, unless it is given."""
    if net and Path(path).is_file():
        return checkpoint.extract_weights(checkpoint.load_file(path), path), dict(net)
    try:
        parts = checkpoint.locate(path).load()
    except checkpoint.CheckpointError as error:
        if "weights only" not in str(error):
            raise
        parts = {}
    net = net or (parts.get("state") or {}).get("config", {}).get("netG")
    if not net:
        raise ValueError(f'{path}: does not say what network it holds; give net, {{"net_type": "vqgan", ...}}')
    return parts.get("E") or parts.get("G"), dict(net)


def crc32(tensor: Tensor) -> int:
    return zlib.crc32(tensor.detach().cpu().contiguous().numpy().tobytes())
