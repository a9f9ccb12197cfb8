"""A stand-in for CUDA cards, for machines without one: torch's own CUDA code runs, and the CPU computes.

    python -m tests.card python main.py -opt options/train_vrt.json --device cuda
    python -m tests.card --cards 2 torchrun --nproc_per_node 2 main.py -opt options/train_vrt.json
    python -m tests.card --memory 170 python main.py ...          lacks memory beyond 170 MB
    python -m tests.card --idle bash benchmarks/gpu.sh fit        kernels compute nothing: memory, time of Python

What is real: torch's checks of devices, its allocator and lack of memory, pinned memory and streams, synchronisation
checks, fused optimizers, autocast, its choice of attention kernels, its NCCL process group. Copies arrive as late as on
a card. What is not: numbers of a card's kernels and their order of summation, cuDNN (off), compiled code, time. Where
kernels are idle, operations without a deterministic kernel raise as on a card; otherwise they don't.

It needs Linux, gcc, and a torch with CUDA, of which it replaces five libraries when a process starts (LD_PRELOAD).
"""

import os
import shutil
import subprocess
import tempfile
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).parent
USED = ("libc10_cuda.so", "libtorch_cuda.so", "libtorch_python.so", "libtorch_cuda_linalg.so")
REFUSED = {f"nccl{name}" for name in ("AllReduce", "AlltoAll", "CommSplit", "Gather", "Reduce", "ReduceScatter")}
DRIVER = {"cuCtxGetCurrent", "cuDevicePrimaryCtxGetState"}  # in driver.c
GENUINE = {"cudaGetErrorName", "cudaGetErrorString", "cudaRuntimeGetVersion"}  # need no card


def symbols(file: Path, *options: str) -> set[str]:
    """Return names of the functions of a library or object file."""
    text = subprocess.run(["nm", *options, file], check=True, capture_output=True, text=True).stdout
    return {line.split()[-1].split("@")[0] for line in text.splitlines()}


def build(folder: Path) -> str | None:
    """Compile the libraries into a folder. Returns why they cannot be built here, or None."""
    torch = Path(find_spec("torch").origin).parent
    if not (torch / "lib" / USED[0]).exists():
        return "torch has no CUDA"
    if missing := [name for name in ("gcc", "nm") if not shutil.which(name)]:
        return f"there is no {missing[0]}"
    headers = [f"-I{path}" for path in (HERE / "include", *sorted((torch.parent / "nvidia").glob("*/include")))]
    compiler = ["gcc", "-shared", "-fPIC", "-O1", "-w", *headers]
    try:
        subprocess.run([*compiler, HERE / "card.c", HERE / "nccl.c", "-o", folder / "card.so"], check=True,
                       capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        return error.stderr.splitlines()[0]
    wanted = set().union(*(symbols(torch / "lib" / name, "-D", "--undefined-only") for name in USED))
    wanted = {name for name in wanted if name.startswith(("cuda", "cublas", "cusolver", "nvrtc", "nccl"))} - GENUINE
    rest = wanted - symbols(folder / "card.so", "-D", "--defined-only")
    driver = {name for name in symbols(torch / "lib" / "libcaffe2_nvrtc.so", "-D", "--undefined-only")
              if name.startswith("cu")} - DRIVER
    for name, functions, sources in (("rest.so", rest, []), ("libcuda.so.1", driver, [HERE / "driver.c"])):
        source = folder / f"{name}.c"
        source.write_text("".join(f"int {f}() {{ return {int(f in REFUSED)}; }}\n" for f in sorted(functions)))
        subprocess.run([*compiler, *sources, source, "-o", folder / name], check=True)
    return None


def environment(folder: Path, cards: int = 1, memory: int | None = None, idle: bool = False) -> dict[str, str]:
    """Return the environment variables of a process with so many cards of so many MB."""
    found = {"LD_PRELOAD": f"{folder / 'card.so'} {folder / 'rest.so'}", "LD_LIBRARY_PATH": str(folder),
             "PYTHONPATH": str(HERE / "site"), "CARD_COUNT": str(cards),
             "CUDA_VISIBLE_DEVICES": ",".join(map(str, range(cards))),
             "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "CARD_IDLE": "1" if idle else "",
             "PERDURE_TEST_CUDA": "1", "TORCH_DISABLE_NATIVE_JIT": "1"}
    return found | ({"CARD_BYTES": str(memory << 20)} if memory else {})


def run(words: list[str], **cards) -> int:
    """Run a command with the stand-in. Returns its exit code; 2 where there can be none."""
    with tempfile.TemporaryDirectory() as folder:
        if reason := build(Path(folder)):
            print(f"error: no stand-in for a card here: {reason}")
            return 2
        process = subprocess.Popen(words, env={**os.environ, **environment(Path(folder), **cards)})
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:  # is also the command's, which ends when it has saved
                continue
