"""Tasks: the prompt, the answers and the columns, said once and used by training and evaluation.

A task is stored in the manifest of every student and artifact trained for it, so evaluation never
guesses a prompt again. The prompts of the GLUE tasks are those of lm-evaluation-harness.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bitdistill.names import suggest

Kind = Literal["label", "summary"]
LOCAL_FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


@dataclass(frozen=True)
class Task:
    """A label task (`labels[i]` is the answer for label id i) or a summarisation task.

    `prompt` is a `str.format` template over `columns`; `target` names the label or summary column.
    `hub` is the data set on the hub: (path, configuration or None).
    """

    name: str
    kind: Kind
    prompt: str
    columns: tuple[str, ...]
    target: str
    labels: tuple[str, ...] = ()
    max_new_tokens: int = 1
    hub: tuple[str, str | None] | None = None
    splits: tuple[str, str] = ("train", "validation")

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, for manifests."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Task:
        """The inverse of `to_json`, through JSON text or not."""
        fields: dict[str, Any] = dict(value)
        for key in ("columns", "labels", "splits", "hub"):
            if fields.get(key) is not None:
                fields[key] = tuple(fields[key])
        return cls(**fields)


@dataclass(frozen=True)
class Example:
    """One example: prompt and answer texts; `label` is the label id of a label task."""

    index: int
    prompt: str
    answer: str
    label: int | None


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
            splits=("train", "validation_matched"),
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


def get_task(name: str) -> Task:
    """A built-in task; ValueError with a suggestion for an unknown name."""
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}{suggest(name, TASKS)}")
    return TASKS[name]


def _read_rows(task: Task, source: str | Path | None, split: str, streaming: bool) -> Any:
    """Rows of a local file, of the hub's data set, or of the embedded generator."""
    if source is None and task.name == "tiny":
        from bitdistill.tiny import make_reviews

        return make_reviews(split)
    from datasets import load_dataset

    if source is None:
        if task.hub is None:
            raise ValueError(f"task {task.name!r} has no hub data set; give a data file")
        path, configuration = task.hub
        try:
            return load_dataset(path, configuration, split=split, streaming=streaming)
        except (OSError, ConnectionError) as error:
            raise ValueError(
                f"data set {path} cannot be had ({type(error).__name__}); check the network, or "
                "give a local file of the same columns"
            ) from error
    file = Path(source)
    if not file.is_file():
        raise FileNotFoundError(f"data file {file} does not exist; check the path")
    if file.suffix not in LOCAL_FORMATS:
        raise ValueError(f"{file}: unknown format; use {', '.join(LOCAL_FORMATS)}")
    if file.stat().st_size == 0:
        raise ValueError(f"{file} is empty; give a file with at least one example")
    return load_dataset(
        LOCAL_FORMATS[file.suffix], data_files=str(file), split="train", streaming=streaming
    )


def load_examples(
    task: Task,
    source: str | Path | None = None,
    split: str | None = None,
    limit: int | None = None,
    columns: dict[str, str] | None = None,
) -> list[Example]:
    """Examples of a task from a local file, or from its hub data set where `source` is None.

    `columns` maps the task's column names to the file's (`{"sentence": "review"}`). Labels may be
    ids or the answers' words. Raises ValueError for a missing column, an unknown label or no data.
    """
    columns = columns or {}
    split = split or task.splits[1]
    examples: list[Example] = []
    for index, row in enumerate(_read_rows(task, source, split, streaming=limit is not None)):
        if limit is not None and index >= limit:
            break
        examples.append(_example(task, index, row, columns))
    if not examples:
        raise ValueError(f"{source or task.name} ({split}) holds no examples")
    return examples


def _example(task: Task, index: int, row: dict[str, Any], columns: dict[str, str]) -> Example:
    values = {}
    for column in (*task.columns, task.target):
        name = columns.get(column, column)
        if name not in row:
            raise ValueError(
                f"column {name!r} is missing{suggest(name, row)}; the data has "
                f"{', '.join(row)}; map it with columns.{column}"
            )
        values[column] = row[name]
    prompt = task.prompt.format(**{c: str(values[c]).strip() for c in task.columns})
    if task.kind == "summary":
        return Example(index, prompt, " " + str(values[task.target]).strip(), None)
    label = _label(task, index, values[task.target])
    return Example(index, prompt, task.labels[label], label)


def _label(task: Task, index: int, value: Any) -> int:
    words = [label.strip().lower() for label in task.labels]
    if isinstance(value, str):
        text = value.strip().lower()
        if text in words:
            return words.index(text)
        value = int(text) if text.lstrip("-").isdigit() else -1
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < len(words):
        raise ValueError(
            f"example {index} has label {value!r}, task {task.name!r} has "
            f"0..{len(words) - 1} ({', '.join(words)}); fix the data or map the label column"
        )
    return value
