"""Merging memory of running programs, for tests that do it again and again."""

import contextlib
import time
import traceback

from sksm.engines.pool import PoolEngine
from sksm.pipeline import merge_all
from sksm.process.other import OtherProcess
from sksm.report import MergeReport
from sksm.store.local import LocalStore


def merge(target, store, total=None):
    """Merge what a program offers; adds to a report, also if it ends meanwhile.

    Raises:
        ProcessLookupError: it has ended, or executes another program now.
    """
    spans = sorted(target.spans(), key=lambda span: span.start)
    with OtherProcess(target.pid) as space:
        report = merge_all(space, spans, engine=PoolEngine(store))
    if total is not None:
        total += report
    return report


def merge_in_turns(targets, going_on):
    """Merge programs with each other while `going_on()`, into one pool after another.

    A new pool is work for each turn: what is merged already would cost nothing.
    Gives a report of all, and what it said when a program was gone or another one.
    """
    total, gone = MergeReport(), []
    while True:
        store = LocalStore()
        with contextlib.closing(store):
            for target in [*targets, *targets]:  # the second time there is a twin
                if not going_on():
                    return total, gone
                try:
                    merge(target, store, total)
                except ProcessLookupError as error:
                    gone.append(traceback.format_exception(error))


def merge_for_ever(target, tell):
    """Merge into one pool after another; calls `tell` each time before it begins.

    Some waits end with EINTR at every stop, and begin anew (signal(7)): between two
    merges there is time for them.
    """
    while True:
        time.sleep(0.05)
        store = LocalStore()
        tell()
        with contextlib.closing(store), contextlib.suppress(BlockingIOError):
            merge(target, store)  # busy: a thread that lost its merger ends its table
