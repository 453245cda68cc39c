"""The mappings of a process, as /proc/PID/smaps tells them.

Documentation/filesystems/proc.rst. Only smaps has `VmFlags`, and without them
nobody can tell memory that is wiped on fork, or sealed, from any other. Writing
its text walks page tables, so reading stops behind the range asked for.
"""

from __future__ import annotations

import dataclasses
import fcntl
import os
from collections.abc import Iterator
from ctypes import (
    Structure,
    addressof,
    c_uint32,
    c_uint64,
    create_string_buffer,
    sizeof,
)
from errno import ENOENT, ENOTTY
from pathlib import Path

from sksm.linux import libc
from sksm.linux.ioctl import IOWR
from sksm.spans import PAGE_SIZE, Span

_READ_BYTES = 1 << 16


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

    def shows(self, status: os.stat_result) -> bool:
        """Say whether it maps the file of that `fstat`."""
        device = status.st_dev
        name = f"{os.major(device):02x}:{os.minor(device):02x}"
        return self.inode == status.st_ino and self.device == name

    @property
    def special(self) -> bool:
        """Whether the kernel put it there, and not the program."""
        ours = ("[heap]", "[stack]", "[anon")
        return self.path.startswith("[") and not self.path.startswith(ours)

    @property
    def anonymous(self) -> bool:
        """Whether untouched pages of it read as zeros."""
        return self.inode == 0 and not self.shared


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
    text = Path(f"/proc/{pid}/maps").read_text(errors="replace")
    return [_parse(line, []) for line in text.splitlines()]


def count(pid: int | str) -> int:
    """Count the mappings of a process, what `vm.max_map_count` limits."""
    return Path(f"/proc/{pid}/maps").read_bytes().count(b"\n")


def count_within(pid: int | str, span: Span) -> int:
    """Count the mappings of a process that meet `span`."""
    try:
        return sum(1 for _ in query(pid, span))
    except OSError as error:
        if error.errno != ENOTTY:
            raise
    return sum(
        mapping.span.start < span.stop and mapping.span.stop > span.start
        for mapping in every_mapping(pid)
    )


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


def query(pid: int | str, span: Span) -> Iterator[Mapping]:
    """List the mappings that meet `span`, ascending, at 1 us each; no flags but `ht`.

    `PROCMAP_QUERY` of include/uapi/linux/fs.h, since Linux 6.11.

    Raises:
        OSError: ENOTTY before that.
    """
    name = create_string_buffer(_NAME_BYTES)
    with open(f"/proc/{pid}/maps", "rb", buffering=0) as table:
        at = span.start
        while at < span.stop:
            arg = procmap_query(
                size=sizeof(procmap_query),
                query_flags=PROCMAP_QUERY_COVERING_OR_NEXT_VMA,
                query_addr=at,
                vma_name_size=_NAME_BYTES,
                vma_name_addr=addressof(name),
            )
            try:
                fcntl.ioctl(table, PROCMAP_QUERY, arg)
            except OSError as error:
                if error.errno == ENOENT:  # no mapping there or behind
                    return
                raise
            if arg.vma_start >= span.stop:
                return
            yield _of_query(arg, name.value if arg.vma_name_size else b"")
            at = arg.vma_end


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
    start, stop = (int(word, 16) for word in addresses.split("-"))
    prot = sum(bit for letter, bit in _PROTECTION.items() if letter in perms[:3])
    return Mapping(
        span=Span(start, stop),
        prot=prot,
        shared=perms[3] == "s",
        offset=int(offset, 16),
        device=device,
        inode=int(inode),
        path=path[0] if path else "",
        flags=frozenset(flags),
    )


_PROTECTION = {"r": libc.PROT_READ, "w": libc.PROT_WRITE, "x": libc.PROT_EXEC}
