"""Tables, made from results alone: one row per evaluated directory, one column per metric.

    render(results, "markdown" | "csv" | "json")    text
    rich_table(results)                             for a terminal

Units stand in the headers; what was not measured is a dash (an empty cell in CSV, null in JSON).
CSV and JSON give numbers, with standard error and n in columns of their own.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from bitdistill.evals.results import Result
from bitdistill.names import suggest

if TYPE_CHECKING:
    from rich.table import Table as RichTable

MISSING = "–"
METRICS = {
    "accuracy": "Accuracy",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "rougeLsum": "ROUGE-Lsum",
    "bleu": "BLEU",
    "agreement": "Agreement",
    "prefill_speed": "Prefill",
    "decode_speed": "Decode",
    "peak_memory": "Memory",
    "size_on_disk": "Size",
}
TASK_METRICS = ("accuracy", "rouge1", "rouge2", "rougeL", "rougeLsum", "bleu", "agreement")
UNITS = {"tokens/s": "tok/s"}
DECIMALS = {"%": 2, "tokens/s": 0, "MiB": 1}
Key = tuple[str, str, str, str, str]


@dataclass
class Row:
    """One directory: identity, and results by (task, metric); task "" for speed and size."""

    model: str
    method: str
    backend: str
    artifact: str
    cells: dict[tuple[str, str], Result] = field(default_factory=dict)


@dataclass
class Table:
    """Rows in order of first appearance; columns (task, metric) in the order of METRICS."""

    rows: list[Row]
    columns: list[tuple[str, str]]

    @property
    def identity(self) -> list[str]:
        """The columns that tell rows apart: method and backend, and what else differs."""
        names = ["method", "backend"]
        if len({row.model for row in self.rows}) > 1:
            names.insert(0, "model")
        if len({tuple(getattr(row, n) for n in names) for row in self.rows}) < len(self.rows):
            names.append("artifact")
        return names

    def header(self, column: tuple[str, str]) -> str:
        """Name and unit of a column, with the task where there are several."""
        task, metric = column
        tasks = {name for name, _ in self.columns if name}
        unit = next(row.cells[column].unit for row in self.rows if column in row.cells)
        unit = UNITS.get(unit, unit)
        return f"{task + ' ' if len(tasks) > 1 and task else ''}{METRICS[metric]} ({unit})"


def build(results: Iterable[Result]) -> Table:
    """Arrange results; of two for one cell the later wins. ValueError when there are none."""
    rows: dict[Key, Row] = {}
    for r in results:
        key = (r.model, r.method, r.backend, r.artifact, r.artifact_hash)
        row = rows.setdefault(key, Row(r.model, r.method, r.backend, r.artifact))
        row.cells[(r.task if r.metric in TASK_METRICS else "", r.metric)] = r
    if not rows:
        raise ValueError("there are no results to show; run `bitdistill eval` first")
    found = dict.fromkeys(column for row in rows.values() for column in row.cells)
    order = {metric: place for place, metric in enumerate(METRICS)}
    tasks = list(dict.fromkeys(task for task, _ in found if task))
    columns = [column for column in found if column[1] in METRICS]
    columns.sort(key=lambda c: (tasks.index(c[0]) if c[0] else len(tasks), order[c[1]]))
    return Table(list(rows.values()), columns)


def _common_n(table: Table, column: tuple[str, str]) -> int | None:
    """The n that all rows of a task metric share, or None where they differ."""
    counts = {row.cells[column].n for row in table.rows if column in row.cells}
    return counts.pop() if column[0] and len(counts) == 1 else None


def _cell(result: Result | None, common_n: int | None) -> str:
    if result is None:
        return MISSING
    decimals = DECIMALS.get(result.unit, 2)
    text = f"{result.value:,.{decimals}f}"
    if result.stderr is not None and result.metric != "agreement":
        text += f" ± {result.stderr:.{decimals}f}"
    own_n = result.unit == "%" and result.n != common_n
    return f"{text} (n={result.n:,})" if own_n else text


def _texts(table: Table) -> tuple[list[str], list[list[str]]]:
    """Header and rows as text, for people."""
    header = [name.capitalize() for name in table.identity]
    counts = {column: _common_n(table, column) for column in table.columns}
    for column, n in counts.items():
        text = table.header(column)
        header.append(text if n is None else f"{text.removesuffix(')')}, n={n:,})")
    rows = [
        [str(getattr(row, name)) for name in table.identity]
        + [_cell(row.cells.get(column), n) for column, n in counts.items()]
        for row in table.rows
    ]
    return header, rows


def _records(table: Table) -> list[dict[str, Any]]:
    """Rows as numbers, for programs; each task metric brings its stderr and n."""
    records = []
    for row in table.rows:
        record: dict[str, Any] = {
            name: getattr(row, name) for name in ("model", "method", "backend", "artifact")
        }
        for column in table.columns:
            header, result = table.header(column), row.cells.get(column)
            record[header] = result.value if result else None
            if column[0]:
                record[f"{header} stderr"] = result.stderr if result else None
                record[f"{header} n"] = result.n if result else None
        records.append(record)
    return records


def markdown(results: Iterable[Result]) -> str:
    """A Markdown table; numbers are right-aligned."""
    table = build(results)
    header, rows = _texts(table)
    names = len(table.identity)
    rule = ["---"] * names + ["---:"] * (len(header) - names)
    lines = [header, rule, *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def comma_separated(results: Iterable[Result]) -> str:
    """CSV with a header line."""
    records = _records(build(results))
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return stream.getvalue()


def as_json(results: Iterable[Result]) -> str:
    """A JSON array, one object per row."""
    return json.dumps(_records(build(results)), indent=2, ensure_ascii=False) + "\n"


FORMATS = {"markdown": markdown, "csv": comma_separated, "json": as_json}


def render(results: Sequence[Result], format: str = "markdown") -> str:
    """The table as text in one of FORMATS; ValueError for another format or no results."""
    if format not in FORMATS:
        raise ValueError(f"unknown format {format!r}{suggest(format, FORMATS)}")
    return FORMATS[format](results)


def rich_table(results: Sequence[Result]) -> RichTable:
    """The table for a terminal (rich)."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table as RichTable

    table = build(results)
    header, rows = _texts(table)
    tasks = ", ".join(dict.fromkeys(f"{r.task} ({r.split})" for r in results))
    # narrow enough for a terminal of 80 columns
    shown = RichTable(
        title=tasks, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0)
    )
    for index, name in enumerate(header):
        justify: Literal["left", "right"] = "left" if index < len(table.identity) else "right"
        narrow = name.replace(" (", "\n(").replace(", n", ",\nn")
        shown.add_column(narrow, justify=justify, no_wrap=True)
    for row in rows:
        shown.add_row(*row)
    return shown
