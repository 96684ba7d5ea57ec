"""Predictions of a runtime on the examples of a task.

Label tasks are scored: the answer with the largest log-likelihood after the prompt wins, whatever
else the model might have said. Summaries are generated greedily, up to the task's
`max_new_tokens`. Prompt and answers are encoded as in training: special tokens before the prompt,
none before the answer.

Truncation, as in training too: a prompt longer than `max_length` (or the model's context), less
the room for the answer, loses the end of its text, never the words after it (`tasks.shorten`).
Truncated prompts are counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from bitdistill.tasks import Example, Task, shorten

if TYPE_CHECKING:
    from bitdistill.backends.base import Runtime

Progress = Callable[[int, int], None]
MIN_PROMPT = 1


@dataclass(frozen=True)
class Predictions:
    """One entry per example, in the examples' order.

    `labels` (label ids) and `scores` (log-likelihood of every answer) for a label task, `texts` for
    a summary task. `prompt_tokens` is the sum over examples, after truncation.
    """

    labels: list[int] = field(default_factory=list)
    scores: list[list[float]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    truncated: int = 0
    prompt_tokens: int = 0
    single_token_answers: bool | None = None


def predict(
    runtime: Runtime,
    task: Task,
    examples: Sequence[Example],
    *,
    max_length: int | None = None,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> Predictions:
    """Predict every example; `max_length` is in tokens, prompt and answer together.

    `progress(done, total)` is called as examples are finished. Raises ValueError when the answer
    leaves no room for a prompt, when two answers have the same tokens, or for scores that are not
    finite.
    """
    if task.kind == "label":
        return _labels(runtime, task, examples, max_length, batch_size, progress)
    return _summaries(runtime, task, examples, max_length, progress)


def encode_prompts(
    runtime: Runtime, task: Task, examples: Sequence[Example], room: int, max_length: int | None
) -> tuple[list[list[int]], int]:
    """Prompt ids that leave `room` tokens for the answer, and how many of them were truncated."""
    limit = runtime.context if max_length is None else min(max_length, runtime.context)
    budget = limit - room
    if budget < MIN_PROMPT:
        raise ValueError(
            f"an answer of up to {room} tokens leaves no room for a prompt in {limit} tokens; "
            "raise max_length, or lower max_new_tokens of the task"
        )
    prompts = [list(runtime.tokenizer.encode(e.prompt, special=True)) for e in examples]
    truncated = sum(len(prompt) > budget for prompt in prompts)
    suffix = runtime.tokenizer.encode(task.suffix, special=False)
    return [shorten(prompt, suffix, budget) for prompt in prompts], truncated


def encode_answers(runtime: Runtime, task: Task) -> list[list[int]]:
    """Token ids of every answer; ValueError when one is empty or two are the same."""
    answers = [list(runtime.tokenizer.encode(label, special=False)) for label in task.labels]
    if not all(answers) or len({tuple(answer) for answer in answers}) < len(answers):
        raise ValueError(
            f"the answers of task {task.name!r} ({', '.join(map(repr, task.labels))}) are not "
            f"distinct tokens in this model's vocabulary: {answers}; choose other answer words"
        )
    return answers


def _labels(
    runtime: Runtime,
    task: Task,
    examples: Sequence[Example],
    max_length: int | None,
    batch_size: int,
    progress: Progress | None,
) -> Predictions:
    answers = encode_answers(runtime, task)
    room = max(len(answer) for answer in answers)
    prompts, truncated = encode_prompts(runtime, task, examples, room, max_length)
    scores: list[list[float]] = [[] for _ in prompts]
    # Longest first: too large a batch fails at once, and one batch holds prompts of one length.
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    for start in range(0, len(order), batch_size):
        chunk = order[start : start + batch_size]
        requests = [(prompts[i], answer) for i in chunk for answer in answers]
        flat = runtime.score(requests, batch_size=batch_size)
        for position, i in enumerate(chunk):
            scores[i] = flat[position * len(answers) : (position + 1) * len(answers)]
        if progress is not None:
            progress(min(start + batch_size, len(order)), len(order))
    return Predictions(
        labels=[_best(row, examples[i]) for i, row in enumerate(scores)],
        scores=scores,
        truncated=truncated,
        prompt_tokens=sum(map(len, prompts)),
        single_token_answers=room == 1,
    )


def _best(scores: list[float], example: Example) -> int:
    if not all(math.isfinite(score) for score in scores):
        raise ValueError(
            f"the scores of example {example.index} are not finite ({scores}): the model's weights "
            "or its run time are broken; run `bitdistill doctor` and make the directory again"
        )
    return max(range(len(scores)), key=lambda label: scores[label])


def _summaries(
    runtime: Runtime,
    task: Task,
    examples: Sequence[Example],
    max_length: int | None,
    progress: Progress | None,
) -> Predictions:
    prompts, truncated = encode_prompts(runtime, task, examples, task.max_new_tokens, max_length)
    texts = []
    for done, prompt in enumerate(prompts, start=1):
        tokens = runtime.generate(prompt, max_new_tokens=task.max_new_tokens, temperature=0.0)
        texts.append(runtime.tokenizer.decode(list(tokens)).strip())
        if progress is not None:
            progress(done, len(prompts))
    return Predictions(texts=texts, truncated=truncated, prompt_tokens=sum(map(len, prompts)))
