"""`sksmd`: the scanner as a service, or one of the stores it merges by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from sksm.commands import options
from sksm.commands.explaining import Explained
from sksm.daemon import main as store


@click.command(
    "sksmd",
    cls=Explained,
    params=list(store.main.params),
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Example: sksmd --config ./config.toml",
)
@click.option(
    "--config",
    "file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Read this configuration, and not those that are always looked for.",
)
@options.debug_option
@click.pass_context
def main(context: click.Context, /, file: Path | None, **given: Any) -> None:
    """Merge what running programs hold twice, as the configuration says.

    It works until SIGTERM. SIGHUP has it read the configuration anew.

    With --listen-fd, --detach, --idle or --domain it is a store instead, which owns
    the pool of one user's shared pages. Whoever merges starts that when it is needed,
    so there is seldom a reason to do so by hand.
    """
    if not _is_store(context):
        from sksm.commands import service  # noqa: PLC0415  a store does without

        service.serve(file, context.obj)
    elif file:
        raise click.UsageError("a store has no configuration")
    else:
        context.invoke(store.main, **given)


def _is_store(context: click.Context) -> bool:
    # From the environment, SKSM_IDLE_SECONDS is meant for the stores we start.
    given = any(
        context.get_parameter_source(name) == ParameterSource.COMMANDLINE
        for name in ("listen_fd", "detach", "idle", "domain")
    )
    return given or store.is_activated()


if __name__ == "__main__":
    main()
