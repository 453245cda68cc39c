"""What a row of the benchmark found, and the form in which it travels."""

from __future__ import annotations

import statistics
from typing import Any

import msgspec

SCHEMA = 1


class Options(msgspec.Struct, frozen=True):
    """What a row is asked to measure."""

    rounds: int
    size_bytes: int
    ksmd: bool = True


class Goal(msgspec.Struct, frozen=True, omit_defaults=True):
    """A bound to reach; the median is held against it."""

    at_least: float | None = None
    at_most: float | None = None

    def short_by(self, value: float) -> float | None:
        """Say how much `value` misses the goal by; None if it does not."""
        if self.at_least is not None and value < self.at_least:
            return self.at_least - value
        if self.at_most is not None and value > self.at_most:
            return value - self.at_most
        return None


class Measure(msgspec.Struct, frozen=True):
    """One figure over all rounds. The end of `name` tells the unit."""

    name: str  # its end is one of `report.UNITS`, or it is a count
    label: str
    values: list[float]
    goal: Goal | None = None

    @property
    def median(self) -> float:
        """The middle one of the rounds."""
        return statistics.median(self.values)

    @property
    def short_by(self) -> float | None:
        """How much the median misses the goal by; None without goal or miss."""
        return self.goal.short_by(self.median) if self.goal else None

    def as_dict(self) -> dict[str, Any]:
        """Give the measure the names that `--json` promises."""
        return {
            "name": self.name,
            "label": self.label,
            "min": min(self.values),
            "median": self.median,
            "max": max(self.values),
            "rounds": self.values,
            "goal": msgspec.to_builtins(self.goal) if self.goal else None,
            "short_by": self.short_by,
        }


class Row(msgspec.Struct):
    """All figures of one row, or the reason why there are none."""

    measures: list[Measure] = []
    notes: list[str] = []
    skipped: str | None = None  # not possible here: no fault
    failed: str | None = None  # something was not as it must be
    name: str = ""
    title: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Give the row the names that `--json` promises."""
        return {
            "name": self.name,
            "title": self.title,
            "measures": [measure.as_dict() for measure in self.measures],
            "notes": self.notes,
            "skipped": self.skipped,
            "failed": self.failed,
        }


class Skipped(Exception):
    """This machine does not allow the measurement; the message says why."""


class Wrong(Exception):
    """The program measured did not do its work, so its time means nothing."""
