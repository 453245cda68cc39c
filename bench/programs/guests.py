"""Virtual machines under software emulation: a stock kernel, busybox, some files.

A guest idles after it has booted. Its first program reads a line from the serial
console and answers with one, from files that it holds in memory.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import platform
import random
import re
import select
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from bench.programs.crew import Client, Crew, expect, running, wait_for
from bench.programs.debian import Packages, packages
from bench.results import Skipped, Wrong

GUESTS = 3
MEMORY_MIB = 512
_KERNEL = "linux-image-cloud-amd64"  # stands for its newest version
_FILES_BYTES = 24 << 20  # of the kernel's modules: files such as guests have
_BOOT_SECONDS = 180.0
_ANSWER_SECONDS = 60.0
_CONSOLE_PROMPT = "ready>"

# What the guest does. A file is named by its number in the list of all.
_INIT = """#!/bin/sh
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs tmp /tmp
exec </dev/ttyS0 >/dev/ttyS0 2>&1
stty -echo -onlcr
echo "ready>"
while read -r word name; do
  case $word in
    sum) md5sum </files/$name ;;
    count) ls /files | wc -l ;;
    write) echo "$name" >>/tmp/written; md5sum </tmp/written ;;
  esac
done
"""


@contextlib.contextmanager
def guests() -> Iterator[Crew]:
    """Have booted guests, idle.

    Raises:
        Skipped: they cannot be had.
    """
    if platform.machine() != "x86_64":
        raise Skipped("the guests are of x86-64, and emulating that elsewhere is slow")
    with (
        packages("qemu-system-x86", "busybox-static", alone=[_KERNEL]) as found,
        tempfile.TemporaryDirectory(prefix="sksm-guests-") as name,
        contextlib.ExitStack() as stack,
    ):
        folder = Path(name)
        image = _image(found, folder)
        consoles = [
            stack.enter_context(_guest(found, folder, image, number))
            for number in range(GUESTS)
        ]
        for console in consoles:
            console.wait_for_boot()
        sums = _sums(image.files)
        inspect = functools.partial(_inspect, consoles, sums)
        clients = [_client(n, console, sums) for n, console in enumerate(consoles)]
        crew = Crew([console.pid for console in consoles], clients, inspect)
        booted = max(console.boot_seconds for console in consoles)
        crew.notes.append(f"kernel {image.version}, booted in {booted:.1f} s")
        yield crew


class Image:
    """What the guests boot from."""

    def __init__(self, kernel: Path, initramfs: Path, files: list[Path]) -> None:
        self.kernel = kernel
        self.initramfs = initramfs
        self.files = files

    @property
    def version(self) -> str:
        """Which kernel."""
        return self.kernel.name.removeprefix("vmlinuz-")


def _image(found: Packages, folder: Path) -> Image:
    """Build the guests' first file system: an archive that busybox packs."""
    root = folder / "root"
    for name in ("bin", "dev", "files", "proc", "sys", "tmp"):
        (root / name).mkdir(parents=True)
    busybox = found.file("bin/busybox")
    shutil.copy(busybox, root / "bin")
    for applet in subprocess.check_output([busybox, "--list"], text=True).split():
        with contextlib.suppress(FileExistsError):
            (root / "bin" / applet).symlink_to("busybox")
    init = root / "init"
    init.write_text(_INIT)
    init.chmod(0o755)
    kernel = found.file("boot/vmlinuz-*")
    modules = found.file(f"lib/modules/{kernel.name.removeprefix('vmlinuz-')}")
    files = _copy_some(modules, root / "files")
    archive = folder / "initramfs"
    names = sorted(str(path.relative_to(root)) for path in root.rglob("*"))
    packed = subprocess.run(
        [busybox, "cpio", "-o", "-H", "newc"],
        input="\n".join(names).encode(),
        stdout=archive.open("wb"),
        stderr=subprocess.PIPE,
        cwd=root,
    )
    if packed.returncode:
        raise Wrong(f"cpio: {packed.stderr.decode()[-300:]}")
    return Image(kernel, archive, files)


def _copy_some(modules: Path, target: Path) -> list[Path]:
    """Copy modules by name until it is enough, each under its number."""
    copied: list[Path] = []
    room = _FILES_BYTES
    for module in sorted(modules.rglob("*.ko")):
        if module.stat().st_size <= room:
            room -= module.stat().st_size
            copied.append(target / str(len(copied)))
            shutil.copy(module, copied[-1])
    return copied


@contextlib.contextmanager
def _guest(
    found: Packages, folder: Path, image: Image, number: int
) -> Iterator[Console]:
    path = folder / f"{number}.sock"
    command = [found.file("usr/bin/qemu-system-x86_64"), "-nodefaults", "-no-reboot"]
    for name in ("seabios", "qemu"):
        command += ["-L", found.file(f"usr/share/{name}")]
    command += ["-accel", "tcg", "-smp", "1", "-m", str(MEMORY_MIB), "-display", "none"]
    command += ["-kernel", image.kernel, "-initrd", image.initramfs]
    command += ["-append", "console=ttyS0 quiet panic=-1"]
    command += ["-serial", f"unix:{path},server=on,wait=on"]
    log = folder / f"{number}.log"
    with (
        log.open("wb") as errors,
        running(
            command,
            stdin=subprocess.DEVNULL,
            stdout=errors,
            stderr=errors,
            env=found.environment,
        ) as process,
    ):

        def connect() -> socket.socket:
            if process.poll() is not None:
                raise Wrong(f"QEMU ended: {log.read_text()[-500:]}")
            end = socket.socket(socket.AF_UNIX)
            try:
                end.connect(str(path))
            except OSError:
                end.close()
                raise
            return end

        with wait_for(connect, "QEMU") as end:
            yield Console(end, process.pid)


class Console:
    """A guest's serial console."""

    def __init__(self, end: socket.socket, pid: int) -> None:
        self.pid = pid
        self.boot_seconds = 0.0
        self._end = end
        self._started = time.monotonic()
        self._held = ""

    def wait_for_boot(self) -> None:
        """Wait until the guest asks for lines.

        Raises:
            Wrong: it never did.
        """
        while self._line(_BOOT_SECONDS) != _CONSOLE_PROMPT:
            pass
        self.boot_seconds = time.monotonic() - self._started

    def ask(self, line: str) -> str:
        """Send a line and give the answer's.

        Raises:
            Wrong: none came.
        """
        self._end.sendall(f"{line}\n".encode())
        return self._line(_ANSWER_SECONDS)

    def _line(self, seconds: float) -> str:
        deadline = time.monotonic() + seconds
        while "\n" not in self._held:
            left = max(0.0, deadline - time.monotonic())
            if not select.select([self._end], [], [], left)[0]:
                raise Wrong(f"the guest said nothing more than {self._held[-300:]!r}")
            if not (part := self._end.recv(1 << 16)):
                raise Wrong(f"the guest ended, and said {self._held[-300:]!r}")
            self._held += part.decode(errors="replace")
        line, _, self._held = self._held.partition("\n")
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", line).strip()


def _sums(files: list[Path]) -> list[str]:
    return [_md5(file.read_bytes()) for file in files]


def _md5(contents: bytes) -> str:
    return hashlib.md5(contents, usedforsecurity=False).hexdigest()


def _client(number: int, console: Console, sums: list[str]) -> Client:
    """Have the guest sum up files, and write to one and sum up that."""
    chance = random.Random(number)
    written = bytearray()

    def ask() -> None:
        if chance.random() < 0.2:
            word = f"{chance.randrange(10**9)}"
            written.extend(f"{word}\n".encode())
            wanted = f"{_md5(written)}  -"
            expect(console.ask(f"write {word}"), wanted, "a file written")
        else:
            file = chance.randrange(len(sums))
            expect(console.ask(f"sum {file}"), f"{sums[file]}  -", f"file {file}")

    return ask


def _inspect(consoles: list[Console], sums: list[str]) -> None:
    for console in consoles:
        expect(console.ask("count"), str(len(sums)), "files")
        for number, sum_ in enumerate(sums):
            expect(console.ask(f"sum {number}"), f"{sum_}  -", f"file {number}")
