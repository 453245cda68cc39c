"""The attempts behind `features`: each makes real use of one thing the kernel has.

A trial leaves nothing behind in this process. Those that concern other processes
are in `process_trials`.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from sksm.linux import calls, libc, maps, memfd, pagemap, userfaultfd
from sksm.linux.pagemap import Category
from sksm.spans import PAGE_SIZE, Span

_UFFD_FEATURE_WP_ASYNC = 1 << 15
_ENTRY_EXCLUSIVE = np.uint64(1 << 56)  # mapped once, pagemap.rst


# -- the pool


def create_memfd() -> str:
    """Make a memfd and write to it."""
    with _memfd() as fd:
        os.pwrite(fd, b"x", 0)
    return ""


def map_memfd_executable() -> str:
    """Map a memfd as code; a security module may forbid that."""
    prot = libc.PROT_READ | libc.PROT_EXEC
    with _memfd() as fd:
        # SAFETY: a new mapping, where the kernel likes, which nobody jumps into.
        at = libc.mmap(None, PAGE_SIZE, prot, libc.MAP_PRIVATE, fd, 0)
        libc.munmap(at, PAGE_SIZE)
    return ""


@contextlib.contextmanager
def _memfd() -> Iterator[int]:
    fd = memfd.create("sksm-trial")
    try:
        os.ftruncate(fd, PAGE_SIZE)
        yield fd
    finally:
        os.close(fd)


# -- looking at pages


def read_pagemap() -> str:
    """Read the table entry of a page that is there."""
    with _pagemap() as table, page() as span:
        pagemap.entries(table, span)
    return "frame numbers too" if os.geteuid() == 0 else ""


def scan_pagemap() -> str:
    """Scan one page."""
    present = Category.PRESENT
    with _pagemap() as table, page() as span:
        pagemap.scan(table, span, any_of=present, returned=present, limit=1)
    return ""


def query_mappings() -> str:
    """Ask for the mapping of one address."""
    with page() as span, open("/proc/self/maps", "rb", buffering=0) as table:
        query = maps.procmap_query(
            size=ctypes.sizeof(maps.procmap_query), query_addr=span.start
        )
        fcntl.ioctl(table, maps.PROCMAP_QUERY, query)
    return ""


@contextlib.contextmanager
def _pagemap() -> Iterator[int]:
    fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def page() -> Iterator[Span]:
    """Map one private page that holds 0x5a everywhere."""
    prot, flags = libc.PROT_READ | libc.PROT_WRITE, libc.MAP_PRIVATE
    start = libc.mmap(None, PAGE_SIZE, prot, flags | libc.MAP_ANONYMOUS, -1, 0)
    try:
        # SAFETY: the page just mapped, ours until the block ends.
        ctypes.memset(start, 0x5A, PAGE_SIZE)
        yield Span(start, start + PAGE_SIZE)
    finally:
        libc.munmap(start, PAGE_SIZE)


# -- holding writers off


def run_call_list() -> str:
    """Have the machine code run an empty table."""
    if not calls.uninterrupted():
        raise OSError(
            errno.EOPNOTSUPP, "no code for this processor, or no executable memory"
        )
    calls.CallList(calls.Here()).run()
    return ""


def write_protect() -> str:
    """Protect a page and release it. Says whose faults can be handled."""
    fd = userfaultfd.create()
    try:
        with page() as span:
            userfaultfd.register(fd, span)
            for mode in (userfaultfd.UFFDIO_WRITEPROTECT_MODE_WP, 0):
                arg = userfaultfd.uffdio_writeprotect(
                    range=userfaultfd.uffdio_range(span.start, span.size), mode=mode
                )
                fcntl.ioctl(fd, userfaultfd.UFFDIO_WRITEPROTECT, arg)
            userfaultfd.unregister(fd, span)
    finally:
        os.close(fd)
    return _whose_faults()


def _whose_faults() -> str:
    try:
        os.close(libc.syscall(libc.SYS["userfaultfd"], os.O_CLOEXEC, 0))
    except OSError as error:
        if error.errno != errno.EPERM:
            raise
        return "user mode only (vm.unprivileged_userfaultfd=0)"
    return "full"


def write_protect_asynchronously() -> str:
    """Ask for protection that the kernel lifts by itself, and register a page."""
    flags = os.O_CLOEXEC | userfaultfd.UFFD_USER_MODE_ONLY
    fd = libc.syscall(libc.SYS["userfaultfd"], flags, 0)
    try:
        wanted = userfaultfd.uffdio_api(
            api=userfaultfd.UFFD_API, features=_UFFD_FEATURE_WP_ASYNC
        )
        fcntl.ioctl(fd, userfaultfd.UFFDIO_API, wanted)
        with page() as span:
            userfaultfd.register(fd, span)
            userfaultfd.unregister(fd, span)
    finally:
        os.close(fd)
    return ""


# -- merging in the kernel


def look_at_ksm() -> str:
    """Read whether ksmd runs, and whether we may say so."""
    run = Path("/sys/kernel/mm/ksm/run")
    state = {"0": "off", "1": "running", "2": "un-merging"}
    now = state.get(run.read_text().strip(), "in an unknown state")
    mine = os.access(run, os.W_OK)
    return f"ksmd is {now}" + ("" if mine else "; only root can steer it")


def merge_in_kernel() -> str:
    """Merge two equal pages, and look whether they share one frame.

    An advice that this kernel does not know may be somebody else's number, and
    succeed: only the effect counts. Two mappings, so that no huge page covers
    both.
    """
    with _pagemap() as table, page() as one, page() as two:
        for span in (one, two):
            # SAFETY: an advice that keeps contents, on pages of our own.
            libc.madvise(span.start, span.size, libc.MADV_MERGE)
        found = [pagemap.entries(table, span)[0] for span in (one, two)]
    frames = {int(entry & np.uint64(pagemap.ENTRY_FRAME)) for entry in found}
    ours = _ENTRY_EXCLUSIVE | pagemap.ENTRY_FILE  # a file's: merged by `sksm run`
    if any(int(entry) & ours for entry in found) or len(frames) > 1:
        raise OSError(errno.EOPNOTSUPP, "the advice succeeds, but shares nothing")
    return ""


# -- information


def read_huge_page_setting() -> str:
    """Read when the kernel uses huge pages by itself."""
    text = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    return text[text.index("[") + 1 : text.index("]")]


def read_map_limit() -> str:
    """Read how many mappings a process may have."""
    return Path("/proc/sys/vm/max_map_count").read_text().strip()


def find_memory_cgroup() -> str:
    """Say which version of the memory controller this process is under."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        if "memory" in line.split(":")[1].split(","):
            return "version 1"
    root = Path("/sys/fs/cgroup/cgroup.controllers")
    if "memory" in root.read_text().split():
        return "version 2"
    raise OSError(errno.ENOENT, "no memory controller")
