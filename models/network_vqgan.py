"""VQGAN: an autoencoder of images whose latent pixels are entries of a learned codebook.

Source: Esser, Rombach & Ommer 2021, "Taming Transformers for High-Resolution Image Synthesis", arXiv:2012.09841;
codebooks by moving averages: van den Oord et al. 2017, arXiv:1711.00937, appendix A.1. Arguments, key names and
numbers follow CompVis/taming-transformers, whose weights load strictly; VQModel describes what differs.

Legend: B images, C channels, H W pixels, h w latent pixels (H / f, W / f), N = B*h*w, K codes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metrics.vqgan import perplexity
from runtime.determinism import full_float32
from runtime.ranges import NonNegativeFloat, PositiveFloat, PositiveInt, ProperFraction, checked
from storage.foreign import TAMING_LOSS

GROUPS = 32
MAX_DISTANCES = 2**24  # distances in memory during a lookup, 64 MiB
Encoded = tuple[Tensor, Tensor, tuple[Tensor, None, Tensor]]
Broadcast = Callable[[Tensor], Tensor]  # returns rank 0's tensor on all ranks


def require(condition: bool, message: str) -> None:
    """Raise ValueError unless a condition holds."""
    if not condition:
        raise ValueError(message)


# ---- encoder and decoder -----------------------------------------------------


@dataclass
class DDConfig:
    """Hold the shape of an encoder and its decoder: the keys of `ddconfig`.

    Args:
        ch: width at full resolution, a multiple of 32.
        in_channels: channels of the input images.
        out_ch: channels of the output images.
        resolution: side of a training image in pixels; it only places the attention, other sizes work as well.
        z_channels: channels of the latent image.
        num_res_blocks: number of residual blocks per level of the encoder; the decoder has one more.
        attn_resolutions: sides of feature maps in pixels at which attention follows every residual block.
        ch_mult: width of each level divided by ch; each level but the last halves the size.
        dropout: fraction of values that residual blocks drop in training.
        resamp_with_conv: whether each change of size has a convolution.
        double_z: let the encoder return mean and variance; must be false with a codebook.
    """

    ch: PositiveInt
    in_channels: PositiveInt
    out_ch: PositiveInt
    resolution: PositiveInt
    z_channels: PositiveInt
    num_res_blocks: PositiveInt
    attn_resolutions: list[PositiveInt]
    ch_mult: tuple[PositiveInt, ...] = (1, 2, 4, 8)
    dropout: ProperFraction = 0.0
    resamp_with_conv: bool = True
    double_z: bool = False

    def __post_init__(self):
        require(len(self.ch_mult) > 0, "ddconfig: ch_mult must have an entry for each level")
        wrong = [width for width in self.widths if width % GROUPS]
        require(not wrong, f"ddconfig: ch times each entry of ch_mult must be a multiple of {GROUPS}, got {wrong}")
        require(self.resolution % self.factor == 0,
                f"ddconfig: resolution must be a multiple of {self.factor} for {len(self.ch_mult)} levels, "
                f"got {self.resolution}")

    @classmethod
    def read(cls, ddconfig: dict) -> "DDConfig":
        """Return the keys of an option section. Raises ValueError where they are not those of the class."""
        try:
            return cls(**ddconfig)
        except TypeError as error:
            raise ValueError(f"ddconfig: {str(error).removeprefix('DDConfig.__init__() ')}") from None

    @property
    def widths(self) -> list[int]:
        """Width of each level."""
        return [self.ch * m for m in self.ch_mult]

    @property
    def factor(self) -> int:
        """Image pixels per latent pixel on each side."""
        return 2 ** (len(self.ch_mult) - 1)

    def attends(self, level: int) -> bool:
        """Tell whether a level has attention."""
        return self.resolution // 2**level in self.attn_resolutions


DDConfig.__init__ = checked(DDConfig.__init__)


def norm(width: int) -> nn.GroupNorm:
    """Build a group norm of 32 groups."""
    return nn.GroupNorm(GROUPS, width, eps=1e-6)


class ResnetBlock(nn.Module):
    """Add to x twice norm, swish, 3x3 convolution; x passes a 1x1 convolution where the width changes."""

    def __init__(self, c_in: int, c_out: int, dropout: float):
        super().__init__()
        self.norm1 = norm(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = norm(c_out)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        if c_in != c_out:
            self.nin_shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(self.dropout(F.silu(self.norm2(y))))
        return y + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttnBlock(nn.Module):
    """Add to x single-head attention among all latent pixels."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = norm(width)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (layer(y).flatten(2).transpose(1, 2)[:, None] for layer in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v)  # (B, 1, h*w, C)
        return x + self.proj_out(y[:, 0].transpose(1, 2).reshape(x.shape))


class Downsample(nn.Module):
    """Halve the size."""

    def __init__(self, width: int, with_conv: bool):
        super().__init__()
        if with_conv:
            self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "conv"):
            return F.avg_pool2d(x, 2)
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # right and bottom only, as published


class Upsample(nn.Module):
    """Double the size."""

    def __init__(self, width: int, with_conv: bool):
        super().__init__()
        if with_conv:
            self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return self.conv(x) if hasattr(self, "conv") else x


class Level(nn.Module):
    """Apply the blocks of one resolution: residual blocks, each with optional attention."""

    def __init__(self, c_in: int, c_out: int, num_blocks: int, attends: bool, dropout: float):
        super().__init__()
        self.block = nn.ModuleList(ResnetBlock(c_out if j else c_in, c_out, dropout) for j in range(num_blocks))
        self.attn = nn.ModuleList(AttnBlock(c_out) for _ in range(num_blocks if attends else 0))

    def forward(self, x: Tensor) -> Tensor:
        for j, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[j](x)
        if hasattr(self, "downsample"):
            x = self.downsample(x)
        return self.upsample(x) if hasattr(self, "upsample") else x


def middle(width: int, dropout: float) -> nn.Module:
    """Build the blocks at the lowest resolution of encoder and decoder."""
    mid = nn.Sequential()
    mid.add_module("block_1", ResnetBlock(width, width, dropout))
    mid.add_module("attn_1", AttnBlock(width))
    mid.add_module("block_2", ResnetBlock(width, width, dropout))
    return mid


class Encoder(nn.Module):
    """Encode images (B, in_channels, H, W) to (B, z_channels, h, w)."""

    def __init__(self, config: DDConfig):
        super().__init__()
        widths = config.widths
        self.conv_in = nn.Conv2d(config.in_channels, config.ch, 3, padding=1)
        self.down = nn.ModuleList()
        for i, (c_in, c_out) in enumerate(zip([config.ch, *widths], widths)):
            level = Level(c_in, c_out, config.num_res_blocks, config.attends(i), config.dropout)
            if i < len(widths) - 1:
                level.downsample = Downsample(c_out, config.resamp_with_conv)
            self.down.append(level)
        self.mid = middle(widths[-1], config.dropout)
        self.norm_out = norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.z_channels * (2 if config.double_z else 1), 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """Decode latents (B, z_channels, h, w) to images (B, out_ch, H, W), not clipped.

    With give_pre_end it returns the features before the last norm, (B, ch * ch_mult[0], H, W).
    """

    def __init__(self, config: DDConfig, give_pre_end: bool = False):
        super().__init__()
        self.give_pre_end = give_pre_end
        widths = config.widths
        self.conv_in = nn.Conv2d(config.z_channels, widths[-1], 3, padding=1)
        self.mid = middle(widths[-1], config.dropout)
        self.up = nn.ModuleList()  # index 0 is full resolution, which runs last
        for i, (c_out, c_in) in enumerate(zip(widths, [*widths[1:], widths[-1]])):
            level = Level(c_in, c_out, config.num_res_blocks + 1, config.attends(i), config.dropout)
            if i:
                level.upsample = Upsample(c_out, config.resamp_with_conv)
            self.up.append(level)
        self.norm_out = norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], config.out_ch, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        return x if self.give_pre_end else self.conv_out(F.silu(self.norm_out(x)))


# ---- codebooks ---------------------------------------------------------------


@torch.library.custom_op("perdure::nearest", mutates_args=())  # torch.compile can't trace a change of precision
def nearest(z: Tensor, codes: Tensor) -> Tensor:
    """Return the index (N,) of the code (K, C) that is closest to each vector (N, C), without gradient."""
    norms = codes.square().sum(dim=1)
    # |z|^2 is equal for all codes; chunks bound the memory
    chunks = z.split(max(MAX_DISTANCES // len(codes), 1))
    with full_float32():
        return torch.cat([torch.addmm(norms, part, codes.T, alpha=-2).argmin(dim=1) for part in chunks])


@nearest.register_fake
def _(z: Tensor, codes: Tensor) -> Tensor:
    return z.new_empty(len(z), dtype=torch.int64)


class Indices(nn.Module):
    """Convert between the codes of a codebook and the indices that its callers see.

    Args:
        n_embed: number of codes.
        embed_dim: width of a code.
        remap: .npy file of the codes in use; indices count along it, and other codes become random indices, as
            published. None: all codes.
        sane_index_shape: return indices as (B, h, w) instead of (N,), or (N, 1) with remap.
    """

    def __init__(self, n_embed: int, embed_dim: int, remap: str | None, sane_index_shape: bool):
        super().__init__()
        self.n_embed, self.sane_index_shape = n_embed, sane_index_shape
        self.register_buffer("used", self._read(remap) if remap else None)

    def _read(self, path: str) -> Tensor:
        try:
            used = torch.from_numpy(np.load(Path(path).expanduser(), allow_pickle=False)).long()
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(f"remap: {path} is not a .npy file of code numbers ({type(error).__name__})") from error
        require(used.ndim == 1 and len(used) > 0 and 0 <= used.min() and used.max() < self.n_embed,
                f"remap: {path} must hold a list of numbers from 0 to {self.n_embed - 1}")
        return used

    def outward(self, indices: Tensor, size: tuple[int, int, int]) -> Tensor:
        """Return the indices of codes (N,), where size is (B, h, w)."""
        if self.used is not None:
            place = torch.full((self.n_embed,), -1, device=indices.device)
            place[self.used] = torch.arange(len(self.used), device=indices.device)
            place = place[indices]
            indices = torch.where(place < 0, torch.randint_like(place, len(self.used)), place)[:, None]
        return indices.view(size) if self.sane_index_shape else indices

    def inward(self, indices: Tensor, shape: tuple[int, ...] | None) -> Tensor:
        """Return the codes (B, h, w) of indices, flat ones with their shape (B, h, w[, C])."""
        if shape is not None:
            require(indices.numel() == shape[0] * shape[1] * shape[2],
                    f"{indices.numel()} codes are not of shape (batch, rows, columns) = {tuple(shape[:3])}")
            indices = indices.reshape(tuple(shape[:3]))
        require(indices.ndim == 3, f"codes must be (batch, rows, columns), got {tuple(indices.shape)}; "
                                   "give flat ones with their shape")
        return indices if self.used is None else self.used[indices]


class VectorQuantizer(Indices):
    """Quantize latents with a codebook that learns by the gradient of the distance to its codes.

    Args:
        n_embed, embed_dim, remap, sane_index_shape: as in Indices.
        beta: factor of the commitment loss; the codebook loss has factor 1.
        legacy: apply beta to the codebook loss instead, as taming does. The loss has the same value.

    Source: van den Oord et al. 2017, equation 3; VectorQuantizer2 of taming.
    """

    def __init__(self, n_embed: int, embed_dim: int, beta: float = 0.25, remap: str | None = None,
                 sane_index_shape: bool = False, legacy: bool = False):
        super().__init__(n_embed, embed_dim, remap, sane_index_shape)
        self.beta, self.legacy = beta, legacy
        self.embedding = self._codes(n_embed, embed_dim)

    def _codes(self, n_embed: int, embed_dim: int) -> nn.Module:
        """Build the module that holds the codes."""
        codes = nn.Embedding(n_embed, embed_dim)
        nn.init.uniform_(codes.weight, -1 / n_embed, 1 / n_embed)
        return codes

    def forward(self, z: Tensor) -> Encoded:
        """Replace each latent by its closest code.

        Args: z: (B, C, h, w).

        Returns:
            codes (B, C, h, w), whose gradient passes to z; loss, scalar; (perplexity, None, indices). All in float32:
            half precision would confuse codes that lie close together.
        """
        with torch.autocast(z.device.type, enabled=False):
            z = z.float()
            flat = z.detach().permute(0, 2, 3, 1).flatten(0, 2)  # (N, C)
            indices = nearest(flat, self.embedding.weight.detach())
            size = (z.shape[0], *z.shape[2:])
            codes = self.lookup(indices.view(size))
            output = z + (codes - z).detach()
            self._observe(output, flat, indices)
            info = (perplexity(indices, self.n_embed), None, self.outward(indices, size))
            return output, self._loss(codes, z), info

    def lookup(self, codes: Tensor) -> Tensor:
        """Return the vectors (B, C, h, w) of codes (B, h, w)."""
        return F.embedding(codes, self.embedding.weight).permute(0, 3, 1, 2)

    def _loss(self, codes: Tensor, z: Tensor) -> Tensor:
        commitment, codebook = F.mse_loss(z, codes.detach()), F.mse_loss(codes, z.detach())
        return commitment + self.beta * codebook if self.legacy else self.beta * commitment + codebook

    def _observe(self, output: Tensor, flat: Tensor, indices: Tensor) -> None:
        """Observe a batch, for codebooks of moving averages."""


class AveragedCodes(nn.Module):
    """Hold codes and their moving averages as buffers, which no optimizer changes and every checkpoint contains."""

    def __init__(self, n_embed: int, embed_dim: int):
        super().__init__()
        self.register_buffer("weight", torch.randn(n_embed, embed_dim))
        # taming starts at 0, so that a code without hits is divided by eps and ends 1e5 away
        self.register_buffer("cluster_size", torch.ones(n_embed))
        self.register_buffer("embed_avg", self.weight.clone())
        self.register_load_state_dict_pre_hook(self._complete)

    @staticmethod
    def _complete(module: nn.Module, state: dict, prefix: str, *_) -> None:
        """Derive the averages of weights that have none from their codes, so that an update keeps the codes."""
        if f"{prefix}weight" in state and not {f"{prefix}cluster_size", f"{prefix}embed_avg"} & state.keys():
            state[f"{prefix}cluster_size"] = torch.ones_like(module.cluster_size)
            state[f"{prefix}embed_avg"] = state[f"{prefix}weight"].clone()


class EMAVectorQuantizer(VectorQuantizer):
    """Quantize latents with a codebook whose codes are moving averages of the latents that they represent.

    `take_counts` counts the last forward pass in training whose result has a gradient, and only `update` moves the
    codes. So an iteration has one update, with gradient accumulation, gradient checkpointing and further passes without
    gradient, and a skipped step leaves the codes unchanged. `frozen = True` stops updates.

    Args:
        n_embed, embed_dim, beta, remap, sane_index_shape: as in VectorQuantizer.
        decay: fraction of the moving average that an update keeps.
        eps: constant added to the count of every code, which avoids a division by zero.
        restart_below: a code used less than this fraction of uniform use is replaced by a latent of the batch, with the
            count of uniform use; 0: never. 0.1 avoids a collapse of the codebook at the start.

    Source: van den Oord et al. 2017, appendix A.1; EMAVectorQuantizer of taming, whose constructor fails and whose
    unused codes diverge.
    """

    @checked
    def __init__(self, n_embed: int, embed_dim: int, beta: float = 0.25, decay: ProperFraction = 0.99,
                 eps: float = 1e-5, restart_below: ProperFraction = 0.0, remap: str | None = None,
                 sane_index_shape: bool = False):
        super().__init__(n_embed, embed_dim, beta, remap, sane_index_shape)
        self.decay, self.eps, self.restart_below, self.frozen = decay, eps, restart_below, False
        self._last: tuple[Tensor, Tensor] | None = None  # latents (B, h*w, C) and indices that are not yet counted
        self._latents: Tensor | None = None  # of the first micro-batch since the last update

    def _codes(self, n_embed: int, embed_dim: int) -> nn.Module:
        return AveragedCodes(n_embed, embed_dim)

    def _loss(self, codes: Tensor, z: Tensor) -> Tensor:
        return self.beta * F.mse_loss(z, codes)

    def _observe(self, output: Tensor, flat: Tensor, indices: Tensor) -> None:
        if self.training and not self.frozen and output.requires_grad:
            self._last = flat.view(len(output), -1, flat.shape[1]), indices

    def take_counts(self) -> Tensor:
        """Return the counts of the last forward pass: hits and sum of latents of each code, (K, 1 + C)."""
        weight = self.embedding.weight
        seen = weight.new_zeros(self.n_embed, 1 + weight.shape[1])
        if self._last is not None:
            (flat, indices), self._last = self._last, None
            seen.index_add_(0, indices, F.pad(flat.flatten(0, 1), (1, 0), value=1.0))
            self._latents = flat if self._latents is None else self._latents
        return seen

    def drop_counts(self) -> None:
        """Forget what is not counted yet, and the latents."""
        self._last = self._latents = None

    @torch.no_grad()
    def update(self, step: int = 0, seen: Tensor | None = None, broadcast: Broadcast = lambda x: x) -> None:
        """Move the codes by counts; without latents since the last update do nothing.

        Args:
            step: iteration, the seed of the latents that replace restarted codes.
            seen: sum of `take_counts` of all micro-batches; None: of the last forward pass.
            broadcast: returns rank 0's tensor; called with the latents of the first micro-batch, with restart_below.
        """
        seen = self.take_counts() if seen is None else seen
        if self._latents is None:
            return
        flat, book = self._latents, self.embedding
        self.drop_counts()
        book.cluster_size.lerp_(seen[:, 0], 1 - self.decay)
        book.embed_avg.lerp_(seen[:, 1:], 1 - self.decay)
        if self.restart_below:
            flat = broadcast(flat).flatten(0, 1)
            even = book.cluster_size.mean()
            dead = book.cluster_size < self.restart_below * even
            generator = torch.Generator().manual_seed(step)  # no state to restore
            draw = torch.randperm(max(self.n_embed, len(flat)), generator=generator)[: self.n_embed] % len(flat)
            restarted = flat[draw.to(flat.device, non_blocking=True)] * even
            book.embed_avg.copy_(torch.where(dead[:, None], restarted, book.embed_avg))
            book.cluster_size.copy_(torch.where(dead, even, book.cluster_size))
        total = book.cluster_size.sum()
        size = (book.cluster_size + self.eps) / (total + self.n_embed * self.eps) * total
        book.weight.copy_(book.embed_avg / size[:, None])


class GumbelQuantize(Indices):
    """Quantize latents with codes drawn from predicted probabilities, with Gumbel noise in training.

    Args:
        num_hiddens: channels of the latents.
        n_embed, embed_dim, remap, sane_index_shape: as in Indices.
        kl_weight: factor of the divergence of the probabilities from uniform ones.
        straight_through: use one code per latent pixel in training, too, instead of a mixture.

    The recipe lowers `temperature` in training.
    Source: GumbelQuantize of taming. Differs: evaluation takes the most probable code, without noise.
    """

    def __init__(self, num_hiddens: int, n_embed: int, embed_dim: int, kl_weight: float = 5e-4,
                 straight_through: bool = True, remap: str | None = None, sane_index_shape: bool = False):
        super().__init__(n_embed, embed_dim, remap, sane_index_shape)
        self.kl_weight, self.straight_through, self.temperature = kl_weight, straight_through, 1.0
        self.proj = nn.Conv2d(num_hiddens, n_embed, 1)
        self.embed = nn.Embedding(n_embed, embed_dim)

    def forward(self, z: Tensor) -> Encoded:
        """Quantize latents, see VectorQuantizer.forward."""
        with torch.autocast(z.device.type, enabled=False):
            logits = self.proj(z.float())  # (B, K, h, w)
            share = logits.softmax(dim=1)
            loss = self.kl_weight * (share * (share * self.n_embed + 1e-10).log()).sum(dim=1).mean()
            if self.training:
                choice = F.gumbel_softmax(logits, self.temperature, hard=self.straight_through, dim=1)
                indices = choice.argmax(dim=1)
                output = torch.einsum("bkhw,kc->bchw", choice, self.embed.weight)
            else:
                indices = logits.argmax(dim=1)
                output = self.lookup(indices)
            info = (perplexity(indices, self.n_embed), None, self.outward(indices.flatten(), tuple(indices.shape)))
            return output, loss, info

    def lookup(self, codes: Tensor) -> Tensor:
        """Return the vectors (B, C, h, w) of codes (B, h, w)."""
        return self.embed(codes).permute(0, 3, 1, 2)


# ---- networks ----------------------------------------------------------------


class VQNetwork(nn.Module):
    """Define the interface of autoencoders with codebooks; a subclass adds encode, decode and decode_code.

    Attributes:
        in_channels, factor: images are (B, in_channels, H, W), H and W multiples of factor.
        last_layer: weight of the last layer, for the adaptive weight of a discriminator.
    """

    in_channels: int
    factor: int
    last_layer: nn.Parameter

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Encode and decode.

        Args: images: (B, C, H, W) in [-1, 1].

        Returns: loss of the codebook, scalar; reconstructed images, not clipped; perplexity, scalar; indices.

        Raises: ValueError: sides of the images are not multiples of factor.
        """
        codes, loss, (usage, _, indices) = self.encode(images)
        return loss, self.decode(codes), usage, indices

    def check_images(self, images: Tensor) -> None:
        """Raise ValueError for images of a shape that the network does not take."""
        ok = images.ndim == 4 and images.shape[1] == self.in_channels and not any(
            side % self.factor for side in images.shape[2:])
        require(ok, f"images must be (batch, {self.in_channels}, height, width), both sides multiples of "
                    f"{self.factor}, got {tuple(images.shape)}")

    def averaged_codebooks(self) -> list[EMAVectorQuantizer]:
        """Return the codebooks of moving averages."""
        return [module for module in self.modules() if isinstance(module, EMAVectorQuantizer)]

    def take_counts(self) -> list[Tensor]:
        """Return and reset the counts of each codebook of moving averages."""
        return [book.take_counts() for book in self.averaged_codebooks()]

    def drop_counts(self) -> None:
        """Forget the counts since the last update."""
        for book in self.averaged_codebooks():
            book.drop_counts()

    def update_codebook(self, step: int = 0, seen: Sequence[Tensor] | None = None,
                        broadcast: Broadcast = lambda x: x) -> None:
        """Update codebooks of moving averages, once per iteration, after the optimizer step.

        Args: seen: counts of each of these codebooks. Others as EMAVectorQuantizer.update.
        """
        books = self.averaged_codebooks()
        for book, counts in zip(books, seen or [None] * len(books)):
            book.update(step, counts, broadcast)


class VQModel(VQNetwork):
    """Encode and decode images as VQGAN does, with a codebook that learns by gradient.

    Args:
        ddconfig: shape of encoder and decoder, the keys of DDConfig.
        n_embed: number of codes.
        embed_dim: width of a code.
        remap: file (.npy) of the codes in use, along which indices count; None: all codes.
        sane_index_shape: return indices as (B, h, w) instead of (N,), or (N, 1) with remap.
        beta: factor of the commitment loss; the codebook loss has factor 1.
        legacy: apply beta to the codebook loss instead, as taming does.

    Raises: ValueError: options are out of range or do not fit each other.

    Source: VQModel of taming, with equal weights and numbers. Published files load strictly; the weights of their loss
    are ignored. Differs: beta scales the commitment loss unless legacy is set; the loss is not a part of the network;
    decode_code works.
    """

    @checked
    def __init__(self, ddconfig: dict, n_embed: PositiveInt, embed_dim: PositiveInt, remap: str | None = None,
                 sane_index_shape: bool = False, beta: NonNegativeFloat = 0.25, legacy: bool = False):
        self._build(ddconfig, VectorQuantizer(n_embed, embed_dim, beta, remap, sane_index_shape, legacy), embed_dim)

    def _build(self, ddconfig: dict, quantize: Indices, embed_dim: int) -> None:
        super().__init__()
        config = DDConfig.read(ddconfig)
        require(not config.double_z, "ddconfig: double_z must be false with a codebook")
        self.in_channels, self.factor = config.in_channels, config.factor
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = quantize
        self.quant_conv = nn.Conv2d(config.z_channels, embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, config.z_channels, 1)
        self.register_load_state_dict_pre_hook(self._drop_loss)

    @staticmethod
    def _drop_loss(module: nn.Module, state: dict, prefix: str, *_) -> None:
        """Remove the weights of taming's loss from a state dict."""
        for key in [key for key in state if key.startswith(prefix) and TAMING_LOSS.search(key.removeprefix(prefix))]:
            del state[key]

    @property
    def last_layer(self) -> nn.Parameter:
        """Weight of the last layer."""
        return self.decoder.conv_out.weight

    def encode(self, images: Tensor) -> Encoded:
        """Encode images (B, C, H, W) to codes (B, embed_dim, h, w), loss and (perplexity, None, indices)."""
        self.check_images(images)
        return self.quantize(self.quant_conv(self.encoder(images)))

    def decode(self, codes: Tensor) -> Tensor:
        """Decode codes (B, embed_dim, h, w) to images (B, out_ch, H, W)."""
        return self.decoder(self.post_quant_conv(codes))

    def decode_code(self, indices: Tensor, shape: tuple[int, ...] | None = None) -> Tensor:
        """Decode the indices of `encode` to images.

        Args:
            indices: (B, h, w), or flat.
            shape: of flat indices: (B, h, w), or taming's (B, h, w, embed_dim).

        Raises: ValueError: flat indices have no shape or do not fit it.
        """
        return self.decode(self.quantize.lookup(self.quantize.inward(indices, shape)))


class EMAVQ(VQModel):
    """Encode and decode images as VQGAN does, with a codebook of moving averages; see update_codebook.

    Args:
        decay: fraction of the moving average that an update of the codebook keeps.
        eps: constant added to the count of every code, which avoids a division by zero.
        restart_below: fraction of uniform use below which a code is replaced by a latent of the batch; 0: never.
        others: as `VQModel`.

    Source: EMAVQ of taming, with equal keys; EMAVectorQuantizer describes what differs.
    """

    @checked
    def __init__(self, ddconfig: dict, n_embed: PositiveInt, embed_dim: PositiveInt, remap: str | None = None,
                 sane_index_shape: bool = False, beta: NonNegativeFloat = 0.25, decay: ProperFraction = 0.99,
                 eps: PositiveFloat = 1e-5, restart_below: ProperFraction = 0.0):
        self._build(ddconfig, EMAVectorQuantizer(n_embed, embed_dim, beta, decay, eps, restart_below, remap,
                                                 sane_index_shape), embed_dim)


class GumbelVQ(VQModel):
    """Encode and decode images as VQGAN does, with codes drawn from predicted probabilities.

    Args:
        embed_dim: width of a code; equal to z_channels.
        kl_weight: factor of the divergence of the probabilities from uniform ones.
        straight_through: use one code per latent pixel in training, instead of a mixture.
        others: as `VQModel`.

    Source: GumbelVQ of taming, with equal keys. The recipe lowers `quantize.temperature`.
    """

    @checked
    def __init__(self, ddconfig: dict, n_embed: PositiveInt, embed_dim: PositiveInt, remap: str | None = None,
                 sane_index_shape: bool = False, kl_weight: NonNegativeFloat = 1e-8, straight_through: bool = True):
        channels = ddconfig.get("z_channels", embed_dim)
        require(channels == embed_dim, f"embed_dim must equal ddconfig.z_channels = {channels}, got {embed_dim}")
        self._build(ddconfig, GumbelQuantize(embed_dim, n_embed, embed_dim, kl_weight, straight_through, remap,
                                             sane_index_shape), embed_dim)
