"""How long a training step takes, and where: data, forward, backward, optimizer.

    python benchmarks/step_time.py options/train_vrt.json [--steps 20] [--workers N] [--set KEY=VALUE ...]
    python benchmarks/step_time.py options/train_vrt.json --against straightforward [--middle] [--bf16]

Runs the recipe's own model on its own data, without logging, testing or saving. The phases of every step are timed
one by one (on CUDA with a synchronisation at each edge, so their sum is an upper bound); medians are printed, and the
share of the whole, which is what to compare between two versions: seconds on a shared machine are noisy.

--against straightforward (VRT) takes each step a second time, on a copy of the network with the same weights, the way
the original does it: see `straightforward`. The two take turns on the same data; the ratios, ours / straightforward,
are what to compare. --middle is a network of 48 channels on 4 frames of 48 x 48; --bf16 runs ours under autocast.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path
from types import MethodType

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from torch.profiler import profile
from torchvision.ops import deform_conv2d

import options
import train
from data import DATASETS
from data.loader import endless
from log.run_log import RunLog
from models import MODELS, NETWORKS
from models import network_vrt as vrt
from runtime import determinism

WARM_UP = 3  # the first steps allocate and choose kernels
PHASES = ("data", "forward", "backward", "optimizer")
MIDDLE = {
    "datasets.train.num_frame": 4, "datasets.train.gt_size": 192, "datasets.train.dataloader_batch_size": 1,
    "netG.img_size": [4, 48, 48], "netG.window_size": [2, 4, 4], "netG.depths": [4] * 7 + [2],
    "netG.embed_dims": [48] * 8, "netG.num_heads": [4] * 8, "netG.deformable_groups": 8,
}


class Stopwatch:
    """Adds up seconds by name within a step; nested phases are taken off the outer one."""

    def __init__(self, synchronize):
        self.synchronize, self.step, self.inner = synchronize, defaultdict(float), 0.0

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


# ---- the straightforward way -------------------------------------------------


def straightforward(model) -> None:
    """Switch in, on this model alone, what the original does; class by class it is what follows here.

    Frozen parameters (train.fix_keys) still get gradients, which nobody reads; and each step waits for its loss.
    """
    ways = {vrt.DeformableAlignment: align_frame_by_frame, vrt.WindowAttention: attend_plainly,
            vrt.Group: mask_each_time, vrt.FrameConv: conv_3d, vrt.LastConv: conv_3d}
    for module in model.netG.modules():
        if type(module) in ways:
            module.forward = MethodType(ways[type(module)], module)
        if isinstance(module, vrt.Stage):
            for block in module.residual_group2.blocks:
                block.checkpoint_attn = True
    model.netG._flows = MethodType(flow_one_way_then_the_other, model.netG)
    groups = [{**group, "fused": False, "foreach": False} for group in model.G_optimizer.param_groups]
    model.G_optimizer = model.optimizers["optimizerG"] = type(model.G_optimizer)(groups)
    model.update_E = MethodType(average_one_by_one, model)
    frozen, model.fixed, step = model.fixed, [], model.optimize_parameters

    def step_and_wait(iteration):
        model.unread = frozen if iteration < model.opt_train["fix_iter"] else []
        step(iteration)
        model.log_dict["G_loss"].item()

    def leave_unread(*_):
        for parameter in model.unread:
            parameter.grad = None

    model.G_optimizer.register_step_pre_hook(leave_unread)
    model.optimize_parameters = step_and_wait


def align_frame_by_frame(self, clip, flows):
    """DeformableAlignment with torchvision's kernel, one pair of frames of one direction at a time."""
    def align(clip, t):  # what follows frame t onto it
        sources = [clip[:, t + n] if t + n < clip.shape[1] else torch.zeros_like(clip[:, 0])
                   for n in range(1, self.num_sources + 1)]
        onto = [flow[:, t] if t < flow.shape[1] else torch.zeros_like(flow[:, 0]) for flow in self.one_way]
        warped = [vrt.warp_frames(source[:, None], flow[:, None])[:, 0] for source, flow in zip(sources, onto)]
        offset, modulation = self.conv_offset(torch.cat((*warped, clip[:, t], *onto), 1)).split(self.splits, dim=1)
        parts = (self.max_residue * offset.tanh()).chunk(self.num_sources, dim=1)
        offset = torch.cat([part + flow.flip(1).repeat(1, part.shape[1] // 2, 1, 1)
                            for part, flow in zip(parts, onto)], dim=1)
        return deform_conv2d(torch.cat(sources, 1), offset, self.weight, self.bias, padding=1,
                             mask=modulation.sigmoid())

    aligned = []
    for half, *self.one_way in zip(clip.chunk(2), *(flow.chunk(2) for flow in flows)):
        frames = [align(half, t) for t in range(clip.shape[1] - 1)]
        aligned.append(torch.stack((*frames, torch.zeros_like(frames[0])), dim=1))
    return torch.cat(aligned)


def attend_plainly(self, x, window, mask):
    """WindowAttention with indices made each time, and one frame after the other in mutual attention."""
    def attend(q, k, v, bias, mask):  # (B*K, h, N, C/h)
        scores = q * self.scale @ k.transpose(-2, -1)
        scores = scores if bias is None else scores + bias
        if mask is not None:
            scores = (scores.unflatten(0, (-1, len(mask))) + mask[:, None]).flatten(0, 1)
        return (scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2)

    def heads(qkv):
        return qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)

    shape, x = x.shape, x.flatten(0, 1)
    n = x.shape[1]
    index = vrt.relative_index(window).to(x.device).flatten()
    table = self.relative_position_bias_table
    if window != self.window:
        whole = vrt.relative_index(self.window).view(*self.window, *self.window)
        d, h, w = window
        index = whole[:d, :h, :w, :d, :h, :w].flatten().to(x.device)
    bias = table[index].view(n, n, -1).permute(2, 0, 1)
    out = attend(*heads(self.qkv_self(x)), bias, mask)
    if self.mutual:
        q, k, v = heads(self.qkv_mut(x + self.position_bias.repeat(1, 2, 1)))
        (q1, q2), (k1, k2), (v1, v2) = (t.chunk(2, dim=2) for t in (q, k, v))
        corner = None if mask is None else mask[:, : n // 2, : n // 2]
        other = torch.cat((attend(q2, k1, v1, None, corner), attend(q1, k2, v2, None, corner)), dim=1)
        out = torch.cat((other, out), dim=-1)
    return self.proj(out).view(shape)


def conv_3d(self, x, inner=None):
    """FrameConv as the 3D convolution it is in the file, all frames as one clip; LastConv after the other one."""
    x = x if inner is None else inner(x)
    return F.conv3d(x.transpose(0, 1)[None], self.weight, self.bias, padding=self.padding)[0].transpose(0, 1)


def mask_each_time(self, x):
    """Group with a mask made for each block."""
    size = tuple(x.shape[1:4])
    window = tuple(min(s, w) for s, w in zip(size, self.window))
    shift = tuple(w // 2 if s > w else 0 for s, w in zip(size, self.window))
    for i, block in enumerate(self.blocks):
        mask = None
        if i % 2 and any(shift):
            mask = vrt.shift_mask(vrt.shift_regions(size, window, shift, x.device), x)
        x = block(x, window, shift, mask)
    return x


def flow_one_way_then_the_other(self, clip):
    ways = [type(self)._flows(self, half) for half in clip.chunk(2)]
    return [[torch.cat(both) for both in zip(*scale)] for scale in zip(*ways)]


def average_one_by_one(self, decay=0.999):
    ours = dict(self.get_bare_model(self.netG).named_parameters())
    for name, kept in self.get_bare_model(self.netE).named_parameters():
        kept.data.mul_(decay).add_(ours[name].data, alpha=1 - decay)


# ---- the two side by side ----------------------------------------------------


def peak_memory(step, cuda: bool) -> int:
    """Bytes that torch holds at once during a step beyond what it held before, by its own account."""
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


def check_equal(model, data) -> None:
    """Take one step both ways on copies of the model, say how far they end apart, and stop if it is over 1e-5.

    In float64: Adam's first step turns rounding errors of gradients near zero into whole learning rates. And with
    the layers that start from zero drawn, since where flow is zero bilinear sampling has two derivatives.
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
        raise SystemExit("the two ways do not agree within 1e-5")


def under_autocast(model, device: str) -> None:
    forward = model.netG_forward

    def netG_forward():
        with torch.autocast(device, torch.bfloat16):
            forward()
        model.restored = model.restored.float()

    model.netG_forward = netG_forward


def watched(model, watch: Stopwatch):
    """The model's step as a function of data and iteration, its phases timed."""
    for optimizer in model.optimizers.values():
        optimizer.step = watch.timed(optimizer.step, "optimizer")
    model.update_E = watch.timed(model.update_E, "optimizer")

    def step(data, iteration):
        model.update_learning_rate(iteration - 1)
        model.feed_data(data)
        with watch.phase("forward"):
            model.optimize_parameters(iteration)

    return step


def report(title: str, steps: list[dict[str, float]]) -> None:
    """Print the medians of the phases and of the whole."""
    totals = [sum(step.values()) for step in steps]
    whole = statistics.median(totals)
    print(f"{title}: {whole:.3f} s a step (median of {len(steps)}, fastest {min(totals):.3f})")
    for name in PHASES:
        seconds = statistics.median(step[name] for step in steps)
        print(f"  {name:<10}{seconds:8.4f} s {100 * seconds / whole:5.1f} %")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("option_file")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--workers", type=int, help="instead of the file's dataloader_num_workers")
    parser.add_argument("--against", choices=["straightforward"])
    parser.add_argument("--middle", action="store_true")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    args = parser.parse_args()
    changes = [(k, v, "--middle") for k, v in MIDDLE.items()] if args.middle else []
    pairs = [text.partition("=") for text in args.set]
    changes += [(k, options.as_value(v), "--set") for k, _, v in pairs]
    opt, _ = options.parse(args.option_file, changes, MODELS, NETWORKS, DATASETS)
    determinism.prepare_machine(opt)
    run = train.Run(opt, RunLog())
    torch.backends.cudnn.benchmark = not opt["deterministic"]  # as in training
    run.restore(None)
    loader, device = opt["datasets"]["train"], run.model.device.type
    workers = loader["dataloader_num_workers"] if args.workers is None else args.workers
    watch = Stopwatch(torch.cuda.synchronize if device == "cuda" else lambda: None)
    real, torch.Tensor.backward = torch.Tensor.backward, watch.timed(torch.Tensor.backward, "backward")

    samples = endless(run.train_set, run.batches, workers, pinned=device == "cuda")
    fetch = watch.timed(lambda: next(samples), "data")
    models = {"ours": run.model}
    if args.against:
        check_equal(run.model, fetch())
        models[args.against] = copy.deepcopy(run.model)
        straightforward(models[args.against])
    if args.bf16:
        under_autocast(run.model, device)
    steps = {name: watched(model, watch) for name, model in models.items()}
    times = defaultdict(list)
    for iteration in range(1, args.steps + WARM_UP + 1):
        watch.step = defaultdict(float)
        data = fetch()
        fetching = watch.step["data"]
        for name, step in steps.items():
            watch.step = defaultdict(float, data=fetching)
            step(data, iteration)
            if iteration > WARM_UP:
                times[name].append(watch.step)
    if args.against:
        losses = [model.log_dict["G_loss"].item() for model in models.values()]
        print(f"losses after {iteration} steps: {losses[0]:.6f} {losses[1]:.6f}")

    print(f"{args.option_file}, {run.model.device}, {torch.get_num_threads()} threads, {workers} workers")
    for name in steps:
        report(name + (" (bf16)" if args.bf16 and name == "ours" else ""), times[name])
    if args.against:
        for phases in (PHASES, *((name,) for name in PHASES[1:])):  # of a step at a time, which noise hits alike
            ratios = [sum(a[p] for p in phases) / sum(b[p] for p in phases) for a, b in zip(*times.values())]
            print(f"  ratio {'step' if phases is PHASES else phases[0]:<10}{statistics.median(ratios):6.3f}")
        memory = []
        for name, model in models.items():
            for optimizer in model.optimizers.values():
                optimizer.zero_grad(set_to_none=True)
            memory.append(peak_memory(lambda name=name: steps[name](data, iteration + 1), device == "cuda"))
        print(f"  ratio {'memory':<10}{memory[0] / memory[1]:6.3f} (peak {memory[0] / 2**20:.0f} of "
              f"{memory[1] / 2**20:.0f} MiB that torch allocates within a step)")
    torch.Tensor.backward = real


if __name__ == "__main__":
    main()
