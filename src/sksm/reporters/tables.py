"""Tables and consoles that never shorten a figure.

rich takes a pipe for a terminal of 80 columns, and cuts cells that do not fit.
Everything that prints with rich gets its consoles and tables from here, instead.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.segment import Segment
from rich.table import Column, Table
from rich.text import Text

_ENDLESS = 10_000  # columns: no table is as wide
_LEAST_TEXT = 12  # columns of text that may wrap


def out() -> Console:
    """Return a console on stdout, made now: tests replace the stream."""
    return _console(stderr=False)


def err() -> Console:
    """Return a console on stderr."""
    return _console(stderr=True)


def _console(stderr: bool) -> Console:
    console = Console(stderr=stderr, highlight=False)
    # Not `is_terminal`: FORCE_COLOR makes that true of a pipe. COLUMNS holds for all.
    if not console.file.isatty() and "COLUMNS" not in os.environ:
        console.width = _ENDLESS
    return console


def grid(*columns: str, indent: int = 2) -> Table:
    """Return a table without lines.

    Args:
        columns: names. ">" in front marks a column of figures: they are aligned to
            the right and never broken. Text wraps. Without any name, the table has
            no header.
        indent: columns on the left; if there are any, each row begins with "".
    """
    table = _Table(
        box=None,
        pad_edge=False,
        padding=(0, 2, 0, 0),
        header_style="dim",
        show_header=any(name.lstrip(">") for name in columns),
    )
    if indent:
        table.indented = True
        table.add_column("", width=max(0, indent - 2), no_wrap=True)
    return _with_columns(table, columns)


def ruled(*columns: str, title: str | None = None) -> Table:
    """Return a table with a title, and a line below the names; see `grid`."""
    table = _Table(
        title=title,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    return _with_columns(table, columns)


def _with_columns(table: Table, names: Iterable[str]) -> Table:
    for name in names:
        figures = name.startswith(">")
        table.add_column(
            name.lstrip(">"),
            justify="right" if figures else "left",
            no_wrap=figures,
            overflow="fold",
        )
    return table


class _Table(Table):
    """Draws each row as a list of its cells where the columns do not fit."""

    indented = False

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> RenderResult:
        if self._least_width(console, options) > options.max_width:
            yield from self._lists(console, options)
        else:
            yield from _trimmed(super().__rich_console__(console, options))

    def _least_width(self, console: Console, options: ConsoleOptions) -> int:
        """Return the width at which figures are whole and text is readable."""
        options = options.update(width=_ENDLESS)

        def spare(column: Column) -> int:
            cells = (column.header, *column.cells)
            widths = (Measurement.get(console, options, cell).maximum for cell in cells)
            return max(0, max(widths) - max(_LEAST_TEXT, column.min_width or 0))

        whole = Measurement.get(console, options, self).maximum
        return whole - sum(spare(one) for one in self.columns if not one.no_wrap)

    def _lists(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self.title:
            yield self.title
            yield ""
        columns = self.columns[self.indented :]
        names = [str(one.header) if self.show_header else "" for one in columns]
        texts = [place for place, one in enumerate(columns) if not one.no_wrap]
        # The first text names the row, with the figures before it, such as a pid.
        head = texts[0] + 1 if texts else 0
        for row in zip(*(one.cells for one in columns), strict=True):
            cells = [str(cell) for cell in row]
            if heading := "  ".join(filter(None, cells[:head])):
                yield Text.from_markup(heading, overflow="fold")
            pairs = zip(names[head:], cells[head:], strict=True)
            if found := [(name, cell) for name, cell in pairs if cell]:
                drawn = _list(found, max(map(len, names[head:])))
                yield from _trimmed(console.render(drawn, options))
            yield ""


def _list(pairs: Iterable[tuple[str, str]], width: int) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(width=0)
    if width:
        table.add_column(style="dim", min_width=width, overflow="fold")
    table.add_column(overflow="fold")
    for pair in pairs:
        table.add_row("", *(pair if width else pair[1:]))
    return table


def _trimmed(drawn: RenderResult) -> Iterator[Segment]:
    """Drop blanks at the ends of lines, which a narrow terminal would wrap."""
    segments = (one for one in drawn if isinstance(one, Segment))
    for line in Segment.split_lines(segments):
        backward = itertools.dropwhile(lambda one: not one.text.strip(), reversed(line))
        kept = list(backward)[::-1]
        if kept:
            last = kept.pop()
            yield from kept
            yield Segment(last.text.rstrip(), last.style, last.control)
        yield Segment.line()
