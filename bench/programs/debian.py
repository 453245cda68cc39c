"""Programs from Debian's packages, unpacked and not installed.

Nothing of the system changes and no service starts, and no root is needed: what
is installed already is used as it is, the rest is downloaded (once, into a cache)
and unpacked for as long as it is needed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.results import Skipped

_PATIENCE_SECONDS = 600.0  # for a download
_SMALL = 1 << 16  # bytes: less holds nothing but the names of other packages


class Packages:
    """Where the files of some packages are: below `root`, or installed."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def file(self, pattern: str) -> Path:
        """Find a file; the last in the order of names if several match.

        Args:
            pattern: a glob, relative to the root of the file system.

        Raises:
            Skipped: there is none.
        """
        for root in (self._root, Path("/")):
            if found := sorted(root.glob(pattern)):
                return found[-1]
        raise Skipped(f"no package has /{pattern}")

    @property
    def environment(self) -> dict[str, str]:
        """Give the environment in which the programs find their libraries."""
        folders = [*self._root.glob("usr/lib/*-linux-gnu")]
        folders += self._root.glob("lib/*-linux-gnu")
        path = os.pathsep.join(map(str, folders))
        return {**os.environ, **({"LD_LIBRARY_PATH": path} if path else {})}


@contextlib.contextmanager
def packages(*names: str, alone: Sequence[str] = ()) -> Iterator[Packages]:
    """Have the files of packages for the block, where everybody may read them.

    Args:
        names: packages to have with all that they depend on.
        alone: packages to have without, installed or not; one that only stands
            for its newest version stands for that.

    Raises:
        Skipped: they cannot be had.
    """
    if not shutil.which("apt-get"):
        raise Skipped("its packages are Debian's, and there is no apt-get")
    with tempfile.TemporaryDirectory(prefix="sksm-packages-") as folder:
        root = Path(folder)
        root.chmod(0o755)
        for file in _files(names, alone):
            _run("dpkg-deb", "--extract", str(file), folder)
        yield Packages(root)


def _files(names: Sequence[str], alone: Sequence[str]) -> list[Path]:
    """Have the packages' files at hand; with new lists if it does not work with old."""
    try:
        return _fetch([*_missing(names), *map(_newest, alone)])
    except Skipped as error:
        try:
            _run("apt-get", "--quiet", "--option", "DPkg::Lock::Timeout=300", "update")
        except Skipped:
            raise error from None
        return _fetch([*_missing(names), *map(_newest, alone)])


def _missing(names: Sequence[str]) -> list[tuple[str, str]]:
    """List what would have to be installed, as (name, version)."""
    if not names:
        return []
    command = ("apt-get", "--simulate", "--no-install-recommends", "--no-upgrade")
    output = _run(*command, "install", *names)
    lines = [line.split() for line in output.splitlines() if line.startswith("Inst ")]
    # "Inst NAME (VERSION ...", and "Inst NAME [OLD] (NEW ..." for an upgrade
    return [
        (words[1], next(w[1:] for w in words if w.startswith("("))) for words in lines
    ]


def _newest(name: str) -> tuple[str, str]:
    """Follow a package that only stands for another; gives name and version."""
    output = _run("apt-cache", "show", "--no-all-versions", name)
    lines = (line.partition(": ") for line in output.splitlines())
    fields = {key: value for key, _, value in lines}
    if int(fields.get("Size", _SMALL)) < _SMALL:
        return _newest(fields["Depends"].split()[0])
    return name, fields["Version"]


def _fetch(wanted: Sequence[tuple[str, str]]) -> list[Path]:
    """Download what the cache does not have; gives the files."""
    cache = cache_directory()
    found = {pair: _cached(cache, pair) for pair in wanted}
    if new := [pair for pair, file in found.items() if file is None]:
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            arguments = [f"{name}={version}" for name, version in new]
            # As root, apt would have an ordinary user write here, who may not.
            options = ("--quiet", "--option", "APT::Sandbox::User=root")
            _run("apt-get", *options, "download", *arguments, cwd=folder)
            for file in Path(folder).glob("*.deb"):
                file.rename(cache / file.name)
    files = [_cached(cache, pair) for pair in wanted]
    return [file for file in files if file is not None]


def _cached(cache: Path, package: tuple[str, str]) -> Path | None:
    name, version = package
    stem = f"{name}_{version.replace(':', '%3a')}_"
    return next((file for file in cache.iterdir() if file.name.startswith(stem)), None)


def cache_directory() -> Path:
    """Give the directory for what is worth keeping, made if need be."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    path = Path(base, "sksm", "packages")
    path.mkdir(parents=True, exist_ok=True)
    return path


def _run(*command: str, cwd: str | None = None) -> str:
    try:
        done = subprocess.run(
            command,
            cwd=cwd,
            check=True,
            capture_output=True,
            text=True,
            timeout=_PATIENCE_SECONDS,
            env={**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"},
        )
    except subprocess.CalledProcessError as error:
        said = (error.stderr or error.stdout).strip().splitlines()[-1:]
        raise Skipped(f"{' '.join(command)}: {''.join(said)}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Skipped(str(error)) from error
    return done.stdout
