"""What became of each of several processes that something was done to."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
from collections.abc import Iterator

from sksm.errors import Busy, SksmError
from sksm.estimate import Worth
from sksm.process import permission
from sksm.report import MergeReport


@dataclasses.dataclass(slots=True)
class Outcome:
    """What became of one process."""

    pid: int
    name: str
    engine: str = ""  # by which it was merged
    worth: Worth | None = None  # what was found in it
    report: MergeReport = dataclasses.field(default_factory=MergeReport)
    hot_bytes: int = 0  # with an equal page elsewhere, and left alone: written to
    stops: list[float] = dataclasses.field(default_factory=list)
    unmerged_bytes: int = 0  # private again
    refusal: str = ""  # why it was left alone as a whole
    error: SksmError | None = None
    pss_before: int = 0
    pss_after: int = 0

    @property
    def failed(self) -> bool:
        """Whether it was left alone, or given up."""
        return bool(self.refusal or self.error)


@contextlib.contextmanager
def failures_of(outcome: Outcome) -> Iterator[None]:
    """Keep what goes wrong with one process from the others."""
    try:
        yield
    except SksmError as error:
        outcome.error = error
    except BlockingIOError as error:
        outcome.error = Busy(f"process {outcome.pid}: {error}")
    except ConnectionError:
        raise
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:  # what it is, or may do, forbids it
            outcome.refusal = error.strerror or ""
        else:
            outcome.error = permission.explain(outcome.pid, error)
