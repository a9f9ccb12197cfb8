"""Several processes as one run: rank and world size, collective calls, and the failure of one that ends all.

torchrun starts the processes and sets the environment variables; torch.distributed connects them. With one process
every function here is the identity, so that a recipe reads the same. There are two process groups: the default one
(gloo) for decisions of the loop (stop, save, validate), and `_data` (NCCL on CUDA) for gradients and batches.

Rank r of W holds the rows r*B/W to (r+1)*B/W - 1 of a batch of B (see data.sampler), which are the micro-batches
r*A/W to (r+1)*A/W - 1 of A.
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

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from runtime.watchdog import HUNG, LOOK_EVERY, end_process, watch
from storage import system

PATIENCE = datetime.timedelta(days=7)  # a rank may validate or write for hours; `_Watch` detects a dead one
BEAT_EVERY = 4  # looks per heartbeat
SAY_AFTER = 60.0  # seconds of waiting before the missing rank is named; quadrupled after each message

_data: dist.ProcessGroup | None = None  # None: the default group, gloo
_watch: _Watch | None = None


# ---------------------------------------------------------------- rank and world size


def world_size() -> int:
    """Return the number of processes that share a batch."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


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
    """Return the first words of the command that starts these processes, as the user typed them, for printing."""
    is_program = os.path.basename(sys.argv[0]) == "main.py"  # not where another program imports it
    script = sys.argv[0] if is_program else "main.py"
    if not launched():
        return [*(sys.orig_argv[: -len(sys.argv)] if is_program else ["python"]), script]
    nodes, here = os.environ.get("GROUP_WORLD_SIZE", "1"), os.environ["LOCAL_WORLD_SIZE"]
    return ["torchrun", *([f"--nnodes={nodes}"] if nodes != "1" else []), f"--nproc_per_node={here}", script]


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
        watch.begin("start", "connecting to the other processes")
        store, rank, size = next(rendezvous("env://", timeout=PATIENCE))
        dist.init_process_group("gloo", timeout=PATIENCE, rank=rank, world_size=size,
                                store=dist.PrefixStore(_name_start(store, rank, size), store))
        if not is_main():
            warnings.simplefilter("ignore")  # rank 0 prints them
        _watch = _Watch()


def _name_start(store: dist.Store, rank: int, size: int) -> str:
    """Return a name that the processes of this start share, and no earlier start had.

    After a restart torchrun's store still has the addresses of processes that are gone (torch 2.14 reads them).
    """
    own = os.urandom(8).hex()
    store.set(f"perdure/here/{rank}", own)
    if rank:
        name = store.get(f"perdure/name/{own}").decode()  # waits for rank 0, which answers each process that comes
        store.set(f"perdure/known/{name}/{rank}", "")
        return name
    missing = set(range(1, size))
    while missing:
        for other in sorted(missing):
            if store.check([f"perdure/here/{other}"]):
                store.set(f"perdure/name/{store.get(f'perdure/here/{other}').decode()}", own)
        missing = {other for other in missing if not store.check([f"perdure/known/{own}/{other}"])}
        time.sleep(0.02)
    return own


def use_device(device: torch.device) -> None:
    """Set up the process group for tensors on this device."""
    global _data
    if dist.is_initialized() and device.type == "cuda" and _data is None:
        _data = dist.new_group(backend="nccl", timeout=PATIENCE)


def finish() -> None:
    """Disconnect at the end of a run. All ranks call it; after it, the exit of a rank is not a failure."""
    global _data, _watch
    if dist.is_initialized():
        with _together():
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
    """Ends this process when another one failed, hangs or died, and stops the run when torchrun died.

    Failures and stop requests are keys in torchrun's store, at which the thread of runtime/watchdog.py looks. A death
    shows as a closed connection: each rank waits, in a thread, to receive from the previous rank, on a process group of
    its own, which sends only at the end. Every rank also keeps counters in the store: heartbeats, which a suspended
    process does not increase; collective calls reached, which tell whom the others wait for; and its progress. A rank
    that waits does not hang as long as another one makes progress.
    """

    def __init__(self):
        self.ended = threading.Event()
        self.rank = dist.get_rank()
        self.came, self.waits_since = 0, None  # collective calls reached; monotonic time since which this rank waits
        # by rank: heartbeats, came, progress; seconds without a heartbeat, and without progress
        self.seen = [([-1, 0, 0], [0.0, 0.0]) for _ in range(dist.get_world_size())]
        self.said_after, self.looks, self.passed = SAY_AFTER, 0, 0.0
        self.parent, self.asked = os.getppid(), False
        self.before, self.after = ((dist.get_rank() + d) % dist.get_world_size() for d in (-1, 1))
        self.group = dist.new_group(backend="gloo", timeout=PATIENCE)
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self.store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False,
                                   timeout=datetime.timedelta(seconds=10))
        this = from_main(lambda: os.urandom(8).hex())  # a restart must not find the keys of the previous launch
        self.failed, self.stop = (f"perdure/{what}/{this}" for what in ("failed", "stop"))
        self.lives = [f"perdure/life/{this}/{rank}" for rank in range(dist.get_world_size())]
        self.store.set(self.lives[self.rank], "0 0 0")
        dist.barrier()
        self.thread = threading.Thread(target=self._listen, daemon=True)
        self.thread.start()
        watch.tell, watch.waits = self.tell, self._waits
        watch.looks.append(self._look)

    def tell(self, cause: str, code: int = 1) -> bool:
        """Record a failure. Returns whether it is the first."""
        self.ended.set()
        entry = f"{code} {self.rank}: {cause}".encode()
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
            self.store.compare_set(self.stop, "", f"{number} {self.rank}")

    def end(self) -> None:
        """Close the connections, after all ranks agreed to end."""
        self.ended.set()
        dist.send(torch.zeros(1), self.after, group=self.group)
        self.thread.join()

    def _look(self, passed: float) -> None:
        """Look at the store. Args: passed: seconds since the last look."""
        if self.ended.is_set():
            return
        try:
            if self.store.check([self.failed]):
                self._leave()
            if not self.asked and self.store.check([self.stop]):
                self.asked, (number, rank) = True, map(int, self.store.get(self.stop).split())
                if rank != self.rank:
                    system.send_to_self(number)
            self.looks, self.passed = self.looks + 1, self.passed + passed
            if self.looks % BEAT_EVERY == 0:
                self._beat(self.passed)
                self.passed = 0.0
            alive = os.getppid() == self.parent
        except RuntimeError:
            alive = False
        if not alive and not self.ended.is_set():
            self.ended.set()
            system.send_to_self(signal.SIGTERM)  # stop as if asked to, so that the run is saved

    def _beat(self, passed: float) -> None:
        """Write this rank's counters and look at those of the others."""
        me, now = self.rank, time.monotonic()
        came, since = self.came, self.waits_since
        self.store.set(self.lives[me], f"{self.looks} {came} {watch.progress}")
        for (seen, still), text in zip(self.seen, self.store.multi_get(self.lives)):
            new = list(map(int, text.split()))
            still[:] = [0.0 if new[at] != seen[at] else seconds + passed for at, seconds in zip((0, 2), still)]
            seen[:] = new
        silent = {rank: still[0] for rank, (_, still) in enumerate(self.seen) if still[0] >= SAY_AFTER}
        waited = now - since if since is not None and came == self.came else 0.0
        late = {rank: waited for rank, (seen, _) in enumerate(self.seen) if waited >= SAY_AFTER and seen[1] < came}
        self._say_who({**late, **silent}, silent, me)
        if gone := {rank: still[0] for rank, (_, still) in enumerate(self.seen) if 0 < watch.patience < still[0]}:
            cause = f"{_ranks(gone)}: no heartbeat for {max(gone.values()):.0f} s (train.watchdog): suspended, or " \
                    "its machine is gone; all others end too; run the same command again"
            if self.tell(cause, HUNG):
                print(f"error: {cause}", file=sys.stderr, flush=True)
            end_process(HUNG)

    def _waits(self) -> bool:
        """Return whether this rank waits for another one that may still finish, or be the first to end them all."""
        return self.waits_since is not None and \
            min(still[1] for _, still in self.seen) <= watch.patience + 2 * BEAT_EVERY * LOOK_EVERY

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
                self._leave()

    def _leave(self) -> None:
        """End this process as the first rank that failed; where that hangs, the stacks show where this one waits."""
        if (code := self.code()) == HUNG:
            watch.leave()
        end_process(code)


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


# ---------------------------------------------------------------- sums over micro-batches


Part = list[Tensor]  # what is summed: gradients, changes of buffers, loss terms, counts


def num_micro_batches(accumulate: int) -> int:
    """Return the number of micro-batches of a step over all ranks: `accumulate`, or one for each of more ranks.

    Raises: ValueError: the world size does not divide it.
    """
    if accumulate > world_size() and accumulate % world_size():
        raise ValueError(f"train.accumulate {accumulate} must be a multiple of the {world_size()} processes, or not "
                         "above their number")
    return max(accumulate, world_size())


def sum_micro_batches(compute: Callable[[int], Part], num: int) -> Part:
    """Sum the parts of all micro-batches in one binary tree over their numbers, which no world size 2**k changes.

    Each rank computes a contiguous share of the numbers and holds at most log2(num) + 1 parts at once. Ranks exchange
    their sums pairwise (recursive doubling). For other world sizes the order is fixed as well, but another one.

    Args:
        compute: returns the part of a micro-batch, in tensors that may be changed.
        num: of micro-batches over all ranks, a multiple of the world size.
    Returns: the sum, equal bit for bit on all ranks.
    """
    share = num // world_size()
    part = _tree(rank() * share, (rank() + 1) * share, compute)
    if world_size() == 1:
        return part
    for dtype in dict.fromkeys(tensor.dtype for tensor in part):
        tensors = [tensor for tensor in part if tensor.dtype == dtype]
        total = _sum_over_ranks(torch.cat([tensor.reshape(-1) for tensor in tensors]))
        for tensor, values in zip(tensors, total.split([tensor.numel() for tensor in tensors])):
            tensor.copy_(values.view(tensor.shape))
    return part


def _tree(start: int, end: int, compute: Callable[[int], Part]) -> Part:
    if end - start == 1:
        return compute(start)
    middle = (start + end) // 2
    left, right = _tree(start, middle, compute), _tree(middle, end, compute)
    if left:
        torch._foreach_add_(left, right)
    return left


@_together()
def _sum_over_ranks(x: Tensor) -> Tensor:
    """Sum a flat tensor over ranks: the upper part of the tree."""
    size, this, group = world_size(), rank(), _data if x.is_cuda else None
    if size & (size - 1):
        parts = [torch.empty_like(x) for _ in range(size)]
        dist.all_gather(parts, x, group=group)
        return _tree(0, size, lambda number: [parts[number]])[0]
    other = torch.empty_like(x)
    for distance in (2**level for level in range(size.bit_length() - 1)):
        partner = this ^ distance
        for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, x, partner, group),
                                            dist.P2POp(dist.irecv, other, partner, group)]):
            work.wait()
        x = x + other  # a sum of two is equal in either order
    return x


def broadcast(x: Tensor) -> Tensor:
    """Return rank 0's tensor, of a shape that all ranks know, on all ranks."""
    if world_size() > 1:
        x = x.contiguous()
        dist.broadcast(x, src=0, group=_data if x.is_cuda else None)
    return x


def synchronize_batchnorm(network: nn.Module) -> nn.Module:
    """Return the network with torch's batch norm over the rows of all ranks, on CUDA with several ranks.

    Raises: ValueError: on another device.
    """
    if world_size() == 1:
        return network
    if _data is None:
        raise ValueError("sync_batchnorm: several processes need CUDA for it; set it to false")
    return nn.SyncBatchNorm.convert_sync_batchnorm(network, _data)
