"""`sksm watch --json`: one object an epoch, without what draws on a terminal."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import click
import msgspec

from sksm.reporters import json
from sksm.scanner.figures import Figures


@contextlib.contextmanager
def lines() -> Iterator[Callable[[Figures], None]]:
    """Print every epoch as one line of JSON."""

    def tell(found: Figures) -> None:
        fields = {"schema": json.SCHEMA, "command": "watch"}
        object_ = {**fields, **msgspec.to_builtins(found)}
        click.echo(msgspec.json.encode(object_))

    yield tell
