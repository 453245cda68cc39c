"""ksmd's settings, when somebody who had borrowed them was killed."""

from __future__ import annotations

import contextlib
import os

from sksm.daemon import runtime
from sksm.errors import SksmError
from sksm.linux import ksm

REPAIRED = "gave back the settings of ksmd, left changed"


def repair() -> bool:
    """Give them back; whether there was anything to do. For root only."""
    if os.geteuid() != 0:
        return False
    with contextlib.suppress(OSError, SksmError):
        return ksm.repair(runtime.directory() / ksm.STATE_NAME)
    return False
