"""Which pages of several processes are worth merging: arithmetic on fingerprints."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from sksm import twins
from sksm.fingerprints import of_zeros
from sksm.holding import Prints
from sksm.scanner.ages import Numbers
from sksm.twins import Flags

Named = Mapping[int, tuple[Numbers, Prints]]  # by process; pages, and what they hold


def met(named: Named, pooled: Prints, seed: int) -> dict[int, Flags]:
    """Say which pages hold what another one holds, too, or nothing but zeros.

    Args:
        named: all pages that were read, by process.
        pooled: fingerprints that the pool is known to have, ascending.
        seed: of the fingerprints.
    """
    every = np.sort(np.concatenate([prints for _, prints in named.values()]))
    twice = every[1:][every[1:] == every[:-1]]
    zeros = np.array([of_zeros(seed)], np.uint64)
    wanted = np.unique(np.concatenate([twice, pooled, zeros]))
    return {pid: among(prints, wanted) for pid, (_, prints) in named.items()}


def among(prints: Prints, ascending: Prints) -> Flags:
    """Say which fingerprints are among others."""
    if not len(ascending):
        return np.zeros(len(prints), bool)
    at = np.searchsorted(ascending, prints)
    at[at == len(ascending)] = 0
    found: Flags = ascending[at] == prints
    return found


def worthwhile(
    named: Named, frames: Mapping[int, Prints], pooled: Prints, seed: int
) -> dict[int, Numbers]:
    """List the pages of each process whose merging frees memory.

    Equal pages that share a frame already, by fork, are none.

    Args:
        named: pages that were met, by process.
        frames: theirs, as `holding.shared_frames` gives them.
        pooled: as for `met`.
        seed: of the fingerprints.
    """
    pids = list(named)
    prints = np.concatenate([named[pid][1] for pid in pids])
    zero = of_zeros(seed)
    found = twins.compare(
        prints,
        np.concatenate([frames[pid] for pid in pids]),
        among(prints, pooled),
        zero,
    )
    wanted = found.twin | ((prints == np.uint64(zero)) & ~found.outside & ~found.shares)
    ends = np.cumsum([len(named[pid][0]) for pid in pids])[:-1]
    parts = np.split(wanted, ends)
    return {pid: named[pid][0][part] for pid, part in zip(pids, parts, strict=True)}
