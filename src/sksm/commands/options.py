"""What every command takes, and what they tell each other."""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

from sksm.errors import SksmError

_F = TypeVar("_F", bound=Callable[..., Any])

# Exit codes. Errors bring their own (`sksm.errors`).
DONE, FAILED, USAGE, NOTHING_HERE = 0, 1, 2, 3
INTERRUPTED = 128 + signal.SIGINT

ENGINE = click.Choice(["auto", "pool", "ksm", "kernel"])
PID = click.IntRange(min=1, max=2**31 - 1)  # pid_t


@dataclasses.dataclass(slots=True)
class Session:
    """One run of a program."""

    program: str
    debug: bool = False  # show tracebacks
    log: Callable[[str], None] | None = None  # takes what it says, in place of stderr

    def say(self, message: str) -> None:
        """Say what ends the program."""
        if self.log:
            self.log(message)
        else:
            click.echo(f"{self.program}: {message}", err=True)


def _set_debug(context: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        context.find_root().obj.debug = True


debug_option = click.option(
    "--debug",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_set_debug,
    help="Show where an error came from.",
)


def output_options(function: _F) -> _F:
    """Give a command `--json` (as `as_json`) and `--debug`."""
    json_option = click.option(
        "--json", "as_json", is_flag=True, help="Print one JSON object instead of text."
    )
    return json_option(debug_option(function))


def ended_by(number: int) -> int:
    """Give the exit code of what works until a signal ends it.

    SIGTERM is how that is meant to be; others give what a shell makes of them.
    """
    return DONE if number == signal.SIGTERM else 128 + number


def complain(errors: Sequence[SksmError], *, of: int) -> None:
    """Name on stderr what went wrong with some of `of` processes.

    Raises:
        SksmError: the last error, if there is one for each.
    """
    told = errors if len(errors) < of else errors[:-1]
    for error in told:
        click.echo(f"sksm: {error}", err=True)
    if len(told) < len(errors):
        raise errors[-1]
