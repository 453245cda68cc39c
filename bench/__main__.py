"""Run the benchmark with `python -m bench` or `make bench`."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import click

from bench import report, run
from bench.results import Options
from bench.rows import ROWS
from sksm.reporters import tables

_SMALLEST_MIB = 8


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--rounds",
    type=click.IntRange(1),
    default=5,
    show_default=True,
    help="How often to measure each thing, floor and ours in turns.",
)
@click.option(
    "--size",
    type=click.IntRange(_SMALLEST_MIB),
    default=512,
    show_default=True,
    metavar="MIB",
    help="How much memory to merge.",
)
@click.option(
    "--only",
    type=click.Choice(list(ROWS)),
    multiple=True,
    help="Measure this row; may be given more than once.",
)
@click.option(
    "--json",
    "target",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    metavar="FILE",
    help="Write all figures to FILE, too.",
)
@click.option("--no-ksmd", is_flag=True, help="Leave the kernel's KSM alone.")
def main(
    rounds: int, size: int, only: tuple[str, ...], target: Path | None, no_ksmd: bool
) -> None:
    """Measure sksm beside its floor and its peers, on this machine, in one run.

    Ratios are what counts, and no time or ratio makes this fail. It fails if
    pages that should have merged did not.
    """
    options = Options(rounds=rounds, size_bytes=size << 20, ksmd=not no_ksmd)
    progress = tables.err()
    started = time.perf_counter()
    rows = []
    with run.terminated_like_interrupted():
        for name in only or ROWS:
            with progress.status(f"Measuring: {ROWS[name]}"):
                rows.append(run.measure(name, options))
    console = tables.out()
    console.print(report.table(rows, options))
    for remark in report.remarks(rows):
        console.print(remark, markup=False, highlight=False)
    if target:
        results = report.as_dict(rows, options, time.perf_counter() - started)
        target.write_text(json.dumps(results, indent=2) + "\n")
    sys.exit(any(row.failed for row in rows))


if __name__ == "__main__":
    main()
