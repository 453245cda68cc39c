"""The pool: a file of page frames."""

import ctypes
import errno
import fcntl
import os

import numpy as np
import pytest

from sksm.spans import PAGE_SIZE
from sksm.store.pool import Pool

pytestmark = pytest.mark.check


@pytest.fixture
def pool():
    pool = Pool("sksm-pool-test")
    yield pool
    pool.close()


def content(pool, slot):
    return os.pread(pool.fd, PAGE_SIZE, slot * PAGE_SIZE)


def test_slots_hold_the_pages_put_into_them(pool, different):
    """Neighbours stay neighbours, and later pages follow earlier ones."""
    rows = different(6)
    slots = [*pool.put(rows[:4]).tolist(), *pool.put(rows[4:]).tolist()]
    assert slots == list(range(6))
    assert [content(pool, slot) for slot in slots] == [bytes(row) for row in rows]
    assert pool.slots == 6


def test_freed_pages_cost_nothing_and_read_as_zeros(pool, different):
    """A freed slot's memory goes back to the kernel, not only to us."""
    pool.put(different(8))
    before = pool.nbytes
    pool.free(np.array([1, 2, 5]))
    assert before - pool.nbytes == 3 * PAGE_SIZE
    assert [content(pool, slot).count(0) for slot in (1, 2, 5)] == [PAGE_SIZE] * 3


def test_a_straight_run_of_free_slots_is_used_again(pool, different):
    """Pages that come together lie together, in the first hole that fits."""
    pool.put(different(40))
    pool.free(np.array([3, 10, 11, 12, 13, 20]))
    rows = different(3)
    assert pool.put(rows).tolist() == [10, 11, 12]
    assert [content(pool, slot) for slot in (10, 11, 12)] == [bytes(r) for r in rows]
    assert pool.put(different(1)).tolist() == [3]


def test_scattered_slots_are_used_when_much_is_free(pool, different):
    """The pool does not grow for ever because its holes are small."""
    pool.put(different(12))
    pool.free(np.arange(0, 12, 2))
    rows = different(3)
    slots = pool.put(rows)
    assert pool.slots == 12
    assert [content(pool, slot) for slot in slots] == [bytes(row) for row in rows]


def test_few_scattered_holes_are_not_worth_breaking_a_run(pool, different):
    """Pages that were offered together stay one run while little is free."""
    pool.put(different(40))
    pool.free(np.array([3, 9]))
    assert pool.put(different(2)).tolist() == [40, 41]


def test_no_live_slot_is_ever_given_out_again(pool):
    """Random puts and frees against a dictionary of contents."""
    generator, held = np.random.default_rng(2), {}
    for turn in range(200):
        if held and generator.random() < 0.45:
            gone = generator.choice(sorted(held), generator.integers(1, len(held) + 1))
            pool.free(np.unique(gone))
            for slot in set(gone.tolist()):
                del held[slot]
        else:
            rows = np.full((generator.integers(1, 9), PAGE_SIZE), turn + 1, np.uint8)
            rows[:, 1] = np.arange(len(rows))
            slots = pool.put(rows).tolist()
            assert not held.keys() & set(slots)
            held.update(zip(slots, map(bytes, rows), strict=True))
    assert all(content(pool, slot) == page for slot, page in held.items())


def test_the_file_cannot_shrink(pool, different):
    """Who maps the pool is safe from SIGBUS."""
    pool.put(different(1))
    with pytest.raises(PermissionError):
        os.ftruncate(pool.fd, 0)
    assert fcntl.fcntl(pool.fd, 1034) & 2  # F_GET_SEALS, F_SEAL_SHRINK


def test_a_reader_cannot_write(pool, different):
    """A client gets a descriptor that reads, and closes by itself on exec."""
    rows = different(1)
    pool.put(rows)
    reader = pool.reader()
    try:
        with pytest.raises(OSError, match="Bad file descriptor") as caught:
            os.pwrite(reader, b"x", 0)
        assert caught.value.errno == errno.EBADF
        assert os.pread(reader, PAGE_SIZE, 0) == bytes(rows[0])
        assert not os.get_inheritable(reader)
        assert os.fstat(reader).st_mode & 0o777 == 0o444
    finally:
        os.close(reader)


def _open_for_writing(path):
    """In a child without root's privileges: 0 if only that is refused."""
    pid = os.fork()
    if pid == 0:
        try:
            if os.getuid() == 0:
                os.setgroups([])
                os.setresgid(65534, 65534, 65534)
                os.setresuid(65534, 65534, 65534)
                ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE: /proc/self
            os.close(os.open(path, os.O_RDONLY))
        except OSError:
            os._exit(2)
        try:
            os.close(os.open(path, os.O_RDWR))
        except OSError:
            os._exit(0)
        os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_reader_cannot_be_opened_again_for_writing(pool):
    """The file's mode stops the way through /proc/self/fd."""
    reader = pool.reader()
    try:
        assert _open_for_writing(f"/proc/self/fd/{reader}") == 0
    finally:
        os.close(reader)
