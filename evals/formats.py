"""The tables as Markdown, CSV, JSON and LaTeX."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence
from typing import Any

from bitdistill.evals.results import Result
from bitdistill.evals.tables import Table, build, records, texts

LATEX = {
    "\\": r"\textbackslash{}",
    "±": r"$\pm$",
    "×": r"$\times$",
    "–": "--",
    **{symbol: f"\\{symbol}" for symbol in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
}


def markdown(results: Iterable[Result]) -> str:
    """Markdown tables; numbers are right-aligned."""
    return "\n".join(_markdown(table) for table in build(results))


def _markdown(table: Table) -> str:
    header, rows = texts(table)
    names = len(table.identity)
    rule = ["---"] * names + ["---:"] * (len(header) - names)
    lines = [header, rule, *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _all_records(results: Iterable[Result]) -> list[dict[str, Any]]:
    """Rows of all tables; a method that is in two of them has a row in each."""
    tables = build(results, complete=True)
    named = len(tables) > 1
    return [
        ({"table": table.title} if named else {}) | record
        for table in tables
        for record in records(table)
    ]


def comma_separated(results: Iterable[Result]) -> str:
    """CSV with a header line."""
    rows = _all_records(results)
    stream = io.StringIO()
    names = dict.fromkeys(name for row in rows for name in row)
    writer = csv.DictWriter(stream, list(names), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def as_json(results: Iterable[Result]) -> str:
    """A JSON array, one object per row."""
    return json.dumps(_all_records(results), indent=2, ensure_ascii=False) + "\n"


def latex(results: Iterable[Result]) -> str:
    """LaTeX tabulars; they need the package booktabs."""
    return "\n".join(_latex(table) for table in build(results))


def _latex(table: Table) -> str:
    header, rows = texts(table)
    names = len(table.identity)
    align = "l" * names + "r" * (len(header) - names)
    lines = [rf"\begin{{tabular}}{{{align}}}", r"\toprule", _latex_row(header), r"\midrule"]
    lines += [_latex_row(row) for row in rows]
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
