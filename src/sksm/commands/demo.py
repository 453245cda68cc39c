"""`sksm demo`: the main job on real data, with proof."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sksm.commands import options

if TYPE_CHECKING:
    from sksm.commands.demonstration.run import Plan

PRIVATE_BYTES = 16 << 20


@click.command("demo", epilog="Example: sksm demo --workers 3 --data /usr/bin/python3")
@click.option(
    "--workers",
    type=click.IntRange(2, 64),
    default=5,
    show_default=True,
    help="How many processes load the data.",
)
@click.option(
    "--data",
    type=click.Path(exists=True, dir_okay=False, readable=True, path_type=Path),
    help="A file to load, instead of the model that `make demo` installs.",
)
@click.option(
    "--ksmd/--no-ksmd",
    default=True,
    help="As root, measure the kernel's ksmd beside it (its settings are restored).",
)
@options.output_options
@click.pass_context
def command(
    context: click.Context, workers: int, data: Path | None, ksmd: bool, as_json: bool
) -> None:
    """Merge real data between processes on this machine, and prove the saving.

    Separately started programs each load the same model into their own memory and
    merge it. The kernel's figures before and after show what it saved, checksums
    that no byte changed. It takes some seconds, uses a daemon of its own, and
    leaves nothing behind.
    """
    from sksm.commands.demonstration import run  # noqa: PLC0415
    from sksm.reporters import demo, json  # noqa: PLC0415

    plan = _plan(workers, data, ksmd)
    if not as_json:
        demo.open_with(plan)
    with _ended_by_sigterm(), demo.progress(plan.steps) as tell:
        result = run.run(plan, tell)
    if as_json:
        json.emit(
            "demo",
            holds=result.holds,
            saved_bytes=result.saved_bytes,
            total_before_bytes=result.before.total_bytes,
            total_after_bytes=result.after.total_bytes,
            **vars(result),
        )
    else:
        demo.show(result)
    context.exit(options.DONE if result.holds else options.FAILED)


def _plan(workers: int, path: Path | None, with_ksmd: bool) -> Plan:
    import psutil  # noqa: PLC0415

    from sksm.commands.demonstration import data, run  # noqa: PLC0415

    path = (path or data.find()).absolute()
    needed = (path.stat().st_size + PRIVATE_BYTES) * (workers + 1)
    data.check(path, needed, psutil.virtual_memory().available)
    return run.Plan(path, workers, PRIVATE_BYTES, with_ksmd)


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Make SIGTERM end the block like an exception, so that workers end, too."""
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
