"""The examples of a run, read once for all rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from bitdistill import manifest
from bitdistill.evals.directories import Directory, recorded_data
from bitdistill.tasks import Example, Task, load_examples

REMEDY = "--column {}=NAME, its name in the data"  # for a column that is missing


@dataclass(frozen=True)
class ExampleSet:
    """The examples of one split."""

    split: str
    examples: list[Example]

    @cached_property
    def fingerprint(self) -> str:
        """A hash of what is asked and what is right."""
        return manifest.fingerprint([[e.prompt, e.answer] for e in self.examples])


def read_sets(
    directories: Sequence[Directory],
    task: Task,
    data: str | Path | Sequence[str | Path] | None,
    split: str | Sequence[str] | None,
    limit: int | None,
    columns: dict[str, str] | None,
) -> list[ExampleSet]:
    """The examples of every split; ValueError where two would have one name."""
    files = [data] if isinstance(data, str | Path) else list(data or ())
    splits = [split] if isinstance(split, str) else list(split or ())
    if not files and not splits:
        recorded, mapping = recorded_data(directories, task)
        if recorded is not None and not Path(recorded).exists():
            raise FileNotFoundError(
                f"data file {recorded} does not exist here; training recorded it as the validation "
                "file, give it with --data"
            )
        files = [] if recorded is None else [recorded]
        columns = mapping if columns is None else columns
    if files and splits and len(files) != len(splits):
        raise ValueError(
            f"{len(splits)} splits for {len(files)} data files; name each file's split, or none"
        )
    names = splits or ([Path(f).stem for f in files] if files else list(task.evaluation_splits))
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None and files:
        raise ValueError(f"two data sets are called {twice!r}; name their splits with --split")
    if twice is not None:
        raise ValueError(f"split {twice!r} is given twice; give each split once")
    sources: list[str | Path | None] = [*files] or [None] * len(names)
    return [
        ExampleSet(name, load_examples(task, source, name, limit, columns, REMEDY))
        for name, source in zip(names, sources, strict=True)
    ]
