"""Signals wait for those who wait for them."""

import os
import signal
import threading

import pytest

from sksm.daemon.signals import held

pytestmark = [pytest.mark.check, pytest.mark.pure]


def test_a_signal_waits_until_somebody_asks():
    """In the order in which they are taken; then there are none."""
    with held(signal.SIGUSR1, signal.SIGUSR2) as wait:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert wait(20) == signal.SIGUSR1
        assert wait(0) == 0
        os.kill(os.getpid(), signal.SIGUSR2)
        assert wait(20) == signal.SIGUSR2


def test_a_signal_that_another_thread_takes_is_not_lost():
    """A thread that was there before blocks none: numpy starts such."""
    done = threading.Event()
    other = threading.Thread(target=done.wait)
    other.start()
    try:
        with held(signal.SIGUSR1) as wait:
            signal.pthread_kill(other.ident, signal.SIGUSR1)
            assert wait(20) == signal.SIGUSR1
    finally:
        done.set()
        other.join()


def test_afterwards_signals_do_what_they_did():
    """Handlers, and the mask."""
    before = signal.getsignal(signal.SIGUSR1)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    with held(signal.SIGUSR1):
        assert signal.getsignal(signal.SIGUSR1) != before
    assert signal.getsignal(signal.SIGUSR1) == before
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == mask
