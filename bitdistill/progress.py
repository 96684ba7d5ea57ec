"""What a person sees of a long stage (stderr), and what a program reads of it (log.jsonl)."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

LINES_WITHOUT_TERMINAL = 5
WAIT_WORTH_SAYING = 0.05  # share of the time
BAR_WIDTH = 30


class Reporter:
    """A progress bar on a terminal, a few lines elsewhere, and a JSON line for each record.

    Where the tensorboard package is installed, records also go to `tensorboard/` beside the log.
    """

    def __init__(self, log: Path | None = None, quiet: bool = False) -> None:
        self.console = Console(stderr=True, quiet=quiet)
        self.log = log
        self.began = time.perf_counter()
        self._board: Any = None
        self._draws = log is not None and importlib.util.find_spec("tensorboard") is not None

    def say(self, text: str) -> None:
        """One line for the person."""
        self.console.print(text, highlight=False)

    def begin(self, name: str) -> None:
        """A stage begins; records say how many seconds ago, loading and compilation included."""
        self.began = time.perf_counter()
        self.say(f"{name}: started")

    def record(self, values: dict[str, Any]) -> None:
        """One JSON line for the log."""
        if self.log is not None:
            with self.log.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(values) + "\n")
        if self._draws:
            self._draw(values)

    def _draw(self, values: dict[str, Any]) -> None:
        """For tensorboard, which takes seconds to import: a GPU is busy by the first record."""
        if self._board is None:
            from torch.utils.tensorboard import SummaryWriter

            assert self.log is not None
            self._board = SummaryWriter(self.log.parent / "tensorboard")
        for name, value in values.items():
            if isinstance(value, float) and name != "time":
                self._board.add_scalar(f"{values['stage']}/{name}", value, values["step"])

    def record_weights(self, values: dict[str, Any]) -> None:
        """One JSON line of what is known of every linear, in weights.jsonl beside the log."""
        if self.log is not None:
            with self.log.with_name("weights.jsonl").open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(values) + "\n")

    @contextmanager
    def stage(self, name: str, total: int, start: int = 0) -> Iterator[Meter]:
        """A meter for one stage of `total` steps, of which `start` are done."""
        progress = Progress(
            TextColumn("[bold]{task.description:<12}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[terms]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        with progress:
            yield Meter(self, progress, name, total, start)


class Meter:
    """Shows and records the steps of one stage."""

    def __init__(
        self, reporter: Reporter, progress: Progress, name: str, total: int, start: int
    ) -> None:
        self.reporter, self.progress, self.name, self.total = reporter, progress, name, total
        self.task = progress.add_task(name, total=total, completed=start, terms="")
        self._every = max(1, total // LINES_WITHOUT_TERMINAL)
        self._waited = 0.0  # seconds since the last update
        self._clock, self._spoken = time.perf_counter(), start // self._every

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """What happens inside is waiting for data; its share of the time is recorded."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    def update(
        self,
        step: int,
        tokens: int,
        terms: dict[str, float],
        measured: Callable[[float], dict[str, float]],
    ) -> None:
        """`step` steps are done; all devices processed `tokens` since the last update.

        `measured` gives what else goes into the record, from the seconds that they took.
        """
        now = time.perf_counter()
        elapsed = max(now - self._clock, 1e-9)
        speed, wait = tokens / elapsed, self._waited / elapsed
        self._clock, self._waited = now, 0.0
        text = " ".join(f"{key} {value:.3f}" for key, value in terms.items())
        text += f"  {speed:,.0f} tok/s"
        text += f"  {wait:.0%} waiting for data" if wait >= WAIT_WORTH_SAYING else ""
        self.progress.update(self.task, completed=step, terms=text)
        record = {"stage": self.name, "step": step, **terms, **measured(elapsed)}
        record |= {"tokens_per_second": round(speed), "data_wait": round(wait, 4)}
        record["seconds"] = round(now - self.reporter.began, 3)
        self.reporter.record(record | {"time": time.time()})
        if not self.reporter.console.is_terminal and step // self._every > self._spoken:
            self._spoken = step // self._every
            self.reporter.say(f"{self.name}: step {step}/{self.total}  {text}")


def step_bar() -> Callable[[str, int, int], None]:
    """A callback (name, done, total) that rewrites a bar on a terminal and is silent elsewhere."""
    terminal = sys.stderr.isatty()

    def show(name: str, done: int, total: int) -> None:
        if terminal:
            bar = "#" * (BAR_WIDTH * done // total)
            end = "\n" if done == total else ""
            sys.stderr.write(f"\r\033[K[{bar:{BAR_WIDTH}}] {done}/{total} {name}{end}")
            sys.stderr.flush()

    return show
