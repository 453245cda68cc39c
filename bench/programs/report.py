"""What came out, for people and for programs."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import metadata
from typing import Any

import msgspec
from rich.table import Table

from bench.programs.measure import AFTER, BEFORE, DURING, Options, Outcome
from bench.report import machine
from bench.results import SCHEMA
from sksm.reporters import tables
from sksm.spans import PAGE_SIZE

_ROWS = {
    "the programs, sum of PSS": lambda now: now.workers_pss_bytes,
    "sksmd": lambda now: now.daemon_pss_bytes,
    "pool pages in nobody's page tables": lambda now: now.pool_unmapped_bytes,
    "mappings": lambda now: now.mappings_bytes,
}
_OUTCOMES = ("merged", "zero", "stored", "already", "unique", "changed", "refused")


def as_dict(
    outcomes: list[Outcome], options: Options, seconds: float
) -> dict[str, Any]:
    """Give the whole run the names that `--json` promises."""
    return {
        "schema": SCHEMA,
        "sksm": metadata.version("sksm"),
        "machine": machine(),
        "options": msgspec.to_builtins(options),
        "seconds": seconds,
        "crews": [_outcome_as_dict(outcome) for outcome in outcomes],
    }


def _outcome_as_dict(outcome: Outcome) -> dict[str, Any]:
    raw: dict[str, Any] = msgspec.to_builtins(outcome)
    for look, found in zip(outcome.looks, raw["looks"], strict=True):
        found["net_bytes"] = outcome.net_bytes(look)
        found["machine_net_bytes"] = outcome.machine_net_bytes(look)
        found["net_to_estimate_ratio"] = outcome.of_estimate(look)
    raw["duplicate_bytes"] = outcome.duplicate_bytes
    raw["load"] = {
        phase: {
            "rate_to_before_ratio": outcome.of_before(
                phase, lambda one: one.answers_per_second
            ),
            "p99_to_before_ratio": outcome.of_before(
                phase, lambda one: one.p99_seconds
            ),
        }
        for phase in outcome.phases
        if phase != BEFORE
    }
    return raw


def table(outcome: Outcome) -> Table:
    """Draw what the kernel said of one crew, before and after."""
    when = (f">{_when(look.seconds)}" for look in outcome.looks)
    drawn = tables.ruled("", ">before", *when, title=f"{outcome.title}, MiB")
    if outcome.before is None:
        return drawn
    all_ = [outcome.before, *(look.figures for look in outcome.looks)]
    for label, figure in _ROWS.items():
        drawn.add_row(f"  {label}", *(_mib(figure(one)) for one in all_))
    drawn.add_row("in all", *(_mib(one.total_bytes) for one in all_))
    drawn.add_row(
        "[bold]saved, net[/bold]",
        "",
        *(f"[bold]{_mib(outcome.net_bytes(look))}[/bold]" for look in outcome.looks),
    )
    parts = [outcome.of_estimate(look) for look in outcome.looks]
    drawn.add_row("  of what was estimated", "", *map(_percent, parts))
    drawn.add_row("whole machine uses", *(_mib(one.machine_used_bytes) for one in all_))
    drawn.add_row(
        "  less than before",
        "",
        *(_mib(outcome.machine_net_bytes(look)) for look in outcome.looks),
    )
    return drawn


def remarks(outcome: Outcome) -> Iterator[str]:
    """Say the rest, a line each."""
    if outcome.skipped:
        yield f"skipped: {outcome.skipped}"
    if outcome.failed:
        yield f"FAILED: {outcome.failed}"
    if outcome.estimate:
        size, seconds = outcome.duplicate_bytes or 0, outcome.estimate.seconds
        yield f"estimate: {_mib(size)} MiB could be saved, in {seconds:.2f} s"
    if outcome.merge:
        yield from _of_merge(outcome)
    for phase, name in ((DURING, "during the command"), (AFTER, "after it")):
        if phase in outcome.phases:
            yield f"{name}: {_of_phase(outcome, phase)}"
    yield from outcome.notes


def _of_merge(outcome: Outcome) -> Iterator[str]:
    done = outcome.merge
    assert done is not None
    counts = [
        f"{name} {_mib(done.output[name] * PAGE_SIZE)}"
        for name in _OUTCOMES
        if done.output.get(name)
    ]
    yield f"merge: exit code {done.exit_code} in {done.seconds:.2f} s; MiB: " + (
        ", ".join(counts) or "none looked at"
    )
    if stops := done.output.get("stops"):
        p99, longest = (
            1000 * done.output[name]
            for name in ("stopped_p99_seconds", "stopped_max_seconds")
        )
        yield f"  {stops} stops, p99 {p99:.2f} ms, longest {longest:.2f} ms"
    for reason, pages in done.output.get("reasons", {}).items():
        yield f"  refused: {reason}: {_mib(pages * PAGE_SIZE)} MiB"
    if done.said:
        yield f"  it says: {done.said}"


def _of_phase(outcome: Outcome, name: str) -> str:
    phase = outcome.phases[name]
    rate = outcome.of_before(name, lambda one: one.answers_per_second)
    p99 = outcome.of_before(name, lambda one: one.p99_seconds)
    ratios = f"{rate:.2f} of the rate before, p99 {p99:.2f} times"
    longest = f"longest {1000 * phase.max_seconds:.1f} ms"
    return f"{phase.answers} answers, all right; {ratios}, {longest}"


def _when(seconds: float) -> str:
    return f"{seconds:.0f} s later" if seconds else "right after"


def _mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:,.1f}"


def _percent(part: float | None) -> str:
    return "-" if part is None else f"{100 * part:.0f} %"
