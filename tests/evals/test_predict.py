"""Label scoring, greedy summaries, truncation, on a runtime whose answers are known."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest

from bitdistill.backends.search import Search
from bitdistill.evals.predict import Options, encode, match_answer, predict, truncate
from bitdistill.tasks import Example, Task

LABELS = Task("letters", "label", "{text}", ("text",), "label", ("ab", "c", "bcz"))
SHORT = Options(search=Search(6))
SUMMARY = Task("short", "summary", "{text}", ("text",), "summary", max_new_tokens=6)


def examples(*prompts: str) -> list[Example]:
    return [Example(i, prompt, "c", 1) for i, prompt in enumerate(prompts)]


def log_softmax(table: np.ndarray) -> np.ndarray:
    table = table.astype(np.float64)
    return table - np.log(np.exp(table).sum(-1, keepdims=True))


def test_label_scores_are_log_likelihoods_in_the_given_order(table_runtime: Any) -> None:
    runtime = table_runtime()
    prompts = ["bad", "a", "hello there", "q", "a longer prompt than the others"]
    got = predict(runtime, LABELS, examples(*prompts), Options(batch_size=2))
    table, encode = log_softmax(runtime.table), runtime.tokenizer.encode
    for place, (prompt, record) in enumerate(zip(prompts, got.records, strict=True)):
        wanted = []
        for answer in LABELS.labels:
            ids = encode(prompt) + encode(answer, special=False)
            pairs = list(itertools.pairwise(ids))[-len(answer) :]
            wanted.append(sum(table[pair] for pair in pairs))
        assert record["i"] == place
        assert record["scores"] == pytest.approx(wanted, abs=1e-5)
        assert record["label"] == int(np.argmax(wanted))
    assert got.prompt_tokens == sum(len(prompt) + 1 for prompt in prompts)
    assert got.answer_tokens == [2, 1, 3]


def test_progress_reaches_the_total(table_runtime: Any) -> None:
    seen: list[tuple[int, int]] = []
    predict(
        table_runtime(),
        LABELS,
        examples(*"abcde"),
        Options(batch_size=2),
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(2, 5), (4, 5), (5, 5)]


def test_a_long_prompt_keeps_its_suffix_and_is_counted(table_runtime: Any) -> None:
    runtime = table_runtime(context=10)
    task = dataclasses.replace(LABELS, prompt="{text}kl")
    encoded = encode(runtime.tokenizer, task, examples("abcdefghijkl", "abc"))
    prompts, truncated = truncate(encoded, room=3, limit=runtime.context)
    # 10 tokens less 3 for the answer: BOS, four letters, and the suffix
    assert runtime.tokenizer.decode(prompts[0]).strip() == "abcdkl"
    assert len(prompts[0]) == 7
    assert (len(prompts[1]), truncated) == (4, 1)
    assert predict(runtime, LABELS, examples("abcdefghijkl", "abc")).truncated == 1
    assert predict(runtime, LABELS, examples("abcdef", "abc"), Options(6)).truncated == 2


def test_no_room_for_a_prompt_is_refused(table_runtime: Any) -> None:
    with pytest.raises(
        ValueError, match="leaves no room for a prompt in 3 tokens; raise max_length"
    ):
        predict(table_runtime(), LABELS, examples("a"), Options(3))


def test_answers_with_the_same_tokens_are_refused(table_runtime: Any) -> None:
    task = dataclasses.replace(LABELS, labels=("a", "a"))
    with pytest.raises(ValueError, match=r"not distinct tokens .*; choose other answer words"):
        predict(table_runtime(), task, examples("a"))


def test_an_answer_that_begins_another_is_refused(table_runtime: Any) -> None:
    """A model that is sure to say "abz" finds "ab" likelier still."""
    runtime = table_runtime()
    runtime.table[:] = 0.0
    for letter, after in ("qa", "ab", "bz"):
        ids = runtime.tokenizer.encode(letter + after, special=False)
        runtime.table[ids[0], ids[1]] = 9.0
    shorter, longer = runtime.score([([17], [1, 2]), ([17], [1, 2, 26])])
    assert longer < shorter < 0
    task = dataclasses.replace(LABELS, labels=("abz", "c", "ab"))
    message = r"tokens of answer 'ab' of task 'letters' begin those of 'abz', .*; choose other"
    with pytest.raises(ValueError, match=message):
        predict(runtime, task, examples("q"))


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
    got = predict(runtime, SUMMARY, examples("a", "x", "c"), SHORT)
    assert got.records == [{"i": 0, "text": "bc"}, {"i": 1, "text": "yxyxyx"}, {"i": 2, "text": ""}]
    assert (got.answer_tokens, got.truncated) == ([], 0)
    least = Options(search=Search(6, min_new_tokens=3))
    runtime.table[:, runtime.tokenizer.encode("k")[-1]] = 1.0
    got = predict(runtime, SUMMARY, examples("a", "x", "c"), least)
    assert [record["text"] for record in got.records] == ["bckkkk", "yxyxyx", "kkkkkk"]


def test_a_summary_keeps_room_for_its_tokens(table_runtime: Any) -> None:
    got = predict(table_runtime(context=12), SUMMARY, examples("abcdefgh"), SHORT)
    assert (got.truncated, got.prompt_tokens) == (1, 6)


def test_references_are_scored_on_request(table_runtime: Any) -> None:
    runtime = table_runtime()
    options = Options(search=Search(2), perplexity=True)
    rows = [Example(0, "ab", "cde", None), Example(1, "x", "y", None)]
    got = predict(runtime, SUMMARY, rows, options)
    table, encode = log_softmax(runtime.table), runtime.tokenizer.encode
    for record, text, reference in zip(got.records, ("ab", "x"), ("cd", "y"), strict=True):
        pairs = itertools.pairwise(encode(text)[-1:] + encode(reference, special=False))
        expected = sum(table[pair] for pair in pairs)
        assert record["log_likelihood"] == pytest.approx(expected, abs=1e-5)
        assert record["tokens"] == len(reference)


def test_labels_by_greedy_generation(table_runtime: Any) -> None:
    runtime = table_runtime()
    runtime.table[:] = 0.0
    for letter, after in ("qa", "ab", "bz", "zc", "xx"):
        ids = runtime.tokenizer.encode(letter + after, special=False)
        runtime.table[ids[0], ids[1]] = 5.0
    options = Options(scoring="greedy")
    task = dataclasses.replace(LABELS, labels=("ab", "c", "abz"))
    got = predict(runtime, task, examples("q", "x", "z"), options)
    assert [(r["text"], r["label"]) for r in got.records] == [("abz", 2), ("xxx", -1), ("c  ", 1)]


def test_a_generated_answer_is_the_longest_that_it_begins_with() -> None:
    labels = [" yes", " Yes indeed", " no"]
    said = ["yes!", " YES INDEED.", "No way", "maybe yes", ""]
    assert [match_answer(text, labels) for text in said] == [0, 1, 2, -1, -1]


def test_what_is_known_is_not_predicted_again(table_runtime: Any) -> None:
    """Batches are those of a whole run; one that is half known is predicted whole."""
    runtime, prompts = table_runtime(), [*"abcde", "longest"]
    whole: list[list[int]] = []
    first = predict(
        runtime, LABELS, examples(*prompts), Options(batch_size=2),
        save=lambda records: whole.append([r["i"] for r in records]),
    )  # fmt: skip
    assert whole == [[5, 0], [1, 2], [3, 4]]
    again: list[list[int]] = []
    known = {i: first.records[i] for i in (5, 0, 3)}
    second = predict(
        runtime, LABELS, examples(*prompts), Options(batch_size=2), known=known,
        save=lambda records: again.append([r["i"] for r in records]),
    )  # fmt: skip
    assert again == [[1, 2], [3, 4]]
    assert second == first


def test_options_that_mean_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown scoring 'greddy'; did you mean 'greedy'"):
        Options(scoring="greddy")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="batch_size must be 1 or more, got 0"):
        Options(batch_size=0)
