"""Check on a CUDA device what only a CUDA device can show, and measure what depends on it.

    bash benchmarks/gpu.sh                        # everything, by estimate ten minutes on an H100
    bash benchmarks/gpu.sh attention fit          # only these sections
    bash benchmarks/gpu.sh --cpu                  # what has a CPU form, on small networks

Sections, in order: prove (every recipe resumes exactly, saving in the background), optimizer (the optimizer state of
another program steps), snapshot (a background save holds the state of its step, and how long it blocks training),
attention (kernels, time, memory), fit (VRT 001: time and memory of a step), step (the same against the straightforward
implementation), waits (no step waits for the device), world (NCCL with a world size of 1), amp (half precision in every
recipe), saves (a run that saves all the time), compile (on and off).

Every finding is printed at once and again in a table at the end. It is required, or an aim, or for information. The
exit code is 0 if all that is required holds, 1 if not, 2 without a CUDA device.
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
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # required by deterministic kernels

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

import checkpoint
import train
from benchmarks.common import ROOT, WARM_UP, batches_of, build_run, read_options, values_in
from models import network_vrt as vrt
from models.model_base import ModelBase
from runtime import determinism, distributed
from storage import tree

VRT_001 = "options/vrt/001_train_vrt_videosr_bi_reds_6frames.json"
RECIPES = {  # option file, then more words of main.py
    "vrt": ["options/train_vrt.json"],
    "vqgan": ["options/train_vqgan.json", "--set", "train.lossconfig.disc_start=1", "--set", "train.disc_every=2"],
    "vqvae": ["options/train_vqvae.json"],
    "lgt": ["options/train_lgt.json"],
    "segmentation": ["options/train_segmentation.json"],
    "inktrace": ["options/train_inktrace.json", "--stage", "structural"],
    "inktrace_dense": ["options/train_inktrace.json", "--stage", "dense", "--set", "path.init_from=none"],
}
NO_DATA = {f"datasets.{part}.dataroot_{kind}": None for part in ("train", "test") for kind in ("gt", "lq")}
NO_EPOCHS = {"path.models": None, "train.total_epochs": None, "train.save_interval": None, "train.eval_interval": None,
             "train.checkpoint_test": 10**6}  # so that total_iter alone decides how long a run is


@dataclass
class Finding:
    """One row of the table."""

    section: str
    what: str
    value: str
    holds: bool | None = None  # None: for information
    aim: bool = False  # an aim that is missed leaves the exit code at 0


@dataclass
class Machine:
    """The device of the checks: a card, or with --cpu the CPU and small networks."""

    cuda: bool
    recipes: Sequence[str]
    seconds: float  # in which `fit` may start another configuration

    @property
    def device(self) -> str:
        return "cuda:0" if self.cuda else "cpu"

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def measure(self, step: Callable[[], Any], warm_up: int = 2, count: int = 3) -> tuple[float, float]:
        """Return a step's milliseconds and the most bytes that torch holds in it; on the CPU of one step, and nan."""
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


# ---------------------------------------------------------------- checks in other processes


def launch(words: Sequence[str], seconds: float = 240) -> tuple[int, str]:
    """Run a Python program of the repository. Returns its exit code and what it printed."""
    try:
        done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return 124, f"error: took longer than {seconds:.0f} s"
    return done.returncode, done.stdout + done.stderr


def set_words(changes: Mapping[str, Any]) -> list[str]:
    return [word for key, value in changes.items() for word in ("--set", f"{key}={json.dumps(value)}")]


def run_main(name: str, changes: Mapping[str, Any], *words: str) -> tuple[int, str]:
    """Run `main.py` with a recipe of RECIPES and these options."""
    return launch(["main.py", "-opt", *RECIPES[name], *words, *set_words(changes)])


def last_lines(text: str, pattern: str, count: int = 1) -> str:
    """Return the last lines of a program's output that match, or its last line."""
    lines = text.strip().splitlines()
    return " / ".join([line for line in lines if re.search(pattern, line)][-count:] or lines[-1:])[:150]


def run_all(section: str, tasks: Mapping[str, tuple], pattern: str, count: int = 1,
            together: int = min(16, os.cpu_count() or 1)) -> Iterator[Finding]:
    """Run `main.py` for each task, title -> arguments of `run_main`, some together. Yields the last matching lines."""
    def one(title: str) -> Finding:
        code, text = run_main(*tasks[title])
        return Finding(section, title, last_lines(text, pattern, count), code == 0)

    with ThreadPoolExecutor(together) as pool:
        yield from pool.map(one, tasks)


def short_run(machine: Machine, folder: str, task: str, steps: int, **changes: Any) -> dict[str, Any]:
    """Return the options of a run of so many steps, 4 on the CPU, with these changes of the section `train`.

    It has one data worker, since many such runs share the cores.
    """
    steps = steps if machine.cuda else 4
    changes = {"total_iter": steps, "checkpoint_print": steps // 2, **changes}
    return {**NO_EPOCHS, "path.root": folder, "task": task, "device": machine.device,
            "datasets.train.dataloader_num_workers": int(machine.cuda),
            **{f"train.{key}": value for key, value in changes.items()}}


def prove(machine: Machine) -> Iterator[Finding]:
    changes = {"checkpoint.async": True, "num_threads": 2, "device": machine.device, "deterministic": machine.cuda,
               "datasets.train.dataloader_num_workers": int(machine.cuda)}
    words = "--prove-resume", "6" if machine.cuda else "2"
    yield from run_all("prove", {name: (name, changes, *words) for name in machine.recipes},
                       "^(exact|differs|because|error)", 3)


def amp(machine: Machine) -> Iterator[Finding]:
    with tempfile.TemporaryDirectory() as folder:
        tasks = {f"{name} {kind or 'float32'}": (name, short_run(machine, folder, f"{name}_{kind}", 40, amp=kind))
                 for name in machine.recipes for kind in (None, "bf16", "fp16")}
        yield from run_all("amp", tasks, "^iter|^error")


def compiled(machine: Machine) -> Iterator[Finding]:
    """One run at a time, for what is compared is how many steps a second the last half of it takes."""
    names = [name for name in ("segmentation", "vqgan", "lgt") if name in machine.recipes]
    with tempfile.TemporaryDirectory() as folder:
        tasks = {f"{name} {'on' if on else 'off'}": (name, short_run(machine, folder, f"{name}_{on}", 60, compile=on))
                 for name in names for on in ((True, False) if machine.cuda else (False,))}
        yield from run_all("compile", tasks, "^iter|^error", together=1)


def saves(machine: Machine) -> Iterator[Finding]:
    name = machine.recipes[0]
    with tempfile.TemporaryDirectory() as folder:
        changes = short_run(machine, folder, "saves", 60, checkpoint_save=15 if machine.cuda else 1)
        code, text = run_main(name, {**changes, "checkpoint.async": True})
    found = re.findall(r"^saved .* in ([\d.]+) s, ([\d.]+) s of it waited for", text, re.MULTILINE)
    total, waited = (", ".join(column) for column in zip(*found)) if found else ("", "")
    value = f"{len(found)} of 4 in {total} s, waited {waited} s"
    yield Finding("saves", f"{name} in the background", value if found else last_lines(text, "^error"),
                  code == 0 and len(found) == 4)


def step(machine: Machine) -> Iterator[Finding]:
    """The straightforward implementation is always in float32."""
    file = VRT_001 if machine.cuda else "options/train_vrt.json"
    changes = {**NO_DATA, "netG.spynet_path": None, "netG.drop_path_rate": 0.0, "train.fix_iter": 0,
               "datasets.train.dataloader_batch_size": 1, "device": machine.device}
    for kind, more in (("float32", []), ("bf16", ["--bf16"])):
        code, text = launch(["benchmarks/step_time.py", file, "--steps", "6" if machine.cuda else "1", "--against",
                             "straightforward", *more, *set_words(changes)])
        found = {name: float(value) for name, value in re.findall(r"ratio (\w+) +([\d.]+)", text)}
        value = ", ".join(f"{name} {ratio:.3f}" for name, ratio in found.items()) or last_lines(text, "rror")
        yield Finding("step", f"{kind} / straightforward", value, code == 0)
        if found and kind == "bf16" and machine.cuda:
            yield Finding("step", "bf16 step at most 0.33", f"{found['step']:.3f}", found["step"] <= 0.33, aim=True)


# ---------------------------------------------------------------- checks in this process


def optimizer(machine: Machine) -> Iterator[Finding]:
    """KAIR, taming, Lightning and plain scripts save the step count on the CPU."""
    for kind in (torch.optim.Adam, torch.optim.AdamW):
        there = torch.nn.Parameter(torch.linspace(-1, 1, 9))
        here = torch.nn.Parameter(torch.empty(9, device=machine.device))
        other, own = kind([there]), kind([here], fused=True)
        there.grad = torch.linspace(1, 2, 9)
        other.step()
        try:
            ModelBase.load_optimizer_state(None, own, other.state_dict(), "another program's")
            here.data.copy_(there.data)
            here.grad = there.grad.to(here)
            own.step()
            other.step()
            apart = (here.detach().cpu() - there.detach()).abs().max().item()
            yield Finding("optimizer", kind.__name__, f"steps, within {apart:.1e} of its own", apart < 1e-6)
        except RuntimeError as error:
            yield Finding("optimizer", kind.__name__, first_line(error), False)


def first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:150]


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
        saver, blocked, equal = checkpoint.Saver(Path(folder), background=True), [], True
        for n in (1, 2, 3):
            square = torch.randn(2 * [4096 if machine.cuda else 64], device=machine.device)
            for _ in range(20):
                square = square @ square * 1e-3  # so that the device is behind
            adam.step()
            if n == 3:
                machine.wait()  # else the time of the products would be that of the save
            began = time.perf_counter()
            saver.save(n, parts())
            blocked.append(time.perf_counter() - began)
            wanted = tree.flat(copy.deepcopy(tree.to_cpu(parts())))
            for _ in range(20):
                adam.step()
            saver.wait()
            kept = dict(tree.flat(saver.poll().found.load()))
            equal &= all(torch.equal(kept[path], value) for path, value in wanted if torch.is_tensor(value))
    yield Finding("snapshot", "holds the state of its step", str(equal), equal)
    ratio = blocked[-1] / plain
    yield Finding("snapshot", "blocks at most 0.15 of torch.save",
                  f"{', '.join(f'{seconds:.3f}' for seconds in blocked)} s against {plain:.3f} s: {ratio:.2f}",
                  ratio <= 0.15, aim=True)


class Kernels(TorchDispatchMode):
    """Record which of torch's attention kernels are called."""

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
    """Forward and backward at VRT 001's sizes, eight samples together, against attention that stores N x N."""
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
    words, outputs, kernel = [], [], ""
    for way, function in ways.items():
        with Kernels() as kernels:
            outputs.append(function().detach())
        kernel = kernel or (kernels.seen or ["math"])[0]  # of the first
        held = torch.cuda.memory_allocated() if machine.cuda else 0
        ms, peak = machine.measure(lambda function=function: function().sum().backward(), warm_up=1)
        words.append(f"{way} {ms:.2f} ms {(peak - held) / 2**20:.0f} MiB")
    apart = (outputs[0] - outputs[1]).abs().max().item()
    close = apart < (0.1 if dtype == torch.bfloat16 else 0.02)  # the latter for TF32
    return Finding("attention", name, f"{kernel}: {' | '.join(words)} | apart {apart:.0e}",
                   close and (kernel != "math" or not machine.cuda))


@contextlib.contextmanager
def kernels_chosen(exact: bool) -> Iterator[None]:
    """Choose the kernels as a run does, deterministic or fast, and restore the previous choice."""
    torch.use_deterministic_algorithms(exact)
    torch.utils.deterministic.fill_uninitialized_memory = False  # as runtime.determinism does
    torch.set_float32_matmul_precision("high")
    try:
        with determinism.fastest_kernels(True):
            yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_float32_matmul_precision("highest")


def fit(machine: Machine) -> Iterator[Finding]:
    """One network serves all configurations: building it takes as long as ten steps."""
    began = time.perf_counter()
    changes = {"netG.spynet_path": None, "train.fix_iter": 0, "train.fix_keys": [], "device": machine.device, **NO_DATA}
    if not machine.cuda:
        changes |= {"netG.embed_dims": [8] * 8, "netG.num_heads": [2] * 8, "netG.deformable_groups": 2}
    opt = read_options(VRT_001 if machine.cuda else "options/train_vrt.json", changes)
    determinism.prepare_machine(opt)
    with torch.device(machine.device):
        model = train.build_model(opt)
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
        data = {key: torch.rand(batch, frames, 3, side, side, pin_memory=machine.cuda)
                for key, side in (("L", size), ("H", 4 * size))}

        def one_step(data=data):
            model.feed_data(data)
            model.optimize_parameters(1)

        try:
            with kernels_chosen(exact and machine.cuda):
                ms, peak = machine.measure(one_step)
                kernels = count_kernels(one_step) if machine.cuda and batch == 1 else ""
            loss, found[name] = float(model.log_dict["G_loss"]), ms
            yield Finding("fit", name, f"{ms:.0f} ms, {ms / batch:.0f} a sample, peak {peak / 2**30:.1f} GiB, "
                                       f"loss {loss:.4f}{kernels}", math.isfinite(loss))
        except torch.OutOfMemoryError:
            yield Finding("fit", name, "out of memory")
        except RuntimeError as error:
            yield Finding("fit", name, first_line(error), False)
        model.G_optimizer.zero_grad(set_to_none=True)
        collect_garbage()
    fast, exact = found.get("batch 1 float32"), found.get("batch 1 float32 deterministic")
    if fast and exact:
        yield Finding("fit", "deterministic step at most 1.25 of the fast one", f"{exact / fast:.2f}",
                      exact <= 1.25 * fast, aim=True)


def count_kernels(one_step: Callable[[], Any]) -> str:
    """Describe a step's kernels and how long the device is busy with them: the rest of the time it waits for Python."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as record:
        one_step()
        torch.cuda.synchronize()
    events = [event for event in record.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA]
    busy = sum(event.self_device_time_total for event in events) / 1e3
    return f", {sum(event.count for event in events)} kernels of {busy:.0f} ms"


def collect_garbage() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def waits(machine: Machine) -> Iterator[Finding]:
    """Take steps in which torch raises wherever Python waits for the device."""
    for name in machine.recipes:
        file, *more = RECIPES[name]
        stage = more[more.index("--stage") + 1] if "--stage" in more else None
        changes = {**NO_EPOCHS, "device": machine.device, "train.total_iter": 100}
        run = build_run(read_options(file, changes | values_in([word for word in more if "=" in word]), stage))
        waited = ""
        with batches_of(run) as samples, determinism.fastest_kernels(True):
            for number in range(1, WARM_UP + 3):  # a discriminator starts within the first steps
                run.model.feed_data(next(samples))
                if machine.cuda and number > WARM_UP:
                    torch.cuda.set_sync_debug_mode("error")
                try:
                    run.model.optimize_parameters(number)
                except RuntimeError as error:
                    ours = [frame for frame in traceback.extract_tb(error.__traceback__) if str(ROOT) in frame.filename]
                    waited = waited or f"{ours[-1].filename}:{ours[-1].lineno}: {first_line(error)}"
                finally:
                    if machine.cuda:
                        torch.cuda.set_sync_debug_mode("default")
        yield Finding("waits", name, waited or "no step waits" if machine.cuda else "steps; a CPU never waits",
                      not waited, aim=True)
        del run
        collect_garbage()


def world(machine: Machine) -> Iterator[Finding]:
    """Exchange a tensor through each kind of collective that a step uses, with a world size of 1."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        stack.callback(dist.destroy_process_group)
        stack.callback(setattr, distributed, "_data", None)
        distributed.use_device(torch.device(machine.device))
        group = distributed._data
        sent = torch.randn(1 << 20, device=machine.device)
        received = [torch.empty_like(sent)]
        dist.all_gather(received, sent, group=group)
        dist.broadcast(sent, src=0, group=group)
        backend = dist.get_backend(group) if group else "gloo"
        yield Finding("world", "exchange", f"{backend}, 4 MB", torch.equal(sent, received[0]))


# ---------------------------------------------------------------- the program

SECTIONS = {"prove": prove, "optimizer": optimizer, "snapshot": snapshot, "attention": attention, "fit": fit,
            "step": step, "waits": waits, "world": world, "amp": amp, "saves": saves, "compile": compiled}


def mark(finding: Finding) -> str:
    """Return 'ok', 'FAILS', 'missed' for an aim, or nothing for information."""
    if finding.holds is None:
        return ""
    return "ok" if finding.holds else "missed" if finding.aim else "FAILS"


def findings_of(section: str, machine: Machine) -> Iterator[Finding]:
    """Run a section. An exception is a finding that fails, so that the other sections still run."""
    try:
        yield from SECTIONS[section](machine)
    except Exception as error:
        yield Finding(section, type(error).__name__, first_line(error), False)
    collect_garbage()


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
        for finding in findings_of(name, machine):
            findings.append(finding)
            print(f"{mark(finding):<6} {finding.what}: {finding.value}", flush=True)
    width = max(len(finding.what) for finding in findings)
    print(f"\n{'section':<10} {'check':<{width}}         found, after {time.monotonic() - began:.0f} s")
    for finding in findings:
        print(f"{finding.section:<10} {finding.what:<{width}} {mark(finding):<7} {finding.value}")
    failed = sum(mark(finding) == "FAILS" for finding in findings)
    print(f"{failed} of {len(findings)} findings fail" if failed else "everything required holds")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
