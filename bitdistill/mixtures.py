"""New inputs for a task, made from parts of the old ones; the teacher says what they are.

A few thousand labelled examples are soon known by heart, and what a student then learns of its
teacher is what both say about them. Texts nearby, which nobody labelled, show more of the teacher
(Tang et al., arXiv 1903.12136; TinyBERT, arXiv 1909.10351): they need not be good sentences, only
be different, and about the same things.

Each mixture starts from one example and takes from another, chosen at random:

    swap      one whole column (of tasks that have several)
    splice    a column's beginning from one, its end from the other
    words     some words left out, some replaced by words of the other's

Documents to summarise are only spliced, between sentences (written.py).
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

from transformers import PreTrainedTokenizerBase as Tokenizer

from bitdistill.encoding import Encoded, encode_examples
from bitdistill.tasks import Example, Task

LEFT_OUT, REPLACED = 0.1, 0.1  # shares of a column's words
SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+")


class Mixtures:
    """`times` mixtures of every example for each epoch, encoded, without labels.

    A thread makes those of the next epoch while one is learnt: training does not wait for them.
    """

    def __init__(
        self,
        task: Task,
        examples: Sequence[Example],
        tokenizer: Tokenizer,
        max_length: int,
        times: int,
        seed: int = 0,
    ) -> None:
        if task.kind != "label":
            raise ValueError(f"task {task.name!r} has no labels to ask the teacher for; mixtures=0")
        self.task, self.examples, self.tokenizer = task, examples, tokenizer
        self.max_length, self.times, self.seed = max_length, times, seed
        self.count = times * len(examples)
        self._maker = ThreadPoolExecutor(1, "mixtures")
        self._made: dict[int, Future[list[Encoded]]] = {}

    def rows(self, epoch: int) -> list[Encoded]:
        """The mixtures of an epoch; the answer's place holds some answer, which is not learnt."""
        made = self._made.pop(epoch, None) or self._maker.submit(self._make, epoch)
        self._made = {epoch + 1: self._maker.submit(self._make, epoch + 1)}
        return made.result()

    def close(self) -> None:
        """Make no more; what is being made is made to its end, and forgotten."""
        self._maker.shutdown(wait=False, cancel_futures=True)

    def _make(self, epoch: int) -> list[Encoded]:
        mixed = []
        for copy in range(self.times):
            columns = mixtures(self.examples, f"{self.seed}-{epoch}-{copy}")
            mixed += [
                replace(example, prompt=self.task.fill(inputs), inputs=inputs)
                for example, inputs in zip(self.examples, columns, strict=True)
            ]
        rows = encode_examples(mixed, self.task, self.tokenizer, self.max_length)
        return [replace(row, labelled=False) for row in rows]


def mixtures(examples: Sequence[Example], seed: str) -> list[tuple[str, ...]]:
    """The columns' texts of one mixture for each example, a function of the seed alone."""
    chance = random.Random(seed)
    return [
        _mixture(example.inputs, chance.choice(examples).inputs, chance) for example in examples
    ]


def _mixture(
    mine: tuple[str, ...], other: tuple[str, ...], chance: random.Random
) -> tuple[str, ...]:
    columns = list(mine)
    if len(columns) > 1 and chance.random() < 0.5:
        swapped = chance.randrange(len(columns))
        columns[swapped] = other[swapped]
    changed = []
    for text, theirs in zip(columns, other, strict=True):
        words, source = text.split(), theirs.split()
        if chance.random() < 0.5:
            words = (
                words[: chance.randint(0, len(words))] + source[chance.randint(0, len(source)) :]
            )
        changed.append(" ".join(_changed_words(words, source, chance)) or text)
    return tuple(changed)


def _changed_words(words: list[str], source: list[str], chance: random.Random) -> list[str]:
    kept = []
    for word in words:
        luck = chance.random()
        if luck < LEFT_OUT:
            continue
        kept.append(chance.choice(source) if source and luck < LEFT_OUT + REPLACED else word)
    return kept


def splices(examples: Sequence[Example], seed: str) -> list[tuple[str, ...]]:
    """Each example's texts to the end of some sentence, then those of another from some sentence.

    A function of the seed alone.
    """
    chance = random.Random(seed)
    return [
        tuple(
            _splice(text, theirs, chance)
            for text, theirs in zip(example.inputs, chance.choice(examples).inputs, strict=True)
        )
        for example in examples
    ]


def _splice(mine: str, theirs: str, chance: random.Random) -> str:
    ends = [match.end() for match in SENTENCE.finditer(mine)] or [len(mine)]
    starts = [0, *(match.end() for match in SENTENCE.finditer(theirs))]
    return mine[: chance.choice(ends)].rstrip() + " " + theirs[chance.choice(starts) :]
