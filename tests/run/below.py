"""`sksm`, told that Yama lets it trace its descendants only: `sksm run` goes above CMD.

Where that is so anyway, nothing changes. On a kernel that has MADV_MERGE, which needs
no answer of ours, calls are answered all the same.
"""

import sys
from pathlib import Path

from sksm import running
from sksm.commands.main import main
from sksm.linux.features import Feature, missing
from sksm.process import permission


def filtered() -> bool:
    """Say whether we run under a filter of system calls: another `sksm run`."""
    return "\nSeccomp:\t2\n" in Path("/proc/self/status").read_text()


permission.only_descendants = lambda: True
if missing(Feature.MADV_MERGE) is None:
    running.answered = filtered
sys.exit(main())
