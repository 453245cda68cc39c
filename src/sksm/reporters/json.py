"""One object on stdout, for programs."""

from __future__ import annotations

from typing import Any

import click
import msgspec

SCHEMA = 1


def emit(command: str, **fields: Any) -> None:
    """Print `fields`, which may hold dataclasses, as one object."""
    text = msgspec.json.encode({"schema": SCHEMA, "command": command, **fields})
    click.echo(msgspec.json.format(text, indent=2).decode())
