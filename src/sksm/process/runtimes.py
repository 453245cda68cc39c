"""Whether something in a process may count on dropped memory to read as zeros.

MADV_DONTNEED on a merged page brings the pool's bytes back. Allocators that give
pages to the kernel that way, and hand them out again as zeroed, would hand out
old bytes. Whose code cannot call madvise does not do that; of the few others that
are everywhere it is known what they call it for. Everything else is in doubt.

Three things are not seen. Code that makes system calls by itself, which only Go is
known for. Programs that drop their own memory by way of an interpreter
(Python's `mmap.madvise`). And code that is loaded later, which has got nothing to
do with memory that is merged by then.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import mmap
import os
import re
import stat
from errno import ENOTTY, ESRCH
from pathlib import Path

import numpy as np

from sksm.linux import elf, maps
from sksm.spans import PAGE_SIZE, Span

DOUBT = "{} may count on MADV_DONTNEED for zeros"
JEMALLOC, GO = "jemalloc", "Go"
STATIC = DOUBT.format("what is linked into it (statically, without glibc's library)")
UNKNOWN = "{} can drop memory (madvise), and may count on zeros afterwards"
REPLACED = "{} was deleted or replaced while the process runs: restart it"
UNREADABLE = "{} cannot be read, so nobody knows what it does with freed memory"
REPORTING = (
    "its guest may count on zeros in pages that it has reported as free: "
    "start QEMU without free-page-reporting"
)
FOREIGN = "{} holds code, but not for x86-64 in an ELF file"

# By the name of a mapped file.
_RUNTIMES = (
    (JEMALLOC, re.compile(r"libjemalloc\b.*")),
    ("tcmalloc", re.compile(r"libtcmalloc.*")),
    ("mimalloc", re.compile(r"libmimalloc.*")),
    ("the JVM", re.compile(r"libjvm\.so.*")),
    ("V8", re.compile(r"lib(node|v8)\b.*|node(js)?|chrom(e|ium)|deno|electron")),
    (".NET", re.compile(r"libcoreclr\.so.*")),
    ("Erlang's BEAM", re.compile(r"beam(\.smp)?")),
    ("musl", re.compile(r"ld-musl-.*|libc\.musl-.*|libc\.so")),
)
_GLIBC = re.compile(r"libc\.so\.6|libc-2\.\d+\.so")  # the second before 2.34

# Files that call madvise, and what for. Those with an advice named were
# disassembled, and give no other.
_HARMLESS = re.compile(
    "|".join(
        (
            # Drops stacks and thread arenas, and clears what it gives out of them;
            # see `sksm.process.allocator`.
            _GLIBC.pattern,
            # `mmap.madvise`: only what a program asks for.
            r"(lib)?python3[.\d]*(\.so.*)?|mmap\.cpython-.*",
            # MADV_HUGEPAGE
            r"_multiarray_umath\.cpython-.*",
            # MADV_DONTDUMP: OpenSSL's secure heap, also in wheels of their own
            # name, and linked into the Rust part of Python's cryptography.
            r"lib(crypto|ssl)(-[0-9a-f]+)?\.so.*|_rust\.abi3\.so",
            # MADV_DONTDUMP, MADV_DODUMP: keys.
            r"libsodium(-[0-9a-f]+)?\.so.*",
            # MADV_DONTFORK, MADV_DOFORK: what cards have access to.
            r"libibverbs\.so.*",
            # MADV_FREE, which the kernel refuses for merged pages: a stack of its
            # JIT, written before it is read. glib brings it into many programs.
            r"libpcre2-8\.so.*",
            # Drops guest memory that the guest has given back, and guests clear it
            # before they use it again. For the one exception see `_reports_pages`.
            r"qemu-system-.*",
        )
    )
)
_MADVISE = (b"madvise", b"process_madvise")
_JEMALLOC_MARK = b"<jemalloc>"  # how it begins its messages, in every build
_GO_SECTIONS = {b".go.buildinfo", b".gopclntab", b".note.go.buildid"}
_GO_MARK = b"\xff Go buildinf:"
# A line of /proc/PID/maps about code from a file.
_CODE = re.compile(
    rb"^([0-9a-f]+)-([0-9a-f]+) ..x. [0-9a-f]+ ([0-9a-f:]+) ([1-9]\d*) +(.+)$", re.M
)


_CHUNK = 1 << 20  # bytes
_REPORTING = re.compile(rb'free-page-reporting"?[=:](on|true)')


class _Kind(enum.Enum):
    """What was found in a file of code."""

    PLAIN = "cannot drop memory"
    DROPS = "calls madvise"
    JEMALLOC = "has jemalloc in it"
    GO = "has Go's runtime in it, which makes system calls by itself"
    FOREIGN = "is not for this processor"


@dataclasses.dataclass(frozen=True, slots=True)
class _Code:
    """A file from which a process runs code."""

    path: str  # as maps tells it
    name: str  # the last part of it, be it that the file has been deleted
    key: tuple[str, int]  # device and inode, as maps tells them
    span: Span


def doubt(pid: int) -> str | None:
    """Say why memory of a process must not go into the pool; None if it may.

    The first process of a kind costs a read of its files' tables of symbols (40 ms
    for a Python worker with pandas), each of its siblings a `stat` of each file (4).

    Raises:
        OSError: EACCES, EPERM without leave to inspect the process; ENOENT, ESRCH
            when it is gone.
    """
    code = _code(pid)
    for file in code:
        for what, pattern in _RUNTIMES:
            if pattern.fullmatch(file.name):
                return DOUBT.format(what)
    if _reports_pages(pid, code):
        return REPORTING
    static = not any(_GLIBC.fullmatch(file.name) for file in code)
    found = (_doubt_of(pid, file, static=static) for file in code)
    return next(filter(None, found), STATIC if static else None)


def _reports_pages(pid: int, code: list[_Code]) -> bool:
    """Say whether it is QEMU with a guest that reports free pages, to be dropped.

    A Linux guest with `init_on_free` clears pages when it frees them, reports them
    then, and does not clear them again (mm/page_alloc.c, `post_alloc_hook`).
    """
    if not any(file.name.startswith("qemu-system-") for file in code):
        return False
    return bool(_REPORTING.search(Path(f"/proc/{pid}/cmdline").read_bytes()))


def _code(pid: int) -> list[_Code]:
    """List the files that a process runs code from, each once."""
    text = Path(f"/proc/{pid}/maps").read_bytes()
    files = {}
    for start, stop, device, inode, path in _CODE.findall(text):
        key = device.decode(), int(inode)
        name = os.path.basename(os.fsdecode(path.removesuffix(b" (deleted)")))
        span = Span(int(start, 16), int(stop, 16))
        files[key] = _Code(os.fsdecode(path), name, key, span)
    if not files:
        raise ProcessLookupError(ESRCH, f"process {pid} runs no program")
    return list(files.values())


def _doubt_of(pid: int, file: _Code, *, static: bool) -> str | None:
    """Say what one file of code gives reason to doubt."""
    try:
        there = _find(pid, file)
        if there is None:
            os.stat(f"/proc/{pid}/exe")  # raises if it is the process that is gone
            return REPLACED.format(file.path)
        kind = _kind_of(*there, file, whole=static)
    except PermissionError:
        return UNREADABLE.format(file.path)
    if kind is _Kind.DROPS and _HARMLESS.fullmatch(file.name):
        return None
    return _DOUBTS[kind].format(file.path) if kind in _DOUBTS else None


_DOUBTS = {
    _Kind.DROPS: UNKNOWN,
    _Kind.JEMALLOC: DOUBT.format(JEMALLOC),
    _Kind.GO: DOUBT.format(GO),
    _Kind.FOREIGN: FOREIGN,
}


def _find(pid: int, file: _Code) -> tuple[str, os.stat_result] | None:
    """Give a path to the very file that is mapped, and its status.

    /proc/PID/map_files leads to files that have been deleted, too, but only for who
    has CAP_CHECKPOINT_RESTORE. Others go by the path as the process sees it, or as
    we do: maps tells one that we could reach as we would (d_path).
    """
    exact = f"/proc/{pid}/map_files/{file.span.start:x}-{file.span.stop:x}"
    with contextlib.suppress(PermissionError, FileNotFoundError):
        return exact, os.stat(exact)
    for root in (f"/proc/{pid}/root", ""):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            status = os.stat(root + file.path)
            if stat.S_ISREG(status.st_mode) and _is_mapped_as(
                root + file.path, status, file.key
            ):
                return root + file.path, status
    return None


def _is_mapped_as(path: str, status: os.stat_result, key: tuple[str, int]) -> bool:
    """Say whether a mapping of the file at `path` shows `key`.

    On btrfs and overlayfs that is another device than `stat` tells. So map it.
    """
    if maps.file_key(status) == key:
        return True
    with open(path, "rb") as opened:
        area = mmap.mmap(opened.fileno(), PAGE_SIZE, prot=mmap.PROT_READ)
    # SAFETY: only the address is used; a file that is cut short does no harm.
    address = np.frombuffer(area, np.uint8).ctypes.data
    shown = _mapping_at(address)
    return (shown.device, shown.inode) == key


def _mapping_at(address: int) -> maps.Mapping:
    """Give the mapping of this process at `address`."""
    table = maps.open_table("self")
    try:
        return next(maps.query(table, Span(address, address + PAGE_SIZE)))
    except OSError as error:
        if error.errno != ENOTTY:
            raise
        own = maps.every_mapping("self")  # before Linux 6.11
        return next(one for one in own if one.span.start <= address < one.span.stop)
    finally:
        os.close(table)


_kinds: dict[tuple[tuple[str, int], int, int, bool], _Kind] = {}
_MOST_KINDS = 1 << 14  # kept; a host has some thousand such files


def _kind_of(path: str, status: os.stat_result, file: _Code, *, whole: bool) -> _Kind:
    """Give the kind of a file, looking at it only if it is new or was changed."""
    key = file.key, status.st_size, status.st_mtime_ns, whole
    if key not in _kinds:
        if len(_kinds) == _MOST_KINDS:
            _kinds.clear()
        with open(path, "rb", buffering=0) as opened:
            _kinds[key] = _look_at(opened.fileno(), whole=whole)
    return _kinds[key]


def _look_at(fd: int, *, whole: bool) -> _Kind:
    """Find out the kind of a file of code.

    Args:
        fd: the file.
        whole: it links nothing: look for marks in all of it.
    """
    program = elf.read(fd)
    if program is None or program.machine != elf.EM_X86_64:
        return _Kind.FOREIGN
    if not program.names:  # stripped of its section headers
        drops, go = _contains(fd, b"madvise\0"), _contains(fd, _GO_MARK)
    else:
        drops = program.links(_MADVISE)
        go = not _GO_SECTIONS.isdisjoint(program.names)
    if go:
        return _Kind.GO
    if (drops or whole) and _contains(fd, _JEMALLOC_MARK):
        return _Kind.JEMALLOC
    return _Kind.DROPS if drops else _Kind.PLAIN


def _contains(fd: int, mark: bytes) -> bool:
    at = 0
    while chunk := os.pread(fd, _CHUNK, at):
        if mark in chunk:
            return True
        at += _CHUNK - len(mark)  # it may lie across the end
    return False
