"""Memory whose every page another process has offered before."""

from __future__ import annotations

import contextlib
from contextlib import nullcontext

import sksm
from bench import clock, daemon, floor, ksmd, memory, worker
from bench.clock import Times
from bench.memory import Words
from bench.published import UPM_MERGE_BYTES_PER_SECOND
from bench.results import Goal, Measure, Options, Row, Wrong

_SEED = 1
_OF_THE_FLOOR = Goal(at_least=0.7)
_OF_KSMD = Goal(at_least=25)
_OF_UPM = Goal(at_least=10)


def measure(options: Options) -> Row:
    """Measure small pages, with the peers beside."""
    with ksmd.borrowed() if options.ksmd else nullcontext("not asked for") as without:
        rounds = compare(options, huge=False, peer=without is None)
    row = Row(rounds.measures(_OF_THE_FLOOR))
    row.measures += [rounds.against_upm(), *rounds.in_new_processes()]
    if without:
        row.notes.append(f"ksmd was not measured: {without}")
    else:
        row.measures += rounds.against_ksmd()
    return row


class Rounds:
    """What the rounds gave."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.first_seconds = 0.0  # the first copy, in the other process
        self.floor: list[Times] = []
        self.ours: list[Times] = []
        self.new: list[float] = []  # seconds of the call in a process just started
        self.ksmd: list[ksmd.Work] = []

    def measures(self, goal: Goal) -> list[Measure]:
        """Hold ours against the floor."""
        return clock.against_floor(self.size, self.floor, self.ours, goal)

    def in_new_processes(self) -> list[Measure]:
        """Give the same for a process that never merged before.

        It has to connect, and what it meets in the pool it meets the first time.
        """
        pairs = zip(self.floor, self.new, strict=True)
        ratios = [low.merge / seconds for low, seconds in pairs]
        return [
            clock.rate("first_call", "first call of a process", self.size, self.new),
            Measure("first_call_to_floor_ratio", "  of the floor", ratios),
        ]

    def against_upm(self) -> Measure:
        """Hold ours against what was published for UPM."""
        ratios = [
            self.size / our.merge / UPM_MERGE_BYTES_PER_SECOND for our in self.ours
        ]
        return Measure("merge_to_upm_ratio", "  merge, of UPM's rate", ratios, _OF_UPM)

    def against_ksmd(self) -> list[Measure]:
        """Hold ours against ksmd, which has to look at both copies."""
        pairs = list(zip(self.ksmd, self.ours, strict=True))
        alone = [peer.seconds / our.merge for peer, our in pairs]
        both = [peer.seconds / (self.first_seconds + our.merge) for peer, our in pairs]
        cpu = [peer.cpu_seconds for peer in self.ksmd]
        return [
            clock.rate(
                "ksmd", "ksmd wide open", self.size, [p.seconds for p in self.ksmd]
            ),
            Measure("ksmd_cpu_seconds", "  its CPU time", cpu),
            Measure("merge_to_ksmd_ratio", "  merge, of ksmd", alone, _OF_KSMD),
            Measure("both_copies_to_ksmd_ratio", "  both copies, of ksmd", both),
        ]


def compare(options: Options, *, huge: bool, peer: bool = False) -> Rounds:
    """Measure floor, ours and others in turns, after one round that does not count."""
    size = options.size_bytes
    rounds = Rounds(size)
    with contextlib.ExitStack() as stack:
        memory.warm_up(4 * size)
        stack.enter_context(daemon.own())
        other = stack.enter_context(worker.holding(size, _SEED))
        rounds.first_seconds = other.merge("stored")
        pool = floor.Pool(size, _SEED)
        for count in range(options.rounds + 1):
            low, our = _floor(pool, huge), _ours(pool, huge)
            if count:
                rounds.floor.append(low)
                rounds.ours.append(our)
                if not huge:
                    rounds.new.append(_in_new_process(size))
                if peer:
                    rounds.ksmd.append(ksmd.merge(pool.words))
    return rounds


def _in_new_process(size: int) -> float:
    with worker.holding(size, _SEED) as new:
        return new.merge("merged")


def _floor(pool: floor.Pool, huge: bool) -> Times:
    return clock.timed(_copy(pool, huge), pool.cover)


def _ours(pool: floor.Pool, huge: bool) -> Times:
    array = _copy(pool, huge)
    reports: list[sksm.MergeReport] = []
    times = clock.timed(array, lambda array: reports.append(sksm.merge(array)))
    if reports[0].merged != memory.pages(array):
        raise Wrong(f"not all of {memory.pages(array)} pages merged: {reports[0]}")
    if not floor.equal(array, pool.words):
        raise Wrong("the bytes changed")
    return times


def _copy(pool: floor.Pool, huge: bool) -> Words:
    array = memory.buffer(pool.words.nbytes, huge=huge)
    array[:] = pool.words
    if huge:
        memory.require_huge(array)
    return array
