"""A service's log on stderr: lines for the journal, or JSON for programs."""

from __future__ import annotations

import datetime
import logging
import sys
from collections.abc import Iterable
from typing import Literal, TypeVar

import msgspec

from sksm.reporters.words import count, duration, size
from sksm.scanner.figures import Figures, ProcessFigures, Refusal

_SUMMARY_SECONDS = 300.0
_One = TypeVar("_One", ProcessFigures, Refusal)
# sd-daemon(3). Python has no level of its own for SD_NOTICE and others.
_PRIORITIES = {
    logging.DEBUG: 7,
    logging.INFO: 6,
    logging.WARNING: 4,
    logging.ERROR: 3,
    logging.CRITICAL: 2,
}
_log = logging.getLogger(__name__)


def set_up(form: Literal["text", "json"]) -> None:
    """Have all that is logged go to stderr in that form."""
    handler = logging.StreamHandler(sys.stderr)
    # Nobody there takes the prefixes away again.
    text = Text(priorities=not sys.stderr.isatty())
    handler.setFormatter(Json() if form == "json" else text)
    logging.basicConfig(handlers=[handler], level=logging.INFO, force=True)


def say(level: int, message: str, **fields: object) -> None:
    """Log a message, and for programs fields besides."""
    _log.log(level, "%s", message, extra={"fields": fields})


class Text(logging.Formatter):
    """A line each, without the time, which the journal adds.

    Args:
        priorities: begin each line with what the journal takes for its priority.
    """

    def __init__(self, *, priorities: bool) -> None:
        super().__init__()
        self._priorities = priorities

    def format(self, record: logging.LogRecord) -> str:
        """Write one record."""
        prefix = f"<{_PRIORITIES.get(record.levelno, 6)}>" if self._priorities else ""
        lines = [_printable(record.getMessage())]
        if record.exc_info:
            lines += self.formatException(record.exc_info).splitlines()
        return "\n".join(prefix + line for line in lines)


def _printable(text: str) -> str:
    """Escape what would end the line: processes choose their names themselves."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class Json(logging.Formatter):
    """An object each: time, level, message, and what else there is to know."""

    def format(self, record: logging.LogRecord) -> str:
        """Write one record."""
        at = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        found: dict[str, object] = {
            "time": at.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            found["traceback"] = self.formatException(record.exc_info)
        # Names of processes may be no characters, and come as lone surrogates.
        return msgspec.json.encode(_encodable(found)).decode()


def _encodable(fields: dict[str, object]) -> dict[str, object]:
    return {
        name: value.encode(errors="backslashreplace").decode()
        if isinstance(value, str)
        else value
        for name, value in fields.items()
    }


def summary(found: Figures) -> str:
    """Say in one line what is saved."""
    return (
        f"{size(found.saved_net_bytes)} saved, net: {size(found.merged_bytes)} merged "
        f"of {size(found.watched_bytes)} in {count(len(found.processes), 'process')}, "
        f"{len(found.refused)} left alone; {duration(found.cpu_seconds)} of processor "
        "time"
    )


class Chronicle:
    """Logs who comes, goes and is left alone, and now and then what it brings."""

    def __init__(self) -> None:
        self._watched: dict[int, ProcessFigures] = {}
        self._refused: dict[int, Refusal] = {}
        self._summary_at = _SUMMARY_SECONDS

    def tell(self, found: Figures) -> None:
        """Log what an epoch brought."""
        watched, refused = _by_pid(found.processes), _by_pid(found.refused)
        for pid in sorted(watched.keys() - self._watched.keys()):
            self._say_of(watched[pid], "is watched")
        for pid in sorted(self._watched.keys() - watched.keys()):
            self._say_of(self._watched[pid], "is watched no more")
        for pid in sorted(refused.keys() - self._refused.keys()):
            one = refused[pid]
            self._say_of(one, f"is left alone: {one.reason}", reason=one.reason)
        self._watched, self._refused = watched, refused
        if found.seconds >= self._summary_at:
            self._summary_at = found.seconds + _SUMMARY_SECONDS
            self._sum_up(found)

    def _say_of(
        self, one: ProcessFigures | Refusal, what: str, **fields: object
    ) -> None:
        level = logging.WARNING if fields else logging.INFO
        text = f"process {one.pid} ({one.name}) {what}"
        say(level, text, pid=one.pid, name=one.name, **fields)

    def _sum_up(self, found: Figures) -> None:
        numbers = msgspec.to_builtins(found)
        # What there is one of for each process would make long lines.
        fields = {k: v for k, v in numbers.items() if not isinstance(v, list)}
        counts = {"processes": len(found.processes), "refused": len(found.refused)}
        say(logging.INFO, summary(found), **fields, **counts)


def _by_pid(ones: Iterable[_One]) -> dict[int, _One]:
    return {one.pid: one for one in ones}
