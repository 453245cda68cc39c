"""Who may share pages with whom: a process's trust domain."""

from __future__ import annotations

import dataclasses
import os

from sksm.errors import Unsupported
from sksm.process import status

_GUARDED = "-guarded"


@dataclasses.dataclass(frozen=True, slots=True)
class Domain:
    """Processes that run as one user; those that the kernel guards are apart.

    A process that is not dumpable (prctl(2), PR_SET_DUMPABLE), such as one that
    gave up root's identity, may not be looked at by its own user. So others of
    that user must not learn by timing which pages it holds.
    """

    uid: int
    guarded: bool = False

    @property
    def name(self) -> str:
        """Name it as `parse` reads it, fit for a directory."""
        return f"{self.uid}{_GUARDED if self.guarded else ''}"

    @property
    def ours(self) -> bool:
        """Whether it is that of the user we are."""
        return not self.guarded and self.uid == os.getuid()


def parse(name: str) -> Domain:
    """Make a domain of its name.

    Raises:
        ValueError: that is no such name.
    """
    return Domain(int(name.removesuffix(_GUARDED)), name.endswith(_GUARDED))


def of(pid: int) -> Domain:
    """Say to which domain a process belongs now.

    Raises:
        Unsupported: to none: it runs under several user ids.
        OSError: ENOENT if there is no such process.
    """
    uids = set(status.read(pid)["Uid"].split())
    if len(uids) != 1:
        listed = ", ".join(sorted(uids))
        raise Unsupported(f"process {pid} runs under several user ids ({listed})")
    uid = int(uids.pop())
    # The files of a process that is not dumpable belong to root (proc(5)).
    return Domain(uid, os.stat(f"/proc/{pid}/status").st_uid != uid)
