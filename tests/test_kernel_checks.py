"""What `make kernel-test` makes of what guests say: nothing wrong goes unseen."""

from pathlib import Path

import pytest

from kernel import checks
from kernel.__main__ import upstream_problems
from kernel.guest import Done, Visit

pytestmark = [pytest.mark.check, pytest.mark.pure]

TAP = "TAP version 13\n1..2\nok 1 first\n{}\n"
TOTALS = "# Totals: pass:{} fail:{} xfail:0 xpass:0 skip:{} error:0\n"
PLAN = "# Planned tests != run tests (2 != 1)"
PASSED = TAP.format("ok 2 second") + TOTALS.format(2, 0, 0)
SKIPPED = TAP.format("ok 2 # SKIP no swap") + TOTALS.format(1, 0, 1)


def judged(output, status=0, name="ksm_merge"):
    return checks.judge(name, Done(status, output))


def test_all_passed_is_right():
    """And said in a word."""
    verdict = judged(PASSED)
    assert verdict.right
    assert str(verdict) == "2 passed"


@pytest.mark.parametrize(
    ("second", "totals", "text"),
    [
        ("not ok 2 second", (1, 1, 0), "1 passed, 1 failed"),
        ("ok 2 # SKIP no swap", (1, 0, 1), "1 passed, 1 skipped"),
        (PLAN, (1, 0, 0), "1 passed, 1 failed"),
    ],
)
def test_what_failed_or_skipped_is_not(second, totals, text):
    """And the line that says so is handed on."""
    verdict = judged(TAP.format(second) + TOTALS.format(*totals))
    assert not verdict.right
    assert str(verdict) == text
    assert verdict.complaints == (second,)


def test_what_broke_off_told_no_totals():
    """However much had passed by then."""
    verdict = judged(TAP.format("Bail out! mmap"))
    assert not verdict.right
    assert verdict.complaints == ("Bail out! mmap", "it told no totals")


def test_a_test_may_run_another():
    """The totals of that one, and its plan, come before."""
    inner = f"ok 1 inner\n{PLAN}\n" + TOTALS.format(1, 0, 0)
    assert str(judged(TAP.format(inner) + TOTALS.format(2, 0, 0))) == "2 passed"


@pytest.mark.parametrize("output", ["", "no such file", "TAP version 13\n1..2\n"])
def test_nothing_passed_is_wrong(output):
    """Whatever the status."""
    assert not judged(output).right
    assert not judged(output, status=127).right


def test_a_status_counts_also_where_all_passed():
    """It may have been killed after the last line."""
    assert not judged(PASSED, status=139).right


@pytest.mark.parametrize(
    ("tail", "right"),
    [
        ("3 passed in 1.0s", True),
        ("1 failed, 2 passed in 1.0s", False),
        ("2 passed, 1 skipped in 1.0s", False),
        ("2 passed, 1 error in 1.0s", False),
        ("3 skipped in 1.0s", False),
    ],
)
def test_pytest_is_read_by_its_last_line(tail, right):
    assert judged(f"...\n{tail}", name=checks.CONTRACT).right is right


def test_kernels_are_held_against_each_other():
    """By counts: a skip more is a difference."""
    one = {"ksm_tests_0": judged(PASSED)}
    other = {"ksm_tests_0": judged(SKIPPED)}
    assert not checks.differences(one, one)
    (line,) = checks.differences(one, other)
    assert line == "ksm_tests -H -s 100: 2 passed; 1 passed, 1 skipped"


def test_ksms_own_tests_may_fail_where_they_do_without_the_patches():
    """And not where nobody looked."""
    skipped = {"ksm_tests_0": judged(SKIPPED), "ksm_merge": judged(SKIPPED)}
    assert not upstream_problems({"patched": skipped, "unpatched": skipped})
    (line,) = upstream_problems({"patched": skipped})
    assert line == "patched, ksm_tests -H -s 100: 1 passed, 1 skipped"
    right = {"ksm_tests_0": judged(PASSED)}
    assert not upstream_problems({"patched": right})
    (line,) = upstream_problems({"patched-kasan": skipped, "unpatched": right})
    assert line.startswith("patched-kasan, not as without the patches: ksm_tests -H")


@pytest.mark.parametrize(
    "line",
    [
        "[    1.0] WARNING: CPU: 0 PID: 1 at mm/ksm.c:2345 ksm_merge+0x1/0x2",
        "WARNING: possible circular locking dependency detected",
        "BUG: KASAN: slab-use-after-free in drop_offer+0x10/0x20",
        "BUG: sleeping function called from invalid context at mm/ksm.c:1",
        "kernel BUG at mm/ksm.c:100!",
        "INFO: task ksm_merge:10 blocked for more than 120 seconds.",
        "rcu: INFO: rcu_sched self-detected stall on CPU",
        "Oops: general protection fault, 0000 [#1] SMP",
        "Kernel panic - not syncing: Attempted to kill init!",
    ],
)
def test_the_kernels_complaints_are_found(line):
    assert Visit({}, f"Linux version 6.12\n{line}\nreboot\n").splats == [line]


def test_an_ordinary_log_has_none():
    """Lines of a boot that speak of the same things."""
    log = (
        "Lock dependency validator: Copyright\nrcu: RCU lockdep checking is enabled.\n"
    )
    log += (
        "kasan: KernelAddressSanitizer initialized (generic)\nNMI watchdog: Enabled\n"
    )
    assert not Visit({}, log).splats


def test_what_is_run_of_the_projects_tests_is_there():
    """Where it lies, by the tree of this checkout."""
    root = Path(checks.__file__).parents[1]
    words = [str(word) for line in checks.project().values() for word in line]
    named = [word for word in words if word.startswith("tests/")]
    assert len(named) == 4
    assert [word for word in named if not (root / word).exists()] == []
