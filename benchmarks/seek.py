"""Measure the time to the first batch of a run that resumes in the middle of an epoch, against one from its start.

    python benchmarks/seek.py [--samples 1000000] [--rounds 5]

The data are drawn curves; a batch is computed when it is asked for, so only the place in the epoch differs.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import options
from benchmarks.common import read_options
from data import DATASETS
from data.loader import endless
from data.sampler import EndlessBatches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    section = read_options("options/train_inktrace.json",
                           {"datasets.train.num_samples": args.samples})["datasets"]["train"]
    size, seconds = section["dataloader_batch_size"], defaultdict(list)
    places = {"start": 0, "middle": args.samples // 2 // size * size}
    for _ in range(args.rounds):
        for name, offset in places.items():
            began = time.perf_counter()
            dataset = options.build(DATASETS, section, "dataset_type")
            batches = EndlessBatches(args.samples, size, seed=0, shuffle=True, position=(0, offset))
            with contextlib.closing(endless(dataset, batches, 0, pinned=False)) as samples:
                next(samples)
            seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    print(f"{args.samples} samples, batches of {size}, median of {args.rounds}")
    for name, offset in places.items():
        print(f"  {name:<8}{offset:>9} samples into the epoch {medians[name]:8.3f} s   "
              f"{medians[name] / medians['start']:5.2f} of start")


if __name__ == "__main__":
    main()
