"""What `sksmd` does as a service."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import logging
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from sksm.commands import knobs
from sksm.commands.options import Session
from sksm.daemon import signals
from sksm.daemon.main import shed_inheritance
from sksm.daemon.signals import Wait
from sksm.errors import SksmError
from sksm.reporters import log
from sksm.reporters.systemd import Manager
from sksm.reporters.words import count
from sksm.scanner.config import Config, default_paths
from sksm.scanner.figures import Figures
from sksm.scanner.service import Service, configured

Tell = Callable[[Figures], None]
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def serve(file: Path | None, session: Session) -> None:
    """Do what the configuration says until SIGTERM or SIGINT.

    Args:
        file: it, if not those that are always looked for.
        session: is told to log, once it is known how.
    """
    shed_inheritance()
    paths = [file] if file else default_paths()
    with contextlib.ExitStack() as scope:
        wait = scope.enter_context(signals.held(*_SIGNALS))
        manager = Manager(os.environ)
        config = configured(paths)
        log.set_up(config.log)
        session.log = logging.getLogger("sksmd").error
        if knobs.repair():
            logging.getLogger("sksmd").warning(knobs.REPAIRED)
        tells: list[Tell] = [log.Chronicle().tell, manager.tell]
        if config.metrics:
            from sksm.reporters import metrics  # noqa: PLC0415  memory, too

            tells.append(scope.enter_context(metrics.served(config.metrics)))
        service = scope.enter_context(contextlib.closing(Service(config)))
        _Work(paths, config, service, manager, wait).run(tells)


@dataclasses.dataclass
class _Work:
    """A service at work."""

    paths: Sequence[Path]
    config: Config
    service: Service
    manager: Manager
    wait: Wait

    def run(self, tells: Sequence[Tell]) -> None:
        """Go on from epoch to epoch, until a signal ends it."""
        version = importlib.metadata.version("sksm")
        self._say(f"sksmd {version} begins", version=version)
        number = 0
        while number in (0, signal.SIGHUP):
            found = self.service.epoch()
            for tell in tells:
                tell(found)
            number = self._pause()
            if number == signal.SIGHUP:
                self._reload()
        self.manager.stopping()
        log.say(logging.INFO, "sksmd ends; what is merged stays merged")

    def _pause(self) -> int:
        """Wait for the next epoch, or for a signal: gives that, or 0."""
        until = time.monotonic() + self.service.pause
        number = 0
        while not number and (left := until - time.monotonic()) > 0:
            number = self.wait(min(left, self.manager.alive_seconds))
            self.manager.alive()
        return number

    def _reload(self) -> None:
        """Follow the configuration as it is now, if it is right."""
        self.manager.reloading()
        try:
            config = configured(self.paths)
        except (SksmError, OSError) as error:
            text = f"the configuration stays as it was: {error}"
            log.say(logging.ERROR, text)
        else:
            self._follow(config)
        self.manager.ready()

    def _follow(self, config: Config) -> None:
        before, self.config = self.config, config
        self.service.follow(config)
        self._say("the configuration was read anew")
        if (config.metrics, config.log) != (before.metrics, before.log):
            text = "metrics and log stay as they are until sksmd is started again"
            log.say(logging.WARNING, text)

    def _say(self, text: str, **fields: object) -> None:
        files = [str(path) for path in self.paths if path.exists()]
        rules = count(len(self.config.rules), "rule")
        where = " and ".join(files)
        log.say(logging.INFO, f"{text}: {rules} in {where}", files=files, **fields)
