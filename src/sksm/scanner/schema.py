"""What may stand in a file of settings, and what is told of anything else."""

from __future__ import annotations

import difflib
import ipaddress
import pwd
import re
import reprlib
from collections.abc import Collection
from typing import Annotated, Any, Literal, NoReturn

import msgspec
from msgspec import UNSET, Meta, UnsetType

from sksm.process.domain import GROUP
from sksm.scanner.positions import Path
from sksm.scanner.selection import CGROUP, Rule

THIS_MACHINE = "127.0.0.1"

Engine = Literal["auto", "pool", "ksm", "kernel"]
_MOST_PIDS = 1 << 22  # PID_MAX_LIMIT, linux/threads.h
_NOBODY = 2**32 - 1  # (uid_t) -1
_TAKES = {
    "cpu_percent": "a number above 0, and 100 at most",
    "quiet_seconds": "a number of seconds, from 1 to 250",
    "engine": '"auto", "pool", "ksm" or "kernel"',
    "metrics": '"HOST:PORT" or "PORT" in quotes, or "" for none',
    "log": '"text" or "json"',
    "watch": "rules, each under a line [[watch]]",
    "exclude": "rules, each under a line [[exclude]]",
    "pid": f"the number of a process, from 1 to {_MOST_PIDS}",
    "name": 'a pattern for names of processes in quotes, as "gunicorn*"',
    "uid": "the number of a user, or the name of one in quotes",
    "cgroup": 'a path as in /proc/PID/cgroup, as "/system.slice"',
    "unit": 'the name of a systemd unit in quotes, as "nginx"',
    "qemu": "true or false",
    "domain": 'a word in quotes, of letters, digits, "-" and "_", a letter first',
}
_Text = Annotated[str, Meta(min_length=1)]


class _Exclude(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    pid: Annotated[int, Meta(ge=1, le=_MOST_PIDS)] | None = None
    name: _Text | None = None
    uid: Annotated[int, Meta(ge=0, lt=_NOBODY)] | _Text | None = None
    cgroup: Annotated[str, Meta(pattern=CGROUP)] | None = None
    unit: _Text | None = None
    qemu: bool = False


class _Watch(_Exclude, forbid_unknown_fields=True, frozen=True):
    # No number: each user's own domain has that for a name.
    domain: Annotated[str, Meta(pattern=rf"^{GROUP.pattern}\Z")] | None = None


class _File(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    cpu_percent: Annotated[float, Meta(gt=0, le=100)] | UnsetType = UNSET
    quiet_seconds: Annotated[float, Meta(ge=1, le=250)] | UnsetType = UNSET
    engine: Engine | UnsetType = UNSET
    metrics: str | UnsetType = UNSET
    log: Literal["text", "json"] | UnsetType = UNSET
    watch: list[_Watch] | UnsetType = UNSET
    exclude: list[_Exclude] | UnsetType = UNSET


class Mistake(Exception):
    """Something in a file is wrong, at the key `where`."""

    def __init__(self, where: Path, what: str) -> None:
        super().__init__(what)
        self.where = where


def checked(document: dict[str, Any]) -> dict[str, Any]:
    """Give what a document names, as `config.Config` takes it.

    Raises:
        Mistake: it is not as it should be.
    """
    _refuse_unknown(document)
    found = _converted(document)
    if found.metrics:
        try:
            address(found.metrics)
        except ValueError:
            _refuse_value(("metrics",), document)
    named = {key: getattr(found, key) for key in document}
    for kind, name in (("watch", "rules"), ("exclude", "excluded")):
        if kind in named:
            rules = enumerate(named.pop(kind))
            named[name] = tuple(_rule(given, (kind, index)) for index, given in rules)
    return named


def address(metrics: str) -> tuple[str, int]:
    """Split "HOST:PORT", or "PORT", which is one of this machine only.

    Raises:
        ValueError: it is neither.
    """
    host, colon, port = metrics.rpartition(":")
    if not re.fullmatch("[0-9]{1,5}", port) or not 1 <= int(port) <= 65535:
        raise ValueError(f"no port from 1 to 65535: {port!r}")
    if not colon:
        return THIS_MACHINE, int(port)
    if host.startswith("[") and host.endswith("]"):
        return str(ipaddress.IPv6Address(host[1:-1])), int(port)
    if re.fullmatch("[0-9.]+", host):
        return str(ipaddress.IPv4Address(host)), int(port)
    if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?", host):
        raise ValueError(f"no name of a host: {host!r}")
    return host, int(port)


def _refuse_unknown(document: dict[str, Any]) -> None:
    _refuse_others_than(_File.__struct_fields__, document, ())
    for kind, rule in (("watch", _Watch), ("exclude", _Exclude)):
        rules = document.get(kind)
        for index, given in enumerate(rules if isinstance(rules, list) else ()):
            if isinstance(given, dict):
                _refuse_others_than(rule.__struct_fields__, given, (kind, index))


def _refuse_others_than(
    known: Collection[str], table: dict[str, Any], where: Path
) -> None:
    for key in table:
        if key not in known:
            _refuse_key(key, known, where)


def _refuse_key(key: str, known: Collection[str], where: Path) -> NoReturn:
    here = f"[[{where[0]}]]" if where else "the settings"
    if key in _File.__struct_fields__:
        right = "it belongs above the first line that begins with ["
    elif close := difflib.get_close_matches(key, known, 1):
        right = f"{close[0]} may be meant"
    else:
        right = f"there are {', '.join(known)}"
    raise Mistake((*where, key), f"{key!r} is unknown in {here}: {right}")


def _converted(document: dict[str, Any]) -> _File:
    try:
        return msgspec.convert(document, _File, strict=True)
    except msgspec.ValidationError as error:
        # All keys are known by now, and so without quotes and dots.
        _, _, path = str(error).rpartition(" - at `$")
        parts = re.findall(r"\w+", path)
        _refuse_value(tuple(int(x) if x.isdigit() else x for x in parts), document)


def _refuse_value(where: Path, document: dict[str, Any]) -> NoReturn:
    value: Any = document
    for part in where:
        value = value[part]
    name = next(part for part in reversed(where) if isinstance(part, str))
    raise Mistake(where, f"{name} takes {_TAKES[name]}, not {_shown(value)}")


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, str | int | float | list):
        return reprlib.repr(value)
    return str(value)  # dates and times


def _rule(given: _Exclude, where: Path) -> Rule:
    criteria = msgspec.structs.asdict(given)
    if isinstance(given.uid, str):
        criteria["uid"] = _uid(given.uid, where)
    try:
        return Rule(**criteria)
    except ValueError as error:
        raise Mistake(where, str(error)) from error


def _uid(name: str, where: Path) -> int:
    try:
        return pwd.getpwnam(name).pw_uid
    except (KeyError, ValueError) as error:  # ValueError: a zero in it
        right = '"getent passwd" lists the names there are'
        if name.isdigit():
            right = "a number goes without quotes"
        what = f"no user has the name {name!r}: {right}"
        raise Mistake((*where, "uid"), what) from error
