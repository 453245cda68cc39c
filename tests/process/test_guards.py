"""Processes whose memory must be left alone, each made for real where it can be."""

import errno
import os
import re
import subprocess
from pathlib import Path

import pytest

from sksm.process import guards
from tests.conftest import ended, poll
from tests.support import compiled

PREAMBLE = """
import ctypes, mmap, os, socket, struct, sys
from sksm.linux import libc

def call(*args):
    result = libc.raw_syscall(*(ctypes.c_long(arg) for arg in args))
    return result if result >= 0 else -ctypes.get_errno()

def pages(count):
    area = mmap.mmap(-1, count * 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return area, ctypes.addressof(ctypes.c_char.from_buffer(area))

def wait(word):
    print(word, flush=True)
    sys.stdin.readline()

def ring():
    params = ctypes.create_string_buffer(120)  # struct io_uring_params
    result = call(425, 4, ctypes.addressof(params))  # io_uring_setup
    if result < 0:
        wait(result)
        sys.exit()
    return result

area, at = pages(4)
"""


@pytest.fixture
def process(worker):
    """Give `process(deeds)`: one that did them, and waits; skips where it cannot."""

    def start(deeds):
        made = worker(PREAMBLE + deeds)
        word = made.answer()
        assert word, "it did not come to the end"
        if word.startswith("-"):
            pytest.skip(f"the kernel says {errno.errorcode[-int(word)]}")
        made.word = word
        return made

    return start


def status(pid, field):
    text = Path(f"/proc/{pid}/status").read_text()
    return re.search(rf"^{field}:\s*(.*)$", text, re.M)[1]


def test_an_ordinary_process_has_no_objection(process):
    """The usual case, locked memory included: that is for its mapping to say."""
    plain = process("libc.mprotect(at, 4096, 3); wait(call(149, at, 4096))")  # mlock
    assert status(plain.pid, "VmLck") != "0 kB"
    assert guards.objection_to(plain.pid) is None


def test_a_process_does_not_stop_itself_nor_those_above_it():
    """Each would wait for the other."""
    assert guards.objection_to(os.getpid()) == guards.OURS
    assert guards.objection_to(os.getppid()) == guards.OURS


def test_a_kernel_thread_is_not_touched():
    """It has no memory."""
    if Path("/proc/2/comm").read_text() != "kthreadd\n":
        pytest.skip("kernel threads do not show in this container")
    assert guards.objection_to(2) == guards.NO_MEMORY


def test_a_process_that_ended_is_told_from_one_that_is_gone():
    """A zombie has a name still; afterwards there is nothing to be said."""
    child = subprocess.Popen(["true"])
    poll(lambda: ended(child.pid))
    assert guards.objection_to(child.pid) == guards.ENDED
    child.wait()
    with pytest.raises((FileNotFoundError, ProcessLookupError)):
        guards.objection_to(child.pid)


@pytest.mark.skipif(os.getuid() == 0, reason="root may inspect any process")
def test_a_process_that_hides_raises_permission_error(process):
    """No leave is not an objection: the caller says what would help."""
    hidden = process("wait(libc.prctl(libc.PR_SET_DUMPABLE, 0, 0, 0, 0))")
    with pytest.raises(PermissionError):
        guards.objection_to(hidden.pid)


def test_a_debugger_is_named(process):
    """Only one can trace a process, and the user knows which to detach."""
    debugger = process(
        "child = os.fork()\n"
        "if child == 0: os.read(0, 1)\n"
        "if call(101, 0x4206, child, 0, 0): os._exit(1)\n"  # PTRACE_SEIZE
        "open('/proc/self/comm', 'w').write('gdb')\n"
        "wait(child)\n"
        "os.kill(child, 9)"
    )
    said = guards.objection_to(int(debugger.word))
    debugger.end()
    assert said == f"traced by gdb ({debugger.pid}): detach it first"


@pytest.fixture
def program(tmp_path):
    """Give `program(source, *options)`: a running program, or a skip."""
    running = []

    def build(source, *options, language="c"):
        path = compiled(tmp_path / "program", source, *options, language=language)
        try:
            running.append(subprocess.Popen([path]))
        except OSError as error:
            pytest.skip(f"this kernel does not run it: {error}")
        return running[-1]

    yield build
    for one in running:
        one.kill()
        one.wait()


def test_a_32_bit_process_is_not_touched(program):
    """Its system calls have other numbers, and its pointers other sizes."""
    forever = ".globl _start\n_start: mov $29, %eax\nint $0x80\njmp _start\n"  # pause
    bare = ("-m32", "-nostdlib", "-static")
    narrow = program(forever, *bare, language="assembler")
    assert guards.objection_to(narrow.pid) == guards.NARROW


def test_seccomp_strict_mode_is_seen(program):
    """There any system call but read, write and exit kills."""
    locked = program(
        "#include <sys/prctl.h>\n"
        "int main(void) { prctl(PR_SET_SECCOMP, 1, 0, 0, 0); for (;;); }"
    )
    poll(lambda: status(locked.pid, "Seccomp") == "1")
    assert guards.objection_to(locked.pid) == guards.STRICT


@pytest.mark.check
def test_memory_that_the_kernel_counts_as_pinned_is_seen(process):
    """A buffer registered with io_uring; here its descriptor is closed already."""
    pinned = process(
        "fd = ring(); vector = libc.iovec(at, 4096)\n"
        "other = mmap.mmap(fd, 4096)\n"  # keeps the ring after its descriptor
        "call(427, fd, 0, ctypes.addressof(vector), 1)\n"  # IORING_REGISTER_BUFFERS
        "os.close(fd); wait(0)"
    )
    assert status(pinned.pid, "VmPin") != "0 kB"
    assert guards.objection_to(pinned.pid) == guards.PINNED


def test_io_uring_is_refused_although_the_kernel_shows_nothing(process):
    """A ring of provided buffers pins memory, and neither count shows it."""
    sharer = process(
        "fd = ring()\n"
        "given = ctypes.create_string_buffer(40)\n"  # struct io_uring_buf_reg
        "struct.pack_into('QI', given, 0, at, 8)\n"
        "done = call(427, fd, 22, ctypes.addressof(given), 1)\n"  # REGISTER_PBUF_RING
        "wait(done or fd)"
    )
    told = Path(f"/proc/{sharer.pid}/fdinfo/{sharer.word}").read_text()
    assert re.search(r"UserBufs:\s*0\n", told)
    assert status(sharer.pid, "VmPin") == "0 kB"
    assert guards.objection_to(sharer.pid) == guards.IO_URING


def test_libaio_is_seen(process):
    """Its only trace is a mapping."""
    reader = process(
        "context = ctypes.c_ulong(); wait(call(206, 8, ctypes.addressof(context)))"
    )
    assert guards.objection_to(reader.pid) == guards.LIBAIO


def test_a_ring_shared_with_a_network_card_is_seen(process):
    """The umem of AF_XDP is pinned and not counted; its rings are mapped sockets."""
    user = process(
        "try: xdp = socket.socket(44, socket.SOCK_RAW)\n"
        "except OSError as error: wait(-error.errno); sys.exit()\n"
        "umem = struct.pack('QQIIII', at, 16384, 4096, 0, 0, 0)\n"
        "xdp.setsockopt(283, 4, umem)\n"  # XDP_UMEM_REG
        "xdp.setsockopt(283, 5, 4)\n"  # XDP_UMEM_FILL_RING
        "fill = mmap.mmap(xdp.fileno(), 4096, offset=0x100000000)\n"
        "wait(0)"
    )
    assert status(user.pid, "VmPin") == "0 kB"
    assert guards.objection_to(user.pid) == guards.RING


def test_a_socket_that_shares_no_memory_does_no_harm(process):
    """Most processes have one."""
    client = process("pair = socket.socketpair(); wait(0)")
    assert guards.objection_to(client.pid) is None


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("/dev/vfio/12", guards.VFIO),
        ("anon_inode:[vfio-device]", guards.VFIO),
        ("/dev/iommu", guards.VFIO),
        ("/dev/vhost-net", guards.VHOST),
        ("/dev/infiniband/uverbs0", guards.RDMA),
        ("/dev/nvidia0", guards.GPU),
        ("/dev/dri/renderD128", guards.GPU),
        ("/dev/kfd", guards.GPU),
        ("/dev/uio0", guards.DEVICE),
    ],
)
def test_devices_that_reach_memory_are_known_by_name(name, why):
    """As descriptors tell it; this machine has no such device."""
    assert guards.held_by(["/dev/null", "socket:[1]", name]) == why


def test_other_files_are_no_objection():
    """Names that only look alike."""
    names = ["/dev/null", "/dev/kvm", "anon_inode:[eventpoll]", "/tmp/dev/vfio/1"]
    assert guards.held_by(names) is None
