"""The pipeline, top to bottom."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import itertools
import os
import time
from collections.abc import Iterator, Sequence

from sksm import pages
from sksm.engines import Engine
from sksm.linux.maps import Mapping
from sksm.process import AddressSpace
from sksm.report import MergeReport
from sksm.spans import PAGE_SIZE, Span


def merge(space: AddressSpace, span: Span, *, engine: Engine) -> MergeReport:
    """Make equal pages of `span` share one frame, and say what became of each.

    Raises:
        OSError: ENOMEM if part of `span` is not mapped, as `madvise` does, after
            what is mapped was merged.
    """
    report = merge_all(space, [span], engine=engine)
    report += engine.finish().get(space.pid, MergeReport())
    if report.scanned < span.pages:
        hole = f"{span.pages - report.scanned} of {span.pages} pages are not mapped"
        raise OSError(errno.ENOMEM, hole)
    return report


def merge_all(
    space: AddressSpace, spans: Sequence[Span], *, engine: Engine
) -> MergeReport:
    """Make equal pages of several spans share one frame, as far as they are mapped.

    What the engine puts off is still to be done, by its `finish`.

    Args:
        space: whose memory.
        spans: ascending, apart from each other.
        engine: how.
    """
    started = time.perf_counter()
    report = MergeReport()
    if not spans:
        return report
    whole = Span(spans[0].start, spans[-1].stop)
    around = Span(max(0, whole.start - PAGE_SIZE), whole.stop + PAGE_SIZE)
    mappings = space.count_mappings(around)
    objection = None if engine.in_place else space.objection()
    kept = pages.KEPT_IN_PLACE if engine.in_place else space.keeps
    found = space.mappings(whole)
    at = {mapping.span.start: mapping for mapping in found}
    for mapping, parts in _parts(found, spans):
        if reason := objection or pages.why_not(mapping, kept):
            report.refuse(reason, sum(part.pages for part in parts))
            continue
        behind = at.get(mapping.span.stop)
        followed = engine.in_place or (
            behind is not None and _goes_on(space, mapping, behind)
        )
        lone = whole.pages == 1
        report += _merge_parts(space, _Offer(mapping, parts, followed, lone), engine)
    report.mappings_added = space.count_mappings(around) - mappings
    report.seconds = time.perf_counter() - started
    return report


def _goes_on(space: AddressSpace, mapping: Mapping, behind: Mapping) -> bool:
    """Say whether what is offered goes on where `mapping` ends.

    One object's memory does; of a raw range nobody knows, and the program might grow
    the mapping.
    """
    if space.pinned:
        return mapping.span.pages > 1  # or its flags are not known (`process.flags`)
    return space.tails and pages.continues(mapping, behind)


def _parts(
    found: list[Mapping], spans: Sequence[Span]
) -> Iterator[tuple[Mapping, list[Span]]]:
    """Go through mappings, each with the parts of it that lie in `spans`."""
    first = 0
    for mapping in found:
        while first < len(spans) and spans[first].stop <= mapping.span.start:
            first += 1
        parts = []
        for span in itertools.islice(spans, first, None):
            if span.start >= mapping.span.stop:
                break
            parts.append(mapping.span & span)
        if parts:
            yield mapping, parts


@dataclasses.dataclass(frozen=True, slots=True)
class _Offer:
    """Parts of a mapping that are offered."""

    mapping: Mapping
    parts: list[Span]
    followed: bool  # its memory goes on behind it
    lone: bool  # no more than a page is


def _merge_parts(space: AddressSpace, offer: _Offer, engine: Engine) -> MergeReport:
    mapping, followed = offer.mapping, offer.followed
    report, candidates = pages.survey(
        space, mapping, offer.parts, engine.pool, followed=followed
    )
    if not candidates:
        return report
    with contextlib.ExitStack() as scope:
        whole = Span(candidates[0].start, candidates[-1].stop)
        try:
            if not engine.in_place:
                scope.enter_context(space.protected(whole))
        except OSError as error:
            reason = _unprotected(error)
            report.refuse(reason, sum(span.pages for span in candidates))
            return report
        tail = None
        if space.tails and not followed:
            candidates, tail = pages.without_tail(
                mapping, offer.parts[-1].stop, candidates, lone=offer.lone
            )
        for batch in pages.batches(mapping, candidates):
            report += _share(space, batch, engine)
        if tail:
            report += _share(space, tail, engine)
    return report


def _unprotected(error: OSError) -> str:
    """Say why writers to some memory cannot be held off, if that is an answer."""
    if isinstance(error, BlockingIOError) or error.errno == errno.EOPNOTSUPP:
        return error.strerror or ""
    if error.errno != errno.EBUSY:
        raise error
    return pages.WATCHED


def _share(space: AddressSpace, batch: pages.PageBatch, engine: Engine) -> MergeReport:
    """Share a batch; one that vanished meanwhile is refused, not an error."""
    try:
        return engine.share(space, batch)
    except OSError as error:
        if error.errno != errno.EFAULT:
            raise
        report = MergeReport()
        report.refuse(f"unmapped meanwhile ({os.strerror(error.errno)})", batch.pages)
        return report
