"""`sksm`, the command line."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import click

from sksm.commands import options
from sksm.commands.explaining import Explained

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


class Program(Explained, click.Group):
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


@click.command(
    "sksm",
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
    from sksm.commands import knobs  # noqa: PLC0415

    if knobs.repair():
        click.echo(f"sksm: {knobs.REPAIRED}", err=True)


if __name__ == "__main__":
    main()
