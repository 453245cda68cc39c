"""Why a process may not be looked at, and what would change that.

ptrace(2), "Ptrace access mode checking", lists the kernel's questions in order; the
files of /proc that matter here ask the same (proc(5)).
"""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

from sksm.errors import NotPermitted, ProcessGone, SksmError, Unsupported
from sksm.process import guards, status

YAMA = Path("/proc/sys/kernel/yama/ptrace_scope")
CAP_SYS_PTRACE = 19  # linux/capability.h

_AS_ROOT = "as root (CAP_SYS_PTRACE)"
_YAMA = {
    1: "lets a process look at its own children only: set it to 0 "
    f"(sysctl -w kernel.yama.ptrace_scope=0), or run this {_AS_ROOT}",
    2: f"lets only root look at processes: run this {_AS_ROOT}",
    3: "lets nobody look at any process, until the next boot",
}


def require_memory(pid: int) -> None:
    """Make sure that `pid` is a process, and one with memory to look at.

    Raises:
        ProcessGone: there is none (any more).
        Unsupported: a kernel thread, one thread of a process, or one whose main
            thread has ended.
        NotPermitted: /proc hides it.
    """
    try:
        found = status.read(pid)
    except OSError as error:
        raise explain(pid, error) from error
    if found["State"].startswith("Z") and found["Threads"] != "1":
        raise Unsupported(f"process {pid}: {guards.HEADLESS}")
    if found["State"].startswith(("Z", "X")):
        raise ProcessGone(f"process {pid}: {guards.ENDED}")
    if found["Tgid"] != str(pid):
        raise Unsupported(f"{pid} is a thread of process {found['Tgid']}: name that")
    if "VmSize" not in found:
        raise Unsupported(f"process {pid}: {guards.NO_MEMORY}")


def explain(pid: int, error: OSError) -> SksmError:
    """Put into words what it means that looking at `pid` failed like that."""
    if error.errno in (errno.ENOENT, errno.ESRCH):
        if _hidden(pid):
            return NotPermitted(
                f"process {pid} is hidden from you (/proc is mounted with hidepid): "
                f"run this {_AS_ROOT}"
            )
        return ProcessGone(f"there is no process {pid} (any more)")
    if error.errno not in (errno.EACCES, errno.EPERM):
        return SksmError(f"process {pid}: {error.strerror}")
    try:
        return NotPermitted(f"process {pid} may not be looked at: {_denial(pid)}")
    except FileNotFoundError:
        return ProcessGone(f"there is no process {pid} any more")


def _hidden(pid: int) -> bool:
    try:
        os.kill(pid, 0)  # asks only
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # there it is, and another's
    return not Path(f"/proc/{pid}").exists()


def _denial(pid: int) -> str:
    theirs, ours = status.read(pid), status.read(os.getpid())
    scope = yama_scope()
    if not _may_trace(ours):
        reason = _without_capability(pid, theirs, ours)
        if reason or scope:
            return reason or _yama(scope)
    elif scope >= 3:
        return _yama(scope)
    if len(theirs.get("NSpid", "").split()) > 1:
        return f"it runs in a container: run this in there, or {_AS_ROOT} of the host"
    return (
        "a security module (SELinux, AppArmor) or the container this runs in forbids "
        f"it: run this {_AS_ROOT} of the host"
    )


def _without_capability(
    pid: int, theirs: dict[str, str], ours: dict[str, str]
) -> str | None:
    # Real, effective, saved and for file access, in this order (proc(5)).
    uids, gids = theirs["Uid"].split(), theirs["Gid"].split()
    uid, gid = ours["Uid"].split()[3], ours["Gid"].split()[3]
    if set(uids[:3]) != {uid}:
        return f"it belongs to uid {uids[0]}: run this as that user, or {_AS_ROOT}"
    if set(gids[:3]) != {gid}:
        return f"it belongs to gid {gids[0]}: run this as that group, or {_AS_ROOT}"
    # The files of a process that is not dumpable belong to root (proc(5)).
    if os.stat(f"/proc/{pid}/status").st_uid != int(uids[1]):
        return (
            "it keeps its memory to itself (not dumpable: PR_SET_DUMPABLE, or it "
            f"gained privileges when it was started): run this {_AS_ROOT}"
        )
    if int(theirs["CapPrm"], 16) & ~int(ours["CapEff"], 16):
        return f"it has capabilities that you lack: run this {_AS_ROOT}"
    return None


def only_descendants() -> bool:
    """Say whether Yama lets this process trace its descendants, and nobody else."""
    return yama_scope() == 1 and not _may_trace(status.read(os.getpid()))


def _may_trace(ours: dict[str, str]) -> bool:
    """Say whether a status tells of CAP_SYS_PTRACE."""
    return bool(int(ours["CapEff"], 16) >> CAP_SYS_PTRACE & 1)


def _yama(scope: int) -> str:
    return f"kernel.yama.ptrace_scope is {scope}, which {_YAMA[scope]}"


def yama_scope() -> int:
    """Read how far Yama goes (0 to 3, 0 without it): Yama.rst."""
    with contextlib.suppress(OSError, ValueError):
        return int(YAMA.read_text())
    return 0
