"""`sksm run`: MADV_MERGE for programs that know nothing of sksm, in any language."""

import contextlib
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from sksm.linux.features import Feature, missing
from tests.commands.conftest import PROGRAM
from tests.conftest import daemon_pid, end_daemon, poll

pytestmark = [
    pytest.mark.needs(
        Feature.SECCOMP_USER_NOTIF, Feature.PTRACE_SEIZE, Feature.PIDFD_GETFD
    ),
    pytest.mark.usefixtures("runtime"),
]
RUN = [*PROGRAM, "run", "--"]
SOURCE = Path(__file__).with_name("program.c")


@pytest.fixture(scope="session", params=["dynamic", "static"])
def program(request, tmp_path_factory):
    """The path of the C program, linked one way or the other."""
    if shutil.which("cc") is None:
        pytest.skip("needs a C compiler")
    path = tmp_path_factory.mktemp("program") / request.param
    static = ["-static"] if request.param == "static" else []
    command = ["cc", "-O1", "-pthread", *static, "-o", path, SOURCE]
    if subprocess.run(command, capture_output=True, timeout=100).returncode:
        pytest.skip(f"cannot link a {request.param} program here")
    return str(path)


def run(*command, **popen):
    return subprocess.run(
        [*RUN, *command], capture_output=True, text=True, timeout=100, **popen
    )


@pytest.mark.parametrize("threads", [1, 8])
def test_equal_pages_share_a_frame_after_each_merge_and_none_after_each_write(
    program, threads
):
    """Three times over, with a page of zeros among them; frames are the oracle."""
    done = run(program, "rounds", str(threads))
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("what", ["errors", "other", "grow"])
def test_it_answers_as_the_proposed_kernel_would(program, what):
    """EINVAL, ENOMEM, 0 for what cannot merge; other processes; other advice."""
    done = run(program, what)
    assert (done.returncode, done.stderr) == (0, "")


def test_without_it_the_kernel_says_no(program):
    """So the tests above are about something."""
    if missing(Feature.MADV_MERGE) is None:
        pytest.skip("the kernel has MADV_MERGE")
    done = subprocess.run([program, "rounds", "1"], capture_output=True, timeout=60)
    assert done.returncode == 1


def test_what_the_program_starts_has_it_too(program):
    """By fork and exec; and `sksm run` inside `sksm run`."""
    assert run("sh", "-c", f"{program} rounds 1 && {program} errors").returncode == 0
    nested = run(*RUN, program, "rounds", "1")
    assert (nested.returncode, nested.stderr) == (0, "")


def test_python_has_it_by_ctypes():
    """No extension is needed."""
    script = (
        "import ctypes, mmap\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS\n"
        "area = mmap.mmap(-1, 8 * 4096, flags)\n"
        "area.write(bytes(range(256)) * 128)\n"
        "at = ctypes.addressof(ctypes.c_char.from_buffer(area))\n"
        "print(libc.madvise(ctypes.c_void_p(at), ctypes.c_size_t(4 * 4096), 26))\n"
        "assert area[:] == bytes(range(256)) * 128\n"
    )
    done = run(sys.executable, "-c", script)
    assert (done.stdout, done.stderr) == ("0\n", "")


@pytest.mark.parametrize(
    ("script", "code"),
    [("exit 7", 7), ("kill -TERM $$", -signal.SIGTERM), ("kill -KILL $$", -9)],
)
def test_the_exit_status_is_the_programs(script, code):
    """And how it ended: nobody stands between it and who started it."""
    assert run("sh", "-c", script).returncode == code


@pytest.mark.parametrize(
    ("name", "code"), [("nothing-here", 127), ("/etc/passwd", 126)]
)
def test_what_cannot_be_started_is_told_as_shells_do(name, code):
    """With the reason."""
    done = run(name)
    assert done.returncode == code
    assert f"sksm: {name}: " in done.stderr


@pytest.fixture
def started(program):
    """Give `started(*command)`: one that runs, with pipes; all are ended."""
    held = []

    def start(*command, **popen):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        held.append(subprocess.Popen([*RUN, *command], **pipes, **popen))
        return held[-1]

    yield start
    for one in held:
        one.kill()
        one.wait()
        one.stdin.close()
        one.stdout.close()


def supervisors(runtime):
    """List the processes that answer, for this runtime directory."""
    daemon = daemon_pid(runtime)
    return psutil.Process(daemon).children() if daemon else []


def ask(process):
    process.stdin.write("\n")
    process.stdin.flush()
    return process.stdout.readline().strip()


def test_the_program_is_the_process_that_was_started(started):
    """Signals reach it, and its parent is who started it."""
    script = "trap 'echo term; exit 3' TERM; echo $$ $PPID; "
    one = started("sh", "-c", script + "while :; do sleep 0.05; done")
    assert one.stdout.readline() == f"{one.pid} {os.getpid()}\n"
    one.terminate()
    assert one.stdout.readline() == "term\n"
    assert one.wait(20) == 3


@pytest.mark.parametrize("name", ["SIGPIPE", "SIGXFSZ"])
def test_no_signal_is_ignored_for_our_sake(name):
    """Python ignores some, and what it starts would, too: `yes | head` for ever."""
    done = run("grep", "SigIgn", "/proc/self/status")
    assert not int(done.stdout.split()[1], 16) >> (signal.Signals[name] - 1) & 1


def test_without_its_supervisor_a_program_goes_on(started, program, runtime):
    """The call then says ENOSYS, and nothing else changes; not for others either."""
    one, two = started(program, "wait"), started(program, "wait")
    assert ask(one) == ask(two) == "0"
    first, second = supervisors(runtime)
    first.kill()
    answers = {ask(one), ask(two)}
    assert answers == {"0", "38"}  # ENOSYS
    poll(lambda: supervisors(runtime) == [second])
    for each in (one, two):
        each.stdin.close()
        assert each.wait(20) == 0
    poll(lambda: not supervisors(runtime))


def test_without_the_daemon_calls_are_answered_by_the_next(started, program, runtime):
    """Supervisors do not end with it."""
    one = started(program, "wait")
    assert ask(one) == "0"
    end_daemon(runtime)
    assert ask(one) == "0"


def test_what_outlives_the_program_is_answered_and_then_nobody_is_left(
    program, tmp_path, runtime
):
    """Who answers ends with the last of them."""
    late = tmp_path / "late"
    script = f"(sleep 1; {program} rounds 1; echo $? >{late}) >/dev/null 2>&1 & exit 4"
    done = run("sh", "-c", script)
    assert done.returncode == 4
    assert not late.exists()
    poll(late.exists)
    poll(lambda: late.read_text() == "0\n")
    poll(lambda: not supervisors(runtime))


@pytest.mark.parametrize(
    "starts",
    [10, pytest.param(1000, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])],
)
def test_many_starts_leave_nothing_behind(program, runtime, starts):
    """No process, no descriptor of the daemon's, no page of the pool."""
    run(program, "rounds", "1")
    pid = daemon_pid(runtime)
    before = len(os.listdir(f"/proc/{pid}/fd"))
    for _ in range(starts):
        assert run(program, "rounds", "1").returncode == 0
    poll(lambda: not supervisors(runtime))
    poll(lambda: len(os.listdir(f"/proc/{pid}/fd")) <= before)


# -- examples, code, terminals

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_the_c_example_runs(tmp_path):
    """As its first line says."""
    if shutil.which("cc") is None:
        pytest.skip("needs a C compiler")
    example = str(tmp_path / "merge")
    subprocess.run(["cc", "-Wall", "-o", example, EXAMPLES / "merge.c"], check=True)
    done = run(example)
    assert (done.returncode, done.stderr) == (0, "")


def test_patched_code_merges_and_goes_on_running():
    """Code of libc, which is running: no more memory than before is the program's."""
    done = run(sys.executable, EXAMPLES / "patched.py")
    assert (done.returncode, done.stderr) == (0, "")
    before, patched, merged = map(int, re.findall(r"(\d+) KiB", done.stdout))
    assert patched > before + 1000
    assert merged < before + (patched - before) / 10


def test_a_program_at_a_terminal_gets_its_keys():
    """Ctrl-C is for it, and its exit status is ours."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(RUN[0], [*RUN, "sh", "-c", "trap 'echo caught; exit 9' INT; cat"])
    said = b""

    def reads(word):
        nonlocal said
        with contextlib.suppress(OSError):
            said += os.read(terminal, 1000)
        return word in said

    os.write(terminal, b"hello\n")
    poll(lambda: reads(b"hello\r\nhello"))
    os.write(terminal, b"\x03")
    poll(lambda: reads(b"caught"))
    _, status = os.waitpid(pid, 0)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(status) == 9
