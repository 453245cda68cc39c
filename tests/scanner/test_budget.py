"""A scanner's share of a processor, and its pauses."""

import pytest

from sksm.scanner.budget import LONGEST, SHORTEST, Budget

pytestmark = [pytest.mark.check, pytest.mark.pure]


class World:
    """A clock, and processor time, that the test turns."""

    def __init__(self, share):
        self.time = self.used = 0.0
        self.budget = Budget(share, lambda: self.used, lambda: self.time)

    def work(self, seconds):
        self.time += seconds
        self.used += seconds


def test_what_is_not_used_is_saved_for_ten_minutes():
    """Who comes later than that finds no more."""
    world = World(0.02)
    assert world.budget.left() == pytest.approx(12.0)
    world.work(4.0)
    assert world.budget.left() == pytest.approx(8.08)
    world.time += 50.0
    assert world.budget.left() == pytest.approx(9.08)
    world.time += 10_000.0
    assert world.budget.left() == pytest.approx(12.0)


@pytest.mark.parametrize("share", [0.005, 0.02, 0.5, 1.0])
def test_the_share_is_kept_whatever_there_is_to_do(share):
    """Over a long time, with epochs that always find work."""
    world = World(share)
    while world.time < 5000.0:
        cost = 0.002
        world.work(cost)
        if world.budget.left() > 0:
            world.work(0.3)
        world.time += world.budget.pause(news=True, cost=cost)
    assert world.used <= share * (world.time + 600.0) + 0.35
    assert world.used >= 0.4 * min(share, 0.35) * world.time  # and it is made use of


def test_pauses_grow_while_there_is_nothing_new_and_end_when_there_is():
    """An idle host is looked at four times a minute."""
    world = World(1.0)
    pauses = [world.budget.pause(news=False, cost=0.0) for _ in range(20)]
    assert pauses == sorted(pauses)
    assert (pauses[0], pauses[-1]) == (1.5 * SHORTEST, LONGEST)
    assert world.budget.pause(news=True, cost=0.0) == SHORTEST


def test_looking_takes_half_of_the_share_at_most():
    """The rest is for what is found."""
    world = World(0.02)
    assert world.budget.pause(news=True, cost=0.1) == pytest.approx(10.0)
