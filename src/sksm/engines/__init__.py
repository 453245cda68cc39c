"""How equal pages come to share one frame."""

from __future__ import annotations

import os
from typing import Protocol

from sksm.pages import PageBatch
from sksm.process import AddressSpace
from sksm.report import MergeReport


class Engine(Protocol):
    """Makes pages share frames, never on the word of a fingerprint alone."""

    name: str

    @property
    def pool(self) -> os.stat_result:
        """`fstat` of the file whose clean pages count as merged."""
        ...

    def share(self, space: AddressSpace, batch: PageBatch) -> MergeReport:
        """Merge each page of `batch` with its twin, if they are equal bytes.

        The engine has the pages compared at a moment when neither can change.
        """
        ...
