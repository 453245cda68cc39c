"""What a merge did, in pages."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from sksm.spans import PAGE_SIZE

# Starts a step of something longer: what it is called, and how much there is to do.
# Gives what moves it on by so much.
Step = Callable[[str, float], Callable[[float], None]]

OUTCOMES = ("merged", "zero", "stored", "already", "unique", "changed", "refused")


@dataclasses.dataclass(slots=True)
class MergeReport:
    """Where every page that was looked at ended up.

    Counts are pages, and those after `scanned` add up to it. They say what the
    merge did; what the machine gained is the kernel's to say (`sksm.stats`).
    """

    scanned: int = 0
    merged: int = 0  # shares a frame that was offered before
    zero: int = 0  # held nothing but zeros: the kernel's zero page now
    stored: int = 0  # nobody had offered it: now the frame others will share
    already: int = 0  # shared before this call
    unique: int = 0  # no twin, and not worth a mapping of its own
    changed: int = 0  # written to before the merge was sealed: left as it is
    refused: int = 0  # may not, or could not, be merged: `reasons` says why
    mappings_added: int = 0
    seconds: float = 0.0
    reasons: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def saved_bytes(self) -> int:
        """Bytes of memory the merged and zero pages no longer occupy."""
        return (self.merged + self.zero) * PAGE_SIZE

    def refuse(self, reason: str, pages: int) -> None:
        """Count `pages` as looked at and left alone because of `reason`."""
        if pages:
            self.scanned += pages
            self.refused += pages
            self.reasons[reason] = self.reasons.get(reason, 0) + pages

    def add(self, **pages: int) -> None:
        """Count pages as looked at, each under the outcome that names it."""
        for outcome, count in pages.items():
            self.scanned += int(count)
            setattr(self, outcome, getattr(self, outcome) + int(count))

    def __iadd__(self, other: MergeReport) -> MergeReport:
        self.scanned += other.scanned
        self.merged += other.merged
        self.zero += other.zero
        self.stored += other.stored
        self.already += other.already
        self.unique += other.unique
        self.changed += other.changed
        self.refused += other.refused
        self.mappings_added += other.mappings_added
        self.seconds += other.seconds
        for reason, pages in other.reasons.items():
            self.reasons[reason] = self.reasons.get(reason, 0) + pages
        return self

    def as_dict(self) -> dict[str, Any]:
        """Give the report the names that `--json` promises."""
        return {**dataclasses.asdict(self), "saved_bytes": self.saved_bytes}
