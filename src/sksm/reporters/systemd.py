"""What a service manager is told: sd_notify(3), and sd_watchdog_enabled(3)."""

from __future__ import annotations

import contextlib
import math
import os
import socket
import time
from collections.abc import MutableMapping

from sksm.reporters.log import summary
from sksm.scanner.figures import Figures

_OFTEN_ENOUGH = 0.4  # of the watchdog's interval; less than half, says the manual


class Manager:
    """Who started us, if it wants to hear of us; else nothing is told.

    Args:
        environment: says where it listens. That is taken out, so that no process
            which we start speaks for us.

    Attributes:
        alive_seconds: how often it wants to hear that we are alive.
    """

    def __init__(self, environment: MutableMapping[str, str]) -> None:
        self._address = environment.pop("NOTIFY_SOCKET", "")
        interval = environment.pop("WATCHDOG_USEC", "")
        whose = environment.pop("WATCHDOG_PID", str(os.getpid()))
        self.alive_seconds = math.inf
        if interval.isdigit() and whose == str(os.getpid()):
            self.alive_seconds = int(interval) / 1e6 * _OFTEN_ENOUGH
        self._is_ready = False

    def tell(self, found: Figures) -> None:
        """Say what is saved; after the first epoch, that we are ready."""
        if not self._is_ready:
            self.ready()
        self._say(f"STATUS={summary(found)}")
        self.alive()

    def ready(self) -> None:
        """Say that we do what the configuration says, at first or anew."""
        self._is_ready = True
        self._say("READY=1")

    def alive(self) -> None:
        """Hold the watchdog off."""
        if self.alive_seconds < math.inf:
            self._say("WATCHDOG=1")

    def reloading(self) -> None:
        """Say that we are about to read the configuration, until `ready`."""
        now_us = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        self._say("RELOADING=1", f"MONOTONIC_USEC={now_us}")

    def stopping(self) -> None:
        """Say that we end."""
        self._say("STOPPING=1", "STATUS=What is merged stays merged.")

    def _say(self, *lines: str) -> None:
        """Send one datagram. Whether anybody takes it is not our business."""
        if not self._address.startswith(("/", "@")):
            return
        # "@" stands for the zero that begins an abstract address: unix(7).
        address = self._address.replace("@", "\0", 1)
        with (
            contextlib.suppress(OSError),
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as line,
        ):
            line.sendto("\n".join(lines).encode(), address)
