"""A scanner at work: from the configuration to epochs, until a signal ends it."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from sksm.errors import Misconfigured
from sksm.scanner.budget import Budget
from sksm.scanner.config import Config, default_paths
from sksm.scanner.figures import Figures, Ledger
from sksm.scanner.scanner import Scanner, Target
from sksm.scanner.selection import Rule, Selection

_ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


_CRITERIA = ("pid", "name", "uid", "cgroup", "unit")


def chosen(config: Config, given: dict[str, Any]) -> Config:
    """Give the configuration with what options say in its place.

    Args:
        config: what there is without options.
        given: `pids`, `names`, `uids`, `cgroups`, `units`: each value is a rule;
            `qemu`; `cpu_percent` and `quiet_seconds`, None if not given.

    Raises:
        Misconfigured: neither says what to watch.
    """
    changes = {
        name: given[name]
        for name in ("cpu_percent", "quiet_seconds")
        if given[name] is not None
    }
    rules = [Rule(**{name: one}) for name in _CRITERIA for one in given[f"{name}s"]]
    rules += [Rule(qemu=True)] if given["qemu"] else []
    if rules:
        changes["rules"] = tuple(rules)
    config = msgspec.structs.replace(config, **changes)
    if not config.rules:
        paths = " nor ".join(map(str, default_paths()))
        raise Misconfigured(
            f"nobody to watch: say whom (--pid, --name, --uid, --cgroup, --unit, "
            f"--qemu); neither is there a [[watch]] in {paths}"
        )
    return config


def run(config: Config, tell: Callable[[Figures], None]) -> int:
    """Watch what a configuration says, epoch after epoch.

    Args:
        config: what to watch, and how.
        tell: hears of every epoch.

    Returns:
        The signal that ended it.
    """
    selection = Selection(config.rules, config.excluded)
    with _signals() as ended, contextlib.ExitStack() as scope:
        scanner = Scanner(lambda: _targets(selection.find()), config.quiet_seconds)
        scope.callback(scanner.close)
        ledger = Ledger(scanner)
        share = config.cpu_percent / 100
        scanner.budget = Budget(share, ledger.cpu_seconds, time.monotonic)
        while True:
            tell(ledger.figures(scanner.epoch()))
            if number := ended(scanner.pause):
                return number


def _targets(found: dict[int, Rule]) -> dict[int, Target]:
    return {pid: Target(guest_only=rule.qemu) for pid, rule in found.items()}


@contextlib.contextmanager
def _signals() -> Iterator[Callable[[float], int]]:
    """Give what waits some seconds for a signal that ends us; gives it, or 0."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)

    def wait(seconds: float) -> int:
        info = signal.sigtimedwait(_ENDING, seconds)
        return info.si_signo if info else 0

    try:
        yield wait
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
