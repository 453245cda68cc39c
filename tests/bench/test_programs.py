"""Real programs are merged from outside and go on as if nothing had been.

Each runs under checked load for a minute afterwards, or for as many seconds as
SKSM_LOAD_SECONDS says (10 unless it says so where CI is set). Programs that are
not here are downloaded; where that is impossible the tests skip, or fail, if we
are root and SKSM_REQUIRE_KERNEL=1.
"""

import os

import pytest

from bench.programs import measure
from bench.programs.measure import Options
from tests.conftest import REQUIRE_KERNEL

_UNLESS_TOLD = "10" if os.environ.get("CI") else "60"
SECONDS = float(os.environ.get("SKSM_LOAD_SECONDS", _UNLESS_TOLD))
MOST_LOST = 0.02  # of what it was before: daemon and page tables of who gains nothing

pytestmark = [pytest.mark.slow, pytest.mark.limit(600)]


def run(name):
    """Merge a crew, and give what came of it once all its answers were right."""
    looks = tuple(sorted({0.0, min(10.0, SECONDS), SECONDS}))
    options = Options(before_seconds=2.0, after_seconds=looks)
    outcome = measure.measure(name, options, print)
    if outcome.skipped:
        (pytest.fail if REQUIRE_KERNEL and os.getuid() == 0 else pytest.skip)(
            outcome.skipped
        )
    assert not outcome.failed, outcome.failed
    return outcome


def refusals(outcome):
    """Everything the command said about why not, as one text."""
    return f"{outcome.merge.output} {outcome.merge.said}".lower()


def test_forked_workers_take_less_memory_and_hold_what_they_held():
    """By the kernel's word there is net gain, a minute later, too."""
    outcome = run("forked")
    for look in outcome.looks:
        assert outcome.net_bytes(look) > 0.5 * outcome.duplicate_bytes


def test_workers_that_write_all_the_time_lose_nothing():
    """Their pages are written by reference counting: it must not cost them."""
    outcome = run("working")
    assert outcome.phases[measure.AFTER].answers
    look = next(look for look in outcome.looks if look.seconds == min(10.0, SECONDS))
    assert outcome.net_bytes(look) >= -MOST_LOST * outcome.before.total_bytes


def test_separate_workers_at_equal_addresses_take_less_memory():
    """Without a fork in common, equal addresses make equal pages."""
    outcome = run("separate")
    assert outcome.net_bytes(outcome.looks[-1]) > 0.5 * outcome.duplicate_bytes


def test_postgresql_sessions_answer_as_before():
    """Queries, payments and sums over all tables stay right, and nobody grows.

    Little of their memory is equal, less than sksmd needs for itself: that is left
    out here, for its size is not theirs.
    """
    outcome = run("postgres")
    assert outcome.phases[measure.AFTER].answers
    now, before = outcome.looks[-1].figures, outcome.before.total_bytes
    assert now.total_bytes - now.daemon_pss_bytes <= (1 + MOST_LOST) * before


@pytest.mark.parametrize(("name", "why"), [("redis", "jemalloc"), ("node", "v8")])
def test_a_runtime_that_counts_on_zeros_is_refused_by_name(name, why):
    """The pool does not touch it, says why, and it works on."""
    outcome = run(name)
    assert outcome.merge.merged_nothing
    assert why in refusals(outcome)
    assert outcome.phases[measure.AFTER].answers


def test_virtual_machines_take_less_memory_and_compute_as_before():
    """Guests of one kernel have much in common, and their checksums stay right."""
    outcome = run("guests")
    assert outcome.phases[measure.AFTER].answers
    assert outcome.net_bytes(outcome.looks[-1]) > 0
