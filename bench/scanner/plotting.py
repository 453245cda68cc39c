"""Courses as a picture: panels one above the other, a line for each case."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl

from bench.scanner.savings import Course

mpl.use("Agg")
from matplotlib import pyplot as plt


class Panel(NamedTuple):
    """A figure over time."""

    label: str
    lines: dict[str, tuple[Course, Course]]  # by case: seconds, and the figure then


def draw(title: str, panels: Sequence[Panel], path: Path) -> None:
    """Draw panels that have their time in common."""
    figure, all_axes = plt.subplots(
        len(panels), sharex=True, figsize=(8, 3.5 * len(panels)), layout="constrained"
    )
    for axes, panel in zip(all_axes, panels, strict=True):
        for name, (seconds, course) in panel.lines.items():
            axes.plot(seconds, course, label=name.replace("_", " "))
        axes.set_ylabel(panel.label)
        axes.spines[["top", "right"]].set_visible(False)
        axes.axhline(0, color="0.8", linewidth=0.8, zorder=0)
    all_axes[0].set_title(title)
    all_axes[0].legend(frameon=False)
    all_axes[-1].set_xlabel("seconds")
    figure.savefig(path, dpi=120)
