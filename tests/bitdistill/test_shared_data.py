"""Real files, where they lie beside the checkout: every task reads its stand-in."""

from __future__ import annotations

import hashlib
import importlib
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from bitdistill.config import load_config, recipe_names
from bitdistill.data import task_examples
from bitdistill.encoding import encode_examples
from bitdistill.schema_data import TaskData
from bitdistill.tasks import TASKS, load_examples

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
SUMMARY = {"article": "document", "highlights": "summary"}

pytestmark = pytest.mark.skipif(
    not DATA.is_dir(), reason="no shared/data beside the checkout: real files are not distributed"
)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize(
    ("folder", "name", "split", "count"),
    [
        ("sst2-movie", "sst2", "train", 8198),
        ("sst2-movie", "sst2", "validation", 872),
        ("qnli-privacy", "qnli", "validation", 767),
        ("mnli-wordnet", "mnli", "validation", 2000),
    ],
)
def test_label_tasks(folder: str, name: str, split: str, count: int) -> None:
    task = TASKS[name]
    examples = load_examples(task, DATA / folder / f"{split}.jsonl")
    assert len(examples) == count
    counts = Counter(example.label for example in examples)
    assert set(counts) == set(range(len(task.labels)))
    assert max(counts.values()) < 0.6 * count
    ending = task.prompt.rpartition("}")[2]
    for example in examples:
        assert example.label is not None
        assert example.answer == task.labels[example.label]
        assert example.prompt.endswith(ending)
        assert len(example.prompt) > len(ending)


@pytest.mark.parametrize(("split", "count"), [("train", 1654), ("validation", 200)])
def test_summaries(split: str, count: int) -> None:
    examples = load_examples(
        TASKS["cnn_dailymail"], DATA / "summary-bbc" / f"{split}.jsonl", columns=SUMMARY
    )
    assert len(examples) == count
    assert all(example.label is None for example in examples)
    assert all(20 < len(example.answer) < len(example.prompt) for example in examples)
    with pytest.raises(ValueError, match="column 'article' is missing; the data has document, sum"):
        load_examples(TASKS["cnn_dailymail"], DATA / "summary-bbc" / f"{split}.jsonl", limit=1)


def test_the_example_that_builds_them_knows_their_hashes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[2] / "examples")
    script = importlib.import_module("showcase_data")
    for name, start in script.SHA256.items():
        assert hashlib.sha256((DATA / name).read_bytes()).hexdigest().startswith(start)


def test_real_text_is_encoded_and_cut(tokenizer: Any) -> None:
    """Long articles keep their summary whole, and the end-of-text token."""
    data = TaskData(
        name="cnn_dailymail",
        train=str(DATA / "summary-bbc" / "train.jsonl"),
        columns=SUMMARY,
        limit_train=20,
    )
    examples = load_examples(data.resolve(), data.train, columns=SUMMARY)
    chosen = random.Random(0).sample(examples, 20)
    rows = encode_examples(task_examples(data), data.resolve(), tokenizer, 1024)
    for example, row in zip(chosen, rows, strict=True):
        assert len(row.ids) <= 1024
        assert row.ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(row.ids[-row.answer : -1]) == example.answer


@pytest.mark.parametrize("name", [name for name in recipe_names() if name.startswith("showcase/")])
def test_showcase_recipes_name_what_is_there(name: str, tokenizer: Any) -> None:
    """With the data's folder as `data` beside the command, each finds its files and reads them."""
    config = load_config(name)
    task = config.task.resolve()
    for file in (config.task.train, config.task.validation):
        assert file is not None
        examples = load_examples(task, DATA / Path(file).relative_to("data"))
        assert len(examples) >= 200
        assert len({example.label for example in examples}) == max(1, len(task.labels))
        for settings in (config.teacher, config.distill):
            (row,) = encode_examples(examples[:1], task, tokenizer, settings.max_length)
            assert row.ids[-row.answer :]
    assert all(
        (DATA / Path(source).relative_to("data")).is_file() for source in config.corpus.sources
    )
    assert load_config(name, ["seed=1"]).shared == config.shared
