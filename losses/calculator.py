"""The losses of a training step of an autoencoder with codebooks and its discriminator.

The loss of the discriminator is computed only in iterations that step it, from the generator's forward pass.

Legend: B images, C channels, H W pixels; images in [-1, 1].
"""

from __future__ import annotations

from torch import Tensor, nn

from losses.vqperceptual import VQLPIPSWithDiscriminator
from runtime.ranges import PositiveInt, checked


class LossCalculator:
    """Compute the losses of generator and discriminator from one reconstruction.

    Args:
        loss: loss of both networks; it owns the discriminator and defines when that begins to train.
        last_layer: weight of the last layer of the bare autoencoder.
        disc_every: the discriminator is stepped in iterations that are multiples of it.
    """

    @checked
    def __init__(self, loss: VQLPIPSWithDiscriminator, last_layer: nn.Parameter, disc_every: PositiveInt = 3):
        self.loss, self.last_layer, self.disc_every = loss, last_layer, disc_every

    def discriminator_due(self, step: int) -> bool:
        """Tell whether an iteration steps the discriminator."""
        early = "early_discriminator" in self.loss.legacy
        return step % self.disc_every == 0 and (early or self.loss.has_discriminator(step))

    def compute_total_loss(self, images: Tensor, images_recon: Tensor, vq_loss: Tensor, step: int,
                           optimizer_idx: int = 0) -> dict[str, Tensor]:
        """Return the losses of one network and their terms.

        Args:
            images, images_recon: (B,C,H,W) in [-1, 1].
            vq_loss: loss of the codebook.
            step: iteration, from 1.
            optimizer_idx: 0: the autoencoder; 1: the discriminator.
        Returns:
            total_loss: loss of that network. gan_loss: loss of the discriminator, without
            gradient for the autoencoder; 0 where the discriminator is not due. All other entries are terms without
            gradient.
        """
        if optimizer_idx == 1:
            gan_loss, terms = self._gan_loss(images, images_recon, step)
            return {"total_loss": gan_loss, "gan_loss": gan_loss, **terms}
        total, log = self.loss.generator_loss(vq_loss, images, images_recon, step, self.last_layer)
        names = ["rec_loss", "quant_loss"]
        names += ["p_loss"] if self.loss.perceptual_loss is not None else []
        names += ["g_loss", "d_weight"] if self.loss.has_discriminator(step) else []
        terms, gan_loss = {name: log[f"train/{name}"] for name in names}, total.new_zeros(())
        if self.discriminator_due(step):
            gan_loss, more = self._gan_loss(images, images_recon, step)
            terms |= more
        return {"total_loss": total, "gan_loss": gan_loss, **terms}

    def _gan_loss(self, images: Tensor, images_recon: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        loss, log = self.loss.discriminator_loss(images, images_recon, step)
        return loss, {"D_loss": loss.detach(), "D_real": log["train/logits_real"], "D_fake": log["train/logits_fake"]}
