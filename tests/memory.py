"""Real memory for tests, and a store without daemon to merge it with."""

import ctypes
import threading

import numpy as np
import pytest

from sksm import session
from sksm.linux import libc, maps
from sksm.process import allowance, local
from sksm.spans import PAGE_SIZE, Span
from sksm.store.local import LocalStore
from tests.conftest import frames

RW = libc.PROT_READ | libc.PROT_WRITE
PRIVATE = libc.MAP_PRIVATE | libc.MAP_ANONYMOUS


class KeptStore(LocalStore):
    """A store that a session may hang up on, and find again."""

    def close(self):
        pass

    def alive(self):
        return True


@pytest.fixture
def here(monkeypatch):
    """Merge with a store of this process: all the library does, without daemon."""
    store = KeptStore()
    monkeypatch.setattr(session, "RemoteStore", lambda: store)
    monkeypatch.setattr(session, "current", session.Session())
    yield store
    LocalStore.close(store)


class Area:
    """A mapping of its own: guard pages on both sides keep it from joining another.

    `rows` are its bytes, a line a page. It is unmapped with `close`. It lies far below
    all else: the kernel looks for room from the top, and a hole that a test makes in
    it must not become somebody else's memory, to be unmapped with the rest.
    """

    _next = 1 << 36

    def __init__(self, pages, prot=RW, flags=PRIVATE, fd=-1, offset=0):
        self.size = pages * PAGE_SIZE
        none = libc.MAP_PRIVATE | libc.MAP_ANONYMOUS
        room = self.size + 2 * PAGE_SIZE
        self._guard = libc.mmap(Area._next, room, 0, none, -1, 0)
        Area._next += room + PAGE_SIZE
        self.address = self._guard + PAGE_SIZE
        fixed = flags | libc.MAP_FIXED
        libc.mmap(self.address, self.size, prot, fixed, fd, offset)
        raw = (ctypes.c_ubyte * self.size).from_address(self.address)
        self.rows = np.frombuffer(raw, np.uint8).reshape(pages, PAGE_SIZE)

    @property
    def span(self):
        return Span(self.address, self.address + self.size)

    def part(self, first, stop):
        start = self.address
        return Span(start + first * PAGE_SIZE, start + stop * PAGE_SIZE)

    @property
    def where(self):
        """Address and length, as `merge_range` takes them."""
        return self.address, self.size

    def protect(self, prot, first=0, stop=None):
        part = self.part(first, len(self.rows) if stop is None else stop)
        libc.mprotect(part.start, part.size, prot)

    def advise(self, advice, first=0, stop=None):
        part = self.part(first, len(self.rows) if stop is None else stop)
        libc.madvise(part.start, part.size, advice)

    def mappings(self):
        return maps.mappings("self", self.span)

    def frames(self):
        """Physical frames, each page read first. As root only."""
        int(self.rows[:, 0].sum())
        return frames(self.span)

    def close(self):
        libc.munmap(self._guard, self.size + 2 * PAGE_SIZE)


@pytest.fixture
def area():
    """Give `area(pages, ...)`, an `Area`; all are unmapped at the end."""
    held = []

    def make(*args, **kwargs):
        held.append(Area(*args, **kwargs))
        return held[-1]

    yield make
    for one in held:
        one.close()


@pytest.fixture
def zero_frame(area):
    """The frame of the kernel's page of zeros."""
    return area(1).frames()[0]


@pytest.fixture(params=["alone", "threads"])
def threads(request):
    """Run once with the threads of the test runner, and once with one more.

    Pages are protected either way.
    """
    if request.param == "alone":
        yield
        return
    with another_thread():
        yield


class another_thread:  # noqa: N801  used like a function
    """A second thread that waits until the block ends."""

    def __enter__(self):
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._end.wait)
        self._thread.start()

    def __exit__(self, *_):
        self._end.set()
        self._thread.join()


@pytest.fixture
def few_mappings(monkeypatch, tmp_path):
    """Give `few_mappings(n)`: this process may add n more, and not one besides."""

    def limit(more):
        count = tmp_path / "max_map_count"
        count.write_text(str(4 * (maps.count("self") + more)))
        monkeypatch.setattr(allowance, "MAX_MAP_COUNT", count)
        monkeypatch.setattr(local, "_allowance", allowance.Allowance("self"))

    return limit
