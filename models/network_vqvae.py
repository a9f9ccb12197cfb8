"""VQ-VAE and VQ-VAE-2: convolutional autoencoders with one codebook, and with two of different resolution.

Source: van den Oord, Vinyals & Kavukcuoglu 2017, "Neural Discrete Representation Learning", arXiv:1711.00937,
section 4.1; Razavi, van den Oord & Vinyals 2019, "Generating Diverse High-Fidelity Images with VQ-VAE-2",
arXiv:1906.00446, section 3.1 and appendix A.

Legend: B images, C channels, H W pixels, h w latent pixels.
"""

import torch
from torch import Tensor, nn

from models.network_vqgan import EMAVectorQuantizer, Encoded, VectorQuantizer, VQNetwork, require
from runtime.ranges import NonNegativeFloat, NonNegativeInt, PositiveInt, ProperFraction, checked


class Residual(nn.Module):
    """Add to x: ReLU, 3x3 convolution, ReLU, 1x1 convolution."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.layers = nn.Sequential(nn.ReLU(), nn.Conv2d(width, hidden, 3, padding=1), nn.ReLU(),
                                    nn.Conv2d(hidden, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def residuals(width: int, hidden: int, count: int) -> list[nn.Module]:
    """Build residual blocks and a last ReLU."""
    return [*(Residual(width, hidden) for _ in range(count)), nn.ReLU()]


def encoder(c_in: int, width: int, hidden: int, num_res_blocks: int, halvings: int) -> nn.Sequential:
    """Build an encoder of (B, c_in, H, W) to (B, width, H / 2**halvings, W / 2**halvings)."""
    layers, widths = [], [c_in, *[width // 2] * (halvings - 1), width]
    for a, b in zip(widths, widths[1:]):
        layers += [nn.Conv2d(a, b, 4, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(width, width, 3, padding=1), *residuals(width, hidden, num_res_blocks))


def decoder(c_in: int, c_out: int, width: int, hidden: int, num_res_blocks: int, doublings: int) -> nn.Sequential:
    """Build a decoder of (B, c_in, h, w) to (B, c_out, h * 2**doublings, w * 2**doublings)."""
    layers = [nn.Conv2d(c_in, width, 3, padding=1), *residuals(width, hidden, num_res_blocks)]
    widths = [width, *[width // 2] * (doublings - 1), c_out]
    for a, b in zip(widths, widths[1:]):
        layers += [nn.ConvTranspose2d(a, b, 4, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def codebook(n_embed: int, embed_dim: int, beta: float, decay: float, restart_below: float) -> VectorQuantizer:
    """Build a codebook of moving averages, or with decay 0 one that learns by gradient."""
    if decay:
        return EMAVectorQuantizer(n_embed, embed_dim, beta, decay, restart_below=restart_below, sane_index_shape=True)
    require(not restart_below, "restart_below needs a codebook of moving averages: set decay, usually 0.99")
    return VectorQuantizer(n_embed, embed_dim, beta, sane_index_shape=True)


class VqVae(VQNetwork):
    """Encode and decode images with one codebook at a quarter of the size.

    Args:
        in_channels: channels of the images.
        num_hiddens: width of encoder and decoder, even.
        num_res_hiddens: width inside a residual block.
        num_res_blocks: number of residual blocks in the encoder, and in the decoder.
        n_embed: number of codes per codebook.
        embed_dim: width of a code.
        beta: factor of the commitment loss.
        decay: fraction of the moving average that an update of the codebook keeps, usually 0.99; 0: the codebook learns
            by gradient, as in section 3.2.
        restart_below: fraction of uniform use below which a code is replaced by a latent of the batch; 0: never.

    Raises: ValueError: options are out of range or do not fit each other.

    Source: section 4.1. As in the example of its authors, layers at half size have half the width, a 3x3 convolution
    precedes the residual blocks, and codes are 64 wide.
    """

    factor = 4

    @checked
    def __init__(self, in_channels: PositiveInt = 3, num_hiddens: PositiveInt = 256, num_res_hiddens: PositiveInt = 256,
                 num_res_blocks: NonNegativeInt = 2, n_embed: PositiveInt = 512, embed_dim: PositiveInt = 64,
                 beta: NonNegativeFloat = 0.25, decay: ProperFraction = 0.0, restart_below: ProperFraction = 0.0):
        super().__init__()
        require(num_hiddens % 2 == 0, f"num_hiddens must be even, got {num_hiddens}")
        self.in_channels = in_channels
        self.encoder = encoder(in_channels, num_hiddens, num_res_hiddens, num_res_blocks, halvings=2)
        self.quant_conv = nn.Conv2d(num_hiddens, embed_dim, 1)
        self.quantize = codebook(n_embed, embed_dim, beta, decay, restart_below)
        self.decoder = decoder(embed_dim, in_channels, num_hiddens, num_res_hiddens, num_res_blocks, doublings=2)

    @property
    def last_layer(self) -> nn.Parameter:
        """Weight of the last layer."""
        return self.decoder[-1].weight

    def encode(self, images: Tensor) -> Encoded:
        """Encode images to codes (B, embed_dim, H/4, W/4), loss and (perplexity, None, indices (B, H/4, W/4))."""
        self.check_images(images)
        return self.quantize(self.quant_conv(self.encoder(images)))

    def decode(self, codes: Tensor) -> Tensor:
        """Decode codes (B, embed_dim, h, w) to images (B, C, 4*h, 4*w)."""
        return self.decoder(codes)

    def decode_code(self, indices: Tensor, shape: tuple[int, ...] | None = None) -> Tensor:
        """Decode indices (B, h, w), or flat ones of that shape. Raises ValueError where they do not fit it."""
        return self.decode(self.quantize.lookup(self.quantize.inward(indices, shape)))


class VQVAE2(VQNetwork):
    """Encode and decode images with two codebooks: top, at 1/8 of the size, and bottom, at 1/4, given the top.

    Codes and indices are pairs (top, bottom); the loss is the sum over both levels, the perplexity their mean.

    Args: as `VqVae`.

    Raises: ValueError: options are out of range or do not fit each other.
    """

    factor = 8

    @checked
    def __init__(self, in_channels: PositiveInt = 3, num_hiddens: PositiveInt = 128, num_res_hiddens: PositiveInt = 64,
                 num_res_blocks: NonNegativeInt = 2, n_embed: PositiveInt = 512, embed_dim: PositiveInt = 64,
                 beta: NonNegativeFloat = 0.25, decay: ProperFraction = 0.99, restart_below: ProperFraction = 0.0):
        super().__init__()
        require(num_hiddens % 2 == 0, f"num_hiddens must be even, got {num_hiddens}")
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
        """Weight of the last layer."""
        return self.decoder[-1].weight

    def encode(self, images: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor, tuple]:
        """Encode images (B, C, H, W) to codes, loss and (perplexity, None, indices).

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
        """Decode top (B, embed_dim, h, w) and bottom (B, embed_dim, 2*h, 2*w) to images (B, C, 8*h, 8*w)."""
        top, bottom = codes
        return self.decoder(torch.cat((self.upsample_top(top), bottom), dim=1))

    def decode_code(self, indices: tuple[Tensor, Tensor]) -> Tensor:
        """Decode top (B, h, w) and bottom (B, 2*h, 2*w) indices. Raises ValueError where they do not fit."""
        books = (self.quantize_top, self.quantize_bottom)
        require(len(indices) == 2, "codes must be a pair: top (batch, rows, columns), bottom of twice the size")
        return self.decode(tuple(book.lookup(book.inward(i, None)) for book, i in zip(books, indices)))
