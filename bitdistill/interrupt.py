"""Ctrl-C and SIGTERM, noticed between optimizer steps, so that a stage can save and stop."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """Whether a signal has come; a second one takes effect at once, as without this."""

    def __init__(self) -> None:
        self.requested = False
        self.previous = {number: signal.getsignal(number) for number in SIGNALS}

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self.restore()

    def restore(self) -> None:
        """Put the handlers back that were there before."""
        for number, handler in self.previous.items():
            signal.signal(number, handler)


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """Turn the first signal into `Stop.requested`. Only the main thread can take signals."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    for number in SIGNALS:
        signal.signal(number, stop)
    try:
        yield stop
    finally:
        stop.restore()


@contextmanager
def ignored(number: int) -> Iterator[None]:
    """Processes started meanwhile ignore this signal. Only the main thread can see to it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(number, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(number, previous)
