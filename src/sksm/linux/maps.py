"""The mappings of a process, as /proc/PID/smaps tells them.

Documentation/filesystems/proc.rst. Only smaps has `VmFlags`, and without them
nobody can tell memory that is wiped on fork, or sealed, from any other. Writing
its text walks page tables, so reading stops behind the range asked for.
"""

from __future__ import annotations

import dataclasses
import fcntl
import os
import re
from collections.abc import Iterator
from ctypes import (
    Array,
    Structure,
    addressof,
    c_char,
    c_uint32,
    c_uint64,
    create_string_buffer,
    sizeof,
)
from errno import ENOENT, ENOTTY
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sksm.linux.ioctl import IOWR
from sksm.spans import PAGE_SIZE, Span

_READ_BYTES = 1 << 16
_FEW = 64  # mappings: to ask for more of them takes longer than the whole text
# Addresses of programs have fewer digits than that of [vsyscall].
_BOUNDS = re.compile(rb"^([0-9a-f]{1,15})-([0-9a-f]{1,15}) ", re.MULTILINE)


@dataclasses.dataclass(frozen=True, slots=True)
class Mapping:
    """One VMA."""

    span: Span
    prot: int  # PROT_*
    shared: bool
    offset: int  # into the file, in bytes
    device: str  # "major:minor" of the file mapped, in hex
    inode: int  # 0: no file
    path: str  # "" or "[heap]" or a file's name as the kernel shows it
    flags: frozenset[str] = frozenset()  # VmFlags, two letters each

    @property
    def special(self) -> bool:
        """Whether the kernel put it there, and not the program."""
        ours = ("[heap]", "[stack]", "[anon")
        return self.path.startswith("[") and not self.path.startswith(ours)

    @property
    def anonymous(self) -> bool:
        """Whether untouched pages of it read as zeros."""
        return self.inode == 0 and not self.shared


def file_key(status: os.stat_result) -> tuple[str, int]:
    """Name a file as a mapping of it does: device and inode."""
    device = status.st_dev
    return f"{os.major(device):02x}:{os.minor(device):02x}", status.st_ino


def mappings(pid: int | str, span: Span) -> list[Mapping]:
    """List the mappings of a process that meet `span`, ascending, with flags.

    Raises:
        OSError: EACCES, EPERM without leave to inspect the process; ENOENT,
            ESRCH when it is gone.
    """
    found = []
    for text in _blocks(f"/proc/{pid}/smaps", b"\nVmFlags:"):
        bounds = text[: text.index(b" ")].split(b"-")
        if int(bounds[1], 16) <= span.start:
            continue
        if int(bounds[0], 16) >= span.stop:
            break
        head, _, rest = text.partition(b"\n")
        _, _, flags = rest.rpartition(b"VmFlags:")
        found.append(_parse(head.decode(errors="replace"), flags.decode().split()))
    return found


def every_mapping(pid: int | str) -> list[Mapping]:
    """List all mappings of a process, without flags: cheap, no page table walk.

    Raises:
        OSError: as `mappings`.
    """
    table = open_table(pid)
    try:
        return parse(text(table))
    finally:
        os.close(table)


def open_table(pid: int | str) -> int:
    """Open /proc/PID/maps. Who opened it closes it."""
    return os.open(f"/proc/{pid}/maps", os.O_RDONLY | os.O_CLOEXEC)


def text(table: int) -> bytes:
    """Read an open /proc/PID/maps from the beginning; b"" if that process is gone."""
    os.lseek(table, 0, os.SEEK_SET)
    return b"".join(iter(lambda: os.read(table, _READ_BYTES), b""))


def all_bounds(text: bytes) -> npt.NDArray[np.int64]:
    """Give begin and end of each mapping that such a text tells of: shape (n, 2).

    But for those of the kernel's own addresses ([vsyscall]).
    """
    found = [(int(first, 16), int(last, 16)) for first, last in _BOUNDS.findall(text)]
    return np.array(found, np.int64).reshape(-1, 2)


def parse(text: bytes) -> list[Mapping]:
    """List the mappings that such a text tells of, without flags."""
    lines = text.decode(errors="replace").split("\n")
    return [_parse(line, []) for line in lines if line]


def count(pid: int | str) -> int:
    """Count the mappings of a process, what `vm.max_map_count` limits."""
    return Path(f"/proc/{pid}/maps").read_bytes().count(b"\n")


def count_within(table: int, span: Span) -> int:
    """Count the mappings that meet `span`; `table` is an open /proc/PID/maps."""
    found, at = 0, span.start
    try:
        while (there := _query(table, at)) and there.vma_start < span.stop:
            found, at = found + 1, there.vma_end
            if found == _FEW:
                break
        else:
            return found
    except OSError as error:
        if error.errno != ENOTTY:
            raise
    every = all_bounds(text(table))
    return int(np.sum((every[:, 0] < span.stop) & (every[:, 1] > span.start)))


class procmap_query(Structure):
    """Argument of `PROCMAP_QUERY`; build ids are not asked for."""

    _fields_ = (
        *((name, c_uint64) for name in ("size", "query_flags", "query_addr")),
        *((name, c_uint64) for name in ("vma_start", "vma_end", "vma_flags")),
        *((name, c_uint64) for name in ("vma_page_size", "vma_offset", "inode")),
        *((name, c_uint32) for name in ("dev_major", "dev_minor")),
        *((name, c_uint32) for name in ("vma_name_size", "build_id_size")),
        *((name, c_uint64) for name in ("vma_name_addr", "build_id_addr")),
    )


PROCMAP_QUERY = IOWR(ord("f"), 17, procmap_query)
PROCMAP_QUERY_COVERING_OR_NEXT_VMA = 0x10
PROCMAP_QUERY_VMA_SHARED = 0x08
_NAME_BYTES = 4096 + 16  # PATH_MAX, and " (deleted)" behind it


def meeting(table: int, span: Span) -> list[Mapping]:
    """List the mappings that meet `span`, ascending, without flags: fast.

    Args:
        table: an open /proc/PID/maps.
        span: where to look.
    """
    try:
        return list(query(table, span))
    except OSError as error:
        if error.errno != ENOTTY:
            raise
    return [m for m in parse(text(table)) if (m.span & span).pages]


def query(table: int, span: Span) -> Iterator[Mapping]:
    """List the mappings that meet `span`, ascending, at 2 us each; no flags but `ht`.

    `PROCMAP_QUERY` of include/uapi/linux/fs.h, since Linux 6.11.

    Args:
        table: an open /proc/PID/maps.
        span: where to look.

    Raises:
        OSError: ENOTTY before Linux 6.11.
    """
    name = create_string_buffer(_NAME_BYTES)
    at = span.start
    while (there := _query(table, at, name)) and there.vma_start < span.stop:
        yield _of_query(there, name.value if there.vma_name_size else b"")
        at = there.vma_end


def _query(
    table: int, address: int, name: Array[c_char] | None = None
) -> procmap_query | None:
    """Ask for the mapping at `address` or, failing that, the next one."""
    arg = procmap_query(
        size=sizeof(procmap_query),
        query_flags=PROCMAP_QUERY_COVERING_OR_NEXT_VMA,
        query_addr=address,
    )
    if name is not None:
        arg.vma_name_size, arg.vma_name_addr = len(name), addressof(name)
    try:
        fcntl.ioctl(table, PROCMAP_QUERY, arg)
    except OSError as error:
        if error.errno == ENOENT:  # no mapping there or behind
            return None
        raise
    return arg


def _of_query(found: procmap_query, name: bytes) -> Mapping:
    return Mapping(
        span=Span(found.vma_start, found.vma_end),
        prot=found.vma_flags & 7,  # PROCMAP_QUERY_VMA_READABLE and so on: as PROT_*
        shared=bool(found.vma_flags & PROCMAP_QUERY_VMA_SHARED),
        offset=found.vma_offset,
        device=f"{found.dev_major:02x}:{found.dev_minor:02x}",
        inode=found.inode,
        path=name.decode(errors="replace"),
        flags=frozenset({"ht"} if found.vma_page_size > PAGE_SIZE else ()),
    )


def _blocks(path: str, last_line: bytes) -> Iterator[bytes]:
    """Cut a file of records into records, each ending with `last_line`."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        pending = b""
        while chunk := os.read(fd, _READ_BYTES):
            pending += chunk
            while (at := pending.find(last_line)) >= 0:
                stop = pending.find(b"\n", at + 1)
                if stop < 0:
                    break
                yield pending[:stop]
                pending = pending[stop + 1 :]
    finally:
        os.close(fd)


def _parse(head: str, flags: list[str]) -> Mapping:
    addresses, perms, offset, device, inode, *path = head.split(maxsplit=5)
    start, _, stop = addresses.partition("-")
    return Mapping(
        span=Span(int(start, 16), int(stop, 16)),
        prot=_PROTECTION[perms[:3]],
        shared=perms[3] == "s",
        offset=int(offset, 16),
        device=device,
        inode=int(inode),
        path=path[0] if path else "",
        flags=frozenset(flags),
    )


_PROTECTION = {
    f"{'-r'[bits & 1]}{'-w'[bits >> 1 & 1]}{'-x'[bits >> 2]}": bits  # as PROT_*
    for bits in range(8)
}
