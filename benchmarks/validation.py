"""Measure how much of a validation its metrics take, on a drawn 720p clip.

    python benchmarks/validation.py [--frames 3] [--rounds 3] [--size 720 1280]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import build_run, read_options
from benchmarks.step_time import Stopwatch
from data.loader import clips_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", type=int, nargs=2, default=[720, 1280], metavar=("HEIGHT", "WIDTH"))
    args = parser.parse_args()
    drawn = {"num_clips": 1, "num_frame": args.frames, "gt_size": args.size}
    run = build_run(read_options("options/train_vrt.json", {"datasets.test.generated": drawn}))
    model, shares, per_frame = run.model, [], []
    watch = Stopwatch(model.device.type == "cuda")
    model.metrics = watch.timed(model.metrics, "metrics")
    (clip,) = clips_of(run.test_sets["test"])
    for _ in range(args.rounds):
        watch.seconds.clear()
        began = time.perf_counter()
        model.validate(clip)
        shares.append(watch.seconds["metrics"] / (time.perf_counter() - began))
        per_frame.append(watch.seconds["metrics"] / args.frames)
    print(f"{args.frames} frames of {args.size[1]} x {args.size[0]}, VRT's default network, median of {args.rounds}")
    print(f"  metrics {statistics.median(shares):6.1%} of the validation, {statistics.median(per_frame):.4f} s a frame")


if __name__ == "__main__":
    main()
