"""Tables, made from results alone, laid out as in the paper (arXiv 2510.13998, Tables 1 and 2).

    render(results, "markdown" | "csv" | "json" | "latex")    text
    render(results, seeds=True)                               means over training seeds

Rows are methods; columns are tasks, then speed and memory, ratios to the reference row first.
Classification and summarisation make a table each. Artifacts of one method for different tasks
share a row, whose speed, memory and size are those of the first of them. Units stand in the
headers; what was not measured is a dash (an empty cell in CSV, null in JSON).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from bitdistill.evals.results import Result
from bitdistill.names import suggest

MISSING = "–"
CLASSIFICATION, SUMMARISATION = "Classification", "Summarisation"
TASK_METRICS = {
    "accuracy": "Accuracy",
    "bleu": "BLEU",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "rougeLsum": "ROUGE-Lsum",
    "agreement": "Agreement",
    "ece": "ECE",
    "perplexity": "Perplexity",
}
SECONDARY = ("ece", "perplexity")  # in CSV, JSON and the report; in a table where nothing else is
MACHINE_METRICS = {
    "prefill_speed": "Prefill",
    "decode_speed": "Decode",
    "first_token": "First token",
    "token_p50": "Token p50",
    "token_p95": "Token p95",
    "memory": "Memory",
    "size_on_disk": "Size",
}
RATIOS = {
    "prefill_speed": "prefill_ratio",
    "decode_speed": "decode_ratio",
    "memory": "memory_ratio",
    "size_on_disk": "size_ratio",
}
UNITS = {"tokens/s": "tok/s"}
DECIMALS = {"%": 2, "tokens/s": 0, "MiB": 1, "ms": 1, "": 3}
Column = tuple[str, str, str]  # task, split, metric; task and split "" for speed and size
Key = tuple[object, ...]


@dataclass(frozen=True)
class Grid:
    """A table as text, for people: the first `names` columns say what a row is."""

    title: str
    names: int
    header: list[str]
    rows: list[list[str]]


@dataclass
class Row:
    """One method: identity, and results by column."""

    model: str
    method: str
    backend: str
    precision: str
    artifact: str
    seed: int | None = None
    variant: str = ""
    answers: str = ""
    run: int = 0
    cells: dict[Column, Result] = field(default_factory=dict)

    @property
    def key(self) -> Key:
        own = self.model, self.method, self.backend, self.precision
        return *own, self.seed, self.variant, self.answers, self.run

    @property
    def name(self) -> str:
        return self.artifact.rpartition("/")[2]  # without its parents

    def takes(self, other: Row) -> bool:
        """Whether another row is the same method on other tasks."""
        mine, theirs = ({c for c in row.cells if c[0]} for row in (self, other))
        return self.key == other.key and bool(mine and theirs) and not mine & theirs


@dataclass
class Table:
    """Rows in order of first appearance; columns by task and split, then speed and memory."""

    title: str
    rows: list[Row]
    columns: list[Column]

    @property
    def identity(self) -> list[str]:
        """The columns that tell rows apart: method and backend, and what else differs."""
        names = ["method", "backend"]
        if len({row.model for row in self.rows}) > 1:
            names.insert(0, "model")
        if len({row.answers for row in self.rows}) > 1:  # not to be compared
            names.append("answers")
        for name in ("precision", "variant", "seed", "artifact"):
            if self._apart([*names, name]) > self._apart(names):
                names.append(name)
        return names

    def _apart(self, names: Sequence[str]) -> int:
        return len({tuple(getattr(row, name) for name in names) for row in self.rows})

    def header(self, column: Column) -> str:
        """Name and unit of a column, with task and split where there are several."""
        task, split, metric = column
        tasks = {name for name, _, _ in self.columns if name}
        splits = {other for name, other, _ in self.columns if name == task}
        words = [task] if task and max(len(tasks), len(splits)) > 1 else []
        words += [split.removeprefix("validation_")] if len(splits) > 1 else []
        words.append((TASK_METRICS | MACHINE_METRICS)[metric])
        unit = next(row.cells[column].unit for row in self.rows if column in row.cells)
        unit = UNITS.get(unit, unit)
        return " ".join(words) + (f" ({unit})" if unit else "")

    def ratio(self, row: Row, column: Column) -> Result | None:
        """How a figure compares with the reference row's; None where it is to another's row."""
        place = ("", "", RATIOS.get(column[2], ""))
        found = row.cells.get(place)
        shown = [_against(self._reference.cells.get(place)), _against(found)]
        return found if None not in shown and shown[0] == shown[1] else None

    @property
    def _reference(self) -> Row:
        """The teacher in PyTorch, or the first row, as in summary.py."""
        usual = (row for row in self.rows if (row.method, row.backend) == ("fp16-sft", "torch"))
        return next(usual, self.rows[0])


def _against(ratio: Result | None) -> str | None:
    """The hash of what a ratio is to."""
    return ratio.details.get("against", {}).get("artifact_hash") if ratio else None


def build(results: Iterable[Result], *, complete: bool = False) -> list[Table]:
    """Arrange results, in a table for each kind of task; of two for one cell the later wins.

    `complete` also takes columns that the paper's tables leave out. ValueError for no results.
    """
    rows: list[Row] = []
    for row in _by_artifact(results):
        fitting = [other for other in rows if other.takes(row)]
        if not fitting:
            rows.append(row)
            continue
        same = min(fitting, key=lambda other: other.name != row.name)  # of several exports
        same.cells |= {c: r for c, r in row.cells.items() if c not in same.cells}
    if not rows:
        raise ValueError("there are no results to show; run `bitdistill eval` first")
    columns = _columns(rows)
    summaries = {c[:2] for c in columns if c[2] == "bleu" or c[2].startswith("rouge")}
    tables = []
    for title in (CLASSIFICATION, SUMMARISATION):
        own = [c for c in columns if c[0] and (c[:2] in summaries) == (title == SUMMARISATION)]
        shown = own if complete else _primary(own)
        if shown:
            machine = [c for c in columns if not c[0] and (complete or c[2] in RATIOS)]
            chosen = [row for row in rows if set(own) & set(row.cells) or not _has_tasks(row)]
            tables.append(Table(title, chosen, [*shown, *_present(machine, chosen)]))
    return tables or [Table("Speed", rows, columns)]


def _has_tasks(row: Row) -> bool:
    return any(column[0] for column in row.cells)


def _present(columns: Sequence[Column], rows: Sequence[Row]) -> list[Column]:
    return [column for column in columns if any(column in row.cells for row in rows)]


def _primary(columns: Sequence[Column]) -> list[Column]:
    primary = [column for column in columns if column[2] not in SECONDARY]
    return primary or list(columns)


def _by_artifact(results: Iterable[Result]) -> list[Row]:
    """A row for each artifact; `run` counts the students that one seed gave for a task."""
    rows: dict[tuple[str, ...], Row] = {}
    students: dict[Key, dict[str | None, int]] = {}
    for r in results:
        trained = students.setdefault((r.model, r.method, r.seed, r.variant, r.asked), {})
        run = trained.setdefault(r.student, len(trained))
        key = (r.model, r.method, r.backend, r.precision, r.artifact_hash, r.answers)
        own = (*key[:4], r.artifact, r.seed, r.variant, r.answers, run)
        row = rows.setdefault(key, Row(*own))
        if r.metric in TASK_METRICS:
            row.cells[(r.asked, r.split, r.metric)] = r
        elif r.metric in MACHINE_METRICS or r.metric in RATIOS.values():
            row.cells[("", "", r.metric)] = r
    return list(rows.values())


def _columns(rows: Sequence[Row]) -> list[Column]:
    """Columns that have a figure: tasks and splits as they come, metrics in the paper's order."""
    found = dict.fromkeys(column for row in rows for column in row.cells)
    places = {metric: place for place, metric in enumerate((*TASK_METRICS, *MACHINE_METRICS))}
    parts = list(dict.fromkeys(column[:2] for column in found if column[0]))
    columns = [column for column in found if column[2] in places]
    return sorted(columns, key=lambda c: (parts.index(c[:2]) if c[0] else len(parts), places[c[2]]))


def _common_n(table: Table, column: Column) -> int | None:
    """The n that all rows of a task metric share, or None where they differ."""
    counts = {row.cells[column].n for row in table.rows if column in row.cells}
    return counts.pop() if column[0] and len(counts) == 1 else None


def _cell(table: Table, row: Row, column: Column, common_n: int | None) -> str:
    result = row.cells.get(column)
    if result is None:
        return MISSING
    decimals = DECIMALS.get(result.unit, 2)
    text = f"{result.value:,.{decimals}f}"
    if result.stderr is not None and result.metric != "agreement":
        text += f" ± {result.stderr:.{decimals}f}"
    if column[0]:
        return text if result.n == common_n else f"{text} (n={result.n:,})"
    ratio = table.ratio(row, column)
    return text if ratio is None else f"{ratio.value:.2f}× ({text})"


def grid(table: Table) -> Grid:
    """Header and rows as text, named by the tasks and splits it is of."""
    header = [name.capitalize() for name in table.identity]
    counts = {column: _common_n(table, column) for column in table.columns}
    for column, n in counts.items():
        text = table.header(column)
        if any(table.ratio(row, column) for row in table.rows):
            text = text.replace(" (", " (×, ")
        if n is not None:
            count = f"n={n:,})"
            text = f"{text[:-1]}, {count}" if text.endswith(")") else f"{text} ({count}"
        header.append(text)
    rows = [
        [str(getattr(row, name)) for name in table.identity]
        + [_cell(table, row, column, n) for column, n in counts.items()]
        for row in table.rows
    ]
    parts = dict.fromkeys(f"{task} ({split})" for task, split, _ in table.columns if task)
    return Grid(", ".join(parts), len(table.identity), header, rows)


def grids(results: Sequence[Result], *, seeds: bool = False) -> list[Grid]:
    """The tables for people; `seeds`: one over training seeds instead (seeds.py)."""
    from bitdistill.evals.seeds import seed_grid

    return [seed_grid(results)] if seeds else [grid(table) for table in build(results)]


def render(results: Sequence[Result], format: str = "markdown", *, seeds: bool = False) -> str:
    """The tables as text in one of FORMATS; ValueError for another format or no results."""
    from bitdistill.evals.formats import FORMATS

    if format not in FORMATS:
        raise ValueError(f"unknown format {format!r}{suggest(format, FORMATS)}")
    return FORMATS[format](results, seeds)
