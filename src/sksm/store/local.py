"""A store that lives in this process: the daemon's, and the one without daemon."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt

from sksm.fingerprints import fingerprint, of_zeros
from sksm.process.reading import read_pages
from sksm.spans import Span
from sksm.store import UNSEEN
from sksm.store.index import Index
from sksm.store.pool import POOL_NAME, Pool

FULL = "no memory left for the pool"
_LACK = (errno.ENOSPC, errno.ENOMEM, errno.EFBIG, errno.EDQUOT)


class LocalStore:
    """Index and pool, and the rule that ties them: bytes first, then the name."""

    def __init__(self) -> None:
        self.seed = secrets.randbits(64)
        self._owner = os.getpid()
        self._index = Index()
        self._pool = Pool(POOL_NAME)
        self.written = 0

    def close(self) -> None:
        """Let go of the pool; what maps it goes on."""
        self._pool.close()

    def alive(self) -> bool:
        """Say that the store is there: it is, as long as its process."""
        return True

    @property
    def pool(self) -> int:
        """The pool's file."""
        return self._pool.fd

    @property
    def slots(self) -> int:
        """How many slots there are, those that were given back included."""
        return self._pool.slots

    def reader(self) -> int:
        """Open the pool read-only, for a client. The caller closes it."""
        return self._pool.reader()

    @contextlib.contextmanager
    def lease(self) -> Iterator[None]:
        """Nothing reclaims slots of this store behind its owner's back."""
        yield

    def lookup(self, prints: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
        """Find each fingerprint's slot; `UNSEEN` where there is none."""
        slots = self._index.lookup(prints)
        self.written = self._filled_behind(slots)
        return slots

    def offer(
        self, pid: int, spans: Iterable[Span]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_], str]:
        """Copy pages of a process into the pool, unless equal ones are there."""
        pieces = list(spans)
        pages = sum(piece.pages for piece in pieces)
        nothing = np.full(pages, UNSEEN, np.int64), np.zeros(pages, bool)
        if os.getpid() != self._owner:  # a forked child: two writers, one pool
            return *nothing, "the store belongs to the parent process"
        try:
            rows = read_pages(pid, pieces)
        except OSError as error:
            if error.errno not in (errno.EFAULT, errno.ESRCH, errno.EPERM):
                raise
            return *nothing, _unreadable(error)
        slots, fresh, refusal = self._take(rows)
        self.written = min(self.written, self._filled_behind(slots))
        return slots, fresh, refusal

    def _filled_behind(self, slots: npt.NDArray[np.int64]) -> int:
        return self._pool.filled_from(max(0, int(slots[-1])) if len(slots) else 0)

    def _take(
        self, rows: npt.NDArray[np.uint8]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_], str]:
        prints = fingerprint(rows, self.seed)
        slots = self._index.lookup(prints)
        fresh = np.zeros(len(rows), bool)
        unknown = np.flatnonzero(
            (slots == UNSEEN) & (prints != np.uint64(of_zeros(self.seed)))
        )
        _, firsts = np.unique(prints[unknown], return_index=True)
        chosen = np.sort(unknown[firsts])
        if not len(chosen):
            return slots, fresh, ""
        try:
            placed = self._pool.put(rows[chosen])
        except OSError as error:
            if error.errno not in _LACK:
                raise
            return slots, fresh, f"{FULL} ({os.strerror(error.errno)})"
        self._index.insert(prints[chosen], placed)
        fresh[chosen] = True
        slots[unknown] = self._index.lookup(prints[unknown])
        return slots, fresh, ""

    def usage(self) -> dict[str, int]:
        """Say what the store occupies, in bytes and slots."""
        return {
            "slots": len(self._index),
            "pool_bytes": self._pool.nbytes,
            "index_bytes": self._index.nbytes,
        }

    def used(self) -> npt.NDArray[np.int64]:
        """List the slots in use, ascending."""
        return self._index.used()

    def drop(self, slots: npt.NDArray[np.int64]) -> None:
        """Give back slots that nobody maps and nobody is about to map."""
        if len(slots):
            self._index.remove(slots)
            self._pool.free(slots)


def _unreadable(error: OSError) -> str:
    if error.errno == errno.EPERM:
        return (
            "the daemon may not read this process "
            "(kernel.yama.ptrace_scope above 1, or not dumpable)"
        )
    return f"unmapped meanwhile ({os.strerror(error.errno or 0)})"
