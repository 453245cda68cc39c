"""Steps that take long, shown while they last."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from sksm.reporters import tables

if TYPE_CHECKING:
    from sksm.report import Step

_SHOWN_AFTER_SECONDS = 1.0


@contextlib.contextmanager
def progress() -> Iterator[Step]:
    """Show steps on stderr, if that is a terminal, once they have taken a second."""
    console = tables.err()
    columns = BarColumn(24), TextColumn("{task.description}"), TimeElapsedColumn()
    bar = Progress(*columns, console=console, transient=True)
    begun = time.monotonic()

    def step(what: str, amount: float) -> Callable[[float], None]:
        for done in bar.task_ids:
            bar.remove_task(done)
        task = bar.add_task(what, total=amount)

        def tell(more: float) -> None:
            bar.advance(task, more)
            if console.is_terminal and time.monotonic() - begun > _SHOWN_AFTER_SECONDS:
                bar.start()

        return tell

    try:
        yield step
    finally:
        if bar.live.is_started:
            bar.stop()
