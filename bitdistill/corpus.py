"""The sequences of a corpus, packed in this process or in worker processes: the same either way.

Rows are packed independently (sequences.py), so the rows of a device are split among its workers,
each of which sends one sequence for each of its rows and step through a pipe (corpus_worker.py).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from transformers import PreTrainedTokenizerBase as Tokenizer

from bitdistill.corpus_worker import MENDABLE, make_packer
from bitdistill.schema import Config
from bitdistill.sequences import Sequences, State, merge_states

PIPE_BYTES = 1 << 20  # the largest that Linux gives without privilege


class Packing(Protocol):
    """Sequences step by step, from some position on."""

    def next(self) -> Sequences:
        """The sequences of the next step."""

    def state(self) -> State | None:
        """The position behind it."""

    def close(self) -> None:
        """Let go of files and processes."""


class Worker:
    """One process of corpus_worker.py."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.rows, self.length = len(job["rows"]), job["length"]
        environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bitdistill.corpus_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.out = self.process.stdout
        if hasattr(fcntl, "F_SETPIPE_SZ"):  # Linux; elsewhere a worker is less far ahead
            with contextlib.suppress(OSError):
                fcntl.fcntl(self.out, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        with contextlib.suppress(BrokenPipeError), self.process.stdin as stream:
            stream.write(json.dumps(job).encode() + b"\n")

    def next(self) -> tuple[Sequences, State]:
        """The next step's sequences and the position behind them; raises what the worker raised."""
        line = self.out.readline()
        head = json.loads(line) if line.endswith(b"\n") else None
        if head is not None and "error" in head:
            raise MENDABLE[head["kind"]](head["error"])
        size = self.rows * self.length * 4
        content = b"" if head is None else self.out.read(size)
        if head is None or len(content) < size:
            raise RuntimeError(
                f"a data worker ended unexpectedly (exit status {self.process.wait()}); its "
                "output is above; machine.workers=0 reads the corpus in the training process"
            )
        ids = np.frombuffer(content, dtype=np.int32).reshape(self.rows, self.length)
        return Sequences(ids, head["pieces"]), head["state"]

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()
        self.out.close()


class Workers:
    """Several processes that share the rows of a job; the same sequences as one Packer's."""

    def __init__(self, job: dict[str, Any], count: int) -> None:
        rows: list[int] = job["rows"]
        self.parts = [rows[i::count] for i in range(min(count, len(rows)))]
        self.order = np.argsort(np.concatenate(self.parts))
        self.workers = [Worker(job | {"rows": part}) for part in self.parts]
        self._state: State | None = job["state"]

    def next(self) -> Sequences:
        """The sequences of the next step, rows in order."""
        made = [worker.next() for worker in self.workers]
        self._state = merge_states([state for _, state in made])
        ids = np.concatenate([sequences.ids for sequences, _ in made])[self.order]
        pieces = [lengths for sequences, _ in made for lengths in sequences.pieces]
        return Sequences(ids, [pieces[i] for i in self.order])

    def state(self) -> State | None:
        """The position behind the last step."""
        return self._state

    def close(self) -> None:
        """End the processes."""
        for worker in self.workers:
            worker.close()


class Steps:
    """A corpus opened where it was left, when its first sequences are asked for."""

    def __init__(self, open_at: Callable[[State | None], Packing]) -> None:
        self.open_at = open_at
        self._state: State | None = None
        self._packing: Packing | None = None

    def next(self) -> Sequences:
        """The sequences of the next step."""
        if self._packing is None:
            self._packing = self.open_at(self._state)
        return self._packing.next()

    def state(self) -> State | None:
        """The position behind the last step; None at the start."""
        return self._state if self._packing is None else self._packing.state()

    def restore(self, state: State | None) -> None:
        """Return to a position."""
        self.close()
        self._state = state

    def close(self) -> None:
        """Let go of files and processes; the position is kept."""
        if self._packing is not None:
            self._state = self._packing.state()
            self._packing.close()
            self._packing = None


def corpus_steps(
    config: Config, tokenizer: Tokenizer, rows: range, total: int, length: int, seed: int
) -> Steps:
    """Sequences for some rows of a global batch of `total`, from the corpus of a configuration.

    ValueError for a tokenizer that has no tokenizer.json.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(f"{type(tokenizer).__name__} has no tokenizer.json; use a model with one")
    job = {
        "corpus": config.corpus.model_dump(mode="json"),
        "task": config.task.model_dump(mode="json"),
        "seed": seed,
        "run_seed": config.seed,
        "tokenizer": backend.to_str(),
        "end": tokenizer.eos_token_id,
        "rows": list(rows),
        "total": total,
        "length": length,
    }
    count = config.machine.workers
    if count == 0:
        return Steps(lambda state: make_packer(job | {"state": state}))
    return Steps(lambda state: Workers(job | {"state": state}, count))
