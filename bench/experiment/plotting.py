"""The experiment as a picture."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl

from bench.experiment.cases import Case

mpl.use("Agg")
from matplotlib import pyplot as plt

_MIB = 1 << 20


def draw(found: list[Case], processes: int, path: Path) -> None:
    """Draw memory over time, a line a case."""
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for case in found:
        seconds = [look.seconds for look in case.looks]
        memory = [look.honest_bytes / _MIB for look in case.looks]
        axes.plot(seconds, memory, label=case.name.replace("_", " "))
    axes.set_xlabel("seconds")
    axes.set_ylabel("anonymous + shared + page tables + slab, MiB")
    axes.set_title(f"{processes} processes with patched code")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
