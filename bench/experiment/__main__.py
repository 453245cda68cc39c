"""Run it with `python -m bench.experiment` or `make experiment`."""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
from pathlib import Path

import click
from rich.table import Table

from bench import daemon, run
from bench.experiment import cases
from bench.experiment.cases import Case
from bench.results import Wrong
from sksm.linux import ksm
from sksm.reporters import tables

_MIB = 1 << 20


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("names", nargs=-1, type=click.Choice(cases.CASES), metavar="[CASE]...")
@click.option("--processes", type=click.IntRange(2), default=1000, show_default=True)
@click.option("--plot", type=click.Path(path_type=Path), help="Draw it, as PNG.")
@click.option("--json", "target", type=click.Path(path_type=Path))
def main(
    names: tuple[str, ...], processes: int, plot: Path | None, target: Path | None
) -> None:
    """Start processes of `sleep`: plain, with libc's code patched, and merged again.

    Beside them, patched ones that ksmd merges: wide open, and with its defaults.
    """
    progress, console = tables.err(), tables.out()
    chosen = names or cases.CASES
    found: list[Case] = []
    with (
        run.terminated_like_interrupted(),
        tempfile.TemporaryDirectory(prefix="sksm-experiment-") as folder,
        progress.status("") as status,
    ):
        try:
            library = cases.compiled(Path(folder))
            for name in chosen:
                if name in (cases.KSMD, cases.KSM) and (reason := ksm.obstacle()):
                    console.print(f"{name} is left out: {reason}")
                    continue
                with daemon.own():
                    case = cases.measure(name, library, processes, status.update)
                found.append(case)
        except Wrong as error:
            if found:  # it may have taken long
                console.print(_table(found, processes))
            sys.exit(f"experiment: {error}")
    console.print(_table(found, processes))
    if target:
        told = [dataclasses.asdict(case) for case in found]
        target.write_text(json.dumps({"processes": processes, "cases": told}) + "\n")
    if plot:
        from bench.experiment import plotting  # noqa: PLC0415

        plotting.draw(found, processes, plot)


def _table(found: list[Case], processes: int) -> Table:
    table = tables.ruled(
        "case",
        ">nr_anon_pages",
        ">MiB in all",
        ">recovered",
        ">time, s",
        ">ksmd, CPU s",
        title=f"{processes} processes",
    )
    by_name = {case.name: case for case in found}
    for case in found:
        table.add_row(
            case.name,
            f"{case.last.anonymous_pages:,}",
            f"{case.last.honest_bytes / _MIB:,.1f}",
            _recovered(case, by_name),
            f"{case.last.seconds:.1f}",
            f"{case.cpu_seconds:.1f}" if case.cpu_seconds else "",
        )
    return table


def _recovered(case: Case, by_name: dict[str, Case]) -> str:
    if not {cases.PLAIN, cases.PATCHED} <= by_name.keys() or case.name in (
        cases.PLAIN,
        cases.PATCHED,
    ):
        return ""
    plain, patched = by_name[cases.PLAIN].last, by_name[cases.PATCHED].last
    cost = patched.honest_bytes - plain.honest_bytes
    return f"{(patched.honest_bytes - case.last.honest_bytes) / cost:.1%}"


if __name__ == "__main__":
    main()
