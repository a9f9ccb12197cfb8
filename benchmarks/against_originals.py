"""Train the original programs and this one side by side: equal curves, and the ratios of time and memory.

    python benchmarks/against_originals.py --kair PATH            a checkout of github.com/cszn/KAIR
    python benchmarks/against_originals.py --taming PATH          a checkout of github.com/CompVis/taming-transformers
    python benchmarks/against_originals.py --kair PATH --speed small     or middle; in turns, and memory

The originals' own networks, losses and models are imported from PATH (tests/originals.py); einops must be installed.
Packages that they only import (cv2, pytorch_lightning, omegaconf, ...) are replaced by empty ones. All start from the
original's weights and see the same batches:

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
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor
from torch.utils.data import default_collate

from benchmarks.common import read_options, values_in
from data import DATASETS
from metrics.psnr_ssim import psnr
from models import MODELS
from options import OptionError, Section, build
from tests.originals import KNOWN, Kair, Ours, Perceptual, Taming, original

LIMITS = 1e-11, 1e-8  # relative, in float64: of losses; of weights, whose smallest gradients Adam makes large
MARKS = (1, 10, 30, 60, 100, 150, 200)


def options_of(args: argparse.Namespace, switched: Mapping[str, Any]) -> Section:
    """Return the options of ours for the size and --set of the command line, and for switches."""
    file, known = {"kair": "train_vrt", "taming": "train_vqgan"}[args.kind], KNOWN[args.kind]
    return read_options(f"options/{file}.json", {"train.total_iter": args.steps, "device": "cpu", **known["all"],
                                                 **known[args.speed or "tiny"], **switched, **args.changes})


def relative(a: float, b: float) -> float:
    """Return the difference of a and b divided by the larger one; 0 where both are 0."""
    return abs(a - b) / max(abs(a), abs(b), 1e-300)


def worst_tensor(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> tuple[float, str]:
    """Return the largest difference of two states divided by the tensor's largest value, and the tensor's name."""
    return max((((a[name] - b[name]).abs().max() / b[name].abs().max().clamp(min=1e-6)).item(), name) for name in b)


def tensors_of(side: Any) -> dict[str, Tensor]:
    """Return the parameters, and the floating-point buffers, of all networks of one side by name."""
    return {f"{label}.{name}": value for label, network in side.networks.items()
            for name, value in network.state_dict().items() if value.is_floating_point()}


# ---------------------------------------------------------------- what is measured


class Sides:
    """The sides of a comparison by name, which start from equal weights, and their batches.

    Args:
        args: of the command line.
        names: sides to build, of "original", "twin", "ours", "shipped".
        dtype: floating-point type of all.
    """

    def __init__(self, args: argparse.Namespace, names: Sequence[str], dtype: torch.dtype = torch.float32):
        kind, weights, self.dtype, self.sides = args.kind, {}, dtype, {}
        early = {**KNOWN[kind]["early"], "train.total_iter": args.double} if dtype == torch.float64 else {}
        self.opt = options_of(args, early)
        self.train_set = build(DATASETS, self.opt["datasets"]["train"], "dataset_type")
        for name in names:
            switched = KNOWN[kind]["switches"] if name == "ours" else {}
            opt = options_of(args, {**early, **switched})
            torch.manual_seed(0)
            if name in ("original", "twin"):
                side = {"kair": Kair, "taming": Taming}[kind](opt, args.path)
            else:
                if switched and kind == "taming":  # taming counts finished batches
                    opt["train"]["lossconfig"]["disc_start"] += 1
                with mock.patch.dict(MODELS, {"vqgan": "tests.originals:TwoPasses"} if switched else {}):
                    side = Ours(opt)
            if kind == "taming" and not args.speed:
                side.model.loss.perceptual_loss, side.model.loss.perceptual_weight = Perceptual(), 1.0
            for network in side.networks.values():
                network.to(dtype)
            state = tensors_of(side)
            weights = weights or {key: value.clone() for key, value in state.items()}
            assert state.keys() == weights.keys(), sorted(state.keys() ^ weights.keys())
            eps, draw = torch.finfo(dtype).eps * (name == "twin"), torch.Generator().manual_seed(2)
            for key, value in state.items():
                units = torch.randint(-1, 2, value.shape, generator=draw, dtype=dtype)
                value.detach().copy_(weights[key] * (1 + eps * units))
            self.sides[name] = side

    def step(self, number: int) -> dict[str, dict[str, float]]:
        """Take a step of all sides, in an order that changes, and return their losses and "seconds"."""
        data, found = self.batch(number), {}
        for name in sorted(self.sides, reverse=bool(number % 2)):
            start = time.perf_counter()
            found[name] = self.sides[name].step(number, data)
            found[name] |= {"seconds": time.perf_counter() - start}
        return found

    def batch(self, number: int) -> dict[str, Tensor]:
        """Return the batch of a step."""
        size, length = self.opt["datasets"]["train"]["dataloader_batch_size"], len(self.train_set)
        return self.in_type([self.train_set[divmod(number * size + i, length)] for i in range(size)])

    def in_type(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return clips L and H, or pictures H (B, D, H, W, C) uint8 and "image" (B * D, C, H, W) in [-1, 1]."""
        found = {key: value for key, value in default_collate(samples).items() if key in ("L", "H")}
        if found["H"].dtype == torch.uint8:
            return {**found, "image": found["H"].flatten(0, -4).permute(0, 3, 1, 2).to(self.dtype) / 127.5 - 1}
        return {key: value.to(self.dtype) for key, value in found.items()}

    def scores(self) -> dict[str, float]:
        """Return the PSNR of all sides for the first sample of the test set, rounded to 8 bits."""
        sample = self.in_type([build(DATASETS, self.opt["datasets"]["test"], "dataset_type")[0, 0]])
        target = (sample["image"] + 1) / 2 if "image" in sample else sample["H"][0]
        return {name: psnr(*(x.clamp(0, 1).mul(255).round() for x in (side.restore(sample), target))).mean().item()
                for name, side in self.sides.items()}


@contextlib.contextmanager
def all_of_one_type() -> Iterator[None]:
    """Let `float()`, which promotes half precision, leave float64 alone, so that a step has one type throughout."""
    promote = Tensor.float
    with mock.patch.object(Tensor, "float", lambda x: x if x.dtype == torch.float64 else promote(x)):
        yield


def check_in_float64(args: argparse.Namespace) -> bool:
    """Take steps of `ours` and the original in float64, print how far they part, and tell whether it is rounding."""
    both, loss, weight = Sides(args, ["original", "ours"], torch.float64), 0.0, 0.0
    for number in range(1, args.double + 1):
        with all_of_one_type():
            found = both.step(number)
        theirs, ours = found["original"], found["ours"]
        loss = max([loss, *(relative(ours.get(key, 0.0), theirs[key]) for key in theirs if key != "seconds")])
        far, name = worst_tensor(*(tensors_of(both.sides[name]) for name in ("ours", "original")))
        weight = max(weight, far)
        if loss > LIMITS[0] or far > LIMITS[1]:
            print(f"float64: they part in step {number}: losses {ours} and {theirs}; {name} differs by {far:.1e}")
            return False
    print(f"float64, {args.double} steps: losses differ by {loss:.1e}, tensors of weights by {weight:.1e} at most")
    return True


def compare_curves(args: argparse.Namespace) -> None:
    """Train all sides in float32, and print how far their losses part from the original's, and PSNR."""
    all_sides = Sides(args, ["original", "twin", "ours", "shipped"])
    curves = [all_sides.step(number) for number in range(1, args.steps + 1)]
    scores, marks = all_sides.scores(), [mark for mark in MARKS if mark < args.steps] + [args.steps]
    print("\n| | loss | " + " | ".join(f"{mark} steps" for mark in marks) + " | PSNR |")
    print("|---" * (len(marks) + 3) + "|")
    for term in [key for key in curves[0]["original"] if key != "seconds"]:
        for name in scores:
            far = [relative(step[name].get(term, 0.0), step["original"][term]) for step in curves]
            cells = [f"{max(far[:mark]):.1e}" for mark in marks]
            print(f"| {name} | {term} | {' | '.join(cells)} | {scores[name]:.3f} |")
    print("\nG_loss of the original: " + ", ".join(f"{curves[mark - 1]['original']['G_loss']:.5f}" for mark in marks))


def compare_speed(args: argparse.Namespace) -> None:
    """Time the original's step and the shipped one in turns, and print the ratios, also of the peak memory."""
    both, times, began = Sides(args, ["original", "shipped"]), [], time.monotonic()
    every = both.opt["train"].get("disc_every", 1)  # the steps of a round: the discriminator makes one of them longer
    while len(times) < (1 + args.rounds) * every and time.monotonic() - began < args.seconds:
        times.append(both.step(len(times) + 1))
    rounds = [times[i : i + every] for i in range(every, len(times) - every + 1, every)]  # the first one allocates
    if not rounds:
        raise OptionError(f"--seconds {args.seconds:g}: too short for a round; raise it")
    ours, theirs = ([statistics.mean(step[name]["seconds"] for step in one) for one in rounds]
                    for name in ("shipped", "original"))
    ratios = sorted(a / b for a, b in zip(ours, theirs))
    print(f"  step {statistics.median(ours):.3f} s of {statistics.median(theirs):.3f} s, ratio "
          f"{statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f} in {len(ratios)} rounds)", flush=True)
    words = [f"--set={key}={json.dumps(value)}" for key, value in args.changes.items()]
    (before, ours), (before_theirs, theirs) = (json.loads(subprocess.run(
        [sys.executable, *sys.argv, *words, "--alone", name], check=True, stdout=subprocess.PIPE, text=True).stdout)
        for name in ("shipped", "original"))
    print(f"  memory that three steps add {ours - before:.0f} of {theirs - before_theirs:.0f} MiB, ratio "
          f"{(ours - before) / (theirs - before_theirs):.3f}; whole processes {ours / theirs:.3f}", flush=True)


def measure_memory(args: argparse.Namespace) -> None:
    """Take three steps of the side of --alone, and print the peak memory before and after them in MiB."""
    def peak() -> float:  # ru_maxrss would begin with that of the process that started this one
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024

    side = Sides(args, [args.alone])
    side.batch(1)
    before = peak()
    for number in (1, 2, 3):
        side.step(number)
    print(json.dumps([before, peak()]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--kair", metavar="PATH")
    which.add_argument("--taming", metavar="PATH")
    parser.add_argument("--speed", choices=["tiny", "small", "middle"], help="measure time and memory at this size")
    for name, default, meaning in (("steps", 200, "of the curves"), ("double", 10, "steps in float64"),
                                   ("rounds", 40, "of --speed"), ("seconds", 100, "of all rounds, at most"),
                                   ("threads", 0, "of torch; 0: its own choice")):
        parser.add_argument(f"--{name}", type=int, default=default, help=meaning)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="option of all sides")
    parser.add_argument("--alone", choices=["original", "shipped"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.kind, args.path = ("kair", args.kair) if args.kair else ("taming", args.taming)
    given = args.changes = values_in(args.set)
    torch.set_num_threads(args.threads or torch.get_num_threads())
    try:
        with original(args.kind, args.path):  # a mistake shows at once
            pass
        if args.alone:
            measure_memory(args)
            return 0
        print(f"{args.kind} {args.speed or 'tiny'}, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f} "
              f"on {os.cpu_count()} cores, torch {torch.__version__}", flush=True)
        for phase, changes in KNOWN[args.kind]["phases"].items() if args.speed else ():
            print(phase, flush=True)
            args.changes = {**changes, **given}
            compare_speed(args)
        if not args.speed:
            if not check_in_float64(args):
                return 1
            compare_curves(args)
    except OptionError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
