"""Check on a CUDA device what only a CUDA device can show, and measure what depends on it.

    bash benchmarks/gpu.sh                        # everything, about eight minutes on an H100
    bash benchmarks/gpu.sh attention fit          # only these sections
    bash benchmarks/gpu.sh --cpu                  # what has a CPU form, on small networks

Sections, in order: prove (every recipe resumes exactly, saving in the background), optimizer (another program's state
steps), snapshot (a background save holds what it should, and how long training stands still), attention (kernels, time,
memory), fit (VRT 001: time and memory of a step), step (the same against the straightforward way), world (NCCL in a
world of one), amp (half precision in every recipe), saves (a run that saves all the time), compile (on and off).

Every finding is printed at once and again in a table at the end. It either has to hold, or has an aim, or only informs.
The exit code is 0 if all that has to hold holds, 1 if not, 2 where there is no CUDA device.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic kernels need

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

import checkpoint
import losses.stroke
import losses.tanimoto
import options
import train
from data import DATASETS
from data.loader import endless
from models import MODELS, NETWORKS
from models import network_vrt as vrt
from models.model_base import ModelBase
from runtime import determinism, distributed
from storage import tree

VRT_001 = "options/vrt/001_train_vrt_videosr_bi_reds_6frames.json"
RECIPES = {
    "vrt": ["-opt", "options/train_vrt.json"],
    "vqgan": ["-opt", "options/train_vqgan.json", "--set", "train.lossconfig.disc_start=1", "--set",
              "train.disc_every=2"],
    "vqvae": ["-opt", "options/train_vqvae.json"],
    "lgt": ["-opt", "options/train_lgt.json"],
    "segmentation": ["-opt", "options/train_segmentation.json"],
    "inktrace": ["-opt", "options/train_inktrace.json", "--stage", "structural"],
    "inktrace_dense": ["-opt", "options/train_inktrace.json", "--stage", "dense"],
}
NO_DATA = {f"datasets.{part}.dataroot_{kind}": None for part in ("train", "test") for kind in ("gt", "lq")}
PLAIN_RUN = {"path.models": None, "train.total_epochs": None, "train.save_interval": None, "train.eval_interval": None,
             "train.checkpoint_test": 10**6}  # as short as the other keys say


@dataclass
class Finding:
    """One row of the table."""

    section: str
    what: str
    value: str
    holds: bool | None = None  # None: for information
    aim: bool = False  # whether missing it leaves the exit code alone


@dataclass
class Machine:
    """What the checks run on: a card, or with --cpu small networks on the CPU."""

    cuda: bool
    recipes: Sequence[str]
    seconds: float  # that a section may begin further measurements in

    @property
    def device(self) -> str:
        return "cuda:0" if self.cuda else "cpu"

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def measure(self, step: Callable[[], Any], warm_up: int = 2, count: int = 3) -> tuple[float, float]:
        """Milliseconds of a step, and the most bytes that torch holds in it; nan on the CPU, where one step does."""
        if not self.cuda:
            warm_up, count = 0, 1
        for _ in range(warm_up):
            step()
        self.wait()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        for _ in range(count):
            step()
        self.wait()
        return ((time.perf_counter() - began) / count * 1e3,
                torch.cuda.max_memory_allocated() if self.cuda else math.nan)


# ---------------------------------------------------------------- in processes of their own


def launch(words: Sequence[str], seconds: float = 240) -> tuple[int, str]:
    """Run a Python program of the repository. Returns its exit code and what it printed."""
    try:
        done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return 124, f"error: took longer than {seconds:.0f} s"
    return done.returncode, done.stdout + done.stderr


def run_main(name: str, changes: dict[str, Any], *words: str) -> tuple[int, str]:
    """`main.py` with a recipe of RECIPES and these options."""
    sets = [word for key, value in changes.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    return launch(["main.py", *RECIPES[name], *words, *sets])


def last_lines(text: str, pattern: str, count: int = 1) -> str:
    """Of what a program printed the last lines that match, else its last line."""
    lines = text.strip().splitlines()
    return " / ".join([line for line in lines if re.search(pattern, line)][-count:] or lines[-1:])[:150]


def at_once(function: Callable[..., Finding], tasks: Sequence[tuple]) -> Iterator[Finding]:
    """Findings of tasks that run side by side, in their order."""
    with ThreadPoolExecutor(16) as pool:
        yield from pool.map(lambda task: function(*task), tasks)


def prove(machine: Machine) -> Iterator[Finding]:
    changes = {"checkpoint.async": True, "num_threads": 2, "device": machine.device, "deterministic": machine.cuda}

    def one(name: str) -> Finding:
        code, text = run_main(name, changes, "--prove-resume", "6" if machine.cuda else "2")
        return Finding("prove", name, last_lines(text, "^(exact|differs|because|error)", 3), code == 0)

    yield from at_once(one, [(name,) for name in machine.recipes])


def amp(machine: Machine) -> Iterator[Finding]:
    def one(folder: str, name: str, kind: str | None) -> Finding:
        steps = 40 if machine.cuda else 2
        code, text = run_main(name, {**PLAIN_RUN, "train.amp": kind, "task": f"{name}_{kind}", "path.root": folder,
                                     "train.total_iter": steps, "train.checkpoint_print": steps,
                                     "device": machine.device})
        return Finding("amp", f"{name} {kind or 'float32'}", last_lines(text, "^iter|^error"), code == 0)

    with tempfile.TemporaryDirectory() as folder:
        yield from at_once(one, [(folder, name, kind) for name in machine.recipes for kind in (None, "bf16", "fp16")])


def saves(machine: Machine) -> Iterator[Finding]:
    steps = 60 if machine.cuda else 4
    with tempfile.TemporaryDirectory() as folder:
        code, text = run_main(machine.recipes[0], {
            **PLAIN_RUN, "task": "saves", "path.root": folder, "train.total_iter": steps, "checkpoint.async": True,
            "train.checkpoint_save": steps // 4, "train.checkpoint_print": steps, "device": machine.device})
    found = re.findall(r"^saved .* in ([\d.]+) s, ([\d.]+) s of it waited for", text, re.MULTILINE)
    whole, waited = (", ".join(column) for column in zip(*found)) if found else ("", "")
    value = f"{len(found)} of 4 in {whole} s, waited {waited} s"
    yield Finding("saves", f"{machine.recipes[0]} in the background", value if found else last_lines(text, "^error"),
                  code == 0 and len(found) == 4)


def compiled(machine: Machine) -> Iterator[Finding]:
    def one(folder: str, name: str, on: bool) -> Finding:
        steps = 200 if machine.cuda else 2
        code, text = run_main(name, {**PLAIN_RUN, "train.compile": on, "task": f"{name}_{on}", "path.root": folder,
                                     "train.total_iter": steps, "train.checkpoint_print": max(1, steps // 2),
                                     "device": machine.device})
        return Finding("compile", f"{name} {'on' if on else 'off'}", last_lines(text, "^iter|^error"), code == 0)

    names = [name for name in ("lgt", "segmentation", "vqgan") if name in machine.recipes]
    with tempfile.TemporaryDirectory() as folder:
        yield from at_once(one, [(folder, name, on) for name in names for on in ((True, False) if machine.cuda
                                                                                else (False,))])


def step(machine: Machine) -> Iterator[Finding]:
    """The straightforward way is always float32."""
    file = VRT_001 if machine.cuda else "options/train_vrt.json"
    changes = {**NO_DATA, "netG.spynet_path": None, "netG.drop_path_rate": 0.0, "train.fix_iter": 0,
               "datasets.train.dataloader_batch_size": 1, "device": machine.device}
    words = [word for key, value in changes.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    for kind, more in (("float32", []), ("bf16", ["--bf16"])):
        code, text = launch(["benchmarks/step_time.py", file, "--steps", "6" if machine.cuda else "1", "--against",
                             "straightforward", *more, *words])
        found = {name: float(value) for name, value in re.findall(r"ratio (\w+) +([\d.]+)", text)}
        value = ", ".join(f"{name} {ratio:.3f}" for name, ratio in found.items()) or last_lines(text, "rror")
        yield Finding("step", f"{kind} / straightforward", value, code == 0)
        if found and kind == "bf16" and machine.cuda:
            yield Finding("step", "bf16 step at most 0.33", f"{found['step']:.3f}", found["step"] <= 0.33, aim=True)


# ---------------------------------------------------------------- in this process


def optimizer(machine: Machine) -> Iterator[Finding]:
    """KAIR, taming, Lightning and plain scripts save the step count on the CPU."""
    for kind in (torch.optim.Adam, torch.optim.AdamW):
        theirs = torch.nn.Parameter(torch.linspace(-1, 1, 9))
        ours = torch.nn.Parameter(torch.empty(9, device=machine.device))
        other, mine = kind([theirs]), kind([ours], fused=True)
        theirs.grad = torch.linspace(1, 2, 9)
        other.step()
        try:
            ModelBase.load_optimizer_state(None, mine, other.state_dict(), "another program's")
            ours.data.copy_(theirs.data)
            ours.grad = theirs.grad.to(ours)
            mine.step()
            other.step()
            apart = (ours.detach().cpu() - theirs.detach()).abs().max().item()
            yield Finding("optimizer", kind.__name__, f"steps, within {apart:.1e} of its own", apart < 1e-6)
        except RuntimeError as error:
            yield Finding("optimizer", kind.__name__, str(error).splitlines()[0][:120], False)


def snapshot(machine: Machine) -> Iterator[Finding]:
    """Steps are queued before a save and right after it: the first belong to it, the others do not."""
    with torch.device(machine.device):
        net = vrt.VRT(deformable_groups=12) if machine.cuda else torch.nn.Linear(64, 64)
    adam = torch.optim.Adam(net.parameters(), fused=True)
    for parameter in net.parameters():
        parameter.grad = torch.randn_like(parameter)

    def parts() -> dict[str, Any]:
        return {"G": net.state_dict(), "optimizerG": adam.state_dict()}

    adam.step()
    with tempfile.TemporaryDirectory() as folder:
        machine.wait()
        began = time.perf_counter()
        torch.save(tree.to_cpu(parts()), Path(folder) / "plain.pt")
        plain = time.perf_counter() - began
        saver, stood, equal = checkpoint.Saver(Path(folder), background=True), [], True
        for n in (1, 2, 3):
            square = torch.randn(2 * [4096 if machine.cuda else 64], device=machine.device)
            for _ in range(20):
                square = square @ square * 1e-3  # so that the device is behind
            adam.step()
            began = time.perf_counter()
            saver.save(n, parts())
            stood.append(time.perf_counter() - began)
            wanted = copy.deepcopy(tree.to_cpu(parts()))
            for _ in range(20):
                adam.step()
            saver.wait()
            kept = saver.poll().found.load()
            equal &= all(torch.equal(kept["G"][key], value) for key, value in wanted["G"].items())
            equal &= all(torch.equal(kept["optimizerG"]["state"][i][key], value)
                         for i, state in wanted["optimizerG"]["state"].items() for key, value in state.items())
    yield Finding("snapshot", "holds the state of its step", str(equal), equal)
    ratio = min(stood[1:]) / plain
    yield Finding("snapshot", "stall at most 0.15 of torch.save",
                  f"{', '.join(f'{seconds:.3f}' for seconds in stood)} s against {plain:.3f} s: {ratio:.2f}",
                  ratio <= 0.15, aim=True)


class Kernels(TorchDispatchMode):
    """Notes which of torch's attentions is called."""

    def __init__(self):
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if found := re.match(r"aten\._scaled_dot_product_.*?(flash|efficient|cudnn|math)", str(function)):
            self.seen.append(found[1])
        return function(*args, **(kwargs or {}))


ATTENTIONS = {  # tokens of a window, channels of a head, windows of a sample, bias, shifted
    "stage 8": (384, 30, 64, True, False), "stage 8 shifted": (384, 30, 64, True, True),
    "stage 1 self": (384, 20, 64, True, False), "stage 1 shifted": (384, 20, 64, True, True),
    "stage 1 mutual": (64, 20, 384, False, False), "stage 1 mutual shifted": (64, 20, 384, False, True),
    "11-series stage 1": (384, 16, 64, True, False),
}


def attention(machine: Machine) -> Iterator[Finding]:
    """Forward and backward at VRT 001's sizes, eight samples together, against the way that stores N x N."""
    torch.set_float32_matmul_precision("high" if machine.cuda else "highest")  # as in training
    for name, (tokens, width, windows, has_bias, shifted) in ATTENTIONS.items():
        batch, heads = (8, 6) if machine.cuda else (1, 2)
        if not machine.cuda:
            tokens, windows = 16, 2
        for dtype in (torch.float32, torch.bfloat16):
            shape = (batch, windows, tokens, 3, heads, width)
            yield one_attention(machine, f"{name} {str(dtype)[6:]}", shape, dtype, has_bias, shifted)


def one_attention(machine: Machine, name: str, shape: Sequence[int], dtype: torch.dtype, has_bias: bool,
                  shifted: bool) -> Finding:
    _, windows, tokens, _, heads, width = shape
    qkv = torch.randn(shape, device=machine.device, dtype=dtype, requires_grad=True)
    bias = torch.randn(heads, tokens, tokens, device=machine.device, requires_grad=True) if has_bias else None
    regions = torch.randint(8, (windows, tokens), device=machine.device)
    mask = vrt.shift_mask(regions, torch.zeros((), device=machine.device))[:, None] if shifted else None
    code = vrt.shift_code(regions, width**-0.5) if shifted else None
    ways = {"fused": lambda: vrt.fused_attention(qkv, width**-0.5, bias, code),
            "plain": lambda: vrt.attention(qkv, width**-0.5, [b for b in (bias, mask) if b is not None])}
    said, outputs, kernel = [], [], ""
    for way, function in ways.items():
        with Kernels() as kernels:
            outputs.append(function().detach())
        kernel = kernel or (kernels.seen or ["math"])[0]  # of the first way
        held = torch.cuda.memory_allocated() if machine.cuda else 0
        ms, peak = machine.measure(lambda function=function: function().sum().backward(), warm_up=1)
        said.append(f"{way} {ms:.2f} ms {(peak - held) / 2**20:.0f} MiB")
    apart = (outputs[0] - outputs[1]).abs().max().item()
    close = apart < (0.1 if dtype == torch.bfloat16 else 0.02)  # the latter for TF32
    return Finding("attention", name, f"{kernel}: {' | '.join(said)} | apart {apart:.0e}",
                   close and (kernel != "math" or not machine.cuda))


def fit(machine: Machine) -> Iterator[Finding]:
    """One network for all configurations: building it takes as long as ten steps."""
    began = time.perf_counter()
    changes = {"netG.spynet_path": None, "train.fix_iter": 0, "train.fix_keys": [], "device": machine.device, **NO_DATA}
    if not machine.cuda:
        changes |= {"netG.embed_dims": [8] * 8, "netG.num_heads": [2] * 8, "netG.deformable_groups": 2}
    opt, _ = options.parse(str(ROOT / (VRT_001 if machine.cuda else "options/train_vrt.json")),
                           [(key, value, "gpu.py") for key, value in changes.items()], MODELS, NETWORKS, DATASETS)
    determinism.prepare_machine(opt)
    with torch.device(machine.device):
        model = options.resolve(MODELS, opt["model"], "model")(opt)
    model.init_train()
    model.update_learning_rate(0)
    blocks = [module for module in model.netG.modules() if isinstance(module, vrt.Block)]
    frames, size = (6, 64) if machine.cuda else (2, 8)
    configurations = [(1, None, False, False), (1, "bf16", False, False), (8, "bf16", False, False),
                      (8, "bf16", True, False), (1, None, False, True), (4, "bf16", False, False),
                      (4, "bf16", True, False)] if machine.cuda else [(1, None, False, False), (1, "bf16", True, False)]
    found = {}
    for number, (batch, kind, recompute, exact) in enumerate(configurations):
        name = f"batch {batch} {kind or 'float32'}{' checkpoint_attn' * recompute}{' deterministic' * exact}"
        if number > 1 and time.perf_counter() - began > machine.seconds:
            yield Finding("fit", name, f"not measured: {machine.seconds:.0f} s are over")
            continue
        model.opt_train["amp"] = kind
        for block in blocks:
            block.checkpoint_attn = recompute
        data = {"L": torch.rand(batch, frames, 3, size, size), "H": torch.rand(batch, frames, 3, 4 * size, 4 * size)}

        def one_step(data=data):
            model.feed_data(data)
            model.optimize_parameters(1)

        torch.use_deterministic_algorithms(exact and machine.cuda)
        torch.utils.deterministic.fill_uninitialized_memory = False  # as train.prepare_machine does
        torch.set_float32_matmul_precision("highest" if exact else "high")
        try:
            with determinism.fastest_kernels(True):
                ms, peak = machine.measure(one_step)
                work = kernels_of(one_step) if machine.cuda and batch == 1 else ""
            loss, found[name] = float(model.log_dict["G_loss"]), ms
            yield Finding("fit", name, f"{ms:.0f} ms, {ms / batch:.0f} a sample, peak {peak / 2**30:.1f} GiB, "
                                       f"loss {loss:.4f}{work}", math.isfinite(loss))
        except torch.OutOfMemoryError:
            yield Finding("fit", name, "out of memory")
        except RuntimeError as error:
            yield Finding("fit", name, str(error).strip().split("\n")[0][:150], False)
        finally:
            torch.use_deterministic_algorithms(False)
            torch.set_float32_matmul_precision("highest")
            model.G_optimizer.zero_grad(set_to_none=True)
            gc.collect()
            if machine.cuda:
                torch.cuda.empty_cache()
    fast, exact = found.get("batch 1 float32"), found.get("batch 1 float32 deterministic")
    if fast and exact:
        yield Finding("fit", "deterministic step at most 1.25 of the fast one", f"{exact / fast:.2f}",
                      exact <= 1.25 * fast, aim=True)


def kernels_of(one_step: Callable[[], Any]) -> str:
    """How many kernels a step has and how long the device works on them: the rest of the time it waits for Python."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as record:
        one_step()
        torch.cuda.synchronize()
    events = [event for event in record.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA]
    busy = sum(event.self_device_time_total for event in events) / 1e3
    return f", {sum(event.count for event in events)} kernels of {busy:.0f} ms"


class Several(int):
    """The number of processes, one, which compares as if it were more: then every collective is called."""

    def __eq__(self, other) -> bool:
        return False

    def __gt__(self, other) -> bool:
        return True

    __hash__ = int.__hash__


def world(machine: Machine) -> Iterator[Finding]:
    """Three steps alone, and three through every collective. Batch norm of several sums in another order."""
    def steps(name: str) -> list[float]:
        words = RECIPES[name]
        pairs = [word.partition("=") for word in words[2:] if "=" in word]
        changes = {**{key: options.as_value(value) for key, _, value in pairs}, "deterministic": machine.cuda,
                   "sync_batchnorm": True, "device": machine.device, "train.total_iter": 50, "train.total_epochs": None}
        opt, _ = options.parse(str(ROOT / words[1]), [(key, value, "gpu.py") for key, value in changes.items()], MODELS,
                               NETWORKS, DATASETS, words[3] if "--stage" in words else None)
        determinism.prepare_machine(opt)
        run = train.Run(opt, train.Silence())
        run.restore(None)
        found = []
        with contextlib.closing(endless(run.train_set, run.batches, 0, pinned=machine.cuda)) as samples:
            for run.iteration in (1, 2, 3):
                run.model.update_learning_rate(run.iteration - 1)
                run.model.feed_data(next(samples))
                run.model.optimize_parameters(run.iteration)
                found += run.model.current_log().values()
        for network in run.model.networks.values():
            distributed.broadcast_buffers(network)
        run.state()
        return found

    names = [name for name in ("segmentation", "vqgan", "lgt", "inktrace_dense", "vrt") if name in machine.recipes]
    alone = {name: steps(name) for name in names}
    real = distributed.world_size
    places = (distributed, losses.tanimoto, losses.stroke)
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            for place in places:
                place.world_size = lambda: 1 if distributed._independent else Several(1)
            for name in names:
                together = steps(name)
                apart = max(abs(a - b) / max(abs(a), 1e-6) for a, b in zip(alone[name], together))
                backend = dist.get_backend(distributed._data) if distributed._data else "gloo"
                yield Finding("world", name, f"{backend}, losses within {apart:.1e}", apart < 0.02)
        finally:
            for place in places:
                place.world_size = real
            distributed._data = None
            dist.destroy_process_group()
            torch.use_deterministic_algorithms(False)


# ---------------------------------------------------------------- the program

SECTIONS = {"prove": prove, "optimizer": optimizer, "snapshot": snapshot, "attention": attention, "fit": fit,
            "step": step, "world": world, "amp": amp, "saves": saves, "compile": compiled}


def mark(finding: Finding) -> str:
    """'ok', 'FAILS', 'missed' for an aim, or nothing where it only informs."""
    if finding.holds is None:
        return ""
    return "ok" if finding.holds else "missed" if finding.aim else "FAILS"


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--cpu", action="store_true", help="what has a CPU form, on small networks")
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=RECIPES, metavar="RECIPE",
                        help=f"of prove, world, amp, saves and compile: {', '.join(RECIPES)}")
    parser.add_argument("--seconds", type=float, default=120, help="in which fit may begin another configuration")
    args = parser.parse_args(words)
    if unknown := set(args.sections) - set(SECTIONS):
        parser.error(f"unknown section {', '.join(sorted(unknown))}; valid: {', '.join(SECTIONS)}")
    if not args.cpu and not torch.cuda.is_available():
        print("no CUDA device here: nothing was checked; --cpu runs what has a CPU form")
        return 2
    machine, began, findings = Machine(not args.cpu, args.recipes, args.seconds), time.monotonic(), []
    print(f"{torch.cuda.get_device_name() if machine.cuda else 'CPU'}, torch {torch.__version__}, "
          f"{torch.get_num_threads()} threads")
    for name in args.sections or SECTIONS:
        print(f"== {time.monotonic() - began:.0f} s: {name}", flush=True)
        try:
            for finding in SECTIONS[name](machine):
                findings.append(finding)
                print(f"{mark(finding):<6} {finding.what}: {finding.value}", flush=True)
        except Exception as error:  # the other sections are still of use
            findings.append(Finding(name, type(error).__name__, str(error).strip().split("\n")[0][:150], False))
            print(f"FAILS  {findings[-1].what}: {findings[-1].value}", flush=True)
        gc.collect()
        if machine.cuda:
            torch.cuda.empty_cache()
    width = max(len(finding.what) for finding in findings)
    print(f"\n{'section':<10} {'check':<{width}}         found, after {time.monotonic() - began:.0f} s")
    for finding in findings:
        print(f"{finding.section:<10} {finding.what:<{width}} {mark(finding):<7} {finding.value}")
    failed = sum(mark(finding) == "FAILS" for finding in findings)
    print(f"{failed} of {len(findings)} findings fail" if failed else "all that has to hold holds")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
