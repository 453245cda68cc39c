"""`sksm stat` for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.markup import escape

from sksm.reporters import tables, words
from sksm.spans import PAGE_SIZE

if TYPE_CHECKING:
    from rich.console import Console

    from sksm.commands.sharing import PoolUse, Survey
    from sksm.daemon.protocol import Status

_MOST_SHARERS = 20


def show(found: Survey, status: Status | None, ksm: dict[str, int]) -> None:
    """Print who shares, then the sum, then KSM's."""
    console = tables.out()
    for pool in found.pools:
        _show_pool(console, pool)
    if found.pools:
        _show_sum(console, found, status)
    else:
        console.print("Nothing is shared by sksm now.")
    if status is None:
        console.print("No sksmd runs for you; the first sksm.merge() starts one.")
    elif status.held_back:
        console.print(f"[yellow]Nothing was freed lately: {status.held_back}[/]")
    if found.unreadable_processes:
        others = words.count(found.unreadable_processes, "process")
        console.print(f"[dim]Not seen: {others} that you may not look at.[/]")
    if ksm:
        console.print(f"\n[bold]KSM[/]: {_ksm(ksm)}")
        _show_ksm(console, found)


def _show_ksm(console: Console, found: Survey) -> None:
    if not found.ksm_sharers:
        return
    table = tables.grid(">pid", "process", ">merged by KSM", ">net", ">PSS")
    for one in sorted(found.ksm_sharers, key=lambda one: -one.merged_bytes):
        sizes = (one.merged_bytes, one.profit_bytes, one.pss_bytes)
        table.add_row("", str(one.pid), escape(one.name), *map(words.size, sizes))
    console.print(table)
    console.print(
        f"  saved by KSM, net: [bold]{words.size(found.ksm_saved_bytes)}[/]"
        " [dim](less 64 B a page; ended processes not counted)[/]"
    )


def _show_pool(console: Console, pool: PoolUse) -> None:
    table = tables.grid(
        ">pid", "process", ">mapped", ">still shared", ">mappings", ">PSS"
    )
    for sharer in pool.sharers[:_MOST_SHARERS]:
        table.add_row(
            "",
            str(sharer.pid),
            escape(sharer.name),
            words.size(sharer.mapped_bytes),
            words.size(sharer.shared_bytes),
            f"{sharer.mappings:,}",
            words.size(sharer.pss_bytes),
        )
    owner = (
        f"sksmd {pool.daemon_pid}" if pool.daemon_pid else "a daemon that is gone, kept"
    )
    sharers = words.count(len(pool.sharers), "process")
    console.print(f"[bold]Pool of {owner}[/], mapped by {sharers}")
    if pool.sharers:
        console.print(table)
    if len(pool.sharers) > _MOST_SHARERS:
        console.print(f"  ... and {len(pool.sharers) - _MOST_SHARERS} more")
    console.print()


def _show_sum(console: Console, found: Survey, status: Status | None) -> None:
    pool_bytes = sum(pool.pool_bytes for pool in found.pools)
    exact = all(pool.exact for pool in found.pools)
    daemon_bytes = sum(pool.daemon_bytes for pool in found.pools)
    index = ""
    if status and len(found.pools) == 1:  # of others' daemons nobody tells it
        index = f"its index: {words.size(status.index_bytes)}"
    source = "/proc/slabinfo" if found.vma_measured else "an estimate"
    mappings = sum(pool.mappings for pool in found.pools)
    by_pools = found.saved_bytes - found.ksm_saved_bytes
    colour = "green" if by_pools >= 0 else "red"
    table = tables.grid("", ">", "")
    for label, nbytes, remark in (
        ("shared pages, in all processes", found.shared_bytes, ""),
        (
            "less the pool",
            -pool_bytes,
            f"{words.count(pool_bytes // PAGE_SIZE, 'page')}"
            + ("" if exact else ", or more: its file is out of reach"),
        ),
        ("less sksmd's own memory", -daemon_bytes, index),
        (
            "less kernel memory of mappings",
            -found.mapping_bytes,
            f"{mappings:,} of {found.vma_bytes} B, {source}",
        ),
    ):
        table.add_row("", label, words.size(nbytes), f"[dim]{remark}[/]")
    saved = f"[bold {colour}]{words.size(by_pools)}[/]"
    table.add_row("", "[bold]saved[/]", saved, "")
    console.print(table)


def _ksm(ksm: dict[str, int]) -> str:
    state = {0: "ksmd is off", 1: "ksmd runs", 2: "ksmd un-merges"}[ksm.get("run", 0)]
    profit = ksm.get("general_profit")
    text = f"{state}, {words.size(ksm.get('pages_sharing', 0) * PAGE_SIZE)} shared"
    return text if profit is None else f"{text}, profit {words.size(profit)}"
