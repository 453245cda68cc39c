"""The log of a service: what is logged, and in which form."""

import json
import logging
import sys

import pytest

from sksm.reporters import log
from tests.figures import figures, process, refusal

pytestmark = [pytest.mark.check, pytest.mark.pure]


def record(message, *args, level=logging.INFO, error=None, **fields):
    made = logging.LogRecord("sksm", level, "", 0, message, args, error)
    made.fields = fields
    return made


def caught():
    try:
        raise ValueError("first\nsecond")
    except ValueError:
        return sys.exc_info()


@pytest.mark.parametrize(
    ("level", "prefix"),
    [("DEBUG", "<7>"), ("INFO", "<6>"), ("WARNING", "<4>"), ("ERROR", "<3>")],
)
def test_lines_for_the_journal_begin_with_their_priority(level, prefix):
    """And with nothing else: the journal knows the time."""
    made = record("so it is", level=getattr(logging, level))
    assert log.Text(priorities=True).format(made) == f"{prefix}so it is"
    assert log.Text(priorities=False).format(made) == "so it is"


def test_each_line_of_a_traceback_has_a_priority():
    """The journal makes an entry of each line."""
    made = record("so it is", level=logging.ERROR, error=caught())
    lines = log.Text(priorities=True).format(made).splitlines()
    assert lines[0] == "<3>so it is"
    assert len(lines) > 3
    assert all(line.startswith("<3>") for line in lines)


@pytest.mark.parametrize("name", ["a\n<2>b", "\x1b[31m", "\udcff", "a\u2028b"])
def test_a_process_cannot_write_lines_of_its_own(name):
    """Whatever it calls itself: names are escaped, in both forms."""
    made = record("process %s is watched", name, name=name)
    text = log.Text(priorities=True).format(made)
    assert text.startswith("<6>process ")
    assert text.isprintable()
    line = log.Json().format(made)
    assert "\n" not in line
    found = json.loads(line.encode())
    assert found["message"].startswith("process ")


def test_json_has_time_level_message_and_fields():
    """One object, on one line."""
    made = record("so it is", level=logging.WARNING, error=caught(), pid=7)
    line = log.Json().format(made)
    found = json.loads(line)
    assert "\n" not in line
    assert (found["level"], found["message"]) == ("warning", "so it is")
    assert found["pid"] == 7
    assert found["time"].endswith("+00:00")
    assert "ValueError" in found["traceback"]


@pytest.fixture
def said(caplog):
    """Give `said()`: level and text of what was logged since the last time."""
    caplog.set_level(logging.INFO)

    def take():
        found = [(one.levelname, one.getMessage()) for one in caplog.records]
        caplog.clear()
        return found

    return take


def test_who_comes_goes_and_is_left_alone_is_logged_once(said):
    """With the reason, where there is one."""
    chronicle = log.Chronicle()
    chronicle.tell(figures(processes=[process(1), process(2)]))
    assert said() == [
        ("INFO", "process 1 (program) is watched"),
        ("INFO", "process 2 (program) is watched"),
    ]
    later = figures(processes=[process(2)], refused=[refusal(3, "it says no")])
    chronicle.tell(later)
    assert said() == [
        ("INFO", "process 1 (program) is watched no more"),
        ("WARNING", "process 3 (program) is left alone: it says no"),
    ]
    chronicle.tell(later)
    assert said() == []


def test_a_summary_comes_every_five_minutes(said):
    """However many epochs there are."""
    chronicle = log.Chronicle()
    summaries = 0
    for second in range(0, 1000, 10):
        chronicle.tell(figures(seconds=float(second)))
        summaries += len(said())
    assert summaries == 3


def test_a_summary_has_the_figures_as_fields(caplog):
    """But for what there is one of for each process."""
    caplog.set_level(logging.INFO)
    log.Chronicle().tell(figures(seconds=300.0, refused=[refusal(3, "no")]))
    found = json.loads(log.Json().format(caplog.records[-1]))
    assert found["saved_net_bytes"] == 2 << 20
    assert (found["processes"], found["refused"]) == (0, 1)
    assert "2.0 MiB saved" in found["message"]
