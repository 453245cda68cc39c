"""Kernels and their self-tests, built from Debian's source package; kept by content."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

from bench.programs.debian import Packages
from bench.results import Wrong

HERE = Path(__file__).parent
PATCHES = sorted((HERE / "patches").glob("*.patch"))
SOURCE = "linux-source-6.12"
NEEDED = ("gcc", "make", "flex", "bison", "bc", "patch", "xz")
SELF_TESTS = ("ksm_functional_tests", "ksm_tests")  # that are there without us
OUR_TEST = "ksm_merge"
_HEADERS = ("libelf.h", "numa.h", "sys/capability.h")
_PACKAGES = "gcc make flex bison bc patch xz-utils libelf-dev libnuma-dev libcap-dev"

Tell = Callable[[str], None]


@dataclasses.dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel to build."""

    name: str
    patched: bool
    configs: tuple[str, ...]  # parts of its configuration, below config/

    @property
    def fragment(self) -> str:
        """All that its configuration says; the rest is off."""
        parts = [HERE / "config" / f"{name}.config" for name in self.configs]
        return "".join(part.read_text() for part in parts)

    @property
    def tests(self) -> tuple[str, ...]:
        """The self-tests that come with it."""
        return (*SELF_TESTS, OUR_TEST) if self.patched else SELF_TESTS


@dataclasses.dataclass(frozen=True, slots=True)
class Built:
    """What was built."""

    kernel: Kernel
    folder: Path

    @property
    def image(self) -> Path:
        """The kernel, for QEMU."""
        return self.folder / "bzImage"


def missing() -> str | None:
    """Say what must be installed before anything can be built; None if nothing."""
    programs = [name for name in NEEDED if not shutil.which(name)]
    headers = [name for name in _HEADERS if not _compiles(name)]
    if not programs and not headers:
        return None
    return (
        f"{', '.join(programs + headers)} missing: "
        f"apt-get install --no-install-recommends {_PACKAGES}"
    )


def build(kernel: Kernel, found: Packages, cache: Path, tell: Tell) -> Built:
    """Have a kernel and its self-tests built, or as they were built before.

    Args:
        kernel: which.
        found: where the source package is.
        cache: a directory where what was built is kept.
        tell: called with what is being done.

    Raises:
        Wrong: it cannot be built.
    """
    archive = found.file(f"usr/src/{SOURCE}.tar.xz")
    built = Built(kernel, cache / f"{kernel.name}.{_key(kernel, archive)}")
    if built.image.exists():
        return built
    cache.mkdir(parents=True, exist_ok=True)
    for old in cache.glob(f"{kernel.name}.*"):  # of other inputs, or given up
        shutil.rmtree(old)
    with _source(kernel, archive, cache, tell) as source:
        _build(kernel, source, built, tell)
    return built


def _key(kernel: Kernel, archive: Path) -> str:
    """Sum up what a kernel is made from."""
    compiler = subprocess.check_output(["gcc", "--version"])
    parts = [kernel.fragment.encode(), compiler, " ".join(kernel.tests).encode()]
    if kernel.patched:
        # Not what is said above them.
        parts += [patch.read_bytes().partition(b"\n---\n")[2] for patch in PATCHES]
    with archive.open("rb") as file:
        parts.append(hashlib.file_digest(file, "sha256").digest())
    sums = b"".join(hashlib.sha256(part).digest() for part in parts)
    return hashlib.sha256(sums).hexdigest()[:16]


@contextlib.contextmanager
def _source(kernel: Kernel, archive: Path, cache: Path, tell: Tell) -> Iterator[Path]:
    """Have the source unpacked for the block, with our patches if they belong."""
    folder = cache / f"{kernel.name}.source"
    folder.mkdir()
    try:
        tell("unpacks the source")
        _run("tar", "--extract", "--file", archive, "--directory", folder)
        source = folder / SOURCE
        if kernel.patched:
            for patch in PATCHES:
                _run("patch", "--strip=1", "--fuzz=0", "--input", patch, cwd=source)
        yield source
    finally:
        shutil.rmtree(folder)


def _build(kernel: Kernel, source: Path, built: Built, tell: Tell) -> None:
    objects, staged = source.parent / "objects", source.parent / "built"
    objects.mkdir()
    staged.mkdir()
    fragment = source.parent / "fragment"
    fragment.write_text(kernel.fragment)
    make: list[str | Path] = ["nice", "-n", "10", "make", "-C", source]
    make += [f"O={objects}", f"-j{os.cpu_count()}"]
    tell("configures it")
    _run(*make, f"KCONFIG_ALLCONFIG={fragment}", "allnoconfig")
    _must_have(objects / ".config", kernel.fragment)
    tell("compiles it")
    log = _run(*make, "bzImage", "headers")
    if noise := [line for line in log.splitlines() if "mm/ksm.c" in line]:
        raise Wrong("the compiler warns:\n" + "\n".join(noise))
    shutil.copy(objects / "arch/x86/boot/bzImage", staged)
    tell("compiles its self-tests")
    _run(
        "make",
        "-C",
        source / "tools/testing/selftests/mm",
        f"KHDR_INCLUDES=-isystem {objects}/usr/include",
        f"OUTPUT={staged}",
        *(staged / test for test in kernel.tests),
    )
    staged.rename(built.folder)


def _must_have(config: Path, fragment: str) -> None:
    """Make sure that the configuration is what was asked for.

    Raises:
        Wrong: the kernel's own rules left something out.
    """
    have = set(config.read_text().splitlines())
    wanted = [line for line in fragment.splitlines() if line.startswith("CONFIG_")]
    if lost := [line for line in wanted if line not in have]:
        raise Wrong(f"the kernel cannot be configured so: {', '.join(lost)}")


def _compiles(header: str) -> bool:
    done = subprocess.run(
        ["gcc", "-E", "-include", header, "-x", "c", os.devnull],
        capture_output=True,
    )
    return done.returncode == 0


def _run(*command: str | Path, cwd: Path | None = None) -> str:
    """Run a command; gives what it said.

    Raises:
        Wrong: it failed.
    """
    done = subprocess.run(
        command,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    if done.returncode:
        raise Wrong(f"{' '.join(map(str, command))}:\n{done.stdout[-3000:]}")
    return done.stdout
