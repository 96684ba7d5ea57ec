"""Tasks: the prompt, the answers and the columns, said once and used by training and evaluation.

A task is stored in the manifest of every student and artifact trained for it, so evaluation never
guesses a prompt again. The prompts of the GLUE tasks are those of lm-evaluation-harness.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Any, Literal

from bitdistill.names import suggest
from bitdistill.sources import Row, file_rows, hub_rows

Kind = Literal["label", "summary"]


@dataclass(frozen=True)
class Task:
    """A label task (`labels[i]` is the answer for label id i) or a summarisation task.

    `prompt` is a `str.format` template over `columns`; `target` names the label or summary column.
    `hub` is the data set on the hub: (path, configuration or None). `splits` are that for training
    and one or more to evaluate on. `metrics` are those to report (none: the kind's usual ones).
    `version` goes up when prompt, answers or columns change, so that figures are not mixed up.
    """

    name: str
    kind: Kind
    prompt: str
    columns: tuple[str, ...]
    target: str
    labels: tuple[str, ...] = ()
    max_new_tokens: int = 1
    hub: tuple[str, str | None] | None = None
    splits: tuple[str, ...] = ("train", "validation")
    metrics: tuple[str, ...] = ()
    version: int = 1

    def __post_init__(self) -> None:
        try:
            fields = {name for _, name, _, _ in Formatter().parse(self.prompt) if name is not None}
        except ValueError as error:
            raise ValueError(f"prompt is not a template: {error}; write {{{{ for a brace") from None
        if not fields or not fields <= set(self.columns):
            raise ValueError(
                f"prompt has the fields {sorted(fields)}, the inputs are {list(self.columns)}; "
                "each field must be one of the inputs"
            )
        try:
            self.fill([""] * len(self.columns))
        except (ValueError, LookupError) as error:  # {text!z}, {text:d}, {text:{width}}
            raise ValueError(
                f"prompt {self.prompt!r} cannot be filled in with texts ({error}); write the "
                "inputs as {name}"
            ) from None

    @property
    def evaluation_splits(self) -> tuple[str, ...]:
        """The splits a model is evaluated on; the first is the one that training validates on."""
        return self.splits[1:]

    @property
    def suffix(self) -> str:
        """The template's words after its last column, which a shortened prompt keeps."""
        *_, (literal, field, *_) = Formatter().parse(self.prompt)
        return literal if field is None else ""

    def fill(self, inputs: Sequence[str]) -> str:
        """The prompt of an example, from the texts of its columns."""
        return self.prompt.format(**dict(zip(self.columns, inputs, strict=True)))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, for manifests."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Task:
        """The inverse of `to_json`, through JSON text or not."""
        fields: dict[str, Any] = dict(value)
        for key in ("columns", "labels", "splits", "hub", "metrics"):
            if fields.get(key) is not None:
                fields[key] = tuple(fields[key])
        return cls(**fields)


@dataclass(frozen=True)
class Example:
    """One example: prompt and answer texts; `label` is the label id of a label task.

    `inputs` are the texts of the task's columns, which the prompt was made of.
    """

    index: int
    prompt: str
    answer: str
    label: int | None
    inputs: tuple[str, ...] = ()


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            "sst2",
            "label",
            "{sentence}\nQuestion: Is this sentence positive or negative?\nAnswer:",
            ("sentence",),
            "label",
            (" negative", " positive"),
            hub=("nyu-mll/glue", "sst2"),
        ),
        Task(
            "qnli",
            "label",
            "{question}\n{sentence}\nQuestion: Does this response answer the question?\nAnswer:",
            ("question", "sentence"),
            "label",
            (" yes", " no"),
            hub=("nyu-mll/glue", "qnli"),
        ),
        Task(
            "mnli",
            "label",
            "{premise}\nQuestion: {hypothesis}. True, False or Neither?\nAnswer:",
            ("premise", "hypothesis"),
            "label",
            (" True", " Neither", " False"),
            hub=("nyu-mll/glue", "mnli"),
            splits=("train", "validation_matched", "validation_mismatched"),
        ),
        Task(
            "cnn_dailymail",
            "summary",
            "{article}\n\nSummary:",
            ("article",),
            "highlights",
            max_new_tokens=128,
            hub=("abisee/cnn_dailymail", "3.0.0"),
        ),
        Task(
            "tiny",
            "label",
            "{sentence}\nVerdict:",
            ("sentence",),
            "label",
            (" bad", " good"),
            hub=None,
        ),
    )
}


def shorten(prompt: list[int], suffix: Sequence[int], room: int) -> list[int]:
    """A prompt in at most `room` tokens: its text loses its end, the `suffix` after it stays.

    An article keeps its lead, and a question that follows a text stays whole.
    """
    if len(prompt) <= room:
        return prompt
    kept = min(len(suffix), room)
    return prompt[: room - kept] + prompt[len(prompt) - kept :]


def check_beginnings(task: Task, answers: Sequence[Sequence[int]]) -> None:
    """ValueError where the tokens of one answer of a label task begin another's.

    The longer one is never the likelier, and nothing teaches a model where the shorter one ends.
    """
    in_order = sorted((list(ids), label) for ids, label in zip(answers, task.labels, strict=True))
    for (short, first), (long, second) in itertools.pairwise(in_order):
        if long[: len(short)] == short:
            raise ValueError(
                f"the tokens of answer {first!r} of task {task.name!r} begin those of {second!r}, "
                "which can then never be the likelier one; choose other answer words (01, 02, ... "
                "for numbers)"
            )


def get_task(name: str) -> Task:
    """A built-in task; ValueError with a suggestion for an unknown name."""
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}{suggest(name, TASKS)}")
    return TASKS[name]


def _read_rows(task: Task, source: str | Path | None, split: str, streaming: bool) -> Iterable[Row]:
    """Rows of a local file, of the hub's data set, or of the embedded generator."""
    if source is not None:
        return file_rows(source, streaming=streaming)
    if task.name == "tiny":
        from bitdistill.tiny import make_reviews

        return make_reviews(split)
    if task.hub is None:
        raise ValueError(f"task {task.name!r} has no hub data set; give a data file")
    return hub_rows(*task.hub, split, streaming=streaming)


def load_examples(
    task: Task,
    source: str | Path | None = None,
    split: str | None = None,
    limit: int | None = None,
    columns: dict[str, str] | None = None,
    remedy: str = "--set task.columns.{}=NAME, its name in the data",
) -> list[Example]:
    """Examples of a task from a local file, or from its hub data set where `source` is None.

    `columns` maps the task's column names to the file's (`{"sentence": "review"}`). Labels may be
    ids or the answers' words. Raises ValueError for a missing column or value, an unknown label,
    no data, or a map of a column that the task does not have. `remedy` is what the caller's user
    maps a column with.
    """
    columns = columns or {}
    known = (*task.columns, task.target)
    for name in columns:
        if name not in known:
            raise ValueError(f"task {task.name!r} has no column {name!r}{suggest(name, known)}")
    split = split or task.splits[1]
    examples: list[Example] = []
    for index, row in enumerate(_read_rows(task, source, split, streaming=limit is not None)):
        if limit is not None and index >= limit:
            break
        examples.append(_example(task, index, row, columns, remedy))
    if not examples:
        raise ValueError(f"{source or task.name} ({split}) holds no examples")
    return examples


def some_of(examples: list[Example], limit: int | None, seed: int) -> list[Example]:
    """All of them, or a seeded random part of `limit` examples."""
    if limit is None or limit >= len(examples):
        return examples
    return random.Random(seed).sample(examples, limit)


def _example(task: Task, index: int, row: Row, columns: dict[str, str], remedy: str) -> Example:
    values = {}
    for column in (*task.columns, task.target):
        name = columns.get(column, column)
        if name not in row:
            raise ValueError(
                f"column {name!r} is missing; the data has {', '.join(row)}; map it with "
                f"{remedy.format(column)}"
            )
        value = row[name]
        if value is None or (value == "" and column == task.target and task.kind == "summary"):
            raise ValueError(f"example {index} has no value in column {name!r}; fix the data")
        if isinstance(value, bytes | list | dict):
            raise ValueError(
                f"example {index} has a {type(value).__name__} in column {name!r}, not text; map "
                "another column, or write the text into the data"
            )
        values[column] = value
    inputs = tuple(str(values[c]).strip() for c in task.columns)
    prompt = task.fill(inputs)
    if task.kind == "summary":
        return Example(index, prompt, " " + str(values[task.target]).strip(), None, inputs)
    label = _label(task, index, values[task.target])
    return Example(index, prompt, task.labels[label], label, inputs)


def _label(task: Task, index: int, value: Any) -> int:
    """The label id of a word or number, as files hold them: "Positive", 1, 1.0, "1".

    Where the answers are numbers themselves, a number is one of them and never an id.
    """
    words = [label.strip().lower() for label in task.labels]
    text = str(value).strip().lower()  # True and False are booleans in many files
    if text in words:
        return words.index(text)
    number, numbers = _number(text), [_number(word) for word in words]
    if number is not None and number in numbers:  # a column with gaps has become one of floats
        return numbers.index(number)
    ids = range(0 if any(n is not None for n in numbers) else len(words))
    if number is None or number not in ids:
        raise ValueError(
            f"example {index} has label {value!r}, task {task.name!r} has "
            f"{f'0..{len(words) - 1} ' if ids else ''}({', '.join(words)}); fix the data or map "
            "the label column"
        )
    return int(number)


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
