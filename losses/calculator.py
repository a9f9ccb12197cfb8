"""What one training step of an autoencoder with codebooks minimises, and the discriminator's own update.

Source: the `LossCalculator` of seed 003, whose calls these are. Different here: the discriminator's loss is computed
only in iterations in which it is stepped, from the one forward pass of the generator.

Legend: B images, C channels, H W pixels; images in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Callable
from operator import methodcaller

import torch
from torch import Tensor, nn

from losses.vqperceptual import VQLPIPSWithDiscriminator


class LossCalculator:
    """Both players' losses from one reconstruction, and the discriminator's step every few iterations.

    Args:
        loss: of both players; it owns the discriminator and says from when on that takes part.
        optimizer: of the discriminator.
        last_layer: weight that makes the reconstruction's pixels, of the bare network.
        disc_every: the discriminator is stepped in iterations that are multiples of this.
        backward, advance: how gradients are taken and an optimizer steps; a model gives its own, which know of half
            precision and clipping.
    Raises:
        ValueError: disc_every is below 1.
    """

    def __init__(self, loss: VQLPIPSWithDiscriminator, optimizer: torch.optim.Optimizer, last_layer: nn.Parameter,
                 disc_every: int = 3, backward: Callable[[Tensor], None] = Tensor.backward,
                 advance: Callable[[torch.optim.Optimizer], None] = methodcaller("step")):
        if disc_every < 1:
            raise ValueError(f"disc_every must be 1 or more, got {disc_every}")
        self.loss, self.optimizer, self.last_layer, self.disc_every = loss, optimizer, last_layer, disc_every
        self.backward, self.advance = backward, advance

    def discriminator_due(self, step: int) -> bool:
        """Whether the discriminator is stepped in this iteration."""
        return step % self.disc_every == 0 and self.loss.has_discriminator(step)

    def compute_total_loss(self, images: Tensor, images_recon: Tensor, vq_loss: Tensor, step: int,
                           optimizer_idx: int = 0) -> dict[str, Tensor]:
        """Losses of one player, and their terms.

        Args:
            images, images_recon: (B,C,H,W); vq_loss: of the codebook.
            step: iteration, from 1.
            optimizer_idx: 0: the autoencoder; 1: the discriminator.
        Returns:
            total_loss: what that player minimises. gan_loss: the discriminator's, for `step_discriminator`, of which
            no gradient reaches the autoencoder; with optimizer_idx 0 a constant 0 where none is due. Besides them the
            terms, without gradient, of what takes part.
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

    def step_discriminator(self, gan_loss: Tensor, step: int) -> None:
        """One step of the discriminator by its loss, in iterations in which it is due."""
        if self.discriminator_due(step):
            self.optimizer.zero_grad(set_to_none=True)
            self.backward(gan_loss)
            self.advance(self.optimizer)
