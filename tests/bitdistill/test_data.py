"""Task examples: encoding, batches and their order, the same for any number of devices."""

from __future__ import annotations

import dataclasses
import json
import random
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

from bitdistill.data import (
    IGNORED,
    Shard,
    TaskBatches,
    collate,
    task_examples,
)
from bitdistill.encoding import Encoded, encode_examples
from bitdistill.schema_data import TaskData
from bitdistill.tasks import TASKS, Example

WORDS = "the film is not good bad but very dull bright and we liked it a plot".split()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


# --- task examples --------------------------------------------------------------------------------


def test_encoding_is_prompt_then_answer(tokenizer: Any) -> None:
    example = Example(0, "the film is\nVerdict:", " good", 1)
    encoded = encode_examples([example], TASKS["tiny"], tokenizer, 64)[0]
    assert tokenizer.decode(encoded.ids) == "the film is\nVerdict: good"
    assert tokenizer.decode(encoded.ids[-encoded.answer :]) == " good"


def test_summaries_end_with_the_end_of_text(tokenizer: Any) -> None:
    example = Example(0, "the film is\n\nSummary:", " good plot", None)
    encoded = encode_examples([example], TASKS["cnn_dailymail"], tokenizer, 64)[0]
    assert encoded.ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(encoded.ids[-encoded.answer : -1]) == " good plot"


def test_a_long_prompt_loses_the_end_of_its_text(tokenizer: Any) -> None:
    example = Example(0, "the film is not good but very dull\nVerdict:", " bad", 0)
    full = encode_examples([example], TASKS["tiny"], tokenizer, 512)[0]
    ending = len(tokenizer("\nVerdict:").input_ids) + full.answer
    for max_length in range(full.answer + 1, len(full.ids)):
        short = encode_examples([example], TASKS["tiny"], tokenizer, max_length)[0]
        assert len(short.ids) == max_length
        assert short.answer == full.answer
        kept = min(ending, max_length)
        assert short.ids[-kept:] == full.ids[-kept:]
        assert short.ids[:-kept] == full.ids[: max_length - kept]


def test_many_examples_are_encoded_as_each_alone(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bitdistill.encoding.CHUNK", 4)
    choice = random.Random(0)
    prompts = [" ".join(choice.choices(WORDS, k=length)) + "\nVerdict:" for length in range(11)]
    examples = [Example(0, prompt, choice.choice([" good", ""]), 1) for prompt in prompts]
    for task in (TASKS["tiny"], TASKS["cnn_dailymail"]):
        together = encode_examples(examples, task, tokenizer, 12)
        assert together == [encode_examples([e], task, tokenizer, 12)[0] for e in examples]
    assert encode_examples([], TASKS["tiny"], tokenizer, 12) == []


def test_the_suffix_of_a_template() -> None:
    assert TASKS["cnn_dailymail"].suffix == "\n\nSummary:"
    assert TASKS["mnli"].suffix == ". True, False or Neither?\nAnswer:"
    assert dataclasses.replace(TASKS["tiny"], prompt="Judge: {sentence}").suffix == ""


def test_a_long_answer_leaves_one_token_of_the_prompt(tokenizer: Any) -> None:
    example = Example(0, "the film", " not good" * 10, None)
    prompt, answer = tokenizer("the film").input_ids, tokenizer(" not good" * 10).input_ids
    encoded = encode_examples([example], TASKS["cnn_dailymail"], tokenizer, 6)[0]
    assert encoded.ids == [prompt[-1], *answer[:5]]
    assert encoded.answer == 5


@pytest.mark.parametrize(("multiple", "length"), [(1, 5), (4, 8), (8, 8)])
def test_collate_by_hand(multiple: int, length: int) -> None:
    batch = collate([Encoded([5, 6, 7, 8, 9], 2), Encoded([4, 3], 1)], pad=1, multiple=multiple)
    rest = length - 5
    assert batch["input_ids"].tolist() == [
        [5, 6, 7, 8, 9] + [1] * rest,
        [4, 3, 1, 1, 1] + [1] * rest,
    ]
    assert batch["attention_mask"].tolist() == [[1] * 5 + [0] * rest, [1, 1] + [0] * (3 + rest)]
    assert batch["labels"].tolist() == [
        [IGNORED] * 3 + [8, 9] + [IGNORED] * rest,
        [IGNORED, 3] + [IGNORED] * (3 + rest),
    ]
    assert {value.dtype for value in batch.values()} == {torch.int64}


def numbered(count: int) -> list[Encoded]:
    """Rows of different lengths whose first id says which one it is."""
    return [Encoded([i, *[0] * (1 + i * 7 % 11)], 1) for i in range(count)]


def seen(batches: TaskBatches, steps: range) -> list[list[list[int]]]:
    return [[b["input_ids"][:, 0].tolist() for b in batches.window(step)] for step in steps]


@pytest.mark.parametrize(
    ("count", "size", "accumulate"), [(37, 4, 1), (37, 4, 3), (3, 8, 2), (8, 8, 1)]
)
def test_an_epoch_covers_every_example(count: int, size: int, accumulate: int) -> None:
    batches = TaskBatches(numbered(count), 0, size, accumulate)
    steps = batches.steps_per_epoch()
    assert steps == -(-count // (size * accumulate))
    for epoch in range(2):
        windows = seen(batches, range(epoch * steps, (epoch + 1) * steps))
        assert all([len(rows) for rows in window] == [size] * accumulate for window in windows)
        counts = Counter(i for window in windows for rows in window for i in rows)
        assert set(counts) == set(range(count))
        if count >= size * accumulate:
            assert max(counts.values()) <= 2  # the last window is filled from the start
        assert sum(counts.values()) == steps * size * accumulate


def test_the_order_depends_on_seed_and_step_alone() -> None:
    first, again = TaskBatches(numbered(37), 0, 4, seed=1), TaskBatches(numbered(37), 0, 4, seed=1)
    forward = seen(first, range(25))
    backward = [seen(again, range(step, step + 1))[0] for step in reversed(range(25))]
    assert forward == backward[::-1]
    assert forward[:10] != forward[10:20]  # another epoch, another order
    assert seen(TaskBatches(numbered(37), 0, 4, seed=2), range(10)) != forward[:10]


def test_batches_hold_examples_of_similar_length() -> None:
    rows = [Encoded([0] * (1 + i % 50), 1) for i in range(400)]
    batches = TaskBatches(rows, 0, 8, multiple=1)
    padding = [
        1 - float(b["attention_mask"].float().mean()) for s in range(50) for b in batches.window(s)
    ]
    assert sum(padding) / len(padding) < 0.1  # a random order would pad by half


def test_no_examples() -> None:
    with pytest.raises(ValueError, match="no training examples; check the data file and limit"):
        TaskBatches([], 0, 4)


def write_reviews(path: Path, count: int) -> Path:
    rows = [{"sentence": f"{WORDS[i % 16]} {i}", "label": i % 2} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_limit_train_takes_a_seeded_part(tokenizer: Any, tmp_path: Path) -> None:
    file = str(write_reviews(tmp_path / "train.jsonl", 40))
    everything = task_examples(TaskData(name="sst2", train=file))
    data = TaskData(name="sst2", train=file, limit_train=10)
    first, again, other = (task_examples(data, seed) for seed in (0, 0, 1))
    assert len(everything) == 40
    assert len(first) == 10
    assert first == again
    assert first != other
    assert all(row in everything for row in first)


@pytest.mark.parametrize(("count", "size", "accumulate"), [(37, 2, 4), (5, 2, 4), (64, 4, 4)])
@pytest.mark.parametrize("world", [2, 4])
def test_devices_share_the_window_of_one(
    count: int, size: int, accumulate: int, world: int
) -> None:
    """The same examples in each step, none of them twice, and none left out."""
    alone = TaskBatches(numbered(count), 0, size, accumulate, seed=3)
    shared = [
        TaskBatches(numbered(count), 0, size, accumulate // world, 3, shard=Shard(rank, world))
        for rank in range(world)
    ]
    steps = range(2 * alone.steps_per_epoch())
    assert {b.steps_per_epoch() for b in shared} == {alone.steps_per_epoch()}
    parts = [seen(batches, steps) for batches in shared]
    together = [[*chain.from_iterable(windows)] for windows in zip(*parts, strict=True)]
    assert together == seen(alone, steps)


def test_micro_batches_of_a_step_are_of_similar_length() -> None:
    rows = [Encoded([0] * (1 + i % 50), 1) for i in range(400)]
    batches = TaskBatches(rows, 0, 4, 4, multiple=1)
    lengths = [[b["input_ids"].shape[1] for b in batches.window(s)] for s in range(25)]
    assert sum(max(window) - min(window) for window in lengths) / len(lengths) < 10
