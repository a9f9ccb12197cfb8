"""Measure how long a training step takes, and where: data, forward, backward, optimizer.

    python benchmarks/step_time.py options/train_vrt.json [--steps 20] [--set KEY=VALUE ...]
    python benchmarks/step_time.py options/train_vrt.json --against straightforward [--bf16]
    python benchmarks/step_time.py options/train_vqgan.json --against straightforward

Runs the recipe's own model on its own data, without logging, testing or saving. The phases of every step are timed
one by one (on CUDA with a synchronisation at each edge, so their sum is an upper bound). It prints medians, and each
phase's share of the step, which is what to compare between two versions: seconds on a shared machine are noisy.

--against straightforward takes each step a second time, on a copy of the model with the same weights, as the original
program does it: see benchmarks/straightforward.py. The two take turns on the same data; the ratios, this project's time
divided by the other's, are what to compare. --bf16 runs this project's step in bfloat16. VQGAN's discriminator takes
part after train.lossconfig.disc_start only: measure both cases.
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch.profiler import profile

from benchmarks.common import WARM_UP, batches_of, build_run, parser_for, read_options, values_in
from benchmarks.straightforward import straightforward
from models.model_base import ModelBase
from models.network_vrt import VRT
from runtime import determinism

PHASES = ("data", "forward", "backward", "optimizer")


class Stopwatch:
    """Add up the seconds of timed functions, by phase."""

    def __init__(self, cuda: bool):
        self.wait = torch.cuda.synchronize if cuda else lambda: None
        self.seconds: dict[str, float] = defaultdict(float)

    def timed(self, function: Callable, phase: str) -> Callable:
        def call(*args, **kwargs):
            self.wait()
            began = time.perf_counter()
            result = function(*args, **kwargs)
            self.wait()
            self.seconds[phase] += time.perf_counter() - began
            return result

        return call


def timed_step(model: ModelBase, watch: Stopwatch) -> Callable[[Mapping[str, Any], int], dict[str, float]]:
    """Time the parts of this model's step. Returns the step: (data, iteration) -> seconds of each phase."""
    for optimizer in model.optimizers.values():
        optimizer.step = watch.timed(optimizer.step, "optimizer")
    model.update_E = watch.timed(model.update_E, "optimizer")
    model.backward = watch.timed(model.backward, "backward")
    optimize = watch.timed(model.optimize_parameters, "forward")

    def step(data: Mapping[str, Any], iteration: int) -> dict[str, float]:
        watch.seconds.clear()
        model.update_learning_rate(iteration - 1)
        model.feed_data(data)
        optimize(iteration)
        backward, optimizer = watch.seconds["backward"], watch.seconds["optimizer"]
        forward = watch.seconds["forward"] - backward - optimizer
        return {"forward": forward, "backward": backward, "optimizer": optimizer}

    return step


def check_equal(model: ModelBase, data: Mapping[str, Any]) -> None:
    """Take one step of VRT both ways, print how far the results differ, and exit if it is more than 1e-5.

    In float64: Adam's first step turns rounding errors of gradients near zero into full learning rates. The layers that
    start from zero are drawn at random, since bilinear sampling has two derivatives where the flow is zero.
    """
    pair = [copy.deepcopy(model)]
    if pair[0].netE is not None:
        pair[0].netE.double()
    for name, p in pair[0].netG.double().named_parameters():
        if "conv_offset.6" in name or name.endswith("basic_module.8.weight"):
            torch.nn.init.normal_(p, std=0.02)
    pair.append(copy.deepcopy(pair[0]))
    straightforward(pair[1])
    for one in pair:
        determinism.seed_generators(0)  # of every device, for stochastic depth
        one.feed_data({key: value.double() if torch.is_tensor(value) else value for key, value in data.items()})
        one.optimize_parameters(1)
    loss = abs(pair[0].log_dict["G_loss"] - pair[1].log_dict["G_loss"]).item()
    weights = max((a - b).abs().max().item() for a, b in zip(*(one.netG.parameters() for one in pair)))
    print(f"after one step in float64 the two differ by {loss:.1e} in loss, {weights:.1e} in weights")
    if max(loss, weights) > 1e-5:
        raise SystemExit("the two steps do not agree within 1e-5")


def peak_memory(step: Callable[[], Any], cuda: bool) -> int:
    """Return the most bytes that torch holds during a step beyond those before it, as torch counts them."""
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with profile(profile_memory=True) as record:
        step()
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def mean_of_rounds(steps: list[dict[str, float]], every: int) -> list[dict[str, float]]:
    """Average each round of `every` steps: VQGAN's discriminator makes one of them longer."""
    return [{phase: statistics.mean(step[phase] for step in steps[i : i + every]) for phase in PHASES}
            for i in range(0, len(steps), every)]


def report(title: str, steps: list[dict[str, float]]) -> None:
    """Print the medians of the phases and of the step."""
    totals = [sum(step.values()) for step in steps]
    median = statistics.median(totals)
    print(f"{title}: {median:.4f} s a step (median of {len(steps)}, fastest {min(totals):.4f})")
    for name in PHASES:
        seconds = statistics.median(step[name] for step in steps)
        print(f"  {name:<10}{seconds:8.4f} s {100 * seconds / median:5.1f} %")


def main() -> None:
    parser = parser_for(__doc__)
    parser.add_argument("--against", choices=["straightforward"])
    parser.add_argument("--bf16", action="store_true")
    args = parser.parse_args()
    opt = read_options(args.option_file, values_in(args.set))
    run = build_run(opt)
    cuda = run.model.device.type == "cuda"
    watch, models, times = Stopwatch(cuda), {"ours": run.model}, defaultdict(list)
    with batches_of(run) as samples, determinism.fastest_kernels(True):
        fetch = watch.timed(lambda: next(samples), "data")
        if args.against:
            if isinstance(run.model.netG, VRT):
                check_equal(run.model, fetch())
            models[args.against] = copy.deepcopy(run.model)
            straightforward(models[args.against])
        if args.bf16:
            run.model.opt_train["amp"] = "bf16"
        steps = {name: timed_step(model, watch) for name, model in models.items()}
        for iteration in range(1, args.steps + WARM_UP + 1):
            watch.seconds.clear()
            data = fetch()
            fetching = watch.seconds["data"]
            for name, step in steps.items():
                seconds = {"data": fetching, **step(data, iteration)}
                if iteration > WARM_UP:
                    times[name].append(seconds)

        print(f"{args.option_file}, {run.model.device}, {torch.get_num_threads()} threads")
        for name, found in times.items():
            times[name] = mean_of_rounds(found, opt["train"].get("disc_every", 1))
            report(name + (" (bf16)" if args.bf16 and name == "ours" else ""), times[name])
        if args.against:
            for title, phases in (("step", PHASES), *((phase, (phase,)) for phase in PHASES[1:])):
                # one step at a time, since noise changes both alike
                ratios = [sum(a[p] for p in phases) / sum(b[p] for p in phases) for a, b in zip(*times.values())]
                print(f"  ratio {title:<10}{statistics.median(ratios):6.3f}")
            memory = []
            for name, model in models.items():
                for optimizer in model.optimizers.values():
                    optimizer.zero_grad(set_to_none=True)
                memory.append(peak_memory(lambda name=name: steps[name](data, iteration + 1), cuda))
            print(f"  ratio {'memory':<10}{memory[0] / memory[1]:6.3f} (peak {memory[0] / 2**20:.0f} of "
                  f"{memory[1] / 2**20:.0f} MiB that torch allocates within a step)")


if __name__ == "__main__":
    main()
