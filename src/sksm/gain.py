"""What merging would bring, net of what it costs: for each engine, pure arithmetic.

Not in it is what no estimate can know: sksmd itself (about 20 MiB, once a user), and
the pages that will be written, and so copied, later.
"""

from __future__ import annotations

import dataclasses

from sksm.estimate import Figures
from sksm.spans import PAGE_SIZE

POOL, KSM, KERNEL = "pool", "ksm", "kernel"

INDEX_BYTES = 20  # of sksmd, for each page in the pool (docs/design.md)
MAPPINGS_A_RUN = 2  # in the middle of a mapping: itself, and what is left behind it
RMAP_ITEM_BYTES = 64  # sizeof(struct ksm_rmap_item) in mm/ksm.c, where pages are 4 KiB


@dataclasses.dataclass(frozen=True, slots=True)
class Gain:
    """What one engine would free, and take."""

    engine: str
    freed_bytes: int
    cost_bytes: int

    @property
    def net_bytes(self) -> int:
        """What the machine would gain; negative if it would lose."""
        return self.freed_bytes - self.cost_bytes


def gains(total: Figures, vma_bytes: int) -> list[Gain]:
    """Tell the gain by each engine.

    - `pool` pays for mappings (`vm_area_struct`) and for the index. Page tables cost
      nothing, also where huge pages are split: the kernel sets one aside with every
      anonymous huge page (`pgtable_trans_huge_deposit`; `VmPTE` is the same after a
      split), and the exchange moves tables instead of adding some.
    - `ksm` keeps an item for each page that it scans, as the formula of
      `general_profit` has it (Documentation/admin-guide/mm/ksm.rst). It is given the
      spans, not the processes.
    - `kernel` (MADV_MERGE) keeps nothing.

    Args:
        total: of all processes.
        vma_bytes: what a mapping takes.
    """
    freed = total.duplicate_bytes + total.zero_bytes
    mappings = MAPPINGS_A_RUN * total.mappings * vma_bytes
    index = INDEX_BYTES * (total.kept_bytes // PAGE_SIZE)
    items = RMAP_ITEM_BYTES * total.span_pages
    costs = {POOL: mappings + index, KSM: items, KERNEL: 0}
    return [Gain(engine, freed, cost) for engine, cost in costs.items()]
