"""Batches for every stage: task examples with answer labels, and packed text.

A source of batches gives the window of micro-batches of an optimizer step, in an order that depends
only on the seed and on its position, and its position can be saved and restored. Padding is on the
right; `labels` are the input ids where a token is learnt and -100 elsewhere.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase as Tokenizer

from bitdistill.schema import Config, Corpus, TaskData
from bitdistill.sources import LOCAL_FORMATS, file_rows, hub_rows
from bitdistill.tasks import Example, Task, load_examples, shorten

Batch = dict[str, Tensor]
IGNORED = -100
GROUP_BATCHES = 32  # examples are sorted by length within this many batches


class Batches(Protocol):
    """A source of training data."""

    def window(self, step: int) -> list[Batch]:
        """The micro-batches of one optimizer step (CPU tensors)."""

    def state(self) -> dict[str, Any]:
        """The position, as JSON."""

    def restore(self, state: dict[str, Any]) -> None:
        """Return to a saved position."""

    def steps_per_epoch(self) -> int | None:
        """Optimizer steps in one pass, or None for a stream."""


@dataclass(frozen=True)
class Encoded:
    """One example as token ids; the last `answer` of them are learnt."""

    ids: list[int]
    answer: int


def encode_example(example: Example, task: Task, tokenizer: Tokenizer, max_length: int) -> Encoded:
    """Prompt and answer as token ids; a long prompt is shortened (`tasks.shorten`), not the answer.

    Summaries end with the end-of-text token, so that a model learns to stop.
    """
    prompt = tokenizer(example.prompt).input_ids
    answer = tokenizer(example.answer, add_special_tokens=False).input_ids
    if task.kind == "summary" and tokenizer.eos_token_id is not None:
        answer = [*answer, tokenizer.eos_token_id]
    answer = answer[: max_length - 1]
    room = max_length - len(answer)
    if len(prompt) > room:
        prompt = shorten(prompt, tokenizer(task.suffix, add_special_tokens=False).input_ids, room)
    return Encoded(prompt + answer, len(answer))


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
        labels[index, end - row.answer : end] = torch.tensor(row.ids[end - row.answer :])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


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
    ) -> None:
        if not rows:
            raise ValueError("no training examples; check the data file and limit_train")
        self.rows, self.pad, self.multiple = rows, pad, multiple
        self.batch_size, self.accumulate, self.seed = batch_size, accumulate, seed
        self._epoch, self._order = -1, [[0]]

    def steps_per_epoch(self) -> int:
        return -(-len(self.rows) // (self.batch_size * self.accumulate))

    def _batches(self, epoch: int) -> list[list[int]]:
        """All micro-batches of an epoch, in order; a short last one is filled from the start."""
        if epoch != self._epoch:
            shuffle = random.Random(f"{self.seed}-{epoch}")
            order = list(range(len(self.rows)))
            shuffle.shuffle(order)
            size, needed = self.batch_size, self.steps_per_epoch() * self.accumulate
            while len(order) < needed * size:
                order += order[: needed * size - len(order)]
            group = size * GROUP_BATCHES
            batches = []
            for start in range(0, len(order), group):
                part = sorted(order[start : start + group], key=lambda i: len(self.rows[i].ids))
                batches += [part[i : i + size] for i in range(0, len(part), size)]
            shuffle.shuffle(batches)
            self._epoch, self._order = epoch, batches
        return self._order

    def window(self, step: int) -> list[Batch]:
        epoch, within = divmod(step, self.steps_per_epoch())
        chosen = self._batches(epoch)[within * self.accumulate : (within + 1) * self.accumulate]
        return [collate([self.rows[i] for i in b], self.pad, self.multiple) for b in chosen]

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        pass  # a task's order needs no more than the step


class TextStream:
    """Documents of a corpus, round and round, from a position that can be restored."""

    def __init__(self, documents: Iterable[str]) -> None:
        self.documents = documents
        self.position = 0
        self._iterator: Iterator[str] | None = None

    def next(self) -> str:
        """The next document; ValueError for a corpus without any."""
        if self._iterator is None:
            self._iterator = iter(self.documents)
            for _ in range(self.position):
                next(self._iterator, None)
        text = next(self._iterator, None)
        if text is None:
            if self.position == 0:
                raise ValueError("the pre-training corpus is empty; check corpus.sources")
            self.position, self._iterator = 0, iter(self.documents)
            text = next(self._iterator)
        self.position += 1
        return text


class PackedBatches:
    """Documents joined by the end-of-text token and cut into full sequences; nothing is padded."""

    def __init__(
        self,
        streams: list[TextStream],
        tokenizer: Tokenizer,
        length: int,
        batch_size: int,
        accumulate: int = 1,
    ) -> None:
        self.streams, self.tokenizer, self.length = streams, tokenizer, length
        self.batch_size, self.accumulate = batch_size, accumulate
        self._buffer: list[int] = []
        self._turn = 0
        end = tokenizer.eos_token_id
        self._end = [] if end is None else [end]

    def steps_per_epoch(self) -> None:
        return None

    def _sequence(self) -> list[int]:
        while len(self._buffer) < self.length:
            text = self.streams[self._turn % len(self.streams)].next()
            self._turn += 1
            self._buffer += self.tokenizer(text).input_ids + self._end
        sequence, self._buffer = self._buffer[: self.length], self._buffer[self.length :]
        return sequence

    def window(self, step: int) -> list[Batch]:
        batches = []
        for _ in range(self.accumulate):
            ids = torch.tensor([self._sequence() for _ in range(self.batch_size)])
            batches.append(
                {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
            )
        return batches

    def state(self) -> dict[str, Any]:
        positions = [stream.position for stream in self.streams]
        return {"documents": positions, "buffer": list(self._buffer), "turn": self._turn}

    def restore(self, state: dict[str, Any]) -> None:
        for stream, position in zip(self.streams, state["documents"], strict=True):
            stream.position, stream._iterator = position, None
        self._buffer, self._turn = list(state["buffer"]), state["turn"]


def check_sources(config: Config) -> None:
    """FileNotFoundError for a local file that some stage would miss, maybe hours from now."""
    files = [config.task.train, config.task.validation]
    if config.base.enabled or config.pretrain.enabled:
        files += [s for s in config.corpus.sources if Path(s).suffix.lower() in LOCAL_FORMATS]
    for file in files:
        if file is not None and not Path(file).is_file():
            raise FileNotFoundError(f"data file {file} does not exist; check the path")


def task_rows(
    data: TaskData, tokenizer: Tokenizer, max_length: int, seed: int = 0
) -> list[Encoded]:
    """The training examples of a task, encoded; `limit_train` takes a seeded random part."""
    task = data.resolve()
    examples = load_examples(task, data.train, task.splits[0], columns=data.columns)
    if data.limit_train is not None and data.limit_train < len(examples):
        examples = random.Random(seed).sample(examples, data.limit_train)
    return [encode_example(example, task, tokenizer, max_length) for example in examples]


class _Documents:
    """Texts of one corpus source, iterable again and again."""

    def __init__(self, source: str, corpus: Corpus, config: Config) -> None:
        self.source, self.corpus, self.config = source, corpus, config

    def __iter__(self) -> Iterator[str]:
        for index, text in enumerate(self._texts()):
            if self.corpus.limit is not None and index >= self.corpus.limit:
                return
            yield text

    def _texts(self) -> Iterator[str]:
        if self.source == "task":
            data = self.config.task
            task = data.resolve()
            examples = load_examples(task, data.train, task.splits[0], columns=data.columns)
            random.Random(self.config.seed).shuffle(examples)
            yield from (example.prompt + example.answer for example in examples)
        elif self.source == "tiny":
            from bitdistill.tiny import corpus

            yield from corpus()
        else:
            yield from self._rows()

    def _rows(self) -> Iterator[str]:
        path, column = Path(self.source), self.corpus.column
        if path.suffix.lower() in LOCAL_FORMATS or path.is_file():
            rows = file_rows(path, streaming=True)
        else:
            rows = hub_rows(
                self.source, self.corpus.configuration, self.corpus.split, streaming=True
            )
        for index, row in enumerate(rows):
            if column not in row:
                raise ValueError(
                    f"{self.source} has no column {column!r}, only {', '.join(row)}; "
                    "set corpus.column"
                )
            if not isinstance(row[column], str):
                raise ValueError(
                    f"row {index} of {self.source} has {row[column]!r} in column {column!r}, not "
                    "text; set corpus.column, or fix the data"
                )
            yield row[column]


def corpus_batches(
    config: Config, tokenizer: Tokenizer, length: int, batch_size: int, accumulate: int
) -> PackedBatches:
    """Packed pre-training batches from every source of `config.corpus`, in turn."""
    streams = [
        TextStream(_Documents(source, config.corpus, config)) for source in config.corpus.sources
    ]
    return PackedBatches(streams, tokenizer, length, batch_size, accumulate)
