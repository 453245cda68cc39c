"""Where the daemon of this user is found: socket, lock, log."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from sksm.errors import NotPermitted, SksmError
from sksm.process.domain import Domain, parse

OVERRIDE = "SKSM_RUNTIME_DIR"
_OTHERS = "domain-"  # begins the names of directories for what is not ours
_LONGEST = 107  # unix(7): sun_path, less the zero at its end


def directory(domain: Domain | None = None) -> Path:
    """Give the runtime directory of this user, made if need be.

    `$SKSM_RUNTIME_DIR`, or `sksm` in `$XDG_RUNTIME_DIR` or `/run/user/<uid>`
    (root: `/run`); where there is none, `/tmp/sksm-<uid>`.

    Args:
        domain: whose memory is at stake, if not that of this user's own programs.
            What root does for others has a directory of its own inside.

    Raises:
        NotPermitted: it belongs to somebody else, others may write to it, or it
            cannot be made.
    """
    uid = os.getuid()
    path = _choose(uid)
    if domain and not domain.ours:
        path = directory() / f"{_OTHERS}{domain.name}"
    try:
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)
        found = path.lstat()
    except OSError as error:
        hint = f"Name another directory in {OVERRIDE}."
        raise NotPermitted(f"{path}: {error.strerror}. {hint}") from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != uid or found.st_mode & 0o022:
        raise NotPermitted(
            f"{path} is not a directory that only you can write to. Remove it, or "
            f"name another one in {OVERRIDE}."
        )
    return path


def others() -> list[Domain]:
    """List the domains that had a daemon of ours for programs that are not ours."""
    names = (path.name for path in directory().glob(f"{_OTHERS}*"))
    return [parse(name.removeprefix(_OTHERS)) for name in names]


def _choose(uid: int) -> Path:
    if named := os.environ.get(OVERRIDE):
        return Path(named)
    bases = [os.environ.get("XDG_RUNTIME_DIR"), f"/run/user/{uid}"]
    if uid == 0:
        bases = ["/run"]
    for base in bases:
        if base and os.access(base, os.W_OK) and os.stat(base).st_uid == uid:
            return Path(base) / "sksm"
    return Path(f"/tmp/sksm-{uid}")


def socket_path(domain: Domain | None = None) -> Path:
    """Give the path of the daemon's socket.

    Raises:
        NotPermitted: as `directory`.
        SksmError: it is too long for an address.
    """
    path = directory(domain) / "sksmd.sock"
    if len(os.fsencode(path)) > _LONGEST:
        raise SksmError(f"{path} is too long for a socket: set {OVERRIDE}")
    return path


@contextlib.contextmanager
def lock(domain: Domain | None = None, *, wait: bool = True) -> Iterator[None]:
    """Be the only one who starts or ends the daemon of a domain.

    Raises:
        BlockingIOError: somebody else is at it, and `wait` is false.
    """
    fd = os.open(
        directory(domain) / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600
    )
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        try:
            yield
        finally:
            # Closing is not enough: a child forked meanwhile holds it open, too.
            fcntl.flock(fd, fcntl.LOCK_UN)
    finally:
        os.close(fd)


class Door:
    """The path of our socket, as long as it is ours."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._inode = os.stat(path).st_ino

    def remove(self) -> None:
        """Take it away, unless somebody has put another in its place."""
        with contextlib.suppress(OSError):
            if os.stat(self._path).st_ino == self._inode:
                self._path.unlink()

    def hide(self) -> None:
        """Have it nowhere to be found, until `show`. Hold the lock.

        Raises:
            OSError: it is not there any more, or not ours.
        """
        if os.stat(self._path).st_ino != self._inode:
            raise FileNotFoundError(errno.ENOENT, "another took its place")
        self._path = self._path.rename(self._path.with_suffix(".leaving"))

    def show(self) -> None:
        """Undo `hide`."""
        self._path = self._path.rename(self._path.with_suffix(".sock"))
