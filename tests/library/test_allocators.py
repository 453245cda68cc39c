"""Memory that goes back to malloc, over glibc and over jemalloc."""

import ctypes.util
import os

import pytest

JEMALLOC = ctypes.util.find_library("jemalloc")

# Started, for the allocator that LD_PRELOAD names, and for a heap in which nothing was.
# Merge objects of many sizes, free them, and look at what calloc hands out.
SCRIPT = """
import contextlib, ctypes, gc, sys
import numpy as np
import sksm
from sksm import pages, session
from sksm.linux import maps
from sksm.store.local import LocalStore

class Kept(LocalStore):
    def close(self): pass
    def alive(self): return True

store = Kept()
session.RemoteStore = lambda *a, **k: store
kind = sys.argv[1]
generator = np.random.default_rng(1)
make = {
    "numpy array": lambda size: generator.integers(1, 256, size, dtype=np.uint8),
    "bytearray": lambda size: bytearray(generator.integers(1, 256, size, dtype="u1")),
    "bytes": lambda size: generator.integers(1, 256, size, dtype=np.uint8).tobytes(),
}[kind]
libc = ctypes.CDLL(None)
libc.calloc.restype = ctypes.c_void_p
libc.calloc.argtypes = ctypes.c_size_t, ctypes.c_size_t
libc.free.argtypes = ctypes.c_void_p,
merged = refused = dirty = 0
reasons = set()
sizes = [s << 10 for s in (64, 100, 256, 500, 1024, 3000, 8192)]
for _ in range(3):
    held = [make(size) for size in sizes for _ in range(4)]
    for obj in held:
        before = bytes(obj)
        report = sksm.merge(obj)
        assert bytes(obj) == before
        merged += report.stored + report.merged
        refused += report.refused
        reasons |= set(report.reasons)
    shown = sum(pages.is_pool(m) for m in maps.every_mapping("self"))
    del held, obj
    gc.collect()
    left = sum(pages.is_pool(m) for m in maps.every_mapping("self"))
    fresh = [(libc.calloc(1, size), size) for size in sizes for _ in range(6)]
    dirty += sum(bool(ctypes.string_at(p, n).strip(b"\\0")) for p, n in fresh)
    for p, _ in fresh:
        libc.free(p)
risks = sorted(reason for reason in reasons if "malloc" in reason)
print(merged > 0, dirty, shown > 0, left == 0, risks)
"""


@pytest.fixture(params=["glibc", "jemalloc"])
def allocator(request):
    """The environment that loads one allocator or the other."""
    if request.param == "glibc":
        return "glibc", {}
    if JEMALLOC is None:
        pytest.skip("libjemalloc.so.2 is not installed")
    return "jemalloc", {"LD_PRELOAD": JEMALLOC}


def outcome(worker, kind, environment):
    process = worker(SCRIPT, kind, env={**os.environ, **environment})
    answer = process.answer()
    assert process.end() == 0
    return answer.split(maxsplit=4)


@pytest.mark.parametrize("kind", ["numpy array", "bytes", "bytearray"])
def test_objects_merge_only_where_calloc_clears(worker, allocator, kind):
    """Under glibc they merge, and calloc is clean; under jemalloc they are refused."""
    name, environment = allocator
    merged, dirty, shown, _, risks = outcome(worker, kind, environment)
    assert dirty == "0"
    if name == "glibc":
        assert (merged, shown, risks) == ("True", "True", "[]")
    else:
        assert (merged, shown) == ("False", "False")
        assert "jemalloc counts on MADV_DONTNEED" in risks
        assert "sksm.asarray" in risks
