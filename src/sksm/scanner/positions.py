"""Where each key of a TOML text stands, which tomllib does not tell."""

from __future__ import annotations

import re
import tomllib

# From the outermost table inwards: keys, and numbers of elements of arrays.
Path = tuple[str | int, ...]

_TOKEN = re.compile(
    r"""
      [ \t]+ | \#[^\n]*
    | (?P<token>
        \n | [\[\]{}=,.]
      | \"{3} (?: [^\\] | \\. )*? \"{3,5} | '{3} .*? '{3,5}
      | \" (?: [^"\\] | \\. )* \" | ' [^']* '
      | [^\s\[\]{}=,.\#"']+
      )
    """,
    re.VERBOSE | re.DOTALL,
)


def line_of(text: str, path: Path) -> int:
    """Say on which line a key stands, or else the innermost table around it.

    Args:
        text: TOML that tomllib can read.
        path: which key.

    Returns:
        The line, counted from 1. Of a table that is opened several times it is the
        first, of an element of an array of tables that of its header.
    """
    lines = _Reader(text).lines
    while path and path not in lines:
        path = path[:-1]
    return lines.get(path, 1)


class _Reader:
    """Walks through a text that is known to be TOML.

    Attributes:
        lines: the line of each key, and of each element of an array.
    """

    def __init__(self, text: str) -> None:
        self.lines: dict[Path, int] = {}
        self._lengths: dict[Path, int] = {}  # of arrays of tables
        self._left = _tokens(text)[::-1]
        table: Path = ()
        while self._left:
            if self._next == "[":
                table = self._header()
            elif not self._skip("\n"):
                self._pair(table)

    @property
    def _next(self) -> str:
        return self._left[-1][0] if self._left else ""

    def _skip(self, token: str) -> bool:
        found = self._next == token
        if found:
            self._left.pop()
        return found

    def _note(self, path: Path, line: int) -> Path:
        self.lines.setdefault(path, line)
        return path

    def _header(self) -> Path:
        """Read "[a.b]" or "[[a.b]]". Gives the path of the table it opens."""
        self._skip("[")
        many = self._skip("[")
        path: Path = ()
        for key, line in self._key():
            if path in self._lengths:
                path = (*path, self._lengths[path] - 1)
            path = self._note((*path, key), line)
        if many:
            index = self._lengths.get(path, 0)
            self._lengths[path] = index + 1
            path = self._note((*path, index), line)
            self._skip("]")
        self._skip("]")
        return path

    def _key(self) -> list[tuple[str, int]]:
        """Read a key, which may have dots. Gives its parts, each with its line."""
        parts: list[tuple[str, int]] = []
        while not parts or self._skip("."):
            token, line = self._left.pop()
            parts.append((_unquoted(token), line))
        return parts

    def _pair(self, table: Path) -> None:
        path = table
        for key, line in self._key():
            path = self._note((*path, key), line)
        self._skip("=")
        self._value(path)

    def _value(self, path: Path) -> None:
        if self._skip("["):
            self._elements(path)
        elif self._skip("{"):
            while not self._skip("}"):
                if not self._skip("\n") and not self._skip(","):
                    self._pair(path)
        else:
            self._left.pop()
            while self._next not in ("", "\n", ",", "]", "}"):
                self._left.pop()

    def _elements(self, path: Path) -> None:
        index = 0
        while not self._skip("]"):
            if not self._skip("\n") and not self._skip(","):
                self._value(self._note((*path, index), self._left[-1][1]))
                index += 1


def _tokens(text: str) -> list[tuple[str, int]]:
    """Cut a text into tokens, each with the line where it begins."""
    found, line = [], 1
    for match in _TOKEN.finditer(text):
        if token := match["token"]:
            found.append((token, line))
            line += token.count("\n")
    return found


def _unquoted(key: str) -> str:
    if key[0] not in "\"'":
        return key
    value: str = tomllib.loads(f"key = {key}")["key"]
    return value
