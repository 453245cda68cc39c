"""Which processes a scanner watches: real children, and what /proc says of others."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from sksm.process import status
from sksm.scanner import selection
from sksm.scanner.selection import Rule, Selection
from tests.conftest import ended, poll

pytestmark = pytest.mark.check

# Takes names, and has children that wait for their parents to be killed or longer.
CHILD = """
import subprocess, sys
print("up", flush=True)
for line in sys.stdin:
    word, _, rest = line.strip().partition(" ")
    if word == "name":
        with open("/proc/self/comm", "w") as comm:
            comm.write(rest)
        print("done", flush=True)
    elif word == "child":
        command = [sys.executable, "-c", rest]
        print(subprocess.Popen(command, stdin=subprocess.DEVNULL).pid, flush=True)
"""
WAIT = "import time; time.sleep(100)"


@pytest.fixture
def named(worker):
    """Give `named(name, *args)`: a child that goes by that name."""

    def start(name, *args):
        one = worker(CHILD, *args)
        assert one.answer() == "up"
        assert one.ask(f"name {name}") == "done"
        return one

    return start


@pytest.fixture
def called(tmp_path):
    """Give `called(name)`: the pid of a program by that name, of any length."""
    started = []

    def start(name, *, script=False):
        path = tmp_path / name
        if script:
            path.write_text(f"#!{sys.executable}\n{CHILD}")
            path.chmod(0o700)
        else:
            path.symlink_to(sys.executable)
        command = [path] if script else [path, "-c", CHILD]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        started.append(subprocess.Popen(command, **pipes))
        assert started[-1].stdout.readline() == b"up\n"
        return started[-1].pid

    yield start
    for one in started:
        one.communicate()


@pytest.fixture
def told(monkeypatch):
    """Give `told(pid, file, content)`: what /proc says of a process from now on.

    An exception as the content is raised.
    """
    real, said = status.contents, {}

    def contents(pid, name, *most):
        answer = said.get((pid, name))
        if isinstance(answer, Exception):
            raise answer
        return real(pid, name, *most) if answer is None else answer

    monkeypatch.setattr(status, "contents", contents)
    return lambda pid, name, content: said.update({(pid, name): content})


@pytest.fixture
def looked_at(monkeypatch):
    """List what is read in /proc, as pairs of pid and file."""
    real, read = status.contents, []

    def contents(pid, name, *most):
        read.append((pid, name))
        return real(pid, name, *most)

    monkeypatch.setattr(status, "contents", contents)
    return read


@pytest.fixture
def clock(monkeypatch):
    """Give `clock(seconds)`: it is that much later from now on."""
    now, later = selection._uptime_s, []
    monkeypatch.setattr(selection, "_uptime_s", lambda: now() + sum(later))
    return later.append


def name_of(test):
    """Make a name that no other process has, of 15 bytes at most."""
    return f"{test}-{os.getpid()}"[:15]


def test_a_name_is_a_shell_pattern(named):
    """All of the name is meant; upper and lower case differ."""
    name = name_of("glob")
    one = named(name)
    for pattern in (name, "glob-*", f"gl[no]b{name[4:]}", f"?{name[1:]}"):
        assert Selection([Rule(name=pattern)]).find()[one.pid] == Rule(name=pattern)
    for pattern in (name[:-1], name.upper(), f"x{name}"):
        assert one.pid not in Selection([Rule(name=pattern)]).find()


def test_odd_names_are_names(named):
    """The kernel writes them as they are, between brackets."""
    one = named("a) S 1 (b")
    assert one.pid in Selection([Rule(name="a) S 1 (b")]).find()


def test_a_new_name_is_noticed(named, clock):
    """However long it had the other one."""
    one = named("before")
    chosen = Selection([Rule(name="after")])
    clock(10_000)
    assert one.pid not in chosen.find()
    one.ask("name after")
    assert one.pid in chosen.find()
    one.ask("name before")
    assert one.pid not in chosen.find()


def test_names_that_the_kernel_cuts_match_as_a_whole(called, named):
    """Where the arguments of a program or a script tell them."""
    program = called("a-very-long-name-of-a-program")
    script = called("a-very-long-name-of-a-script", script=True)
    other = named("a-very-long-nam").pid  # which is all that is known of it
    assert list(Selection([Rule(name="a-*-of-a-program")]).find()) == [program]
    assert list(Selection([Rule(name="a-*-of-a-script")]).find()) == [script]
    cut = Selection([Rule(name="a-very-long-nam")]).find()
    assert cut.keys() == {program, script, other}


def test_arguments_do_not_matter_where_nothing_is_cut(named, told):
    """A name of 14 bytes is whole, whatever begins with it."""
    one = named("abcdefghijklmn")
    told(one.pid, "cmdline", b"/bin/abcdefghijklmnopq\0")
    assert one.pid not in Selection([Rule(name="abcdefghijklmnopq")]).find()


def test_a_pid_means_all_that_come_of_it(named):
    """Children of its children, too, and nobody else."""
    parent, other = named("parent"), named("other")
    script = f"import subprocess, sys; subprocess.run([sys.executable, '-c', '{WAIT}'])"
    child = psutil.Process(int(parent.ask(f"child {script}")))
    grandchild = poll(child.children)[0]
    try:
        found = Selection([Rule(pid=parent.pid)]).find()
        assert found.keys() == {parent.pid, child.pid, grandchild.pid}
        assert other.pid not in found
    finally:
        child.kill()
        grandchild.kill()


def test_what_came_of_a_pid_stays_in_when_its_parent_ends(named, clock):
    """Others become its parent then; that is seen when it is looked at again."""
    parent = named("parent")
    chosen = Selection([Rule(pid=parent.pid)])
    child = psutil.Process(int(parent.ask(f"child {WAIT}")))
    try:
        assert chosen.find().keys() == {parent.pid, child.pid}
        parent.kill()
        poll(lambda: child.ppid() != parent.pid)
        clock(10_000)
        assert list(chosen.find()) == [child.pid]
        assert list(chosen.find()) == [child.pid]
    finally:
        child.kill()


def test_a_pid_that_another_process_has_by_now_is_not_meant(named, told):
    """Nor one that nobody had when the selection was made."""
    one = named("first")
    chosen = Selection([Rule(pid=one.pid)])
    stat = status.contents(one.pid, "stat")
    fields = stat.split()
    later = b" ".join([*fields[:21], b"%d" % (int(fields[21]) + 1), *fields[22:]])
    told(one.pid, "stat", later)
    assert chosen.find() == {}

    told(one.pid, "stat", ProcessLookupError())
    early = Selection([Rule(pid=one.pid)])
    told(one.pid, "stat", stat)
    assert early.find() == {}


def test_parents_in_a_circle_are_no_trap(named, told):
    """Each is read in its own moment; a pid may change hands in between."""
    one, two = named("one"), named("two")
    for child, parent in ((one, two), (two, one)):
        stat = status.contents(child.pid, "stat")
        made = re.sub(rb"\) (.) \d+", rb") \1 %d" % parent.pid, stat)
        told(child.pid, "stat", made)
    assert Selection([Rule(pid=one.pid)]).find().keys() == {one.pid, two.pid}


def test_a_user_is_the_one_with_whose_rights_a_process_acts(named, told):
    """The second of the four that the kernel tells."""
    one, uid = named("user"), os.geteuid()
    assert one.pid in Selection([Rule(uid=uid)]).find()
    assert one.pid not in Selection([Rule(uid=uid + 1)]).find()
    told(one.pid, "status", b"Name:\tUid: 9\nUid:\t1\t2\t3\t4\nGid:\t5\n")
    for other, found in ((1, False), (2, True), (3, False), (4, False)):
        assert (one.pid in Selection([Rule(uid=other)]).find()) == found


@pytest.mark.parametrize(
    ("cgroup", "found"),
    [
        ("/system.slice/nginx.service", True),
        ("/system.slice", True),
        ("/system.slice/", True),
        ("/system", False),
        ("/system.slice/nginx.service/more", False),
        ("/nginx.service", False),
        ("/memory/a:b", True),
        ("/", True),
    ],
)
def test_a_cgroup_holds_what_is_in_it_and_below(named, told, cgroup, found):
    """In any hierarchy."""
    one = named("grouped")
    lines = b"2:memory:/memory/a:b\n1:name=systemd:/\n0::/system.slice/nginx.service\n"
    told(one.pid, "cgroup", lines)
    assert (one.pid in Selection([Rule(cgroup=cgroup)]).find()) == found


def test_a_cgroup_that_was_removed_holds_its_processes(named, told):
    """The kernel adds a word to its path."""
    one = named("grouped")
    told(one.pid, "cgroup", b"0::/gone (deleted)\n")
    assert one.pid in Selection([Rule(cgroup="/gone")]).find()


def test_a_process_is_in_the_cgroups_it_is_in(named):
    """As the kernel tells them, all hierarchies."""
    one = named("grouped")
    lines = Path(f"/proc/{one.pid}/cgroup").read_text().splitlines()
    assert lines
    for line in lines:
        rule = Rule(name="grouped", cgroup=line.split(":", 2)[2])
        assert one.pid in Selection([rule]).find()


@pytest.mark.parametrize(
    ("unit", "found"),
    [
        ("app@1", True),
        ("app@1.service", True),
        ("app@*", True),
        ("app@2", False),
        ("app", False),
        ("system", False),
        ("system.slice", True),
        ("cpu", True),  # systemd writes "_cpu.service": the kernel has cpu.stat
        ("1.service", False),
    ],
)
def test_a_unit_is_a_part_of_a_cgroups_path(named, told, unit, found):
    """Without an ending it is a service."""
    one = named("unit")
    told(one.pid, "cgroup", b"0::/system.slice/app@1.service/_cpu.service\n")
    assert (one.pid in Selection([Rule(unit=unit)]).find()) == found


@pytest.mark.parametrize(
    ("name", "program", "found"),
    [
        ("qemu-system-x86", "/usr/bin/anything", True),
        ("qemu-kvm", "/usr/bin/anything", True),
        ("kvm", "/usr/bin/anything", True),
        ("a guest", "/usr/bin/qemu-system-aarch64", True),
        ("a guest", "/usr/libexec/qemu-kvm", True),
        ("a guest", "/usr/bin/kvm", True),
        ("a guest", "/usr/bin/qemu-kvm (deleted)", True),
        ("qemu-img", "/usr/bin/qemu-img", False),
        ("kvm_stat", "/usr/bin/python3", False),
    ],
)
def test_qemu_is_known_by_its_name_or_its_program(
    named, monkeypatch, name, program, found
):
    """Tools of QEMU, and of KVM, have no guest."""
    one = named(name)
    monkeypatch.setattr(os, "readlink", lambda _: program)
    assert (one.pid in Selection([Rule(qemu=True)]).find()) == found


def test_a_program_is_the_file_that_is_executed(named):
    """Not the name by which it goes."""
    one = named("another")
    assert status.program(one.pid) == os.path.realpath(sys.executable)


def test_all_criteria_must_hold(named):
    """One that does not is enough to be out."""
    one, uid = named("both"), os.geteuid()
    assert one.pid in Selection([Rule(name="both", uid=uid, pid=os.getpid())]).find()
    assert one.pid not in Selection([Rule(name="both", uid=uid + 1)]).find()
    assert one.pid not in Selection([Rule(name="other", uid=uid)]).find()
    assert one.pid not in Selection([Rule(name="both", qemu=True)]).find()


def test_the_first_rule_that_matches_has_the_process(named):
    """The domain of the others does not matter."""
    one = named("first")
    rules = [Rule(name="other"), Rule(name="fir*", domain="a"), Rule(name="first")]
    assert Selection(rules).find()[one.pid] == rules[1]


def test_what_is_excluded_is_out(named):
    """Whatever rules match it."""
    one, other = named("out"), named("in")
    rules = [Rule(pid=one.pid), Rule(name="out"), Rule(name="in")]
    assert list(Selection(rules, [Rule(name="o?t")]).find()) == [other.pid]


def test_a_rule_without_criteria_is_refused():
    """A domain is none; root is one."""
    for nothing in ({}, {"qemu": False}, {"domain": "a"}):
        with pytest.raises(ValueError, match="at least one of pid, name, uid"):
            Rule(**nothing)
    assert Rule(uid=0).uid == 0


@pytest.mark.parametrize("path", ["system.slice", "", "/sys/fs/cgroup/system.slice"])
def test_a_cgroup_that_nothing_is_in_is_refused(path):
    """Paths are those of /proc/PID/cgroup, not of the file system."""
    with pytest.raises(ValueError, match="as in /proc/PID/cgroup"):
        Rule(cgroup=path)


def test_we_are_never_watched(called, named):
    """This process, and every program of sksm."""
    ours = [called("sksmd"), called("sksm", script=True)]
    daemon = named("python3", "-m", "sksm.daemon")
    other = named("other")
    ours += [daemon.pid, os.getpid()]
    found = Selection([Rule(pid=os.getpid())]).find()
    assert other.pid in found
    assert found.keys().isdisjoint(ours)


def test_zombies_are_never_watched(named):
    """They have a name and a user, but no memory."""
    one = named("zombie")
    chosen = Selection([Rule(name="zombie")])
    assert one.pid in chosen.find()
    os.kill(one.pid, signal.SIGKILL)
    poll(lambda: ended(one.pid))
    assert chosen.find() == {}
    assert Selection([Rule(name="zombie")]).find() == {}


def test_threads_of_the_kernel_are_never_watched(named, told):
    """Flagged as such, whatever they are called."""
    one = named("kthread")
    fields = status.contents(one.pid, "stat").split()
    flags = b"%d" % (int(fields[8]) | 0x200000)  # PF_KTHREAD
    told(one.pid, "stat", b" ".join([*fields[:8], flags, *fields[9:]]))
    assert Selection([Rule(name="kthread")]).find() == {}


@pytest.mark.parametrize(
    "error", [FileNotFoundError(), ProcessLookupError(), PermissionError()]
)
@pytest.mark.parametrize("file", ["stat", "cgroup", "cmdline"])
def test_what_ends_meanwhile_or_is_hidden_is_left_out(named, told, file, error):
    """And the others are found."""
    one, other = named("gone"), named("here")
    for pid in (one.pid, other.pid):
        told(pid, "cgroup", b"0::/found\n")
    told(one.pid, file, error)
    assert list(Selection([Rule(cgroup="/found")]).find()) == [other.pid]


def test_other_errors_are_not_swallowed(named, told):
    """No more files to be had, for one."""
    told(named("one").pid, "stat", OSError("too many open files"))
    with pytest.raises(OSError, match="too many"):
        Selection([Rule(name="one")]).find()


def test_what_ended_is_forgotten(named):
    """It is not found, and no trace of it is kept."""
    one = named("short")
    chosen = Selection([Rule(name="short")])
    assert one.pid in chosen.find()
    one.kill()
    assert chosen.find() == {}
    assert one.pid not in chosen._known


def test_who_was_looked_at_is_not_looked_into_again(named, clock, looked_at):
    """One file each tells that nothing is new."""
    one = named("known")
    chosen = Selection([Rule(cgroup="/none"), Rule(name="known")], [Rule(unit="none")])
    clock(1000)
    first = chosen.find()
    assert {(one.pid, name) for name in ("stat", "cgroup", "cmdline")} <= {*looked_at}
    looked_at.clear()
    assert chosen.find()[one.pid] == first[one.pid]
    assert [name for pid, name in looked_at if pid == one.pid] == ["stat"]


def test_a_pid_of_another_process_is_looked_at_anew(named, told):
    """Though it has the same name."""
    one = named("same")
    chosen = Selection([Rule(cgroup="/new")])
    assert one.pid not in chosen.find()
    told(one.pid, "cgroup", b"0::/new\n")
    fields = status.contents(one.pid, "stat").split()
    fields[21] = b"%d" % (int(fields[21]) - 1)
    told(one.pid, "stat", b" ".join(fields))
    assert one.pid in chosen.find()


def test_who_moves_is_noticed_when_twice_as_old(named, told, clock):
    """Cgroups and users change without a new name. Ten minutes are the longest."""
    one = named("moving")
    chosen = Selection([Rule(cgroup="/there")])
    clock(100)
    assert one.pid not in chosen.find()
    told(one.pid, "cgroup", b"0::/there\n")
    clock(50)
    assert one.pid not in chosen.find()
    clock(100)
    assert one.pid in chosen.find()
    clock(100_000)
    assert one.pid in chosen.find()
    told(one.pid, "cgroup", b"0::/\n")
    clock(300)
    assert one.pid in chosen.find()
    clock(301)
    assert one.pid not in chosen.find()
