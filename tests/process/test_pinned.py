"""Memory that a device or the kernel writes to past the page tables."""

import ctypes
import errno
import os

import numpy as np
import pytest

import sksm
from sksm.linux import libc
from sksm.process import guards
from sksm.process.guards import PINNED


def call(*args):
    result = libc.raw_syscall(*(ctypes.c_long(arg) for arg in args))
    return result if result >= 0 else -ctypes.get_errno()


def merge_what_a_ring_holds():
    """Gives io_uring_setup's result, and what else happened."""
    pages = sksm.empty((8, 4096), np.uint8)
    pages[:] = np.arange(1, 9, dtype=np.uint8)[:, None]
    params = ctypes.create_string_buffer(120)  # struct io_uring_params
    ring = call(425, 1, ctypes.addressof(params))  # io_uring_setup
    if ring < 0:
        return ring, []
    vector = libc.iovec(pages.ctypes.data, pages.nbytes)
    done = [call(427, ring, 0, ctypes.addressof(vector), 1)]  # IORING_REGISTER_BUFFERS
    report = sksm.merge(pages)
    done += [report.refused, report.reasons.get(PINNED, 0)]
    done += [call(427, ring, 1, 0, 0)]  # IORING_UNREGISTER_BUFFERS
    os.close(ring)
    while not (report := sksm.merge(pages)).stored:  # the kernel takes its own time
        pass
    return ring, [*done, report.stored]


@pytest.mark.usefixtures("runtime")
def test_pages_that_io_uring_holds_are_not_replaced(puppets):
    """A buffer registered before would be written behind the program's back."""
    ring, done = puppets().do(merge_what_a_ring_holds)
    if ring in (-errno.ENOSYS, -errno.EPERM):
        pytest.skip(f"io_uring_setup: {errno.errorcode[-ring]}")
    assert ring >= 0
    assert done == [0, 8, 8, 0, 8]


def test_a_process_that_nobody_holds_has_no_objection():
    """The usual case."""
    assert guards.objection("self") is None
