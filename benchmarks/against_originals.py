"""Train the original programs and this one side by side: equal curves, and the ratios of time and memory.

    python benchmarks/against_originals.py --kair PATH            a checkout of github.com/cszn/KAIR
    python benchmarks/against_originals.py --taming PATH          a checkout of github.com/CompVis/taming-transformers
    python benchmarks/against_originals.py --kair PATH --speed small     or middle; in turns, and memory

The originals' own networks, losses and models are imported from PATH; einops must be installed. Packages that they only
import (cv2, pytorch_lightning, omegaconf, ...) are replaced by empty ones. All start from the original's weights and
see the same batches:

original   KAIR's ModelVRT in the order of main_train_vrt.py, or taming's VQModel in the order of Lightning 1.0:
           a step of the autoencoder, then one of the discriminator, each with a forward pass of its own
twin       the original again, from weights that differ by one unit in the last place: how fast rounding grows
ours       the model of this project, with what differs on purpose switched to the original's way, and for
           VQGAN in taming's order of passes (TwoPasses)
shipped    the model of this project as its option files have it

The first lines are of float64, where rounding is so small that only a fault can part two curves: `ours` must stay
within LIMITS of the original, in losses and in each tensor of weights; else the first step and tensor are named, and
the exit code is 1. The table after them is of float32: largest relative difference of the loss within so many steps,
and PSNR of what was not trained on. Sizes and switches stand in benchmarks/originals.json.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from benchmarks.common import ROOT, build_run, read_options, values_in
from data import DATASETS
from metrics.psnr_ssim import psnr
from models import MODELS
from models.model_vqgan import ModelVQGAN, as_levels
from options import OptionError, Section, build, read_file

FILES = {"kair": ("models/model_vrt.py", "models/network_vrt.py", "utils/utils_option.py"),
         "taming": ("taming/models/vqgan.py", "taming/modules/losses/vqperceptual.py", "main.py")}
ABSENT = ("cv2", "matplotlib", "matplotlib.pyplot", "mpl_toolkits", "mpl_toolkits.mplot3d", "requests", "tqdm",
          "omegaconf", "taming.data.utils", *("pytorch_lightning" + end for end in ("", ".trainer", ".callbacks",
                                                                                    ".utilities")))
LIMITS = 1e-11, 1e-8  # relative, in float64: of losses; of weights, whose smallest gradients Adam makes large
MARKS = (1, 10, 30, 60, 100, 150, 200)
SIZES = read_file(str(ROOT / "benchmarks/originals.json"))


# ---------------------------------------------------------------- the originals


class Stand(nn.Module):
    """Stand in for any class or function of a package that is only imported."""

    def __init__(self, *args: Any):
        super().__init__()


class Empty(ModuleType):
    """Stand in for a package that is only imported."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Stand


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Print nothing, and show no warning."""
    with contextlib.redirect_stdout(None), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def original(kind: str, path: str) -> Iterator[None]:
    """Let imports find the modules of the original program first, and only within.

    Raises: OptionError: the path is not such a checkout, or a package is missing.
    """
    root = Path(path).resolve()
    if absent := [name for name in FILES[kind] if not (root / name).is_file()]:
        raise OptionError(f"--{kind} {path}: is not a checkout of {kind}: it has no {absent[0]}")
    hidden = {entry.stem for entry in root.iterdir()}
    saved = {name: sys.modules.pop(name) for name in list(sys.modules)
             if name.split(".")[0] in hidden or name in ABSENT}
    sys.modules.update({name: Empty(name) for name in ABSENT})
    others = [entry for entry in sys.path if Path(entry).resolve() != ROOT]  # our packages would win over its folders
    try:
        with mock.patch.object(sys, "path", [str(root), *others]), quiet():
            yield
    except ModuleNotFoundError as error:
        raise OptionError(f"--{kind} {path}: needs the package {error.name}: pip install {error.name}") from None
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] in hidden or name in ABSENT]:
            del sys.modules[name]
        sys.modules.update(saved)


class Kair:
    """KAIR's ModelVRT, stepped as main_train_vrt.py does. Args: opt: options of ours. path: the checkout."""

    def __init__(self, opt: Section, path: str):
        torch.manual_seed(0)
        train = {**opt["train"], "G_optimizer_betas": list(opt["train"]["G_optimizer_betas"])}
        train["G_scheduler_periods"] = train["G_scheduler_periods"] or train["total_iter"]
        net = {"init_type": "default", "nonblind_denoising": False, "use_checkpoint_attn": False,
               "use_checkpoint_ffn": False, "no_checkpoint_attn_blocks": [], "no_checkpoint_ffn_blocks": []}
        with original("kair", path):
            clean = importlib.import_module("utils.utils_option").dict_to_nonedict
            options = {**opt, "netG": {**net, **opt["netG"]}, "train": train, "path": {"models": ""}, "is_train": True,
                       "gpu_ids": None, "dist": False}
            self.model = importlib.import_module("models.model_vrt").ModelVRT(clean(options))
            self.model.init_train()
        for module in self.model.netG.modules():
            if hasattr(module, "drop_prob"):  # 0.2 cannot be set in its option files, and draws other numbers
                module.drop_prob = 0.0

    def networks(self) -> dict[str, nn.Module]:
        return {"G": self.model.netG.module, "E": self.model.netE}

    def step(self, number: int, data: Mapping[str, Any]) -> dict[str, float]:
        with quiet():
            self.model.update_learning_rate(number)
            self.model.feed_data(data)
            self.model.optimize_parameters(number)
        return dict(self.model.log_dict)

    def score(self, sample: Mapping[str, Tensor]) -> float:
        with quiet():
            self.model.feed_data(sample)
            self.model.test()
        return psnr_of(self.model.E[0], sample["H"][0])


class Taming:
    """taming's VQModel, stepped as Lightning 1.0 does: both optimizers each batch. Args: as Kair."""

    def __init__(self, opt: Section, path: str):
        torch.manual_seed(0)
        net, loss = opt["netG"], {**opt["train"]["lossconfig"]}
        loss.pop("legacy", None)
        with original("taming", path):
            module = importlib.import_module("taming.modules.losses.vqperceptual")
            with mock.patch.object(module, "LPIPS", Perceptual):
                target = f"{module.__name__}.VQLPIPSWithDiscriminator"
                self.model = importlib.import_module("taming.models.vqgan").VQModel(
                    dict(net["ddconfig"]), {"target": target, "params": loss}, net["n_embed"], net["embed_dim"])
        self.model.log = self.model.log_dict = lambda *args, **more: None
        # main.py: base_learning_rate times batch, GPUs and accumulation; the product is our option
        self.model.learning_rate = opt["train"]["G_optimizer_lr"]
        self.optimizers, _ = self.model.configure_optimizers()
        self.model.train()

    def networks(self) -> dict[str, nn.Module]:
        parts = nn.ModuleDict({name: part for name, part in self.model.named_children() if name != "loss"})
        return {"G": parts, "D": self.model.loss.discriminator}

    def step(self, number: int, data: Mapping[str, Any]) -> dict[str, float]:
        batch, found = {"image": data["image"].permute(0, 2, 3, 1)}, {}
        self.model.global_step = number - 1  # Lightning counts a batch after both optimizers
        for index, (name, optimizer) in enumerate(zip(("G_loss", "D_loss"), self.optimizers)):
            for parameter in self.model.parameters():
                parameter.requires_grad_(False)  # Lightning's toggle_optimizer
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.requires_grad_(True)
            loss = self.model.training_step(batch, number - 1, index)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found[name] = loss.item()  # its progress bar shows it
        return found

    def score(self, sample: Mapping[str, Tensor]) -> float:
        images = sample["image"]
        self.model.eval()
        with torch.no_grad():
            restored = self.model(images)[0]
        self.model.train()
        return psnr_of((restored + 1) / 2, (images + 1) / 2)


# ---------------------------------------------------------------- ours


class TwoPasses(ModelVQGAN):
    """ModelVQGAN in taming's order: the discriminator judges what the stepped autoencoder makes in a second pass."""

    turn = "G"

    def optimize_parameters(self, current_step: int) -> None:
        terms: dict[str, Tensor] = {}
        turns = "GD" if self.calculator.discriminator_due(current_step) else "G"
        for self.turn in turns:
            super().optimize_parameters(current_step)
            terms |= self.log_dict
        self.log_dict = terms

    def losses(self, step: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        vq_loss, restored, _, indices = self.forward_G(self.images)
        last = self.get_bare_model(self.netG).last_layer
        loss, _ = self.loss(vq_loss, self.images, restored, "GD".index(self.turn), step, last)
        self.hits = self.hits_of(as_levels(indices))
        return {f"optimizer{self.turn}": loss}, {f"{self.turn}_loss": loss}


class Ours:
    """The model of this project, stepped as train.py does. Args: model: ready to train."""

    def __init__(self, model: Any):
        self.model = model

    def networks(self) -> dict[str, nn.Module]:
        return self.model.networks

    def step(self, number: int, data: Mapping[str, Any]) -> dict[str, float]:
        self.model.update_learning_rate(number - 1)
        self.model.feed_data(data)
        if isinstance(self.model, ModelVQGAN):
            self.model.images = data["image"].contiguous(memory_format=torch.channels_last)
        self.model.optimize_parameters(number)
        return {name: float(value) for name, value in self.model.log_dict.items() if name in ("G_loss", "D_loss")}

    def score(self, sample: Mapping[str, Tensor]) -> float:
        self.model.feed_data(sample)
        self.model.test()
        if isinstance(self.model, ModelVQGAN):
            return psnr_of((self.model.restored + 1) / 2, (sample["image"] + 1) / 2)
        return psnr_of(self.model.restored[0], sample["H"][0])


# ---------------------------------------------------------------- what both need


class Perceptual(nn.Module):
    """Stand in for LPIPS: the distance of features of one random layer, for both sides the same."""

    def __init__(self):
        super().__init__()
        kernel = torch.randn(8, 3, 3, 3, generator=torch.Generator().manual_seed(1)) / 5
        self.register_buffer("kernel", kernel)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        a, b = (torch.tanh(nn.functional.conv2d(x, self.kernel.to(x))) for x in (a, b))
        return (a - b).square().mean((1, 2, 3), keepdim=True)


def psnr_of(restored: Tensor, target: Tensor) -> float:
    """Return the mean PSNR of images (N, C, H, W) in [0, 1] that are rounded to 8 bits."""
    a, b = (x.detach().clamp(0, 1).mul(255).round().float() for x in (restored, target))
    return psnr(a, b).mean().item()


def options_of(args: argparse.Namespace, switched: Mapping[str, Any]) -> Section:
    """Return the options of ours for the size and --set of the command line, and for switches."""
    file = {"kair": "options/train_vrt.json", "taming": "options/train_vqgan.json"}[args.kind]
    sizes = SIZES[args.kind]
    return read_options(file, {"train.total_iter": args.steps, "device": "cpu", **sizes["all"],
                               **sizes[args.speed or "tiny"], **switched, **args.changes})


def relative(a: float, b: float) -> float:
    """Return the difference of a and b divided by the larger one; 0 where both are 0."""
    return abs(a - b) / max(abs(a), abs(b), 1e-300)


def worst_tensor(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> tuple[float, str]:
    """Return the largest difference of two states divided by the tensor's largest value, and the tensor's name.

    Raises: OptionError: a tensor of parameters is missing on one side.
    """
    if a.keys() != b.keys():
        raise OptionError(f"the networks have other tensors: {sorted(a.keys() ^ b.keys())[:3]}")
    return max((((a[name] - b[name]).abs().max() / b[name].abs().max().clamp(min=1e-6)).item(), name) for name in a)


def tensors_of(side: Any) -> dict[str, Tensor]:
    """Return the parameters, and the floating-point buffers, of all networks of one side by name."""
    return {f"{label}.{name}": value for label, network in side.networks().items()
            for name, value in network.state_dict().items() if value.is_floating_point()}


def largest_within(differences: Sequence[float], marks: Sequence[int]) -> list[float]:
    """Return the largest of the first so many differences, for each mark up to their number."""
    return [max(differences[:mark]) for mark in marks if mark <= len(differences)]


# ---------------------------------------------------------------- what is measured


class Pair:
    """The sides of a comparison by name, which start from equal weights, and their batches.

    Args:
        args: of the command line.
        names: sides to build, of "original", "twin", "ours", "shipped".
        dtype: floating-point type of all.
    """

    def __init__(self, args: argparse.Namespace, names: Sequence[str], dtype: torch.dtype = torch.float32):
        self.sides: dict[str, Any] = {}
        kind, weights, self.dtype = args.kind, None, dtype
        early = {**SIZES[kind]["early"], "train.total_iter": args.double} if dtype == torch.float64 else {}
        self.opt = options_of(args, early)
        self.train_set = build(DATASETS, self.opt["datasets"]["train"], "dataset_type")
        for name in names:
            opt = options_of(args, {**early, **(SIZES[kind]["switches"] if name == "ours" else {})})
            if name == "ours" and kind == "taming":  # taming counts finished batches
                opt["train"]["lossconfig"]["disc_start"] += 1
            if name in ("original", "twin"):
                side = {"kair": Kair, "taming": Taming}[kind](opt, args.path)
            else:
                models = {"vqgan": "benchmarks.against_originals:TwoPasses"} if name == "ours" else {}
                with mock.patch.dict(MODELS, models):
                    side = Ours(build_run(opt).model)
            if kind == "taming" and not args.speed:
                side.model.loss.perceptual_loss, side.model.loss.perceptual_weight = Perceptual(), 1.0
            for network in side.networks().values():
                network.to(dtype)
            self.sides[name] = side
            state = {key: value.clone() for key, value in tensors_of(side).items()}
            weights = weights or state
            if state.keys() != weights.keys():
                raise OptionError(f"the networks have other tensors: {sorted(state.keys() ^ weights.keys())[:3]}")
            eps = torch.finfo(dtype).eps * (name == "twin")
            draw = torch.Generator().manual_seed(2)
            with torch.no_grad():
                for key, value in tensors_of(side).items():
                    units = torch.randint(-1, 2, value.shape, generator=draw, dtype=dtype)
                    value.copy_(weights[key] * (1 + eps * units))

    def batch(self, number: int) -> dict[str, Any]:
        """Return the batch of a step, in the type of the pair."""
        size, length = self.opt["datasets"]["train"]["dataloader_batch_size"], len(self.train_set)
        return self.in_type(default_collate([self.train_set[divmod(number * size + i, length)] for i in range(size)]))

    def in_type(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return clips L and H, or also pictures (B, D, H, W, C) uint8 as "image" (B * D, C, H, W) in [-1, 1]."""
        found = {key: batch[key] for key in "LH" if key in batch}
        if found["H"].dtype == torch.uint8:
            return {**found, "image": found["H"].flatten(0, -4).permute(0, 3, 1, 2).to(self.dtype) / 127.5 - 1}
        return {key: value.to(self.dtype) for key, value in found.items()}

    def score(self) -> dict[str, float]:
        """Return the PSNR of all sides for the first sample of the test set."""
        sample = self.in_type(default_collate([build(DATASETS, self.opt["datasets"]["test"], "dataset_type")[0, 0]]))
        return {name: side.score(sample) for name, side in self.sides.items()}


@contextlib.contextmanager
def all_of_one_type() -> Iterator[None]:
    """Let `float()`, which promotes half precision, leave float64 alone, so that a step has one type throughout."""
    promote = Tensor.float
    with mock.patch.object(Tensor, "float", lambda x: x if x.dtype == torch.float64 else promote(x)):
        yield


def check_in_float64(args: argparse.Namespace) -> bool:
    """Take steps of `ours` and the original in float64, print how far they part, and tell whether it is rounding."""
    pair = Pair(args, ["original", "ours"], torch.float64)
    loss = weight = 0.0
    with all_of_one_type():
        for number in range(1, args.double + 1):
            data = pair.batch(number)
            theirs, ours = (pair.sides[name].step(number, data) for name in ("original", "ours"))
            loss = max([loss, *(relative(ours.get(key, 0.0), theirs[key]) for key in theirs)])
            far, name = worst_tensor(*(tensors_of(pair.sides[name]) for name in ("ours", "original")))
            weight = max(weight, far)
            if loss > LIMITS[0] or far > LIMITS[1]:
                print(f"float64: they part in step {number}: losses {ours} and {theirs}; {name} differs by {far:.1e}")
                return False
    print(f"float64, {args.double} steps: losses differ by {loss:.1e}, tensors of weights by {weight:.1e} at most")
    return True


def compare_curves(args: argparse.Namespace) -> None:
    """Train all sides in float32, and print how far their losses part from the original's, and PSNR."""
    pair = Pair(args, ["original", "twin", "ours", "shipped"])
    curves: dict[str, list[dict[str, float]]] = {name: [] for name in pair.sides}
    for number in range(1, args.steps + 1):
        data = pair.batch(number)
        for name, side in pair.sides.items():
            curves[name].append(side.step(number, data))
    scores, theirs = pair.score(), curves["original"]
    marks = [mark for mark in MARKS if mark < args.steps] + [args.steps]
    print("\n| | loss | " + " | ".join(f"{mark} steps" for mark in marks) + " | PSNR |")
    print("|---" * (len(marks) + 3) + "|")
    for term in theirs[0]:
        for name, curve in curves.items():
            far = [relative(step.get(term, 0.0), other[term]) for step, other in zip(curve, theirs)]
            cells = [f"{value:.1e}" for value in largest_within(far, marks)]
            print(f"| {name} | {term} | {' | '.join(cells)} | {scores[name]:.3f} |")
    print("\nG_loss of the original there: " + ", ".join(f"{theirs[mark - 1]['G_loss']:.5f}" for mark in marks))


def compare_speed(args: argparse.Namespace) -> None:
    """Time the original's step and the shipped one in turns, and print the ratios, also of the peak memory."""
    pair, more = Pair(args, ["original", "shipped"]), [f"--set={key}={json.dumps(value)}"
                                                           for key, value in args.changes.items()]
    times: dict[str, list[float]] = {name: [] for name in pair.sides}
    began, number = time.monotonic(), 0
    every = pair.opt["train"].get("disc_every", 1)  # the steps of a round: the discriminator makes one of them longer
    while number < (1 + args.rounds) * every and time.monotonic() - began < args.seconds:
        number += 1
        data = pair.batch(number)
        for name in sorted(pair.sides, reverse=bool(number % 2)):
            start = time.perf_counter()
            pair.sides[name].step(number, data)
            times[name].append(time.perf_counter() - start)
    rounds = {name: [statistics.mean(found[i : i + every]) for i in range(every, len(found) - every + 1, every)]
              for name, found in times.items()}  # without the first, which allocates
    ratios = sorted(a / b for a, b in zip(rounds["shipped"], rounds["original"]))
    if not ratios:
        raise OptionError(f"--seconds {args.seconds:g}: too short for a round; raise it")
    middle = {name: statistics.median(found) for name, found in rounds.items()}
    print(f"  step {middle['shipped']:.3f} s of {middle['original']:.3f} s, ratio {statistics.median(ratios):.3f} "
          f"({ratios[0]:.3f} to {ratios[-1]:.3f} in {len(ratios)} rounds)", flush=True)
    used = {name: memory_alone([*more, "--alone", name]) for name in pair.sides}
    grown = {name: one["peak"] - one["before"] for name, one in used.items()}
    print(f"  memory that three steps add {grown['shipped']:.0f} of {grown['original']:.0f} MiB, ratio "
          f"{grown['shipped'] / grown['original']:.3f}; whole processes "
          f"{used['shipped']['peak'] / used['original']['peak']:.3f}", flush=True)


def memory_alone(words: list[str]) -> dict[str, float]:
    """Take three steps of one side in a process of its own. Returns MiB: "before" them, and "peak"."""
    done = subprocess.run([sys.executable, *sys.argv, *words], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def peak() -> float:
    """Return the peak memory of this process in MiB; ru_maxrss would begin with that of the process that started it."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def measure_memory(args: argparse.Namespace) -> None:
    """Take three steps of the side of --alone, and print a line of JSON."""
    pair = Pair(args, [args.alone])
    batches, before = [pair.batch(number) for number in (1, 2, 3)], peak()
    for number, data in enumerate(batches, 1):
        pair.sides[args.alone].step(number, data)
    print(json.dumps({"before": before, "peak": peak()}))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--kair", metavar="PATH")
    which.add_argument("--taming", metavar="PATH")
    parser.add_argument("--steps", type=int, default=200, help="of the curves")
    parser.add_argument("--double", type=int, default=10, help="steps in float64")
    parser.add_argument("--speed", choices=["tiny", "small", "middle"], help="measure time and memory at this size")
    parser.add_argument("--rounds", type=int, default=40, help="of --speed")
    parser.add_argument("--seconds", type=float, default=100, help="after which --speed ends its rounds")
    parser.add_argument("--threads", type=int, help="of torch; default: its own choice")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="option of all sides")
    parser.add_argument("--alone", choices=["original", "shipped"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.kind, args.path = ("kair", args.kair) if args.kair else ("taming", args.taming)
    args.changes = values_in(args.set)
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        with original(args.kind, args.path):  # a mistake shows at once
            pass
        if args.alone:
            measure_memory(args)
            return 0
        print(f"{args.kind} {args.speed or 'tiny'}, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f} "
              f"on {os.cpu_count()} cores, torch {torch.__version__}", flush=True)
        if args.speed:
            given = args.changes
            for phase, changes in SIZES[args.kind]["phases"].items():
                print(phase, flush=True)
                args.changes = {**changes, **given}
                compare_speed(args)
        elif not check_in_float64(args):
            return 1
        else:
            compare_curves(args)
    except OptionError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
