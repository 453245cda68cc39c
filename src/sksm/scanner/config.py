"""The settings of a scanner, from TOML. docs/configuration.md says what they mean."""

from __future__ import annotations

import os
import re
import stat
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from sksm.errors import Misconfigured
from sksm.scanner import positions, schema
from sksm.scanner.schema import Engine, Mistake
from sksm.scanner.selection import Rule

SYSTEM = Path("/etc/sksm/config.toml")

# How what tomllib says begins, and what would be right.
_REMEDIES = {
    "Invalid value": "text goes in quotes, and every bracket is closed",
    "Cannot overwrite a value": "give each key once",
    "Cannot declare": "give each table once; rules go under [[watch]], [[exclude]]",
    "Expected '='": "a line is KEY = VALUE, [[TABLE]] or # COMMENT",
    "Invalid statement": "a line is KEY = VALUE, [[TABLE]] or # COMMENT",
    "Expected newline": "one KEY = VALUE on a line",
}


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """What a scanner was told.

    Attributes:
        cpu_percent: share of one CPU that it may take, averaged over ten minutes.
        quiet_seconds: how long a page must stay unwritten.
        engine: by which it merges, as `choice.choose` takes it.
        metrics: where OpenMetrics are served, for `schema.address`; "" for nowhere.
        log: how it logs, "text" or "json".
        rules: which processes it watches, for a `Selection`.
        excluded: which it leaves alone whatever `rules` say.
    """

    cpu_percent: float = 2.0
    quiet_seconds: float = 2.0
    engine: Engine = "auto"
    metrics: str = ""
    log: Literal["text", "json"] = "text"
    rules: tuple[Rule, ...] = ()
    excluded: tuple[Rule, ...] = ()


def load(paths: Sequence[Path] | None = None) -> Config:
    """Read the settings. A file that is not there says nothing.

    Args:
        paths: the files. What a later one names takes the place of what an earlier
            one says. By default those of `default_paths`.

    Raises:
        Misconfigured: a file is wrong, or others may write to it.
        OSError: a file cannot be read.
    """
    settings: dict[str, Any] = {}
    for path in default_paths() if paths is None else paths:
        settings |= _settings(path)
    return Config(**settings)


def default_paths() -> list[Path]:
    """List where settings are looked for: the system's, and a user's own.

    Root has the system's only.
    """
    home = os.environ.get("XDG_CONFIG_HOME", "")
    if not os.path.isabs(home):  # then it is to be ignored: XDG Base Directory
        home = os.path.expanduser("~/.config")
    if os.geteuid() == 0 or not os.path.isabs(home):
        return [SYSTEM]
    return [SYSTEM, Path(home) / "sksm/config.toml"]


def _settings(path: Path) -> dict[str, Any]:
    """Give what a file names, as `Config` takes it."""
    text = _text(path)
    document = _parsed(path, text)
    try:
        return schema.checked(document)
    except Mistake as mistake:
        line = positions.line_of(text, mistake.where)
        raise Misconfigured(f"{path}:{line}: {mistake}") from mistake


def _text(path: Path) -> str:
    """Read a file; "" if there is none."""
    try:
        with open(path, "rb", opener=_open) as file:
            _refuse_others_file(path, os.fstat(file.fileno()))
            content = file.read()
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except IsADirectoryError as error:
        raise _no_file(path) from error
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise Misconfigured(
            f"{path}:{line}: these are not characters of UTF-8; save the file as UTF-8"
        ) from error


def _open(path: str, flags: int) -> int:
    # Without waiting for who might write to a pipe.
    return os.open(path, flags | os.O_NONBLOCK)


def _no_file(path: Path) -> Misconfigured:
    return Misconfigured(f"{path} is no file; put one in its place, or remove it")


def _refuse_others_file(path: Path, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise _no_file(path)
    why = "it decides whose memory is touched, which is for you alone to say"
    if found.st_uid not in (0, os.geteuid()):
        owner = f"{path} belongs to the user with the number {found.st_uid}"
        raise Misconfigured(
            f"{owner}: {why}. This mends it: chown {os.geteuid()} {path}"
        )
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise Misconfigured(
            f"others than its owner may write to {path}: {why}. "
            f"This mends it: chmod go-w {path}"
        )


def _parsed(path: Path, text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        said = re.fullmatch(
            r"(.*) \(at (?:line (\d+),.*|end of document)\)", str(error)
        )
        what, line = (said[1], said[2]) if said else (str(error), None)
        line = line or text.rstrip("\n").count("\n") + 1
        remedies = [_REMEDIES[start] for start in _REMEDIES if what.startswith(start)]
        remedy = "; ".join(remedies) or "toml.io says how it is written"
        raise Misconfigured(f"{path}:{line}: {what}; {remedy}") from error
    except ValueError as error:  # of int(), for thousands of digits
        what = "a number has thousands of digits, which no setting takes"
        raise Misconfigured(f"{path}: {what}") from error
