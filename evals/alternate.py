"""Time several rows in turn, in one run: repeat 1 of every row, then repeat 2, and so on.

A machine that is slow for a minute then slows all rows alike, and ratios between rows are taken
within a round. Each row is a process of its own (timer.py) that stays loaded, and warms up again
before its turn; where they would not fit into memory together, a row is loaded again instead.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from bitdistill.evals.bench import Plan, Repeat, speed_of, to_json
from bitdistill.evals.environment import available_memory
from bitdistill.evals.gguf import LlamaBench
from bitdistill.evals.process import Process, WorkerError, read_answer

Progress = Callable[[str, int, int], None]
Job = dict[str, Any]
LOADED_SIZE = 2.0  # memory of a loaded row over its size on disk, generously


class Row(Protocol):
    """Something that can be repeated: `facts` and `memory` are complete after `end`."""

    facts: dict[str, Any]
    memory: dict[str, float]

    def start(self) -> None:
        """Load, if that is not done, and warm up."""

    def repeat(self) -> Repeat:
        """Time the sequence once."""

    def end(self) -> None:
        """Unload. `start` may follow."""

    def close(self) -> None:
        """End at once, whatever it is doing."""


class TimedProcess:
    """A row in a process of its own (timer.py)."""

    def __init__(self, job: Job, module: str = "bitdistill.evals.timer") -> None:
        self.job, self.module = job, module
        self.facts: dict[str, Any] = {}
        self.memory: dict[str, float] = {}
        self._process: Process | None = None

    def start(self) -> None:
        if self._process is None:
            self._process = Process(self.module, self.job)
            self.facts = self._answer(self._process, "prefill_tokens")
        else:
            self._ask("warm", "warm")

    def repeat(self) -> Repeat:
        return Repeat(**self._ask("repeat", "first"))

    def _ask(self, request: str, key: str) -> dict[str, Any]:
        assert self._process is not None
        try:
            self._process.stdin.write(request.encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:  # it ended while other rows had their turns
            raise self._process.failure() from None
        return self._answer(self._process, key)

    def end(self) -> None:
        if self._process is not None:
            self._process.stdin.close()
            memory = self._answer(self._process, "memory")["memory"]
            self.memory = {k: max(v, self.memory.get(k, 0.0)) for k, v in memory.items()}
            self.close()

    def close(self) -> None:
        if self._process is not None:
            self._process.close()
            self._process = None

    def _answer(self, process: Process, key: str) -> dict[str, Any]:
        for line in process.stdout:
            answer = read_answer(line) or {}
            if "error" in answer:
                raise WorkerError(f"{self.job['path']} cannot be timed: {answer['error']}")
            if key in answer:
                return answer
        raise process.failure()


def time_rows(jobs: Sequence[Job], progress: Progress) -> list[dict[str, Any]]:
    """Figures of each job, in order: `speed`, `memory` in MiB, and the row's `facts`.

    A job holds `path`, `name`, `bytes`, `threads`, `load`, `plan` and `seed`, and for a GGUF file
    perhaps `llama_bench`. Raises WorkerError.
    """
    rows: list[Row] = [
        LlamaBench(job) if job.get("llama_bench") else TimedProcess(job) for job in jobs
    ]
    together = LOADED_SIZE * sum(job["bytes"] for job in jobs) < available_memory()
    try:
        repeats = _rounds(rows, jobs, together, progress)
    finally:
        for row in rows:
            row.close()
    return [
        {
            "speed": to_json(speed_of(own, row.facts["prefill_tokens"])),
            "memory": row.memory,
            "facts": row.facts | {"alternated": len(rows) > 1, "loaded_together": together},
        }
        for row, own in zip(rows, repeats, strict=True)
    ]


def _rounds(
    rows: Sequence[Row], jobs: Sequence[Job], together: bool, progress: Progress
) -> list[list[Repeat]]:
    plans = [Plan(**job["plan"]) for job in jobs]
    repeats: list[list[Repeat]] = [[] for _ in rows]
    spent = [0.0] * len(rows)
    rounds = max(plan.repeats for plan in plans)
    for done in range(rounds):
        for i, row in enumerate(rows):
            if done >= plans[i].repeats or (done and spent[i] >= plans[i].budget):
                continue
            progress(f"{jobs[i]['name']}: time", done, plans[i].repeats)
            if len(rows) > 1 or not together or not done:
                row.start()
            start = time.perf_counter()
            repeats[i].append(row.repeat())
            spent[i] += time.perf_counter() - start
            if not together:
                row.end()
    for row in rows:
        row.end()
    return repeats
