"""The pipeline, top to bottom."""

from __future__ import annotations

import contextlib
import errno
import os
import time

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
    started = time.perf_counter()
    report = MergeReport()
    mapped = 0
    around = Span(max(0, span.start - PAGE_SIZE), span.stop + PAGE_SIZE)
    mappings = space.count_mappings(around)
    objection = space.objection()
    found = space.mappings(span)
    starts = {mapping.span.start for mapping in found}
    for mapping in found:
        part = mapping.span & span
        mapped += part.pages
        # One object's memory goes on where a mapping of it ends; of a raw range
        # nobody knows, and the program might grow the mapping.
        followed = space.pinned and mapping.span.stop in starts
        if reason := objection or pages.why_not(mapping):
            report.refuse(reason, part.pages)
        else:
            report += _merge_part(space, mapping, part, engine, followed)
    report.mappings_added = space.count_mappings(around) - mappings
    report.seconds = time.perf_counter() - started
    if mapped < span.pages:
        hole = f"{span.pages - mapped} of {span.pages} pages are not mapped"
        raise OSError(errno.ENOMEM, hole)
    return report


def _merge_part(
    space: AddressSpace,
    mapping: Mapping,
    part: Span,
    engine: Engine,
    followed: bool,
) -> MergeReport:
    report, candidates = pages.survey(
        space, mapping, part, engine.pool, followed=followed
    )
    if not candidates:
        return report
    with contextlib.ExitStack() as scope:
        try:
            whole = Span(candidates[0].start, candidates[-1].stop)
            scope.enter_context(space.protected(whole))
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            report.refuse(pages.WATCHED, sum(span.pages for span in candidates))
            return report
        for batch in pages.batches(mapping, candidates):
            report += _share(space, batch, engine)
    return report


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
