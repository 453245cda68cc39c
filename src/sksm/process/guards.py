"""What forbids merging any memory of a process."""

from __future__ import annotations

from pathlib import Path

PINNED = "a device or io_uring holds memory of this process pinned (VmPin)"


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
