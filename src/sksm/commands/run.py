"""`sksm run`: start a program that may merge its memory, or has it merged."""

from __future__ import annotations

import os
import subprocess
import sys

import click

from sksm.commands import options
from sksm.errors import NotPermitted, Unsupported


@click.command(
    "run",
    epilog="Example: sksm run -- ./program --its-option",
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
@click.argument("cmd", metavar="CMD [ARG]...", nargs=-1, required=True, type=str)
@click.option(
    "--ksm",
    "by_ksm",
    is_flag=True,
    help="Instead, have KSM merge all memory of CMD and of what it starts, whenever "
    "ksmd runs (prctl PR_SET_MEMORY_MERGE). KSM knows no users: equal pages are shared "
    "with all that it merges.",
)
@options.debug_option
def command(cmd: tuple[str, ...], by_ksm: bool) -> None:
    """Start CMD, and give it MADV_MERGE: madvise(addr, length, 26), at once.

    It works for CMD and for everything that it starts, in any language; nothing else
    that they do is touched. Set-user-id programs among them get no privileges
    (no_new_privs). CMD takes the place of this command, or runs below it where the
    kernel lets only ancestors trace (kernel.yama.ptrace_scope 1, not root). The exit
    status is CMD's, 126 if it cannot be executed, 127 if there is no such program.
    """
    from sksm import ancestry, running  # noqa: PLC0415
    from sksm.process import permission  # noqa: PLC0415

    if by_ksm:
        _set_memory_merge()
        running.execute(cmd)
    if running.answered():
        running.execute(cmd)
    for limit in running.limits():
        click.echo(f"sksm: {limit}", err=True)
    if permission.only_descendants():
        ancestry.run(cmd)
    running.let_merge()
    running.execute(cmd)


def _set_memory_merge() -> None:
    """Have KSM look at all memory of this process, and of its children.

    Raises:
        NotPermitted, Unsupported: it does not, or not of what is executed.
    """
    from sksm.linux import ksm, libc  # noqa: PLC0415

    try:
        libc.prctl(libc.PR_SET_MEMORY_MERGE, 1, 0, 0, 0)
    except PermissionError as error:
        raise NotPermitted(
            "only who has CAP_SYS_RESOURCE may have all memory merged: run this as root"
        ) from error
    except OSError as error:
        raise Unsupported(
            f"the kernel cannot merge all memory of a process: {error.strerror} "
            "(CONFIG_KSM, Linux 6.4)"
        ) from error
    # Another program is asked, since that is what is to be known, and not ksm_stat,
    # which tells it since Linux 6.15 only.
    number = libc.PR_GET_MEMORY_MERGE
    has_it = f"import ctypes; exit(ctypes.CDLL(None).prctl({number}, 0, 0, 0, 0) != 1)"
    if subprocess.run([sys.executable, "-Ic", has_it], check=False).returncode:
        raise Unsupported(
            "this kernel forgets it when a program is executed (Linux 6.7 does not)"
        )
    if ksm.figures().get("run") != 1:
        click.echo(
            f"sksm: ksmd is off, so nothing is merged yet: `sksm merge --engine ksm "
            f"{os.getpid()}` merges once, `echo 1 > {ksm.FOLDER}/run` goes on",
            err=True,
        )
