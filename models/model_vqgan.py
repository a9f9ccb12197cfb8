"""VQGAN, VQ-VAE and VQ-VAE-2: an autoencoder with codebooks, and a discriminator that joins in later.

Source: Esser, Rombach & Ommer 2021, arXiv:2012.09841; taming-transformers' training flow and seed 003's, of which
one forward pass of the autoencoder serves both updates here. Images are in [-1, 1].

Legend: B batch, D pictures of a sample, C channels, H W pixels.
"""

from __future__ import annotations

import math
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import checkpoint
from data import DATASETS
from data.image_files import read_picture
from data.images import images_by_name
from data.synthetic import as_channels
from losses import LOSSES
from losses.calculator import LossCalculator
from losses.lpips import LPIPS
from losses.vqperceptual import VQLPIPSWithDiscriminator
from metrics.vqgan import codebook_use, image_metrics
from models import NETWORKS
from models.model_plain import ModelPlain
from models.network_vqgan import GumbelQuantize, Indices, VQModel, VQNetwork
from options import OptionError, Section, build, check, resolve, schema_of
from runtime import distributed
from runtime.ranges import NonNegativeFloat, PositiveFloat, PositiveInt, ProperFraction

BESIDE = re.compile(r"(?:^|\.)(?:loss\.|colorize$)")  # in a file of taming's: what is not the autoencoder's
CRITIC = "loss.discriminator."  # where such a file keeps the discriminator


class ModelVQGAN(ModelPlain):
    """G the autoencoder, D the discriminator, an optimizer for each; D is stepped every `disc_every` iterations.

    Taming's models (VQModel, EMAVQ, GumbelVQ) compare pixels by absolute difference, the traditional ones (VqVae,
    VQVAE2) by squared difference; `train.lossconfig.pixelloss` chooses either. Codebooks of moving averages are in no
    optimizer; they move once an iteration.
    """

    @dataclass
    class TrainOptions(ModelPlain.StepOptions):
        lossconfig: dict = field(default_factory=dict)  # keys of VQLPIPSWithDiscriminator; disc_start is needed
        use_taming_loss: bool | None = None  # pixel differences, absolute (true) or squared; null: as the network's
        disc_every: PositiveInt = 3  # iterations from one step of the discriminator to the next
        temperature_end: PositiveFloat = 1.0  # temperature of GumbelVQ's noise at the end, from 1 by half a cosine
        # Learning rate of G; taming's is 4.5e-6 times the pictures in a batch.
        G_optimizer_lr: NonNegativeFloat = 1e-4
        G_optimizer_betas: tuple[ProperFraction, ProperFraction] = (0.5, 0.9)
        D_optimizer_lr: NonNegativeFloat | None = None  # learning rate of the discriminator; null: that of G
        D_optimizer_clipgrad: PositiveFloat | None = None  # largest norm of the discriminator's gradient; null: any

    def __init__(self, opt: Mapping[str, Any]):
        check_codebook(opt)
        super().__init__(opt)
        self.baseline_name = "mean_colour"
        bare, t = self.get_bare_model(self.netG), self.opt_train
        if not isinstance(bare, VQNetwork):
            raise OptionError(f"{opt['opt_path']}: netG.net_type: {opt['netG']['net_type']} has no codebook; valid: "
                              "vqgan, emavq, gumbelvq, vqvae, vqvae2")
        self.taming = isinstance(bare, VQModel) if t["use_taming_loss"] is None else t["use_taming_loss"]
        self.books = [module for module in bare.modules() if isinstance(module, Indices)]
        self.loss = self.build_loss().to(self.device)
        for network in (self.netG, self.netE, self.loss.discriminator):
            if network is not None:  # a step takes 20 to 30 % less time so
                network.to(memory_format=torch.channels_last)
        self.netD = self.networks["D"] = self.loss.discriminator
        self.lpips: LPIPS | None = self.loss.perceptual_loss
        self.images = self.restored = None  # (B*D,C,H,W)
        self.indices: list[Tensor] = []  # of each codebook
        self.discriminator_log: dict[str, Tensor] = {}  # terms of its last step: they are shown until the next
        self.check_sizes()

    def build_loss(self) -> VQLPIPSWithDiscriminator:
        """The loss of both players as `train.lossconfig` says. Raises OptionError, also where weights are missing."""
        where, given = f"{self.opt['opt_path']}: train.lossconfig", self.opt_train["lossconfig"]
        schema = schema_of(VQLPIPSWithDiscriminator)
        config = check(given, schema, "train.lossconfig", lambda _: self.opt["opt_path"], [])
        if config.get("disc_conditional"):
            raise OptionError(f"{where}.disc_conditional: this recipe has no condition to show; leave it false")
        usual = {"type": "vqperceptual", "disc_in_channels": self.get_bare_model(self.netG).in_channels,
                 "pixelloss": "l1" if self.taming else "l2"}
        config = Section(usual | config)
        config.where = where
        return build(LOSSES, config, "type")

    def check_sizes(self) -> None:
        """That pictures have the channels and sides that both networks can take, where the options tell."""
        where, bare = self.opt["opt_path"], self.get_bare_model(self.netG)
        channels = {"n_channels": self.opt["n_channels"], "train.lossconfig.disc_in_channels":
                    self.netD.main[0].in_channels}
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
        factor, least = self.get_bare_model(self.netG).factor, self.loss.min_size if self.loss.disc_factor else 1
        if side % factor or side < least:
            raise OptionError(f"{where}: {side} must be a multiple of {factor} for this network, and at least {least} "
                              "for the discriminator (fewer train.lossconfig.disc_num_layers, less)")

    # ------------------------------------------------ before training

    def init_train(self, parts: Mapping[str, Any] | None = None, source: str = "checkpoint") -> list[str]:
        reports = super().init_train(parts, source)
        self.loss.train()
        self.loss.discriminator = self.share(self.netD)
        self.find_lpips()
        return reports

    def find_lpips(self) -> None:
        """LPIPS for validation where its files are there, whether or not the loss has it."""
        config = schema_of(VQLPIPSWithDiscriminator)
        files = [self.opt_train["lossconfig"].get(key, config[key][1]) for key in ("vgg_path", "lpips_path")]
        if self.lpips is None and self.opt["n_channels"] == 3 and all(Path(f).expanduser().is_file() for f in files):
            self.lpips = LPIPS(*files).to(self.device)

    def load(self, parts: Mapping[str, Any] | None = None, source: str = "checkpoint") -> list[str]:
        """As ModelPlain; taming's files carry the discriminator among the weights of the autoencoder."""
        reports, path = super().load(parts, source), self.opt["path"]
        path = path["init_from"] if path["init_from"] not in (None, "none") else path["pretrained_netG"]
        weights = {}
        if parts and "D" not in parts:
            weights = parts["G"]
        elif not parts and path:
            (weights, _), source = checkpoint.read_weights(path), path
        critic = {key.rpartition(CRITIC)[2]: value for key, value in weights.items() if CRITIC in key}
        own = self.netD.state_dict()
        if critic and {k: v.shape for k, v in critic.items()} == {k: v.shape for k, v in own.items()}:
            reports.append(self.load_weights(self.netD, critic, True, f"{source}: {CRITIC}*"))
        elif critic:
            reports.append(f"{source}: {CRITIC}* is of another shape: the discriminator is begun anew")
        return reports

    def load_weights(self, network: nn.Module, weights: Mapping[str, Tensor], strict: bool, source: str) -> str:
        """As ModelBase; of a file of taming's, what belongs to its loss is passed over."""
        own = {key: value for key, value in weights.items() if not BESIDE.search(key)}
        return super().load_weights(network, own, strict, source)

    def define_loss(self) -> None:
        """How the losses make steps; which they are is said at the start."""
        t = self.opt_train
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[t["G_optimizer_type"]]
        rate = t["G_optimizer_lr"] if t["D_optimizer_lr"] is None else t["D_optimizer_lr"]
        optimizer = kind(self.netD.parameters(), lr=rate, betas=tuple(t["G_optimizer_betas"]),
                         weight_decay=t["G_optimizer_wd"], fused=True)
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        try:
            self.calculator = LossCalculator(
                self.loss, optimizer, self.get_bare_model(self.netG).last_layer, t["disc_every"],
                self.backward, lambda one: self.step(one, t["D_optimizer_clipgrad"]))
        except ValueError as error:
            raise OptionError(f"{self.opt['opt_path']}: train: {error}") from None

    def define_optimizer(self) -> None:
        super().define_optimizer()
        self.optimizers["optimizerD"] = self.calculator.optimizer

    def define_scheduler(self) -> None:
        super().define_scheduler()
        self.schedules["optimizerD"] = self.schedules["optimizerG"]

    # ------------------------------------------------ training

    def feed_data(self, data: Mapping[str, Any], need_H: bool = True) -> None:
        """Take a batch: pictures (B,[D,]H,W,C) uint8, or as other recipes have them (B,[D,]C,H,W) in [0,1]."""
        pictures = data["H" if "H" in data else "L"].to(self.device, non_blocking=True)
        pictures = pictures.flatten(0, -4)  # (B,D,...) -> (B*D,...)
        if pictures.dtype == torch.uint8:
            pictures = pictures.permute(0, 3, 1, 2).float() / 255
        self.images = (pictures * 2 - 1).contiguous(memory_format=torch.channels_last)

    def optimize_parameters(self, current_step: int) -> None:
        try:
            self.get_bare_model(self.netG).check_images(self.images)
        except ValueError as error:
            raise OptionError(f"{self.opt['opt_path']}: datasets.train: {error}") from None
        t, total = self.opt_train, len(self.images)
        terms: dict[str, Tensor] = defaultdict(float)
        self.lower_temperature(current_step)
        self.G_optimizer.zero_grad(set_to_none=True)
        found, parts = [], self.images.chunk(t["accumulate"])
        for number, images in enumerate(parts, start=1):
            with distributed.no_sync(self.forward_G, last=number == len(parts)):
                with self.autocast():
                    vq_loss, restored, _, indices = self.forward_G(images)
                losses = self.calculator.compute_total_loss(images, restored.float(), vq_loss.float(), current_step)
                loss, share = losses.pop("total_loss"), len(images) / total
                for name, value in {"G_loss": loss.detach(), **losses}.items():
                    terms[name] += share * value
                found.append(as_levels(indices))
                if self.unusable(loss):
                    break
                self.backward(share * loss)
        else:
            self.step(self.G_optimizer, t["G_optimizer_clipgrad"])
            if not self.unusable(terms["gan_loss"]):
                self.calculator.step_discriminator(terms["gan_loss"], current_step)
        # also after a step left out: what was counted before that was noticed must not wait for the next one
        self.get_bare_model(self.netG).update_codebook(current_step, distributed.all_reduce_sum_,
                                                    distributed.gather_rows)
        if self.netE is not None:
            self.update_E(t["E_decay"])
        self.log_terms(terms, [torch.cat([index.flatten() for index in level]) for level in zip(*found)])

    def lower_temperature(self, step: int) -> None:
        done = min(step / self.opt_train["total_iter"], 1.0)
        for book in self.books:
            if isinstance(book, GumbelQuantize):
                end = self.opt_train["temperature_end"]
                book.temperature = end + (1 - end) * (1 + math.cos(math.pi * done)) / 2

    def log_terms(self, terms: dict[str, Tensor], indices: list[Tensor]) -> None:
        del terms["gan_loss"]  # D_loss where it counts
        self.discriminator_log |= {name: terms.pop(name) for name in list(terms) if name.startswith("D_")}
        self.log_dict = {**terms, **self.use(indices), **self.discriminator_log}

    def use(self, indices: list[Tensor]) -> dict[str, Tensor]:
        """Share of the codes in use and perplexity, a mean over codebooks."""
        uses = [codebook_use(index, book.n_embed if book.used is None else len(book.used))
                for index, book in zip(indices, self.books)]
        return {name: sum(use[name] for use in uses) / len(uses) for name in uses[0]}

    def extra_state(self, finished: int) -> dict[str, Any]:
        return super().extra_state(finished) | {"discriminator_log": dict(self.discriminator_log)}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        super().load_extra_state(state)
        self.load_local_state([state])

    def local_state(self) -> dict[str, Any]:
        return {"discriminator_log": dict(self.discriminator_log)}

    def load_local_state(self, states: Sequence[Mapping[str, Any]]) -> None:
        log = states[distributed.rank() % len(states)].get("discriminator_log", {})
        self.discriminator_log = {name: value.to(self.device) for name, value in log.items()}

    # ------------------------------------------------ testing

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """What is left of images that pass the codebook, by the moving average of G if there is one.

        Args:
            images: (B,C,H,W) in [-1, 1], of any size: borders are repeated up to what the network takes.
        Returns:
            images (B,C,H,W) in [-1, 1]; indices of each codebook, as the network gives them.
        """
        network = self.get_bare_model(self.netE if self.netE is not None else self.netG)
        training, (height, width) = network.training, images.shape[-2:]
        padded = F.pad(images, (0, -width % network.factor, 0, -height % network.factor), mode="replicate")
        _, restored, _, indices = network.eval()(padded)
        network.train(training)
        return restored[..., :height, :width].clamp(-1, 1), as_levels(indices)

    def results(self, source: str, truth: str | None, wanted: Callable[[str], bool]) -> Iterator[Any]:
        """Reconstructions of pictures at their own sizes, NAME.png, and their codes, NAME.npz; see `ModelBase`."""
        if truth:
            raise ValueError("--truth: a reconstruction is compared with its input; leave it out")
        paths = images_by_name(source)
        yield 2 * len(paths)
        for name, path in paths.items():
            if wanted(f"{name}.png") or wanted(f"{name}.npz"):
                picture = as_channels(read_picture(path), self.opt["n_channels"]).to(self.device)
                self.images = picture[None].float() / 127.5 - 1
                self.test()
                yield f"{name}.png", (self.restored[0] + 1) / 2, self.metrics()
                yield f"{name}.npz", self.codes(), None

    def codes(self) -> dict[str, Tensor]:
        """The indices of the picture tested last, (h,w) each: "codes", or "codes_0", ... of several codebooks."""
        factor = self.get_bare_model(self.netG).factor
        height, width = (-(-side // factor) * factor for side in self.images.shape[-2:])
        shaped = []
        for index in self.indices:
            step = round(math.sqrt(height * width / index.numel()))
            shaped.append(index.reshape(height // step, width // step).cpu())
        return {"codes": shaped[0]} if len(shaped) == 1 else {f"codes_{i}": index for i, index in enumerate(shaped)}

    def test(self) -> None:
        self.restored, self.indices = self.reconstruct(self.images)

    def metrics(self) -> dict[str, float]:
        """PSNR, also of pictures of one colour, codebook use, and LPIPS where its weights are."""
        values = image_metrics((self.restored + 1) / 2, (self.images + 1) / 2)
        if self.lpips is not None:
            with torch.no_grad():
                values["lpips"] = self.lpips(self.restored, self.images).mean().item()
        return values | {name: float(value) for name, value in self.use(self.indices).items()}

    def pictures(self) -> list[Tensor]:
        """Each picture over its reconstruction, (C,2H,W)."""
        return [(torch.cat(pair, dim=-2) + 1) / 2 for pair in zip(self.images, self.restored)]

    def current_visuals(self, need_H: bool = True) -> dict[str, Tensor]:
        """KAIR's keys: L input, E reconstruction; the first of the batch, [0, 1], float, on the CPU."""
        return {key: ((images[0] + 1) / 2).detach().float().cpu()
                for key, images in (("L", self.images), ("E", self.restored))}


def as_levels(indices: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    """Indices of one codebook or of several, always as a list."""
    return [indices] if isinstance(indices, Tensor) else list(indices)


def check_codebook(opt: Mapping[str, Any]) -> None:
    """That the codebook fits into memory with its gradient and two moments. Raises OptionError."""
    defaults = schema_of(resolve(NETWORKS, opt["netG"]["net_type"], f"{opt['opt_path']}: netG.net_type"))
    count, width = (opt["netG"].get(key, defaults.get(key, (None, 0))[1]) for key in ("n_embed", "embed_dim"))
    device = distributed.device_for(opt)
    if device.type == "cuda":
        there = torch.cuda.mem_get_info(device)[1]
    else:
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if (needed := 4 * count * width * 4) > there:
        raise OptionError(f"{opt['opt_path']}: netG: a codebook of n_embed {count} x embed_dim {width} needs "
                          f"{needed / 2**30:,.0f} GiB in training, and {device} has {there / 2**30:,.0f}; lower "
                          "either")
