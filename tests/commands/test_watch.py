"""`sksm watch`: its options, its lines of JSON, its live view, its end."""

import json
import signal
import subprocess

import pytest
from rich.console import Console

from sksm.linux.features import Feature
from sksm.reporters import watch
from sksm.scanner import config, service
from sksm.scanner.config import Config
from sksm.scanner.figures import Figures, ProcessFigures, Refusal
from sksm.scanner.selection import Rule
from tests.commands.conftest import PROGRAM
from tests.process.holder import Holder

SAME = list(range(1, 101))


def started(*options):
    command = [*PROGRAM, "watch", "--quiet-for", "1", *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.needs(Feature.USERFAULTFD_WP_ASYNC, Feature.PTRACE_SEIZE)
@pytest.mark.usefixtures("runtime")
@pytest.mark.parametrize(("end", "code"), [("SIGINT", 130), ("SIGTERM", 0)])
def test_every_epoch_is_a_line_of_json_until_a_signal_ends_it(puppets, end, code):
    """With what it found, merged and cost; programs stay as they are."""
    crew = [Holder(puppets, SAME) for _ in range(2)]
    sums = [one.ask("sum") for one in crew]
    named = [word for one in crew for word in ("--pid", str(one.pid))]
    with started("--json", *named) as program:
        for line in program.stdout:
            found = json.loads(line)
            if found["merged_bytes"] >= 2 * 100 * 4096:
                break
        program.send_signal(signal.Signals[end])
        assert program.wait(20) == code
        assert program.stderr.read() == b""
    assert (found["schema"], found["command"]) == (1, "watch")
    assert {one["pid"] for one in found["processes"]} == {one.pid for one in crew}
    assert found["epoch"] > 1
    assert found["cpu_seconds"] > 0
    assert found["refused"] == []
    assert [one.ask("sum") for one in crew] == sums


def test_nobody_to_watch_is_an_error_that_names_the_ways(sksm_here, monkeypatch):
    """Options, or the configuration."""
    monkeypatch.setattr(config, "load", Config)
    result = sksm_here("watch")
    assert result.exit_code == 2
    assert "--qemu" in result.stderr
    assert "config.toml" in result.stderr


@pytest.mark.parametrize(
    "options",
    [
        ("--cpu", "0"),
        ("--cpu", "101"),
        ("--quiet-for", "0.5"),
        ("--quiet-for", "300"),
        ("--pid", "0"),
        ("--uid", "root"),
    ],
)
def test_bad_options_are_errors(sksm_here, options):
    """Usage, before anything is looked at."""
    assert sksm_here("watch", "--qemu", *options).exit_code == 2


def test_options_take_the_place_of_the_configuration():
    """Each value of an option is a rule; what is not given stays."""
    given = {f"{name}s": () for name in ("pid", "name", "uid", "cgroup", "unit")}
    given |= {"pids": (7, 8), "names": ("a*",), "qemu": True}
    given |= {"cpu_percent": 5.0, "quiet_seconds": None, "engine": "pool"}
    before = Config(quiet_seconds=9.0, rules=(Rule(uid=1),), excluded=(Rule(uid=2),))
    found = service.chosen(before, given)
    assert found.rules == (Rule(pid=7), Rule(pid=8), Rule(name="a*"), Rule(qemu=True))
    assert found.excluded == before.excluded
    assert (found.cpu_percent, found.quiet_seconds, found.engine) == (5.0, 9.0, "pool")
    given |= {"pids": (), "names": (), "qemu": False}
    assert service.chosen(before, given).rules == before.rules


def figures(epoch, **fields):
    values = dict.fromkeys(Figures.__dataclass_fields__, 0)
    lists = {"processes": [], "refused": [], "stopped_seconds": []}
    return Figures(
        **{**values, **lists, "epoch": epoch, "seconds": 2.0 * epoch, **fields}
    )


def shown(*epochs):
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    screen = watch.Screen(console)
    for found in epochs:
        console.print(screen.drawn(found))
    return console.export_text()


def test_the_view_tells_of_each_process_and_of_the_whole():
    """Rates are those since the last epoch."""
    before = ProcessFigures(7, "[red]worker", 3 << 20, 3 << 20, 2 << 20, 1 << 20, 10, 4)
    after = ProcessFigures(7, "[red]worker", 3 << 20, 3 << 20, 2 << 20, 1 << 20, 50, 4)
    refused = [Refusal(8, "other", "it uses io_uring")]
    text = shown(
        figures(1, processes=[before], saved_net_bytes=-(5 << 20)),
        figures(2, processes=[after], saved_net_bytes=9 << 20, refused=refused),
    )
    last = text.split("un-merged/s")[-1]
    assert "[red]worker" in last
    assert " 20" in last.splitlines()[1]
    assert "9.0 MiB saved" in last
    assert "8 (other): it uses io_uring" in last


def test_the_view_says_that_there_is_nobody_and_that_there_are_more():
    """An empty table says nothing, and one of thousands too much."""
    assert "Nobody to watch yet" in shown(figures(1))
    assert "9.0 MiB saved" in shown(figures(1, saved_net_bytes=9 << 20))
    many = [ProcessFigures(n, "x", 0, 0, 0, 0, 0, 0) for n in range(1, 30)]
    assert "and 9 more" in shown(figures(1, processes=many))
