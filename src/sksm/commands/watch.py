"""`sksm watch`: merge what stays unwritten in running programs, as long as it runs."""

from __future__ import annotations

import click

from sksm.commands import options


@click.command("watch", epilog="Example: sksm watch --qemu --name 'gunicorn*'")
@click.option(
    "--pid",
    "pids",
    type=options.PID,
    multiple=True,
    help="This process, and all that it starts.",
)
@click.option(
    "--name",
    "names",
    multiple=True,
    metavar="GLOB",
    help="Processes of that name (/proc/PID/comm).",
)
@click.option("--uid", "uids", type=int, multiple=True, help="Processes of that user.")
@click.option(
    "--cgroup", "cgroups", multiple=True, help="Processes of that control group."
)
@click.option("--unit", "units", multiple=True, help="Processes of that systemd unit.")
@click.option(
    "--qemu",
    is_flag=True,
    help="Virtual machines: all QEMU processes, and of them the guest's memory only.",
)
@click.option(
    "--cpu",
    "cpu_percent",
    type=click.FloatRange(0, 100, min_open=True),
    metavar="PERCENT",
    help="Of one processor, on the average of ten minutes.  [default: 2]",
)
@click.option(
    "--quiet-for",
    "quiet_seconds",
    type=click.FloatRange(min=1, max=250),
    metavar="SECONDS",
    help="How long a page must stay unwritten.  [default: 2]",
)
@click.option(
    "--engine",
    type=options.ENGINE,
    help="As for sksm merge; auto: memory that its owner marked for KSM, as QEMU does "
    "its guests', goes to ksm where that is possible.  [default: auto]",
)
@options.output_options
def command(as_json: bool, **given: object) -> int:
    """Merge what running programs hold twice, as it comes to rest.

    Pages that stay unwritten for a while, and have an equal one in another watched
    program of the same user, come to share a frame. A page that is written to
    afterwards is left alone for longer each time. Nothing else changes for the
    programs; when this ends, what is merged stays merged.

    Without anything to watch it does what the configuration says. With --json it
    prints one object an epoch, a line each.
    """
    from sksm.scanner import config, service  # noqa: PLC0415

    chosen = service.chosen(config.load(), given)
    if as_json:
        from sksm.reporters.epochs import lines as reporter  # noqa: PLC0415
    else:
        from sksm.reporters.watch import live as reporter  # noqa: PLC0415
    with reporter() as tell:
        return options.ended_by(service.run(chosen, tell))
