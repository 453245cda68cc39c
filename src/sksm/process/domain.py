"""Who may share pages with whom: a process's trust domain."""

from __future__ import annotations

import dataclasses
import os
import re

from sksm.errors import Unsupported
from sksm.process import status

_GUARDED = "-guarded"
GROUP = re.compile("[A-Za-z][A-Za-z0-9_-]*")


@dataclasses.dataclass(frozen=True, slots=True)
class Domain:
    """Processes that run as one user; those that the kernel guards are apart.

    A process that is not dumpable (prctl(2), PR_SET_DUMPABLE), such as one that
    gave up root's identity, may not be looked at by its own user. So others of
    that user must not learn by timing which pages it holds.
    """

    uid: int
    guarded: bool = False
    group: str = ""  # of processes of several users, whom `uid` lets share

    @property
    def name(self) -> str:
        """Name it as `parse` reads it, fit for a directory."""
        return self.group or f"{self.uid}{_GUARDED if self.guarded else ''}"

    @property
    def ours(self) -> bool:
        """Whether it is that of the user we are."""
        return self == Domain(os.getuid())

    def admits(self, pid: int) -> bool:
        """Say whether a process may share in it; False if there is none.

        In a group may share whom its user, who alone can ask for it, has put there.
        But nobody was asked about memory that the kernel keeps from its own user.
        """
        try:
            whose = of(pid)
        except (OSError, Unsupported):
            return False
        return not whose.guarded if self.group else whose == self


def parse(name: str) -> Domain:
    """Make a domain of its name: a number, or a word for a group.

    Raises:
        ValueError: that is no such name.
    """
    if GROUP.fullmatch(name):
        return Domain(os.getuid(), group=name)
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
