"""`sksmd`: run the daemon. Clients start it by themselves; `--help` says more."""

from __future__ import annotations

import os
import socket
import sys

import click


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
    help="Leave after this many seconds without clients and shared pages.",
)
@click.version_option(package_name="sksm")
def main(listen_fd: int | None, detach: bool, idle: float) -> None:
    """Own the pool of this user's shared pages, and take in new ones.

    The first `sksm.merge()` of a user starts it, and it leaves when nobody uses
    it any more, so there is seldom a reason to run it by hand.
    """
    if detach and os.fork():
        os._exit(0)
    if detach:
        os.setsid()
    listener = _listener(listen_fd)
    from sksm.daemon.server import Server  # noqa: PLC0415  after the fork: numpy

    Server(listener, idle).run()


def _listener(fd: int | None) -> socket.socket:
    if fd is None and os.environ.get("LISTEN_PID") == str(os.getpid()):
        fd = 3  # sd_listen_fds(3): systemd's first socket
    if fd is not None:
        return socket.socket(fileno=fd)
    from sksm.daemon.launch import listen  # noqa: PLC0415
    from sksm.daemon.runtime import lock  # noqa: PLC0415

    with lock():
        listener = listen()
    if listener is None:
        sys.exit("sksmd: another daemon serves this user already")
    return listener


if __name__ == "__main__":
    main()
