"""The n-th system call of a merge fails, for every n, in every way it can."""

import contextlib
import gc
import itertools
import os
import random
import threading
import traceback
from pathlib import Path

import pytest

import sksm
from sksm import session
from sksm.errors import SksmError
from sksm.pages import LAST_PAGE
from sksm.report import MergeReport
from tests.faults.scenes import SCENES, Scene
from tests.faults.seam import WAYS, Counter, Fault, Seam
from tests.support import count_fds, in_child

SETTLED = ("merged", "zero", "stored", "already", "unique")


def reserved_mappings():
    """Count what only a scratch area looks like, or a twin that did not move."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    mine = [line.split() for line in lines]
    return sum(
        "sksm-pool" in words[-1] or (words[1] == "---p" and words[4] == "0")
        for words in mine
    )


@contextlib.contextmanager
def company(threads):
    """Run with so many threads that do nothing."""
    near, far = os.pipe()
    for _ in range(threads):
        threading.Thread(target=os.read, args=(near, 1), daemon=True).start()
    try:
        yield
    finally:
        os.close(far)


def disturbed(seam, scene, hook):
    """Play a scene with a fault; give what came of it, or None after a clear error."""
    seam.hook = hook
    try:
        with contextlib.suppress(SksmError):
            return scene.play()
    finally:
        seam.hook = lambda name: None
        session.current.close()


def check(seam, arrange, fault):
    """One fault, and everything that must hold after it."""
    before = reserved_mappings()
    scene = Scene(arrange)
    fds = count_fds()

    outcome = disturbed(seam, scene, fault)

    assert scene.intact(), "bytes changed"
    assert count_fds() == fds, "a descriptor stayed open"
    if isinstance(outcome, MergeReport):
        assert outcome.scanned == len(scene.target.rows)
        assert sum(outcome.reasons.values()) == outcome.refused
    again = sksm.merge(scene.target.rows)
    settled = sum(getattr(again, name) for name in SETTLED)
    assert settled + again.reasons.get(LAST_PAGE, 0) == again.scanned, again
    assert scene.intact(), "bytes changed by the next merge"
    scene.end()
    assert count_fds() == fds, "a descriptor stayed open after the next merge"
    # Of memory that cannot be unmapped nobody can get rid.
    leaked = reserved_mappings() - before
    assert leaked == 0 or fault.name == "munmap", f"{leaked} mappings leaked"


def faults(thorough):
    """Give every fault, call by call, until one was not met; or every third call's."""
    chance = random.Random(os.urandom(8))
    for number in itertools.count(0 if thorough else chance.randrange(3)):
        if not thorough and chance.randrange(3):
            continue
        met = False
        for way, for_ever in itertools.product(range(WAYS), (False, True)):
            if for_ever and way and not thorough:
                continue
            yield (fault := Fault(number, way, for_ever=for_ever))
            if fault.name is None:
                break
            met = True
        if not met:
            return


def loop(patch, arrange, threads, thorough):
    seam, wrong = Seam(patch), []
    with company(threads):
        for _ in range(3):  # caches fill
            scene, counter = Scene(arrange), Counter()
            disturbed(seam, scene, counter)
            scene.end()
        assert counter.count > 10, "nothing passed through the seam"
        gc.collect()
        gc.disable()
        for fault in faults(thorough):
            try:
                check(seam, arrange, fault)
            except Exception as error:
                trace = "".join(traceback.format_tb(error.__traceback__)[-3:])
                wrong.append(f"{fault}: {error!r}\n{trace}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("threads", [0, 1], ids=["alone", "threads"])
@pytest.mark.parametrize("arrange", SCENES, ids=lambda scene: scene.__name__)
def test_no_failing_call_changes_a_byte_or_leaks_or_stays_unexplained(
    runtime, monkeypatch, arrange, threads
):
    """A clear error or a counted refusal; the next merge works."""
    in_child(lambda: loop(monkeypatch, arrange, threads, thorough=False))


@pytest.mark.slow
@pytest.mark.parametrize("threads", [0, 1], ids=["alone", "threads"])
@pytest.mark.parametrize("arrange", SCENES, ids=lambda scene: scene.__name__)
def test_no_call_that_keeps_failing_does_either(runtime, monkeypatch, arrange, threads):
    """The same with every failure also for ever."""
    in_child(lambda: loop(monkeypatch, arrange, threads, thorough=True))
