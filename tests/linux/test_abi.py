"""Our declarations against the C compiler's view of the installed headers."""

import ctypes
import os
import shutil
import signal
import subprocess

import numpy as np
import pytest

from sksm.linux import (
    calls,
    elf,
    libc,
    maps,
    memfd,
    notify,
    pagemap,
    ptrace,
    seccomp,
    userfaultfd,
)
from sksm.process import borrowing, permission, reading, terrain
from sksm.store import pool

pytestmark = pytest.mark.check


def sizes(module, *names):
    return {f"sizeof(struct {s})": ctypes.sizeof(getattr(module, s)) for s in names}


def offsets(struct):
    """Every field's place: a struct of the right size may have them swapped."""
    name = struct.__name__
    return {
        f"__builtin_offsetof(struct {name}, {field[0]})": getattr(
            struct, field[0]
        ).offset
        for field in struct._fields_
    }


def dtype_offsets(name, dtype, paths):
    return {
        f"__builtin_offsetof(struct {name}, {path})": dtype.fields[field][1]
        for field, path in paths.items()
    } | {f"sizeof(struct {name})": dtype.itemsize}


def constants(module, *names):
    return {name: getattr(module, name) for name in names}


# By header, and what it must have for the rest to be expected of it.
DECLARED = {
    ("linux/userfaultfd.h", None): {
        **sizes(
            userfaultfd,
            *("uffdio_api", "uffdio_range", "uffdio_register", "uffdio_copy"),
            "uffdio_writeprotect",
        ),
        **offsets(userfaultfd.uffdio_api),
        **offsets(userfaultfd.uffdio_range),
        **offsets(userfaultfd.uffdio_register),
        **offsets(userfaultfd.uffdio_copy),
        **offsets(userfaultfd.uffdio_writeprotect),
        **dtype_offsets(
            "uffdio_writeprotect",
            userfaultfd.WRITEPROTECT,
            {"start": "range.start", "len": "range.len", "mode": "mode"},
        ),
        **constants(
            userfaultfd,
            *("UFFDIO_API", "UFFDIO_REGISTER", "UFFDIO_UNREGISTER", "UFFDIO_WAKE"),
            *("UFFDIO_COPY", "UFFDIO_WRITEPROTECT", "UFFD_API", "UFFD_USER_MODE_ONLY"),
            *("UFFD_FEATURE_PAGEFAULT_FLAG_WP", "UFFDIO_REGISTER_MODE_WP"),
            "UFFDIO_WRITEPROTECT_MODE_WP",
        ),
    },
    ("linux/userfaultfd.h", "USERFAULTFD_IOC_NEW"): constants(
        userfaultfd, "USERFAULTFD_IOC_NEW"
    ),
    ("linux/userfaultfd.h", "UFFD_FEATURE_WP_ASYNC"): constants(
        userfaultfd, "UFFD_FEATURE_WP_ASYNC"
    ),
    ("linux/fs.h", "PAGEMAP_SCAN"): {
        "PAGEMAP_SCAN": pagemap.PAGEMAP_SCAN,
        **dtype_offsets(
            "page_region",
            pagemap.PAGE_REGION,
            {name: name for name in pagemap.PAGE_REGION.names},
        ),
        **sizes(pagemap, "pm_scan_arg"),
        **offsets(pagemap.pm_scan_arg),
        **{f"PAGE_IS_{bit.name}": bit.value for bit in pagemap.Category},
    },
    ("linux/fs.h", "PROCMAP_QUERY"): {
        "PROCMAP_QUERY": maps.PROCMAP_QUERY,
        **sizes(maps, "procmap_query"),
        **offsets(maps.procmap_query),
        **constants(maps, "PROCMAP_QUERY_COVERING_OR_NEXT_VMA"),
    },
    ("linux/elf.h", None): {
        **sizes(elf, "elf64_hdr"),
        **offsets(elf.elf64_hdr),
        **dtype_offsets("elf64_shdr", elf.SHDR, {n: n for n in elf.SHDR.names}),
        **dtype_offsets("elf64_sym", elf.SYM, {n: n for n in elf.SYM.names}),
        **constants(elf, "EM_X86_64", "SHT_DYNSYM"),
    },
    ("linux/seccomp.h", "SECCOMP_RET_USER_NOTIF"): {
        **sizes(seccomp, "seccomp_data"),
        **offsets(seccomp.seccomp_data),
        **{f"SECCOMP_RET_{action.name}": action.value for action in seccomp.Action},
    },
    ("linux/filter.h", None): {
        **dtype_offsets(
            "sock_filter",
            seccomp.INSTRUCTION,
            {name: name for name in seccomp.INSTRUCTION.names},
        ),
        **{f"BPF_{kind.name}": kind.value for kind in seccomp.Class},
        **constants(
            seccomp, *(name for name in vars(seccomp) if name.startswith("BPF_"))
        ),
    },
    ("linux/audit.h", None): {
        f"AUDIT_ARCH_{os.uname().machine.upper()}": seccomp.AUDIT_ARCH
    },
    ("linux/ptrace.h", None): {
        **constants(seccomp, "PTRACE_SECCOMP_GET_FILTER"),
        **constants(
            ptrace,
            *(name for name in vars(ptrace) if name.startswith("PTRACE_")),
        ),
        **sizes(ptrace, "ptrace_rseq_configuration"),
        **offsets(ptrace.ptrace_rseq_configuration),
    },
    ("linux/wait.h", None): {"__WALL": ptrace.WALL},
    ("linux/kcmp.h", None): {"KCMP_FILE": ptrace._KCMP_FILE},
    ("linux/rseq.h", None): {
        "__builtin_offsetof(struct rseq, rseq_cs)": borrowing._RSEQ_CS,
        # As it is unpacked there: two words of 32 bits, three of 64.
        "__builtin_offsetof(struct rseq_cs, start_ip)": 8,
        "__builtin_offsetof(struct rseq_cs, post_commit_offset)": 16,
        "__builtin_offsetof(struct rseq_cs, abort_ip)": 24,
    },
    ("linux/auxvec.h", None): {"AT_SYSINFO_EHDR": terrain._AT_SYSINFO_EHDR},
    ("linux/capability.h", None): constants(permission, "CAP_SYS_PTRACE"),
    ("linux/mman.h", None): {
        **constants(
            libc,
            *("PROT_NONE", "PROT_READ", "PROT_WRITE", "PROT_EXEC", "MAP_SHARED"),
            *("MAP_PRIVATE", "MAP_FIXED", "MAP_ANONYMOUS", "MAP_NORESERVE"),
            *("MREMAP_MAYMOVE", "MREMAP_FIXED", "MADV_DONTNEED", "MADV_MERGEABLE"),
            *("MADV_UNMERGEABLE", "MADV_POPULATE_READ", "MAP_FIXED_NOREPLACE"),
            *("MADV_DONTFORK", "MADV_DOFORK", "MADV_DONTDUMP", "MADV_DODUMP"),
            *("MADV_WIPEONFORK", "MADV_KEEPONFORK", "PROT_GROWSDOWN", "MS_INVALIDATE"),
        )
    },
    ("linux/seccomp.h", "SECCOMP_IOCTL_NOTIF_ID_VALID"): {
        **sizes(notify, "seccomp_notif", "seccomp_notif_resp"),
        **constants(
            notify,
            *("SECCOMP_SET_MODE_FILTER", "SECCOMP_FILTER_FLAG_NEW_LISTENER"),
            *("SECCOMP_IOCTL_NOTIF_RECV", "SECCOMP_IOCTL_NOTIF_SEND"),
        ),
        **offsets(notify.seccomp_notif),
        **offsets(notify.seccomp_notif_resp),
    },
    ("linux/prctl.h", None): constants(
        libc,
        "PR_SET_DUMPABLE",
        "PR_SET_CHILD_SUBREAPER",
        "PR_SET_NO_NEW_PRIVS",
        "PR_SET_PTRACER",
    ),
    ("linux/prctl.h", "PR_SET_MEMORY_MERGE"): constants(
        libc, "PR_SET_MEMORY_MERGE", "PR_GET_MEMORY_MERGE"
    ),
    ("linux/fcntl.h", None): {"F_ADD_SEALS": pool._F_ADD_SEALS, "F_SEAL_SHRINK": 2},
    ("linux/falloc.h", None): {
        "(FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE)": pool._PUNCH
    },
    ("linux/memfd.h", "MFD_EXEC"): {"MFD_EXEC": memfd.MFD_EXEC},
    ("linux/uio.h", None): {
        "sizeof(struct iovec)": ctypes.sizeof(libc.iovec),
        "UIO_MAXIOV": reading.IOV_MAX,
        **offsets(libc.iovec),
    },
    ("sys/syscall.h", None): {
        **{f"SYS_{name}": number for name, number in libc.SYS.items()},
        "SYS_kcmp": ptrace._KCMP,
    },
    ("signal.h", None): {"SIG_SETMASK": calls.SIG_SETMASK},
}

if os.uname().machine == "x86_64":
    DECLARED["sys/user.h", None] = {
        "sizeof(struct user_regs_struct)": ctypes.sizeof(ptrace.Registers),
        **{
            f"__builtin_offsetof(struct user_regs_struct, {name})": getattr(
                ptrace.Registers, name
            ).offset
            for name, _ in ptrace.Registers._fields_
        },
    }
    DECLARED["sys/syscall.h", None]["SYS_restart_syscall"] = ptrace.NR_RESTART_SYSCALL


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
@pytest.mark.parametrize(
    ("header", "probe", "values"),
    [(*key, values) for key, values in DECLARED.items()],
    ids=[f"{header} {probe or ''}".strip() for header, probe in DECLARED],
)
def test_declarations_match_the_header(header, probe, values):
    """`_Static_assert` lets the compiler compare; nothing is run."""
    include = f"#include <sys/ioctl.h>\n#include <{header}>\n"

    def compiled(lines):
        cc = ["cc", "-xc", "-fsyntax-only", "-"]
        text = include + lines
        return subprocess.run(cc, input=text, text=True, capture_output=True)

    if probe and compiled(f"long probe(void) {{ return {probe}; }}").returncode:
        pytest.skip(f"installed <{header}> is older than {probe}")
    result = compiled(
        "".join(
            f'_Static_assert({expression} == {value}UL, "{expression}");\n'
            for expression, value in values.items()
        )
    )
    assert result.returncode == 0, result.stderr


def test_faults_are_left_unblocked_by_their_numbers():
    """The numbers stand in the table as digits; these are their names."""
    names = ("SIGILL", "SIGTRAP", "SIGBUS", "SIGFPE", "SIGSEGV", "SIGSYS")
    assert set(calls._FAULTS) == {getattr(signal, name) for name in names}


def test_a_row_of_the_table_is_as_the_machine_code_reads_it():
    """The offsets that stand in the assembler source."""
    places = {name: calls.CALL.fields[name][1] for name in calls.CALL.names}
    assert places == {
        "function": 0,
        "args": 8,
        "want": 56,
        "otherwise": 64,
        "result": 72,
    }
    assert np.zeros(1, calls.CALL).nbytes == 80


def test_a_stop_for_a_system_call_is_a_marked_trap():
    """As PTRACE_O_TRACESYSGOOD marks it: ptrace(2)."""
    assert signal.SIGTRAP | 0x80 == ptrace.SYSCALL_STOP
    status = ptrace.PTRACE_EVENT_STOP << 16 | signal.SIGTRAP << 8 | 0x7F
    assert os.WIFSTOPPED(status)
    assert ptrace.event(status) == ptrace.PTRACE_EVENT_STOP
