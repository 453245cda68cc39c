"""The lock of an open file description lives as long as anything refers to that."""

import ctypes
import os
import socket

import pytest

from sksm.linux import libc, ofd_locks
from sksm.spans import PAGE_SIZE
from tests.conftest import poll

pytestmark = pytest.mark.check

READ, PRIVATE = libc.PROT_READ, libc.MAP_PRIVATE


@pytest.fixture
def file():
    """A file, by an open file description without a lock."""
    fd = os.memfd_create("file")
    os.ftruncate(fd, 16 * PAGE_SIZE)
    yield fd
    os.close(fd)


@pytest.fixture
def held(file):
    """Give `held()`: is byte 7 locked?"""
    return lambda: ofd_locks.is_locked(file, 7)


@pytest.fixture
def opened(file):
    """The file opened anew, with a lock on byte 7."""
    fd = os.open(f"/proc/self/fd/{file}", os.O_RDONLY)
    ofd_locks.lock(fd, 7)
    return fd


def test_a_byte_is_locked_until_the_descriptor_is_closed(file, opened, held):
    """That one and no other; a range is, if part of it is."""
    assert held()
    assert not ofd_locks.is_locked(file, 6)
    assert ofd_locks.is_locked(file, 0, 100)
    assert not ofd_locks.is_locked(file, 8, 100)
    os.close(opened)
    assert not held()


def test_a_mapping_keeps_it_whatever_becomes_of_the_mapping(opened, held):
    """Closed, cut, moved, forked: the last piece of it counts."""
    at = libc.mmap(None, 8 * PAGE_SIZE, READ, PRIVATE, opened, 0)
    os.close(opened)
    libc.munmap(at + PAGE_SIZE, 3 * PAGE_SIZE)
    assert held()
    moved = libc.mremap(at, PAGE_SIZE, PAGE_SIZE, libc.MREMAP_MAYMOVE, 0)
    libc.munmap(at + 4 * PAGE_SIZE, 4 * PAGE_SIZE)
    assert held()
    near, far = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(far)
        os.read(near, 1)
        os._exit(0)
    libc.munmap(moved, PAGE_SIZE)
    assert held()
    for fd in (near, far):
        os.close(fd)
    os.waitpid(pid, 0)
    poll(lambda: not held())


def test_a_descriptor_that_lies_in_a_socket_keeps_it(opened, held):
    """Nobody has it, and somebody may yet."""
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    socket.send_fds(here, [b"x"], [opened])
    os.close(opened)
    assert held()
    here.close()
    assert held()
    there.close()
    poll(lambda: not held())


def test_a_guard_over_the_pages_changes_nothing(opened, held):
    """MADV_GUARD_INSTALL (Linux 6.13) empties page table entries, no more."""
    at = libc.mmap(None, PAGE_SIZE, READ | libc.PROT_WRITE, PRIVATE, opened, 0)
    os.close(opened)
    libc_madvise = ctypes.CDLL(None).madvise
    if libc_madvise(ctypes.c_void_p(at), ctypes.c_size_t(PAGE_SIZE), 102):
        pytest.skip("no MADV_GUARD_INSTALL here")
    assert held()
    libc.munmap(at, PAGE_SIZE)
    assert not held()
