"""Why so much of a process merges and no more: `sksm doctor PID`."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
from collections.abc import Iterable, Sequence

from sksm import pages
from sksm.commands import outlook
from sksm.engines import choice
from sksm.errors import SksmError
from sksm.estimate import Figures
from sksm.linux import ksm, maps
from sksm.linux.pagemap import Category, walk
from sksm.process import permission, status
from sksm.process.other import OtherProcess
from sksm.report import Step

UNIQUE = "different bytes"
MISALIGNED = "misaligned"
SHARED, MEMFD, TMPFS = "shared mapping", "shared memfd", "shared memory file"
ALREADY = "shares a frame already"
WORTH = "equal pages, and zeros"

# What each reason means for the user, and what would help.
_MEANING = {
    WORTH: ("would be merged", "sksm merge"),
    ALREADY: ("forked, merged, or the kernel's page of zeros", ""),
    UNIQUE: (
        "no equal page in the processes named",
        "name its siblings, too; separate programs: start them under setarch -R",
    ),
    MISALIGNED: (
        "equal bytes at other places within their pages",
        "allocate big arrays on page boundaries (sksm.empty)",
    ),
    SHARED: ("whoever maps it shares it already", ""),
    MEMFD: ("shared by its descriptor; only private memory merges", ""),
    TMPFS: ("shared by its name; only private memory merges", ""),
    "huge TLB pages": (
        "reserved huge pages never merge",
        "use transparent huge pages in place of hugetlbfs",
    ),
    "locked memory": ("mlock would be lost", "munlock it; sksm merge --engine ksm"),
    "sealed memory": ("may not be replaced", "sksm merge --engine ksm"),
    pages.WATCHED: ("somebody else holds its writers off", "end that one first"),
    pages.SWAPPED: ("nothing is read back for a merge", "swapoff, or wait"),
    pages.UNWRITTEN_FILE: ("every process that maps the file shares it already", ""),
    pages.LAST_PAGE: ("the mapping could grow, and show what lies behind", ""),
}


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """Memory of a process that has one thing in common."""

    what: str
    size_bytes: int
    meaning: str
    remedy: str


@dataclasses.dataclass(slots=True)
class Diagnosis:
    """What merging meets in one process."""

    pid: int
    name: str
    engine: str = ""  # that `auto` would choose; "" if none
    refusal: str = ""  # why none
    parts: list[Part] = dataclasses.field(default_factory=list)  # biggest first
    seccomp: str = "no filter"
    ksm: str = ""
    error: SksmError | None = None


def diagnose(pids: Sequence[int], step: Step) -> list[Diagnosis]:
    """Look at processes, compare them with each other, and try what a merge does.

    Nothing is changed. Each is stopped for a moment, to see whether it can be.
    """
    found = {pid: Diagnosis(pid, status.name(pid)) for pid in pids}
    seen = outlook.survey(pids, None, step)
    for failure in seen.failures:
        found[failure.pid].error = failure.error
    for one in seen.processes:
        diagnosis = found[one.pid]
        try:
            diagnosis.engine, diagnosis.refusal = choice.choose(one.pid)
            diagnosis.ksm = _ksm(one.pid)
            with OtherProcess(one.pid) as space:
                diagnosis.seccomp = _seccomp(space)
                shared = _shared_sizes(space)
            parts = _parts(one.figures, one.misaligned_bytes, shared)
            diagnosis.parts = sorted(parts, key=lambda part: -part.size_bytes)
        except OSError as error:
            diagnosis.error = permission.explain(one.pid, error)
        except SksmError as error:
            diagnosis.error = error
    return list(found.values())


def _parts(
    figures: Figures, misaligned_bytes: int, shared: dict[str, int]
) -> Iterable[Part]:
    worth = figures.twin_bytes + figures.zero_bytes
    sizes = {
        WORTH: worth,
        ALREADY: figures.already_bytes,
        MISALIGNED: misaligned_bytes,
        UNIQUE: figures.looked_bytes - worth - misaligned_bytes,
        **figures.refused_bytes,
    }
    sizes.pop(SHARED, None)  # told apart
    for what, nbytes in (sizes | shared).items():
        if nbytes > 0:
            yield Part(what, nbytes, *_MEANING.get(what, ("", "")))


def _shared_sizes(space: OtherProcess) -> dict[str, int]:
    """Measure what is in memory of shared mappings, by kind."""
    sizes: dict[str, int] = {}
    for mapping in space.mappings():
        if mapping.shared and "ht" not in mapping.flags:
            runs = walk(space.pagemap(), mapping.span, Category.PRESENT)
            kind = _kind(mapping)
            sizes[kind] = sizes.get(kind, 0) + sum(run.size for run, _ in runs)
    return sizes


def _kind(mapping: maps.Mapping) -> str:
    if mapping.path.startswith("/memfd:"):
        return MEMFD
    if mapping.path.startswith(("/dev/shm/", "/SYSV", "/dev/zero")):
        return TMPFS
    return SHARED


def _seccomp(space: OtherProcess) -> str:
    """Say whether a filter would let it do what a merge has it do."""
    if status.read(space.pid).get("Seccomp", "0") == "0":
        return "no filter"
    try:
        space.require_harmless()
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EBUSY):
            raise
        return error.strerror or str(error)
    return "its filter allows what a merge does"


def _ksm(pid: int) -> str:
    """Say what KSM has of a process, and whether it is at work at all."""
    if reason := ksm.obstacle():
        state = reason
    else:
        run = ksm.figures().get("run", 0)
        state = "ksmd runs" if run == 1 else "ksmd is off (run=0), as sksm leaves it"
    with contextlib.suppress(OSError):
        found = ksm.stat(pid)
        marked = found.get("ksm_mergeable", 0) or found.get("ksm_merge_any", 0)
        merged = found.get("ksm_merging_pages", 0)
        whose = f"{merged:,} pages merged" if marked else "none of its memory is marked"
        return f"{whose}; {state}"
    return state
