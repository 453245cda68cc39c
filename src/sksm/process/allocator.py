"""Which malloc this process runs on, and whether it may meet merged memory.

An allocator that gives pages back with MADV_DONTNEED counts on reading zeros
afterwards, for calloc. A pool mapping would show the pool's page instead, so only
allocators that were seen not to do that may free merged memory.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

from sksm.linux import libc, maps

_BLOCK = 64 << 20  # bytes; glibc maps what is over 32 MiB by itself, for sure


def unsafe() -> str | None:
    """Say why memory that goes back to an allocator must not be merged, if so.

    For memory of which nobody knows where it comes from: a library may bring an
    allocator of its own, at any time.
    """
    return _loaded_jemalloc() or unsafe_malloc()


@functools.cache  # no program changes its malloc
def unsafe_malloc() -> str | None:
    """Say why memory that goes back to malloc must not be merged; None if it may.

    glibc trims by `munmap`, by `brk`, and by MADV_DONTNEED only where calloc
    clears again. Nothing is assumed of any other allocator.
    """
    if _glibc_serves():
        return None
    if reason := _loaded_jemalloc():
        return reason
    malloc = libc.address_of("malloc")
    loaded = maps.every_mapping("self")
    home = next(m.path for m in loaded if m.span.start <= malloc < m.span.stop)
    return f"not known what the allocator in {home} expects of freed memory"


def _loaded_jemalloc() -> str | None:
    if any("jemalloc" in Path(m.path).name for m in maps.every_mapping("self")):
        return "jemalloc counts on MADV_DONTNEED for zeros"
    return None


class _mallinfo2(ctypes.Structure):  # noqa: N801  malloc.h, since glibc 2.33
    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    )


def _glibc_serves() -> bool:
    """Say whether what malloc gives out shows in glibc's own account.

    Where malloc is does not tell: in an executable that is not relocatable, such
    as Debian's Python, its address is that of a stub there.
    """
    try:
        account = ctypes.CDLL("libc.so.6").mallinfo2
    except (OSError, AttributeError):
        return False
    account.restype = _mallinfo2
    program = ctypes.CDLL(None)
    program.malloc.argtypes, program.malloc.restype = (
        (ctypes.c_size_t,),
        ctypes.c_void_p,
    )
    program.free.argtypes = (ctypes.c_void_p,)
    before = account().hblkhd
    block = program.malloc(_BLOCK)
    grown = account().hblkhd - before
    program.free(block)
    return bool(block) and grown >= _BLOCK
