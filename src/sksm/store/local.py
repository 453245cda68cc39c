"""A store that lives in this process: the daemon's, and the one without daemon."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Generator, Iterable, Iterator

import numpy as np
import numpy.typing as npt

from sksm.fingerprints import fingerprint, new_seed, of_zeros
from sksm.process.reading import read_pages
from sksm.spans import PAGE_SIZE, Span, groups
from sksm.store import UNSEEN, Offered
from sksm.store.alone import Alone, stands_alone
from sksm.store.index import Index
from sksm.store.pool import POOL_NAME, Pool

_GROUP_PAGES = 1024  # read, hashed and written at a time
FULL = "no memory left for the pool"
NO_MORE_ALONE = "too many single pages are merged"
_LACK = (errno.ENOSPC, errno.ENOMEM, errno.EFBIG, errno.EDQUOT)


class LocalStore:
    """Index and pool, and the rule that ties them: bytes first, then the name."""

    def __init__(self) -> None:
        self.seed = new_seed()
        self.keeper = os.getpid()
        self._index = Index()
        self._alone = Alone()
        self._pool = Pool(f"{POOL_NAME}-{secrets.token_hex(4)}")
        self._rows = np.empty((_GROUP_PAGES, PAGE_SIZE), np.uint8)

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

    def upkeep_bytes(self) -> int:
        """Nothing remains but the pool when its process ends."""
        return 0

    def give_back(self) -> None:
        """Free nothing: only the daemon gives grants, and so learns of their end."""

    def pool_bytes(self) -> int:
        """Return how much memory the pool occupies."""
        return self._pool.nbytes

    @property
    def name(self) -> str:
        """The name of the pool's file."""
        return self._pool.name

    def reader(self) -> int:
        """Open the pool read-only, for a client. The caller closes it."""
        return self._pool.reader()

    @contextlib.contextmanager
    def granted(self) -> Iterator[None]:
        """Slots of this store are freed by its owner only."""
        yield

    def let_go(self) -> None:
        """Nothing: see `granted`."""

    def mapped(self, slot: int, pages: int) -> None:
        """Nothing: see `granted`."""

    def in_doubt(self) -> None:
        """Nothing: see `granted`."""

    def lookup(self, prints: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
        """Find each fingerprint's slot; `UNSEEN` where there is none."""
        slots = self._index.lookup(prints)
        self._alone.fill_in(prints, slots)
        return slots

    def knows(self, prints: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
        """Say which fingerprints have a slot."""
        found: npt.NDArray[np.bool_] = self.lookup(prints) != UNSEEN
        return found

    def claim(self, slot: int, pages: int) -> bool:
        """Say whether `pages` slots in a row from `slot` on hold pages."""
        return self._pool.filled_from(slot) >= slot + pages

    def offer(self, pid: int, spans: Iterable[Span], *, alone: bool = False) -> Offered:
        """Copy pages of a process into the pool, unless equal ones are there."""
        pieces = list(spans)
        pages = sum(piece.pages for piece in pieces)
        slots, fresh = np.full(pages, UNSEEN, np.int64), np.zeros(pages, bool)
        if os.getpid() != self.keeper:  # a forked child: two writers, one pool
            return slots, fresh, "the store belongs to the parent process"
        at, refusal = 0, ""
        for group in groups(pieces, len(self._rows)):
            stop = at + sum(piece.pages for piece in group)
            try:
                rows = read_pages(pid, group, self._rows)
                take = self._take_alone if alone else self._take
                slots[at:stop], fresh[at:stop], refused = take(rows)
            except OSError as error:
                if error.errno not in (errno.EFAULT, errno.ESRCH, errno.EPERM):
                    self.drop(np.unique(slots[fresh]))  # of which nobody will learn
                    raise
                refused = _unreadable(error)
            except MemoryError:
                self.drop(np.unique(slots[fresh]))
                raise
            at, refusal = stop, refusal or refused
        return slots, fresh, refusal

    def offers(
        self, pid: int, parts: Iterable[list[Span]]
    ) -> Generator[Offered, None, None]:
        """Offer several times in a row."""
        for spans in parts:
            yield self.offer(pid, spans)

    def _take(self, rows: npt.NDArray[np.uint8]) -> Offered:
        prints = fingerprint(rows, self.seed)
        slots = self._index.lookup(prints)
        fresh = np.zeros(len(rows), bool)
        unknown = np.flatnonzero(
            (slots == UNSEEN) & (prints != np.uint64(of_zeros(self.seed)))
        )
        if not len(unknown):
            return slots, fresh, ""
        _, firsts, names = np.unique(
            prints[unknown], return_index=True, return_inverse=True
        )
        order = np.argsort(firsts)  # of each different page, the first one is taken
        chosen = unknown[firsts[order]]
        try:
            everything = len(chosen) == len(rows)
            placed = self._pool.put(rows if everything else rows[chosen])
        except OSError as error:
            if error.errno not in _LACK:
                raise
            return slots, fresh, f"{FULL} ({os.strerror(error.errno)})"
        self._index.insert(prints[chosen], placed)
        fresh[chosen] = True
        by_name = np.empty_like(placed)
        by_name[order] = placed
        slots[unknown] = by_name[names]
        return slots, fresh, ""

    def _take_alone(self, rows: npt.NDArray[np.uint8]) -> Offered:
        prints = fingerprint(rows, self.seed)
        slots, fresh = np.full(len(rows), UNSEEN, np.int64), np.zeros(len(rows), bool)
        for at in np.flatnonzero(prints != np.uint64(of_zeros(self.seed))).tolist():
            print_ = int(prints[at])
            slots[at] = self._alone.find(print_)
            if slots[at] != UNSEEN:
                continue
            if (slot := self._alone.choose()) == UNSEEN:
                return slots, fresh, NO_MORE_ALONE
            try:
                self._pool.put_alone(rows[at : at + 1], slot)
            except OSError as error:
                if error.errno not in _LACK:
                    raise
                return slots, fresh, f"{FULL} ({os.strerror(error.errno)})"
            self._alone.add(print_, slot)
            slots[at], fresh[at] = slot, True
        return slots, fresh, ""

    def usage(self) -> dict[str, int]:
        """Say what the store occupies, in bytes and slots."""
        return {
            "slots": len(self._index) + len(self._alone),
            "pool_bytes": self._pool.nbytes,
            "index_bytes": self._index.nbytes,
        }

    def used(self) -> npt.NDArray[np.int64]:
        """List the slots in use, ascending."""
        return np.concatenate([self._index.used(), self._alone.used()])

    def drop(self, slots: npt.NDArray[np.int64]) -> None:
        """Give back slots that nobody maps and nobody is about to map."""
        alone = stands_alone(slots)
        if not alone.all():
            self._index.remove(slots[~alone])
            self._pool.free(slots[~alone])
        self._alone.remove(slots[alone])
        for slot in slots[alone].tolist():
            self._pool.free_alone(slot)


def _unreadable(error: OSError) -> str:
    if error.errno == errno.EPERM:
        return (
            "the daemon may not read this process "
            "(kernel.yama.ptrace_scope above 1, or not dumpable)"
        )
    return f"unmapped meanwhile ({os.strerror(error.errno or 0)})"
