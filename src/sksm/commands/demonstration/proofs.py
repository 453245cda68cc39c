"""What the demo claims, checked."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

from sksm.commands.demonstration.crew import Hand, ask_all
from sksm.commands.demonstration.figures import Snapshot
from sksm.errors import SksmError
from sksm.spans import PAGE_SIZE

_Answers = list[dict[str, Any]]
_PART = 0.9  # of what could be saved at best
_NOISE_BYTES = 4 << 20  # by which a worker's own PSS may grow meanwhile
_TRIES = 64


@dataclasses.dataclass(frozen=True, slots=True)
class Proof:
    """A claim, and whether it holds."""

    claim: str
    holds: bool
    detail: str


def intact(path: Path, size: int, before: _Answers, after: _Answers) -> Proof:
    """Compare checksums: with the file's, and with those before."""
    whole = path.read_bytes()[-size:]
    expected = hashlib.sha256(whole).hexdigest()
    same = before == after and all(one["data"] == expected for one in after)
    return Proof(
        "every byte is intact",
        same,
        "SHA-256 of each worker's memory is what it was, and the file's",
    )


def saved(hands: list[Hand], size: int, before: Snapshot, after: Snapshot) -> Proof:
    """Count the frames behind the data, and look whether PSS agrees."""
    looks = ask_all(hands, "look", 0)
    pages = size // PAGE_SIZE
    private = sum(pages - look["shared_pages"] for look in looks)
    frames = private * PAGE_SIZE + after.pool_bytes
    possible = (len(hands) - 1) * size
    fell = before.workers_pss_bytes - after.workers_pss_bytes
    fell += before.pool_unmapped_bytes - after.pool_unmapped_bytes
    holds = (
        len(hands) * size - frames >= _PART * possible
        and fell >= _PART * possible - len(hands) * _NOISE_BYTES
    )
    detail = f"{len(hands) * pages:,} pages of data, {frames // PAGE_SIZE:,} frames"
    return Proof("the data is in memory once", holds, detail)


def writing(hands: list[Hand], pages: int) -> Proof:
    """Have one worker change a byte, and look who notices; then change it back."""
    claim = "writing un-merges only the writer"
    page = _shared_page(hands, pages)
    if page is None:
        return Proof(claim, False, "no page is shared by all workers")
    writer, others = hands[-1], slice(0, -1)
    sums, looks = ask_all(hands, "checksum"), ask_all(hands, "look", page)
    writer.ask("write", page)
    new_sums, new_looks = ask_all(hands, "checksum"), ask_all(hands, "look", page)
    writer.ask("write", page)
    holds = (
        new_sums[others] == sums[others]
        and new_looks[others] == looks[others]
        and new_sums[-1]["data"] != sums[-1]["data"]
        and not new_looks[-1]["shared"]
        and new_looks[-1]["shared_pages"] == looks[-1]["shared_pages"] - 1
        and writer.ask("checksum") == sums[-1]
    )
    frames = {look["frame"] for look in new_looks[others]}
    if frames == {0}:  # the kernel shows frame numbers to root only
        return Proof(claim, holds, "1 page of 1 worker became private (pagemap)")
    holds = holds and len(frames) == 1 and new_looks[-1]["frame"] not in frames
    frame, own = frames.pop(), new_looks[-1]["frame"]
    return Proof(claim, holds, f"its page: frame {own:#x}, the others': {frame:#x}")


def _shared_page(hands: list[Hand], pages: int) -> int | None:
    """Find a page that all workers share, from the middle on."""
    if not pages:
        raise SksmError("the data is less than a page")
    step = max(1, pages // _TRIES)
    for number in range(min(_TRIES, pages)):
        page = (pages // 2 + number * step) % pages
        if all(look["shared"] for look in ask_all(hands, "look", page)):
            return page
    return None
