"""Corpus sources by name: documents round and round, shuffled if asked for, from any position.

Neither torch nor transformers is imported: worker processes start with this (corpus_worker.py).
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from bitdistill.readers import Files, JsonLines, Parquet, Reader, Streamed, Texts, column_of
from bitdistill.schema_data import Corpus, TaskData
from bitdistill.sources import file_rows, form_of, hub_stream, is_local, local_files
from bitdistill.tasks import load_examples, some_of


class Source:
    """A corpus source read round and round; `limit` documents are taken each time.

    With `shuffle`, that many documents at a time are read ahead and given in an order that depends
    on the seed, the pass and their place. A position inside such a block is that of its beginning
    and how many were given: the block is read again.
    """

    def __init__(
        self,
        name: str,
        reader: Reader,
        limit: int | None = None,
        column: str = "text",
        shuffle: int = 0,
        seed: int = 0,
    ) -> None:
        self.name, self.reader, self.limit, self.column = name, reader, limit, column
        self.shuffle, self.seed = shuffle, seed
        self.epoch, self.index = 0, 0
        self._at: Any = None
        self._rows: Iterator[Any] | None = None
        self._block: list[str] = []  # what is left of it, last first
        self._size = 0
        self._begun: dict[str, Any] = {}  # the position in front of it

    def next(self) -> str:
        """The next document; ValueError for a source without any, or for what is not text."""
        text = self._shuffled() if self.shuffle else self._read()
        if text is None:
            if self.index == 0:
                raise ValueError("the pre-training corpus is empty; check corpus.sources")
            self._enter({"epoch": self.epoch + 1, "index": 0, "at": None})
            return self.next()
        return text

    def _shuffled(self) -> str | None:
        if not self._block:
            self._begun = self._position()
            texts = list(islice(iter(self._read, None), self.shuffle))
            random.Random(f"{self.seed}-{self.epoch}-{self._begun['index']}").shuffle(texts)
            self._block, self._size = texts, len(texts)
        return self._block.pop() if self._block else None

    def _read(self) -> str | None:
        """The next document of this pass in the reader's order; None at its end."""
        if self.limit is not None and self.index >= self.limit:
            return None
        if self._rows is None:
            self._rows = self.reader.rows(self._at)
        row = next(self._rows, None)
        if row is None:
            return None
        self.index += 1
        return self._text(row)

    def _text(self, row: Any) -> str:
        value = self.reader.value(row)
        if not isinstance(value, str):
            raise ValueError(
                f"row {self.index - 1} of {self.name} has {value!r} in column {self.column!r}, "
                "not text; set corpus.column, or fix the data"
            )
        return value

    def _position(self) -> dict[str, Any]:
        at = self._at if self._rows is None else self.reader.position
        return {"epoch": self.epoch, "index": self.index, "at": at}

    def state(self) -> dict[str, Any]:
        """The position, as JSON."""
        if not self._block:
            return self._position()
        return self._begun | {"given": self._size - len(self._block)}

    def restore(self, state: dict[str, Any]) -> None:
        """Return to a saved position."""
        self._enter(state)
        for _ in range(state.get("given", 0)):
            self._shuffled()

    def _enter(self, position: dict[str, Any]) -> None:
        self.epoch, self.index, self._at = position["epoch"], position["index"], position["at"]
        self._rows, self._block = None, []


def open_source(
    name: str, corpus: Corpus, task: TaskData, seed: int, run_seed: int | None = None
) -> Source:
    """A source by its name in `corpus.sources`; nothing is read yet.

    `seed` shuffles, `run_seed` (if it is another) chose the task's examples of `limit_train`.
    Raises FileNotFoundError, or ValueError for a format that is not known.
    """
    reader = _reader(name, corpus, task, seed, seed if run_seed is None else run_seed)
    return Source(name, reader, corpus.limit, corpus.column, corpus.shuffle, seed)


def _reader(name: str, corpus: Corpus, task: TaskData, seed: int, run_seed: int) -> Reader:
    if name == "task":
        return Texts(lambda: _task_texts(task, seed, run_seed))
    if name == "tiny":
        from bitdistill.tiny import corpus as tiny

        return Texts(tiny)
    if is_local(name):
        readers = [_file_reader(file, corpus.column) for file in local_files(name)]
        return readers[0] if len(readers) == 1 else Files(readers)
    configuration, split = corpus.configuration, corpus.split
    return Streamed(name, corpus.column, lambda: hub_stream(name, configuration, split))


def _file_reader(file: Path, column: str) -> Reader:
    form = form_of(file)
    if form == "parquet":
        return Parquet(file, column)
    if form == "csv" or (file.suffix.lower() == ".json" and _is_array(file)):
        return Texts(lambda: (column_of(str(file), row, column) for row in file_rows(file)))
    return JsonLines(file, column)


def _is_array(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(64).lstrip()[:1] == b"["


def _task_texts(data: TaskData, seed: int, run_seed: int) -> Iterator[str]:
    """Prompts and answers of the examples that the task is trained on, shuffled once."""
    task = data.resolve()
    examples = load_examples(task, data.train, task.splits[0], columns=data.columns)
    examples = some_of(examples, data.limit_train, run_seed)
    random.Random(seed).shuffle(examples)
    return (example.prompt + example.answer for example in examples)
