"""Measure this project's step, a fixed tree over micro-batches, against torch's DistributedDataParallel.

    python benchmarks/against_ddp.py options/train_vrt.json [--processes 1 2 4] [--steps 20] [--set KEY=VALUE ...]
    python benchmarks/against_ddp.py options/train_vqgan.json --set train.lossconfig.disc_start=0

Each process has the batch of the options, and one thread. A copy of the model with the same weights takes each step a
second time, on the same data, in the usual loop: forward and backward pass of each micro-batch in
DistributedDataParallel (no_sync but for the last one), an all-reduce of codebook counts, clipping where the options ask
for it, optimizers, moving average; with one process the same without the wrapper. The two take turns.

A step is as long as that of its slowest process, and `ratio` is the median over pairs of steps, this project's time
divided by the other's. Where other programs share the cores, two more ratios are less disturbed: of the fastest step of
each way, and of the processor time of all processes, which leaves out waiting.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from benchmarks.common import WARM_UP, batches_of, build_run, parser_for, read_options, values_in
from benchmarks.scaling import KEY, spawn
from models.model_base import ModelBase
from models.model_vqgan import ModelVQGAN
from runtime import distributed


def main() -> None:
    parser = parser_for(__doc__)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    args = parser.parse_args()
    if "WORLD_SIZE" in os.environ:
        measure(args)
        return
    print(f"{args.option_file}, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    print(f"{'processes':>9} {'micro-batches':>13} {'ours':>10} {'usual loop':>10} {'ratio':>6} {'quartiles':>13} "
          f"{'fastest':>7} {'cpu':>6}")
    for count in args.processes:
        row = spawn(count, __file__)
        low, middle, high = row["quartiles"]
        print(f"{count:>9} {row['micro_batches']:>13} {row['ours']:>8.4f} s {row['usual']:>8.4f} s {middle:>6.3f} "
              f"{low:>6.3f} {high:>6.3f} {row['fastest']:>7.3f} {row['cpu']:>6.3f}",
              flush=True)


def usual_step(model: ModelBase) -> Callable[[int], None]:
    """Return the step of the usual loop for this model, whose networks it wraps."""
    size, wrapped = distributed.world_size(), []
    if size > 1:
        # without broadcast_buffers: as with a GAN, whose discriminator runs several times before a backward pass
        wrap = lambda network: DistributedDataParallel(network, broadcast_buffers=False)  # noqa: E731
        model.forward_G = wrap(model.forward_G)
        wrapped.append(model.forward_G)
        if isinstance(model, ModelVQGAN):
            model.loss.discriminator = wrap(model.netD)
            wrapped.append(model.loss.discriminator)
    share = distributed.num_micro_batches(model.opt_train["accumulate"]) // size

    def step(number: int) -> None:
        model.begin_step(number)
        batch, counts = {name: getattr(model, name) for name in model.batch}, []
        for optimizer in model.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        for part in range(share):
            for name, rows in batch.items():
                setattr(model, name, rows.chunk(share)[part])
            with contextlib.ExitStack() as stack:
                for network in wrapped if part < share - 1 else ():
                    stack.enter_context(network.no_sync())
                losses, terms = model.losses(number)
                for label, loss in losses.items():
                    (loss / share).backward(inputs=model.parameters_of(label))
            found = model.counts()
            counts = [a + b for a, b in zip(counts, found)] if counts else found
        for count in counts if size > 1 else ():
            dist.all_reduce(count)
        for label in losses:
            if clip := model.opt_train[f"{label.removeprefix('optimizer')}_optimizer_clipgrad"]:
                torch.nn.utils.clip_grad_norm_(model.parameters_of(label), clip)
            model.optimizers[label].step()
        model.log_dict = {name: term.detach() for name, term in terms.items()}
        model.finish_step(number, counts)
        if "E" in model.networks:
            model.update_E(model.opt_train["E_decay"])

    return step


def measure(args: argparse.Namespace) -> None:
    """Take steps both ways as one of the processes; the main one prints a line of JSON."""
    distributed.start()
    changes = {**values_in(args.set), "num_threads": 1}
    batch = read_options(args.option_file, changes)["datasets"]["train"]["dataloader_batch_size"]
    run = build_run(read_options(args.option_file, {**changes, KEY: batch * distributed.world_size()}))
    models = {"ours": run.model, "usual": copy.deepcopy(run.model)}
    steps = {"ours": run.model.optimize_parameters, "usual": usual_step(models["usual"])}
    clocks = {"wall": time.perf_counter, "cpu": time.process_time}
    spent = {(clock, name): [] for clock in clocks for name in steps}
    every = run.opt["train"].get("disc_every", 1)  # steps of a round: VQGAN's discriminator makes one of them longer
    with batches_of(run) as samples:
        for number in range(1, (WARM_UP + args.steps) * every + 1):
            data = next(samples)
            for name in sorted(steps, reverse=bool(number % 2)):
                models[name].update_learning_rate(number - 1)
                models[name].feed_data(data)
                distributed.max_over_ranks(0)  # all begin together
                began = {clock: read() for clock, read in clocks.items()}
                steps[name](number)
                for clock, read in clocks.items():
                    spent[clock, name].append(read() - began[clock])
            if number == 1:
                check_equal(*models.values())
    rounds, first = {}, WARM_UP * every
    for (clock, name), found in spent.items():
        ranks = zip(*distributed.gather(found))
        times = [max(one) if clock == "wall" else sum(one) for one in ranks]
        rounds[clock, name] = [statistics.mean(times[i : i + every]) for i in range(first, len(times), every)]
    if distributed.is_main():
        ratios = {clock: [ours / usual for ours, usual in zip(rounds[clock, "ours"], rounds[clock, "usual"])]
                  for clock in clocks}
        print(json.dumps({name: statistics.median(rounds["wall", name]) for name in steps}
                         | {"quartiles": quartiles(ratios["wall"]), "cpu": statistics.median(ratios["cpu"]),
                            "fastest": min(rounds["wall", "ours"]) / min(rounds["wall", "usual"]),
                            "micro_batches": run.micro_batches}), flush=True)
    distributed.finish()


def quartiles(values: list[float]) -> list[float]:
    """Return the quartiles of some values, or of one."""
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else 3 * values


def check_equal(ours: ModelBase, usual: ModelBase) -> None:
    """Exit where the gradients of both ways differ by more than rounding, as their first moments show."""
    for label, optimizer in ours.optimizers.items():
        pairs = list(zip(optimizer.state.values(), usual.optimizers[label].state.values()))
        if pairs:
            a, b = (torch.cat([pair[i]["exp_avg"].flatten() for pair in pairs]) for i in (0, 1))
            if (a - b).norm() > 1e-4 * a.norm():
                raise SystemExit(f"the gradients of the two ways differ by {(a - b).norm() / a.norm():.1e}")


if __name__ == "__main__":
    main()
