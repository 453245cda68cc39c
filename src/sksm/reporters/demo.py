"""`sksm demo` for people."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from sksm.reporters import tables, words
from sksm.reporters.words import duration, size

if TYPE_CHECKING:
    from rich.console import Console

    from sksm.commands.demonstration.ksmd import Cost
    from sksm.commands.demonstration.run import Plan, Result


def open_with(plan: Plan) -> None:
    """Say what will happen, and what not to look at."""
    console = tables.out()
    data = size(plan.path.stat().st_size)
    console.print(
        f"[bold]{plan.workers} programs load the same file into memory of their own, "
        f"and merge it.[/]\n{plan.path.name}: {data}. Beside it each holds "
        f"{size(plan.private_bytes)} that no other has.\n\n"
        "[dim]RSS, which top and ps show, will not fall: every program keeps all its\n"
        "pages mapped, and RSS counts a page once for each program. What falls is the\n"
        "number of page frames behind them: PSS divides a shared page by its users,\n"
        "and MemAvailable is what the whole machine, others included, has left.[/]\n",
        soft_wrap=True,
    )


@contextlib.contextmanager
def progress(steps: int) -> Iterator[Callable[[str], None]]:
    """Show a bar on stderr, if that is a terminal; gives what moves it on."""
    bar = Progress(
        BarColumn(24),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        console=(console := tables.err()),
        transient=True,
        disable=not console.is_terminal,
    )
    with bar:
        task = bar.add_task("starting", total=steps)

        def tell(what: str) -> None:
            bar.update(task, description=what)
            bar.advance(task)

        yield tell


def show(result: Result) -> None:
    """Print the figures, the proofs, and the verdict."""
    console = tables.out()
    _show_memory(console, result)
    _show_merges(console, result)
    for proof in result.proofs:
        mark = "[green]proved[/]" if proof.holds else "[bold red]FAILED[/]"
        console.print(f"  {mark}  {proof.claim}\n          [dim]{proof.detail}[/]")
    console.print()
    _show_ksmd(console, result)
    console.print(f"\n{_verdict(result)}")


def _verdict(result: Result) -> str:
    if not result.holds:
        return "[bold red]Not everything was proved.[/]"
    saved = result.saved_bytes
    if saved < 0:
        return (
            f"[bold]Everything was proved, but so little data does not pay: "
            f"{size(-saved)} more.[/]"
        )
    part = saved / result.before.total_bytes
    return (
        f"[bold green]{size(saved)} saved, net of all costs ({part:.0%}); "
        "everything was proved.[/]"
    )


def _show_memory(console: Console, result: Result) -> None:
    before, after = result.before, result.after
    table = tables.grid("", ">before", ">after", ">change")
    rows = (
        ("workers, sum of PSS", before.workers_pss_bytes, after.workers_pss_bytes),
        ("pool pages not mapped", 0, after.pool_unmapped_bytes),
        ("sksmd itself", 0, after.daemon_pss_bytes),
        ("kernel memory of mappings", before.mappings_bytes, after.mappings_bytes),
    )
    for label, old, new in rows:
        table.add_row("", label, size(old), size(new), _change(new - old))
    saved = result.saved_bytes
    colour = "green" if saved > 0 else "red"
    table.add_row(
        "",
        "[bold]in all[/]",
        size(before.total_bytes),
        f"[bold]{size(after.total_bytes)}[/]",
        f"[bold {colour}]{_change(-saved)}[/]",
    )
    table.add_row()
    for label, old, new in (
        (
            "MemAvailable + free lists",
            before.machine_available_bytes + before.machine_cpu_lists_bytes,
            after.machine_available_bytes + after.machine_cpu_lists_bytes,
        ),
        (
            "anon+shmem+tables+slab",
            before.machine_used_bytes,
            after.machine_used_bytes,
        ),
        ("workers, sum of RSS", before.workers_rss_bytes, after.workers_rss_bytes),
    ):
        row = (label, size(old), size(new), _change(new - old))
        table.add_row("", *(f"[dim]{cell}[/]" for cell in row))
    arrays = f", {words.count(result.arrays, 'array')}" if result.arrays else ""
    console.print(f"[bold]Memory[/] [dim]({size(result.data_bytes)} each{arrays})[/]")
    console.print(table)
    console.print()


def _show_merges(console: Console, result: Result) -> None:
    table = tables.grid(">worker", ">pid", ">shared", ">new in the pool", ">time", ">")
    for number, merge in enumerate(result.merges, 1):
        table.add_row(
            "",
            str(number),
            str(merge.pid),
            size(merge.merged_bytes),
            size(merge.stored_bytes),
            duration(merge.seconds),
            f"{merge.bytes_per_second / 2**30:.1f} GiB/s",
        )
    console.print("[bold]Merges[/] [dim](the first call starts sksmd)[/]")
    console.print(table)
    console.print()


def _show_ksmd(console: Console, result: Result) -> None:
    cost = result.ksmd
    took = duration(sum(merge.seconds for merge in result.merges))
    console.print(f"[bold]The same by the kernel's ksmd[/], instead of {took}")
    if cost.seconds is not None:
        console.print(f"  every knob open  {_measured(cost)}")
    if cost.as_set_seconds is not None:
        least = duration(cost.as_set_seconds)
        console.print(
            f"  as set here      {least} at least [dim](two scans of all the data)[/]"
        )
    if cost.why_not:
        console.print(f"  [dim]every knob open: not measured, {cost.why_not}[/]")


def _measured(cost: Cost) -> str:
    assert cost.seconds is not None
    assert cost.sample_seconds is not None
    cpu = "" if cost.cpu_seconds is None else f", {duration(cost.cpu_seconds)} of CPU"
    return (
        f"{duration(cost.seconds)}{cpu} [dim]({duration(cost.sample_seconds)} for "
        f"{size(cost.sample_bytes)}, times {cost.factor:.1f})[/]"
    )


def _change(nbytes: int) -> str:
    return ("+" if nbytes > 0 else "") + size(nbytes)
