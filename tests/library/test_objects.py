"""Objects of Python after a merge: resized, grown, freed, as if nothing were."""

import ctypes
import gc
import mmap
import os
from typing import ClassVar

import numpy as np
import pytest

import sksm
from sksm import pages
from sksm.linux import libc, maps
from sksm.spans import PAGE_SIZE, Span, whole_pages

pytestmark = pytest.mark.usefixtures("here")

SIZE = 64 * PAGE_SIZE


def span_of(address, size=SIZE):
    return whole_pages(address, size)


def pool_pages(span):
    """How many pages of a range show the pool."""
    shown = [m.span & span for m in maps.every_mapping("self") if pages.is_pool(m)]
    return sum(part.pages for part in shown)


# -- page-aligned arrays


@pytest.mark.parametrize("shape", [1, 5000, (3, 700), (2, 3, 4), 0, (0, 5)])
@pytest.mark.parametrize("dtype", ["u1", "f8", "M8[s]", [("a", "u1"), ("b", "f8")]])
def test_empty_gives_writable_zeros_on_a_page(shape, dtype):
    """Of every shape and type, the empty ones as well."""
    array = sksm.empty(shape, dtype)
    like = np.empty(shape, dtype)
    assert (array.shape, array.dtype) == (like.shape, like.dtype)
    assert array.ctypes.data % PAGE_SIZE == 0
    assert array.flags.writeable
    assert array.flags.c_contiguous
    assert not array.tobytes().strip(b"\0")


def test_every_page_of_an_aligned_array_can_merge(different):
    """None is the last of its mapping."""
    content = different(10)
    one, two = (sksm.asarray(content) for _ in range(2))
    assert sksm.merge(one).stored == 10
    report = sksm.merge(two)
    assert (report.merged, report.refused) == (10, 0)


@pytest.mark.parametrize("count", [1, 2])
def test_part_of_an_array_that_is_not_to_be_dumped_stays_so(different, count):
    """Whether the kernel shows what it is by a split of it, or it is too small."""
    array = sksm.asarray(different(10))
    part = span_of(array.ctypes.data + 4 * PAGE_SIZE, count * PAGE_SIZE)
    libc.madvise(part.start, part.size, libc.MADV_DONTDUMP)

    report = sksm.merge(array)

    assert (report.stored, report.refused) == (10 - count, count)
    (mapping,) = maps.mappings("self", part)
    assert "dd" in mapping.flags
    assert pool_pages(span_of(array.ctypes.data, 10 * PAGE_SIZE)) == 10 - count


def test_asarray_copies_what_is_not_aligned_and_only_that():
    """An array on a page is given back as it is."""
    odd = np.frombuffer(bytearray(SIZE + 1), np.uint8)[1:]
    odd = odd if odd.ctypes.data % PAGE_SIZE else odd[1:]
    odd[:] = np.arange(len(odd)) % 251
    even = sksm.asarray(odd)
    assert even.ctypes.data % PAGE_SIZE == 0
    assert (even == odd).all()
    assert sksm.asarray(even) is even


def test_asarray_takes_what_numpy_takes():
    """Lists, buffers, arrays in Fortran's order, read-only ones."""
    for obj in ([1, 2, 3], b"bytes", np.ones((3, 5), order="F"), range(7)):
        array = sksm.asarray(obj)
        assert array.ctypes.data % PAGE_SIZE == 0
        assert (array == np.asarray(obj)).all()


# -- every kind of object


def anonymous():
    return mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def filled(obj, content):
    memoryview(obj).cast("B")[:] = content
    return obj


KINDS = {
    "numpy array": lambda content: np.frombuffer(content, np.uint8).copy(),
    "bytes": lambda content: bytes(bytearray(content)),
    "bytearray": bytearray,
    "memoryview": lambda content: memoryview(bytearray(content)),
    "mmap": lambda content: filled(anonymous(), content),
    "ctypes array": (ctypes.c_char * SIZE).from_buffer_copy,
}


@pytest.mark.check
@pytest.mark.parametrize("kind", KINDS)
def test_objects_of_every_kind_merge_and_unmerge(kind, different):
    """All pages but those at edges of mappings, and the bytes stay."""
    content = different(64).tobytes()
    obj = KINDS[kind](content)
    report = sksm.merge(obj)
    assert report.stored > 32  # earlier tests may have cut the heap to pieces
    assert report.scanned == report.stored + report.refused
    assert memoryview(obj).tobytes() == content
    assert sksm.merge(obj).already == report.stored
    assert sksm.unmerge(obj) == report.stored * PAGE_SIZE
    assert memoryview(obj).tobytes() == content


# -- resized and grown


@pytest.mark.parametrize("bigger", [65, 100, 1000])
def test_a_grown_mmap_shows_zeros_and_no_neighbour(bigger, different):
    """Other pages of the pool lie right behind the ones it shows."""
    content = different(128)
    one, other = (
        filled(anonymous(), content[at : at + 64].tobytes()) for at in (0, 64)
    )
    sksm.merge(one)
    sksm.merge(other)
    try:
        one.resize(bigger * PAGE_SIZE)
    except (OSError, SystemError):
        assert len(one) == SIZE  # refused, and nothing happened
        assert one[:] == content[:64].tobytes()
        return
    assert one[:SIZE] == content[:64].tobytes()
    assert not one[SIZE:].strip(b"\0")


def test_an_mmap_that_shrank_and_grew_shows_zeros_and_no_neighbour(different):
    """What it had behind its new end is gone; what comes after is new."""
    content = different(64)
    one = filled(anonymous(), content.tobytes())
    sksm.merge(one)
    one.resize(10 * PAGE_SIZE)
    try:
        one.resize(40 * PAGE_SIZE)
    except (OSError, SystemError):
        assert one[:] == content[:10].tobytes()
        return
    assert one[: 10 * PAGE_SIZE] == content[:10].tobytes()
    assert not one[10 * PAGE_SIZE :].strip(b"\0")


def test_a_bytearray_grows_and_shrinks_as_ever(different):
    """realloc moves, copies or extends; the bytes are right each time."""
    content = different(64).tobytes()
    neighbours = [bytearray(different(64).tobytes()) for _ in range(3)]
    one = bytearray(content)
    for each in (one, *neighbours):
        sksm.merge(each)
    for step in (5, 3 * PAGE_SIZE, 10 * SIZE, 1):
        one.extend(b"x" * step)
        assert one[:SIZE] == content
        assert one[SIZE:] == b"x" * step
        sksm.merge(one)
        del one[SIZE:]
        assert one == content
    del one[10 * PAGE_SIZE :]
    sksm.merge(one)
    one += bytes(100 * PAGE_SIZE)
    assert one == content[: 10 * PAGE_SIZE] + bytes(100 * PAGE_SIZE)


@pytest.mark.parametrize("pages", [64, 20_000])
def test_an_array_that_merged_can_be_resized(pages):
    """realloc moves it, or copies: it grows by zeros, and by no page of the pool."""
    generator = np.random.default_rng(pages)
    one = generator.integers(1, 256, pages * PAGE_SIZE, np.uint8)
    other = one.copy()
    sksm.merge(other)
    sksm.merge(one)
    one.resize(pages * PAGE_SIZE * 3)
    assert (one[: len(other)] == other).all()
    assert not one[len(other) :].any()


# -- freed


class Weights(np.ndarray):
    """As a program may have them."""


class Cycle:
    """Holds an array, and itself; looks at the array when it ends."""

    seen: ClassVar = []

    def __init__(self, kind):
        self.data = np.random.default_rng(3).integers(1, 256, 1 << 21, np.uint8)
        self.data = self.data.view(kind) if kind is not Weights else self._own()
        self.expected = self.data.tobytes()
        self.me = self
        sksm.merge(self.data)

    def _own(self):
        own = Weights(1 << 21, np.uint8)
        own[:] = self.data
        return own

    def __del__(self):
        Cycle.seen.append(self.data.tobytes() == self.expected)
        Cycle.kept = self


@pytest.mark.parametrize("kind", [np.ndarray, np.recarray, np.matrix, Weights])
def test_an_array_in_a_garbage_cycle_keeps_its_bytes_to_the_end(kind):
    """In `__del__`, when its weak references are dead already, and resurrected."""
    Cycle.seen.clear()
    one = Cycle(kind)
    del one
    gc.collect()
    kept, Cycle.kept = Cycle.kept, None
    assert Cycle.seen == [True]
    assert kept.data.tobytes() == kept.expected
    kept.me = None


def test_setting_the_state_of_an_array_leaves_others_alone():
    """It frees the array's memory, and takes other."""
    one = np.random.default_rng(1).integers(1, 256, 1 << 23, np.uint8)
    two, state = one.copy(), np.zeros(4, np.uint8).__reduce__()[2]
    for each in (one, two):
        sksm.merge(each)
    content = two.tobytes()
    one.__setstate__(state)
    fresh = [np.zeros(1 << 23, np.uint8) for _ in range(3)]
    assert not any(each.any() for each in fresh)
    assert two.tobytes() == content


def test_an_aligned_array_is_unmapped_when_it_is_freed(different):
    """Its mapping was its own: nothing of it stays."""
    one = sksm.empty((64, PAGE_SIZE), np.uint8)
    one[:] = different(64)
    span = Span(one.ctypes.data, one.ctypes.data + one.nbytes)
    sksm.merge(one)
    assert pool_pages(span) == 64
    del one
    assert pool_pages(span) == 0


def test_a_closed_mmap_leaves_nothing(different):
    """munmap takes all of its pieces."""
    one = filled(anonymous(), different(64).tobytes())
    span = span_of(np.frombuffer(one, np.uint8).ctypes.data)
    sksm.merge(one)
    gc.collect()
    one.close()
    assert pool_pages(span) == 0


@pytest.mark.check
def test_freeing_in_a_forked_child_leaves_the_parents_memory(different):
    """Both had the array; the child's end of it is the child's."""
    one = different(64)
    content = one.copy()
    span = span_of(one.ctypes.data)
    sksm.merge(one)
    shown = pool_pages(span)
    pid = os.fork()
    if pid == 0:
        del one
        fresh = np.zeros(64 * PAGE_SIZE, np.uint8)
        os._exit(bool(fresh.any()))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert pool_pages(span) == shown > 0
    assert (one == content).all()
