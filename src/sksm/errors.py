"""What can go wrong, in the words of somebody who wants to fix it.

`OSError` rises unchanged from the kernel up to the public edge and becomes one
of these there, once. `exit_code` is what the commands end with.
"""

from __future__ import annotations


class SksmError(Exception):
    """Something sksm could not do. The message names the way out."""

    exit_code = 1


class Misconfigured(SksmError):
    """A file of settings is wrong. The message names the file, the line, the fix."""

    exit_code = 2


class Unsupported(SksmError):
    """This kernel, or this memory, does not allow it."""

    exit_code = 3


class NotToBeShared(Unsupported):
    """It would share with somebody with whom it may not."""


class NotPermitted(SksmError):
    """It could be done with a permission that this process does not have."""

    exit_code = 4


class DaemonUnreachable(SksmError):
    """No daemon answers, and none could be started."""

    exit_code = 5


class Busy(SksmError):
    """A process could not be stopped just now; later it may."""


class ProcessGone(SksmError):
    """The process ended meanwhile: an ordinary outcome."""

    exit_code = 1
