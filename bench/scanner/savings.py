"""What a course of memory and processor time says: arithmetic, nothing is read."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Course = npt.NDArray[np.float64]  # a figure over time


def aligned(seconds: Course, marks: Sequence[float], others: Sequence[float]) -> Course:
    """Translate times of one run into those of another with the same script.

    Args:
        seconds: times of the first run.
        marks: when it was done with each step, ascending.
        others: when the other run was done with the same.

    Returns:
        The times at which the other was as far. Behind the last mark both run alike.
    """
    here, there = np.array([0.0, *marks]), np.array([0.0, *others])
    beyond = np.maximum(seconds - here[-1], 0.0)
    translated: Course = np.interp(seconds, here, there) + beyond
    return translated


def smooth(course: Course, width: int = 5) -> Course:
    """Give the median of each figure and its neighbours: without single spikes."""
    half = min(width, len(course)) // 2
    padded = np.pad(course, half, mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1)
    median: Course = np.median(windows, axis=1)
    return median


def final(seconds: Course, course: Course, length_seconds: float = 10.0) -> float:
    """Say what a course comes to: its mean over the last seconds."""
    return float(course[seconds >= seconds[-1] - length_seconds].mean())


def time_to(seconds: Course, course: Course, level: float) -> float | None:
    """Say from when on a course stays at or above a level; None if it does not."""
    below = np.flatnonzero(course < level)
    if not len(below):
        return float(seconds[0])
    first = int(below[-1]) + 1
    return float(seconds[first]) if first < len(seconds) else None


def losses(course: Course, without: Course) -> tuple[float, float]:
    """Say by which part of `without` a course is above it: at worst, and on average.

    Below counts as negative.
    """
    lost = course / without - 1
    return float(lost.max()), float(lost.mean())
