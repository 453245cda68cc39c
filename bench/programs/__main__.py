"""Run it with `python -m bench.programs` or `make bench-programs`."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import click

from bench import run
from bench.programs import CREWS, measure, report
from bench.programs.measure import Options
from sksm.reporters import tables


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("crews", nargs=-1, type=click.Choice(list(CREWS)))
@click.option(
    "--seconds",
    type=click.IntRange(0),
    default=60,
    show_default=True,
    help="How long to watch the programs after the merge.",
)
@click.option(
    "--engine",
    metavar="ENGINE",
    help="As `sksm merge --engine`; without, the command chooses.",
)
@click.option(
    "--json",
    "target",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    metavar="FILE",
    help="Write all figures to FILE, too.",
)
def main(
    crews: tuple[str, ...], seconds: int, engine: str | None, target: Path | None
) -> None:
    """Merge real programs from outside, and read from the kernel what it saved.

    No figure makes this fail: it fails if a program ended or answered wrong.
    """
    looks = tuple(float(look) for look in sorted({0, 10, seconds}) if look <= seconds)
    options = Options(after_seconds=looks, engine=engine)
    progress, console = tables.err(), tables.out()
    started = time.perf_counter()
    outcomes = []
    with run.terminated_like_interrupted():
        for name in crews or CREWS:
            with progress.status(CREWS[name]) as status:

                def tell(what: str, title: str = CREWS[name]) -> None:
                    status.update(f"{title}: {what}")

                outcomes.append(measure.measure(name, options, tell))
            console.print(report.table(outcomes[-1]))
            for remark in report.remarks(outcomes[-1]):
                console.print(remark, markup=False, highlight=False, soft_wrap=True)
            console.print()
    if target:
        found = report.as_dict(outcomes, options, time.perf_counter() - started)
        target.write_text(json.dumps(found, indent=2) + "\n")
    sys.exit(any(outcome.failed for outcome in outcomes))


if __name__ == "__main__":
    main()
