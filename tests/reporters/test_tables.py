"""No figure is cut: not on a pipe, not on a narrow terminal."""

import ast
import io
import re
import sys
from pathlib import Path

import pytest
from rich.text import Text

from sksm.reporters import tables
from tests.reporters.printed import PRINTERS

ROOT = Path(__file__).parent.parent.parent
HELPER = ROOT / "src/sksm/reporters/tables.py"
SOURCES = [
    path
    for folder in ("src", "bench", "kernel")
    for path in (ROOT / folder).rglob("*.py")
    if path != HELPER
]
NARROW = 40
SIZE = ["909,494.7", "TiB"]
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def printed(monkeypatch):
    """Give `printed(printer, width)`: its lines on a terminal, or on a pipe (None)."""

    def run(printer, width):
        stream = Terminal() if width else io.StringIO()
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.delenv("COLUMNS", raising=False)
        if width:
            monkeypatch.setenv("COLUMNS", str(width))
        printer()
        # A live view begins with "\r" what it draws over.
        return _CONTROL.sub("", stream.getvalue()).replace("\r", "\n").splitlines()

    return run


@pytest.fixture
def rows(monkeypatch):
    """Collect the rows of all tables: the column and the text of each cell."""
    found = []
    add_row = tables._Table.add_row

    def collect(table, *cells, **style):
        texts = [Text.from_markup(cell).plain for cell in cells]
        found.append(list(zip(table.columns, texts, strict=False)))
        add_row(table, *cells, **style)

    monkeypatch.setattr(tables._Table, "add_row", collect)
    return found


@pytest.mark.parametrize("width", [None, 80, 60, NARROW])
@pytest.mark.parametrize("name", PRINTERS)
def test_every_table_shows_its_figures_whole(name, width, printed, rows):
    """Each on one line, within the width of the terminal; text may wrap."""
    lines = printed(PRINTERS[name], width)
    text = "\n".join(lines)
    assert "…" not in text
    assert max(map(len, lines)) <= (width or 10_000)
    assert width or lines == [line.rstrip() for line in lines]
    words = set(text.split())
    assert rows
    for column, cell in (pair for row in rows for pair in row):
        if column.no_wrap or width is None:
            assert all(any(part in line for line in lines) for part in cell.split("\n"))
        else:
            assert {word for word in cell.split() if len(word) <= 12} <= words


def test_every_table_is_among_these(printed, monkeypatch):
    """Whoever makes a table adds to `PRINTERS` what prints it."""
    made = set()

    def noted(make):
        def noting(*args, **options):
            code = sys._getframe(1).f_code
            made.add((Path(code.co_filename).resolve(), code.co_name))
            return make(*args, **options)

        return noting

    for name in ("grid", "ruled"):
        monkeypatch.setattr(tables, name, noted(getattr(tables, name)))
    for printer in PRINTERS.values():
        printed(printer, None)
    assert {place for path in SOURCES for place in makers(path)} == made


def makers(path):
    """Name the functions of a file that make a table."""
    for function in ast.walk(ast.parse(path.read_text())):
        if isinstance(function, ast.FunctionDef):
            calls = (one for one in ast.walk(function) if isinstance(one, ast.Call))
            names = {ast.unparse(call.func) for call in calls}
            if names & {"tables.grid", "tables.ruled"}:
                yield path.resolve(), function.name


def test_nothing_makes_a_console_or_a_table_of_its_own():
    """They would cut what does not fit."""
    named = re.compile(r"(?<!def )\b(Table|Console)(\.grid)?\(")
    ours = {ROOT / "bench/programs/guests.py"}  # a guest's console
    assert [path for path in SOURCES if named.search(path.read_text())] == sorted(ours)


def sample(*cells):
    table = tables.grid(">pid", "process", ">memory", indent=0)
    table.add_row(*cells)
    return lambda: tables.out().print(table)


def test_a_long_name_loses_no_letter(printed):
    """It goes on in the next line, beside figures that stay whole."""
    name = "abcdefghijklmnopqrstuvwxyz"
    lines = printed(sample("4194304", name, "909,494.7 TiB"), NARROW)
    assert lines[1].split() == ["4194304", name[: -len(lines[2].strip())], *SIZE]
    assert lines[2].strip() == name[-len(lines[2].strip()) :]


def test_where_columns_do_not_fit_a_row_becomes_a_list(printed):
    """The name of its column stands before each figure."""
    lines = printed(sample("4194304", "a name longer than that", "909,494.7 TiB"), 30)
    assert [line.rstrip() for line in lines] == [
        "4194304  a name longer than",
        "that",
        "  memory  909,494.7 TiB",
        "",
    ]


def test_a_pipe_is_as_wide_as_a_table_also_in_colour(printed, monkeypatch):
    """FORCE_COLOR asks for colours, and does not make a terminal of it."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    lines = printed(sample("1", "x" * 200, "909,494.7 TiB"), None)
    assert lines[1].split() == ["1", "x" * 200, *SIZE]
