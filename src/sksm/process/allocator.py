"""Which malloc this process runs on, and whether it may meet merged memory.

An allocator that gives pages back with MADV_DONTNEED counts on reading zeros
afterwards, for calloc. A pool mapping would show the pool's page instead, so only
allocators that were seen not to do that may free merged memory unwatched.
"""

from __future__ import annotations

from pathlib import Path

from sksm.linux import libc, maps


def unsafe() -> str | None:
    """Say why freed memory of this process must not stay merged; None if it may.

    glibc trims by `munmap`, by `brk`, and by MADV_DONTNEED only where calloc
    clears again. Nothing is assumed of any other allocator.
    """
    malloc = libc.address_of("malloc")
    loaded = maps.every_mapping("self")
    home = next(m.path for m in loaded if m.span.start <= malloc < m.span.stop)
    name = Path(home).name
    if any("jemalloc" in Path(mapping.path).name for mapping in loaded):
        return "jemalloc counts on MADV_DONTNEED for zeros"
    if not name.startswith(("libc.so", "libc-")):
        return f"not known what the allocator in {name} expects of freed memory"
    return None
