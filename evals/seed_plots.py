"""Pictures of methods over training seeds, and of the variants of an ablation.

A figure for each metric, a panel for each task and split: a row for each method (and variant), a
dot a run, a tick at their mean, the teacher's mean and the majority's share as lines. The rows and
their numbers are those of seeds.py; the thin line of a row is its interval there, drawn from the
mean of the teachers that it was paired with.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from textwrap import fill
from typing import Any

from bitdistill.evals.plots import MARKERS, OKABE_ITO, STYLE, require_matplotlib
from bitdistill.evals.results import Result
from bitdistill.evals.seeds import TEACHER, USUAL, SeedRow, seed_rows
from bitdistill.evals.tables import TASK_METRICS

WIDTH_INCHES, ROW_INCHES, PANEL_INCHES = 7.0, 0.34, 0.45
LETTERS_A_LINE = 44  # of a row's name
GREY = "#555555"


def seed_figures(results: Iterable[Result]) -> dict[str, Any]:
    """METRIC-seeds -> matplotlib figure; ValueError where no result has a task's metric."""
    matplotlib = require_matplotlib()
    by_metric: dict[str, list[SeedRow]] = {}
    for row in seed_rows(results):
        by_metric.setdefault(row.metric, []).append(row)
    with matplotlib.rc_context(STYLE):
        return {f"{metric}-seeds": _figure(rows) for metric, rows in by_metric.items()}


def _figure(rows: Sequence[SeedRow]) -> Any:
    from matplotlib.figure import Figure

    panels: dict[tuple[str, str], list[SeedRow]] = {}
    for row in rows:
        panels.setdefault((row.task, row.split), []).append(row)
    heights = [PANEL_INCHES + ROW_INCHES * len(own) for own in panels.values()]
    figure = Figure(figsize=(WIDTH_INCHES, sum(heights) + 0.7), layout="constrained")
    axes_of = figure.subplots(len(panels), height_ratios=heights, squeeze=False)[:, 0]
    names = list(dict.fromkeys(row.label for row in rows))  # a method looks alike in every panel
    for axes, own in zip(axes_of, panels.values(), strict=True):
        _panel(axes, own, names)
    first = rows[0].runs[0].result
    axes_of[-1].set_xlabel(TASK_METRICS[first.metric] + (f" ({first.unit})" if first.unit else ""))
    drawn = [axes.get_legend_handles_labels() for axes in axes_of]
    legend: dict[str, Any] = {}
    for pair in drawn:
        for handle, label in zip(*pair, strict=True):
            legend.setdefault(label, handle)
    figure.legend(
        legend.values(), legend.keys(), loc="outside lower center", ncols=3, frameon=False
    )
    return figure


def _panel(axes: Any, rows: Sequence[SeedRow], names: Sequence[str]) -> None:
    """One task and split; from top to bottom the rows as they come."""
    for place, row in enumerate(rows):
        index = names.index(row.label)
        if row.interval is not None and row.difference is not None:
            teacher = row.mean - row.difference
            ends = [teacher + end for end in row.interval]
            axes.plot(ends, [place, place], color=GREY, linewidth=0.8, zorder=1,
                      label="difference to the teacher, paired 95 %")  # fmt: skip
        values = [run.result.value for run in row.runs]
        axes.plot(values, [place] * len(values), linestyle="none", markerfacecolor="none",
                  marker=MARKERS[index % len(MARKERS)], color=OKABE_ITO[index % len(OKABE_ITO)],
                  markersize=6, markeredgewidth=1.4, label="a run")  # fmt: skip
        axes.plot([row.mean], [place], linestyle="none", marker="|", color="black", markersize=13,
                  markeredgewidth=1.4, label="mean")  # fmt: skip
        usual = row.backend == "torch" and row.precision in USUAL and not row.variant
        if row.method == TEACHER and usual:
            axes.axvline(row.mean, color="black", linestyle="--", linewidth=1, zorder=0,
                         label="teacher's mean")  # fmt: skip
    majority = next((row.majority for row in rows if row.majority is not None), None)
    if majority is not None:
        axes.axvline(majority, color=GREY, linestyle=":", linewidth=1.4, zorder=0,
                     label="most frequent label")  # fmt: skip
    axes.set_yticks(range(len(rows)), [fill(row.label, LETTERS_A_LINE) for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    counts = sorted({run.result.n for row in rows for run in row.runs})
    title = f"{rows[0].task}, {rows[0].split}, n={'/'.join(f'{n:,}' for n in counts)}"
    axes.set_title(title, fontsize=9, loc="left")
