"""`sksm unmerge`: give running programs private memory again."""

from __future__ import annotations

import click

from sksm.commands import options


@click.command("unmerge", epilog="Example: sksm unmerge $(pgrep gunicorn)")
@click.argument("pids", metavar="PID...", nargs=-1, required=True, type=options.PID)
@options.output_options
def command(pids: tuple[int, ...], as_json: bool) -> None:
    """Give running processes memory of their own in the place of what they share.

    Everything that sksm or KSM merged in them takes memory again, so it has to be
    there: if less is available than would be needed, nothing is done.
    """
    from sksm import unmerging  # noqa: PLC0415
    from sksm.reporters import merge as reporter  # noqa: PLC0415
    from sksm.reporters.progress import progress  # noqa: PLC0415

    with progress() as step:
        outcomes = unmerging.unmerge(list(dict.fromkeys(pids)), step)
    options.complain(reporter.errors(outcomes), of=len(outcomes))
    if as_json:
        reporter.emit_unmerged(outcomes)
    else:
        reporter.show_unmerged(outcomes)
