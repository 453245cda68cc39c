"""Processes whose memory must be left alone, each made for real where it can be."""

import ctypes
import errno
import mmap
import os
import re
import socket
import struct
import subprocess
from pathlib import Path

import pytest

from sksm.linux import libc
from sksm.process import guards
from tests.conftest import ended, poll
from tests.puppets import Obedient
from tests.support import compiled


class Stranger(Obedient):
    """Holds four pages, and does what makes its memory special.

    Such a deed gives a number to go by; a negative one is an errno, and the kernel
    cannot do it.
    """

    def __init__(self):
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self.area = mmap.mmap(-1, 4 * 4096, flags=flags)
        self.at = ctypes.addressof(ctypes.c_char.from_buffer(self.area))

    def lock(self):
        libc.mprotect(self.at, 4096, libc.PROT_READ | libc.PROT_WRITE)
        return call(149, self.at, 4096)  # mlock

    def trace(self):
        """Be a debugger; gives the pid of the other."""
        child = self.fork()
        assert call(101, 0x4206, child, 0, 0) == 0  # PTRACE_SEIZE
        Path("/proc/self/comm").write_text("gdb")
        return child

    def register(self):
        """Register a buffer with io_uring, and close the descriptor."""
        fd = ring()
        if fd >= 0:
            vector = libc.iovec(self.at, 4096)
            self.other = mmap.mmap(fd, 4096)  # keeps the ring after its descriptor
            call(427, fd, 0, ctypes.addressof(vector), 1)  # IORING_REGISTER_BUFFERS
            os.close(fd)
        return min(fd, 0)

    def provide(self):
        """Give io_uring a ring of buffers; gives its descriptor."""
        fd = ring()
        if fd < 0:
            return fd
        given = ctypes.create_string_buffer(40)  # struct io_uring_buf_reg
        struct.pack_into("QI", given, 0, self.at, 8)
        # IORING_REGISTER_PBUF_RING
        return call(427, fd, 22, ctypes.addressof(given), 1) or fd

    def set_up_aio(self):
        self.context = ctypes.c_ulong()
        return call(206, 8, ctypes.addressof(self.context))  # io_setup

    def lend_to_a_card(self):
        try:
            self.xdp = socket.socket(44, socket.SOCK_RAW)
        except OSError as error:
            return -error.errno
        umem = struct.pack("QQIIII", self.at, 16384, 4096, 0, 0, 0)
        self.xdp.setsockopt(283, 4, umem)  # XDP_UMEM_REG
        self.xdp.setsockopt(283, 5, 4)  # XDP_UMEM_FILL_RING
        self.fill = mmap.mmap(self.xdp.fileno(), 4096, offset=0x100000000)
        return 0

    def connect(self):
        self.pair = socket.socketpair()
        return 0


def call(*args):
    result = libc.raw_syscall(*(ctypes.c_long(arg) for arg in args))
    return result if result >= 0 else -ctypes.get_errno()


def ring():
    params = ctypes.create_string_buffer(120)  # struct io_uring_params
    return call(425, 4, ctypes.addressof(params))  # io_uring_setup


@pytest.fixture
def process(puppets):
    """Give `process(deed)`: one that did that; skips where it cannot."""

    def start(deed):
        made = puppets(Stranger)
        made.show()
        made.word = getattr(made, deed)()
        if (made.word or 0) < 0:
            pytest.skip(f"the kernel says {errno.errorcode[-made.word]}")
        return made

    return start


def status(pid, field):
    text = Path(f"/proc/{pid}/status").read_text()
    return re.search(rf"^{field}:\s*(.*)$", text, re.M)[1]


def test_an_ordinary_process_has_no_objection(process):
    """The usual case, locked memory included: that is for its mapping to say."""
    plain = process("lock")
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
    hidden = process("hide")
    with pytest.raises(PermissionError):
        guards.objection_to(hidden.pid)


def test_a_debugger_is_named(process):
    """Only one can trace a process, and the user knows which to detach."""
    debugger = process("trace")
    said = guards.objection_to(int(debugger.word))
    debugger.end_child(debugger.word)
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
    pinned = process("register")
    assert status(pinned.pid, "VmPin") != "0 kB"
    assert guards.objection_to(pinned.pid) == guards.PINNED


def test_io_uring_is_refused_although_the_kernel_shows_nothing(process):
    """A ring of provided buffers pins memory, and neither count shows it."""
    sharer = process("provide")
    told = Path(f"/proc/{sharer.pid}/fdinfo/{sharer.word}").read_text()
    assert re.search(r"UserBufs:\s*0\n", told)
    assert status(sharer.pid, "VmPin") == "0 kB"
    assert guards.objection_to(sharer.pid) == guards.IO_URING


def test_libaio_is_seen(process):
    """Its only trace is a mapping."""
    reader = process("set_up_aio")
    assert guards.objection_to(reader.pid) == guards.LIBAIO


def test_a_ring_shared_with_a_network_card_is_seen(process):
    """The umem of AF_XDP is pinned and not counted; its rings are mapped sockets."""
    user = process("lend_to_a_card")
    assert status(user.pid, "VmPin") == "0 kB"
    assert guards.objection_to(user.pid) == guards.RING


def test_a_socket_that_shares_no_memory_does_no_harm(process):
    """Most processes have one."""
    client = process("connect")
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
