"""VQGAN's loss: pixels, perception and the codebook against a discriminator that joins in later.

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
from runtime.distributed import all_reduce_mean
from runtime.ranges import NonNegativeFloat, NonNegativeInt, PositiveInt

LEGACY = {
    "early_discriminator": "the discriminator and its adaptive weight are computed, times 0, before disc_start",
    "shared_generator_pass": "the generator's pass leaves gradients in the discriminator and moves its statistics",
    "ignored_pixelloss_weight": "pixelloss_weight has no effect",
    "perceptual_dropout": "LPIPS drops half of its features in training mode",
}
Log = dict[str, Tensor]


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Logits of real images should be above 1, of fake ones below -1."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def vanilla_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Cross entropy of real against fake."""
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


class VQLPIPSWithDiscriminator(nn.Module):
    """The loss of both players; it owns the discriminator and the perceptual network.

    Args:
        disc_start: iteration from which the discriminator takes part.
        codebook_weight: factor of the codebook's loss.
        pixelloss_weight: factor of the mean difference in pixels.
        pixelloss: difference in pixels, absolute ("l1") or squared ("l2").
        disc_num_layers: layers of stride 2 in the discriminator; more see larger patches.
        disc_in_channels: channels that the discriminator takes, with those of a condition.
        disc_ndf: width of the discriminator's first layer.
        use_actnorm: ActNorm instead of batch norm in the discriminator.
        disc_factor: factor of both adversarial losses; 0: no discriminator.
        disc_weight: factor of the generator's adversarial loss, besides the adaptive weight.
        perceptual_weight: factor of LPIPS; 0: its files are not needed.
        disc_conditional: show the discriminator the condition `cond`, too.
        disc_loss: adversarial loss, "hinge" or "vanilla" (cross-entropy).
        vgg_path: file of VGG16's weights for LPIPS, as torchvision publishes it.
        lpips_path: file of the five linear layers' weights of LPIPS.
        legacy: mistakes of the original to repeat, names of LEGACY.

    Raises:
        ValueError: an option is impossible. FileNotFoundError: LPIPS's weights are missing; says where to get them.

    Source: equation 7 for the adaptive weight. What differs, unless legacy says so: see LEGACY.
    """

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
        if disc_loss not in ("hinge", "vanilla"):
            raise ValueError(f"disc_loss must be hinge or vanilla, got {disc_loss}")
        weights = {"codebook_weight": codebook_weight, "pixelloss_weight": pixelloss_weight,
                   "disc_factor": disc_factor, "disc_weight": disc_weight, "perceptual_weight": perceptual_weight}
        for name, weight in weights.items():
            if weight < 0:
                raise ValueError(f"{name} must not be negative, got {weight}")
        self.disc_start, self.disc_factor, self.disc_weight = disc_start, disc_factor, disc_weight
        self.codebook_weight, self.perceptual_weight = codebook_weight, perceptual_weight
        self.pixelloss_weight = 1.0 if "ignored_pixelloss_weight" in legacy else pixelloss_weight
        self.pixelloss = {"l1": F.l1_loss, "l2": F.mse_loss}[pixelloss]
        self.disc_conditional, self.legacy = disc_conditional, frozenset(legacy)
        self.compare = {"hinge": hinge_loss, "vanilla": vanilla_loss}[disc_loss]
        self.perceptual_loss = None
        if perceptual_weight:
            self.perceptual_loss = LPIPS(vgg_path, lpips_path, dropout="perceptual_dropout" in legacy)
        self.discriminator = NLayerDiscriminator(disc_in_channels, disc_ndf, disc_num_layers, use_actnorm)
        self.min_size = self.discriminator.min_size

    def has_discriminator(self, global_step: int) -> bool:
        """Whether the discriminator takes part in this iteration; if not, there is nothing to optimize in it."""
        return self.disc_factor > 0 and global_step >= self.disc_start

    def forward(self, codebook_loss: Tensor, inputs: Tensor, reconstructions: Tensor, optimizer_idx: int,
                global_step: int, last_layer: Tensor | None = None, cond: Tensor | None = None,
                split: str = "train") -> tuple[Tensor, Log]:
        """generator_loss for optimizer_idx 0, discriminator_loss for 1, with taming's arguments."""
        if optimizer_idx == 0:
            return self.generator_loss(codebook_loss, inputs, reconstructions, global_step, last_layer, cond, split)
        return self.discriminator_loss(inputs, reconstructions, global_step, cond, split)

    def generator_loss(self, codebook_loss: Tensor, inputs: Tensor, reconstructions: Tensor, global_step: int,
                       last_layer: Tensor | None = None, cond: Tensor | None = None,
                       split: str = "train") -> tuple[Tensor, Log]:
        """What the autoencoder minimises.

        Args:
            codebook_loss: of any shape; its mean counts.
            inputs, reconstructions: (B, C, H, W) in [-1, 1].
            global_step: iteration, counted in the generator's steps.
            last_layer: weight that makes the reconstruction's pixels, of the bare network.
            cond: (B, C', H, W), what the discriminator sees besides, with disc_conditional.
            split: prefix of the log's keys.

        Returns:
            loss, and its terms, without gradient. rec_loss includes the perceptual term.

        Raises:
            ValueError: images differ in shape or are too small for the discriminator; cond is missing or unused.
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
            adversarial = self._fooling(reconstructions, cond)
            weight = self.disc_weight * adaptive_weight(nll, adversarial, last_layer)
            loss = loss + weight * factor * adversarial
        terms = {"total_loss": loss, "quant_loss": quant, "nll_loss": nll, "rec_loss": nll,
                 "p_loss": perceptual.mean(), "d_weight": weight, "disc_factor": nll.new_full((), factor),
                 "g_loss": adversarial}
        return loss, {f"{split}/{name}": term.detach() for name, term in terms.items()}

    def discriminator_loss(self, inputs: Tensor, reconstructions: Tensor, global_step: int,
                           cond: Tensor | None = None, split: str = "train") -> tuple[Tensor, Log]:
        """What the discriminator minimises. Args, Returns, Raises: as generator_loss.

        Reconstructions are detached here: those of the generator's own pass will do. Before disc_start the loss
        is a constant 0; has_discriminator tells beforehand.
        """
        self._check(inputs, reconstructions, cond)
        loss = real = fake = inputs.new_zeros(())
        if self.has_discriminator(global_step) or "early_discriminator" in self.legacy:
            # one after the other: each has statistics of its own in the batch norm
            real, fake = (self.discriminator(_join(x.detach(), cond)) for x in (inputs, reconstructions))
            loss = (self.disc_factor if global_step >= self.disc_start else 0.0) * self.compare(real, fake)
        terms = {"disc_loss": loss, "logits_real": real.mean(), "logits_fake": fake.mean()}
        return loss, {f"{split}/{name}": term.detach() for name, term in terms.items()}

    def _fooling(self, reconstructions: Tensor, cond: Tensor | None) -> Tensor:
        """Minus the mean logit. Its gradient at the pixels is taken at once and then stands in for it: the adaptive
        weight and the step both need it, and to go back through the discriminator once is enough."""
        if "shared_generator_pass" in self.legacy or not (torch.is_grad_enabled() and reconstructions.requires_grad):
            return -self._judge(reconstructions, cond).mean()
        pixels = reconstructions.detach().requires_grad_()
        loss = -self._judge(pixels, cond).mean()
        (gradient,) = torch.autograd.grad(loss, pixels)
        return loss.detach() + ((reconstructions - pixels.detach()) * gradient).sum()  # the sum is 0, its gradient not

    def _judge(self, images: Tensor, cond: Tensor | None) -> Tensor:
        """Logits for the generator's loss; the discriminator neither learns from it nor moves its statistics."""
        if "shared_generator_pass" in self.legacy:
            return self.discriminator(_join(images, cond))
        bare = getattr(self.discriminator, "module", self.discriminator)  # below DistributedDataParallel
        copies = {name: tensor.clone() for name, tensor in bare.state_dict().items()}  # detached
        return functional_call(bare, copies, (_join(images, cond),))

    def _check(self, inputs: Tensor, reconstructions: Tensor, cond: Tensor | None) -> None:
        if inputs.shape != reconstructions.shape:
            raise ValueError(f"reconstructions of {tuple(reconstructions.shape)} don't match inputs of "
                             f"{tuple(inputs.shape)}")
        if min(inputs.shape[-2:]) < self.min_size and self.disc_factor > 0:  # said at once, not at disc_start
            raise ValueError(f"images must have {self.min_size} x {self.min_size} pixels or more for the "
                             f"discriminator, got {tuple(inputs.shape[-2:])}; lower disc_num_layers")
        if (cond is not None) != self.disc_conditional:
            raise ValueError("disc_conditional needs cond" if cond is None else "cond needs disc_conditional")


def adaptive_weight(nll: Tensor, adversarial: Tensor, last_layer: Tensor | None) -> Tensor:
    """How many times larger the last layer's gradient by nll is than that by the adversarial loss; scalar, detached.

    0 where there is no gradient, in validation. Source: equation 7.
    """
    if not torch.is_grad_enabled():
        return nll.new_zeros(())
    if last_layer is None:
        raise ValueError("the adaptive weight needs last_layer, the weight that makes the reconstruction's pixels")
    # times 2**10 and back: changes no bit in float32, and keeps float16 from rounding gradients to 0
    by_nll, by_adversary = (
        all_reduce_mean(torch.autograd.grad(1024 * loss, last_layer, retain_graph=True)[0]).norm() / 1024
        for loss in (nll, adversarial))
    return (by_nll / (by_adversary + 1e-4)).clamp(0.0, 1e4).detach()


def _join(images: Tensor, cond: Tensor | None) -> Tensor:
    return images if cond is None else torch.cat((images, cond), dim=1)
