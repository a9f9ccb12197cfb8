"""Latent codecs: they encode images to the latents of LGT and decode them.

A codec is a frozen nn.Module with `channels`, `factor` (image pixels per latent pixel), `fingerprint` (of its weights;
"" without weights, when caching is not worth it), `encode` and `decode`.

Legend: B images, H W pixels, c channels, h w latent pixels (H / factor, W / factor); images in [-1, 1].
"""

from __future__ import annotations

import importlib
import pkgutil
import zlib
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import checkpoint
from models import NETWORKS
from runtime.ranges import PositiveFloat, PositiveInt, checked

CODECS = {
    "pixel": "models.codecs:PixelCodec",
    "vqgan": "models.codecs:VQGANCodec",
    "sd-vae": "models.codecs:SDVAECodec",
}
INSTALL = "pip install diffusers"


class PixelCodec(nn.Module):
    """Rearrange squares of pixels as channels, without loss.

    Args: factor: side of a square in pixels.
    """

    fingerprint = ""

    @checked
    def __init__(self, factor: PositiveInt = 4):
        super().__init__()
        self.factor, self.channels = factor, 3 * factor**2

    def encode(self, images: Tensor) -> Tensor:
        """Encode images (B, 3, H, W) to (B, 3 * factor^2, h, w)."""
        return F.pixel_unshuffle(images, self.factor)

    def decode(self, latents: Tensor) -> Tensor:
        """Invert `encode`."""
        return F.pixel_shuffle(latents, self.factor)


class VQGANCodec(nn.Module):
    """Encode and decode with a VQGAN that the recipe `vqgan` trained.

    Args:
        path: checkpoint of the VQGAN: a folder, one file of a set, or a bundle; its moving average is preferred.
        net: section `netG` of its training, needed for a file without options; e.g. {"net_type": "vqgan", ...}.
        scale: factor of the latents; None: 1 / standard deviation of the codes.
        quantize: replace latents by their nearest codes before decoding, as in the training of the decoder.

    Raises: ValueError: the checkpoint does not hold a VQGAN, or not its options.
    """

    @checked
    def __init__(self, path: str, net: dict | None = None, scale: PositiveFloat | None = None, quantize: bool = True):
        super().__init__()
        weights, net = load_trained(path, net)
        kind = net.pop("net_type", None)
        if kind not in NETWORKS:
            raise ValueError(f"{path}: netG.net_type: unknown {kind!r}; valid: {', '.join(NETWORKS)}")
        try:
            self.net = pkgutil.resolve_name(NETWORKS[kind])(**net)
            self.net.load_state_dict(weights)
            codes = self.net.quantize.embedding.weight
        except (AttributeError, TypeError, RuntimeError) as error:
            raise ValueError(f"{path}: is not a VQGAN of this network: {' '.join(str(error).split())[:160]}") from None
        self.scale = float(1 / codes.detach().std()) if scale is None else scale
        self.quantize, self.channels, self.factor = quantize, codes.shape[1], self.net.factor
        self.fingerprint = checkpoint.fingerprint(self.net.state_dict(), "vqgan", self.scale)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Encode images (B, 3, H, W) to (B, c, h, w), not quantized."""
        return self.net.quant_conv(self.net.encoder(images)) * self.scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents (B, c, h, w) to (B, 3, H, W), not clipped."""
        latents = latents.float() / self.scale
        return self.net.decode(self.net.quantize(latents)[0] if self.quantize else latents)


class SDVAECodec(nn.Module):
    """Encode and decode with Stable Diffusion's autoencoder, from diffusers.

    Args:
        path: local folder of the autoencoder, or its name on the hub, e.g. "stabilityai/sd-vae-ft-mse".
        scale: factor of the latents.
        posterior: "sample": latents drawn with a seed that depends on the image alone, as published; or "mean".

    Raises: ValueError: diffusers is not installed, or the autoencoder does not exist.
    """

    @checked
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
        """Encode images (B, 3, H, W) to (B, c, h, w)."""
        posterior = self.net.encode(images).latent_dist
        latents = posterior.mean
        if self.posterior == "sample":
            noise = [torch.randn(mean.shape, generator=torch.Generator().manual_seed(crc32(image)))
                     for mean, image in zip(latents, images)]
            latents = latents + posterior.std * torch.stack(noise).to(latents)
        return latents * self.scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents (B, c, h, w) to (B, 3, H, W), not clipped."""
        return self.net.decode(latents / self.scale).sample


def load_trained(path: str, net: dict | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Load the weights of a checkpoint, and the options of its network unless they are given."""
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
        raise ValueError(f'{path}: does not hold the options of its network; give net, {{"net_type": "vqgan", ...}}')
    return parts.get("E") or parts.get("G"), dict(net)


def crc32(tensor: Tensor) -> int:
    """Return a checksum of the bytes of a tensor."""
    return zlib.crc32(tensor.detach().cpu().contiguous().numpy().tobytes())
