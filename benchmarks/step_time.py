"""How long a training step takes, and where: data, forward, backward, optimizer.

    python benchmarks/step_time.py options/train_vrt.json [--steps 20] [--workers N] [--set KEY=VALUE ...]

Runs the recipe's own model on its own data, without logging, testing or saving. The phases of every step are timed
one by one (on CUDA with a synchronisation at each edge, so their sum is an upper bound); medians are printed, and the
share of the whole, which is what to compare between two versions: seconds on a shared machine are noisy.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

import options  # noqa: E402
import train  # noqa: E402
from data import DATASETS  # noqa: E402
from data.loader import endless  # noqa: E402
from log import RunLog  # noqa: E402
from models import MODELS, NETWORKS  # noqa: E402


class Stopwatch:
    """Adds up seconds by name within a step; nested phases are taken off the outer one."""

    def __init__(self, synchronize):
        self.synchronize, self.step, self.all, self.inner = synchronize, defaultdict(float), [], 0.0

    @contextmanager
    def phase(self, name):
        outer, self.inner = self.inner, 0.0
        self.synchronize()
        began = time.perf_counter()
        yield
        self.synchronize()
        spent = time.perf_counter() - began
        self.step[name] += spent - self.inner
        self.inner = outer + spent

    def timed(self, function, name):
        def call(*args, **kwargs):
            with self.phase(name):
                return function(*args, **kwargs)

        return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("option_file")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--workers", type=int, help="instead of the file's dataloader_num_workers")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    args = parser.parse_args()
    pairs = [text.partition("=") for text in args.set]
    opt, _ = options.parse(args.option_file, [(k, options.as_value(v), "--set") for k, _, v in pairs],
                           MODELS, NETWORKS, DATASETS)
    train.prepare_machine(opt)
    run = train.Run(opt, RunLog())
    run.restore(None, None)
    model, loader = run.model, opt["datasets"]["train"]
    workers = loader["dataloader_num_workers"] if args.workers is None else args.workers

    watch = Stopwatch(torch.cuda.synchronize if "cuda" in opt["device"] else lambda: None)
    torch.Tensor.backward = watch.timed(torch.Tensor.backward, "backward")
    for optimizer in model.optimizers.values():
        optimizer.step = watch.timed(optimizer.step, "optimizer")
    model.update_E = watch.timed(model.update_E, "optimizer")
    samples = endless(run.train_set, run.batches, workers, pinned="cuda" in opt["device"])
    fetch = watch.timed(lambda: next(samples), "data")
    for step in range(1, args.steps + 4):
        watch.step = defaultdict(float)
        model.update_learning_rate(step - 1)
        data = fetch()
        model.feed_data(data)
        with watch.phase("forward"):
            model.optimize_parameters(step)
        if step > 3:  # the first ones allocate and choose kernels
            watch.all.append(watch.step)

    totals = [sum(step.values()) for step in watch.all]
    whole = statistics.median(totals)
    print(f"{args.option_file}: {whole:.3f} s a step (median of {args.steps}, fastest {min(totals):.3f}), "
          f"{opt['device']}, {torch.get_num_threads()} threads, {workers} workers")
    for name in ("data", "forward", "backward", "optimizer"):
        seconds = statistics.median(step[name] for step in watch.all)
        print(f"  {name:<10}{seconds:8.4f} s {100 * seconds / whole:5.1f} %")


if __name__ == "__main__":
    main()
