"""Which slots somebody may map: by the kernel's own count of references.

For each grant the pool's file is opened anew, and a byte of its own is locked for that
open file description (`linux.ofd_locks`). Who gets the descriptor maps slots through it
and through no other, so as long as any mapping is left, in whatever process, the byte
is locked. The slots that a grant was given stay as they are for as long; a slot in no
living grant is free.
"""

from __future__ import annotations

import dataclasses
import os

import numpy as np
import numpy.typing as npt

from sksm.linux import ofd_locks
from sksm.store import slot_sets
from sksm.store.local import LocalStore
from sksm.store.slot_sets import Runs

_MANY_PIECES = 64  # after which a set is made normal, so that it does not grow


@dataclasses.dataclass(eq=False, slots=True)
class Grant:
    """Slots that may be mapped through one open file description."""

    number: int  # of the byte that is locked
    kept: list[Runs] = dataclasses.field(default_factory=list)
    # Answered since the last time that its holder said which ones it has mapped.
    answered: list[Runs] = dataclasses.field(default_factory=list)

    @property
    def runs(self) -> Runs:
        """Return all of its slots."""
        return slot_sets.union([*self.kept, *self.answered])


class Grants:
    """The grants of one store.

    Args:
        store: whose slots.
    """

    def __init__(self, store: LocalStore) -> None:
        self._store = store
        self._living: dict[int, Grant] = {}
        self._unclaimed: list[Runs] = []  # taken back from a grant, and perhaps free
        self._next = 1

    def __len__(self) -> int:
        return len(self._living)

    def new(self) -> tuple[Grant, int]:
        """Make a grant; also returns its descriptor, which the caller closes.

        Raises:
            OSError: EMFILE, ENFILE, ENOLCK.
        """
        fd = self._store.reader()
        try:
            ofd_locks.lock(fd, self._next)
        except BaseException:
            os.close(fd)
            raise
        grant = Grant(self._next)
        self._living[grant.number] = grant
        self._next += 1
        return grant, fd

    def knows(self, grant: Grant) -> bool:
        """Say whether a grant has not ended, as far as the last sweep has seen."""
        return grant.number in self._living

    def add(self, grant: Grant, slots: npt.NDArray[np.int64]) -> None:
        """Give a grant slots, before their numbers are told."""
        self.add_runs(grant, slot_sets.of_slots(slots))

    def add_runs(self, grant: Grant, runs: Runs) -> None:
        """Give a grant a normal set of slots; one that has ended keeps none."""
        if not len(runs):
            return
        if not self.knows(grant):
            self._unclaimed.append(runs)
            return
        grant.answered.append(runs)
        if len(grant.answered) > _MANY_PIECES:
            grant.answered = [slot_sets.union(grant.answered)]

    def settle(self, grant: Grant, mapped: Runs | None) -> None:
        """Take back those of the slots answered that the holder has not mapped.

        None of them if `mapped` is None: it may have mapped all.
        Nothing if it has ended meanwhile: its slots were free, and may be used again.
        """
        if not self.knows(grant):
            return
        answered = slot_sets.union(grant.answered)
        spared = slot_sets.EMPTY
        if mapped is not None:
            spared = slot_sets.difference(answered, slot_sets.union([mapped]))
        grant.kept.append(slot_sets.difference(answered, spared))
        grant.answered = []
        if len(grant.kept) > _MANY_PIECES:
            grant.kept = [slot_sets.union(grant.kept)]
        if len(spared):  # or the list would grow by each merge until the next sweep
            self._unclaimed.append(spared)

    def sweep(self) -> int:
        """Free the slots of no living grant; returns how many.

        Raises:
            OSError, MemoryError: nothing was freed, and can be the next time.
        """
        dead = [one for one in self._living.values() if not self._is_held(one)]
        loose = slot_sets.union([*self._unclaimed, *(one.runs for one in dead)])
        numbers = {one.number for one in dead}
        living = slot_sets.union(
            one.runs for one in self._living.values() if one.number not in numbers
        )
        free = slot_sets.difference(loose, living) if len(loose) else loose
        slots = slot_sets.slots_of(free)
        for number in numbers:
            del self._living[number]
        self._unclaimed = []
        if len(slots):
            self._store.drop(slots)
        return len(slots)

    def _is_held(self, grant: Grant) -> bool:
        return ofd_locks.is_locked(self._store.pool, grant.number)
