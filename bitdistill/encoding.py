"""Examples of a task as token ids, many at a time: the tokenizer's threads share them.

Special tokens come before a prompt and none before an answer. A long prompt is shortened
(`tasks.shorten`), not the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase as Tokenizer

from bitdistill.tasks import Example, Task, shorten

CHUNK = 4096  # texts tokenised together, whose encodings hold much besides the ids


@dataclass(frozen=True)
class Encoded:
    """One example as token ids; the last `answer` of them are learnt, from labels or teacher."""

    ids: list[int]
    answer: int
    labelled: bool = True


def encode_prompts(
    prompts: Sequence[str], task: Task, tokenizer: Tokenizer, rooms: Sequence[int]
) -> list[list[int]]:
    """The token ids of prompts, each shortened to at most its room."""
    suffix = tokenizer(task.suffix, add_special_tokens=False).input_ids
    ids = _ids(prompts, tokenizer, special=True)
    return [shorten(prompt, suffix, room) for prompt, room in zip(ids, rooms, strict=True)]


def encode_examples(
    examples: Sequence[Example], task: Task, tokenizer: Tokenizer, max_length: int
) -> list[Encoded]:
    """Prompts and answers as token ids.

    Summaries end with the end-of-text token, so that a model learns to stop.
    """
    distinct = list(dict.fromkeys(example.answer for example in examples))
    answers = dict(zip(distinct, _ids(distinct, tokenizer, special=False), strict=True))
    if task.kind == "summary" and tokenizer.eos_token_id is not None:
        answers = {text: [*ids, tokenizer.eos_token_id] for text, ids in answers.items()}
    chosen = [answers[example.answer][: max_length - 1] for example in examples]
    rooms = [max_length - len(answer) for answer in chosen]
    prompts = encode_prompts([e.prompt for e in examples], task, tokenizer, rooms)
    return [Encoded(p + a, len(a)) for p, a in zip(prompts, chosen, strict=True)]


def _ids(texts: Sequence[str], tokenizer: Tokenizer, *, special: bool) -> list[list[int]]:
    ids: list[list[int]] = []
    for start in range(0, len(texts), CHUNK):
        part = list(texts[start : start + CHUNK])
        encoded = tokenizer(part, add_special_tokens=special, return_attention_mask=False)
        ids += encoded.input_ids
    return ids
