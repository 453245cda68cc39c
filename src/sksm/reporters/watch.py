"""`sksm watch`: a live view."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.text import Text

from sksm.reporters import tables, words
from sksm.reporters.words import duration, size
from sksm.scanner.figures import Figures
from sksm.spans import PAGE_SIZE

_MOST_PROCESSES = 20
_BARS = " ▁▂▃▄▅▆▇█"
_HISTORY = 60  # epochs

Tell = Callable[[Figures], None]


@contextlib.contextmanager
def live() -> Iterator[Tell]:
    """Show how things stand; the last of it stays on the screen."""
    console = tables.out()
    with Live(console=console, auto_refresh=False) as view:
        screen = Screen(console)

        def tell(found: Figures) -> None:
            view.update(screen.drawn(found), refresh=True)

        yield tell


class Screen:
    """Draws figures, and remembers those before."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._before: Figures | None = None
        self._saved: list[int] = []

    def drawn(self, found: Figures) -> Group:
        """Draw what one epoch brought."""
        self._saved = [*self._saved, found.saved_net_bytes][-_HISTORY:]
        table = tables.grid(
            ">pid", "process", ">memory", ">duplicates", ">merged", ">un-merged/s"
        )
        for one in found.processes[:_MOST_PROCESSES]:
            sizes = (one.memory_bytes, one.duplicate_bytes, one.merged_bytes)
            rate = f"{self._rate(one.pid, one.unmerged_pages, found):,.0f}"
            name = escape(one.name)
            table.add_row("", str(one.pid), name, *map(size, sizes), rate)
        notes = list(self._notes(found))
        self._before = found
        return Group(table, *notes)

    def _rate(self, pid: int, unmerged: int, found: Figures) -> float:
        if self._before is None:
            return 0.0
        past = {one.pid: one.unmerged_pages for one in self._before.processes}
        passed = found.seconds - self._before.seconds
        return (unmerged - past.get(pid, 0)) / passed if passed else 0.0

    def _notes(self, found: Figures) -> Iterator[Text]:
        more = len(found.processes) - _MOST_PROCESSES
        if more > 0:
            yield Text(f"  ... and {more} more")
        if not found.processes:
            yield Text("Nobody to watch yet.")
        yield Text.from_markup(
            f"\n[bold green]{size(found.saved_net_bytes)} saved[/], net of the pool "
            f"({size(found.pool_bytes)}) and of sksm ({size(found.own_bytes)})"
            f"   {_curve(self._saved)}"
        )
        share = found.cpu_seconds / found.seconds if found.seconds else 0.0
        yield Text.from_markup(
            f"[dim]{duration(found.seconds)}, {duration(found.cpu_seconds)} of "
            f"processor time ({share:.1%}); {words.count(found.stops, 'stop')}, "
            f"{duration(found.stopped_p99_seconds)} at most in 99 of 100; next look "
            f"in {duration(found.pause_seconds)}[/]"
        )
        for one in found.refused[:_MOST_PROCESSES]:
            yield Text(f"Left alone: {one.pid} ({one.name}): {one.reason}", style="dim")


def _curve(values: list[int]) -> str:
    """Draw values as bars; what is below zero has none."""
    top = max([*values, PAGE_SIZE])
    steps = len(_BARS) - 1
    return "".join(_BARS[max(0, round(value / top * steps))] for value in values)
