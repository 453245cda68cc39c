"""Finding this user's daemon, or starting it.

Whoever finds none makes the socket itself, and the daemon inherits it already
listening. So there is nothing to wait for or to poll: a client connects at once,
and its request is answered when the daemon is up.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import socket
import struct
import subprocess
import sys
from pathlib import Path
from typing import BinaryIO

import sksm
from sksm.daemon import protocol, runtime
from sksm.errors import DaemonUnreachable, NotPermitted
from sksm.process.domain import Domain

_BACKLOG = 128
_LOG = "sksmd.log"
_FULL_TABLE = (errno.EMFILE, errno.ENFILE)  # ours, which the caller explains
_PATIENCE = struct.pack("@ll", 60, 0)  # struct timeval


def connect(domain: Domain | None = None, *, start: bool = True) -> socket.socket:
    """Connect to the daemon of a domain, and start it if there is none.

    Args:
        domain: as for `runtime.directory`.
        start: whether to start one.

    Raises:
        DaemonUnreachable: none answers, and `start` is false or starting failed.
        NotPermitted: the socket belongs to somebody else.
    """
    path = str(runtime.socket_path(domain))
    connection = _try(path)
    if connection is None and start:
        with runtime.lock(domain):
            if listener := listen(domain):
                with listener:
                    _spawn(listener, domain)
            connection = _try(path)
    if connection is None and start:
        where = runtime.directory(domain) / _LOG
        raise DaemonUnreachable(f"sksmd was started and ended at once: see {where}")
    if connection is None:
        raise DaemonUnreachable("no sksmd runs for this user")
    _, uid = protocol.peer(connection)
    if uid not in (os.getuid(), 0):
        connection.close()
        raise NotPermitted(f"{path} belongs to uid {uid}, not to you: remove it")
    return connection


def log(domain: Domain | None = None) -> BinaryIO:
    """Open what the daemon of a domain writes its messages to."""
    return open(runtime.directory(domain) / _LOG, "ab")


def listen(domain: Domain | None = None) -> socket.socket | None:
    """Make the socket; None if somebody serves it already. Hold the lock."""
    path = runtime.socket_path(domain)
    if (connection := _try(str(path))) is not None:
        connection.close()
        return None
    path.unlink(missing_ok=True)
    listener = _new_socket()
    listener.bind(str(path))
    path.chmod(0o600)
    listener.listen(_BACKLOG)
    return listener


def _new_socket() -> socket.socket:
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def _try(path: str) -> socket.socket | None:
    connection = _new_socket()
    # For connect(2): without room in the backlog it waits no longer than this. A
    # timeout of Python's would make it not wait at all.
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _PATIENCE)
    try:
        connection.connect(path)
    except (FileNotFoundError, ConnectionRefusedError):
        connection.close()
        return None
    except BaseException as error:
        connection.close()
        if isinstance(error, PermissionError):
            theirs = f"{path} belongs to somebody else: remove it"
            raise NotPermitted(theirs) from error
        if isinstance(error, BlockingIOError):
            raise DaemonUnreachable("sksmd does not answer") from error
        raise
    return connection


def _spawn(listener: socket.socket, domain: Domain | None) -> None:
    """Start a daemon that outlives us and is nobody's child.

    It forks once more and its parent leaves at once: a program that waits for
    its children must never meet one it did not start.
    """
    with log(domain) as file:
        try:
            subprocess.run(
                [
                    *_command(),
                    f"--listen-fd={listener.fileno()}",
                    *([f"--domain={domain.name}"] if domain else []),
                    "--detach",
                ],
                pass_fds=[listener.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                cwd="/",
                env=_environment(),
                check=True,
                timeout=30,
            )
        except (OSError, subprocess.SubprocessError) as error:
            with contextlib.suppress(OSError):
                runtime.socket_path(domain).unlink()
            if isinstance(error, OSError) and error.errno in _FULL_TABLE:
                raise
            raise DaemonUnreachable(f"sksmd could not be started: {error}") from error


def _command() -> list[str]:
    if Path(sys.executable or "").name.startswith("python"):
        return [sys.executable, "-m", "sksm.daemon"]
    if found := shutil.which("sksmd"):  # the interpreter is embedded in a program
        return [found]
    raise DaemonUnreachable("sksmd is not on PATH: start it by hand")


def _environment() -> dict[str, str]:
    """Make the package importable there as it is here; keep numpy to one thread."""
    root = str(Path(sksm.__file__).parent.parent)
    inherited = os.environ.get("PYTHONPATH")
    path = os.pathsep.join([root, inherited] if inherited else [root])
    return {**os.environ, "PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1"}
