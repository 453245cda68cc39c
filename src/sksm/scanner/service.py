"""A scanner at work: from the configuration to epochs, until a signal ends it."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from sksm.daemon import signals
from sksm.errors import Misconfigured
from sksm.process.domain import Domain
from sksm.scanner import config as settings
from sksm.scanner.budget import SHORTEST, Budget
from sksm.scanner.config import Config
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
            `qemu`; `cpu_percent`, `quiet_seconds` and `engine`, None if not given.

    Raises:
        Misconfigured: neither says what to watch.
    """
    changes = {
        name: given[name]
        for name in ("cpu_percent", "quiet_seconds", "engine")
        if given[name] is not None
    }
    rules = [Rule(**{name: one}) for name in _CRITERIA for one in given[f"{name}s"]]
    rules += [Rule(qemu=True)] if given["qemu"] else []
    if rules:
        changes["rules"] = tuple(rules)
    config = msgspec.structs.replace(config, **changes)
    if not config.rules:
        raise Misconfigured(
            "nobody to watch: say whom (--pid, --name, --uid, --cgroup, --unit, "
            f"--qemu); neither is there a [[watch]] in {_names(None)}"
        )
    return config


def configured(paths: Sequence[Path] | None) -> Config:
    """Read a configuration that says whom to watch: see `config.load`.

    Raises:
        Misconfigured: it does not, or it is wrong.
        OSError: a file cannot be read.
    """
    config = settings.load(paths)
    if not config.rules:
        raise Misconfigured(
            f"nobody to watch: there is no [[watch]] in {_names(paths)}. Two lines "
            'say whom, for example: [[watch]] and below it name = "gunicorn*"'
        )
    return config


def _names(paths: Sequence[Path] | None) -> str:
    return " nor ".join(map(str, paths or settings.default_paths()))


def run(config: Config, tell: Callable[[Figures], None]) -> int:
    """Watch what a configuration says, epoch after epoch.

    Args:
        config: what to watch, and how.
        tell: hears of every epoch.

    Returns:
        The signal that ended it.
    """
    with signals.held(*_ENDING) as wait, contextlib.closing(Service(config)) as service:
        while True:
            tell(service.epoch())
            if number := wait(service.pause):
                return number


class Service:
    """A scanner that does what a configuration says, and what the next one says."""

    def __init__(self, config: Config) -> None:
        self._sight = _Sight(config)
        self._scanner = Scanner(
            self._sight.find, config.quiet_seconds, engine=config.engine
        )
        self._ledger = Ledger(self._scanner)
        self._scanner.budget = Budget(
            config.cpu_percent / 100, self._ledger.cpu_seconds, time.monotonic
        )

    def close(self) -> None:
        """Watch nobody any more. What is merged stays merged."""
        self._scanner.close()

    def epoch(self) -> Figures:
        """Look at everybody once; gives how things stand then."""
        return self._ledger.figures(self._scanner.epoch())

    @property
    def pause(self) -> float:
        """How long to wait for the next epoch, in seconds."""
        # Between two looks for processes there is a while. Rules should not wait more.
        return self._scanner.pause if self._sight.fresh else SHORTEST

    def follow(self, config: Config) -> None:
        """Do what another configuration says, from the next epoch on.

        What is known of processes that stay watched is kept.
        """
        self._sight.follow(config)
        self._scanner.budget.give(config.cpu_percent / 100)
        self._scanner.await_quiet(config.quiet_seconds)
        self._scanner.merge_by(config.engine)


class _Sight:
    """Whom a configuration wants watched, and how.

    Attributes:
        fresh: somebody has asked since it last changed.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._selection = Selection(config.rules, config.excluded)
        self._before: dict[int, Target] = {}
        self.fresh = True

    def follow(self, config: Config) -> None:
        """Go by another configuration."""
        before, self._config = self._config, config
        if (config.rules, config.excluded) != (before.rules, before.excluded):
            # Else it stays: it knows what has come of processes that have ended.
            self._selection = Selection(config.rules, config.excluded)
            self.fresh = False

    def find(self) -> dict[int, Target]:
        """Name the processes to watch now.

        Who is to be watched in another way than before is left out once. The scanner
        lets go of it, and begins anew.
        """
        self.fresh = True
        found = {pid: _target(rule) for pid, rule in self._selection.find().items()}
        self._before = {
            pid: target
            for pid, target in found.items()
            if self._before.get(pid, target) == target
        }
        return dict(self._before)


def _target(rule: Rule) -> Target:
    whose = Domain(os.getuid(), group=rule.domain) if rule.domain else None
    return Target(guest_only=rule.qemu, domain=whose)
