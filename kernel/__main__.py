"""Build the kernel and test it: `python -m kernel`, or `make kernel-test`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import click
from rich.table import Table

from bench.programs.debian import Packages, packages
from bench.results import Skipped, Wrong
from kernel import building, checks, guest
from kernel.building import Built, Kernel
from kernel.checks import Verdict
from sksm.reporters import tables

CACHE = Path(__file__).parent.parent / "build" / "kernel"
_WATCHED = ("small", "checks", "locking")
PATCHED = Kernel("patched", True, _WATCHED)
UNPATCHED = Kernel("unpatched", False, _WATCHED)
KASAN = Kernel("patched-kasan", True, ("small", "checks", "kasan"))
PLAIN = Kernel("patched-plain", True, ("small",))  # as fast as it is
KERNELS = {kernel.name: kernel for kernel in (PATCHED, UNPATCHED, KASAN)}
_SECONDS = 2400.0  # for all that one guest does
_MEASURING_SECONDS, _MEASURING_MIB = 3600.0, 6144  # a thousand processes, four times

console = tables.out()
Results = dict[str, dict[str, Verdict]]  # by kernel, by command


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--only",
    "names",
    type=click.Choice(list(KERNELS)),
    multiple=True,
    help="Build and test this kernel; may be given more than once.",
)
@click.option(
    "--measure",
    is_flag=True,
    help="Do not test: measure, on a kernel without checks.",
)
@click.option("--verbose", is_flag=True, help="Show all that the guests said.")
def main(names: Sequence[str], measure: bool, verbose: bool) -> None:
    """Build Linux with the patches, boot it under QEMU, and test it.

    It fails if a test fails or skips, or if the kernel's log has a warning. KSM's own
    self-tests may fail if they do without the patches, where that was built, too.
    """
    if reason := building.missing():
        sys.exit(f"kernel-test: {reason}")
    results: Results = {}
    problems: list[str] = []
    try:
        with packages("qemu-system-x86", alone=[building.SOURCE]) as found:
            if measure:
                _measure(found)
                return
            for name in names or KERNELS:
                _test(KERNELS[name], found, results, problems, verbose)
    except (Skipped, Wrong) as error:
        sys.exit(f"kernel-test: {error}")
    problems += upstream_problems(results)
    console.print(_table(results))
    for problem in problems:
        console.print(problem, markup=False)
    sys.exit(1 if problems else 0)


def _test(
    kernel: Kernel,
    found: Packages,
    results: Results,
    problems: list[str],
    verbose: bool,
) -> None:
    """Build a kernel and visit it; adds what it did, and what is wrong with that."""
    with console.status("") as status:

        def tell(what: str) -> None:
            status.update(f"{kernel.name}: {what}")

        built = building.build(kernel, found, CACHE, tell)
        tell("is booted and tested")
        seen = guest.visit(built.image, _commands(built), found, seconds=_SECONDS)
    verdicts = {
        name: checks.judge(name, done)
        for name, done in seen.done.items()
        if name != checks.DOCTOR
    }
    results[kernel.name] = verdicts
    for name, verdict in verdicts.items():
        console.print(f"{kernel.name}, {checks.title(name)}: {verdict}", markup=False)
    for name, done in seen.done.items():
        if verbose or name == checks.DOCTOR:
            console.print(
                f"--- {kernel.name}: {name}", done.output, sep="\n", markup=False
            )
    problems += [f"{kernel.name}, kernel log: {line}" for line in seen.splats]
    for name, verdict in verdicts.items():
        if not verdict.right and not checks.is_upstream(name):
            problems.append(f"{kernel.name}, {checks.title(name)}: {verdict}")
            problems += [f"    {line}" for line in verdict.complaints]


def _measure(found: Packages) -> None:
    """Print what was measured in a guest, as it was said there."""
    with console.status(f"{PLAIN.name}: is built") as status:
        built = building.build(PLAIN, found, CACHE, lambda _: None)
        status.update(f"{PLAIN.name}: is measured")
        seen = guest.visit(
            built.image,
            checks.measurements(),
            found,
            seconds=_MEASURING_SECONDS,
            memory_mib=_MEASURING_MIB,
        )
    for done in seen.done.values():
        console.print(done.output, markup=False)
    if any(done.status for done in seen.done.values()):
        raise Wrong("a measurement failed")


def _commands(built: Built) -> checks.Commands:
    """What to run on a kernel."""
    if not built.kernel.patched:
        return checks.upstream(built)
    if built.kernel is KASAN:  # under which the others take the better part of an hour
        return checks.our_test(built)
    return checks.our_test(built) | checks.upstream(built) | checks.project()


def upstream_problems(results: Results) -> list[str]:
    """Say where KSM's own tests do not do as without the patches, or fail.

    Args:
        results: the latter counts where the kernel without patches is not among them.
    """
    theirs = {
        kernel: {name: did[name] for name in did if checks.is_upstream(name)}
        for kernel, did in results.items()
    }
    if without := theirs.pop(UNPATCHED.name, None):
        return [
            f"{kernel}, not as without the patches: {line}"
            for kernel, did in theirs.items()
            for line in checks.differences(without, did)
        ]
    return [
        f"{kernel}, {checks.title(name)}: {verdict}"
        for kernel, did in theirs.items()
        for name, verdict in did.items()
        if not verdict.right
    ]


def _table(results: Results) -> Table:
    table = tables.grid("test", *results, indent=0)
    rows = dict.fromkeys(name for verdicts in results.values() for name in verdicts)
    for row in rows:
        cells = [verdicts.get(row) for verdicts in results.values()]
        table.add_row(checks.title(row), *(str(cell or "") for cell in cells))
    return table


if __name__ == "__main__":
    main()
