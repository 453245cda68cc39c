"""`sksm`: the one place that prints errors and chooses the exit code."""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

import click

from sksm.commands import options
from sksm.errors import NotPermitted, SksmError

_COMMANDS = (
    "demo",
    "estimate",
    "merge",
    "unmerge",
    "watch",
    "run",
    "stat",
    "doctor",
)  # in the order of their help


class Program(click.Group):
    """The group of subcommands, each imported when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """List the subcommands, the first one first."""
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a subcommand."""
        if cmd_name not in _COMMANDS:
            return None
        module = importlib.import_module(f"sksm.commands.{cmd_name}")
        command: click.Command = module.command
        return command

    def invoke(self, ctx: click.Context) -> Any:
        """Run the subcommand and flush, so that a broken pipe shows here."""
        result = super().invoke(ctx)
        sys.stdout.flush()
        return result

    def main(  # type: ignore[override]
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        **extra: Any,
    ) -> NoReturn:
        """Run, print what went wrong if anything did, and exit."""
        session = options.Session()
        extra.update(standalone_mode=False, obj=session)
        try:
            # click itself ends quietly, with 1, when its reader has gone.
            code = super().main(args, prog_name or "sksm", **extra)
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
    click.echo(f"sksm: {message}", err=True)
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


@click.command(
    cls=Program,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Example: sksm demo",
)
@click.version_option(package_name="sksm", message="sksm %(version)s")
@options.debug_option
def main() -> None:
    """Share equal memory pages between processes, at once and by request.

    Programs ask for it themselves, with sksm.merge(array); these commands show
    what it brings.
    """
    _repair_knobs()


def _repair_knobs() -> None:
    """Give ksmd's knobs back if a measurement was killed before it could."""
    if os.geteuid() != 0:
        return
    from sksm.daemon import runtime  # noqa: PLC0415
    from sksm.linux import ksm  # noqa: PLC0415

    with contextlib.suppress(OSError, SksmError):
        if ksm.repair(runtime.directory() / ksm.STATE_NAME):
            click.echo("sksm: gave back the settings of ksmd, left changed", err=True)


if __name__ == "__main__":
    main()
