"""How equal pages come to share one frame."""

from __future__ import annotations

from typing import Protocol

from sksm.pages import PageBatch
from sksm.process import AddressSpace
from sksm.report import MergeReport


class Engine(Protocol):
    """Makes pages share frames, never on the word of a fingerprint alone."""

    name: str
    # Pages stay where they are, and the kernel sees to it that none is merged that
    # something else has hold of. Else they are replaced, which not all memory bears.
    in_place: bool

    @property
    def pool(self) -> str | None:
        """Name of the pool whose clean pages count as merged; None: of any pool."""
        ...

    def share(self, space: AddressSpace, batch: PageBatch) -> MergeReport:
        """Merge each page of `batch` with its twin, if they are equal bytes.

        The engine has the pages compared at a moment when neither can change. It may
        put the work off until `finish`, and then counts the pages there.
        """
        ...

    def finish(self) -> dict[int, MergeReport]:
        """Do what was put off; gives what became of it, by process.

        Their address spaces are still open.
        """
        ...
