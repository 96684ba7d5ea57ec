"""A runtime without a model: tokens are letters, logits a row of a table; and rows without one."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from invented import TASK, Make

from bitdistill import manifest
from bitdistill.backends.base import Runtime

LETTERS = " abcdefghijklmnopqrstuvwxyz."


class LetterTokenizer:
    """One token a letter; `special` puts token 0 in front."""

    def encode(self, text: str, special: bool = True) -> list[int]:
        return [0] * special + [LETTERS.index(letter) for letter in text]

    def encode_all(self, texts: Sequence[str], special: bool = True) -> list[list[int]]:
        return [self.encode(text, special) for text in texts]

    def decode(self, ids: Any) -> str:
        return "".join(LETTERS[i] for i in ids)


class TableRuntime(Runtime):
    """Logits of the next token are `table[token]`, float32 (V, V)."""

    name = "table"

    def __init__(self, table: np.ndarray, context: int = 64) -> None:
        self.table = table.astype(np.float32)
        self.vocabulary = len(table)
        self.context = context
        self.stop_tokens = [LETTERS.index(".")]
        self.fed: list[int] = []

    @property
    def tokenizer(self) -> Any:  # type: ignore[override]
        return LetterTokenizer()

    def new_cache(self, capacity: int) -> Any:
        assert capacity <= self.context
        return SimpleNamespace(length=0, capacity=capacity)

    def step(self, tokens: Any, cache: Any) -> Any:
        cache.length += len(tokens)
        assert cache.length <= cache.capacity
        self.fed.append(len(tokens))
        return self.table[tokens[-1]]

    def logits_at(self, tokens_BT: Any, lengths_B: Any, rows: Any) -> Any:
        assert (rows[:, 1] < lengths_B[rows[:, 0]]).all()
        return self.table[tokens_BT[rows[:, 0], rows[:, 1]]]


@pytest.fixture
def table_runtime() -> Any:
    """`table_runtime(context)`: a TableRuntime with random logits; always the same table."""
    table = np.random.default_rng(0).normal(size=(len(LETTERS), len(LETTERS)))
    return lambda context=64: TableRuntime(table, context)


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """`make(name, kind, **content)`: a directory that has a manifest and some bytes of weights."""

    def write(name: str, kind: str = "student", **content: Any) -> Path:
        path = tmp_path / name
        path.mkdir()
        (path / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}" + bytes(2**20))
        head = {"method": "bitdistill", "base_model": "tiny", "task": TASK.to_json()}
        manifest.write_manifest(path, kind, head | content)
        return path

    return write


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "heldout.jsonl"
    rows = [{"text": f"text {i}", "label": label} for i, label in enumerate([1, 0, 1, 1])]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
