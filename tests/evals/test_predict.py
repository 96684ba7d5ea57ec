"""Label scoring, greedy summaries, truncation, on a runtime whose answers are known."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest

from bitdistill.evals.predict import encode_prompts, predict
from bitdistill.tasks import Example, Task

LABELS = Task("letters", "label", "{text}", ("text",), "label", ("ab", "c", "abz"))
SUMMARY = Task("short", "summary", "{text}", ("text",), "summary", max_new_tokens=6)


def examples(*prompts: str) -> list[Example]:
    return [Example(i, prompt, "c", 1) for i, prompt in enumerate(prompts)]


def log_softmax(table: np.ndarray) -> np.ndarray:
    table = table.astype(np.float64)
    return table - np.log(np.exp(table).sum(-1, keepdims=True))


def test_label_scores_are_log_likelihoods_in_the_given_order(table_runtime: Any) -> None:
    runtime = table_runtime()
    prompts = ["bad", "a", "hello there", "q", "a longer prompt than the others"]
    got = predict(runtime, LABELS, examples(*prompts), batch_size=2)
    table, encode = log_softmax(runtime.table), runtime.tokenizer.encode
    for prompt, scores, label in zip(prompts, got.scores, got.labels, strict=True):
        wanted = []
        for answer in LABELS.labels:
            ids = encode(prompt) + encode(answer, special=False)
            pairs = list(itertools.pairwise(ids))[-len(answer) :]
            wanted.append(sum(table[pair] for pair in pairs))
        assert scores == pytest.approx(wanted, abs=1e-5)
        assert label == int(np.argmax(wanted))
    assert got.prompt_tokens == sum(len(prompt) + 1 for prompt in prompts)
    assert got.single_token_answers is False


def test_progress_reaches_the_total(table_runtime: Any) -> None:
    seen: list[tuple[int, int]] = []
    predict(
        table_runtime(),
        LABELS,
        examples(*"abcde"),
        batch_size=2,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(2, 5), (4, 5), (5, 5)]


def test_a_long_prompt_keeps_its_suffix_and_is_counted(table_runtime: Any) -> None:
    runtime = table_runtime(context=10)
    task = dataclasses.replace(LABELS, prompt="{text}kl")
    prompts, truncated = encode_prompts(runtime, task, examples("abcdefghijkl", "abc"), 3, None)
    # 10 tokens less 3 for the answer: BOS, four letters, and the suffix
    assert runtime.tokenizer.decode(prompts[0]).strip() == "abcdkl"
    assert len(prompts[0]) == 7
    assert (len(prompts[1]), truncated) == (4, 1)
    assert predict(runtime, LABELS, examples("abcdefghijkl", "abc")).truncated == 1
    assert predict(runtime, LABELS, examples("abcdef", "abc"), max_length=6).truncated == 2


def test_no_room_for_a_prompt_is_refused(table_runtime: Any) -> None:
    with pytest.raises(
        ValueError, match="leaves no room for a prompt in 3 tokens; raise max_length"
    ):
        predict(table_runtime(), LABELS, examples("a"), max_length=3)


def test_answers_with_the_same_tokens_are_refused(table_runtime: Any) -> None:
    task = dataclasses.replace(LABELS, labels=("a", "a"))
    with pytest.raises(ValueError, match=r"not distinct tokens .*; choose other answer words"):
        predict(table_runtime(), task, examples("a"))


def test_scores_that_are_not_finite_are_refused(table_runtime: Any) -> None:
    runtime = table_runtime()
    runtime.table[:] = np.nan
    with pytest.raises(ValueError, match="scores of example 0 are not finite"):
        predict(runtime, LABELS, examples("a"))


def test_summaries_are_greedy_and_end_at_a_stop_token(table_runtime: Any) -> None:
    runtime = table_runtime()
    runtime.table[:] = 0.0
    for letter, after in ("ab", "bc", "c.", "xy", "yx"):
        ids = runtime.tokenizer.encode(letter + after, special=False)
        runtime.table[ids[0], ids[1]] = 5.0
    got = predict(runtime, SUMMARY, examples("a", "x", "c"))
    assert got.texts == ["bc", "yxyxyx", ""]
    assert (got.labels, got.truncated) == ([], 0)


def test_a_summary_keeps_room_for_its_tokens(table_runtime: Any) -> None:
    got = predict(table_runtime(context=12), SUMMARY, examples("abcdefgh"))
    assert (got.truncated, got.prompt_tokens) == (1, 6)
