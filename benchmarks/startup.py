"""Measure how long a program takes to start, against `python -c 'import torch'`, which it cannot do without.

    python benchmarks/startup.py [--rounds 5] [--quick]

help, mistake       `main.py --help`; an option that does not exist
first step          up to the start of the first step: options, data, network, optimizer, folder, first look
finished            the same command again after the last step

Each is a process of its own; they take turns within a round, and medians are compared. torch's optimizers import its
compiler when the first of them is built (torch._dynamo, with sympy), which takes as long as torch itself: "an
optimizer" is what a script that trains cannot do without.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from runtime.hooks import Hooks

MISTAKE = "train.total=1"
TORCH = "import torch"
OPTIMIZER = "import torch; torch.optim.Adam([torch.nn.Parameter(torch.ones(1))])"
SMALL = ("netG.embed_dims=[8,8,8,8,8,8,8,8]", "netG.num_heads=[2,2,2,2,2,2,2,2]", "netG.deformable_groups=2",
         "netG.img_size=[2,8,8]", "datasets.train.num_frame=2", "datasets.train.gt_size=32",
         "datasets.test.generated.gt_size=[32,32]")


def measure(words: list[str]) -> tuple[float, float]:
    """Run Python with these arguments. Returns the seconds on the clock, and of the processor, as the system counts."""
    began, before = time.perf_counter(), os.times()
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    after = os.times()
    if done.returncode != (2 if MISTAKE in words else 0):
        sys.exit(f"{' '.join(words)} failed:\n{done.stderr[-3000:]}")
    return time.perf_counter() - began, sum(after[2:4]) - sum(before[2:4])


class EndAtFirstStep(Hooks):
    """Ends a run where its first step would start."""

    def before_step(self, run: Any) -> None:
        raise SystemExit


def main() -> None:
    if sys.argv[1:2] == ["--start-only"]:
        import main as door  # slow to import, as it is for main.py

        door.program(sys.argv[2:], hooks=[EndAtFirstStep()])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one round, only of --help")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        vrt = ["-opt", "options/train_vrt.json", "--set", "train.total_iter=1"]
        small = [*vrt, *(word for key in SMALL for word in ("--set", key))]
        place = iter(f"{folder}/{n}" for n in range(10_000))
        done = ["main.py", *small, "--save_dir", f"{folder}/done"]
        runs = {
            "torch": lambda: ["-c", TORCH],
            "optimizer": lambda: ["-c", OPTIMIZER],
            "help": lambda: ["main.py", "--help"],
            "mistake": lambda: ["main.py", *vrt, "--set", MISTAKE],
            "first step, small VRT": lambda: [__file__, "--start-only", *small, "--save_dir", next(place)],
            "first step, default VRT": lambda: [__file__, "--start-only", *vrt, "--save_dir", next(place)],
            "finished": lambda: done,
        }
        if args.quick:
            runs = {name: runs[name] for name in ("torch", "help")}
        else:
            measure(done)
        seconds = defaultdict(list)
        for _ in range(1 if args.quick else args.rounds):
            for name, words in runs.items():
                seconds[name].append(measure(words()))
    clock, processor = ({name: statistics.median(pair[i] for pair in pairs) for name, pairs in seconds.items()}
                        for i in (0, 1))
    bases = [base for base in ("torch", "optimizer") if base in runs]
    print(f"{'':<24}{'clock':>9}{'processor':>12}   " + "  ".join(f"{'of ' + base:>9}  processor" for base in bases))
    for name in runs:
        ratios = (f"{times[name] / times[base]:9.2f}" for base in bases for times in (clock, processor))
        print(f"{name:<24}{clock[name]:7.2f} s {processor[name]:9.2f} s   {'  '.join(ratios)}")


if __name__ == "__main__":
    main()
