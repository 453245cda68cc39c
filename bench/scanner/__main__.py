"""Run it with `python -m bench.scanner` or `make bench-scanner`."""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import click
import msgspec

from bench import run
from bench.report import machine
from bench.results import SCHEMA, Skipped
from bench.scanner import (
    churn,
    interpreters,
    outcome,
    pair_report,
    pairs,
    report,
    scanners,
    watching,
    work,
)
from bench.scanner import guests as machines
from bench.scanner.guests import Case
from sksm.reporters import tables

_File = click.Path(dir_okay=False, path_type=Path)


class _Seconds(click.ParamType[tuple[float, ...]]):
    """Numbers of seconds, with commas between them."""

    name = "S,S,S"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[float, ...]:
        """Take them apart."""
        try:
            return tuple(map(float, value.split(",")))
        except ValueError:
            self.fail(f"{value} is not a list of numbers", param, ctx)


def common(every: float) -> Callable[[Any], Any]:
    """Give a command the options that all have."""
    options = [
        click.option("--every", default=every, show_default=True, metavar="SECONDS"),
        click.option(
            "--by",
            default=outcome.BY[0],
            show_default=True,
            type=click.Choice(outcome.BY),
            help="Whose memory the plot, and for guests the times, go by.",
        ),
        click.option("--watch-command", default="", help="In place of `sksm watch`."),
        click.option("--cpu", type=float, help="As `sksm watch --cpu`."),
        click.option("--json", "target", type=_File, help="Write all figures, too."),
        click.option("--plot", type=_File, help="Draw it, as PNG."),
    ]

    def add(function: Any) -> Any:
        for option in reversed(options):
            function = option(function)
        return function

    return add


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Compare `sksm watch` with ksmd and with nobody."""


@main.command()
@click.argument(
    "names", nargs=-1, type=click.Choice(scanners.CASES), metavar="[CASE]..."
)
@click.option("--guests", default=3, show_default=True, type=click.IntRange(1))
@click.option(
    "--idle",
    type=_Seconds(),
    default="20,30,60",
    show_default=True,
    help="Seconds of rest after the boot, and after each work.",
)
@click.option("--archive-mib", default=28, show_default=True, type=click.IntRange(1))
@click.option("--rounds", default=100_000, show_default=True, help="Of computing.")
@click.option("--against", type=_File, help="Take other cases from an earlier --json.")
@common(every=0.5)
def guests(names: tuple[str, ...], by: str, against: Path | None, **given: Any) -> None:
    """Boot guests, have them work and rest: under one scanner after another.

    Without `nothing`, measured here or before, there is nothing to compare with.
    """
    options = machines.Options(
        guests=given["guests"],
        idle_seconds=given["idle"],
        every_seconds=given["every"],
        archive_bytes=given["archive_mib"] << 20,
        rounds=given["rounds"],
        watch=watching.Options(given["watch_command"], given["cpu"]),
    )
    started = time.monotonic()
    earlier = _earlier(against, names, options)
    cases = [*earlier, *_measured(names or scanners.CASES, options)]
    cases.sort(key=lambda case: scanners.CASES.index(case.name))
    found = outcome.outcomes(cases, by)
    console = tables.out()
    console.print(report.table(cases, found, by))
    for remark in report.remarks(cases, found):
        console.print(remark, markup=False, highlight=False, soft_wrap=True)
    if given["target"]:
        figures = {"cases": cases, "outcomes": found}
        _write(given["target"], options, started, figures)
    if given["plot"]:
        from bench.scanner import pictures  # noqa: PLC0415

        pictures.draw_guests(cases, by, given["plot"])
    sys.exit(any(case.failed for case in cases))


@main.command("churn")
@click.option("--size-mib", default=256, show_default=True, type=click.IntRange(1))
@click.option("--quiet", default=6.0, show_default=True, metavar="SECONDS")
@click.option("--seconds", default=60.0, show_default=True)
@common(every=0.2)
def churned(size_mib: int, quiet: float, **given: Any) -> None:
    """Have a program write all of its pages as soon as they look quiet."""
    options = churn.Options(
        size_bytes=size_mib << 20,
        quiet_seconds=quiet,
        seconds=given["seconds"],
        every_seconds=given["every"],
        watch=watching.Options(given["watch_command"], given["cpu"]),
    )
    _pair("all pages written again and again", churn.started, options, given)


@main.command("interpreters")
@click.option("--workers", default=8, show_default=True, type=click.IntRange(1))
@click.option("--clients", default=4, show_default=True, type=click.IntRange(1))
@click.option("--seconds", default=300.0, show_default=True)
@common(every=5.0)
def served(workers: int, clients: int, **given: Any) -> None:
    """Have forked workers of a web server answer requests."""
    options = interpreters.Options(
        workers=workers,
        clients=clients,
        seconds=given["seconds"],
        every_seconds=given["every"],
        watch=watching.Options(given["watch_command"], given["cpu"]),
    )
    title = f"{workers} workers of gunicorn"
    _pair(title, interpreters.started, options, given)


def _pair(title: str, started: Any, options: Any, given: dict[str, Any]) -> None:
    begun = time.monotonic()
    with run.terminated_like_interrupted(), tables.err().status("") as status:
        start = functools.partial(started, options)
        every, watch = options.every_seconds, options.watch
        runs = pairs.measure(start, every, watch, status.update)
    found = pair_report.effects(runs)
    console = tables.out()
    console.print(pair_report.table(title, found))
    for remark in pair_report.remarks(runs):
        console.print(remark, markup=False, highlight=False, soft_wrap=True)
    if given["target"]:
        _write(given["target"], options, begun, {"runs": runs, "effects": found})
    if given["plot"]:
        from bench.scanner import pictures  # noqa: PLC0415

        pictures.draw_pair(title, runs, given["by"], given["plot"])
    sys.exit(any(one.failed for one in runs))


def _measured(names: tuple[str, ...], options: machines.Options) -> list[Case]:
    found = []
    progress = tables.err()
    with run.terminated_like_interrupted(), progress.status("") as status:
        try:
            status.update("an image for the guests")
            with work.image(options.archive_bytes) as image:
                for name in names:

                    def tell(what: str, name: str = name) -> None:
                        status.update(f"{name}: {what}")

                    found.append(machines.measure(name, image, options, tell))
        except Skipped as reason:
            sys.exit(f"guests: {reason}")
        finally:
            scanners.sweep()
    return found


def _earlier(
    file: Path | None, names: tuple[str, ...], options: machines.Options
) -> list[Case]:
    """Read the cases that shall not be measured again."""
    if file is None:
        return []
    read = json.loads(file.read_text())
    before = msgspec.convert(read["options"], machines.Options)
    if msgspec.structs.replace(before, watch=options.watch) != options:
        sys.exit(f"guests: {file} was measured with other options")
    cases = msgspec.convert(read["cases"], list[Case])
    return [case for case in cases if case.name not in names]


def _write(target: Path, options: Any, started: float, found: dict[str, Any]) -> None:
    head = {
        "schema": SCHEMA,
        "sksm": metadata.version("sksm"),
        "machine": machine(),
        "options": options,
        "seconds": time.monotonic() - started,
    }
    text = msgspec.json.encode({**head, **found})
    target.write_bytes(msgspec.json.format(text, indent=1) + b"\n")


if __name__ == "__main__":
    main()
