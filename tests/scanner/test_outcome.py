"""A scanner is held against nobody at the same step of the script."""

import pytest

from bench.scanner import outcome
from bench.scanner.guests import Case
from bench.scanner.recording import Look
from bench.scanner.scanners import NOTHING, SKSM, WIDE_OPEN
from bench.scanner.work import Piece

MIB = 1 << 20


def case(name, saved, cpu=0.0, slower=1.0):
    """Two steps of 20 s and rest; it takes 400 MiB less what `saved` says by then."""
    looks = [
        Look(t * slower, (400 - saved(t)) * MIB, (500 - saved(t)) * MIB, cpu * t)
        for t in range(61)
    ]
    marks = [20 * slower, 40 * slower, 60 * slower]
    pieces = [Piece("1", 0, "read", 20.0 * slower)]
    return Case(name, looks, marks, pieces=pieces, worked_seconds=(40 * slower,))


def late(start, mib):
    return lambda t: mib if t >= start else 0


def test_figures_of_a_scanner_follow_from_its_course():
    """What it saved, when, at which cost."""
    cases = [
        case(NOTHING, late(0, 0)),
        case(WIDE_OPEN, late(10, 200), cpu=0.5),
        case(SKSM, late(30, 256), cpu=0.1, slower=1.5),
    ]
    found = outcome.outcomes(cases, "machine")
    ours = found[SKSM]
    assert ours.saved_bytes == ours.saved_programs_bytes == 256 * MIB
    assert ours.nearly_seconds == pytest.approx(45)
    assert ours.nearly_after_work_seconds == pytest.approx(-15)
    assert ours.nearly_cpu_seconds == pytest.approx(3)
    assert ours.cpu_seconds == pytest.approx(6)
    assert ours.cpu_seconds_per_gib == pytest.approx(24)
    assert ours.slow_down == pytest.approx(0.5)
    assert ours.to_wide_open_ratio == pytest.approx(1.28)
    assert found[WIDE_OPEN].wide_open_seconds == pytest.approx(10)


def test_a_scanner_that_saves_nothing_has_no_times():
    """There is nothing to divide by."""
    found = outcome.outcomes(
        [case(NOTHING, late(0, 0)), case(SKSM, late(9, -5))], "machine"
    )
    assert found[SKSM].saved_bytes == -5 * MIB
    assert found[SKSM].nearly_seconds is None
    assert found[SKSM].cpu_seconds_per_gib is None
    assert found[SKSM].to_wide_open_ratio is None


def test_a_case_that_failed_has_no_figures():
    """Nor has any, where the one to compare with is missing."""
    failed = Case(SKSM, failed="it ended")
    assert outcome.outcomes([case(NOTHING, late(0, 0)), failed], "machine").keys() == {
        NOTHING
    }
    assert outcome.outcomes([case(SKSM, late(0, 1))], "machine") == {}
