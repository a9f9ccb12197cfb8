"""Run every benchmark of a CPU and write docs/performance.md from what they print.

    python benchmarks/performance.py [--output docs/performance.md]
    python benchmarks/performance.py --quick --output FILE

It takes about five minutes on two cores that do nothing else. --quick tries each script once with the least work; its
numbers are worth nothing, so it needs another file.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
RECIPES = "vrt", "vqgan", "vqvae", "segmentation", "inktrace", "lgt"
SECTIONS = {  # title: what it shows, and the commands: a script, its arguments, those for --quick
    "Start": (
        "`torch` is `python -c 'import torch'`; `optimizer` also builds an Adam, for which torch imports its\n"
        "compiler, as any script that trains does. `mistake` is an option that does not exist; `first step` ends\n"
        "where the first step would be computed, and `finished` is the same command after the last step.",
        [("startup", [], ["--quick"])]),
    "Step": ("The shipped default of each recipe, and the share of each part.",
             [("step_time", [f"options/train_{name}.json"], ["--steps", "1"]) for name in RECIPES]),
    "Save and load": ("The same state in every row. `torch.save` forces its file to the disk (fsync), as ours do.",
                      [("checkpoint", [], ["--megabytes", "3", "--rounds", "1"])]),
    "Seek": ("A run that resumes in the middle of an epoch reads no sample before its own.",
             [("seek", [], ["--samples", "1000", "--rounds", "1"])]),
    "Validation": ("PSNR and SSIM of each frame in RGB and luma, of all that is compared: the network, its moving\n"
                   "average, the baseline.",
                   [("validation", [], ["--frames", "1", "--rounds", "1", "--size", "64", "64"])]),
}


def launch(words: list[str]) -> str:
    """Run a script of this folder. Returns what it printed; ends this one where it fails."""
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(words)} failed:\n{done.stderr[-3000:]}")
    return done.stdout


def machine() -> str:
    """Return the processor, and how busy it is: others on it change every number but the ratios."""
    cpus = Path("/proc/cpuinfo").read_text() if os.path.exists("/proc/cpuinfo") else ""
    names = [line.partition(":")[2].strip() for line in cpus.splitlines() if line.startswith("model name")]
    load = f", load {os.getloadavg()[0]:.1f} of other programs at the start" if hasattr(os, "getloadavg") else ""
    return f"{next(iter(names), platform.machine())}, {os.cpu_count()} cores{load}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "docs/performance.md")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    if args.quick and args.output == parser.get_default("output"):
        parser.exit(2, "error: --quick is not for docs/performance.md; name another file with --output\n")
    commit = subprocess.run(["git", "-C", ROOT, "describe", "--always", "--dirty"], capture_output=True, text=True)
    began, lines = time.monotonic(), [
        "# Performance", "", "Ratios are within one run, in which the things compared take turns; seconds are of this "
        "machine.", "GPUs: [gpu.md](gpu.md); several processes: [distributed.md](distributed.md).", "",
        f"{machine()}; {time.strftime('%Y-%m-%d')}; Python {platform.python_version()}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads;", f"commit {commit.stdout.strip() or 'unknown'}; "
        f"`{shlex.join(['python', 'benchmarks/performance.py', *sys.argv[1:]])}`"]
    for title, (text, commands) in SECTIONS.items():
        lines += ["", f"## {title}", "", f"{text}", f"`benchmarks/{commands[0][0]}.py`:", ""]
        for script, words, quick in commands:
            said = launch([f"benchmarks/{script}.py", *words, *(quick if args.quick else [])])
            lines += [f"    {line}".rstrip() for line in said.splitlines()]
            print(said, flush=True)
    args.output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{args.output} in {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
