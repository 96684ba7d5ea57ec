"""The tables as Markdown, CSV, JSON and LaTeX."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from typing import Any

from bitdistill.evals.results import Result
from bitdistill.evals.seeds import seed_records
from bitdistill.evals.tables import RATIOS, Grid, Table, build, grids

LATEX = {
    "\\": r"\textbackslash{}",
    "±": r"$\pm$",
    "Δ": r"$\Delta$",
    "×": r"$\times$",
    "–": "--",
    **{symbol: f"\\{symbol}" for symbol in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
}


def markdown(results: Sequence[Result], seeds: bool) -> str:
    """Markdown tables; numbers are right-aligned."""
    return "\n".join(_markdown(grid) for grid in grids(results, seeds=seeds))


def _markdown(grid: Grid) -> str:
    rule = ["---"] * grid.names + ["---:"] * (len(grid.header) - grid.names)
    header, *body = (
        [cell.replace("|", "\\|") for cell in line] for line in (grid.header, *grid.rows)
    )
    return "".join(f"| {' | '.join(line)} |\n" for line in (header, rule, *body))


def _all_records(results: Sequence[Result], seeds: bool) -> list[dict[str, Any]]:
    """Rows of all tables; a method that is in two of them has a row in each."""
    if seeds:
        return seed_records(results)
    tables = build(results, complete=True)
    named = len(tables) > 1
    return [
        ({"table": table.title} if named else {}) | record
        for table in tables
        for record in _records(table)
    ]


def _records(table: Table) -> list[dict[str, Any]]:
    """Rows as numbers, for programs; a task metric brings stderr, n and a 95 % interval."""
    found = []
    for row in table.rows:
        record: dict[str, Any] = {
            name: getattr(row, name)
            for name in (
                "model",
                "method",
                "backend",
                "precision",
                "variant",
                "answers",
                "seed",
                "artifact",
            )
        }
        for column in table.columns:
            header, result = table.header(column), row.cells.get(column)
            record[header] = result.value if result else None
            if column[0]:
                low, high = (result.interval if result else None) or (None, None)
                record[f"{header} stderr"] = result.stderr if result else None
                record[f"{header} low"], record[f"{header} high"] = low, high
                record[f"{header} n"] = result.n if result else None
            elif column[2] in RATIOS:
                ratio = table.ratio(row, column)
                record[f"{header} ratio"] = ratio.value if ratio else None
        found.append(record)
    return found


def comma_separated(results: Sequence[Result], seeds: bool) -> str:
    """CSV with a header line."""
    rows = _all_records(results, seeds)
    stream = io.StringIO()
    names = dict.fromkeys(name for row in rows for name in row)
    writer = csv.DictWriter(stream, list(names), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def as_json(results: Sequence[Result], seeds: bool) -> str:
    """A JSON array, one object per row."""
    return json.dumps(_all_records(results, seeds), indent=2, ensure_ascii=False) + "\n"


def latex(results: Sequence[Result], seeds: bool) -> str:
    """LaTeX tabulars; they need the package booktabs."""
    return "\n".join(_latex(grid) for grid in grids(results, seeds=seeds))


def _latex(grid: Grid) -> str:
    align = "l" * grid.names + "r" * (len(grid.header) - grid.names)
    lines = [rf"\begin{{tabular}}{{{align}}}", r"\toprule", _latex_row(grid.header), r"\midrule"]
    lines += [_latex_row(row) for row in grid.rows]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def _latex_row(cells: Sequence[str]) -> str:
    escaped = ("".join(LATEX.get(letter, letter) for letter in cell) for cell in cells)
    return " & ".join(escaped) + r" \\"


FORMATS = {
    "markdown": markdown,
    "csv": comma_separated,
    "json": as_json,
    "latex": latex,
}
