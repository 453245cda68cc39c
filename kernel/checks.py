"""What a kernel must pass, and how it did."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from kernel.building import OUR_TEST, SELF_TESTS, Built
from kernel.guest import Done

ROOT = Path(__file__).parent.parent
CONTRACT, ENGINE, SCANNER, YAMA = "contract", "engine", "scanner", "yama"
DOCTOR = "doctor"
# As run_vmtests.sh calls them.
_KSM_TESTS = (
    "-H -s 100",
    "-P -s 100",
    "-M -p 10",
    "-U",
    "-Z -p 10 -z 0",
    "-Z -p 10 -z 1",
)
# -U looks at what the scan under way leaves when it ends, which may have passed the
# pages before they were written: on a busy machine it fails one time in four, with the
# patches or without. The last time counts.
_TRIES: tuple[str | Path, ...] = (
    "sh",
    "-c",
    'for _ in 1 2 3 4 5; do "$@" && exit; done; exit 1',
    "tries",
)

_PYTEST = ("-p", "no:cacheprovider", "-p", "no:randomly", "-q", "-o", "limit=600")
_REAL = ("-k", "not emulated")  # here is what other kernels emulate
_BY_CALL = ("-k", "kernel and not emulated")  # and not by ksmd: it takes long enough

# `sksm run`, where it may trace its descendants only: the program, and what it starts.
_BELOW = (
    "-k",
    "below_is or (below and dynamic and (equal_pages or has_it_too))",
)
# With Yama's scope 1, and without what lets root trace anybody.
_UNDER_YAMA: tuple[str | Path, ...] = (
    "sh",
    "-c",
    'echo 1 > /proc/sys/kernel/yama/ptrace_scope && exec "$@"',
    "under",
    "setpriv",
    "--bounding-set=-sys_ptrace,-sys_admin",
    "--inh-caps=-sys_ptrace,-sys_admin",
)

# A module of this checkout, by this Python.
_HERE: tuple[str | Path, ...] = (
    "env",
    "-C",
    ROOT,
    "SKSM_REQUIRE_KERNEL=1",
    sys.executable,
    "-m",
)
# What pytest runs there, for a reader.
_TITLES = {
    CONTRACT: "engine contract",
    ENGINE: "kernel engine",
    SCANNER: "scanner, in place",
    YAMA: "sksm run, under Yama",
}
_MEASURED_MIB = 64

_TOTALS = re.compile(
    r"^(# Planned tests != .*\n)?"
    r"# Totals: pass:(\d+) fail:(\d+) xfail:\d+ xpass:\d+ skip:(\d+) error:(\d+)$",
    re.MULTILINE,
)

Commands = dict[str, Sequence[str | Path]]


@dataclasses.dataclass(frozen=True, slots=True)
class Verdict:
    """How a command did: counts, and its lines that say what went wrong."""

    passed: int
    failed: int
    skipped: int
    complaints: tuple[str, ...]

    @property
    def right(self) -> bool:
        """Did all of it pass, and something?"""
        return bool(self.passed) and not self.failed and not self.skipped

    def __str__(self) -> str:
        text = f"{self.passed} passed"
        text += f", {self.failed} failed" if self.failed else ""
        return text + (f", {self.skipped} skipped" if self.skipped else "")


def our_test(built: Built) -> Commands:
    """The self-test that the patches bring."""
    return {OUR_TEST: [built.folder / OUR_TEST]}


def upstream(built: Built) -> Commands:
    """KSM's own self-tests, unchanged."""
    folder = built.folder
    commands: Commands = {"ksm_functional_tests": [folder / "ksm_functional_tests"]}
    for number, words in enumerate(_KSM_TESTS):
        command = (*_TRIES, folder / "ksm_tests", *words.split())
        commands[f"ksm_tests_{number}"] = command
    return commands


def is_upstream(name: str) -> bool:
    """Say whether a command is one of KSM's own self-tests."""
    return name.startswith(SELF_TESTS)


def project() -> Commands:
    """The project's own: every engine's contract, and the kernel engine in use."""
    pytest: list[str | Path] = [*_HERE, "pytest", *_PYTEST]
    return {
        CONTRACT: [*pytest, *_REAL, "tests/engines/test_engines.py"],
        ENGINE: [*pytest, *_REAL, "tests/engines/test_kernel_engine.py"],
        SCANNER: [*pytest, *_BY_CALL, "tests/scanner/test_in_place.py"],
        YAMA: [*_UNDER_YAMA, *pytest, *_BELOW, "tests/run"],
        DOCTOR: [*_HERE, "sksm.commands.main", "doctor"],
    }


def measurements() -> Commands:
    """What docs/kernel.md tells of: three ways beside each other; the experiment."""
    cases = ("plain", "patched", "merged", "ksmd_wide_open")
    return {
        "ways": [*_HERE, "kernel.measuring", str(_MEASURED_MIB)],
        "experiment": [*_HERE, "bench.experiment", *cases],
    }


def judge(name: str, done: Done) -> Verdict:
    """Read what a command said of itself."""
    verdict = _pytest(done) if name in _TITLES else _tap(done)
    if done.status and not verdict.failed:  # it broke off
        lines = tuple(done.output.splitlines()[-5:])
        return dataclasses.replace(verdict, failed=1, complaints=lines)
    return verdict


def title(name: str) -> str:
    """Say what a command is, to a reader."""
    if name.startswith("ksm_tests_"):
        return f"ksm_tests {_KSM_TESTS[int(name.rpartition('_')[2])]}"
    return _TITLES.get(name, name)


def _tap(done: Done) -> Verdict:
    """Read the Test Anything Protocol by its last totals.

    A plan that was not kept is a failure, and so are totals that are missing. A
    test may run others, which tell theirs before.
    """
    lines = re.findall(r"^(?:not ok|ok) \d+.*$|^Bail out!.*", done.output, re.MULTILINE)
    complaints = [line for line in lines if line[:2] != "ok" or "# SKIP" in line]
    if not (told := list(_TOTALS.finditer(done.output))):
        return Verdict(0, 1, 0, (*complaints, "it told no totals"))
    plan, *numbers = told[-1].groups()
    passed, failed, skipped, errors = map(int, numbers)
    if plan:
        complaints.append(plan.strip())
        failed += 1
    return Verdict(passed, failed + errors, skipped, tuple(complaints))


def _pytest(done: Done) -> Verdict:
    tail = done.output.splitlines()[-1] if done.output else ""
    counts = {what: int(n) for n, what in re.findall(r"(\d+) (\w+)", tail)}
    complaints = re.findall(r"^(?:FAILED|ERROR|SKIPPED) .*$", done.output, re.MULTILINE)
    return Verdict(
        counts.get("passed", 0),
        counts.get("failed", 0) + counts.get("error", 0) + counts.get("errors", 0),
        counts.get("skipped", 0),
        tuple(complaints),
    )


def differences(one: Mapping[str, Verdict], other: Mapping[str, Verdict]) -> list[str]:
    """Say which tests did not do the same on two kernels."""
    return [
        f"{title(name)}: {one[name]}; {other[name]}"
        for name in one
        if str(one[name]) != str(other[name])
    ]
