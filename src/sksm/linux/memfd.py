"""Anonymous files: memfd_create(2), include/uapi/linux/memfd.h."""

from __future__ import annotations

import os

MFD_EXEC = 0x10


def create(name: str) -> int:
    """Make one that can be sealed, and executed if `vm.memfd_noexec` lets us.

    Where it does not, the file may still be mapped executable (Linux 6.18): what the
    kernel forbids is execve(2), by the file's mode (Documentation/userspace-api/
    mfd_noexec.rst).
    """
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        return os.memfd_create(name, flags | MFD_EXEC)
    except OSError:  # EINVAL before 6.3, EACCES with vm.memfd_noexec=2
        return os.memfd_create(name, flags)
