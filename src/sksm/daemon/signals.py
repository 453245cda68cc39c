"""Signals that something waits for, in a process that may have other threads.

Numpy starts threads when it is imported, before anybody could block a signal in them,
and the kernel gives a signal to any thread that does not (signal(7)). So it is caught
wherever it arrives, and written to a socket (signal.set_wakeup_fd).
"""

from __future__ import annotations

import contextlib
import select
import signal
import socket
from collections.abc import Callable, Iterator

Wait = Callable[[float], int]


class Wakeup:
    """A socket that becomes readable when one of some signals arrives."""

    def __init__(self, *signals: signal.Signals) -> None:
        self._signals = signals

    def __enter__(self) -> socket.socket:
        self._near, self._far = socket.socketpair()
        self._far.setblocking(False)
        signal.set_wakeup_fd(self._far.fileno())
        for number in self._signals:
            signal.signal(number, lambda *_: None)
        return self._near

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(-1)
        self._near.close()
        self._far.close()


@contextlib.contextmanager
def held(*signals: signal.Signals) -> Iterator[Wait]:
    """Let signals break off nothing in the block but what waits for them.

    Gives `wait(seconds)`: the next of them that arrived, 0 if none does in that time.
    """
    handlers = [signal.getsignal(number) for number in signals]
    with Wakeup(*signals) as wake:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)

        def wait(seconds: float) -> int:
            # What came to this thread is pending until here.
            signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
            try:
                ready, _, _ = select.select([wake], [], [], seconds)
            finally:
                signal.pthread_sigmask(signal.SIG_BLOCK, signals)
            number = wake.recv(1)[0] if ready else 0
            return number if number in signals else 0  # others end up there, too

        try:
            yield wait
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            for number, handler in zip(signals, handlers, strict=True):
                signal.signal(number, handler)
