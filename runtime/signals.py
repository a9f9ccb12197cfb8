"""Signals that ask a run to stop: answered at once, also in a long step, and obeyed where nothing is lost.

Python calls its handlers between two of its own instructions, so not while this process computes or waits for others
in C. Hence a thread that the system itself wakes, through a pipe (signal.set_wakeup_fd): it notes, answers, and tells
the other processes. At import only the standard library is needed, for `main.py` begins with this: what it imports next
takes seconds, and a signal in them is answered as well.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
SAME_PRESS = 2.0  # seconds: torchrun forwards the SIGINT that its processes have from the terminal already
FAILED = 1000  # in a vote: more than any signal


class Interrupted(BaseException):
    """A stop request came while the next batch was fetched; nothing that was trained is touched."""


class StopRequest:
    """Inside, a signal sets a flag that the work looks at between two pieces, as steps; outside, it ends a `program`.

    Args: piece: what is finished before the stop. waits: whether it is; else a signal ends a `program` at once.
    """

    def __init__(self, piece: str = "this step", waits: bool = True):
        self.piece, self.waits = piece, waits
        self.signal: signal.Signals | None = None  # that this process got
        self.agreed: signal.Signals | None = None  # that all processes stop for, after the same step
        self.problem: str | None = None  # why one of them has no next batch: all stop for it as well
        self.fetching = False  # whether a signal interrupts what the main thread does

    def __enter__(self) -> StopRequest:
        if _Desk.open is None:
            _Desk.open = _Desk()
        _Desk.open.requests.append(self)
        return self

    def __exit__(self, *_) -> None:
        _Desk.open.requests.remove(self)
        if not _Desk.open.requests and not _Desk.open.is_program:
            _Desk.open.close()

    def all_ready(self, fetch: Callable[[], None]) -> bool:
        """Fetch the next batch, and return whether every process has its own; if not, all stop before this step.

        A stop request ends the fetching, and so does an exception, whose text is then in `problem` everywhere.
        """
        from runtime import distributed  # torch with it, see above

        problem = None
        if self.agreed:
            return False
        try:
            self.fetch(fetch)
        except Interrupted:
            pass
        except Exception as error:
            problem = str(error)
        number = distributed.max_over_ranks(FAILED if problem is not None else self.signal or 0)
        if number == FAILED:
            self.problem = next(text for text in distributed.gather(problem) if text is not None)
        elif number:
            self.agreed = signal.Signals(number)
        return not number

    def fetch(self, get: Callable[[], Any]) -> Any:
        """What `get` returns. Raises Interrupted when a stop request came before, or comes meanwhile."""
        try:
            self.fetching = True
            if self.signal:
                raise Interrupted
            return get()
        finally:
            self.fetching = False

    def settle(self) -> None:
        """Agree now, where another step would be one too many."""
        from runtime import distributed

        if number := distributed.max_over_ranks(self.signal or 0):
            self.agreed = signal.Signals(number)

    @property
    def exit_code(self) -> int:
        reason = self.agreed or self.signal
        return 128 + reason if reason else 0


class _Desk:
    """The handlers and the thread of this process, for all its requests."""

    open: _Desk | None = None

    def __init__(self, is_program: bool = False):
        self.is_program, self.process = is_program, os.getpid()
        self.requests: list[StopRequest] = []
        self.ending = self.over = False  # the work is done; this process is ending
        self.end_others: Callable[[int], tuple[bool, int | None]] = lambda number: (True, None)
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.writer, False)
        wanted = [sig for sig in STOP_SIGNALS  # nohup has a reason
                  if sig != signal.SIGHUP or signal.getsignal(sig) != signal.SIG_IGN]
        self.before = {sig: signal.signal(sig, self.handle) for sig in wanted}
        self.wakeup = signal.set_wakeup_fd(self.writer, warn_on_full_buffer=False)
        self.thread = threading.Thread(target=self.listen, daemon=True)
        self.thread.start()

    def close(self) -> None:
        _Desk.open = None
        signal.set_wakeup_fd(self.wakeup)
        for sig, handler in self.before.items():
            signal.signal(sig, handler)
        os.write(self.writer, b"\0")
        self.thread.join()
        os.close(self.reader)
        os.close(self.writer)

    @property
    def at_once(self) -> bool:
        """Whether a signal ends this process now."""
        return self.is_program and not self.ending and not any(request.waits for request in self.requests)

    def note(self, number: int) -> None:
        for request in self.requests:
            request.signal = request.signal or signal.Signals(number)

    def handle(self, number: int, frame) -> None:
        """In the main thread, once it is back in Python."""
        if os.getpid() != self.process:
            return  # a worker that was forked with this handler and has not yet set its own
        if self.at_once:
            self.end(number)
        self.note(number)
        if self.requests and self.requests[-1].fetching:
            self.requests[-1].fetching = False
            raise Interrupted

    def listen(self) -> None:
        """In a thread, at once."""
        first = None
        while number := os.read(self.reader, 1)[0]:
            if number not in self.before:
                continue  # another signal with a handler in Python
            if self.at_once:
                time.sleep(0.5)
                self.end(number)  # the main thread is in C
            elif first is None:
                first = time.monotonic()
                self.note(number)
                self.answer(number)
            elif number == signal.SIGINT and time.monotonic() > first + SAME_PRESS:
                os._exit(130)

    def answer(self, number: int) -> None:
        if self.requests:
            from runtime import distributed

            more = "; once more leaves without saving" if number == signal.SIGINT else \
                f", by {signal.Signals(number).name}"
            say(f"stopping after {self.requests[-1].piece}{more}")
            distributed.forward_signal(number)

    def end(self, number: int) -> None:
        """End before the first step: nothing is to be saved."""
        if self.over:
            return
        self.over = True
        first, code = self.end_others(number)
        if first:
            say(f"stopped  by {signal.Signals(number).name} before the first step", always=True)
        if code is not None:
            os._exit(code)
        if threading.current_thread() is threading.main_thread():
            die_by(number)
        os._exit(128 + number)


def say(text: str, always: bool = False) -> None:
    """Write a line past the buffers that the main thread may be using. Of several processes the main one does.

    Args: always: this one, whichever it is.
    """
    if always or int(os.environ.get("RANK", 0)) == 0:
        with contextlib.suppress(OSError):
            os.write(2, f"{chr(13) + chr(27) + '[K' if os.isatty(2) else ''}{text}\n".encode())


def begin_program() -> None:
    """From now on a signal ends this process in one line, until there is a `StopRequest`."""
    if _Desk.open is None:
        _Desk.open = _Desk(is_program=True)


@contextlib.contextmanager
def program(end_others: Callable[[int], tuple[bool, int | None]]) -> Iterator[None]:
    """Around the work of a program that is one of several, perhaps; when it is done, a signal is too late for anything.

    Args: end_others: ends the others for a signal; returns whether this process is the first, and an exit code or None.
    """
    _Desk.open.end_others = end_others
    try:
        yield
    finally:
        _Desk.open.ending = True


def die_by(number: int) -> None:
    """End this process by a signal, so that a shell that waits for it ends its loop as well."""
    with contextlib.suppress(OSError, RuntimeError, ValueError):
        sys.stdout.flush()
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def _forked() -> None:
    if _Desk.open:
        with contextlib.suppress(ValueError):
            signal.set_wakeup_fd(-1)  # what a worker gets is not for its parent


os.register_at_fork(after_in_child=_forked)
