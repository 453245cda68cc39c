"""What processes give reason to doubt that dropped memory may read as anything."""

import contextlib
import os
import struct
import subprocess
from pathlib import Path

import pytest

from sksm.linux import libc, maps
from sksm.process import runtimes
from tests import support
from tests.conftest import poll
from tests.process.subject import Piece, Subject

LIBRARIES = Path("/usr/lib/x86_64-linux-gnu")
WAITS = "#include <unistd.h>\nint main(void) { return read(0, &(char){0}, 1); }\n"
DROPS = (
    "#define _GNU_SOURCE\n#include <sys/mman.h>\n"
    "void drop(void *at) { madvise(at, 4096, MADV_DONTNEED); }\n" + WAITS
)
MARKED = 'const char *volatile said = "<jemalloc>: out of memory";\n'


@pytest.fixture
def compiled(tmp_path):
    """Give `compiled(source, *options)`: the path of a program or library."""

    def build(source, *options, name="program", **how):
        return support.compiled(tmp_path / name, source, *options, **how)

    return build


@pytest.fixture
def doubt():
    """Give `doubt(*command)`: what is said of such a process, once it waits."""
    running = []

    def of(*command, **popen):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL}
        process = subprocess.Popen(command, **pipes, **popen)
        running.append(process)
        poll(lambda: reads(process.pid))
        return runtimes.doubt(process.pid)

    of.running = running
    yield of
    for process in running:
        process.kill()
        process.wait()
        process.stdin.close()


def reads(pid):
    """Say whether a process waits for its standard input: it has loaded all."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/syscall").read_text().startswith("0 0x0 ")
    return False


def test_python_with_its_usual_libraries_is_safe(worker):
    """What web workers are made of."""
    usual = "import ctypes, mmap, ssl, sys, numpy; print(1, flush=True)"
    process = worker(f"{usual}; sys.stdin.readline()")
    process.answer()
    assert runtimes.doubt(process.pid) is None


def test_a_file_is_looked_at_once(worker, monkeypatch):
    """The siblings of a process cost next to nothing."""
    first, second = Subject(worker), Subject(worker)
    assert runtimes.doubt(first.pid) is None
    monkeypatch.delattr(runtimes, "_look_at")
    assert runtimes.doubt(second.pid) is None


def test_a_program_that_cannot_drop_memory_is_safe(compiled, doubt):
    """Also one that calls something with nearly the same name."""
    advises = WAITS.replace("{ ", "{ posix_madvise(0, 0, 4); ", 1)
    for source in (WAITS, "#include <sys/mman.h>\n" + advises):
        assert doubt(compiled(source)) is None


@pytest.mark.parametrize("headers", [True, False], ids=["whole", "no headers"])
def test_a_program_that_calls_madvise_is_in_doubt(compiled, doubt, headers):
    """Nobody knows what for; also if the file tells nothing but what is loaded."""
    path = compiled(DROPS)
    if not headers:
        image = bytearray(path.read_bytes())
        struct.pack_into("<Q", image, 40, 0)  # e_shoff
        struct.pack_into("<HH", image, 60, 0, 0)  # e_shnum, e_shstrndx
        path.write_bytes(image)
    assert doubt(path) == runtimes.UNKNOWN.format(path)


def test_a_library_counts_as_the_program_does(compiled, doubt):
    """Memory is dropped by whoever is in the process."""
    library = compiled(DROPS, "-shared", "-fPIC", name="libdrop.so")
    said = doubt(compiled(WAITS), env={"LD_PRELOAD": str(library)})
    assert said == runtimes.UNKNOWN.format(library)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("libjemalloc-1f2e3d.so.2", "jemalloc"),
        ("libtcmalloc_minimal.so.4.5.10", "tcmalloc"),
        ("libmimalloc.so.2.0", "mimalloc"),
        ("libjvm.so", "the JVM"),
        ("libnode.so.108", "V8"),
        ("libcoreclr.so", ".NET"),
    ],
)
def test_runtimes_are_known_by_their_libraries(compiled, doubt, name, what):
    """Whether or not they could be told by what they call."""
    library = compiled("", "-shared", name=name)
    said = doubt(compiled(WAITS), env={"LD_PRELOAD": str(library)})
    assert said == runtimes.DOUBT.format(what)


@pytest.mark.parametrize(
    ("name", "what"), [("node", "V8"), ("chrome", "V8"), ("beam.smp", "Erlang's BEAM")]
)
def test_runtimes_are_known_by_their_programs(compiled, doubt, name, what):
    """They have everything in one file."""
    assert doubt(compiled(WAITS, name=name)) == runtimes.DOUBT.format(what)


JEMALLOC = LIBRARIES / "libjemalloc.so.2"


@pytest.mark.skipif(not JEMALLOC.exists(), reason="libjemalloc2 is not installed")
def test_jemalloc_is_seen_in_any_program(doubt):
    """As who replaces malloc does it."""
    said = doubt("cat", env={**os.environ, "LD_PRELOAD": str(JEMALLOC)})
    assert said == runtimes.DOUBT.format(runtimes.JEMALLOC)


@pytest.mark.parametrize("options", [(), ("-static",)], ids=["dynamic", "static"])
def test_jemalloc_is_seen_inside_a_program(compiled, doubt, options):
    """By how it begins its messages, since it has no name there."""
    said = doubt(compiled(MARKED + DROPS, *options))
    assert said == runtimes.DOUBT.format(runtimes.JEMALLOC)


ARCHIVE = LIBRARIES / "libjemalloc.a"


@pytest.mark.skipif(not ARCHIVE.exists(), reason="libjemalloc-dev is not installed")
@pytest.mark.parametrize("options", [(), ("-static",)], ids=["dynamic", "static"])
def test_jemalloc_itself_has_that_mark(compiled, doubt, options):
    """The real thing, linked into a program and stripped."""
    libraries = (f"-Wl,--whole-archive,{ARCHIVE},--no-whole-archive", "-lstdc++", "-lm")
    said = doubt(compiled(WAITS, "-s", *options, *libraries, "-lpthread"))
    assert said == runtimes.DOUBT.format(runtimes.JEMALLOC)


def test_a_static_program_is_in_doubt(compiled, doubt):
    """What it calls cannot be told by names."""
    assert doubt(compiled(WAITS, "-static")) == runtimes.STATIC


def test_musl_is_told_from_glibc(compiled, doubt):
    """It is not known how its malloc takes it."""
    said = doubt(compiled(WAITS, compiler="musl-gcc"))
    assert said == runtimes.DOUBT.format("musl")


@pytest.mark.parametrize("options", [(), ("-static",)], ids=["dynamic", "static"])
def test_go_is_known_by_its_sections(compiled, doubt, options):
    """It makes system calls by itself, so it need not link madvise."""
    mark = '__attribute__((section(".go.buildinfo"), used)) char mark[16];\n'
    said = doubt(compiled(mark + WAITS, *options))
    assert said == runtimes.DOUBT.format(runtimes.GO)


def test_code_that_is_no_elf_file_is_in_doubt(worker, tmp_path):
    """Somebody's own loader, or compiler."""
    path = tmp_path / "code"
    path.write_bytes(bytes(4096))
    process = Subject(worker)
    fd = process.do(f"os.open({str(path)!r}, os.O_RDONLY)")
    prot = libc.PROT_READ | libc.PROT_EXEC
    Piece(process, 1).map(prot=prot, flags=libc.MAP_PRIVATE, fd=fd)
    assert runtimes.doubt(process.pid) == runtimes.FOREIGN.format(path)


@pytest.mark.parametrize("replaced", [False, True], ids=["deleted", "replaced"])
def test_a_file_that_is_gone_is_not_guessed_at(compiled, doubt, replaced):
    """Root can read it all the same, others cannot, and its successor tells nothing."""
    path = compiled(WAITS)
    doubt(path)
    path.unlink()
    if replaced:
        path.write_bytes(b"something else")
    [process] = doubt.running
    said = runtimes.doubt(process.pid)
    if os.getuid() == 0:
        assert said is None
    else:
        assert said == runtimes.REPLACED.format(f"{path} (deleted)")


@pytest.mark.skipif(os.getuid() == 0, reason="root can read any file")
def test_a_file_that_cannot_be_read_is_in_doubt(compiled, doubt):
    """It was readable when it was loaded."""
    library = compiled("", "-shared", name="libclosed.so")
    doubt(compiled(WAITS), env={"LD_PRELOAD": str(library)})
    library.chmod(0)
    runtimes._kinds.clear()
    said = runtimes.doubt(doubt.running[0].pid)
    assert said == runtimes.UNREADABLE.format(library)


def test_a_file_is_known_by_how_its_mapping_shows_it(tmp_path):
    """On btrfs and overlayfs, `stat` tells another device."""
    path = tmp_path / "file"
    path.write_bytes(bytes(4096))
    key, other = maps.file_key(path.stat()), os.stat("/")
    assert runtimes._is_mapped_as(str(path), other, key)
    assert not runtimes._is_mapped_as(str(path), other, ("00:00", key[1]))


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("virtio-balloon-pci,free-page-reporting=off", None),
        ("virtio-balloon-pci,free-page-reporting=on", runtimes.REPORTING),
        ('{"free-page-reporting":true}', runtimes.REPORTING),
    ],
)
def test_guest_memory_is_safe_unless_free_pages_are_reported(
    compiled, doubt, option, said
):
    """A guest that clears pages before it reports them does not clear them again."""
    assert doubt(compiled(DROPS, name="qemu-system-any"), "-device", option) == said


def test_a_process_that_is_gone_is_no_doubt():
    """It is an ordinary outcome, for the caller to tell."""
    child = subprocess.Popen(["true"])
    child.wait()
    with pytest.raises((FileNotFoundError, ProcessLookupError)):
        runtimes.doubt(child.pid)
