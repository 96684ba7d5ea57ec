"""Encoding, batches and their order, packed text and its position, corpus sources."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from bitdistill.config import load_config
from bitdistill.data import (
    IGNORED,
    Encoded,
    PackedBatches,
    TaskBatches,
    TextStream,
    collate,
    corpus_batches,
    encode_example,
    task_rows,
)
from bitdistill.schema import Config, TaskData
from bitdistill.tasks import TASKS, Example

WORDS = "the film is not good bad but very dull bright and we liked it a plot".split()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


# --- task examples --------------------------------------------------------------------------------


def test_encoding_is_prompt_then_answer(tokenizer: Any) -> None:
    example = Example(0, "the film is\nVerdict:", " good", 1)
    encoded = encode_example(example, TASKS["tiny"], tokenizer, 64)
    assert tokenizer.decode(encoded.ids) == "the film is\nVerdict: good"
    assert tokenizer.decode(encoded.ids[-encoded.answer :]) == " good"


def test_summaries_end_with_the_end_of_text(tokenizer: Any) -> None:
    example = Example(0, "the film is\n\nSummary:", " good plot", None)
    encoded = encode_example(example, TASKS["cnn_dailymail"], tokenizer, 64)
    assert encoded.ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(encoded.ids[-encoded.answer : -1]) == " good plot"


def test_a_long_prompt_loses_the_end_of_its_text(tokenizer: Any) -> None:
    example = Example(0, "the film is not good but very dull\nVerdict:", " bad", 0)
    full = encode_example(example, TASKS["tiny"], tokenizer, 512)
    ending = len(tokenizer("\nVerdict:").input_ids) + full.answer
    for max_length in range(full.answer + 1, len(full.ids)):
        short = encode_example(example, TASKS["tiny"], tokenizer, max_length)
        assert len(short.ids) == max_length
        assert short.answer == full.answer
        kept = min(ending, max_length)
        assert short.ids[-kept:] == full.ids[-kept:]
        assert short.ids[:-kept] == full.ids[: max_length - kept]


def test_the_suffix_of_a_template() -> None:
    assert TASKS["cnn_dailymail"].suffix == "\n\nSummary:"
    assert TASKS["mnli"].suffix == ". True, False or Neither?\nAnswer:"
    assert dataclasses.replace(TASKS["tiny"], prompt="Judge: {sentence}").suffix == ""


def test_a_long_answer_leaves_one_token_of_the_prompt(tokenizer: Any) -> None:
    example = Example(0, "the film", " not good" * 10, None)
    prompt, answer = tokenizer("the film").input_ids, tokenizer(" not good" * 10).input_ids
    encoded = encode_example(example, TASKS["cnn_dailymail"], tokenizer, 6)
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
    everything = task_rows(TaskData(name="sst2", train=file), tokenizer, 64)
    data = TaskData(name="sst2", train=file, limit_train=10)
    first, again, other = (task_rows(data, tokenizer, 64, seed) for seed in (0, 0, 1))
    assert len(everything) == 40
    assert len(first) == 10
    assert first == again
    assert first != other
    assert all(row in everything for row in first)


# --- packed text ----------------------------------------------------------------------------------


def packed(tokenizer: Any, documents: list[list[str]], **sizes: int) -> PackedBatches:
    return PackedBatches([TextStream(texts) for texts in documents], tokenizer, **sizes)


def test_packing_joins_documents_in_turn(tokenizer: Any) -> None:
    batches = packed(tokenizer, [["the film", "is not"], ["good"]], length=5, batch_size=2)
    text = tokenizer.eos_token.join(["the film", "good", "is not", "good", "the film", "good", ""])
    expected = tokenizer(text).input_ids
    (batch,) = batches.window(0)
    assert batch["input_ids"].flatten().tolist() == expected[:10]
    assert torch.equal(batch["labels"], batch["input_ids"])
    assert bool((batch["attention_mask"] == 1).all())
    assert batches.steps_per_epoch() is None


@pytest.mark.parametrize("stop", [1, 2, 7])
def test_packing_resumes_exactly(tokenizer: Any, stop: int) -> None:
    documents = [[f"the film {i} is {w}" for i, w in enumerate(WORDS)], ["a plot", "we liked it"]]
    sizes = {"length": 7, "batch_size": 2, "accumulate": 2}
    whole, part, rest = (packed(tokenizer, documents, **sizes) for _ in range(3))
    expected = [whole.window(step) for step in range(12)]
    for step in range(stop):
        part.window(step)
    state = part.state()
    text = json.dumps(state)
    part.window(stop)
    assert json.dumps(state) == text  # a saved state does not move on
    rest.restore(json.loads(text))
    for step in range(stop, 12):
        for mine, theirs in zip(rest.window(step), expected[step], strict=True):
            assert torch.equal(mine["input_ids"], theirs["input_ids"])


def test_a_stream_starts_again_at_its_end() -> None:
    stream = TextStream(["a", "b", "c"])
    assert [stream.next() for _ in range(7)] == list("abcabca")
    assert stream.position == 1
    for position, following in ((2, "ca"), (3, "ab"), (0, "ab")):
        resumed = TextStream(["a", "b", "c"])
        resumed.position = position
        assert [resumed.next(), resumed.next()] == list(following)


def test_an_empty_corpus() -> None:
    with pytest.raises(ValueError, match=r"the pre-training corpus is empty; check corpus.sources"):
        TextStream([]).next()


# --- corpus sources -------------------------------------------------------------------------------


def with_corpus(*settings: str) -> Config:
    return load_config("tiny", [f"corpus.{setting}" for setting in settings])


def first_texts(config: Config, tokenizer: Any, count: int) -> list[str]:
    stream = corpus_batches(config, tokenizer, 8, 1, 1).streams[0]
    return [stream.next() for _ in range(count)]


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet"])
def test_a_local_corpus(form: str, tokenizer: Any, tmp_path: Path) -> None:
    import pandas as pd

    frame = pd.DataFrame({"body": ["one", "two", "three"], "source": ["x"] * 3})
    file = tmp_path / f"corpus.{form}"
    if form == "jsonl":
        frame.to_json(file, orient="records", lines=True)
    elif form == "csv":
        frame.to_csv(file, index=False)
    else:
        frame.to_parquet(file)
    config = with_corpus(f"sources=[{file}]", "column=body")
    assert first_texts(config, tokenizer, 4) == ["one", "two", "three", "one"]
    config = with_corpus(f"sources=[{file}]", "column=body", "limit=2")
    assert first_texts(config, tokenizer, 3) == ["one", "two", "one"]
    with pytest.raises(
        ValueError, match=r"has no column 'text', only body, source; set corpus.col"
    ):
        first_texts(with_corpus(f"sources=[{file}]"), tokenizer, 1)


def test_the_task_as_corpus(tokenizer: Any, tmp_path: Path) -> None:
    file = write_reviews(tmp_path / "train.jsonl", 6)
    config = load_config("tiny", [f"task={{name: sst2, train: {file}}}", "corpus.sources=[task]"])
    texts = first_texts(config, tokenizer, 6)
    assert sorted(t.split("\n")[0] for t in texts) == sorted(f"{WORDS[i]} {i}" for i in range(6))
    assert all(t.endswith(("Answer: positive", "Answer: negative")) for t in texts)


def test_the_embedded_corpus_is_mixed_with_others(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "own.jsonl").write_text('{"text": "my own text"}\n')
    config = with_corpus(f"sources=[tiny, {tmp_path / 'own.jsonl'}]")
    batches = corpus_batches(config, tokenizer, 200, 1, 1)
    assert len(batches.streams) == 2
    text = tokenizer.decode(batches.window(0)[0]["input_ids"][0])
    assert text.split(tokenizer.eos_token)[1] == "my own text"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.jsonl", None, "data file .*gone.jsonl does not exist; check the path"),
        ("corpus.txt", "plain", "corpus.txt: unknown format; use .jsonl"),
        (
            "number.jsonl",
            '{"text": 5}\n',
            "row 0 of .*number.jsonl has 5 in column 'text', not text",
        ),
        ("null.jsonl", '{"text": "a"}\n{"text": null}\n', "row 1 of .* has None in column 'text'"),
        ("bad.jsonl", '{"text": ', r"bad.jsonl cannot be read as json \("),
    ],
)
def test_corpora_that_are_refused(
    name: str, content: str | None, message: str, tokenizer: Any, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        first_texts(with_corpus(f"sources=[{tmp_path / name}]"), tokenizer, 2)


def test_a_hub_corpus_without_network(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import huggingface_hub

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"data set some/corpus \(train\) cannot be had"):
        first_texts(with_corpus("sources=[some/corpus]"), tokenizer, 1)
