"""Programs that the pool may not merge, merged by the ksm engine from outside."""

import os

import pytest

from sksm import others
from sksm.engines import choice
from sksm.linux import ksm
from sksm.linux.features import Feature
from sksm.spans import PAGE_SIZE
from tests.process.test_runtimes import JEMALLOC

pytestmark = [
    pytest.mark.machine,
    pytest.mark.root,
    pytest.mark.needs(Feature.PTRACE_SEIZE),
    pytest.mark.usefixtures("runtime", "patient"),
    pytest.mark.skipif(not JEMALLOC.exists(), reason="libjemalloc2 is not installed"),
    pytest.mark.skipif(not ksm.FOLDER.exists(), reason="the kernel has no KSM"),
]

# Half of its blocks are alike. `free` gives these back, and looks whether calloc then
# ever hands out memory that is not zero.
PROGRAM = """
import ctypes, os, random, sys
libc = ctypes.CDLL(None)
libc.aligned_alloc.restype = libc.calloc.restype = ctypes.c_void_p
libc.aligned_alloc.argtypes = libc.calloc.argtypes = [ctypes.c_size_t] * 2
libc.free.argtypes = [ctypes.c_void_p]
SIZE, COUNT = 1 << 20, int(sys.argv[1])
alike = random.Random(1).randbytes(SIZE)
held = []
for number in range(2 * COUNT):
    data = alike if number % 2 else random.Random(number + 2).randbytes(SIZE)
    block = libc.aligned_alloc(4096, SIZE)
    ctypes.memmove(block, data, SIZE)
    held.append((block, data))
print("ready", flush=True)
for line in sys.stdin:
    if line == "free\\n":
        for block, _ in held[1::2]:
            libc.free(block)
        del held[1::2]
        wrong = 0
        for _ in range(4 * COUNT):
            block = libc.calloc(1, SIZE)
            wrong += any(ctypes.string_at(block, SIZE))
            ctypes.memset(block, 7, SIZE)
            libc.free(block)
        print(wrong, flush=True)
    else:
        print(sum(ctypes.string_at(b, SIZE) != data for b, data in held), flush=True)
"""


@pytest.mark.parametrize(
    "count",
    [8, pytest.param(256, marks=[pytest.mark.slow, pytest.mark.limit(600)])],
)
def test_an_allocator_that_counts_on_zeros_is_merged_and_gets_them(worker, count):
    """Nearly all of what is held twice is saved, and every knob is as before."""
    if reason := ksm.obstacle():
        pytest.skip(reason)
    fields = {**os.environ, "LD_PRELOAD": str(JEMALLOC)}
    one = worker(PROGRAM, str(count), env=fields)
    assert one.answer() == "ready"
    knobs = ksm._knobs()
    wishes = others.Wishes(watch_seconds=0)
    (outcome,) = others.merge([one.pid], wishes, lambda *_: lambda _: None)
    assert not outcome.failed, outcome
    assert outcome.engine == choice.KSM
    assert ksm._knobs() == knobs
    duplicates = (count - 1) << 20
    assert outcome.report.saved_bytes >= 0.95 * duplicates
    assert outcome.pss_before - outcome.pss_after >= 0.95 * duplicates
    assert outcome.report.unique * PAGE_SIZE < duplicates / 20
    assert one.ask("check") == "0"
    assert one.ask("free") == "0"
    assert one.ask("check") == "0"
