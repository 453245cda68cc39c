"""A guest under software emulation: one kernel, one list of commands, their results.

The guest sees the files of this machine and cannot write to them, so it has this
Python, this checkout and its environment without anything being packed. What it
writes goes to one shared folder.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.programs.debian import Packages
from bench.results import Wrong
from kernel.building import HERE

MEMORY_MIB = 2048  # enough for tests
# With more (-cpu max, AVX) the contract of the pool failed under QEMU 7.2: pages
# counted as changed. On this one it holds.
_PROCESSOR = "Nehalem"
_KERNEL_LINE = (
    "console=ttyS0 panic=-1 no_timer_check tsc=reliable "
    "root=host rootfstype=9p ro "
    "rootflags=trans=virtio,version=9p2000.L,cache=loose,msize=262144"
)
# What the kernel says when something is wrong with it.
_SPLAT = re.compile(
    r"\bWARNING: |\bBUG: |kernel BUG at|INFO: possible |INFO: task .* blocked"
    r"|INFO: trying to register|suspicious RCU|possible recursive locking"
    r"|inconsistent lock state|bad unlock balance|held lock freed"
    r"|detected stall|stalls? on CPU|Oops|general protection|KASAN|UBSAN"
    r"|Kernel panic|turning off the locking|list_(?:add|del) corruption"
    r"|Bad (?:page|rss-counter) |scheduling while atomic"
)


@dataclasses.dataclass(frozen=True, slots=True)
class Done:
    """How a command ended in the guest."""

    status: int
    output: str


@dataclasses.dataclass(frozen=True, slots=True)
class Visit:
    """What a guest did: each command's end by its name, and the kernel's log."""

    done: Mapping[str, Done]
    log: str

    @property
    def splats(self) -> list[str]:
        """The lines of the log that say that something is wrong."""
        return [line for line in self.log.splitlines() if _SPLAT.search(line)]


def visit(
    image: Path,
    commands: Mapping[str, Sequence[str | Path]],
    found: Packages,
    *,
    seconds: float,
    memory_mib: int = MEMORY_MIB,
) -> Visit:
    """Boot a kernel, run commands there as root, in their order, and shut it down.

    Args:
        image: the kernel.
        commands: what to run, by name.
        found: where QEMU is.
        seconds: how long all of it may take.
        memory_mib: how much memory the guest has.

    Raises:
        Wrong: the guest did not end by itself, or a command is without a result.
    """
    with tempfile.TemporaryDirectory(prefix="sksm-kernel-") as name:
        shared = Path(name)
        lines = [
            f"{shlex.join(map(str, words))} > {name}.out 2>&1 < /dev/null; "
            f"echo $? > {name}.status\n"
            for name, words in commands.items()
        ]
        (shared / "work").write_text("".join(lines))
        ended = _run(_qemu(image, shared, found, memory_mib), found, seconds)
        log = (shared / "log").read_text(errors="replace")
        done = {
            name: Done(int(status.read_text()), output.read_text(errors="replace"))
            for name in commands
            if (status := shared / f"{name}.status").exists()
            and (output := shared / f"{name}.out").exists()
        }
    if lost := commands.keys() - done.keys():
        raise Wrong(
            f"{ended}, without {', '.join(sorted(lost))}; it said\n{log[-3000:]}"
        )
    return Visit(done, log)


def _qemu(
    image: Path, shared: Path, found: Packages, memory_mib: int
) -> list[str | Path]:
    """Give the command that boots a kernel."""
    command: list[str | Path] = [found.file("usr/bin/qemu-system-x86_64")]
    for name in ("seabios", "qemu"):
        command += ["-L", found.file(f"usr/share/{name}")]
    command += [
        "-machine",
        "q35",
        "-nodefaults",
        "-no-reboot",
        "-display",
        "none",
        "-monitor",
        "none",
    ]
    command += ["-accel", "tcg,thread=multi", "-cpu", _PROCESSOR, "-smp", "2"]
    command += ["-m", str(memory_mib), "-kernel", image]
    command += ["-append", f"{_KERNEL_LINE} init={HERE / 'guest/init'}"]
    command += _folder("host", Path("/"), ",readonly=on")
    command += _folder("shared", shared)
    return [*command, "-serial", f"file:{shared / 'log'}"]


def _run(command: list[str | Path], found: Packages, seconds: float) -> str:
    """Run QEMU until the guest has ended; says how that was."""
    bound = ["setpriv", "--pdeathsig", "KILL", "--", "nice", "-n", "10", *command]
    try:
        ended = subprocess.run(
            bound,
            env=found.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        return f"the guest was given up after {seconds:.0f} s"
    if ended.returncode:
        return f"QEMU failed: {ended.stderr[-500:]}"
    return "the guest ended"


def _folder(tag: str, path: Path, options: str = "") -> list[str]:
    """Give QEMU's arguments for a folder that the guest can mount."""
    share = f"local,id={tag},path={path},security_model=none,multidevs=remap{options}"
    return ["-fsdev", share, "-device", f"virtio-9p-pci,fsdev={tag},mount_tag={tag}"]
