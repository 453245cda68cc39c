"""`sksm merge`: share what running programs hold twice, at once."""

from __future__ import annotations

import click

from sksm.commands import options


@click.command("merge", epilog="Example: sksm merge $(pgrep gunicorn)")
@click.argument("pids", metavar="PID...", nargs=-1, required=True, type=options.PID)
@click.option(
    "--engine",
    type=options.ENGINE,
    default="auto",
    show_default=True,
    help="pool: also where an allocator may count on MADV_DONTNEED for zeros, which "
    "is unsafe. ksm: have ksmd do it, as root, also if it would share with another "
    "user's processes. kernel: by MADV_MERGE, where the kernel has it. auto: kernel, "
    "else pool where it is safe, else ksm.",
)
@click.option(
    "--watch",
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    help="Watch for so long at most which pages are written to, and leave these "
    "alone. 0: do not. [default: 5, and less if few are]",
)
@click.option("--dry-run", is_flag=True, help="Say what would be merged, and do not.")
@options.output_options
def command(
    pids: tuple[int, ...],
    engine: str,
    watch: float | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Share the equal pages of running processes, which need know nothing of it.

    Pages that hold the same bytes come to share one frame; a later write copies. The
    processes go on running, but for stops of a millisecond or two. Only processes of
    the same user share with each other. Pages that are written to while they are
    watched are left alone, since they would not stay merged.

    Of several processes those that cannot be merged are named on stderr.
    """
    from sksm import others  # noqa: PLC0415
    from sksm.reporters import merge as reporter  # noqa: PLC0415
    from sksm.reporters.progress import progress  # noqa: PLC0415

    wishes = others.Wishes(
        watch_seconds=others.WATCH_SECONDS if watch is None else watch,
        engine=engine,
        dry_run=dry_run,
    )
    with progress() as step:
        outcomes = others.merge(list(dict.fromkeys(pids)), wishes, step)
    if engine == "pool":
        reporter.warn(outcomes)
    options.complain(reporter.errors(outcomes), of=len(outcomes))
    if as_json:
        reporter.emit(outcomes, wishes)
    else:
        reporter.show(outcomes, wishes)
