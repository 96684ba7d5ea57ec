"""Predictions of a runtime on the examples of a task.

Label tasks are scored: the answer with the largest log-likelihood after the prompt wins, whatever
else the model might have said; or, on request, the model answers by greedy generation, and a text
that begins with none of the answers is wrong. Summaries are generated, greedily or by beams. Prompt
and answers are encoded as in training: special tokens before the prompt, none before the answer.

Truncation, as in training too: a prompt longer than `max_length` (or the model's context), less
the room for the answer, loses the end of its text, never the words after it (`tasks.shorten`).
Truncated prompts are counted.

Batches hold prompts of like length. Which examples share a batch depends on the examples alone, so
that a run which was interrupted computes the same numbers when it goes on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

from bitdistill.backends.search import Search
from bitdistill.names import suggest
from bitdistill.tasks import Example, Task, check_beginnings, shorten

if TYPE_CHECKING:
    from bitdistill.backends.base import Runtime
    from bitdistill.backends.tokenizer import Tokenizer

Progress = Callable[[int, int], None]
Record = dict[str, Any]
Scoring = Literal["likelihood", "greedy"]
MIN_PROMPT = 1
NO_ANSWER = -1


@dataclass(frozen=True)
class Options:
    """How to predict. `max_length` is in tokens, prompt and answer together.

    `scoring` is for label tasks, `search` for summaries; `perplexity` also scores their references.
    """

    max_length: int | None = None
    batch_size: int = 16
    scoring: Scoring = "likelihood"
    search: Search = field(default_factory=Search)
    perplexity: bool = False

    def __post_init__(self) -> None:
        if self.scoring not in get_args(Scoring):
            known = suggest(self.scoring, get_args(Scoring))
            raise ValueError(f"unknown scoring {self.scoring!r}{known}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, got {self.batch_size}")

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Options:
        """The inverse of `dataclasses.asdict`."""
        return cls(**{**value, "search": Search(**value["search"])})


@dataclass(frozen=True)
class Encoded:
    """Token ids of what is asked: prompts as they are, the template's words after its last column,
    and a label task's answers. Plain JSON values under the names of the fields.
    """

    prompts: list[list[int]]
    suffix: list[int]
    answers: list[list[int]]


@dataclass(frozen=True)
class Predictions:
    """`records` holds one entry per example, in the examples' order: its place under `i`, and

    - label task: `label` (an id; -1: none of the answers), and `scores`, the log-likelihood of
      every answer, or the `text` that was generated;
    - summary task: `text`, and where asked for the reference's `log_likelihood` and `tokens`.

    `prompt_tokens` is the sum over examples, after truncation. `answer_tokens` are the lengths of a
    label task's answers.
    """

    records: list[Record]
    truncated: int
    prompt_tokens: int
    answer_tokens: list[int]


def predict(
    runtime: Runtime,
    task: Task,
    examples: Sequence[Example],
    options: Options | None = None,
    *,
    encoded: Encoded | None = None,
    known: Mapping[int, Record] | None = None,
    save: Callable[[list[Record]], None] | None = None,
    progress: Progress | None = None,
) -> Predictions:
    """Predict every example that is not `known`; `save` is given each batch of records.

    `encoded` is `encode` of the same task and examples, where that was done before.
    `progress(done, total)` is called as examples are finished. Raises ValueError when the answer
    leaves no room for a prompt, when two answers have the same tokens or, where likelihood decides,
    one begins another, or for scores that are not finite.
    """
    options = options or Options()
    encoded = encoded or encode(runtime.tokenizer, task, examples)
    answers = encoded.answers
    _check_answers(task, answers)
    if options.scoring == "likelihood":
        check_beginnings(task, answers)
    room = max(map(len, answers)) if answers else options.search.max_new_tokens
    longest = options.max_length
    limit = runtime.context if longest is None else min(longest, runtime.context)
    prompts, truncated = truncate(encoded, room, limit)
    batch = _Batch(runtime, task, examples, prompts, answers, options)
    records = dict(known or {})
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    for start in range(0, len(order), options.batch_size):
        chunk = order[start : start + options.batch_size]
        if any(i not in records for i in chunk):
            found = batch.predict(chunk)
            records |= {record["i"]: record for record in found}
            if save is not None:
                save(found)
        if progress is not None:
            progress(start + len(chunk), len(order))
    in_order = [records[i] for i in range(len(examples))]
    return Predictions(in_order, truncated, sum(map(len, prompts)), [len(a) for a in answers])


def encode(tokenizer: Tokenizer, task: Task, examples: Sequence[Example]) -> Encoded:
    """Token ids of a task's examples: special tokens before prompts, none before answers."""
    return Encoded(
        tokenizer.encode_all([example.prompt for example in examples], special=True),
        tokenizer.encode(task.suffix, special=False),
        [tokenizer.encode(label, special=False) for label in task.labels],
    )


def truncate(encoded: Encoded, room: int, limit: int) -> tuple[list[list[int]], int]:
    """Prompts that leave `room` of `limit` tokens for the answer, and how many were cut."""
    budget = limit - room
    if budget < MIN_PROMPT:
        raise ValueError(
            f"an answer of up to {room} tokens leaves no room for a prompt in {limit} tokens; "
            "raise max_length, or lower max_new_tokens of the task"
        )
    truncated = sum(len(prompt) > budget for prompt in encoded.prompts)
    return [shorten(prompt, encoded.suffix, budget) for prompt in encoded.prompts], truncated


def _check_answers(task: Task, answers: Sequence[Sequence[int]]) -> None:
    """ValueError when one is empty or two are the same."""
    if not all(answers) or len({tuple(answer) for answer in answers}) < len(answers):
        raise ValueError(
            f"the answers of task {task.name!r} ({', '.join(map(repr, task.labels))}) are not "
            f"distinct tokens in this model's vocabulary: {answers}; choose other answer words"
        )


def match_answer(text: str, labels: Sequence[str]) -> int:
    """The id of the longest answer that a generated text begins with, or NO_ANSWER."""
    said = text.strip().lower()
    fitting = [i for i, label in enumerate(labels) if said.startswith(label.strip().lower())]
    return max(fitting, key=lambda i: len(labels[i].strip()), default=NO_ANSWER)


@dataclass(frozen=True)
class _Batch:
    """Predicts a few examples at a time; the prompts are encoded, one for each example."""

    runtime: Runtime
    task: Task
    examples: Sequence[Example]
    prompts: list[list[int]]
    answers: list[list[int]]
    options: Options

    def predict(self, chunk: Sequence[int]) -> list[Record]:
        """Records of the examples at these places."""
        if self.task.kind == "summary":
            return self._summaries(chunk)
        return self._said(chunk) if self.options.scoring == "greedy" else self._scored(chunk)

    def _scored(self, chunk: Sequence[int]) -> list[Record]:
        answers, size = self.answers, self.options.batch_size
        requests = [(self.prompts[i], answer) for i in chunk for answer in answers]
        flat = self.runtime.score(requests, batch_size=size)
        rows = [flat[k : k + len(answers)] for k in range(0, len(flat), len(answers))]
        return [
            {"i": i, "label": _best(scores, self.examples[i]), "scores": scores}
            for i, scores in zip(chunk, rows, strict=True)
        ]

    def _said(self, chunk: Sequence[int]) -> list[Record]:
        texts = self._generate(chunk, Search(max_new_tokens=max(map(len, self.answers))))
        return [
            {"i": i, "label": match_answer(text, self.task.labels), "text": text}
            for i, text in zip(chunk, texts, strict=True)
        ]

    def _summaries(self, chunk: Sequence[int]) -> list[Record]:
        texts = self._generate(chunk, self.options.search)
        records: list[Record] = [
            {"i": i, "text": text.strip()} for i, text in zip(chunk, texts, strict=True)
        ]
        if self.options.perplexity:
            requests = [(self.prompts[i], self._reference(i)) for i in chunk]
            scores = self.runtime.score(requests, batch_size=self.options.batch_size)
            for record, (_, reference), score in zip(records, requests, scores, strict=True):
                record |= {"log_likelihood": score, "tokens": len(reference)}
        return records

    def _reference(self, i: int) -> list[int]:
        """The tokens of a reference, as many as may be generated."""
        tokens = self.runtime.tokenizer.encode(self.examples[i].answer, special=False)
        return list(tokens)[: self.options.search.max_new_tokens]

    def _generate(self, chunk: Sequence[int], search: Search) -> list[str]:
        from bitdistill.backends.generation import generate_batch

        prompts = [self.prompts[i] for i in chunk]
        found = generate_batch(self.runtime, prompts, search, batch_size=self.options.batch_size)
        return [self.runtime.tokenizer.decode(tokens) for tokens in found]


def _best(scores: list[float], example: Example) -> int:
    if not all(math.isfinite(score) for score in scores):
        raise ValueError(
            f"the scores of example {example.index} are not finite ({scores}): the model's weights "
            "or its run time are broken; run `bitdistill doctor` and make the directory again"
        )
    return max(range(len(scores)), key=lambda label: scores[label])
