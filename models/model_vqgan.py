"""The recipe of VQGAN, VQ-VAE and VQ-VAE-2: an autoencoder with codebooks, later joined by a discriminator.

Source: Esser, Rombach & Ommer 2021, arXiv:2012.09841; the training flow of CompVis/taming-transformers. Differs: one
forward pass of the autoencoder serves both updates. Images are in [-1, 1].

Legend: B batch, D pictures of a sample, C channels, H W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import checkpoint
from data import DATASETS
from data.frames import read_frame
from data.images import images_by_name
from data.synthetic import as_channels
from losses.calculator import LossCalculator
from losses.lpips import LPIPS
from losses.vqperceptual import VQLPIPSWithDiscriminator
from metrics.vqgan import code_hits, codebook_use, image_metrics
from models import NETWORKS
from models.model_plain import ModelPlain
from models.network_discriminator import ActNorm
from models.network_vqgan import DDConfig, GumbelQuantize, Indices, VQModel, VQNetwork
from options import OptionError, check, resolve, schema_of
from runtime import distributed
from runtime.ranges import NonNegativeFloat, PositiveFloat, PositiveInt, ProperFraction
from storage.foreign import split_taming
from storage.system import total_memory


class ModelVQGAN(ModelPlain):
    """Train an autoencoder G and a discriminator D, each with its own optimizer; D steps every `disc_every` iterations.

    VQModel, EMAVQ and GumbelVQ compare pixels by absolute difference, VqVae and VQVAE2 by squared difference;
    `train.lossconfig.pixelloss` overrides it. A codebook of moving averages has no optimizer; it is updated once per
    iteration.
    """

    batch = ("images",)

    @dataclass
    class TrainOptions(ModelPlain.StepOptions):
        lossconfig: dict = field(default_factory=dict)  # keys of VQLPIPSWithDiscriminator; disc_start is required
        # Absolute (true) or squared (false) pixel difference; null: absolute for VQModel, EMAVQ and GumbelVQ only.
        use_taming_loss: bool | None = None
        disc_every: PositiveInt = 3  # iterations between two steps of the discriminator
        temperature_end: PositiveFloat = 1.0  # last temperature of GumbelVQ, reached from 1 by half a cosine
        # Learning rate of G; taming's is 4.5e-6 times the number of images in a batch.
        G_optimizer_lr: NonNegativeFloat = 1e-4
        G_optimizer_betas: tuple[ProperFraction, ProperFraction] = (0.5, 0.9)
        D_optimizer_lr: NonNegativeFloat | None = None  # learning rate of the discriminator; null: that of G
        D_optimizer_clipgrad: PositiveFloat | None = None  # largest gradient norm of D; null: no clipping

    def __init__(self, opt: Mapping[str, Any]):
        check_codebook(opt)
        super().__init__(opt)
        self.baseline_name = "mean_colour"
        bare, t = self.get_bare_model(self.netG), self.opt_train
        if not isinstance(bare, VQNetwork):
            raise OptionError(f"{opt['opt_path']}: netG.net_type: {opt['netG']['net_type']} has no codebook; valid: "
                              "vqgan, emavq, gumbelvq, vqvae, vqvae2")
        self.taming = isinstance(bare, VQModel) if t["use_taming_loss"] is None else t["use_taming_loss"]
        self.codebooks = [module for module in bare.modules() if isinstance(module, Indices)]
        self.loss = self.build_vq_loss()
        for network in (self.netG, self.netE, self.loss.discriminator):
            if network is not None:  # a step takes 20 to 30 % less time
                network.to(memory_format=torch.channels_last)
        self.netD, self.act_norms = self.loss.discriminator, []  # None: train.lossconfig.disc_factor is 0
        if self.netD is not None:
            self.networks["D"] = self.netD
            self.act_norms = [module for module in self.netD.modules() if isinstance(module, ActNorm)]
        self.lpips: LPIPS | None = self.loss.perceptual_loss
        self.images = self.restored = None  # (B*D,C,H,W)
        self.indices: list[Tensor] = []  # indices of each codebook
        self.hits: list[Tensor] = []  # how often the last micro-batch used each code of each codebook
        self.discriminator_log: dict[str, Tensor] = {}  # terms of its last step, shown until the next
        self.check_sizes()

    def build_vq_loss(self) -> VQLPIPSWithDiscriminator:
        """Build the loss of both networks from `train.lossconfig`. Raises OptionError, also for missing weights."""
        where, given = f"{self.opt['opt_path']}: train.lossconfig", self.opt_train["lossconfig"]
        schema = schema_of(VQLPIPSWithDiscriminator)
        config = check(given, schema, "train.lossconfig", lambda _: self.opt["opt_path"], [])
        if config.get("disc_conditional"):
            raise OptionError(f"{where}.disc_conditional: this recipe has no condition; set it to false")
        usual = {"type": "vqperceptual", "disc_in_channels": self.get_bare_model(self.netG).in_channels,
                 "pixelloss": "l1" if self.taming else "l2"}
        return self.build_loss(usual | config, "type", "train.lossconfig")

    def define_network(self, label: str) -> nn.Module:
        """Build network `label`, after a check of the keys of its `ddconfig`."""
        section, where = self.opt[f"net{label}"], self.opt["opt_path"]
        if "ddconfig" in section:
            check(section["ddconfig"], schema_of(DDConfig), f"net{label}.ddconfig", lambda _: where, [])
        return super().define_network(label)

    def check_sizes(self) -> None:
        """Raise OptionError where channels or sides of the images do not fit both networks."""
        where, bare = self.opt["opt_path"], self.get_bare_model(self.netG)
        channels = {"n_channels": self.opt["n_channels"]}
        if self.netD is not None:
            channels["train.lossconfig.disc_in_channels"] = self.netD.main[0].in_channels
        if "ddconfig" in self.opt["netG"]:
            channels["netG.ddconfig.out_ch"] = self.opt["netG"]["ddconfig"]["out_ch"]
        for key, count in channels.items():
            if count != bare.in_channels:
                raise OptionError(f"{where}: netG takes {bare.in_channels} channels, but {key} is {count}; make them "
                                  "equal")
        for name, section in self.opt["datasets"].items():
            schema = schema_of(resolve(DATASETS, section["dataset_type"], where))
            side = section.get("size", schema.get("size", (None, None))[1])
            if isinstance(side, int):
                self.check_side(side, f"{where}: datasets.{name}.size")

    def check_side(self, side: int, where: str) -> None:
        """Raise OptionError where images of a side in pixels do not fit both networks."""
        factor, least = self.get_bare_model(self.netG).factor, self.loss.min_size
        if side % factor or side < least:
            raise OptionError(f"{where}: {side} must be a multiple of {factor} for this network, and at least {least} "
                              "for the discriminator (less with fewer train.lossconfig.disc_num_layers)")

    # ------------------------------------------------ before training

    def init_train(self, parts: Mapping[str, Any] | None = None, source: str = "checkpoint") -> list[str]:
        """Prepare both networks for training, and LPIPS for validation."""
        reports = super().init_train(parts, source)
        self.loss.train()
        if self.opt_train["compile"]:  # the adaptive weight takes three gradients of one forward pass
            torch._functorch.config.donated_buffer = False
        config = schema_of(VQLPIPSWithDiscriminator)
        files = [self.opt_train["lossconfig"].get(key, config[key][1]) for key in ("vgg_path", "lpips_path")]
        if self.lpips is None and self.opt["n_channels"] == 3 and all(Path(f).expanduser().is_file() for f in files):
            self.lpips = LPIPS(*files).to(self.device)  # a metric, whether or not the loss has it
        return reports

    def load(self, parts: Mapping[str, Any] | None = None, source: str = "checkpoint") -> list[str]:
        """Load weights as ModelPlain does, and the discriminator that a file of taming's holds."""
        reports, path = super().load(parts, source), self.opt["path"]
        if self.netD is None:
            return reports
        path = path["init_from"] if path["init_from"] not in (None, "none") else path["pretrained_netG"]
        weights = {}
        if parts and "D" not in parts:
            weights = parts["G"]
        elif not parts and path:
            (weights, _), source = checkpoint.read_weights(path), path
        _, found = split_taming(weights)
        own, source = self.netD.state_dict(), f"{source}: loss.discriminator.*"
        if found and {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in own.items()}:
            reports.append(self.load_weights(self.netD, found, True, source))
        elif found:
            reports.append(f"{source} is of another shape: the discriminator starts over")
        return reports

    def load_weights(self, network: nn.Module, weights: Mapping[str, Tensor], strict: bool, source: str) -> str:
        """Load weights as ModelBase does, without the loss that a file of taming's holds."""
        return super().load_weights(network, split_taming(weights)[0], strict, source)

    def define_loss(self) -> None:
        """Build the calculator of the losses of G and D."""
        self.calculator = LossCalculator(self.loss, self.get_bare_model(self.netG).last_layer,
                                         self.opt_train["disc_every"])

    def define_optimizer(self) -> None:
        """Build the optimizers of G and D."""
        super().define_optimizer()
        t = self.opt_train
        rate = t["G_optimizer_lr"] if t["D_optimizer_lr"] is None else t["D_optimizer_lr"]
        if self.netD is not None:
            self.optimizers["optimizerD"] = self.build_optimizer(self.netD.parameters(), rate)

    def define_scheduler(self) -> None:
        """Build the schedule that G and D share."""
        super().define_scheduler()
        if self.netD is not None:
            self.schedules["optimizerD"] = self.schedules["optimizerG"]

    # ------------------------------------------------ training

    def feed_data(self, data: Mapping[str, Any], need_H: bool = True) -> None:
        """Move a batch to the device: pictures (B,[D,]H,W,C) uint8, or (B,[D,]C,H,W) in [0,1]."""
        pictures = self.move(data["H" if "H" in data else "L"])
        pictures = pictures.flatten(0, -4)  # (B,D,...) -> (B*D,...)
        if pictures.dtype == torch.uint8:
            pictures = pictures.permute(0, 3, 1, 2).float() / 255
        self.images = (pictures * 2 - 1).contiguous(memory_format=torch.channels_last)

    def begin_step(self, step: int) -> None:
        """Check the images, drop counts of a skipped step, and set the temperature of Gumbel codebooks."""
        self.get_bare_model(self.netG).drop_counts()
        try:
            self.get_bare_model(self.netG).check_images(self.images)
        except ValueError as error:
            raise OptionError(f"{self.opt['opt_path']}: datasets.train: {error}") from None
        self.lower_temperature(step)

    def losses(self, step: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Compute the loss of G, and in iterations that step it that of D."""
        with self.autocast():
            vq_loss, restored, _, indices = self.forward_G(self.images)
        terms = self.calculator.compute_total_loss(self.images, restored.float(), vq_loss.float(), step)
        losses, gan_loss = {"optimizerG": terms.pop("total_loss")}, terms.pop("gan_loss")
        if self.calculator.discriminator_due(step):
            losses["optimizerD"] = gan_loss
        self.hits = self.hits_of(as_levels(indices))
        return losses, {"G_loss": losses["optimizerG"], **terms}

    def counts(self) -> list[Tensor]:
        """Return how often each code was used and, of codebooks of moving averages, the sums that update them."""
        return [*self.hits, *self.get_bare_model(self.netG).take_counts()]

    def finish_step(self, step: int, counts: list[Tensor]) -> None:
        """Update codebooks of moving averages, and keep terms and codebook use for the log."""
        hits, seen = counts[: len(self.hits)], counts[len(self.hits) :]
        self.get_bare_model(self.netG).update_codebook(step, seen, distributed.broadcast)
        terms = self.log_dict
        for module in self.act_norms if self.calculator.discriminator_due(step) else ():
            module.surely = True
        self.discriminator_log |= {name: terms.pop(name) for name in list(terms) if name.startswith("D_")}
        self.log_dict = {**terms, **mean_use(hits), **self.discriminator_log}

    def hits_of(self, indices: Sequence[Tensor]) -> list[Tensor]:
        """Count how often each code of each codebook occurs."""
        return [code_hits(index, book.n_embed if book.used is None else len(book.used))
                for index, book in zip(indices, self.codebooks)]

    def moving_tensors(self) -> list[Tensor]:
        """Return the buffers, and what the first batch of D sets."""
        return [*super().moving_tensors(), *(p for m in self.act_norms for p in (m.loc, m.scale))]

    def lower_temperature(self, step: int) -> None:
        """Set the temperature of Gumbel codebooks for a step."""
        done = min(step / self.opt_train["total_iter"], 1.0)
        for book in self.codebooks:
            if isinstance(book, GumbelQuantize):
                end = self.opt_train["temperature_end"]
                book.temperature = end + (1 - end) * (1 + math.cos(math.pi * done)) / 2

    def extra_state(self, finished: int) -> dict[str, Any]:
        """Return the extra state with the last loss terms of D."""
        return super().extra_state(finished) | {"discriminator_log": dict(self.discriminator_log)}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Restore the last loss terms of D."""
        super().load_extra_state(state)
        log = state.get("discriminator_log", {})
        self.discriminator_log = {name: value.to(self.device) for name, value in log.items()}

    # ------------------------------------------------ testing

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Encode and decode images, with the moving average of G if there is one.

        Args: images: (B,C,H,W) in [-1, 1], of any size; borders are repeated up to a size that the network takes.
        Returns: reconstructions (B,C,H,W) in [-1, 1]; indices of each codebook.
        """
        network = self.get_bare_model(self.netE if self.netE is not None else self.netG)
        training, (height, width) = network.training, images.shape[-2:]
        padded = F.pad(images, (0, -width % network.factor, 0, -height % network.factor), mode="replicate")
        _, restored, _, indices = network.eval()(padded)
        network.train(training)
        return restored[..., :height, :width].clamp(-1, 1), as_levels(indices)

    def infer(self, source: str, truth: str | None, wanted: Callable[[str], bool]) -> Iterator[Any]:
        """Yield the reconstruction of each picture, NAME.png, at its own size, and its codes, NAME.npz."""
        if truth:
            raise ValueError("--truth: a reconstruction is compared with its input; omit it")
        paths = images_by_name(source)
        yield 2 * len(paths)
        for name, path in paths.items():
            if wanted(f"{name}.png") or wanted(f"{name}.npz"):
                picture = as_channels(read_frame(path), self.opt["n_channels"]).to(self.device)
                self.images = picture[None].float() / 127.5 - 1
                self.test()
                yield f"{name}.png", (self.restored[0] + 1) / 2, self.metrics()
                yield f"{name}.npz", self.codes(), None

    def codes(self) -> dict[str, Tensor]:
        """Return the indices (h,w) of the last picture: "codes", or "codes_0", "codes_1", ... of several codebooks."""
        factor = self.get_bare_model(self.netG).factor
        height, width = (-(-side // factor) * factor for side in self.images.shape[-2:])
        shaped = []
        for index in self.indices:
            step = round(math.sqrt(height * width / index.numel()))
            shaped.append(index.reshape(height // step, width // step).cpu())
        return {"codes": shaped[0]} if len(shaped) == 1 else {f"codes_{i}": index for i, index in enumerate(shaped)}

    def test(self) -> None:
        """Reconstruct the batch."""
        self.restored, self.indices = self.reconstruct(self.images)

    def metrics(self) -> dict[str, float]:
        """Return PSNR, also of the baseline of one colour, codebook use, and LPIPS where its weights exist."""
        values = image_metrics((self.restored + 1) / 2, (self.images + 1) / 2)
        if self.lpips is not None:
            with torch.no_grad():
                values["lpips"] = self.lpips(self.restored, self.images).mean().item()
        return values | {name: float(value) for name, value in mean_use(self.hits_of(self.indices)).items()}

    def pictures(self) -> list[Tensor]:
        """Return each picture above its reconstruction, (C,2H,W)."""
        return [(torch.cat(pair, dim=-2) + 1) / 2 for pair in zip(self.images, self.restored)]

    def current_visuals(self, need_H: bool = True) -> dict[str, Tensor]:
        """Return the first sample by KAIR's keys: L input, E reconstruction; float in [0, 1], on the CPU."""
        return {key: ((images[0] + 1) / 2).detach().float().cpu()
                for key, images in (("L", self.images), ("E", self.restored))}


def mean_use(hits: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return the fraction of codes in use and the perplexity, means over codebooks."""
    uses = [codebook_use(one) for one in hits]
    return {name: sum(use[name] for use in uses) / len(uses) for name in uses[0]}


def as_levels(indices: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    """Return the indices of one codebook or of several as a list."""
    return [indices] if isinstance(indices, Tensor) else list(indices)


def check_codebook(opt: Mapping[str, Any]) -> None:
    """Raise OptionError where the codebook with its gradient and two moments exceeds the memory."""
    defaults = schema_of(resolve(NETWORKS, opt["netG"]["net_type"], f"{opt['opt_path']}: netG.net_type"))
    count, width = (opt["netG"].get(key, defaults.get(key, (None, 0))[1]) for key in ("n_embed", "embed_dim"))
    device = distributed.device_for(opt)
    if device.type == "cuda":
        there = torch.cuda.mem_get_info(device)[1]
    else:
        there = total_memory()
    if there and (needed := 4 * count * width * 4) > there:
        raise OptionError(f"{opt['opt_path']}: netG: a codebook of n_embed {count} x embed_dim {width} needs "
                          f"{needed / 2**30:,.0f} GiB in training, and {device} has {there / 2**30:,.0f}; lower "
                          "either")
