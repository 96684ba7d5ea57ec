"""Batches made ready by a thread while the device computes.

This does not change what is trained on, and the position that is saved is that of the windows
handed out, not of those made ready.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from typing import Any

from bitdistill.data import Batch, Batches
from bitdistill.hardware import Hardware
from bitdistill.schema import Machine


class Prefetched:
    """Windows made ready by a thread, `depth` of them ahead; with `pin`, in page-locked memory."""

    def __init__(self, batches: Batches, depth: int, *, pin: bool = False) -> None:
        self.batches, self.depth, self.pin = batches, depth, pin
        self._state = batches.state()
        self._step: int | None = None  # whose window was handed out last
        self._window: list[Batch] = []
        self._thread: threading.Thread | None = None

    def steps_per_epoch(self) -> int | None:
        return self.batches.steps_per_epoch()

    def window(self, step: int) -> list[Batch]:
        if step == self._step:
            return self._window
        if self._thread is None or self._step is None or step != self._step + 1:
            self._stop()
            self.batches.restore(self._state)
            self._start(step)
        made = self._ready.get()
        if isinstance(made, BaseException):
            self._stop()
            raise made
        self._step, (self._window, self._state) = step, made
        return self._window

    def _start(self, step: int) -> None:
        self._ready: queue.Queue[tuple[list[Batch], Any] | BaseException]
        self._ready = queue.Queue(self.depth)
        self._stopped = threading.Event()
        arguments = (step, self._ready, self._stopped)
        self._thread = threading.Thread(target=self._make, args=arguments, daemon=True)
        self._thread.start()

    def _make(self, step: int, ready: queue.Queue[Any], stopped: threading.Event) -> None:
        """Windows from `step` on, until stopped; an error is handed over and ends it."""
        while not stopped.is_set():
            try:
                made: Any = (self._pinned(self.batches.window(step)), self.batches.state())
            except BaseException as error:
                made = error
            while not stopped.is_set():
                with contextlib.suppress(queue.Full):
                    ready.put(made, timeout=0.1)
                    break
            if isinstance(made, BaseException):
                return
            step += 1

    def _pinned(self, window: list[Batch]) -> list[Batch]:
        if not self.pin:
            return window
        return [{key: value.pin_memory() for key, value in batch.items()} for batch in window]

    def _stop(self) -> None:
        if self._thread is not None:
            self._stopped.set()
            self._thread.join()
            self._thread = None

    def state(self) -> Any:
        return self._state

    def restore(self, state: Any) -> None:
        self._stop()
        self.batches.restore(state)
        self._state, self._step = state, None

    def close(self) -> None:
        if self._thread is not None:
            self._stopped.set()
        self.batches.close()  # ends a wait for a worker
        self._stop()


def prefetched(batches: Batches, machine: Machine) -> Batches:
    """The same batches, made ready ahead as the settings say."""
    if machine.prefetch == 0:
        return batches
    return Prefetched(batches, machine.prefetch, pin=Hardware.resolve(machine).cuda)
