"""VQ-VAE and VQ-VAE-2: plain convolutional autoencoders with one codebook, and with two of different resolution.

Source: van den Oord, Vinyals & Kavukcuoglu 2017, "Neural Discrete Representation Learning", arXiv:1711.00937,
section 4.1; Razavi, van den Oord & Vinyals 2019, "Generating Diverse High-Fidelity Images with VQ-VAE-2",
arXiv:1906.00446, section 3.1 and appendix A.

Legend: B images, C channels, H W pixels, h w latent pixels.
"""

import torch
from torch import Tensor, nn

from models.network_vqgan import EMAVectorQuantizer, Encoded, VectorQuantizer, VQNetwork, require
from runtime.ranges import NonNegativeFloat, NonNegativeInt, PositiveInt, ProperFraction


class Residual(nn.Module):
    """x + (ReLU, 3x3 convolution, ReLU, 1x1 convolution)."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.layers = nn.Sequential(nn.ReLU(), nn.Conv2d(width, hidden, 3, padding=1), nn.ReLU(),
                                    nn.Conv2d(hidden, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def residuals(width: int, hidden: int, count: int) -> list[nn.Module]:
    return [*(Residual(width, hidden) for _ in range(count)), nn.ReLU()]


def encoder(c_in: int, width: int, hidden: int, num_res_blocks: int, halvings: int) -> nn.Sequential:
    """(B, c_in, H, W) -> (B, width, H / 2**halvings, W / 2**halvings)."""
    layers, widths = [], [c_in, *[width // 2] * (halvings - 1), width]
    for a, b in zip(widths, widths[1:]):
        layers += [nn.Conv2d(a, b, 4, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(width, width, 3, padding=1), *residuals(width, hidden, num_res_blocks))


def decoder(c_in: int, c_out: int, width: int, hidden: int, num_res_blocks: int, doublings: int) -> nn.Sequential:
    """(B, c_in, h, w) -> (B, c_out, h * 2**doublings, w * 2**doublings); its last layer makes the result."""
    layers = [nn.Conv2d(c_in, width, 3, padding=1), *residuals(width, hidden, num_res_blocks)]
    widths = [width, *[width // 2] * (doublings - 1), c_out]
    for a, b in zip(widths, widths[1:]):
        layers += [nn.ConvTranspose2d(a, b, 4, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def codebook(n_embed: int, embed_dim: int, beta: float, decay: float, restart_below: float) -> VectorQuantizer:
    if decay:
        return EMAVectorQuantizer(n_embed, embed_dim, beta, decay, restart_below=restart_below, sane_index_shape=True)
    require(not restart_below, "restart_below needs a codebook of moving averages: set decay, usually 0.99")
    return VectorQuantizer(n_embed, embed_dim, beta, sane_index_shape=True)


def check_widths(num_hiddens: int, num_res_hiddens: int, num_res_blocks: int, embed_dim: int) -> None:
    require(num_hiddens > 0 and num_hiddens % 2 == 0, f"num_hiddens must be positive and even, got {num_hiddens}")
    require(min(num_res_hiddens, embed_dim) > 0 and num_res_blocks >= 0,
            f"num_res_hiddens and embed_dim must be positive, num_res_blocks not negative, got {num_res_hiddens}, "
            f"{embed_dim} and {num_res_blocks}")


class VqVae(VQNetwork):
    """One codebook at a quarter of the size.

    Args:
        in_channels: channels of the images.
        num_hiddens: width of encoder and decoder.
        num_res_hiddens: width inside a residual block.
        num_res_blocks: residual blocks in the encoder, and as many in the decoder.
        n_embed: number of the codes.
        embed_dim: width of a code.
        beta: weight of the commitment of latents to their codes.
        decay: share of the old average that a codebook's update keeps, usually 0.99; 0: it learns by gradient, as in
            section 3.2.
        restart_below: share of even use below which a code is replaced by a latent of the batch; 0: never.

    Raises:
        ValueError: options that fit no network, in one line.

    Source: section 4.1. As in its authors' published example the width is halved at half the size, a 3x3
    convolution precedes the residual blocks, and codes are 64 wide.
    """

    factor = 4

    def __init__(self, in_channels: PositiveInt = 3, num_hiddens: PositiveInt = 256, num_res_hiddens: PositiveInt = 256,
                 num_res_blocks: NonNegativeInt = 2, n_embed: PositiveInt = 512, embed_dim: PositiveInt = 64,
                 beta: NonNegativeFloat = 0.25, decay: ProperFraction = 0.0, restart_below: ProperFraction = 0.0):
        super().__init__()
        check_widths(num_hiddens, num_res_hiddens, num_res_blocks, embed_dim)
        self.in_channels = in_channels
        self.encoder = encoder(in_channels, num_hiddens, num_res_hiddens, num_res_blocks, halvings=2)
        self.quant_conv = nn.Conv2d(num_hiddens, embed_dim, 1)
        self.quantize = codebook(n_embed, embed_dim, beta, decay, restart_below)
        self.decoder = decoder(embed_dim, in_channels, num_hiddens, num_res_hiddens, num_res_blocks, doublings=2)

    @property
    def last_layer(self) -> nn.Parameter:
        return self.decoder[-1].weight

    def encode(self, images: Tensor) -> Encoded:
        """Images (B, C, H, W) -> codes (B, embed_dim, H/4, W/4), loss, (perplexity, None, indices (B, H/4, W/4))."""
        self.check_images(images)
        return self.quantize(self.quant_conv(self.encoder(images)))

    def decode(self, codes: Tensor) -> Tensor:
        """(B, embed_dim, h, w) -> images (B, C, 4*h, 4*w)."""
        return self.decoder(codes)

    def decode_code(self, indices: Tensor, shape: tuple[int, ...] | None = None) -> Tensor:
        """Images from indices (B, h, w), or flat ones with that shape. Raises ValueError."""
        return self.decode(self.quantize.lookup(self.quantize.inward(indices, shape)))


class VQVAE2(VQNetwork):
    """Two codebooks: the top one, at 1/8, for the whole; the bottom one, at 1/4, for details, which sees the top.

    Args: as `VqVae`, for both levels; codebooks average unless decay is 0.

    Codes and indices are pairs (top, bottom); the loss is the sum over both levels, perplexity their mean.
    Raises:
        ValueError: options that fit no network, in one line.
    """

    factor = 8

    def __init__(self, in_channels: PositiveInt = 3, num_hiddens: PositiveInt = 128, num_res_hiddens: PositiveInt = 64,
                 num_res_blocks: NonNegativeInt = 2, n_embed: PositiveInt = 512, embed_dim: PositiveInt = 64,
                 beta: NonNegativeFloat = 0.25, decay: ProperFraction = 0.99, restart_below: ProperFraction = 0.0):
        super().__init__()
        check_widths(num_hiddens, num_res_hiddens, num_res_blocks, embed_dim)
        self.in_channels = in_channels
        blocks = (num_hiddens, num_res_hiddens, num_res_blocks)
        self.encoder_bottom = encoder(in_channels, *blocks, halvings=2)
        self.encoder_top = encoder(num_hiddens, *blocks, halvings=1)
        self.quant_conv_top = nn.Conv2d(num_hiddens, embed_dim, 1)
        self.quantize_top = codebook(n_embed, embed_dim, beta, decay, restart_below)
        self.decoder_top = decoder(embed_dim, num_hiddens, *blocks, doublings=1)
        self.quant_conv_bottom = nn.Conv2d(2 * num_hiddens, embed_dim, 1)
        self.quantize_bottom = codebook(n_embed, embed_dim, beta, decay, restart_below)
        self.upsample_top = nn.ConvTranspose2d(embed_dim, embed_dim, 4, stride=2, padding=1)
        self.decoder = decoder(2 * embed_dim, in_channels, *blocks, doublings=2)

    @property
    def last_layer(self) -> nn.Parameter:
        return self.decoder[-1].weight

    def encode(self, images: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor, tuple]:
        """Images (B, C, H, W) -> codes, loss, (perplexity, None, indices).

        Codes are (B, embed_dim, H/8, W/8) and (B, embed_dim, H/4, W/4), indices (B, H/8, W/8) and (B, H/4, W/4).
        """
        self.check_images(images)
        fine = self.encoder_bottom(images)
        top, loss_top, (usage_top, _, indices_top) = self.quantize_top(self.quant_conv_top(self.encoder_top(fine)))
        fine = torch.cat((self.decoder_top(top), fine), dim=1)
        bottom, loss_bottom, (usage_bottom, _, indices_bottom) = self.quantize_bottom(self.quant_conv_bottom(fine))
        usage = (usage_top + usage_bottom) / 2
        return (top, bottom), loss_top + loss_bottom, (usage, None, (indices_top, indices_bottom))

    def decode(self, codes: tuple[Tensor, Tensor]) -> Tensor:
        """Top (B, embed_dim, h, w) and bottom (B, embed_dim, 2*h, 2*w) -> images (B, C, 8*h, 8*w)."""
        top, bottom = codes
        return self.decoder(torch.cat((self.upsample_top(top), bottom), dim=1))

    def decode_code(self, indices: tuple[Tensor, Tensor]) -> Tensor:
        """Images from top (B, h, w) and bottom (B, 2*h, 2*w) indices. Raises ValueError."""
        books = (self.quantize_top, self.quantize_bottom)
        require(len(indices) == 2, "codes must be a pair: top (batch, rows, columns), bottom of twice the size")
        return self.decode(tuple(book.lookup(book.inward(i, None)) for book, i in zip(books, indices)))
