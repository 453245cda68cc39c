"""Memory that a device or the kernel writes to past the page tables."""

import errno

import pytest

from sksm.process import guards
from sksm.process.guards import PINNED

SCRIPT = f"""
import ctypes, os, sys
import numpy as np
import sksm
from sksm.linux import libc

def call(*args):
    result = libc.raw_syscall(*(ctypes.c_long(arg) for arg in args))
    return result if result >= 0 else -ctypes.get_errno()

pages = sksm.empty((8, 4096), np.uint8)
pages[:] = np.arange(1, 9, dtype=np.uint8)[:, None]
params = ctypes.create_string_buffer(120)  # struct io_uring_params
ring = call(425, 1, ctypes.addressof(params))  # io_uring_setup
print(ring, flush=True)
if ring < 0:
    sys.exit()
vector = libc.iovec(pages.ctypes.data, pages.nbytes)
print(call(427, ring, 0, ctypes.addressof(vector), 1))  # IORING_REGISTER_BUFFERS
report = sksm.merge(pages)
print(report.refused, report.reasons.get({PINNED!r}, 0), flush=True)
print(call(427, ring, 1, 0, 0))  # IORING_UNREGISTER_BUFFERS
os.close(ring)
while not (report := sksm.merge(pages)).stored:  # the kernel lets go in its own time
    pass
print(report.stored, flush=True)
"""


@pytest.mark.usefixtures("runtime")
def test_pages_that_io_uring_holds_are_not_replaced(worker):
    """A buffer registered before would be written behind the program's back."""
    process = worker(SCRIPT)
    ring = int(process.answer())
    if ring in (-errno.ENOSYS, -errno.EPERM):
        pytest.skip(f"io_uring_setup: {errno.errorcode[-ring]}")
    assert ring >= 0
    assert process.answer() == "0"
    assert process.answer() == "8 8"
    assert process.answer() == "0"
    assert process.answer() == "8"


def test_a_process_that_nobody_holds_has_no_objection():
    """The usual case."""
    assert guards.objection("self") is None
