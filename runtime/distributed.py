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
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else every process advises against what `wrap` does

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402

PATIENCE = datetime.timedelta(days=7)  # one may validate or write for hours: what is wrong with it, `_Watch` finds
LOOK_EVERY = 0.5  # seconds from one look at the others' fate to the next
BEAT_EVERY = 4  # looks from one sign of life to the next
SAY_AFTER = 60.0  # seconds of waiting for a process until it is named; then after four times as long, and so on

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


def use_device(device: torch.device, patience: float = 1800) -> None:
    """From now on, batches and gradients lie there.

    Args: patience: seconds without a sign of life of a process after which the others end.
    """
    global _data
    if _watch:
        _watch.patience = patience
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


def fail(cause: str, code: int = 1, *, record: bool = True) -> bool:
    """Tell the others to end so, and torchrun why. Returns whether this process is the first, which alone prints."""
    if _watch is None:
        return True
    first = _watch.tell(cause, code)
    if first and record and (path := os.environ.get("TORCHELASTIC_ERROR_FILE")):  # what torchrun's summary shows
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"message": cause, "timestamp": int(time.time())}, file)
    return first


def code_of_failure() -> int:
    """The exit code that the first process to fail has given to all."""
    return _watch.code() if _watch else 1


def spread(number: int) -> None:
    """Let the other processes have this signal as well: one that waits for data would not hear of it."""
    if _watch:
        _watch.spread(number)


def leave(code: int) -> None:
    """End the process; of several one that failed at once, for tidying up would wait for the others."""
    sys.stdout.flush()
    sys.stderr.flush()
    if dist.is_initialized():
        os._exit(code)
    sys.exit(code)


class _Watch:
    """Ends this process when another failed or died, whatever it is waiting for; asks it to stop when torchrun died.

    Failures and stop requests are told by keys in torchrun's store. A death shows by its connection: each process
    listens to the one before it, on a group of its own, to hear nothing until the end. Every process also counts in
    the store: how often it gave a sign of life, which a stopped one does not, and how often all came together, which
    names those that others wait for.
    """

    def __init__(self):
        self.ended = threading.Event()
        self.patience = 1800.0
        self.came, self.waits_since = 0, None  # how often this process came to where all do; since when it is there
        self.seen = [[-1, 0, 0.0] for _ in range(dist.get_world_size())]  # by rank: sign of life, came, silent for
        self.said_after, self.beats, self.beat_at = SAY_AFTER, 0, time.monotonic()
        self.before, self.after = ((dist.get_rank() + d) % dist.get_world_size() for d in (-1, 1))
        self.group = dist.new_group(backend="gloo", timeout=PATIENCE)
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self.store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False,
                                   timeout=datetime.timedelta(seconds=10))
        this = from_main(lambda: os.urandom(8).hex())  # a restart must not find old ones
        self.failed, self.stop = (f"perdure/{what}/{this}" for what in ("failed", "stop"))
        self.lives = [f"perdure/life/{this}/{rank}" for rank in range(dist.get_world_size())]
        self.store.set(self.lives[dist.get_rank()], "0 0")
        dist.barrier()
        self.threads = [threading.Thread(target=work, daemon=True) for work in (self._look, self._listen)]
        for thread in self.threads:
            thread.start()

    def tell(self, cause: str, code: int = 1) -> bool:
        """Whether this is the first failure."""
        self.ended.set()
        mine = f"{code} {dist.get_rank()}: {cause}".encode()
        try:
            return self.store.compare_set(self.failed, "", mine) == mine
        except RuntimeError:
            return True  # torchrun is gone: every process speaks for itself

    def code(self) -> int:
        try:
            return int(self.store.get(self.failed).split()[0])
        except (RuntimeError, ValueError):
            return 1  # torchrun is gone

    def spread(self, number: int) -> None:
        with contextlib.suppress(RuntimeError):
            self.store.compare_set(self.stop, "", f"{number} {dist.get_rank()}")

    def end(self) -> None:
        """After everyone has agreed to: hang up."""
        self.ended.set()
        dist.send(torch.zeros(1), self.after, group=self.group)
        for thread in self.threads:
            thread.join()

    def _look(self) -> None:
        parent, asked, looks = os.getppid(), False, 0
        while not self.ended.wait(LOOK_EVERY):
            try:
                if self.store.check([self.failed]):
                    os._exit(int(self.store.get(self.failed).split()[0]))
                if not asked and self.store.check([self.stop]):
                    asked, (number, rank) = True, map(int, self.store.get(self.stop).split())
                    if rank != dist.get_rank():
                        os.kill(os.getpid(), number)
                looks += 1
                if looks % BEAT_EVERY == 0:
                    self._beat()
                alive = os.getppid() == parent
            except RuntimeError:
                alive = False
            if not alive:
                if not self.ended.is_set():
                    os.kill(os.getpid(), signal.SIGTERM)  # as if asked to: the run is saved
                return

    def _beat(self) -> None:
        """Give a sign of life, and look at those of the others."""
        me, now = dist.get_rank(), time.monotonic()
        passed = min(now - self.beat_at, 2 * LOOK_EVERY * BEAT_EVERY)  # not the time in which this one was stopped
        self.beat_at, self.beats = now, self.beats + 1
        came, since = self.came, self.waits_since
        self.store.set(self.lives[me], f"{self.beats} {came}")
        for seen, text in zip(self.seen, self.store.multi_get(self.lives)):
            beats, others = map(int, text.split())
            seen[:] = [beats, others, 0.0 if beats != seen[0] else seen[2] + passed]
        silent = {rank: seen[2] for rank, seen in enumerate(self.seen) if seen[2] >= SAY_AFTER}
        waited = now - since if since is not None and came == self.came else 0.0
        late = {rank: waited for rank, seen in enumerate(self.seen) if waited >= SAY_AFTER and seen[1] < came}
        self._say_who({**late, **silent}, silent, me)
        if gone := [rank for rank, seconds in silent.items() if seconds > self.patience]:
            cause = f"{_ranks(gone)}: no sign of life for {silent[gone[0]]:.0f} s (dist_timeout): stopped, or its " \
                    "machine is gone; all others end too; run the same command again"
            if self.tell(cause):
                print(f"error: {cause}", file=sys.stderr, flush=True)
            os._exit(1)

    def _say_who(self, awaited: Mapping[int, float], silent: Mapping[int, float], me: int) -> None:
        """Name the processes that are waited for; the first of those that wait does."""
        if not awaited:
            self.said_after = SAY_AFTER
        elif (seconds := max(awaited.values())) >= self.said_after and \
                me == min(set(range(len(self.seen))) - set(awaited), default=None):
            state = "no sign of life: stopped, or its machine is gone" if silent else "it reads, validates or saves"
            print(f"waiting  for {_ranks(awaited)} since {seconds:.0f} s: {state}", file=sys.stderr, flush=True)
            self.said_after = 4 * seconds

    def _listen(self) -> None:
        try:
            dist.recv(torch.zeros(1), self.before, group=self.group)
        except RuntimeError:
            if not self.ended.is_set():
                if self.tell("gone"):
                    print(f"error: process {self.before} has ended without a word, as by SIGKILL; all others end too",
                          file=sys.stderr, flush=True)
                os._exit(self.code())


def _ranks(ranks: Iterable[int]) -> str:
    """'rank 1', or 'ranks 1, 3'."""
    ranks = sorted(ranks)
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


# ---------------------------------------------------------------- agree


@contextlib.contextmanager
def _together() -> Iterator[None]:
    """Around what all processes come together for."""
    if _watch:
        _watch.waits_since = time.monotonic()
        _watch.came += 1
    try:
        yield
    finally:
        if _watch:
            _watch.waits_since = None


def from_main(make: Callable[[], Any]) -> Any:
    """What `make` returns in the main process, the only one to call it, for all."""
    if not dist.is_initialized():
        return make()
    box = [make() if is_main() else None]
    with _together():
        dist.broadcast_object_list(box, src=0)
    return box[0]


def gather(mine: Any) -> list[Any]:
    """What every process has, by rank, for all."""
    if not dist.is_initialized():
        return [mine]
    boxes = [None] * dist.get_world_size()
    with _together():
        dist.all_gather_object(boxes, mine)
    return boxes


def largest(mine: int) -> int:
    """The largest number that any process has, for all."""
    if not dist.is_initialized():
        return mine
    box = torch.tensor([mine])
    with _together():
        dist.all_reduce(box, dist.ReduceOp.MAX)
    return int(box)


def any_of(mine: bool) -> bool:
    """Whether it is so in any process."""
    return bool(largest(int(mine)))


def means(mine: Mapping[str, float]) -> dict[str, float]:
    """Of each number the mean over the processes."""
    rows = gather(dict(mine))
    return {key: sum(row[key] for row in rows) / len(rows) for key in mine}


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
