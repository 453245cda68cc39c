"""What is merged first is little, until it lasts."""

import pytest

from sksm.scanner.trial import Trial

pytestmark = [pytest.mark.check, pytest.mark.pure]

SECONDS = 5.0
SEEN = 1_000_000


def test_more_is_merged_when_it_lasts():
    """Four times as much, each time."""
    trial = Trial(SECONDS)
    rooms = []
    for now in range(0, 60, 6):
        rooms.append(trial.room(SEEN, 0, now))
        trial.merged(rooms[-1], now)
    assert rooms[:4] == [10_000, 40_000, 160_000, 640_000]
    assert rooms[4] > SEEN


def test_no_more_than_that_until_its_time_is_over():
    """Several times may pages be merged in one trial."""
    trial = Trial(SECONDS)
    trial.merged(trial.room(SEEN, 0, 0.0) - 100, 0.0)
    assert trial.ends_at == SECONDS
    assert trial.room(SEEN, 0, 1.0) == 100
    trial.merged(100, 1.0)
    assert trial.room(SEEN, 0, 4.0) == 0
    assert trial.room(SEEN, 0, 5.0) == 40_000


def test_little_is_merged_again_when_it_was_for_nothing():
    """A quarter may be lost."""
    trial = Trial(SECONDS)
    trial.merged(trial.room(SEEN, 0, 0.0), 0.0)
    assert trial.room(SEEN, 2_500, 6.0) == 40_000
    trial.merged(40_000, 6.0)
    assert trial.room(SEEN, 2_500 + 10_001, 12.0) == 10_000


def test_what_was_written_to_between_trials_does_not_count():
    """It had been merged long before."""
    trial = Trial(SECONDS)
    trial.merged(trial.room(SEEN, 0, 0.0), 0.0)
    assert trial.room(SEEN, 0, 6.0) == 40_000
    assert trial.room(SEEN, 500_000, 100.0) == 40_000
    trial.merged(40_000, 100.0)
    assert trial.room(SEEN, 500_000, 106.0) == 160_000


def test_small_processes_are_merged_at_once():
    """Of 4 MiB there is not much to lose."""
    assert Trial(SECONDS).room(500, 0, 0.0) == 1024
