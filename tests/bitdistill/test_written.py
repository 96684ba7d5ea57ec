"""Summaries that the teacher writes for its student."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from short_runs import log_of
from transformers import GenerationConfig

from bitdistill import written
from bitdistill.data import UNLABELLED
from bitdistill.distributed import World
from bitdistill.feeds import task_batches
from bitdistill.hardware import Hardware
from bitdistill.mixtures import splices
from bitdistill.recipe import train
from bitdistill.schema import Config
from bitdistill.tasks import Example
from bitdistill.written import summaries

GIST = (
    "task.name=gist",
    "task.kind=summary",
    "task.prompt='{sentence} Gist:'",
    "task.inputs=[sentence]",
    "task.target=gist",
    "task.max_new_tokens=6",
    "distill.mixtures=2",
)


def test_splices_are_cut_between_sentences() -> None:
    texts = ["One a. Two b! Three c?", "Four d. Five e.", "six without an end"]
    examples = [Example(i, "", "", None, (text,)) for i, text in enumerate(texts)]
    whole = {"One a.", "Two b!", "Three c?", "Four d.", "Five e.", "six without an end"}
    seen = set()
    for seed in range(20):
        for (made,), text in zip(splices(examples, str(seed)), texts, strict=True):
            left = made
            for part in sorted(whole, key=len, reverse=True):
                left = left.replace(part, "")
            assert not left.strip(), made
            assert made[:4] == text[:4]
            seen.add(made)
    assert len(seen) > 15
    assert splices(examples, "1") == splices(examples, "1")


def test_a_batch_is_as_large_as_its_keys_and_values_allow(make_teacher: Callable[..., Any]) -> None:
    config = make_teacher("llama", num_hidden_layers=4).config  # 2 key heads of 16, in fp32
    hardware = Hardware(torch.device("cpu"), torch.float32)
    a_token = 2 * 4 * 2 * 16 * 4
    assert written.batch_rows(config, 2**12, hardware) == 2**30 // (a_token * 2**12)
    assert written.batch_rows(config, 10, hardware) == written.MAX_ROWS
    assert written.batch_rows(config, 2**40, hardware) == 1


def test_the_teacher_s_greedy_answers(
    recipe: Callable[..., Config],
    make_teacher: Callable[..., Any],
    tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In batches of unlike lengths, as one by one; each once, and a lost shard alone again."""
    monkeypatch.setattr(written, "SHARD", 10)
    monkeypatch.setattr(written, "MAX_ROWS", 4)
    teacher, config = make_teacher("qwen3"), recipe(*GIST)
    made = summaries(config, teacher, "mark", tokenizer, tmp_path, World())
    assert made is not None
    assert made.count == 24  # the documents, and as many spliced
    rows = made.rows(0)
    assert rows is made.rows(1)
    for row in rows:
        assert not row.labelled
        ids, expected = list(row.ids[: -row.answer]), []
        while len(expected) < 6 and tokenizer.eos_token_id not in expected:
            with torch.no_grad():
                logits = teacher(torch.tensor([ids + expected])).logits
            expected.append(int(logits[0, -1].argmax()))
        assert row.ids[-row.answer :] == expected
    files = sorted((tmp_path / "teacher-written").glob("*/shard-*.json"))
    assert [len(json.loads(file.read_text())) for file in files] == [10, 10, 4]
    files[1].unlink()
    asked: list[int] = []
    own = teacher.generate

    def count(**options: Any) -> Any:
        asked.append(len(options["input_ids"]))
        return own(**options)

    monkeypatch.setattr(teacher, "generate", count)
    again = summaries(config, teacher, "mark", tokenizer, tmp_path, World())
    assert again is not None
    assert again.rows(0) == rows
    assert sum(asked) == 10
    other = summaries(config, teacher, "another teacher", tokenizer, tmp_path, World())
    assert other is not None
    assert sum(asked) == 10 + 24


def test_they_are_more_examples_without_labels(
    recipe: Callable[..., Config], make_teacher: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    config = recipe(*GIST, "distill.batch_size=6")
    made = summaries(config, make_teacher("qwen3"), "mark", tokenizer, tmp_path, World())
    batches = task_batches(config, config.distill, tokenizer, World(), made)
    assert batches.steps_per_epoch() == 6  # 12 with references, 24 without
    labels = [batches.window(step)[0]["labels"] for step in range(6)]
    assert sum(int((x == UNLABELLED).any(1).sum()) for x in labels) == 24
    assert sum(int((x >= 0).any(1).sum()) for x in labels) == 12


def test_labels_are_not_written(
    recipe: Callable[..., Config], make_teacher: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    config = recipe("distill.mixtures=2")
    assert summaries(config, make_teacher("qwen3"), "m", tokenizer, tmp_path, World()) is None
    with pytest.raises(ValueError, match="leaves no room for a document beside a summary of 24"):
        summaries(
            recipe(*GIST, "task.max_new_tokens=24"),
            make_teacher("qwen3"), "m", tokenizer, tmp_path, World(),
        )  # fmt: skip


def test_a_recipe_of_summaries_with_mixtures(recipe: Callable[..., Config], tmp_path: Path) -> None:
    train(recipe(*GIST, "distill.steps=6"), tmp_path / "run", quiet=True)
    assert list((tmp_path / "run" / "teacher-written").glob("*/shard-00000.json"))
    assert {"ce", "logits", "relations"} <= set(log_of(tmp_path / "run")[-1])


def test_a_model_s_own_penalties_do_not_shape_them(
    recipe: Callable[..., Config], make_teacher: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    teacher, config = make_teacher("qwen3"), recipe(*GIST)
    plain = summaries(config, teacher, "plain", tokenizer, tmp_path, World())
    own = GenerationConfig(repetition_penalty=1.9, no_repeat_ngram_size=1)
    teacher.generation_config = own
    greedy = summaries(config, teacher, "penalised", tokenizer, tmp_path, World())
    assert plain is not None
    assert greedy is not None
    assert greedy.rows(0) == plain.rows(0)
    assert teacher.generation_config is own
