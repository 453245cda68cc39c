"""`sksm estimate`: what merging would save, without touching anything."""

from __future__ import annotations

import click

from sksm.commands import options


@click.command("estimate", epilog="Example: sksm estimate --watch 10 $(pgrep gunicorn)")
@click.argument("pids", metavar="PID...", nargs=-1, required=True, type=options.PID)
@click.option(
    "--watch",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help="Look again several times, to leave out pages that are written to.",
)
@options.output_options
def command(pids: tuple[int, ...], watch: float | None, as_json: bool) -> None:
    """Show what merging the memory of running processes would save.

    Compares their private pages with each other. Reads only: nothing is stopped or
    changed. Pages that share a frame already, as after a fork, do not count.

    A page that is written to does not stay merged. --watch finds such pages by their
    bytes, so it misses what is written and written back between two looks, such as
    Python's reference counts. It takes half of one core at most meanwhile.

    Of several processes those that cannot be looked at are named on stderr.
    """
    from sksm.commands import outlook  # noqa: PLC0415
    from sksm.reporters import estimate as reporter  # noqa: PLC0415
    from sksm.reporters.progress import progress  # noqa: PLC0415

    with progress() as step:
        found = outlook.survey(list(dict.fromkeys(pids)), watch, step)
    errors = [failure.error for failure in found.failures]
    options.complain(errors, of=len(errors) + len(found.processes))
    if as_json:
        reporter.emit(found, watch)
    else:
        reporter.show(found)
