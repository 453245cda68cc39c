"""A store that runs as a daemon. Clients start it by themselves."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from sksm.process.domain import Domain


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--listen-fd",
    type=int,
    help="Serve this listening SOCK_SEQPACKET socket instead of making one.",
)
@click.option("--detach", is_flag=True, help="Go to the background at once.")
@click.option(
    "--idle",
    type=float,
    default=5.0,
    show_default=True,
    envvar="SKSM_IDLE_SECONDS",
    show_envvar=True,
    help="Leave after this many seconds without clients and shared pages.",
)
@click.option(
    "--domain",
    metavar="UID",
    help="Whose memory to hold, if not this user's: a user id, or one with "
    "'-guarded' behind it for programs whose memory the kernel keeps from their user.",
)
@click.version_option(package_name="sksm")
def main(listen_fd: int | None, detach: bool, idle: float, domain: str | None) -> None:
    """Own the pool of this user's shared pages, and take in new ones.

    The first `sksm.merge()` of a user starts it, and it leaves when nobody uses
    it any more, so there is seldom a reason to run it by hand.
    """
    if detach and os.fork():
        os._exit(0)
    if detach:  # as a program starts it
        os.setsid()
        shed_bonds()
    shed_inheritance()
    from sksm.process.domain import Domain, parse  # noqa: PLC0415

    try:
        whose = parse(domain) if domain else Domain(os.getuid())
    except ValueError:
        raise click.UsageError(f"{domain} is not a user id") from None
    listener, path = _listener(listen_fd, whose)
    from sksm.daemon.server import Server  # noqa: PLC0415  after the fork: numpy

    task = Server(listener, idle, path, whose).run()
    del listener
    if task:
        from sksm.daemon import supervisor  # noqa: PLC0415

        supervisor.supervise(task.listener, task.known_filters)


def is_activated() -> bool:
    """Say whether systemd has a socket for us: sd_listen_fds(3)."""
    return os.environ.get("LISTEN_PID") == str(os.getpid())


def shed_inheritance() -> None:
    """Handle signals, and have as many descriptors as we may."""
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


_LIMITS = ("FSIZE", "AS", "DATA", "CPU", "MEMLOCK", "STACK", "CORE")


def shed_bonds() -> None:
    """Undo what the program that happened to come first imposed on itself.

    As far as that goes: an ordinary user may raise a soft limit to the hard one, but
    not lower a nice value, and control groups remain.
    """
    for name in _LIMITS:
        which = getattr(resource, f"RLIMIT_{name}")
        _, most = resource.getrlimit(which)
        resource.setrlimit(which, (most, most))
    os.umask(0o077)
    for attempt in (
        lambda: os.setpriority(os.PRIO_PROCESS, 0, 0),
        lambda: os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0)),
        lambda: os.sched_setaffinity(0, range(os.cpu_count() or 1)),
        lambda: Path("/proc/self/oom_score_adj").write_text("0"),
        lambda: os.setgroups([]),
    ):
        with contextlib.suppress(OSError):
            attempt()


def _listener(fd: int | None, domain: Domain) -> tuple[socket.socket, Path | None]:
    """Give the socket to serve, and its path if it is ours to remove."""
    if fd is None and is_activated():
        return socket.socket(fileno=3), None  # systemd's first
    if fd is not None:
        listener = socket.socket(fileno=fd)
        return listener, Path(listener.getsockname())
    from sksm.daemon.launch import listen  # noqa: PLC0415
    from sksm.daemon.runtime import lock  # noqa: PLC0415

    with lock(domain):
        made = listen(domain)
    if made is None:
        sys.exit("sksmd: another daemon serves this user already")
    return made, Path(made.getsockname())


if __name__ == "__main__":
    main()
