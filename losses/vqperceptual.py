"""The loss of VQGAN: pixels, perception, codebook, and a discriminator that starts later.

Source: Esser, Rombach & Ommer 2021, arXiv:2012.09841, equations 5 to 7; VQLPIPSWithDiscriminator of
CompVis/taming-transformers.

Legend: B images, C channels, H W pixels; images in [-1, 1]. Every loss is a scalar.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from losses.lpips import LPIPS
from models.network_discriminator import NLayerDiscriminator
from runtime.ranges import NonNegativeFloat, NonNegativeInt, PositiveInt, checked

LEGACY = {
    "early_discriminator": "discriminator (which steps) and adaptive weight are computed, times 0, before disc_start",
    "shared_generator_pass": "the generator's pass adds gradients to the discriminator and updates its statistics",
    "ignored_pixelloss_weight": "pixelloss_weight has no effect",
    "perceptual_dropout": "LPIPS drops half of its features in training mode",
}
Log = dict[str, Tensor]


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Penalize logits of real images below 1 and of fake images above -1."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def vanilla_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Return the cross-entropy of real and fake images."""
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


class VQLPIPSWithDiscriminator(nn.Module):
    """Compute the losses of autoencoder and discriminator; it owns the discriminator, if any, and LPIPS.

    Args:
        disc_start: first iteration with the discriminator.
        codebook_weight: factor of the codebook loss.
        pixelloss_weight: factor of the mean pixel difference.
        pixelloss: pixel difference, absolute ("l1") or squared ("l2").
        disc_num_layers: number of layers of stride 2 in the discriminator; more see larger patches.
        disc_in_channels: input channels of the discriminator, with those of a condition.
        disc_ndf: width of the discriminator's first layer.
        use_actnorm: use ActNorm instead of batch norm in the discriminator.
        disc_factor: factor of both adversarial losses; 0: no discriminator.
        disc_weight: further factor of the adversarial loss of the autoencoder, besides the adaptive weight.
        perceptual_weight: factor of LPIPS; 0: no LPIPS, its files are not needed.
        disc_conditional: the discriminator also takes the condition `cond`.
        disc_loss: adversarial loss, "hinge" or "vanilla" (cross-entropy).
        vgg_path: file of VGG16 weights for LPIPS, as published by torchvision.
        lpips_path: file of the weights of the five linear layers of LPIPS.
        legacy: errors of the original to reproduce, names of LEGACY.

    Raises:
        ValueError: an option is out of range or unknown.
        FileNotFoundError: weights of LPIPS are missing.

    Source: equation 7 for the adaptive weight. Differs by the errors in LEGACY, unless `legacy` names them.
    """

    @checked
    def __init__(self, disc_start: NonNegativeInt, codebook_weight: NonNegativeFloat = 1.0,
                 pixelloss_weight: NonNegativeFloat = 1.0, disc_num_layers: PositiveInt = 3,
                 disc_in_channels: PositiveInt = 3, disc_factor: NonNegativeFloat = 1.0,
                 disc_weight: NonNegativeFloat = 1.0, perceptual_weight: NonNegativeFloat = 1.0,
                 use_actnorm: bool = False, disc_conditional: bool = False, disc_ndf: PositiveInt = 64,
                 disc_loss: Literal["hinge", "vanilla"] = "hinge", pixelloss: Literal["l1", "l2"] = "l1",
                 vgg_path: str = "weights/vgg16-397923af.pth", lpips_path: str = "weights/lpips_vgg.pth",
                 legacy: Sequence[str] = ()):
        super().__init__()
        if unknown := set(legacy) - LEGACY.keys():
            raise ValueError(f"legacy: unknown {', '.join(sorted(unknown))}; valid: {', '.join(LEGACY)}")
        self.disc_start, self.disc_factor, self.disc_weight = disc_start, disc_factor, disc_weight
        self.codebook_weight, self.perceptual_weight = codebook_weight, perceptual_weight
        self.pixelloss_weight = 1.0 if "ignored_pixelloss_weight" in legacy else pixelloss_weight
        self.pixelloss = {"l1": F.l1_loss, "l2": F.mse_loss}[pixelloss]
        self.disc_conditional, self.legacy = disc_conditional, frozenset(legacy)
        self.compare = {"hinge": hinge_loss, "vanilla": vanilla_loss}[disc_loss]
        self.perceptual_loss = None
        if perceptual_weight:
            self.perceptual_loss = LPIPS(vgg_path, lpips_path, dropout="perceptual_dropout" in legacy)
        self.discriminator, self.min_size = None, 1
        if disc_factor or legacy:
            self.discriminator = NLayerDiscriminator(disc_in_channels, disc_ndf, disc_num_layers, use_actnorm)
            self.min_size = self.discriminator.min_size

    def has_discriminator(self, global_step: int) -> bool:
        """Tell whether an iteration trains with the discriminator."""
        return self.disc_factor > 0 and global_step >= self.disc_start

    def forward(self, codebook_loss: Tensor, inputs: Tensor, reconstructions: Tensor, optimizer_idx: int,
                global_step: int, last_layer: Tensor | None = None, cond: Tensor | None = None,
                split: str = "train") -> tuple[Tensor, Log]:
        """Return generator_loss for optimizer_idx 0, discriminator_loss for 1, with the arguments of taming."""
        if optimizer_idx == 0:
            return self.generator_loss(codebook_loss, inputs, reconstructions, global_step, last_layer, cond, split)
        return self.discriminator_loss(inputs, reconstructions, global_step, cond, split)

    def generator_loss(self, codebook_loss: Tensor, inputs: Tensor, reconstructions: Tensor, global_step: int,
                       last_layer: Tensor | None = None, cond: Tensor | None = None,
                       split: str = "train") -> tuple[Tensor, Log]:
        """Return the loss of the autoencoder.

        Args:
            codebook_loss: of any shape; its mean is used.
            inputs, reconstructions: (B, C, H, W) in [-1, 1].
            global_step: iteration, counted in steps of the autoencoder.
            last_layer: weight of the last layer of the bare autoencoder.
            cond: (B, C', H, W), condition of the discriminator, with disc_conditional.
            split: prefix of the keys of the terms.

        Returns: loss; its terms without gradient, of which rec_loss includes the perceptual term.

        Raises: ValueError: images differ in shape or are too small for the discriminator; cond is missing or unused.
        """
        self._check(inputs, reconstructions, cond)
        pixel = self.pixelloss(reconstructions, inputs, reduction="none")
        perceptual = pixel.new_zeros(1)
        if self.perceptual_loss is not None:
            perceptual = self.perceptual_loss(inputs, reconstructions)  # (B, 1, 1, 1)
        nll = (self.pixelloss_weight * pixel + self.perceptual_weight * perceptual).mean()
        quant = codebook_loss.mean()
        loss = nll + self.codebook_weight * quant
        factor = self.disc_factor if self.has_discriminator(global_step) else 0.0
        adversarial, weight = nll.new_zeros(()), nll.new_zeros(())
        if factor or "early_discriminator" in self.legacy:
            adversarial = self._adversarial(reconstructions, cond)
            weight = self.disc_weight * adaptive_weight(nll, adversarial, last_layer)
            loss = loss + weight * factor * adversarial
        terms = {"total_loss": loss, "quant_loss": quant, "nll_loss": nll, "rec_loss": nll,
                 "p_loss": perceptual.mean(), "d_weight": weight, "disc_factor": nll.new_full((), factor),
                 "g_loss": adversarial}
        return loss, {f"{split}/{name}": term.detach() for name, term in terms.items()}

    def discriminator_loss(self, inputs: Tensor, reconstructions: Tensor, global_step: int,
                           cond: Tensor | None = None, split: str = "train") -> tuple[Tensor, Log]:
        """Return the loss of the discriminator. Args, Returns, Raises: as generator_loss.

        Reconstructions are detached here, so those of the autoencoder's pass serve. Before disc_start the loss is 0.
        """
        self._check(inputs, reconstructions, cond)
        loss = real = fake = inputs.new_zeros(())
        if self.has_discriminator(global_step) or "early_discriminator" in self.legacy:
            # two passes: batch norm computes separate statistics
            real, fake = (self.discriminator(_join(x.detach(), cond)) for x in (inputs, reconstructions))
            loss = (self.disc_factor if global_step >= self.disc_start else 0.0) * self.compare(real, fake)
        terms = {"disc_loss": loss, "logits_real": real.mean(), "logits_fake": fake.mean()}
        return loss, {f"{split}/{name}": term.detach() for name, term in terms.items()}

    def _adversarial(self, reconstructions: Tensor, cond: Tensor | None) -> Tensor:
        """Return minus the mean logit of reconstructions.

        Its gradient at the pixels is computed at once and then replaces the discriminator in the graph: the adaptive
        weight and the step both need it, and one backward pass through the discriminator suffices.
        """
        if "shared_generator_pass" in self.legacy or not (torch.is_grad_enabled() and reconstructions.requires_grad):
            return -self._judge(reconstructions, cond).mean()
        pixels = reconstructions.detach().requires_grad_()
        loss = -self._judge(pixels, cond).mean()
        (gradient,) = torch.autograd.grad(loss, pixels)
        return loss.detach() + ((reconstructions - pixels.detach()) * gradient).sum()  # the sum is 0, its gradient not

    def _judge(self, images: Tensor, cond: Tensor | None) -> Tensor:
        """Return logits without gradients of the discriminator and without an update of its statistics."""
        if "shared_generator_pass" in self.legacy:
            return self.discriminator(_join(images, cond))
        copies = {name: tensor.clone() for name, tensor in self.discriminator.state_dict().items()}  # detached
        return functional_call(self.discriminator, copies, (_join(images, cond),))

    def _check(self, inputs: Tensor, reconstructions: Tensor, cond: Tensor | None) -> None:
        """Raise ValueError for images or a condition that do not fit."""
        if inputs.shape != reconstructions.shape:
            raise ValueError(f"reconstructions of {tuple(reconstructions.shape)} don't match inputs of "
                             f"{tuple(inputs.shape)}")
        if min(inputs.shape[-2:]) < self.min_size and self.disc_factor > 0:  # an error at once, not at disc_start
            raise ValueError(f"images must have {self.min_size} x {self.min_size} pixels or more for the "
                             f"discriminator, got {tuple(inputs.shape[-2:])}; lower disc_num_layers")
        if (cond is not None) != self.disc_conditional:
            raise ValueError("disc_conditional needs cond" if cond is None else "cond needs disc_conditional")


def adaptive_weight(nll: Tensor, adversarial: Tensor, last_layer: Tensor | None) -> Tensor:
    """Return the ratio of the gradients of nll and adversarial loss at the last layer; scalar, detached.

    Without gradients, as in validation, it is 0. Source: equation 7.
    """
    if not torch.is_grad_enabled():
        return nll.new_zeros(())
    if last_layer is None:
        raise ValueError("the adaptive weight needs last_layer, the weight of the last layer of the autoencoder")
    # the factor 2**10 changes no bit in float32, and avoids gradients of 0 in float16
    by_nll, by_adversary = (
        torch.autograd.grad(1024 * loss, last_layer, retain_graph=True)[0].norm() / 1024
        for loss in (nll, adversarial))
    return (by_nll / (by_adversary + 1e-4)).clamp(0.0, 1e4).detach()


def _join(images: Tensor, cond: Tensor | None) -> Tensor:
    """Concatenate images and their condition."""
    return images if cond is None else torch.cat((images, cond), dim=1)
