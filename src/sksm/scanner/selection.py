"""Which processes a scanner watches."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import NamedTuple

import psutil

from sksm.process import status
from sksm.process.status import Glance

CGROUP = r"^/(?!sys/fs/cgroup(/|$))"  # a path as in /proc/PID/cgroup

_OURS = ("sksm", "sksmd")
_QEMU = ("qemu-system-*", "qemu-kvm", "kvm")
_UNITS = (  # systemd.unit(5)
    *(".service", ".scope", ".slice", ".socket", ".target", ".timer", ".path"),
    *(".mount", ".automount", ".swap", ".device"),
)
_KEPT = 15  # bytes of a name: TASK_COMM_LEN, less the zero at its end
_TRUSTED_S = 600.0
_TICKS = os.sysconf("SC_CLK_TCK")
# It ended, or we may not look at it.
_UNSEEN = (FileNotFoundError, ProcessLookupError, PermissionError)


@dataclass(frozen=True, slots=True)
class Rule:
    """Criteria for processes. All that are given must hold.

    Attributes:
        pid: that process, and all that come of it.
        name: a shell pattern for its name, as /proc/PID/comm has it. Of a name that
            may have been cut there, the whole is tried, too, where its arguments
            tell it.
        uid: the user with whose rights it acts.
        cgroup: its control group, or one above that, in any hierarchy.
        unit: a shell pattern for its systemd unit, or one above that. Without a
            unit's ending, a service is meant.
        qemu: it is a QEMU system emulator. Only the guest's memory is to be watched.
        domain: no criterion, but a name that processes have in common which may
            share although their users differ.

    Raises:
        ValueError: there is no criterion, or one that never holds.
    """

    pid: int | None = None
    name: str | None = None
    uid: int | None = None
    cgroup: str | None = None
    unit: str | None = None
    qemu: bool = False
    domain: str | None = None

    def __post_init__(self) -> None:
        given = (self.pid, self.name, self.uid, self.cgroup, self.unit)
        if not self.qemu and all(criterion is None for criterion in given):
            raise ValueError(
                "a rule takes at least one of pid, name, uid, cgroup, unit and qemu"
            )
        if self.cgroup is not None and not re.match(CGROUP, self.cgroup):
            raise ValueError(
                'a cgroup is a path as in /proc/PID/cgroup, as "/system.slice", not '
                f"{self.cgroup!r}"
            )


class _Known(NamedTuple):
    """What was found out about a process."""

    glance: Glance
    kin: frozenset[int]
    rule: Rule | None
    again_s: float  # when it is to be looked at again, though it seems the same

    def holds(self, glance: Glance, now_s: float) -> bool:
        same = self.glance.start == glance.start and self.glance.name == glance.name
        return same and now_s < self.again_s


class Selection:
    """The processes that rules match, found again and again.

    What was found out about a process is kept until it has another name, which it
    takes when it executes another program, or is twice as old: users and control
    groups change early in a life. After ten minutes it is looked at anyway.

    A pid in a rule means the process that has it when the selection is made. What
    comes of that stays in, also when processes in between end.

    Args:
        rules: which to watch. The first that matches a process has it.
        excluded: which not to watch, whatever `rules` say.
    """

    def __init__(self, rules: Sequence[Rule], excluded: Sequence[Rule] = ()) -> None:
        self._rules, self._excluded = tuple(rules), tuple(excluded)
        pids = {rule.pid for rule in (*rules, *excluded) if rule.pid is not None}
        self._roots = {pid: glance.start for pid, glance in _glances(pids)}
        self._known: dict[int, _Known] = {}

    def find(self) -> dict[int, Rule]:
        """Name the processes to watch now, each with the rule that wants it.

        Never among them: processes of sksm itself, threads of the kernel, zombies,
        and what we may not look at.
        """
        now_s = _uptime_s()
        everybody = dict(_glances(psutil.pids()))
        known = {}
        for pid, glance in everybody.items():
            if glance.runs_programs:
                kept = self._known.get(pid)
                if kept is None or not kept.holds(glance, now_s):
                    kept = self._look(pid, everybody, now_s)
                known[pid] = kept
        self._known = known
        return {pid: one.rule for pid, one in known.items() if one.rule}

    def _look(self, pid: int, everybody: dict[int, Glance], now_s: float) -> _Known:
        glance = everybody[pid]
        kin = self._ancestors(pid, everybody) if self._roots else frozenset[int]()
        rule = None
        with contextlib.suppress(*_UNSEEN):
            rule = self._wanted_by(_Process(pid, glance.name, kin))
        age_s = max(0.0, now_s - glance.start / _TICKS)
        return _Known(glance, kin, rule, now_s + min(age_s, _TRUSTED_S))

    def _wanted_by(self, process: _Process) -> Rule | None:
        for rule in self._rules:
            if process.fits(rule):
                barred = any(process.fits(other) for other in self._excluded)
                return None if barred or process.is_ours else rule
        return None

    def _ancestors(self, pid: int, everybody: dict[int, Glance]) -> frozenset[int]:
        """Name those processes of rules that one comes of, or is."""
        found: set[int] = set()
        passed = set()  # each was looked at in its own moment: there may be circles
        while pid in everybody and pid not in passed:
            passed.add(pid)
            glance = everybody[pid]
            if self._roots.get(pid) == glance.start:
                found.add(pid)
            known = self._known.get(pid)
            if known and known.glance.start == glance.start:
                found |= known.kin
            pid = glance.parent
        return frozenset(found)


@dataclass
class _Process:
    """What criteria ask about a process, each read when first asked.

    Raises:
        OSError: from everything; the process ended, or may not be looked at.
    """

    pid: int
    name: str
    kin: frozenset[int]

    def fits(self, rule: Rule) -> bool:
        return (
            (rule.pid is None or rule.pid in self.kin)
            and (rule.name is None or _any_matches(self.names, rule.name))
            and (rule.uid is None or rule.uid == self.uid)
            and (rule.cgroup is None or self._is_within(rule.cgroup))
            and (rule.unit is None or _any_matches(self.units, _unit(rule.unit)))
            and (not rule.qemu or self.is_qemu)
        )

    @functools.cached_property
    def arguments(self) -> list[str]:
        return status.arguments(self.pid)

    @functools.cached_property
    def names(self) -> list[str]:
        """The name, and the longer ones of which it may be the beginning."""
        kept = os.fsencode(self.name)
        if len(kept) < _KEPT:
            return [self.name]
        # A script's interpreter comes before it.
        called = [os.path.basename(argument) for argument in self.arguments[:2]]
        return [self.name, *(x for x in called if os.fsencode(x).startswith(kept))]

    @functools.cached_property
    def uid(self) -> int:
        return status.uid(self.pid)

    @functools.cached_property
    def cgroups(self) -> list[str]:
        return status.cgroups(self.pid)

    @functools.cached_property
    def units(self) -> list[str]:
        # systemd escapes names that the kernel has a use for by one "_".
        parts = {part for path in self.cgroups for part in path.split("/")}
        return [part.removeprefix("_") for part in parts]

    @functools.cached_property
    def is_qemu(self) -> bool:
        if any(fnmatchcase(self.name, pattern) for pattern in _QEMU):
            return True
        program = os.path.basename(status.program(self.pid))
        return any(fnmatchcase(program, pattern) for pattern in _QEMU)

    @property
    def is_ours(self) -> bool:
        called = {os.path.basename(argument) for argument in self.arguments[:2]}
        named = not called.isdisjoint(_OURS) or "sksm.daemon" in self.arguments
        return named or self.pid == os.getpid()

    def _is_within(self, cgroup: str) -> bool:
        above = cgroup.rstrip("/") + "/"
        return any((path + "/").startswith(above) for path in self.cgroups)


def _glances(pids: Sequence[int] | set[int]) -> Iterator[tuple[int, Glance]]:
    for pid in pids:
        with contextlib.suppress(*_UNSEEN):
            yield pid, status.glance(pid)


def _any_matches(names: Sequence[str], pattern: str) -> bool:
    return any(fnmatchcase(name, pattern) for name in names)


def _unit(name: str) -> str:
    return name if name.endswith(_UNITS) else f"{name}.service"


def _uptime_s() -> float:
    """Tell the time by the clock of /proc/PID/stat."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
