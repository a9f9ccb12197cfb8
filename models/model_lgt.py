"""The LGT recipe: style transfer by an ODE from noise to a style, trained on the ends of its trajectories.

Source: KiritoFD/VAE_ca_proj, LGT/train.py and inference.py. Differs: the reference is a picture of the target style,
not the source; Euler steps have equal length and reach t = 1; each style is a separate distribution; all draws of a
step come from a generator seeded by (seed, step).

Legend: B images, c channels, h w latent pixels, S styles, R references; t = 0 is noise, t = 1 an image.
"""

from __future__ import annotations

import csv
import math
import os
import time
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

from checkpoint import CheckpointError
from data.frames import read_frame
from data.images import images_by_name
from data.sampler import cpu_generator
from data.styles import build_codec, style_names
from log.pictures import write_picture
from log.run_log import warn_on_write_error
from losses.energy import CosineSSMLoss, PatchSlicedWassersteinLoss
from models.model_plain import ModelPlain, build_schedule
from options import OptionError, run_folder
from runtime import distributed
from runtime.ranges import Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, ProperFraction, Seed
from storage.files import save_file
from storage.foreign import unpack

Velocity = Callable[[Tensor, Tensor], Tensor]  # (x (B,c,h,w), t (B,)) -> (B,c,h,w)
UNNAMED = "unnamed"  # placeholder for the styles until a checkpoint is loaded
COLUMNS = ("epoch", "loss_total", "loss_style_swd", "loss_content_ssm", "learning_rate", "epoch_time")


class ModelLGT(ModelPlain):
    """Train a velocity field through the ODE that it defines, on batches of `data.styles`."""

    batch = "source", "reference", "target_style"
    best_metric = "swd", "min"
    shares_tests = False  # the contact sheet needs the pictures of all samples
    inference_options = ("source_style", "num_steps", "temperature_lambda", "temperature_threshold", "use_cfg",
                      "cfg_scale", "cfg_decay", "sample_seed")

    @dataclass
    class TrainOptions(ModelPlain.TrainOptions):
        G_lossfn_type: str = "lgt_energy"
        w_style: NonNegativeFloat = 1.0  # factor of the style energy, a sliced Wasserstein distance
        w_content: NonNegativeFloat = 1.0  # factor of the content energy, a distance of self-similarities
        patch_size: PositiveInt = 3  # side of the patches of the style energy, in latent pixels
        num_projections: PositiveInt = 64  # number of random projections of the style energy
        max_samples: PositiveInt | None = 4096  # largest number of patches in the style energy; null: all
        # Largest number of latent pixels in the content energy; null: all.
        max_spatial_samples: PositiveInt | None = None
        swd_groups: Literal["style", "batch"] = "style"  # one distribution per style, or per batch (as published)
        use_velocity_reg: bool = False  # penalize fast velocities at x_t, with a second forward pass
        velocity_weight: NonNegativeFloat = 0.01  # factor of the mean squared velocity, with use_velocity_reg
        divergence_weight: NonNegativeFloat = 0.0  # factor of the divergence of the velocity, with use_velocity_reg
        ode_integration_steps: PositiveInt = 5  # number of Euler steps from x_t to the end of the trajectory
        ode_step: Literal["constant", "shrinking"] = "constant"  # length of Euler steps; shrinking: as published
        gradient_checkpointing: bool = False  # recompute Euler steps for the gradient: less memory, more time
        label_drop_prob: Fraction = 0.1  # fraction of the batches that train the average style
        epsilon: ProperFraction = 0.01  # smallest trained time t
        epsilon_warmup_epochs: NonNegativeInt = 10  # epochs over which the smallest time grows from 0 to epsilon
        G_optimizer_type: Literal["adam", "adamw"] = "adamw"
        G_optimizer_wd: NonNegativeFloat = 1e-5
        G_optimizer_clipgrad: PositiveFloat | None = 1.0
        # Schedule of the learning rate; CosineAnnealingLR moves each epoch with total_epochs, else each iteration.
        G_scheduler_type: Literal["CosineAnnealingLR", "MultiStepLR", "CosineAnnealingWarmRestarts",
                                  "constant"] = "CosineAnnealingLR"
        G_scheduler_eta_min: NonNegativeFloat = 1e-6

    @dataclass
    class ValOptions(ModelPlain.ValOptions):
        save_img: bool = False  # write a PNG of each row of the contact sheet, too
        num_steps: PositiveInt = 15  # number of Euler steps of the inversion, and of the generation
        temperature_lambda: NonNegativeFloat = 0.1  # strength of the Langevin noise
        temperature_threshold: Fraction = 0.5  # time t from which Langevin noise is added
        use_cfg: bool = True  # apply guidance away from the average style
        cfg_scale: NonNegativeFloat = 2.0  # strength of the guidance; 1: no guidance
        cfg_decay: bool = True  # lower the guidance towards 1 along the trajectory
        sample_seed: Seed = 0  # seed of the Langevin noise
        batch: PositiveInt = 8  # number of pictures that are generated at once
        style: str | None = None  # target style of --test --input
        source_style: str | None = None  # style of the input of --test --input; null: the average style

    def __init__(self, opt: Mapping[str, Any]):
        data, net, where = opt["datasets"]["train"], opt["netG"], opt["opt_path"]
        self.codec = build_codec(data.get("codec"), f"{where}: datasets.train.codec").to(distributed.device_for(opt))
        self.styles = list(data.get("style_subdirs") or style_names(data.get("dataroot"), None, data.get("generated")))
        for name, section in opt["datasets"].items():
            if (section.get("codec") or {"type": "pixel"}) != (data.get("codec") or {"type": "pixel"}):
                raise ValueError(f"{where}: datasets.{name}.codec: {section.get('codec')} must be the one of "
                                 f"datasets.train, {data.get('codec')}")
        for key, count, whose in (("latent_channels", self.codec.channels, "of the codec"),
                                  ("num_styles", len(self.styles), f"styles: {', '.join(self.styles)}")):
            if net.setdefault(key, count) != count:
                raise ValueError(f"{where}: netG.{key}: {net[key]} does not fit the {count} {whose}")
        tests = {name: section for name, section in opt["datasets"].items() if section["phase"] == "test"}
        for name, section in tests.items():
            if os.path.isdir(section.get("dataroot") or "") and self.styles != [UNNAMED]:
                there = style_names(section["dataroot"], section.get("style_subdirs"), None)
                if not set(there) & set(self.styles):
                    raise ValueError(f"{where}: datasets.{name}.dataroot: none of its folders {', '.join(there)} is a "
                                     f"style of {', '.join(self.styles)}")
        if len(tests) > 1:
            raise ValueError(f"{where}: datasets: one test set at most; a second would replace the pictures of "
                             "the first")
        super().__init__(opt)
        self.baseline_name = "source"
        self.sheet_rows: dict[str, Tensor] = {}  # rows of the contact sheet by source style, (S,3,H,W)
        self.pair_metrics: dict[tuple[str, str], dict[str, float]] = {}  # metrics by (source style, target style)
        self.inferring = False  # whether the model was loaded for inference on files
        self.epoch = 0  # current or last epoch, from 1
        self.sums: dict[str, Tensor] = {}  # of the losses of the epoch, by name
        self.count, self.step, self.began = 0, 0, time.monotonic()
        self.launched = time.strftime("%Y%m%d_%H%M%S")

    def define_scheduler(self) -> None:
        """Build the schedule of G; with total_epochs a cosine moves once per epoch, as published."""
        self.schedules["optimizerG"] = build_schedule(self.opt_train, self.opt_train["total_epochs"])

    # ------------------------------------------------ state

    def extra_state(self, finished: int) -> dict[str, Any]:
        """Return the extra state with styles, codec and sums of the epoch."""
        return super().extra_state(finished) | {
            "styles": self.styles, "codec": self.codec.fingerprint,
            "epoch_log": {"epoch": self.epoch, "count": self.count, "sums": dict(self.sums)}}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Restore the sums. Raises CheckpointError: styles or codec differ."""
        super().load_extra_state(state)
        if state.get("styles", self.styles) != self.styles:
            raise CheckpointError(f"{self.opt['opt_path']}: the styles are {', '.join(self.styles)}; the checkpoint "
                                  f"was trained on {', '.join(state['styles'])}, in this order")
        self.check_codec(state)
        kept = state.get("epoch_log", {"epoch": state.get("epoch", 0), "count": 0, "sums": {}})
        self.epoch, self.count, self.sums = kept["epoch"], kept["count"], dict(kept["sums"])

    def check_codec(self, state: Mapping[str, Any]) -> None:
        """Raise CheckpointError where a checkpoint was trained with another codec."""
        if state.get("codec", self.codec.fingerprint) != self.codec.fingerprint:
            raise CheckpointError(f"{self.opt['opt_path']}: datasets.train.codec: is not the one that the "
                                  "checkpoint was trained with, or was trained further since; give that codec")

    # ------------------------------------------------ training

    def feed_data(self, data: Mapping[str, Any], need_H: bool = True) -> None:
        """Move a batch of `StyleDataset`, or the sample of `StyleTestDataset`, to the device."""
        if "target_style" in data:
            epoch = int(data["epoch"].max()) + 1
            if epoch != self.epoch:
                self.begin_epoch(epoch)
            self.target_style = data["target_style"]  # stays on the CPU, where groups are formed
            self.source, self.reference = (self.move(data[k]) for k in ("source", "reference"))
            return
        there = [name for (name,) in data["styles"]]
        (self.source_name,), self.source = data["style"], data["source"].to(self.device)  # (1,c,h,w)
        self.references = dict(zip(there, data["reference"][0].to(self.device)))  # style -> (R,c,h,w)

    def losses(self, step: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Compute the energy of the ends of trajectories that begin at random times, and the velocity penalty."""
        t, count = self.opt_train, len(self.source)
        x0 = self.move(torch.randn(self.source.shape))
        least = t["epsilon"] * min(self.epoch / max(t["epsilon_warmup_epochs"], 1), 1)
        start = self.move(torch.rand(count) * (1 - least) + least)
        dropped = bool(torch.rand(()) < t["label_drop_prob"])
        style = self.move(self.target_style)
        x_t = torch.lerp(x0, self.source, start[:, None, None, None])
        groups = self.target_style.tolist() if t["swd_groups"] == "style" and not dropped else None
        terms = self.G_lossfn(self.integrate(x_t, start, style, dropped), self.reference, self.source, None, groups)
        if t["use_velocity_reg"]:
            velocity = self.velocity(self.forward_G, style, dropped)(x_t, start)
            terms["vel_reg"] = self.G_lossfn.velocity_penalty(velocity)
            terms["total"] = terms["total"] + terms["vel_reg"]
        return {"optimizerG": t["G_lossfn_weight"] * terms["total"]}, {f"loss_{k}": v for k, v in terms.items()}

    def finish_step(self, step: int, counts: list[Tensor]) -> None:
        """Refresh the average style, and add the losses to those of the epoch."""
        self.get_bare_model(self.netG).style_embed.refresh()
        self.count, self.step = self.count + 1, step
        self.sums = {name.removeprefix("loss_"): self.sums.get(name.removeprefix("loss_"), 0) + loss.double()
                     for name, loss in self.log_dict.items()}

    def update_E(self, decay: float = 0.999) -> None:
        """Update the moving average and its average style."""
        super().update_E(decay)
        self.get_bare_model(self.netE).style_embed.refresh()

    def velocity(self, network: nn.Module, style: Tensor, average: bool = False) -> Velocity:
        """Return the velocity towards a style as a function of x and t, in float32."""
        def field(x: Tensor, t: Tensor) -> Tensor:
            with self.autocast():
                return network(x, t, style, average).float()

        return field

    def integrate(self, x: Tensor, t: Tensor, style: Tensor, average: bool) -> Tensor:
        """Return the ends (B,c,h,w) of the trajectories from x at times t (B,)."""
        o = self.opt_train
        return euler(self.velocity(self.forward_G, style, average), x, t, o["ode_integration_steps"], o["ode_step"],
                     o["gradient_checkpointing"])[0]

    def begin_epoch(self, epoch: int) -> None:
        """Reset the sums of the losses."""
        self.epoch, self.sums, self.count, self.began = epoch, {}, 0, time.monotonic()

    def close_epoch(self) -> dict[str, float]:
        """Return the means of the epoch, and append them to the CSV of this launch; its time is this launch's part.

        The first row of a launch removes the rows that earlier launches have of this epoch and later ones.
        """
        if not self.count:
            return {}
        means = {f"loss_{name}": float(total) / self.count for name, total in self.sums.items()}
        rate = self.schedules["optimizerG"](self.G_optimizer.param_groups[0]["initial_lr"], self.step)
        row = [self.epoch, *(f"{means[name]:.6f}" for name in COLUMNS[1:4]), f"{rate:.2e}",
               f"{time.monotonic() - self.began:.2f}"]
        path = Path(run_folder(self.opt)) / "logs" / f"training_{self.launched}.csv"
        with warn_on_write_error(path, warnings.warn):
            if distributed.is_main():
                path.parent.mkdir(parents=True, exist_ok=True)
                new = not path.exists()
                for earlier in path.parent.glob("training_*.csv") if new else ():
                    lines = earlier.read_text(encoding="utf-8").splitlines(keepends=True)
                    kept = [line for line in lines if not (number := line.partition(",")[0]).isdecimal()
                            or int(number) < self.epoch]
                    if kept != lines:
                        save_file(earlier, "".join(kept).encode())
                with open(path, "a", newline="", encoding="utf-8") as file:
                    csv.writer(file).writerows([COLUMNS, row] if new else [row])
        self.begin_epoch(self.epoch)
        return {"loss": means["loss_total"], "swd": means["loss_style_swd"], "ssm": means["loss_content_ssm"]}

    # ------------------------------------------------ testing

    def validate(self, sample: Any) -> dict[str, float]:
        """Return the metrics of one source style; folders of other styles are ignored with a warning."""
        (name,) = sample["style"]
        if name in self.styles:
            return super().validate(sample)
        warnings.warn(f"test folder {name!r} is not a trained style and is ignored", stacklevel=2)
        self.shown = []
        return {}

    def test(self) -> None:
        """Translate the source to all other styles and write the pictures."""
        v, source = self.opt["val"], self.styles.index(self.source_name)
        others = [style for style in range(len(self.styles)) if style != source]
        with self.testing() as network:
            noise = self.invert(network, self.source, torch.tensor([source], device=self.device))
            ends: list[Tensor] = []
            for first in range(0, len(others), v["batch"]):
                chosen = others[first : first + v["batch"]]
                seeds = [(v["sample_seed"], source, style) for style in chosen]
                ends += self.generate(network, noise.expand(len(chosen), -1, -1, -1), chosen, seeds)
            self.ends = {self.styles[style]: end for style, end in zip(others, ends)}
            self.write_pictures()

    def invert(self, network: nn.Module, x: Tensor, style: Tensor, average: bool = False) -> Tensor:
        """Return the noise from which latents (B,c,h,w) of these styles arise."""
        return invert(self.velocity(network, style, average), x, self.opt["val"]["num_steps"])

    def generate(self, network: nn.Module, noise: Tensor, styles: list[int], seeds: list[tuple[int, ...]]) -> Tensor:
        """Return latents of these styles from noise (B,c,h,w); `seeds` seed the Langevin noise of each image."""
        v, style = self.opt["val"], torch.tensor(styles, device=self.device)
        generators = [cpu_generator(seed, 0, 0, *stream) for seed, *stream in seeds]
        langevin = (torch.stack([torch.randn(noise.shape[1:], generator=g) for g in generators]).to(noise)
                    for _ in range(v["num_steps"]))
        unguided = self.velocity(network, style, average=True) if v["use_cfg"] else None
        return generate(self.velocity(network, style), unguided, noise, v["num_steps"], v["cfg_scale"],
                        v["cfg_decay"], v["temperature_lambda"], v["temperature_threshold"], langevin)

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents (B,c,h,w) to pictures (B,3,H,W) in [0,1]."""
        return (self.codec.decode(latents.float()).float() / 2 + 0.5).clamp(0, 1)

    @property
    def pictures_folder(self) -> Path:
        """Return the folder of the pictures of this test."""
        return Path(run_folder(self.opt)) / "inference" / ("use" if self.inferring else f"epoch_{self.epoch:04d}")

    def write_pictures(self) -> None:
        """Write the picture of each translation."""
        latents = torch.stack([self.ends.get(style, self.source[0]) for style in self.styles])
        row = torch.cat([self.decode(part) for part in latents.split(self.opt["val"]["batch"])]).cpu()
        with warn_on_write_error(self.pictures_folder, warnings.warn):
            self.pictures_folder.mkdir(parents=True, exist_ok=True)
            for style, picture in zip(self.styles, row):
                if style in self.ends:
                    write_picture(self.pictures_folder / f"{self.source_name}_to_{style}.jpg", picture)
        self.sheet_rows[self.source_name] = row

    def metrics(self) -> dict[str, float]:
        """Return for each pair of styles the distances to the target style (swd) and to the source (ssm).

        `swd_source` is the distance of the untranslated source to the target style. Lower is better.
        """
        t, row = self.opt_train, {}
        swd = PatchSlicedWassersteinLoss(t["patch_size"], t["num_projections"], max_samples=None)
        for target, end in self.ends.items():
            values = {"ssm": float(CosineSSMLoss()(end[None], self.source))}
            if (references := self.references.get(target)) is not None:
                for key, latent in (("swd", end), ("swd_source", self.source[0])):
                    generator = cpu_generator(self.opt["val"]["sample_seed"], 0, 0, 0)
                    values[key] = float(swd(latent.expand_as(references), references, generator))
            self.pair_metrics[self.source_name, target] = values
            row |= {f"{key}_{self.source_name}_to_{target}": value for key, value in values.items()}
        return row

    def summarize(self, name: str, rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """Write the contact sheet, and return means over all pairs of styles, then the metrics of each pair.

        The sheet has a row for each source and a column for each style; the diagonal shows the decoded source.
        """
        from torchvision.utils import make_grid  # slow to import

        sheet_rows, self.sheet_rows = self.sheet_rows, {}
        pair_metrics, self.pair_metrics = list(self.pair_metrics.values()), {}
        if not sheet_rows:
            raise OptionError(f"none of the test folders is a style of {', '.join(self.styles)}")
        for style in self.styles:
            if style not in sheet_rows:
                warnings.warn(f"style {style!r} has no picture in the test folder: it is not translated",
                              stacklevel=2)
        sheet = make_grid(torch.cat(list(sheet_rows.values())), nrow=len(self.styles), padding=4, pad_value=1)
        with warn_on_write_error(self.pictures_folder, warnings.warn):
            write_picture(self.pictures_folder / "sheet.jpg", sheet)
        means = {}
        for key in ("swd", "swd_source", "ssm"):
            values = [pair[key] for pair in pair_metrics if key in pair]
            means[key] = sum(values) / len(values) if values else math.nan
        return means | {key: value for row in rows for key, value in row.items()}

    def is_printed(self, metric: str) -> bool:
        """Tell whether the log line shows a metric: the means, not single pairs."""
        return "_to_" not in metric

    def pictures(self) -> list[Tensor]:
        """Return the row of the source in the contact sheet."""
        return list(self.sheet_rows[self.source_name])

    def current_visuals(self, need_H: bool = True) -> dict[str, Tensor]:
        """Return by KAIR's keys L, the source, and E, its first translation; (3,H,W) in [0, 1] on the CPU."""
        row, source = self.sheet_rows[self.source_name], self.styles.index(self.source_name)
        return {"L": row[source], "E": row[int(source == 0)]}

    # ------------------------------------------------ inference

    @staticmethod
    def prepare_inference(opt: Mapping[str, Any]) -> None:
        """Let the checkpoint name the styles; bare weights need `style_subdirs`."""
        data = opt["datasets"]["train"]
        data["style_subdirs"] = data.get("style_subdirs") or [UNNAMED]
        opt["netG"].pop("num_styles", None)

    def load_for_inference(self, payload: Mapping[str, Any], source: str) -> str:
        """Load weights and styles of a checkpoint."""
        state = (payload if "state" in payload else unpack(payload, source)).get("state") or {}
        self.check_codec(state)
        self.inferring, self.styles = True, list(state.get("styles") or self.styles)
        if self.styles == [UNNAMED]:
            raise CheckpointError(f"{source}: does not name the styles it was trained on; give them, in order, as "
                                  "datasets.train.style_subdirs")
        self.opt["netG"]["num_styles"] = len(self.styles)
        self.netG = self.define_network("G")
        return super().load_for_inference(payload, source)

    @property
    def shown_output(self) -> str:
        return f"{{}}_to_{self.opt['val']['style']}.png"

    def infer(self, source: str, truth: str | None, wanted: Callable[[str], bool]) -> Iterator[Any]:
        """Yield pictures in style `val.style`, NAME_to_STYLE.png; the noise of each depends on its name alone."""
        v = self.opt["val"]
        if truth:
            raise ValueError("--truth: a translation has no ground truth; omit it")
        for flag, style in (("style", v["style"] or ""), ("source_style", v["source_style"])):
            if style is not None and style not in self.styles:
                raise ValueError(f"--{flag}: {f'{style!r} was not trained' if style else 'missing'}; valid: "
                                 f"{', '.join(self.styles)}")
        paths = images_by_name(source)
        yield len(paths)
        for name, path in paths.items():
            if wanted(file := f"{name}_to_{v['style']}.png"):
                picture = read_frame(path).float() / 255
                yield file, self.translate(picture, v["style"], v["source_style"], zlib.crc32(os.fsencode(name))), None

    def translate(self, picture: Tensor, target: str, source: str | None = None, seed: int = 0) -> Tensor:
        """Translate a picture to another style, at its own size.

        Args:
            picture: (3,H,W) in [0,1].
            target: name of a trained style.
            source: style of the picture; None: the average style.
            seed: of the Langevin noise.
        Returns: (3,H,W) in [0,1].
        """
        height, width = picture.shape[1:]
        side = 4 * self.codec.factor
        image = F.pad(picture[None].to(self.device), (0, -width % side, 0, -height % side), mode="replicate")
        style = torch.tensor([self.styles.index(source or target)], device=self.device)
        with self.testing() as network:
            noise = self.invert(network, self.codec.encode(image * 2 - 1), style, average=source is None)
            end = self.generate(network, noise, [self.styles.index(target)], [(self.opt["val"]["sample_seed"], seed)])
            return self.decode(end)[0, :, :height, :width].cpu()


# The ODE ----------------------------------------------------------------------------------------------------------

def euler(velocity: Velocity, x: Tensor, t: Tensor, steps: int, kind: Literal["constant", "shrinking"] = "constant",
          recompute: bool = False) -> tuple[Tensor, Tensor]:
    """Integrate the velocity from x (B,c,h,w) at times t (B,) towards t = 1.

    Args:
        kind: "constant": steps of equal length, which end at 1. "shrinking": each step covers an equal fraction of
            the time that is left, as published, so that the last ends before 1.
        recompute: keep only x of each step in memory and recompute the rest for the gradient.
    Returns: x and t at the end.
    """
    length = (1 - t) / steps
    for _ in range(steps):
        if kind == "shrinking":
            length = (1 - t) / steps
        if recompute and torch.is_grad_enabled():
            v = recomputed(velocity, x, t, use_reentrant=False, preserve_rng_state=False)  # it draws nothing
        else:
            v = velocity(x, t)
        x, t = x + v * length[:, None, None, None], t + length
    return x, t


def invert(velocity: Velocity, x: Tensor, steps: int) -> Tensor:
    """Integrate the velocity backwards from t = 1 to 0 in Euler steps, as published."""
    for k in range(steps):
        x = x - velocity(x, x.new_full((len(x),), 1 - k / steps)) / steps
    return x


def generate(velocity: Velocity, average: Velocity | None, x: Tensor, steps: int, cfg_scale: float, cfg_decay: bool,
             temperature_lambda: float, temperature_threshold: float, noise: Iterable[Tensor]) -> Tensor:
    """Integrate the velocity from t = 0 to 1, with guidance away from the average style and Langevin noise.

    Args:
        average: velocity of the average style; None: no guidance.
        cfg_scale: strength of the guidance; 1: no guidance.
        cfg_decay: whether the guidance falls towards 1 in equal steps.
        temperature_lambda: strength of the noise from time temperature_threshold on; 0: no noise.
        noise: tensors like x, one for each noisy step.
    """
    noise = iter(noise)
    for k in range(steps):
        t = x.new_full((len(x),), k / steps)
        v = velocity(x, t)
        scale = max(1.0, cfg_scale - (cfg_scale - 1) / steps * k) if cfg_decay else cfg_scale
        if average is not None and scale != 1:
            plain = average(x, t)
            v = plain + scale * (v - plain)
        x = x + v / steps
        if temperature_lambda > 0 and k / steps >= temperature_threshold:
            x = x + temperature_lambda / math.sqrt(steps) * next(noise)
    return x
