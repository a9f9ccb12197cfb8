"""The velocity field of LGT: a U-Net on latents with a style-conditioned decoder.

Source: KiritoFD/VAE_ca_proj, LGT/model.py; same keys and numbers. StyleEmbedding describes what differs.

Legend: B images, c latent channels, h w latent pixels, C base width, S width of style and condition, T of time.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runtime.ranges import PositiveInt, checked

GROUPS = 32


class TimeEmbedding(nn.Module):
    """Embed times (B,) in [0, 1] as (B, T). Times are not scaled, so most frequencies are almost constant."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width))

    def forward(self, t: Tensor) -> Tensor:
        half = self.width // 2
        frequencies = torch.exp(-math.log(10000) / half * torch.arange(half, device=t.device, dtype=t.dtype))
        angles = t[:, None] * frequencies
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=1))


class StyleEmbedding(nn.Module):
    """Embed each style as a learned vector, and the average style as the mean of these vectors.

    The mean is computed at every use, so that guidance subtracts the embedding that dropped labels are trained with.
    The original computes it once from untrained vectors. It passes no gradient to them, as published. The buffer is for
    readers of checkpoints; call `refresh` after every step.
    """

    def __init__(self, num_styles: int, width: int):
        super().__init__()
        self.embeddings = nn.Embedding(num_styles, width)
        self.register_buffer("avg_embedding", torch.empty(width))
        self.refresh()

    def average(self) -> Tensor:
        """Return the mean vector, without gradient."""
        return self.embeddings.weight.detach().mean(dim=0)

    def refresh(self) -> None:
        """Copy the mean vector into the buffer."""
        self.avg_embedding.copy_(self.average())

    def forward(self, style_id: Tensor, use_avg_style: bool) -> Tensor:
        return self.average().expand(len(style_id), -1) if use_avg_style else self.embeddings(style_id)


class ResidualBlock(nn.Module):
    """Compute SiLU(x + norm(conv(SiLU(norm(conv x))))) at constant width."""

    def __init__(self, width: int):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(GROUPS, width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(GROUPS, width)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x + self.norm2(self.conv2(F.silu(self.norm1(self.conv1(x))))))


class StyleDynamicConv(nn.Module):
    """Apply a depthwise 3x3 convolution with kernels, one per image and channel, computed from the condition.

    The kernels start at zero.
    """

    def __init__(self, width: int, condition_width: int):
        super().__init__()
        self.hypernet = nn.Linear(condition_width, width * 9)
        nn.init.zeros_(self.hypernet.weight)
        nn.init.zeros_(self.hypernet.bias)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        kernels = self.hypernet(condition).reshape(-1, 1, 3, 3)  # (B*C, 1, 3, 3)
        images = x.reshape(1, -1, *x.shape[2:])  # (1, B*C, h, w): one group per image and channel
        return F.conv2d(images, kernels, padding=1, groups=len(kernels)).reshape(x.shape)


class StyleBlock(nn.Module):
    """Compute SiLU(x + conv1x1(SiLU(norm(dynamic convolution of x))))."""

    def __init__(self, width: int, condition_width: int):
        super().__init__()
        self.style_conv = StyleDynamicConv(width, condition_width)
        self.norm = nn.GroupNorm(GROUPS, width)
        self.conv = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return F.silu(x + self.conv(F.silu(self.norm(self.style_conv(x, condition)))))


class LGTUNet(nn.Module):
    """Predict the velocity of a latent at a time towards a style; it starts at zero.

    Args:
        latent_channels: channels c of the latent codec.
        base_channels: width C of the first level, a multiple of 32; the levels are C, 2C and 4C wide.
        style_dim: width S of the style embedding.
        time_dim: width T of the time embedding, even.
        num_styles: number of styles.
        num_encoder_blocks: number of residual blocks at each of the upper two levels of the encoder.
        num_decoder_blocks: number of style blocks at each of the upper two levels of the decoder.

    Raises: ValueError: a number out of range, or base_channels or time_dim is not a multiple as stated.

    Source: LGTUNet of LGT/model.py. Differs in the average style, see StyleEmbedding.
    """

    @checked
    def __init__(self, latent_channels: PositiveInt = 4, base_channels: PositiveInt = 128,
                 style_dim: PositiveInt = 256, time_dim: PositiveInt = 256, num_styles: PositiveInt = 2,
                 num_encoder_blocks: PositiveInt = 2, num_decoder_blocks: PositiveInt = 3):
        super().__init__()
        if base_channels % GROUPS or time_dim % 2:
            raise ValueError(f"base_channels must be a multiple of {GROUPS} and time_dim even, "
                             f"got {base_channels} and {time_dim}")
        self.latent_channels = latent_channels
        widths = [base_channels, 2 * base_channels, 4 * base_channels]
        self.time_embed = TimeEmbedding(time_dim)
        self.style_embed = StyleEmbedding(num_styles, style_dim)
        self.cond_fusion = nn.Sequential(nn.Linear(time_dim + style_dim, 2 * style_dim), nn.SiLU(),
                                         nn.Linear(2 * style_dim, style_dim))
        self.input_proj = nn.Conv2d(latent_channels, widths[0], 3, padding=1)
        self.encoder_blocks_32 = nn.ModuleList(ResidualBlock(widths[0]) for _ in range(num_encoder_blocks))
        self.down1 = nn.Conv2d(widths[0], widths[1], 3, stride=2, padding=1)
        self.encoder_blocks_16 = nn.ModuleList(ResidualBlock(widths[1]) for _ in range(num_encoder_blocks))
        self.down2 = nn.Conv2d(widths[1], widths[2], 3, stride=2, padding=1)
        self.bottleneck = nn.ModuleList(ResidualBlock(widths[2]) for _ in range(2))
        self.up1 = nn.ConvTranspose2d(widths[2], widths[1], 4, stride=2, padding=1)
        self.decoder_blocks_16 = nn.ModuleList(StyleBlock(widths[1], style_dim) for _ in range(num_decoder_blocks))
        self.up2 = nn.ConvTranspose2d(widths[1], widths[0], 4, stride=2, padding=1)
        self.decoder_blocks_32 = nn.ModuleList(StyleBlock(widths[0], style_dim) for _ in range(num_decoder_blocks))
        self.output_proj = nn.Sequential(nn.GroupNorm(GROUPS, widths[0]), nn.SiLU(),
                                         nn.Conv2d(widths[0], latent_channels, 3, padding=1))
        nn.init.zeros_(self.output_proj[2].weight)
        nn.init.zeros_(self.output_proj[2].bias)

    def forward(self, x: Tensor, t: Tensor, style_id: Tensor, use_avg_style: bool = False) -> Tensor:
        """Return the velocity dx/dt.

        Args:
            x: (B, c, h, w), h and w multiples of 4.
            t: (B,) in [0, 1]: 0 is noise, 1 an image.
            style_id: (B,) numbers of the styles.
            use_avg_style: use the average style instead, for all images.

        Returns: (B, c, h, w).

        Raises: ValueError: the latents have another shape.
        """
        if x.ndim != 4 or x.shape[1] != self.latent_channels or x.shape[2] % 4 or x.shape[3] % 4:
            raise ValueError(f"latents must be (batch, {self.latent_channels}, height, width), both sides multiples "
                             f"of 4, got {tuple(x.shape)}")
        style = self.style_embed(style_id, use_avg_style)
        condition = self.cond_fusion(torch.cat([self.time_embed(t), style], dim=1))  # (B, S)
        x = self.input_proj(x)
        for block in self.encoder_blocks_32:
            x = block(x)
        upper = x  # (B, C, h, w)
        x = self.down1(x)
        for block in self.encoder_blocks_16:
            x = block(x)
        middle = x  # (B, 2C, h/2, w/2)
        x = self.down2(x)
        for block in self.bottleneck:
            x = block(x)  # (B, 4C, h/4, w/4)
        x = self.up1(x) + middle
        for block in self.decoder_blocks_16:
            x = block(x, condition)
        x = self.up2(x) + upper
        for block in self.decoder_blocks_32:
            x = block(x, condition)
        return self.output_proj(x)
