"""Measure how much faster several processes of this machine train, and model it for many nodes.

    python benchmarks/scaling.py options/train_vrt.json [--processes 1 2] [--steps 20] [--set KEY=VALUE ...]
    python benchmarks/scaling.py options/train_vrt.json --bandwidth 25 --latency 20 --nodes 1 2 4 8 16

Measured: steps of the recipe's own model on its own data, without logging, testing or saving. Each process has the
batch of the options (weak scaling: the total batch grows), or with --strong a share of it. Efficiency is samples per
second per process, relative to one process. On a CPU the processes share its cores, so give each the same number of
them for all counts (OMP_NUM_THREADS), and no more processes than cores.

Modelled: a step takes the time that one process measured here, and then the exchange of its gradients between N nodes
by recursive doubling: log2(N) times the gradients' bytes at the given bandwidth, and the given latency.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import WARM_UP, batches_of, build_run, parser_for, read_options, values_in
from runtime import distributed

KEY = "datasets.train.dataloader_batch_size"


def main() -> None:
    parser = parser_for(__doc__)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--strong", action="store_true", help="share the options' batch instead of growing it")
    parser.add_argument("--bandwidth", type=float, default=12.5, help="of a node, gigabytes a second (100 GbE: 12.5)")
    parser.add_argument("--latency", type=float, default=30.0, help="of a message, microseconds")
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    args = parser.parse_args()
    if "WORLD_SIZE" in os.environ:
        measure(args)
        return
    found = {}
    print(f"{'processes':>9} {'batch':>6} {'step':>10} {'samples/s':>10} {'speedup':>8} {'efficiency':>10}")
    for count in sorted({1, *args.processes}):
        found[count] = row = spawn(count)
        speed, alone = row["batch"] / row["seconds"], found[1]["batch"] / found[1]["seconds"]
        print(f"{count:>9} {row['batch']:>6} {row['seconds']:>8.4f} s {speed:>10.2f} {speed / alone:>8.2f} "
              f"{speed / alone / count:>9.0%}", flush=True)
    one = found[1]
    print(f"\none process: {one['seconds']:.4f} s a step, {one['bytes'] / 1e6:.1f} MB of gradients; agreeing on a stop "
          f"takes {1e6 * max(row['vote'] for row in found.values()):.0f} us a step")
    print(f"modelled at {args.bandwidth:g} GB/s and {args.latency:g} us a message:")
    print(f"{'nodes':>9} {'exchange':>12} {'step':>10} {'speedup':>8} {'efficiency':>10}")
    for nodes in args.nodes:
        reduce = math.log2(nodes) * (one["bytes"] / args.bandwidth / 1e9 + args.latency * 1e-6)
        step = one["seconds"] + reduce
        print(f"{nodes:>9} {reduce:>10.4f} s {step:>8.4f} s {nodes * one['seconds'] / step:>8.2f} "
              f"{one['seconds'] / step:>9.0%}")


def spawn(count: int, script: str = __file__) -> dict[str, Any]:
    """Start that many processes of a script with these arguments. Returns what they measured."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}", script]
    environment = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    done = subprocess.run([*command, *sys.argv[1:]], capture_output=True, text=True, env=environment)
    rows = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not rows:
        sys.exit(f"{count} processes failed:\n{done.stderr[-3000:]}")
    return json.loads(rows[-1])


def measure(args: argparse.Namespace) -> None:
    """Take steps as one of the processes; the main one prints a line of JSON."""
    distributed.start()
    changes = values_in(args.set)
    if not args.strong:
        batch = read_options(args.option_file, changes)["datasets"]["train"]["dataloader_batch_size"]
        changes[KEY] = batch * distributed.world_size()
    run = build_run(read_options(args.option_file, changes))
    seconds, votes = [], []
    with batches_of(run) as samples:
        for step in range(1, WARM_UP + args.steps + 1):
            began = time.perf_counter()
            run.fetch(samples)
            fetched = time.perf_counter()
            distributed.max_over_ranks(0)
            votes.append(time.perf_counter() - fetched)
            run.model.update_learning_rate(step - 1)
            run.model.optimize_parameters(step)
            float(next(iter(run.model.log_dict.values())))  # wait for the device
            seconds.append(time.perf_counter() - began)
    gradients = [p for network in run.model.networks.values() for p in network.parameters() if p.grad is not None]
    if distributed.is_main():
        print(json.dumps({"seconds": statistics.median(seconds[WARM_UP:]), "vote": statistics.median(votes[WARM_UP:]),
                          "batch": run.batches.batch_size,
                          "bytes": sum(p.numel() * p.element_size() for p in gradients)}), flush=True)
    distributed.finish()


if __name__ == "__main__":
    main()
