"""Measure what a save and a load cost, as ratios to plain `torch.save` with fsync, and to `torch.load`.

    python benchmarks/checkpoint.py [--megabytes 260] [--rounds 9] [--folder /tmp]

split, bundle     commit (checksum, fsync, rename, fsync of the folder) in either layout, against torch.save with fsync
blocked           how long a save in the background blocks training
verified          find the newest set, verify every byte, load it, against torch.load without any check
memory            what the background save adds to the resident memory, in copies of the state (Linux)

The operations take turns within a round; medians are compared. Seconds depend on the disk and on its other users.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import checkpoint
from checkpoint import Layout, Saver
from storage import tree


def build_state(megabytes: float) -> dict:
    """Build a network's weights and Adam moments, in tensors of a megabyte, about as networks have them."""
    count = max(1, round(megabytes / 3))
    weights = {f"layer.{i}.weight": torch.randn(512, 512) for i in range(count)}
    moments = {i: {"step": torch.tensor(1.0), "exp_avg": torch.randn(512, 512), "exp_avg_sq": torch.rand(512, 512)}
               for i in range(count)}
    groups = [{"lr": 1e-4, "params": list(range(count))}]
    return {"G": weights, "optimizerG": {"state": moments, "param_groups": groups},
            "state": {"version": checkpoint.VERSION, "iteration": 1, "sampler_state": {}}}


def save_plainly(parts: dict, path: Path) -> None:
    """Save as a plain script does that forces its file to the disk: without it a save ends in the memory."""
    with open(path, "wb") as file:
        torch.save(parts, file)
        file.flush()
        os.fsync(file.fileno())


def resident() -> float:
    """Return the bytes of memory that this process holds."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=260)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--folder", help="where to write; the default is the system's temporary folder")
    args = parser.parse_args()
    parts, seconds = build_state(args.megabytes), defaultdict(list)
    size = tree.num_bytes(parts)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        plain, split, bundle, thread = (Path(folder) / name for name in ("plain", "split", "bundle", "thread"))
        for path in (plain, split, bundle, thread):
            path.mkdir()
        savers = {"split": Saver(split), "bundle": Saver(bundle, Layout("bundle")),
                  "blocked": Saver(thread, background=True)}
        before = resident()
        savers["blocked"].snapshot.take(parts)
        extra = (resident() - before) / size
        operations = {
            "torch.save": lambda n: save_plainly(parts, plain / f"{n}.pt"),
            **{name: lambda n, saver=saver: saver.save(n, parts, epoch=n) for name, saver in savers.items()},
            "torch.load": lambda n: torch.load(plain / f"{n}.pt", weights_only=True),
            "verified split": lambda n: checkpoint.find_newest(split).load(),
            "verified bundle": lambda n: checkpoint.find_newest(bundle).load(),
        }
        for n in range(1, args.rounds + 2):
            for name, operation in operations.items():
                os.sync()  # so that none waits for what another left in the cache
                began = time.perf_counter()
                operation(n)
                if n > 1:  # the first round allocates and warms up
                    seconds[name].append(time.perf_counter() - began)
                for saver in savers.values():
                    saver.wait()
                    saver.poll()
            (plain / f"{n}.pt").unlink()
            for models in (split, bundle, thread):  # not timed: torch.save removes nothing either
                checkpoint.prune(models, keep_last_n=1)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    print(f"{size / 1e6:.0f} MB in {len(parts['G']) * 4} tensors, {torch.get_num_threads()} threads, median of "
          f"{args.rounds} rounds")
    for name, median in medians.items():
        base = "torch.load" if "load" in name or "verified" in name else "torch.save"
        print(f"  {name:<18}{median:8.3f} s   {median / medians[base]:5.2f} of {base}")
    print(f"  {'memory':<18}{extra:8.2f} copies of the state in the background save's buffers")


if __name__ == "__main__":
    main()
