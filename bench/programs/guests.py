"""Virtual machines under software emulation: a stock kernel, busybox, some files.

A guest idles after it has booted. Its first program reads a line from the serial
console and answers with one, from files that it holds in memory. Where its image
has archives, it can be given real work, too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import platform
import random
import re
import select
import shutil
import socket
import subprocess
import tarfile
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

_INIT = Path(__file__).with_name("guest_init.sh")
_WORK = Path(__file__).with_name("guest_work.awk")


@contextlib.contextmanager
def guests() -> Iterator[Crew]:
    """Have booted guests, idle.

    Raises:
        Skipped: they cannot be had.
    """
    with built() as image, started(image, GUESTS) as consoles:
        for console in consoles:
            console.wait_for_boot()
        sums = _sums(image.files)
        clients = [_client(n, console, sums) for n, console in enumerate(consoles)]
        check = functools.partial(inspect, image, consoles)
        crew = Crew([console.pid for console in consoles], clients, check)
        booted = max(console.boot_seconds for console in consoles)
        crew.notes.append(f"kernel {image.version}, booted in {booted:.1f} s")
        yield crew


@dataclasses.dataclass
class Image:
    """What the guests boot from."""

    found: Packages
    folder: Path  # of our own, for what belongs to guests
    files: list[Path]  # that they hold
    archives: dict[str, list[Path]]  # that they can unpack: what is in them, by name

    @property
    def kernel(self) -> Path:
        """Its file."""
        return self.found.file("boot/vmlinuz-*")

    @property
    def initramfs(self) -> Path:
        """The file that the first file system is packed in."""
        return self.folder / "initramfs"

    @property
    def version(self) -> str:
        """Which kernel."""
        return self.kernel.name.removeprefix("vmlinuz-")


@contextlib.contextmanager
def built(*archives: str, archive_bytes: int = 28 << 20) -> Iterator[Image]:
    """Have an image for guests.

    Args:
        archives: names of archives that they shall hold.
        archive_bytes: how much to have in each of them, at most.

    Raises:
        Skipped: they cannot be had.
    """
    if platform.machine() != "x86_64":
        raise Skipped("the guests are of x86-64, and emulating that elsewhere is slow")
    with (
        packages("qemu-system-x86", "busybox-static", alone=[_KERNEL]) as found,
        tempfile.TemporaryDirectory(prefix="sksm-guests-") as folder,
    ):
        image = Image(found, Path(folder), [], {})
        modules = sorted(found.file(f"lib/modules/{image.version}").rglob("*.ko"))
        image.files = _take(modules, _FILES_BYTES)
        for name in archives:
            image.archives[name] = _take(modules, archive_bytes)
        _pack(image)
        yield image


def _take(modules: list[Path], room: int) -> list[Path]:
    """Take modules from the list, by name, until it is enough."""
    taken = []
    for module in list(modules):
        if (size := module.stat().st_size) <= room:
            room -= size
            modules.remove(module)
            taken.append(module)
    return taken


def _pack(image: Image) -> None:
    """Build the guests' first file system: an archive that busybox packs."""
    root = image.folder / "root"
    for name in ("archives", "bin", "dev", "files", "proc", "sys", "tmp"):
        (root / name).mkdir(parents=True)
    busybox = image.found.file("bin/busybox")
    shutil.copy(busybox, root / "bin")
    for applet in subprocess.check_output([busybox, "--list"], text=True).split():
        with contextlib.suppress(FileExistsError):
            (root / "bin" / applet).symlink_to("busybox")
    shutil.copy(_WORK, root / "work.awk")
    shutil.copy(_INIT, root / "init")
    (root / "init").chmod(0o755)
    for number, file in enumerate(image.files):
        shutil.copy(file, root / "files" / str(number))
    for name, files in image.archives.items():
        with tarfile.open(root / "archives" / name, "w:gz", compresslevel=6) as archive:
            for number, file in enumerate(files):
                archive.add(file, str(number))
    names = sorted(str(path.relative_to(root)) for path in root.rglob("*"))
    packed = subprocess.run(
        [busybox, "cpio", "-o", "-H", "newc"],
        input="\n".join(names).encode(),
        stdout=image.initramfs.open("wb"),
        stderr=subprocess.PIPE,
        cwd=root,
    )
    if packed.returncode:
        raise Wrong(f"cpio: {packed.stderr.decode()[-300:]}")


@contextlib.contextmanager
def started(image: Image, count: int) -> Iterator[list[Console]]:
    """Have guests that boot."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(_guest(image, number)) for number in range(count)]


@contextlib.contextmanager
def _guest(image: Image, number: int) -> Iterator[Console]:
    path = image.folder / f"{number}.sock"
    found = image.found
    command = [found.file("usr/bin/qemu-system-x86_64"), "-nodefaults", "-no-reboot"]
    for name in ("seabios", "qemu"):
        command += ["-L", found.file(f"usr/share/{name}")]
    command += ["-accel", "tcg", "-smp", "1", "-m", str(MEMORY_MIB), "-display", "none"]
    command += ["-kernel", image.kernel, "-initrd", image.initramfs]
    command += ["-append", "console=ttyS0 quiet panic=-1 no_timer_check"]
    command += ["-serial", f"unix:{path},server=on,wait=on"]
    log = image.folder / f"{number}.log"
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

    def ask(self, line: str, seconds: float = _ANSWER_SECONDS) -> str:
        """Send a line and give the answer's.

        Raises:
            Wrong: none came in so many seconds.
        """
        self._end.sendall(f"{line}\n".encode())
        return self._line(seconds)

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
    return [md5(file.read_bytes()) for file in files]


def md5(contents: bytes) -> str:
    """Sum up as the guests do."""
    return hashlib.md5(contents, usedforsecurity=False).hexdigest()


def _client(number: int, console: Console, sums: list[str]) -> Client:
    """Have the guest sum up files, and write to one and sum up that."""
    chance = random.Random(number)
    written = bytearray()

    def ask() -> None:
        if chance.random() < 0.2:
            word = f"{chance.randrange(10**9)}"
            written.extend(f"{word}\n".encode())
            wanted = f"{md5(written)}  -"
            expect(console.ask(f"write {word}"), wanted, "a file written")
        else:
            file = chance.randrange(len(sums))
            expect(console.ask(f"sum {file}"), f"{sums[file]}  -", f"file {file}")

    return ask


def inspect(image: Image, consoles: list[Console]) -> None:
    """Make sure that the guests still have the image's files.

    Raises:
        Wrong: they have not.
    """
    sums = _sums(image.files)
    for console in consoles:
        expect(console.ask("count"), str(len(sums)), "files")
        for number, sum_ in enumerate(sums):
            expect(console.ask(f"sum {number}"), f"{sum_}  -", f"file {number}")
