"""What a run works on: the schema of its model, its task and its corpus."""

from __future__ import annotations

from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

from bitdistill.tasks import Task, get_task


class Section(BaseModel):
    """A part of the configuration; unknown keys are errors, and true is not the number 1."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _no_switches_for_numbers(cls, values: Any) -> Any:
        for name, value in values.items() if isinstance(values, dict) else ():
            if isinstance(value, bool) and name in cls.model_fields:
                kind = cls.model_fields[name].annotation
                kinds = get_args(kind) or (kind,)
                if bool not in kinds and {int, float}.intersection(kinds):
                    raise ValueError(f"{name} is a number; {str(value).lower()} is none")
        return values


class Model(Section):
    """The off-the-shelf model. `source`: a local directory, a hub id, or `tiny` (made on the spot).

    `gguf_file` names a GGUF file inside `source` that transformers can read.
    """

    source: str
    gguf_file: str | None = None
    revision: str | None = None
    licence: str | None = None


class TaskData(Section):
    """A built-in task by name, or a task of your own; and where its examples are.

    `train` and `validation` are local JSON lines, CSV or parquet files; without them the hub's
    data set is used. `columns` maps the task's column names to the file's. `metrics` are those that
    evaluation reports (none: accuracy, ECE and perplexity, or ROUGE and BLEU).
    """

    name: str
    train: str | None = None
    validation: str | None = None
    columns: dict[str, str] = {}
    limit_train: int | None = Field(None, gt=0)
    kind: Literal["label", "summary"] | None = None
    prompt: str | None = None
    inputs: list[str] = []
    target: str | None = None
    labels: list[str] = []
    max_new_tokens: int = Field(128, gt=0)
    metrics: list[str] = []
    version: int = Field(1, gt=0)

    @model_validator(mode="after")
    def _complete(self) -> TaskData:
        self.resolve()
        return self

    def resolve(self) -> Task:
        """The task; ValueError for an unknown name, or one that is changed, without a prompt."""
        if self.prompt is None:
            own = ("kind", "inputs", "target", "labels", "max_new_tokens", "metrics", "version")
            fields = type(self).model_fields
            given = [k for k in own if getattr(self, k) != fields[k].get_default()]
            task = get_task(self.name)
            if given:
                raise ValueError(
                    f"task {self.name!r} is built in, so {', '.join(given)} would have no effect; "
                    "leave that out, or give a prompt too and make it a task of your own"
                )
            return task
        if not self.inputs or not self.target or (self.kind != "summary" and not self.labels):
            raise ValueError("a task of your own needs prompt, inputs, target and (label) labels")
        if len({label.strip().lower() for label in self.labels}) < len(self.labels):
            raise ValueError(f"labels {self.labels} must differ in more than case and spaces")
        return Task(
            name=self.name,
            kind=self.kind or "label",
            prompt=self.prompt,
            columns=tuple(self.inputs),
            target=self.target,
            labels=tuple(self.labels),
            max_new_tokens=1 if self.labels else self.max_new_tokens,
            metrics=tuple(self.metrics),
            version=self.version,
        )


class Corpus(Section):
    """Text for continued pre-training.

    A source is a local file, a folder or pattern of files (`data/*.parquet`), a hub data set,
    `task` (the task's own prompts and answers) or `tiny` (the embedded generator). Documents are
    taken from the sources in turn; nothing is held in memory. `limit` documents are taken of each.
    With `shuffle`, every that many documents of a source change places, anew in each pass: for a
    file that is sorted in some way, as many as it holds. They are held in memory.
    `document_mask` keeps documents that share a sequence from seeing one another.
    """

    sources: list[str] = ["task"]
    column: str = "text"
    configuration: str | None = None
    split: str = "train"
    limit: int | None = Field(None, gt=0)
    shuffle: int = Field(0, ge=0)
    document_mask: bool = False
