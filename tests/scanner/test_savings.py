"""What is said of a scanner follows from what was read."""

import numpy as np
import pytest

from bench.scanner import savings


def test_times_are_translated_step_by_step():
    """A run whose second step takes twice as long is as far at its middle."""
    seconds = np.array([0.0, 5.0, 10.0, 20.0, 30.0, 35.0])
    found = savings.aligned(seconds, marks=[10.0, 30.0], others=[10.0, 20.0])
    assert found.tolist() == [0.0, 5.0, 10.0, 15.0, 20.0, 25.0]


def test_a_run_is_aligned_with_itself():
    """Nothing changes, behind the last step either."""
    seconds = np.linspace(0, 100, 31)
    assert savings.aligned(seconds, [3.0, 50.0], [3.0, 50.0]) == pytest.approx(seconds)


def test_a_level_counts_from_when_it_is_never_lost_again():
    """Not from when it was reached for a moment."""
    seconds = np.arange(6.0)
    course = np.array([0.0, 9.0, 3.0, 9.0, 10.0, 10.0])
    assert savings.time_to(seconds, course, 9.0) == 3.0


def test_a_level_that_is_not_kept_has_no_time():
    """Also when it was reached before the end."""
    assert savings.time_to(np.arange(3.0), np.array([0.0, 9.0, 8.0]), 9.0) is None


def test_a_level_that_always_was_counts_from_the_start():
    """There is nothing to wait for."""
    assert savings.time_to(np.arange(3.0), np.ones(3), 0.5) == 0.0


def test_the_end_of_a_course_is_its_last_seconds():
    """What was before does not count."""
    seconds = np.arange(31.0)
    course = np.where(seconds < 20, 0.0, 8.0)
    assert savings.final(seconds, course, 10.0) == 8.0


def test_single_spikes_are_smoothed_away_and_steps_stay_where_they_are():
    """So that a moment's noise delays nothing."""
    course = np.array([0.0, 0, 0, 0, 8, 8, 8, 1, 8, 8, 8])
    wanted = [0.0] * 4 + [8.0] * 7
    assert savings.smooth(course).tolist() == wanted
    assert savings.smooth(np.array([3.0])).tolist() == [3.0]


def test_losses_are_parts_of_what_it_takes_without():
    """A gain is a negative loss, and counts in the mean."""
    worst, mean = savings.losses(
        np.array([100.0, 300.0, 50.0]), np.array([100.0, 200.0, 100.0])
    )
    assert worst == pytest.approx(0.5)
    assert mean == pytest.approx(0.0)
