"""`sksm doctor`: what works here, found by trying."""

from __future__ import annotations

import dataclasses
import functools
import os

import click

from sksm.commands import options

POOL, KSM, KERNEL = "pool", "ksm", "kernel"
NOT_YET = "not in this version"


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """A line of the table."""

    name: str
    purpose: str
    works: bool
    reason: str | None  # the kernel's own, where it does not work
    detail: str
    remedy: str
    informs: bool = False  # nothing depends on it


@dataclasses.dataclass(frozen=True, slots=True)
class EngineEntry:
    """Whether one way to merge is open here, and why not."""

    name: str
    works: bool
    detail: str


@click.command("doctor", epilog="Example: sksm doctor")
@options.output_options
@click.pass_context
def command(context: click.Context, as_json: bool) -> None:
    """Show what this kernel and your permissions allow.

    Everything is tried, nothing is guessed from version numbers. Exits with 0 if
    memory can be merged here, with 3 if not.
    """
    table, ways = features(), engines()
    if as_json:
        from sksm.reporters import json  # noqa: PLC0415

        json.emit("doctor", features=table, engines=ways)
    else:
        from sksm.reporters import doctor  # noqa: PLC0415

        doctor.show(table, ways)
    works = any(way.works for way in ways)
    context.exit(options.DONE if works else options.NOTHING_HERE)


def features() -> list[Entry]:
    """Try every feature."""
    from sksm.linux.features import TRIALS, examine  # noqa: PLC0415

    found = []
    for feature, trial in TRIALS.items():
        finding = examine(feature)
        works = finding.reason is None
        found.append(
            Entry(
                name=feature.value,
                purpose=trial.purpose,
                works=works,
                reason=finding.reason,
                detail=finding.detail,
                remedy="" if works else trial.remedy,
                informs=trial.informs,
            )
        )
    return [*found, daemon()]


def daemon() -> Entry:
    """Connect to this user's daemon, started if there is none."""
    from sksm.daemon.client import RemoteStore  # noqa: PLC0415
    from sksm.errors import SksmError  # noqa: PLC0415

    describe = functools.partial(Entry, "sksmd", "this user's daemon, holds the pool")
    try:
        store = RemoteStore()
        try:
            pid = store.status().pid
        finally:
            store.close()
    except (SksmError, OSError) as error:
        return describe(False, str(error), "", "see sksmd.log in the runtime directory")
    return describe(True, None, f"answers, process {pid}", "")


def engines() -> list[EngineEntry]:
    """Say which ways to merge are open here."""
    from sksm.linux.features import Feature, missing  # noqa: PLC0415

    reason = try_pool()
    ways = [EngineEntry(POOL, reason is None, reason or "merged two pages just now")]
    for name, feature in ((KSM, Feature.KSM), (KERNEL, Feature.MADV_MERGE)):
        here = "the kernel has it" if missing(feature) is None else "nor in the kernel"
        ways.append(EngineEntry(name, False, f"{NOT_YET}; {here}"))
    return ways


def try_pool() -> str | None:
    """Merge two equal pages of this process; say why that failed, or None."""
    import numpy as np  # noqa: PLC0415

    import sksm  # noqa: PLC0415

    content = np.frombuffer(os.urandom(4 * sksm.spans.PAGE_SIZE), np.uint8)
    first, second = sksm.asarray(content), sksm.asarray(content)
    try:
        sksm.merge(first)
        report = sksm.merge(second)
    except (sksm.SksmError, OSError) as error:
        return str(error)
    if not report.merged:
        return ", ".join(report.reasons) or "two equal pages were not merged"
    if not (first == second).all():
        raise AssertionError("merging changed bytes")
    return None
