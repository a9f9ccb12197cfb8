"""Several processes as one run: who this is, what all agree on, what a whole batch sees, and one failure ends all.

torchrun starts the processes and says by the environment which is which; the engine is torch.distributed. With one
process everything here is identity, so that a recipe reads the same. Two groups: `control` (gloo) is where the loop
agrees on stopping, saving and validating; `data` (NCCL on CUDA) carries gradients and what belongs to a batch.

Every process holds the rows r, r + W, r + 2W, ... of a batch (r its rank, W how many processes): see data.sampler.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else every process advises against what `wrap` does

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402

PATIENCE = datetime.timedelta(days=7)  # one may validate or write for hours; that a process died shows at once
LOOK_EVERY = 0.5  # seconds from one look at the others' fate to the next

_data: dist.ProcessGroup | None = None  # None: the default group, gloo
_apart = 0  # depth of `apart`
_watch: _Watch | None = None


# ---------------------------------------------------------------- who


def world_size() -> int:
    """How many processes share a batch."""
    return dist.get_world_size() if dist.is_initialized() and not _apart else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return dist.get_rank() if dist.is_initialized() and not _apart else 0


def is_main() -> bool:
    """Whether this is the process that writes."""
    return not dist.is_initialized() or dist.get_rank() == 0


def launched() -> bool:
    """Whether torchrun started this, also a single process."""
    return "TORCHELASTIC_RUN_ID" in os.environ or "LOCAL_WORLD_SIZE" in os.environ


def local_rank() -> int:
    """Which process of this machine: its CUDA device."""
    return int(os.environ.get("LOCAL_RANK", 0))


def device_for(opt: Mapping[str, Any]) -> torch.device:
    """Find the device of this process by the options, which stay as the user wrote them. Raises RuntimeError."""
    name, here, chosen = opt["device"], local_rank(), opt.get("gpu_ids")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device("cuda", chosen[here] if chosen and here < len(chosen) else here) if name == "cuda" \
        else torch.device(name)


def launcher() -> list[str]:
    """The words that start such processes, for a command to be printed."""
    if not launched():
        return ["python"]
    nodes, here = os.environ.get("GROUP_WORLD_SIZE", "1"), os.environ["LOCAL_WORLD_SIZE"]
    return ["torchrun", *([f"--nnodes={nodes}"] if nodes != "1" else []), f"--nproc_per_node={here}"]


def launch() -> str:
    """The same in every restart that a launcher makes of its own accord, else another; "" where there is none."""
    return os.environ.get("SLURM_JOB_ID") or (f"{socket.gethostname()}:{os.getppid()}" if launched() else "")


def restarted() -> bool:
    """Whether the launcher, not the user, repeats this command: torchrun --max-restarts, a requeued Slurm job."""
    return any(int(os.environ.get(key, 0)) > 0 for key in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))


# ---------------------------------------------------------------- begin and end


def start() -> None:
    """Join the processes that torchrun started; alone, nothing happens."""
    global _watch
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        dist.init_process_group("gloo", timeout=PATIENCE)
        if not is_main():
            warnings.simplefilter("ignore")  # the main process says them
        _watch = _Watch()


def use_device(device: torch.device) -> None:
    """From now on, batches and gradients lie there."""
    global _data
    if dist.is_initialized() and device.type == "cuda" and _data is None:
        _data = dist.new_group(backend="nccl")


def finish() -> None:
    """The end of a run, agreed by all: nobody's leaving is a failure any more."""
    global _data, _watch
    if dist.is_initialized():
        dist.barrier()
        _watch.end()
        dist.destroy_process_group()
        _data = _watch = None


def fail(cause: str, *, record: bool = True) -> bool:
    """Tell the others to end, and torchrun why. Returns whether this process is the first, which alone prints."""
    if _watch is None:
        return True
    first = _watch.tell(cause)
    if first and record and (path := os.environ.get("TORCHELASTIC_ERROR_FILE")):  # what torchrun's summary shows
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"message": cause, "timestamp": int(time.time())}, file)
    return first


def leave(code: int) -> None:
    """End the process; of several one that failed at once, for tidying up would wait for the others."""
    sys.stdout.flush()
    sys.stderr.flush()
    if dist.is_initialized():
        os._exit(code)
    sys.exit(code)


class _Watch:
    """Ends this process when another failed or died, whatever it is waiting for; asks it to stop when torchrun died.

    Failures are told by a key in torchrun's store. A death shows by its connection: each process listens to the one
    before it, on a group of its own, to hear nothing until the end.
    """

    def __init__(self):
        self.ended = threading.Event()
        self.before, self.after = ((dist.get_rank() + d) % dist.get_world_size() for d in (-1, 1))
        self.group = dist.new_group(backend="gloo", timeout=PATIENCE)
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self.store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False,
                                   timeout=datetime.timedelta(seconds=10))
        self.key = f"perdure/failed/{from_main(lambda: os.urandom(8).hex())}"  # a restart must not find an old one
        self.threads = [threading.Thread(target=work, daemon=True) for work in (self._look, self._listen)]
        for thread in self.threads:
            thread.start()

    def tell(self, cause: str) -> bool:
        """Whether this is the first failure."""
        self.ended.set()
        mine = f"{dist.get_rank()}: {cause}".encode()
        try:
            return self.store.compare_set(self.key, "", mine) == mine
        except RuntimeError:
            return True  # torchrun is gone: everyone speaks for himself

    def end(self) -> None:
        """After everyone has agreed to: hang up."""
        self.ended.set()
        dist.send(torch.zeros(1), self.after, group=self.group)
        for thread in self.threads:
            thread.join()

    def _look(self) -> None:
        parent = os.getppid()
        while not self.ended.wait(LOOK_EVERY):
            try:
                if self.store.check([self.key]):
                    os._exit(1)
                alive = os.getppid() == parent
            except RuntimeError:
                alive = False
            if not alive:
                if not self.ended.is_set():
                    os.kill(os.getpid(), signal.SIGTERM)  # as if asked to: the run is saved
                return

    def _listen(self) -> None:
        try:
            dist.recv(torch.zeros(1), self.before, group=self.group)
        except RuntimeError:
            if not self.ended.is_set():
                if self.tell("gone"):
                    print(f"error: process {self.before} has ended without a word, as by SIGKILL; all others end too",
                          file=sys.stderr, flush=True)
                os._exit(1)


# ---------------------------------------------------------------- agree


def from_main(make: Callable[[], Any]) -> Any:
    """What `make` returns in the main process, the only one to call it, for all."""
    if not dist.is_initialized():
        return make()
    box = [make() if is_main() else None]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather(mine: Any) -> list[Any]:
    """What every process has, by rank, for all."""
    if not dist.is_initialized():
        return [mine]
    boxes = [None] * dist.get_world_size()
    dist.all_gather_object(boxes, mine)
    return boxes


def any_of(mine: bool) -> bool:
    """Whether it is so in any process."""
    if not dist.is_initialized():
        return mine
    flag = torch.tensor([int(mine)])
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def means(mine: Mapping[str, float]) -> dict[str, float]:
    """Of each number the mean over the processes."""
    rows = gather(dict(mine))
    return {key: sum(row[key] for row in rows) / len(rows) for key in mine}


class Vote:
    """The largest number that any process has, known to all in the same call: of several processes one call later.

    That call has been under way behind a whole step, so nobody waits for it.
    """

    def __init__(self):
        self.work = self.box = None

    def __call__(self, mine: int) -> int:
        if not dist.is_initialized():
            return mine
        found = self.result()
        self.box = torch.tensor([mine])
        self.work = dist.all_reduce(self.box, dist.ReduceOp.MAX, async_op=True)
        return found

    def result(self) -> int:
        """Of the call before."""
        if self.work is None:
            return 0
        self.work.wait()
        self.work = None
        return int(self.box)


# ---------------------------------------------------------------- what a whole batch sees


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """Inside, this process counts for itself, as where each one validates clips of its own."""
    global _apart
    _apart += 1
    try:
        yield
    finally:
        _apart -= 1


def total(x: Tensor) -> Tensor:
    """The sum over the processes; gradients pass."""
    return x if world_size() == 1 else _Total.apply(x)


class _Total(torch.autograd.Function):
    """Everyone's sum has everyone's gradient."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x, group=_group(x))
        return x

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return _Total.forward(ctx, gradient)


def average(x: Tensor) -> Tensor:
    """The mean over the processes; gradients pass."""
    return x if world_size() == 1 else total(x) / world_size()


def add_up(x: Tensor) -> None:
    """The sum over the processes, in place."""
    if world_size() > 1:
        dist.all_reduce(x, group=_group(x))


def mine(batch: Tensor) -> Tensor:
    """The rows of this process in a whole batch."""
    return batch[rank() :: world_size()]


def whole(part: Tensor) -> Tensor:
    """The whole batch, in its order, from the rows of each process; no gradient."""
    if world_size() == 1:
        return part
    parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(world_size())]
    dist.all_gather(parts, part.detach().contiguous(), group=_group(part))
    return torch.stack(parts, dim=1).flatten(0, 1)


def _group(x: Tensor) -> dist.ProcessGroup | None:
    return _data if x.is_cuda else None


# ---------------------------------------------------------------- networks


def wrap(network: nn.Module, find_unused_parameters: bool = True, static_graph: bool = False) -> nn.Module:
    """The network whose backward pass averages gradients over the processes.

    DistributedDataParallel builds its buckets of gradients anew after the first step, unless it looks for unused
    parameters: then a restart's first step would sum in another order, which shows in the last bits from three
    processes on. So it looks by default.
    """
    if world_size() == 1 or not any(p.requires_grad for p in network.parameters()):
        return network
    warnings.filterwarnings("ignore", "Grad strides")  # of gradients that lie otherwise than in their bucket
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # broadcast_buffers has another name from torch 2.15 on
        return DistributedDataParallel(network, process_group=_data, broadcast_buffers=False,
                                       static_graph=static_graph, find_unused_parameters=find_unused_parameters)


def unreduced(network: nn.Module, last: bool) -> contextlib.AbstractContextManager:
    """For the parts of a batch: gradients are averaged in the backward pass of the last one."""
    return contextlib.nullcontext() if last or world_size() == 1 else network.no_sync()


def share_buffers(network: nn.Module) -> None:
    """The main process's buffers for all: batch statistics are each process's own, and its are the ones saved."""
    if world_size() > 1:
        saved = network.state_dict().keys()
        for name, buffer in network.named_buffers():
            if name in saved:
                dist.broadcast(buffer, src=0, group=_group(buffer))


def synchronize_batchnorm(network: nn.Module) -> None:
    """Let batch norm see the whole batch."""
    if world_size() > 1:
        for module in network.modules():
            if type(module) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
                module.__class__ = SyncedBatchNorm


class SyncedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm over the rows of all processes. torch's SyncBatchNorm refuses tensors on the CPU."""

    def _check_input_dim(self, x: Tensor) -> None:
        """It was checked what stands for."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or world_size() == 1:
            return super().forward(x)
        axes, shape = [0, *range(2, x.ndim)], [1, -1, *[1] * (x.ndim - 2)]
        centred = x.float()
        mean = average(centred.mean(axes))
        centred = centred - mean.view(shape)
        variance = average(centred.square().mean(axes))
        with torch.no_grad():
            count = x.numel() // x.shape[1] * world_size()
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        scale = (variance + self.eps).rsqrt() * self.weight
        return (centred * scale.view(shape) + self.bias.view(shape)).to(x.dtype)
