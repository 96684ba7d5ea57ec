"""The tables for a terminal, by rich: narrow, and folded where they are still too wide."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from bitdistill.evals.results import Result
from bitdistill.evals.tables import Grid, grids


def rich_tables(results: Sequence[Result], *, seeds: bool = False) -> list[Table]:
    """The tables for a terminal (rich)."""
    return [_rich(shown) for shown in grids(results, seeds=seeds)]


def _rich(grid: Grid) -> Table:
    # narrow enough for a terminal of 80 columns; wider tables are folded, no digit is left out
    shown = Table(
        title=escape(grid.title),
        title_justify="left",
        box=SIMPLE_HEAD,
        show_edge=False,
        padding=0,
    )
    for index, name in enumerate(grid.header):
        justify: Literal["left", "right"] = "left" if index < grid.names else "right"
        narrow = name.replace(" (", "\n(").replace(", ", ",\n")
        shown.add_column(escape(narrow), justify=justify, overflow="fold")
    for row in grid.rows:
        cells = (cell.replace("× (", "×\n(").replace(" ± ", "\n± ") for cell in row)
        shown.add_row(*(escape(cell.replace(", ", "\n")) for cell in cells))
    return shown
