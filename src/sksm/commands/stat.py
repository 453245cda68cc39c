"""`sksm stat`: what is shared now, and what it costs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from sksm.commands import options

if TYPE_CHECKING:
    from sksm.daemon.protocol import Status


@click.command("stat", epilog="Example: sksm stat")
@options.output_options
def command(as_json: bool) -> None:
    """Show what is shared now, what it costs, and what remains.

    The figures come from the kernel: the mappings of every process that you may
    look at. Of KSM it shows the kernel's own count beside it. Starts nothing.
    """
    from sksm.commands import sharing  # noqa: PLC0415
    from sksm.linux import ksm  # noqa: PLC0415

    status = _ask_daemon()
    found = sharing.survey(status.pid if status else None)
    if as_json:
        from sksm.reporters import json  # noqa: PLC0415

        json.emit(
            "stat",
            saved_bytes=found.saved_bytes,
            shared_bytes=found.shared_bytes,
            mapping_bytes=found.mapping_bytes,
            vma_bytes=found.vma_bytes,
            vma_measured=found.vma_measured,
            pools=found.pools,
            unreadable_processes=found.unreadable_processes,
            daemon=status and _described(status),
            ksm={
                **ksm.figures(),
                "saved_bytes": found.ksm_saved_bytes,
                "processes": found.ksm_sharers,
            },
        )
    else:
        from sksm.reporters import stat  # noqa: PLC0415

        stat.show(found, status, ksm.figures())


def _ask_daemon() -> Status | None:
    from sksm.daemon import launch  # noqa: PLC0415
    from sksm.daemon.client import RemoteStore  # noqa: PLC0415
    from sksm.errors import DaemonUnreachable  # noqa: PLC0415

    try:
        launch.connect(start=False).close()
    except DaemonUnreachable:
        return None
    store = RemoteStore(start=False)  # one that is there must answer
    try:
        return store.status()
    finally:
        store.close()


def _described(status: Status) -> dict[str, object]:
    return {
        "pid": status.pid,
        "clients": status.clients - 1,  # without us
        "slots": status.slots,
        "reclaimed_slots": status.reclaimed,
        "pool_bytes": status.pool_bytes,
        "index_bytes": status.index_bytes,
        "own_bytes": status.own_bytes,
        "grants": status.grants,
        "held_back": status.held_back,
        "age_seconds": status.seconds,
    }
