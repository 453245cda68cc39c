"""What forbids merging any memory of a process."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from sksm.process import status

PINNED = "a device or io_uring holds memory of this process pinned (VmPin)"

OURS = "it is this process, or one above it: they would wait for each other"
ENDED = "it has ended, and waits for its parent to notice (zombie)"
HEADLESS = "its main thread has ended, and the others cannot be looked at without it"
NO_MEMORY = "it has no memory of its own: a kernel thread"
STRICT = "seccomp strict mode would kill it for any system call made in its place"
NARROW = "it is a 32-bit process"
UNREADABLE = "its program file cannot be read"

# What the kernel or a device writes to past the page tables, or with threads that
# nobody can stop.
IO_URING = (
    "it uses io_uring, which does not tell what memory it holds or is reading into: "
    "have it use another way of I/O (QEMU: aio=threads, and no iothread objects)"
)
LIBAIO = (
    "it uses libaio, and reads into its memory may be under way: "
    "have it use another way of I/O (QEMU: aio=threads)"
)
VFIO = "it gives devices access to its memory (VFIO): detach them first"
VHOST = (
    "threads of the kernel write to its memory (vhost), and cannot be stopped: "
    "have it do without (QEMU: vhost=off)"
)
RDMA = "it gives network cards access to its memory (RDMA)"
GPU = "it uses a GPU, which may have access to its memory"
DEVICE = "it drives a device that may have access to its memory"
RING = (
    "it maps a socket's ring, and a network card may have access to its memory (AF_XDP)"
)

# By how the name of an open or mapped file begins, as /proc tells it.
_HOLDERS = {
    "anon_inode:[io_uring]": IO_URING,
    "anon_inode:[vfio": VFIO,
    "/dev/vfio/": VFIO,
    "/dev/iommu": VFIO,
    "/dev/vhost-": VHOST,
    "anon_inode:[infiniband": RDMA,
    "/dev/infiniband/": RDMA,
    "/dev/nvidia": GPU,
    "/dev/dri/": GPU,
    "/dev/kfd": GPU,
    "/dev/accel/": GPU,
    "/dev/uio": DEVICE,
    "/dev/mem": DEVICE,
    "/dev/video": DEVICE,  # V4L2_MEMORY_USERPTR
}
# Sockets are not told apart by name, but few have something to map: AF_XDP has,
# and AF_PACKET, which does no harm. The umem of AF_XDP does not count in VmPin.
_HOLDING_MAPPINGS = {"/[aio]": LIBAIO, "socket:[": RING, **_HOLDERS}
# A line of /proc/PID/maps, for its name.
_NAMED = re.compile(rb" ((?:/dev/|/\[aio\]|socket:|anon_inode:).*)")


def objection(pid: int | str) -> str | None:
    """Say why no page of a process may be replaced; None if some may.

    A page that is pinned (io_uring's registered buffers, RDMA, VFIO) is written
    past the page tables: after a replacement the write goes to a frame that the
    process no longer sees. The kernel counts such pages, in `VmPin` of
    /proc/PID/status (proc.rst), but does not say which they are.
    """
    for line in Path(f"/proc/{pid}/status").read_bytes().splitlines():
        if line.startswith(b"VmPin:"):
            return PINNED if int(line.split()[1]) else None
    return None


def objection_to(pid: int, *, in_place: bool = False) -> str | None:
    """Say why no page of another process may be merged; None if some may.

    Costs a look at each open file. The answer is good for as long as the process
    is stopped, and an estimate before.

    Args:
        pid: the process.
        in_place: the kernel merges pages, and leaves those alone that something
            besides page tables has hold of. Else they would be replaced.

    Raises:
        OSError: EACCES, EPERM without leave to inspect the process; ENOENT, ESRCH
            when it is gone.
    """
    if reason := _objection_by_status(pid):
        return reason
    mapped = _mapped(pid)  # PermissionError here, before anything is a reason
    if in_place:
        return _objection_to_program(pid)
    return (
        objection(pid)
        or held_by(mapped, _HOLDING_MAPPINGS)
        or _objection_to_program(pid)
        or held_by(_opened(pid))
    )


def held_by(names: Iterable[str], holders: dict[str, str] = _HOLDERS) -> str | None:
    """Say who writes to the memory of a process that has files of these `names`.

    Every io_uring does. The counts of requests in its fdinfo show what is under
    way only as long as no request completed more than once or in silence
    (IORING_CQE_F_MORE, IOSQE_CQE_SKIP_SUCCESS). And memory that it shares with the
    kernel (IORING_REGISTER_PBUF_RING, IORING_SETUP_NO_MMAP) is pinned, but counts
    neither in `VmPin` nor in `UserBufs`: seen with Linux 6.18.
    """
    beginnings = tuple(holders)
    for name in names:
        if name.startswith(beginnings):
            return next(why for start, why in holders.items() if name.startswith(start))
    return None


def _objection_by_status(pid: int) -> str | None:
    found = status.read(pid)
    tracer = int(found["TracerPid"])
    objections = (
        (OURS, int(found["Tgid"]) in _above_us()),
        (HEADLESS, found["State"].startswith("Z") and found["Threads"] != "1"),
        (ENDED, found["State"].startswith(("Z", "X"))),
        (NO_MEMORY, "VmSize" not in found),
        (_traced(tracer) if tracer else "", tracer),
        (STRICT, found.get("Seccomp") == "1"),  # SECCOMP_MODE_STRICT
    )
    return next((why for why, holds in objections if holds), None)


def _above_us() -> list[int]:
    """List this process, its parent and so on."""
    above = [os.getpid()]
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # ended just now
        while parent := int(status.read(above[-1])["PPid"]):
            above.append(parent)
    return above


def _traced(tracer: int) -> str:
    """Say that one process can have one tracer only (ptrace(2))."""
    name = "process"
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        name = Path(f"/proc/{tracer}/comm").read_text(errors="replace").strip()
    return f"traced by {name} ({tracer}): detach it first"


def _objection_to_program(pid: int) -> str | None:
    """Look at the program's ELF header. Leave to inspect it has been shown."""
    try:
        with open(f"/proc/{pid}/exe", "rb", buffering=0) as program:
            head = program.read(5)
    except (FileNotFoundError, ProcessLookupError):
        raise
    except OSError:
        return UNREADABLE
    return NARROW if head == b"\x7fELF\x01" else None  # ELFCLASS32


def _mapped(pid: int) -> list[str]:
    """List the mapped names that matter here; parsing all takes a while."""
    text = Path(f"/proc/{pid}/maps").read_bytes()
    return [name.decode(errors="replace") for name in _NAMED.findall(text)]


def _opened(pid: int) -> Iterator[str]:
    """List the names of open files."""
    directory = os.open(f"/proc/{pid}/fd", os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY)
    try:
        for number in os.listdir(directory):
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                yield os.readlink(number, dir_fd=directory)
    finally:
        os.close(directory)
