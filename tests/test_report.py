"""The report's counts always add up."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sksm.report import OUTCOMES, MergeReport
from sksm.spans import PAGE_SIZE

pytestmark = [pytest.mark.check, pytest.mark.pure]

COUNTED = [name for name in OUTCOMES if name != "refused"]
EVENTS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(COUNTED), st.integers(0, 9)),
        st.tuples(st.sampled_from(["refused: a", "refused: b"]), st.integers(0, 9)),
    )
)


def report_of(events):
    report = MergeReport()
    for name, pages in events:
        if name.startswith("refused"):
            report.refuse(name, pages)
        else:
            report.add(**{name: pages})
    return report


@given(EVENTS)
def test_outcomes_add_up_to_what_was_scanned(events):
    """No page is lost or counted twice, and each refused page has a reason."""
    report = report_of(events)
    assert report.scanned == sum(pages for _, pages in events)
    assert report.scanned == sum(getattr(report, name) for name in OUTCOMES)
    assert report.refused == sum(report.reasons.values())


@given(EVENTS, EVENTS)
def test_sum_of_reports_is_the_report_of_both(one, other):
    """`+=` adds every count and every reason."""
    total = report_of(one)
    total += report_of(other)
    assert total == report_of(one + other)


def test_every_number_of_a_report_is_added():
    """A field that is added later cannot be forgotten in `+=`."""
    numbers = [f.name for f in dataclasses.fields(MergeReport) if f.name != "reasons"]
    total = MergeReport()
    total += MergeReport(**{name: at for at, name in enumerate(numbers)})
    assert [getattr(total, name) for name in numbers] == list(range(len(numbers)))


def test_adding_leaves_the_other_report_alone():
    """The reasons of one report are not shared with another."""
    one, other = MergeReport(), MergeReport()
    other.refuse("why", 1)
    one += other
    one.refuse("why", 1)
    assert other.reasons == {"why": 1}


def test_a_reason_without_pages_is_not_named():
    """What did not happen is not reported."""
    report = MergeReport()
    report.refuse("why", 0)
    assert report == MergeReport()


def test_saved_are_the_pages_that_gave_up_a_frame():
    """Stored pages moved, and saved nothing yet."""
    report = MergeReport()
    report.add(merged=3, zero=2, stored=5, already=7, unique=1)
    assert report.saved_bytes == 5 * PAGE_SIZE
    assert report.as_dict()["saved_bytes"] == 5 * PAGE_SIZE
    assert {"scanned", "reasons", "mappings_added", "seconds", *OUTCOMES} < set(
        report.as_dict()
    )
