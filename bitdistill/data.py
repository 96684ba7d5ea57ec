"""Batches for every stage: task examples with answer labels, and packed text.

A source of batches gives the window of micro-batches of an optimizer step, in an order that depends
only on the seed and on its position, and its position can be saved and restored. Several devices
share a window: which sequences it holds depends on its size, not on how many devices there are.
Padding is on the right; `labels` are the input ids where a token is learnt, -101 where only the
teacher says what it should be, and -100 elsewhere.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from bitdistill.corpus import Steps
from bitdistill.documents import open_source
from bitdistill.encoding import Encoded
from bitdistill.schema import Config
from bitdistill.schema_data import TaskData
from bitdistill.sequences import Sequences
from bitdistill.sources import is_local
from bitdistill.tasks import Example, load_examples, some_of

Batch = dict[str, Tensor]
IGNORED = -100
UNLABELLED = -101  # an answer that only the teacher gives
GROUP_BATCHES = 32  # examples are sorted by length within this many batches


@dataclass(frozen=True)
class Shard:
    """Which of how many devices this is; each takes its own part of every window."""

    rank: int = 0
    world: int = 1

    def part(self, size: int) -> range:
        """This device's `size` items of the window's world * size."""
        return range(self.rank * size, (self.rank + 1) * size)


ALONE = Shard()


class Batches(Protocol):
    """A source of training data."""

    def window(self, step: int) -> list[Batch]:
        """The micro-batches of one optimizer step (CPU tensors)."""

    def state(self) -> Any:
        """The position, as JSON."""

    def restore(self, state: Any) -> None:
        """Return to a saved position."""

    def steps_per_epoch(self) -> int | None:
        """Optimizer steps in one pass, or None for a stream."""

    def close(self) -> None:
        """Let go of processes and threads."""


def collate(rows: list[Encoded], pad: int, multiple: int) -> Batch:
    """Right-padded ids, attention mask and labels, (B, T) with T a multiple of `multiple`."""
    longest = max(len(row.ids) for row in rows)
    length = -(-longest // multiple) * multiple
    ids = torch.full((len(rows), length), pad)
    mask = torch.zeros((len(rows), length), dtype=torch.long)
    labels = torch.full((len(rows), length), IGNORED)
    for index, row in enumerate(rows):
        end = len(row.ids)
        ids[index, :end] = torch.tensor(row.ids)
        mask[index, :end] = 1
        answer = torch.tensor(row.ids[end - row.answer :])
        labels[index, end - row.answer : end] = answer if row.labelled else UNLABELLED
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


class Fresh(Protocol):
    """More examples for each epoch, a function of its number alone."""

    count: int

    def rows(self, epoch: int) -> list[Encoded]:
        """The `count` examples of an epoch."""

    def close(self) -> None:
        """Let go of threads."""


class TaskBatches:
    """Shuffled, length-grouped task examples; the order is a function of seed and step alone."""

    def __init__(
        self,
        rows: list[Encoded],
        pad: int,
        batch_size: int,
        accumulate: int = 1,
        seed: int = 0,
        multiple: int = 8,
        shard: Shard = ALONE,
        fresh: Fresh | None = None,
    ) -> None:
        if not rows:
            raise ValueError("no training examples; check the data file and limit_train")
        self._labelled, self._fresh = rows, fresh
        self.rows, self.pad, self.multiple = rows, pad, multiple
        self.count = len(rows) + (0 if fresh is None else fresh.count)
        self.batch_size, self.accumulate, self.seed = batch_size, accumulate, seed
        self.shard = shard
        self._epoch, self._order = -1, [[0]]

    @property
    def _window_batches(self) -> int:
        """Micro-batches of one optimizer step, on all devices together."""
        return self.accumulate * self.shard.world

    def steps_per_epoch(self) -> int:
        return -(-self.count // (self.batch_size * self._window_batches))

    def _batches(self, epoch: int) -> list[list[int]]:
        """All micro-batches of an epoch, in order; a short last one is filled from the start.

        Windows are shuffled, not micro-batches: those of one step are of similar length, so that
        no device waits for another.
        """
        if epoch != self._epoch:
            shuffle = random.Random(f"{self.seed}-{epoch}")
            if self._fresh is not None:
                self.rows = self._labelled + self._fresh.rows(epoch)
            order = list(range(self.count))
            shuffle.shuffle(order)
            size, together = self.batch_size, self._window_batches
            needed = self.steps_per_epoch() * together * size
            while len(order) < needed:
                order += order[: needed - len(order)]
            group = size * together * -(-GROUP_BATCHES // together)
            windows = []
            for start in range(0, len(order), group):
                part = sorted(order[start : start + group], key=lambda i: len(self.rows[i].ids))
                batches = [part[i : i + size] for i in range(0, len(part), size)]
                windows += [batches[i : i + together] for i in range(0, len(batches), together)]
            shuffle.shuffle(windows)
            self._epoch, self._order = epoch, [batch for window in windows for batch in window]
        return self._order

    def window(self, step: int) -> list[Batch]:
        epoch, within = divmod(step, self.steps_per_epoch())
        start, order = within * self._window_batches, self._batches(epoch)
        chosen = [order[start + i] for i in self.shard.part(self.accumulate)]
        return [collate([self.rows[i] for i in b], self.pad, self.multiple) for b in chosen]

    def state(self) -> Any:
        return None

    def restore(self, state: Any) -> None:
        pass  # a task's order needs no more than the step

    def close(self) -> None:
        if self._fresh is not None:
            self._fresh.close()


class PackedBatches:
    """Documents joined by the end-of-text token and cut into full sequences; nothing is padded.

    With `document_mask` a batch also has `documents` (B, T), which numbers the documents of a row
    from 0, and `position_ids` (B, T), which start again with each; the first token of a document
    is not learnt, because nothing before it belongs to it.
    """

    def __init__(
        self,
        steps: Steps,
        batch_size: int,
        accumulate: int = 1,
        document_mask: bool = False,
    ) -> None:
        self.steps, self.batch_size, self.accumulate = steps, batch_size, accumulate
        self.document_mask = document_mask
        self._step: int | None = None
        self._window: list[Batch] = []

    def steps_per_epoch(self) -> None:
        return None

    def window(self, step: int) -> list[Batch]:
        """The next window; that of the same step again is the same one."""
        if step != self._step:
            self._step, self._window = step, self._batches(self.steps.next())
        return self._window

    def _batches(self, sequences: Sequences) -> list[Batch]:
        ids = torch.from_numpy(sequences.ids.astype(np.int64))
        whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
        if self.document_mask:
            whole["documents"], whole["position_ids"] = number_documents(sequences.pieces)
            whole["labels"][whole["position_ids"] == 0] = IGNORED
        size = self.batch_size
        return [
            {key: value[i * size : (i + 1) * size] for key, value in whole.items()}
            for i in range(self.accumulate)
        ]

    def state(self) -> Any:
        return self.steps.state()

    def restore(self, state: Any) -> None:
        self.steps.restore(state)
        self._step = None

    def close(self) -> None:
        self.steps.close()


def number_documents(pieces: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Each token's document within its row and its position in that document, both (B, T) int64."""
    lengths = [torch.tensor(row) for row in pieces]
    documents = [torch.repeat_interleave(torch.arange(len(row)), row) for row in lengths]
    positions = [torch.cat([torch.arange(n) for n in row]) for row in pieces]
    return torch.stack(documents), torch.stack(positions)


def check_sources(config: Config) -> None:
    """FileNotFoundError or ValueError for what some stage, or evaluation, could not read.

    That may be hours from now. A first validation example and the first text of every local corpus
    source are read; training examples are read at once by the first stage.
    """
    data = config.task
    for file in (data.train, data.validation):
        if file is not None and not Path(file).is_file():
            raise FileNotFoundError(f"data file {file} does not exist; check the path")
    if data.validation is not None:
        load_examples(data.resolve(), data.validation, limit=1, columns=data.columns)
    if config.base.enabled or config.pretrain.enabled:
        unshuffled = config.corpus.model_copy(update={"shuffle": 0})  # a block may be a whole file
        for source in filter(is_local, config.corpus.sources):
            open_source(source, unshuffled, data, config.seed).next()


def task_examples(data: TaskData, seed: int = 0) -> list[Example]:
    """The training examples of a task; `limit_train` takes a seeded random part."""
    task = data.resolve()
    examples = load_examples(task, data.train, task.splits[0], columns=data.columns)
    return some_of(examples, data.limit_train, seed)
