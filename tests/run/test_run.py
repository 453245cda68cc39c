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

from sksm import ancestry
from sksm.daemon.client import RemoteStore
from sksm.errors import NotPermitted, Unsupported
from sksm.linux.features import Feature, missing
from sksm.process import permission, status
from tests.commands.conftest import PROGRAM
from tests.conftest import daemon_pid, end_daemon, ended, poll
from tests.support import in_child

pytestmark = [
    pytest.mark.needs(
        Feature.SECCOMP_USER_NOTIF, Feature.PTRACE_SEIZE, Feature.PIDFD_GETFD
    ),
    pytest.mark.usefixtures("runtime"),
]
SOURCE = Path(__file__).with_name("program.c")
BELOW = [sys.executable, str(Path(__file__).with_name("below.py"))]


@pytest.fixture(
    params=[
        pytest.param(PROGRAM, id="in_its_place"),
        pytest.param(BELOW, id="below"),
    ]
)
def prefix(request):
    """What is put before a program: it takes our place, or runs below us."""
    return [*request.param, "run", "--"]


@pytest.fixture
def run(prefix):
    """Give `run(*command)`: to its end; a CompletedProcess."""

    def finish(*command, **popen):
        pipes = {"capture_output": True, "text": True, "timeout": 100}
        return subprocess.run([*prefix, *command], **pipes, **popen)

    return finish


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


@pytest.mark.parametrize("threads", [pytest.param(1, marks=pytest.mark.check), 8])
def test_equal_pages_share_a_frame_after_each_merge_and_none_after_each_write(
    run, program, threads
):
    """Three times over, with a page of zeros among them; frames are the oracle."""
    done = run(program, "rounds", str(threads))
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("what", ["errors", "other", "grow"])
def test_it_answers_as_the_proposed_kernel_would(run, program, what):
    """EINVAL, ENOMEM, 0 for what cannot merge; other processes; other advice."""
    done = run(program, what)
    assert (done.returncode, done.stderr) == (0, "")


def test_objects_of_one_page_share_and_may_grow(run, program):
    """Behind their page there is nothing, and what is nothing reads as zeros."""
    done = run(program, "singles")
    assert (done.returncode, done.stderr) == (0, "")


def test_memory_that_is_merged_again_does_not_fall_to_pieces(run, program):
    """The last page stays apart from the rest, and the rest together."""
    done = run(program, "again")
    assert (done.returncode, done.stderr) == (0, "")


def test_without_it_the_kernel_says_no(program):
    """So the tests above are about something."""
    if missing(Feature.MADV_MERGE) is None:
        pytest.skip("the kernel has MADV_MERGE")
    done = subprocess.run([program, "rounds", "1"], capture_output=True, timeout=60)
    assert done.returncode == 1


def test_what_the_program_starts_has_it_too(run, prefix, program):
    """By fork and exec; and `sksm run` inside `sksm run`."""
    assert run("sh", "-c", f"{program} rounds 1 && {program} errors").returncode == 0
    nested = run(*prefix, program, "rounds", "1")
    assert (nested.returncode, nested.stderr) == (0, "")


def test_python_has_it_by_ctypes(run):
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
def test_the_exit_status_is_the_programs(run, script, code):
    """And how it ended: nobody stands between it and who started it."""
    assert run("sh", "-c", script).returncode == code


@pytest.mark.parametrize(
    ("name", "code"), [("nothing-here", 127), ("/etc/passwd", 126)]
)
def test_what_cannot_be_started_is_told_as_shells_do(run, name, code):
    """With the reason."""
    done = run(name)
    assert done.returncode == code
    assert f"sksm: {name}: " in done.stderr


@pytest.fixture
def started(prefix):
    """Give `started(*command)`: one that runs, with pipes; all are ended."""
    held = []

    def start(*command, **popen):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        held.append(subprocess.Popen([*prefix, *command], **pipes, **popen))
        return held[-1]

    yield start
    for one in held:
        one.kill()
        one.wait()
        one.stdin.close()
        one.stdout.close()


def ours(runtime):
    """List the processes that use a runtime directory."""
    found = []
    for one in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if one.environ().get("SKSM_RUNTIME_DIR") == str(runtime):
                found.append(one)
    return [one for one in found if one.pid != os.getpid()]


def supervisors(runtime):
    """List the processes that answer: children of the daemon, or above a program."""
    daemon = daemon_pid(runtime)
    return [
        one
        for one in ours(runtime)
        if one.ppid() == daemon or (os.getsid(one.pid) == one.pid != daemon)
    ]


def ask(process):
    process.stdin.write("\n")
    process.stdin.flush()
    return process.stdout.readline().strip()


@pytest.mark.parametrize("prefix", [[*PROGRAM, "run", "--"]])
def test_the_program_is_the_process_that_was_started(started):
    """Its parent is who started it."""
    one = started("sh", "-c", "echo $$ $PPID")
    assert one.stdout.readline() == f"{one.pid} {os.getpid()}\n"


def test_signals_reach_the_program(started):
    """Those that end it, and others."""
    script = "trap 'echo term; exit 3' TERM; trap 'echo usr' USR1; echo ready; "
    one = started("sh", "-c", script + "while :; do sleep 0.05; done")
    assert one.stdout.readline() == "ready\n"
    one.send_signal(signal.SIGUSR1)
    assert one.stdout.readline() == "usr\n"
    one.terminate()
    assert one.stdout.readline() == "term\n"
    assert one.wait(20) == 3


def test_a_job_can_be_stopped_and_go_on(started):
    """As by Ctrl-Z and `fg`: all of its process group."""
    one = started("sh", "-c", "echo $$; read word; echo $word", process_group=0)
    program = psutil.Process(int(one.stdout.readline()))
    os.killpg(one.pid, signal.SIGTSTP)
    _, status = os.waitpid(one.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    assert program.status() == psutil.STATUS_STOPPED
    os.killpg(one.pid, signal.SIGCONT)
    one.stdin.write("word\n")
    one.stdin.flush()
    assert one.stdout.readline() == "word\n"
    assert one.wait(20) == 0


def test_who_kills_the_command_kills_the_program(started):
    """There is no more to be told then, and nobody may be left."""
    one = started("sh", "-c", "echo $$; sleep 100")
    program = int(one.stdout.readline())
    one.kill()
    poll(lambda: ended(program))


@pytest.mark.parametrize("name", ["SIGPIPE", "SIGXFSZ"])
def test_no_signal_is_ignored_for_our_sake(run, name):
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
    run, program, tmp_path, runtime
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
    [
        4,
        pytest.param(10, marks=pytest.mark.slow),
        pytest.param(1000, marks=[pytest.mark.slow, pytest.mark.limit(1800)]),
    ],
)
def test_many_starts_leave_nothing_behind(run, program, runtime, starts):
    """No process, no descriptor, no page; the program looks for what is left in it."""
    assert run(program, "leftovers").returncode == 0
    pid = daemon_pid(runtime)
    before = len(os.listdir(f"/proc/{pid}/fd")), status.own_bytes(pid)
    for _ in range(starts):
        done = run(program, "leftovers")
        assert (done.returncode, done.stderr) == (0, "")
    with contextlib.suppress(AssertionError):
        poll(lambda: [one.pid for one in ours(runtime)] == [pid])
    assert [one.cmdline() for one in ours(runtime) if one.pid != pid] == []
    with contextlib.closing(RemoteStore(start=False)) as store:
        left = store.status(reclaim=True)
        assert (left.pid, left.slots, left.grants) == (pid, 0, 0)
    poll(lambda: len(os.listdir(f"/proc/{pid}/fd")) <= before[0])
    # Python's table of interned strings grows by half a MiB, once.
    assert status.own_bytes(pid) < before[1] + (1 << 20) + starts * 1024


@pytest.mark.parametrize("prefix", [[*BELOW, "run", "--"]])
def test_who_is_left_to_us_is_buried(started, runtime):
    """The process above the program becomes the parent of orphans."""
    one = started("sh", "-c", "(sleep 100 & echo $!); read word")
    orphan = psutil.Process(int(one.stdout.readline()))
    (above,) = supervisors(runtime)
    poll(lambda: orphan.ppid() == above.pid)  # its first parent is about to end
    orphan.kill()
    poll(lambda: not psutil.pid_exists(orphan.pid))


@pytest.mark.parametrize("prefix", [[*BELOW, "run", "--"]])
def test_without_its_waiter_the_command_ends(started):
    """With the reason: how the program ends, nobody would learn."""
    one = started("sh", "-c", "echo $PPID; read word", stderr=subprocess.PIPE)
    os.kill(int(one.stdout.readline()), signal.SIGKILL)
    assert one.wait(20) == 1
    assert "was killed; it runs on" in one.stderr.readline()
    one.stderr.close()


@pytest.mark.check
@pytest.mark.parametrize(
    ("refuses", "error"),
    [("running.listen", Unsupported), ("supervisor.known_filters", NotPermitted)],
)
def test_a_program_that_nobody_may_supervise_is_not_started(
    monkeypatch, tmp_path, refuses, error
):
    """Whoever it is that finds out, the command tells."""

    def refuse(*_):
        raise error("for a reason")

    mark = tmp_path / "started"
    monkeypatch.setattr(f"sksm.ancestry.{refuses}", refuse)

    def start():
        with pytest.raises(error, match="for a reason"):
            ancestry.run(["touch", str(mark)])
        assert not signal.pthread_sigmask(signal.SIG_BLOCK, [])

    in_child(start)
    assert not mark.exists()


def test_below_is_where_yama_lets_us_look(worker):
    """And nowhere else: here it is not only said to be so."""
    if not permission.only_descendants():
        pytest.skip("nobody keeps us from tracing (kernel.yama.ptrace_scope)")
    script = "import sys; print(flush=True); sys.stdin.read()"
    child, look = worker(script), "open('/proc/%d/mem', 'rb')"
    child.answer()
    with open(f"/proc/{child.pid}/mem", "rb"):
        pass
    sibling = subprocess.run(
        [sys.executable, "-c", look % child.pid], capture_output=True, text=True
    )
    assert "PermissionError" in sibling.stderr


# -- examples, code, terminals

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_the_c_example_runs(run, tmp_path):
    """As its first line says."""
    if shutil.which("cc") is None:
        pytest.skip("needs a C compiler")
    example = str(tmp_path / "merge")
    subprocess.run(["cc", "-Wall", "-o", example, EXAMPLES / "merge.c"], check=True)
    done = run(example)
    assert (done.returncode, done.stderr) == (0, "")


def test_patched_code_merges_and_goes_on_running(run):
    """Code of libc, which is running: no more memory than before is the program's."""
    done = run(sys.executable, EXAMPLES / "patched.py")
    assert (done.returncode, done.stderr) == (0, "")
    before, patched, merged = map(int, re.findall(r"(\d+) KiB", done.stdout))
    assert patched > before + 1000
    assert merged < before + (patched - before) / 10


def test_a_program_at_a_terminal_gets_its_keys(prefix):
    """Ctrl-C is for it, and its exit status is ours."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(
            prefix[0], [*prefix, "sh", "-c", "trap 'echo caught; exit 9' INT; cat"]
        )
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
