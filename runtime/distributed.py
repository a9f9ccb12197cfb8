"""Several processes as one run: rank and world size, collective calls, and the failure of one that ends all.

torchrun starts the processes and sets the environment variables; torch.distributed connects them. With one process
every function here is the identity, so that a recipe reads the same. There are two process groups: the default one
(gloo) for decisions of the loop (stop, save, validate), and `_data` (NCCL on CUDA) for gradients and batches.

Rank r of W holds the rows r, r + W, r + 2W, ... of a batch: see data.sampler.
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

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else every process warns about find_unused_parameters

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402

PATIENCE = datetime.timedelta(days=7)  # a rank may validate or write for hours; `_Watch` detects a dead one
LOOK_EVERY = 0.5  # seconds between two looks at the state of the other ranks
BEAT_EVERY = 4  # looks per heartbeat
SAY_AFTER = 60.0  # seconds of waiting before the missing rank is named; quadrupled after each message

_data: dist.ProcessGroup | None = None  # None: the default group, gloo
_independent = 0  # depth of nested `independent_ranks`
_watch: _Watch | None = None


# ---------------------------------------------------------------- rank and world size


def world_size() -> int:
    """Return the number of processes that share a batch."""
    return dist.get_world_size() if dist.is_initialized() and not _independent else 1


def rank() -> int:
    """Return the number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() and not _independent else 0


def is_main() -> bool:
    """Return whether this is rank 0, the only process that writes."""
    return not dist.is_initialized() or dist.get_rank() == 0


def launched() -> bool:
    """Return whether torchrun started this process, even if it started only one."""
    return "TORCHELASTIC_RUN_ID" in os.environ or "LOCAL_WORLD_SIZE" in os.environ


def local_rank() -> int:
    """Return the number of this process on its machine, which is also its CUDA device."""
    return int(os.environ.get("LOCAL_RANK", 0))


def device_for(opt: Mapping[str, Any]) -> torch.device:
    """Return the device of this process. The options stay as the user wrote them.

    Raises: RuntimeError for a device name that torch does not know.
    """
    name, here, chosen = opt["device"], local_rank(), opt.get("gpu_ids")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device("cuda", chosen[here] if chosen and here < len(chosen) else here) if name == "cuda" \
        else torch.device(name)


def launcher() -> list[str]:
    """Return the first words of the command that starts these processes, for printing."""
    if not launched():
        return ["python"]
    nodes, here = os.environ.get("GROUP_WORLD_SIZE", "1"), os.environ["LOCAL_WORLD_SIZE"]
    return ["torchrun", *([f"--nnodes={nodes}"] if nodes != "1" else []), f"--nproc_per_node={here}"]


def launch() -> str:
    """Identify the launch: equal in every automatic restart by the launcher; "" without a launcher."""
    return os.environ.get("SLURM_JOB_ID") or (f"{socket.gethostname()}:{os.getppid()}" if launched() else "")


def restarted() -> bool:
    """Return whether the launcher repeats this command (torchrun --max-restarts, a requeued Slurm job)."""
    return any(int(os.environ.get(key, 0)) > 0 for key in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))


# ---------------------------------------------------------------- start and end


def start() -> None:
    """Connect the processes that torchrun started. A single process needs nothing."""
    global _watch
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        dist.init_process_group("gloo", timeout=PATIENCE)
        if not is_main():
            warnings.simplefilter("ignore")  # rank 0 prints them
        _watch = _Watch()


def use_device(device: torch.device, patience: float = 1800) -> None:
    """Set up the process group for tensors on this device.

    Args: patience: seconds without a heartbeat of a rank after which the others end.
    """
    global _data
    if _watch:
        _watch.patience = patience
    if dist.is_initialized() and device.type == "cuda" and _data is None:
        _data = dist.new_group(backend="nccl")


def finish() -> None:
    """Disconnect at the end of a run. All ranks call it; after it, the exit of a rank is not a failure."""
    global _data, _watch
    if dist.is_initialized():
        dist.barrier()
        _watch.end()
        dist.destroy_process_group()
        _data = _watch = None


def fail(cause: str, code: int = 1, *, record: bool = True) -> bool:
    """Make all ranks end with this code, and give torchrun the cause.

    Returns: whether this rank is the first to fail; only the first prints its cause.
    """
    if _watch is None:
        return True
    first = _watch.tell(cause, code)
    if first and record and (path := os.environ.get("TORCHELASTIC_ERROR_FILE")):  # what torchrun's summary shows
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"message": cause, "timestamp": int(time.time())}, file)
    return first


def wait_for_cause(error: Exception) -> None:
    """Give the watch time to name a dead rank and end this process: a broken connection is only a consequence."""
    if _watch and isinstance(error, RuntimeError):
        time.sleep(4 * LOOK_EVERY)


def code_of_failure() -> int:
    """Return the exit code of the first rank that failed."""
    return _watch.code() if _watch else 1


def forward_signal(number: int) -> None:
    """Send a signal that this rank received to the other ranks, one of which may wait for data."""
    if _watch:
        _watch.forward_signal(number)


def exit_process(code: int) -> None:
    """Exit. With several processes skip the interpreter's cleanup, which would wait for the other ranks."""
    sys.stdout.flush()
    sys.stderr.flush()
    if dist.is_initialized():
        os._exit(code)
    sys.exit(code)


class _Watch:
    """Two threads that end this process when another one failed or died, and stop the run when torchrun died.

    Failures and stop requests are keys in torchrun's store. A death shows as a closed connection: each rank waits to
    receive from the previous rank, on a process group of its own, which sends only at the end. Every rank also keeps
    two counters in the store: heartbeats, which a suspended process does not increase, and collective calls reached,
    which tell whom the others wait for.
    """

    def __init__(self):
        self.ended = threading.Event()
        self.patience = 1800.0
        self.came, self.waits_since = 0, None  # collective calls reached; monotonic time since which this rank waits
        self.seen = [[-1, 0, 0.0] for _ in range(dist.get_world_size())]  # by rank: heartbeats, came, seconds silent
        self.said_after, self.beats, self.beat_at = SAY_AFTER, 0, time.monotonic()
        self.before, self.after = ((dist.get_rank() + d) % dist.get_world_size() for d in (-1, 1))
        self.group = dist.new_group(backend="gloo", timeout=PATIENCE)
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self.store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False,
                                   timeout=datetime.timedelta(seconds=10))
        this = from_main(lambda: os.urandom(8).hex())  # a restart must not find the keys of the previous launch
        self.failed, self.stop = (f"perdure/{what}/{this}" for what in ("failed", "stop"))
        self.lives = [f"perdure/life/{this}/{rank}" for rank in range(dist.get_world_size())]
        self.store.set(self.lives[dist.get_rank()], "0 0")
        dist.barrier()
        self.threads = [threading.Thread(target=work, daemon=True) for work in (self._look, self._listen)]
        for thread in self.threads:
            thread.start()

    def tell(self, cause: str, code: int = 1) -> bool:
        """Record a failure. Returns whether it is the first."""
        self.ended.set()
        entry = f"{code} {dist.get_rank()}: {cause}".encode()
        try:
            return self.store.compare_set(self.failed, "", entry) == entry
        except RuntimeError:
            return True  # torchrun is gone: every rank prints its own cause

    def code(self) -> int:
        try:
            return int(self.store.get(self.failed).split()[0])
        except (RuntimeError, ValueError):
            return 1  # torchrun is gone

    def forward_signal(self, number: int) -> None:
        with contextlib.suppress(RuntimeError):
            self.store.compare_set(self.stop, "", f"{number} {dist.get_rank()}")

    def end(self) -> None:
        """Close the connections, after all ranks agreed to end."""
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
                    os.kill(os.getpid(), signal.SIGTERM)  # stop as if asked to, so that the run is saved
                return

    def _beat(self) -> None:
        """Write this rank's heartbeat and check those of the others."""
        me, now = dist.get_rank(), time.monotonic()
        passed = min(now - self.beat_at, 2 * LOOK_EVERY * BEAT_EVERY)  # less any time this process was suspended
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
            cause = f"{_ranks(gone)}: no heartbeat for {silent[gone[0]]:.0f} s (dist_timeout): suspended, or its " \
                    "machine is gone; all others end too; run the same command again"
            if self.tell(cause):
                print(f"error: {cause}", file=sys.stderr, flush=True)
            os._exit(1)

    def _say_who(self, awaited: Mapping[int, float], silent: Mapping[int, float], me: int) -> None:
        """Print which ranks are waited for. The lowest waiting rank prints."""
        if not awaited:
            self.said_after = SAY_AFTER
        elif (seconds := max(awaited.values())) >= self.said_after and \
                me == min(set(range(len(self.seen))) - set(awaited), default=None):
            state = "no heartbeat: suspended, or its machine is gone" if silent else "it reads, validates or saves"
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
    """Format rank numbers: 'rank 1', 'ranks 1, 3'."""
    ranks = sorted(ranks)
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


# ---------------------------------------------------------------- decisions of all ranks


@contextlib.contextmanager
def _together() -> Iterator[None]:
    """Count a collective call for the watch, and how long it waits."""
    if _watch:
        _watch.waits_since = time.monotonic()
        _watch.came += 1
    try:
        yield
    finally:
        if _watch:
            _watch.waits_since = None


def from_main(make: Callable[[], Any]) -> Any:
    """Call `make` on rank 0 only, and return its result on every rank."""
    if not dist.is_initialized():
        return make()
    box = [make() if is_main() else None]
    with _together():
        dist.broadcast_object_list(box, src=0)
    return box[0]


def gather(value: Any) -> list[Any]:
    """Return the values of all ranks, in rank order, on every rank."""
    if not dist.is_initialized():
        return [value]
    boxes = [None] * dist.get_world_size()
    with _together():
        dist.all_gather_object(boxes, value)
    return boxes


def max_over_ranks(value: int) -> int:
    """Return the largest value of any rank, on every rank."""
    if not dist.is_initialized():
        return value
    box = torch.tensor([value])
    with _together():
        dist.all_reduce(box, dist.ReduceOp.MAX)
    return int(box)


def any_rank(value: bool) -> bool:
    """Return whether the value is true on any rank."""
    return bool(max_over_ranks(int(value)))


def mean_over_ranks(values: Mapping[str, float]) -> dict[str, float]:
    """Return the mean of each number over the ranks."""
    rows = gather(dict(values))
    return {key: sum(row[key] for row in rows) / len(rows) for key in values}


# ---------------------------------------------------------------- tensors of a whole batch


@contextlib.contextmanager
def independent_ranks() -> Iterator[None]:
    """Inside the block the world size is 1: each rank validates its own samples."""
    global _independent
    _independent += 1
    try:
        yield
    finally:
        _independent -= 1


def all_reduce_sum(x: Tensor) -> Tensor:
    """Sum over the ranks. Differentiable."""
    return x if world_size() == 1 else _AllReduceSum.apply(x)


class _AllReduceSum(torch.autograd.Function):
    """A sum over ranks; its gradient is the sum of the ranks' gradients."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x, group=_group(x))
        return x

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return _AllReduceSum.forward(ctx, gradient)


def all_reduce_mean(x: Tensor) -> Tensor:
    """Average over the ranks. Differentiable."""
    return x if world_size() == 1 else all_reduce_sum(x) / world_size()


def all_reduce_sum_(x: Tensor) -> None:
    """Sum over the ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(x, group=_group(x))


def local_rows(batch: Tensor) -> Tensor:
    """Select the rows of a whole batch (B, ...) that this rank computes: (B / W, ...)."""
    return batch[rank() :: world_size()]


def gather_rows(part: Tensor) -> Tensor:
    """Gather the rows (B / W, ...) of all ranks into the whole batch (B, ...), in its order. No gradient."""
    if world_size() == 1:
        return part
    parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(world_size())]
    dist.all_gather(parts, part.detach().contiguous(), group=_group(part))
    return torch.stack(parts, dim=1).flatten(0, 1)


def _group(x: Tensor) -> dist.ProcessGroup | None:
    return _data if x.is_cuda else None


# ---------------------------------------------------------------- networks


def wrap(network: nn.Module, find_unused_parameters: bool = True, static_graph: bool = False) -> nn.Module:
    """Wrap a network so that its backward pass averages gradients over the ranks.

    DistributedDataParallel rebuilds its gradient buckets after the first step, unless it looks for unused
    parameters. Then the first step after a restart would sum in another order, which changes the last bits with three
    or more ranks. So it looks for them by default.
    """
    if world_size() == 1 or not any(p.requires_grad for p in network.parameters()):
        return network
    warnings.filterwarnings("ignore", "Grad strides")  # gradients with other strides than their bucket
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # broadcast_buffers is renamed in torch 2.15
        return DistributedDataParallel(network, process_group=_data, broadcast_buffers=False,
                                       static_graph=static_graph, find_unused_parameters=find_unused_parameters)


def no_sync(network: nn.Module, last: bool) -> contextlib.AbstractContextManager:
    """Postpone the all-reduce of gradients to the last micro-batch of a step."""
    return contextlib.nullcontext() if last or world_size() == 1 else network.no_sync()


def broadcast_buffers(network: nn.Module) -> None:
    """Copy the saved buffers of rank 0 to all ranks. Batch statistics differ by rank; rank 0's are saved."""
    if world_size() > 1:
        saved = network.state_dict().keys()
        for name, buffer in network.named_buffers():
            if name in saved:
                dist.broadcast(buffer, src=0, group=_group(buffer))


def synchronize_batchnorm(network: nn.Module) -> None:
    """Replace batch norm layers by ones that use the statistics of the whole batch."""
    if world_size() > 1:
        for module in network.modules():
            if type(module) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
                module.__class__ = SyncedBatchNorm


class SyncedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm over the rows of all ranks. torch.nn.SyncBatchNorm does not support CPU tensors."""

    def _check_input_dim(self, x: Tensor) -> None:
        """Accept any shape: the replaced layer has checked it."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or world_size() == 1:
            return super().forward(x)
        axes, shape = [0, *range(2, x.ndim)], [1, -1, *[1] * (x.ndim - 2)]
        centred = x.float()
        mean = all_reduce_mean(centred.mean(axes))
        centred = centred - mean.view(shape)
        variance = all_reduce_mean(centred.square().mean(axes))
        with torch.no_grad():
            count = x.numel() // x.shape[1] * world_size()
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        scale = (variance + self.eps).rsqrt() * self.weight
        return (centred * scale.view(shape) + self.bias.view(shape)).to(x.dtype)
