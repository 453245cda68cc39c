"""`sksm doctor`: what works here, found by trying."""

from __future__ import annotations

import dataclasses
import functools
import os

import click

from sksm.commands import options

_TRIAL_SECONDS = 2.0  # for ksmd, which may have much else to do


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


@click.command("doctor", epilog="Example: sksm doctor $(pgrep gunicorn)")
@click.argument("pids", metavar="[PID]...", nargs=-1, type=options.PID)
@options.output_options
@click.pass_context
def command(context: click.Context, pids: tuple[int, ...], as_json: bool) -> None:
    """Show what this kernel and your permissions allow, or what some processes do.

    Everything is tried, nothing is guessed from version numbers. Exits with 0 if
    memory can be merged here, with 3 if not.

    With PIDs: why so much of these processes would merge and no more, how much of
    their memory each reason concerns, and what would help.
    """
    if pids:
        context.exit(_diagnose(list(dict.fromkeys(pids)), as_json))
    table, ways = features(), engines()
    if as_json:
        from sksm.reporters import json  # noqa: PLC0415

        json.emit("doctor", features=table, engines=ways)
    else:
        from sksm.reporters import doctor  # noqa: PLC0415

        doctor.show(table, ways)
    works = any(way.works for way in ways)
    context.exit(options.DONE if works else options.NOTHING_HERE)


def _diagnose(pids: list[int], as_json: bool) -> int:
    from sksm.commands.diagnosis import diagnose  # noqa: PLC0415
    from sksm.reporters import diagnosis as reporter  # noqa: PLC0415
    from sksm.reporters.progress import progress  # noqa: PLC0415

    with progress() as step:
        found = diagnose(pids, step)
    options.complain([one.error for one in found if one.error], of=len(found))
    if as_json:
        reporter.emit(found)
    else:
        reporter.show(found)
    works = any(one.engine for one in found)
    return options.DONE if works else options.NOTHING_HERE


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
    """Say which ways to merge are open here: each merges two pages, just now."""
    from sksm.engines import choice  # noqa: PLC0415

    ways = []
    for name, attempt in (
        (choice.POOL, try_pool),
        (choice.KSM, try_ksm),
        (choice.KERNEL, functools.partial(choice.obstacle, choice.KERNEL)),
    ):
        reason = attempt()
        detail = reason or "merged two pages just now"
        ways.append(EngineEntry(name, reason is None, detail))
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


def try_ksm() -> str | None:
    """Have ksmd merge two equal pages of this process; say why that failed, or None."""
    import sksm  # noqa: PLC0415
    from sksm.daemon import runtime  # noqa: PLC0415
    from sksm.engines.ksm import KsmEngine  # noqa: PLC0415
    from sksm.linux import ksm, libc  # noqa: PLC0415
    from sksm.pipeline import merge  # noqa: PLC0415
    from sksm.process.local import ThisProcess  # noqa: PLC0415
    from sksm.spans import PAGE_SIZE, Span  # noqa: PLC0415

    if reason := ksm.obstacle():
        return reason
    data = sksm.empty(2 * PAGE_SIZE, "u1")
    data[:] = list(os.urandom(PAGE_SIZE)) * 2
    span = Span(data.ctypes.data, data.ctypes.data + data.nbytes)
    try:
        engine = KsmEngine(runtime.directory() / ksm.STATE_NAME, _TRIAL_SECONDS)
        with ThisProcess(pinned=True) as space:
            report = merge(space, span, engine=engine)
            space.advise([span], libc.MADV_UNMERGEABLE)
    except (sksm.SksmError, OSError) as error:
        return str(error)
    if not report.merged:
        return ", ".join(report.reasons) or "two equal pages were not merged"
    return None
