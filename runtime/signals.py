"""Handle the signals that ask a run to stop: answer at once, also in a long step, and stop where nothing is lost.

Python calls its handlers between two of its own instructions, hence not while this process computes or waits for others
in C. So a thread reads the signals from a socket (signal.set_wakeup_fd): it records and announces them, and forwards
them to the other processes. The module imports the standard library only, and what does likewise, because `main.py`
imports it first: importing the rest takes seconds, and a signal in that time is answered as well.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from runtime.watchdog import print_now, watch
from storage import system

STOP_SIGNALS = system.named_signals("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP", "SIGBREAK")
SAME_PRESS = 2.0  # seconds: torchrun forwards the SIGINT that its processes already got from the terminal
FAILED = 1000  # larger than the number of any signal


class Interrupted(BaseException):
    """Raised when a stop request comes while the next batch is fetched; nothing that was trained is lost."""


class StopRequest:
    """Turns a signal into a flag, which the work in the `with` block checks between two steps or other units.

    Args:
        unit: name of the unit that is finished before the stop, for a message.
        waits: whether it is finished; if not, a signal ends a `program` at once.
    """

    def __init__(self, unit: str = "this step", waits: bool = True):
        self.unit, self.waits = unit, waits
        self.signal: signal.Signals | None = None  # received by this process
        self.agreed: signal.Signals | None = None  # for which all processes stop after the same step
        self.save = False  # whether all save after this step, because rank 0's clock says so
        self.problem: str | None = None  # why one of them has no next batch, for which all stop, too
        self.fetching = False  # whether a signal interrupts the main thread

    def __enter__(self) -> StopRequest:
        if _Handlers.open is None:
            _Handlers.open = _Handlers()
        _Handlers.open.requests.append(self)
        return self

    def __exit__(self, *_) -> None:
        _Handlers.open.requests.remove(self)
        if not _Handlers.open.requests and not _Handlers.open.is_program:
            _Handlers.open.close()

    def all_ready(self, fetch: Callable[[], None], step: int, save: bool = False) -> bool:
        """Fetch the next batch. Returns whether every process has its own; if not, all stop before this step.

        A stop request interrupts the fetching. The text of an exception in any process is in `problem` of all.

        Args:
            step: its number.
            save: whether rank 0's clock asks for a save after this step, which the attribute `save` then tells all.
        """
        from runtime import distributed  # imports torch, see above

        problem = None
        if self.agreed:
            return False
        try:
            self.fetch(fetch, "step", f"step {step}")
        except Interrupted:
            pass
        except Exception as error:
            problem = str(error)
        number = FAILED if problem is not None else self.signal or 0
        number, self.save = divmod(distributed.max_over_ranks(2 * number + save), 2)  # one exchange for both
        if number == FAILED:
            self.problem = next(text for text in distributed.gather(problem) if text is not None)
        elif number:
            self.agreed = signal.Signals(number)
        return not number

    def fetch(self, get: Callable[[], Any], kind: str, place: str) -> Any:
        """Return what `get` returns: the data of a unit of work, which begins then.

        Args: kind, place: of the unit, see `Watch.begin`.
        Raises: Interrupted when a stop request came before or comes meanwhile.
        """
        watch.begin("wait", f"the data of {place}")
        try:
            self.fetching = True
            if self.signal:
                raise Interrupted
            found = get()
        finally:
            self.fetching = False
        watch.begin(kind, place)
        return found

    def agree(self) -> None:
        """Stop all processes here if any of them has a stop request, without another step."""
        from runtime import distributed

        if number := distributed.max_over_ranks(self.signal or 0):
            self.agreed = signal.Signals(number)

    @property
    def exit_code(self) -> int:
        """128 + the number of the signal; 0 without one."""
        reason = self.agreed or self.signal
        return 128 + reason if reason else 0


class _Handlers:
    """The signal handlers and the thread of this process, shared by its stop requests."""

    open: _Handlers | None = None

    def __init__(self, is_program: bool = False):
        self.is_program, self.process = is_program, os.getpid()
        self.requests: list[StopRequest] = []
        self.ending = self.ended = False  # the work is done; a signal ends this process
        self.end_others: Callable[[int], tuple[bool, int | None]] = lambda number: (True, None)
        self.reader, self.writer = socket.socketpair()
        self.writer.setblocking(False)
        wanted = [sig for sig in STOP_SIGNALS  # nohup ignores SIGHUP on purpose
                  if sig.name != "SIGHUP" or signal.getsignal(sig) != signal.SIG_IGN]
        self.previous = {sig: signal.signal(sig, self.handle) for sig in wanted}
        self.wakeup = signal.set_wakeup_fd(self.writer.fileno(), warn_on_full_buffer=False)
        self.thread = threading.Thread(target=self.listen, daemon=True)
        self.thread.start()
        watch.start()

    def close(self) -> None:
        _Handlers.open = None
        watch.close()
        signal.set_wakeup_fd(self.wakeup)
        for sig, handler in self.previous.items():
            signal.signal(sig, handler)
        self.writer.send(b"\0")
        self.thread.join()
        self.reader.close()
        self.writer.close()

    @property
    def ends_now(self) -> bool:
        """Whether a signal ends this process immediately."""
        return self.is_program and not self.ending and not any(request.waits for request in self.requests)

    def record(self, number: int) -> None:
        """Set the flag of every request."""
        for request in self.requests:
            request.signal = request.signal or signal.Signals(number)

    def handle(self, number: int, frame) -> None:
        """Handle a signal in the main thread, which may be after a long time in C."""
        if os.getpid() != self.process:
            return  # a data worker that inherited this handler and has not set its own yet
        if self.ends_now:
            self.end(number)
        self.record(number)
        if self.requests and self.requests[-1].fetching:
            self.requests[-1].fetching = False
            raise Interrupted

    def listen(self) -> None:
        """Handle signals in a thread, at once."""
        first = None
        while number := self.reader.recv(1)[0]:
            if number not in self.previous:
                continue  # another signal with a handler in Python
            if self.ends_now:
                time.sleep(0.5)
                self.end(number)  # the main thread did not: it is in C
            elif first is None:
                first = time.monotonic()
                self.record(number)
                self.announce(number)
            elif number == signal.SIGINT and time.monotonic() > first + SAME_PRESS:
                os._exit(130)

    def announce(self, number: int) -> None:
        """Print what happens next, and forward the signal to the other processes."""
        if self.requests:
            from runtime import distributed

            more = "; once more leaves without saving" if number == signal.SIGINT else \
                f", by {signal.Signals(number).name}"
            unit = self.requests[-1].unit
            why = f"{'Training i' if unit == 'this step' else 'I'}nterrupted by user (Ctrl+C): " \
                if number == signal.SIGINT else ""
            print_now(f"{why}stopping after {unit}{more}")
            distributed.forward_signal(number)

    def end(self, number: int) -> None:
        """End before the first step, where there is nothing to save."""
        if self.ended:
            return
        self.ended = True
        first, code = self.end_others(number)
        if first:
            print_now(f"stopped  by {signal.Signals(number).name} before the first step", always=True)
        if code is not None:
            os._exit(code)
        if threading.current_thread() is threading.main_thread():
            end_by_signal(number)
        os._exit(128 + number)


def begin_program() -> None:
    """Let a signal end this process with one line, until there is a `StopRequest`."""
    if _Handlers.open is None:
        _Handlers.open = _Handlers(is_program=True)


@contextlib.contextmanager
def program(end_others: Callable[[int], tuple[bool, int | None]]) -> Iterator[None]:
    """Enclose the work of a program, which may be one of several processes; signals after it are ignored.

    Args: end_others: ends the other processes for a signal; returns whether this process is the first to do so, and an
        exit code or None.
    """
    _Handlers.open.end_others = end_others
    try:
        yield
    finally:
        _Handlers.open.ending = True


def end_by_signal(number: int) -> None:
    """End this process by a signal, so that a shell script that waits for it ends as well."""
    with contextlib.suppress(OSError, RuntimeError, ValueError):
        sys.stdout.flush()
    system.end_by_signal(number)


def _forked() -> None:
    """Separate a data worker from the socket of its parent."""
    if _Handlers.open:
        with contextlib.suppress(ValueError):
            signal.set_wakeup_fd(-1)


system.at_fork(after_in_child=_forked)
