"""The one place that prints errors and chooses the exit code."""

from __future__ import annotations

import errno
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

import click

from sksm.commands import options
from sksm.errors import NotPermitted, SksmError


class Explained(click.Command):
    """A program that says in one line what went wrong."""

    def main(  # type: ignore[override]
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        **extra: Any,
    ) -> NoReturn:
        """Run, print what went wrong if anything did, and exit."""
        session = options.Session(str(self.name))
        extra.update(standalone_mode=False, obj=session)
        try:
            # click itself ends quietly, with 1, when its reader has gone.
            code = super().main(args, prog_name or self.name, **extra)
        except Exception as error:
            code = _explain(error, session)
        sys.exit(code if isinstance(code, int) else options.DONE)


def _explain(error: Exception, session: options.Session) -> int:
    """Say on stderr what went wrong. Gives the exit code."""
    if isinstance(error, click.Abort):
        return options.INTERRUPTED
    if isinstance(error, click.ClickException):
        error.show()
        return error.exit_code
    if session.debug:
        traceback.print_exception(error)
    message, code = _message(error)
    session.say(message)
    return code


def _message(error: Exception) -> tuple[str, int]:
    if isinstance(error, SksmError):
        return str(error), error.exit_code
    if isinstance(error, OSError):
        denied = error.errno in (errno.EPERM, errno.EACCES)
        code = NotPermitted.exit_code if denied else options.FAILED
        return str(error), code
    if isinstance(error, MemoryError):
        return "out of memory", options.FAILED
    kind = type(error).__name__
    hint = "this is a bug in sksm; --debug shows where"
    return f"{kind}: {error} ({hint})", options.FAILED
