"""Another process as the home of call lists, and what surrounds a list there."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from sksm.linux import calls, libc

if TYPE_CHECKING:
    from sksm.process.foothold import Foothold

Image = list[npt.NDArray[Any]]
_PEEKS = 4


class There(calls.Home):
    """A process with a foothold, for one call list.

    Args:
        foothold: in which process.
        held, keeping: as for `Foothold.carry_out`.
    """

    compare = zeros = 0  # nothing is compared there

    def __init__(
        self,
        foothold: Foothold,
        held: Sequence[int] = (),
        keeping: int | None = None,
    ) -> None:
        self.pid = foothold.pid
        self.fixed = libc.MAP_FIXED_NOREPLACE
        self._foothold, self._held, self._keeping = foothold, held, keeping
        self._placed: Image = []
        self._next = foothold.image_start

    def place(self, data: npt.NDArray[Any]) -> int:
        """Give the address at which a copy of `data` will be."""
        at = self._next
        self._placed.append(data)
        self._next += len(padded(data))
        return at

    def carry_out(self, rows: npt.NDArray[np.int64]) -> None:
        """Work off the rows in that process."""
        self._foothold.carry_out(self._placed, rows, self._held, self._keeping)


def padded(piece: npt.NDArray[Any]) -> bytes:
    """Give the bytes of a piece, as many as whole words take."""
    return piece.tobytes() + bytes(-piece.nbytes % 8)


def framed(
    rows: npt.NDArray[np.int64],
    line: tuple[int, int],
    blocked: int,
    lent: Iterable[int],
    keeping: bool,
) -> tuple[npt.NDArray[np.int64], range]:
    """Put rows around a list.

    Before: signals are blocked, we are told so, and if there is something to keep, it
    has to be in the line. Behind: it is let go, we are told that all is done, and are
    waited for. What follows that happens only if we do not come: descriptors are
    closed.

    Args:
        rows: the list.
        line: descriptor of the line's far end, and an address of 16 bytes for it.
        blocked: address of the signal mask.
        lent: descriptors to be closed without us.
        keeping: whether there is something to keep.

    Returns:
        All rows, and where among them the list is.
    """
    far, byte = line
    here = calls.Here()  # they point to nothing
    before, after = calls.CallList(here), calls.CallList(here)
    before.syscall("rt_sigprocmask", calls.SIG_SETMASK, blocked, 0, 8)
    before.syscall("sendto", far, byte, 1, socket.MSG_NOSIGNAL, 0, 0, want=1)
    if keeping:
        for _ in range(_PEEKS):  # a stop signal ends a wait; the last one counts
            peek = (far, byte + 8, 1, socket.MSG_PEEK, 0, 0)
            before.syscall("recvfrom", *peek, want=1)
        after.syscall("recvfrom", far, byte + 8, 1, socket.MSG_DONTWAIT, 0, 0)
    after.syscall("sendto", far, byte, 1, socket.MSG_NOSIGNAL, 0, 0, want=1)
    waiting = after.syscall("recvfrom", far, byte + 8, 1, 0, 0, 0, want=-errno.EINTR)
    again = after.syscall("getpid", want=-1)
    after.otherwise(waiting, again + 1)  # unless a stop signal ended the wait
    after.otherwise(again, waiting)
    for fd in lent:
        after.syscall("close", fd)
    parts, first = [before.words(), rows.copy(), after.words()], 0
    for part in parts:
        part[:, calls.OTHERWISE] += first
        first += len(part)
    own = range(len(parts[0]), len(parts[0]) + len(rows))
    if keeping:  # nothing to keep: not a row of the list
        parts[0][-1, calls.OTHERWISE] = own.stop
    return np.concatenate(parts), own
