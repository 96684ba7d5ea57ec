"""Pictures of results: accuracy against memory and training tokens, speed against memory.

Made from results alone; rows in fp64, which only say what rounding changes, are left out. Means
over training seeds and variants of a recipe are in seed_plots.py. Colours are Okabe and Ito's, told
apart with colour vision deficiencies; every row also has a marker and its name beside it, so the
pictures hold in black and white print.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from bitdistill.evals.results import Result
from bitdistill.evals.seeds import EXACT, USUAL, Model, model_of
from bitdistill.evals.tables import TASK_METRICS, Column, Row, Table, build

OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX*"
SIZE_INCHES = (5.2, 3.6)
DOTS_PER_INCH = 300
SPEEDS = ("decode_speed", "prefill_speed")
CURVES = [metric for metric in TASK_METRICS if metric != "agreement"]
TICK_SHARE = 0.12  # of an axis, which a number beside it needs
ONE_LENGTH = 1.05  # counts of tokens within this factor are of one length of training
STYLE: Any = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
         "svg.fonttype": "path", "svg.hashsalt": "bitdistill", "axes.grid": True,
         "grid.color": "#dddddd", "axes.axisbelow": True, "text.parse_math": False}  # fmt: skip


def plot(results: Sequence[Result], prefix: str | Path, *, seeds: bool = False) -> list[Path]:
    """Write PREFIX-TASK-SPLIT-METRIC.png and .svg for each task column, PREFIX-decode_speed.*, ...,
    or with `seeds` PREFIX-METRIC-seeds.* (seed_plots.py); the paths.

    ImportError with the pip command where matplotlib is missing; ValueError where no result can be
    drawn.
    """
    from bitdistill.evals.seed_plots import seed_figures

    return save_all(seed_figures(results) if seeds else figures(results), prefix)


def save_all(named: dict[str, Any], prefix: str | Path) -> list[Path]:
    """Write every figure as PREFIX-NAME.png and .svg; the paths."""
    prefix = Path(prefix)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, figure in named.items():
        for suffix in ("png", "svg"):
            path = prefix.with_name(f"{prefix.name}-{name}.{suffix}")
            _save(figure, path, suffix)
            paths.append(path)
    return paths


def require_matplotlib() -> Any:
    """The package, or ImportError with the pip command."""
    try:
        import matplotlib
    except ImportError:
        raise ImportError("plots need matplotlib, which is not installed; run: pip install "
                          "'bitdistill[plot]'") from None  # fmt: skip
    return matplotlib


def svg(figure: Any) -> str:
    """A figure as an SVG element, without what comes before it."""
    stream = io.BytesIO()
    _save(figure, stream, "svg")
    text = stream.getvalue().decode()
    return text[text.index("<svg") :]


def figures(results: Sequence[Result]) -> dict[str, Any]:
    """Name -> matplotlib figure, for every figure that the results have data for."""
    matplotlib = require_matplotlib()
    found = {}
    results = [one for one in results if not one.precision.endswith(EXACT)]
    with matplotlib.rc_context(STYLE):
        tables = build(results)
        together = _together(tables)
        scores = [(t, c) for t in tables for c in t.columns if c[0] and c[2] != "agreement"]
        speeds = [(together, c) for c in together.columns if c[2] in SPEEDS]
        for table, column in [*scores, *speeds]:
            if (memory := _memory_column(table)) is not None:
                found[_name(column)] = _figure(table, column, memory)
        found |= _token_figures(results)
    if not found:
        raise ValueError(
            "there is nothing to draw: memory or size is missing; evaluate with --speed, or "
            "students of several lengths of training"
        )
    return found


def _together(tables: Sequence[Table]) -> Table:
    """The rows of all tables, each once: label and summary tasks share a picture of speed."""
    rows = {id(row): row for table in tables for row in table.rows}
    columns = dict.fromkeys(c for table in tables for c in table.columns if not c[0])
    return Table("Speed", list(rows.values()), list(columns))


def _token_figures(results: Sequence[Result]) -> dict[str, Any]:
    """Scores of PyTorch students against the tokens they were trained on, teachers as lines.

    Of a model that was evaluated twice, the last; none in another precision than it was trained.
    """
    groups: dict[tuple[str, str, str, str], dict[tuple[Model, str], Result]] = {}
    for one in results:
        trained = one.settings.get("training_tokens") is not None and one.precision in USUAL
        if trained and one.metric in CURVES:
            own = groups.setdefault((one.asked, one.split, one.metric, one.answers), {})
            own[model_of(one), one.variant] = one
    return {
        "-".join(filter(None, (*key, "tokens"))): _token_figure(list(models.values()))
        for key, models in groups.items()
        if any(len(_lengths(own)) > 1 for own in _by_method(models.values()).values())
    }


def _by_method(group: Iterable[Result]) -> dict[str, list[Result]]:
    """Students of each method, and of each variant of one."""
    found: dict[str, list[Result]] = {}
    for one in group:
        if one.student is not None:
            name = f"{one.method}: {one.variant}" if one.variant else one.method
            found.setdefault(name, []).append(one)
    return found


def _lengths(own: Sequence[Result]) -> dict[float, list[float]]:
    """Scores by length of training, the mean of counts that one length gives: seeds draw other
    examples, so theirs differ by less than ONE_LENGTH."""
    runs: list[list[Result]] = []
    for one in sorted(own, key=_tokens):
        if runs and _tokens(one) <= ONE_LENGTH * _tokens(runs[-1][0]):
            runs[-1].append(one)
        else:
            runs.append([one])
    return {fmean(map(_tokens, run)): [one.value for one in run] for run in runs}


def _tokens(one: Result) -> int:
    return int(one.settings["training_tokens"])


def _token_figure(group: Sequence[Result]) -> Any:
    """A line for each method and variant through its seeds' means at each length, a dot a seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE_INCHES, layout="constrained")
    axes = figure.add_subplot()
    by_method = _by_method(group)
    _mark_lengths(axes, sorted({n for own in by_method.values() for n in _lengths(own)}))
    teachers = [one.value for one in group if one.student is None]
    if teachers:
        label = dict.fromkeys(one.method for one in group if one.student is None)
        axes.axhline(fmean(teachers), color=OKABE_ITO[-1], linestyle="--", linewidth=1.2,
                     label=", ".join(label))  # fmt: skip
    for index, (method, own) in enumerate(by_method.items()):
        color, marker = OKABE_ITO[index % len(OKABE_ITO)], MARKERS[index % len(MARKERS)]
        lengths = _lengths(own)
        axes.plot(list(lengths), [fmean(values) for values in lengths.values()],
                  color=color, marker=marker, label=method)  # fmt: skip
        dots = [(tokens, value) for tokens, values in lengths.items() for value in values]
        tokens, values = zip(*dots, strict=True)
        axes.scatter(tokens, values, color=color, marker=marker, s=8)
    unit = f" ({group[0].unit})" if group[0].unit else ""
    axes.set_xlabel("training tokens, stages 2 and 3")
    axes.set_ylabel(f"{group[0].asked} {group[0].split}: {TASK_METRICS[group[0].metric]}{unit}")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2, frameon=False)
    return figure


def _mark_lengths(axes: Any, lengths: Sequence[float]) -> None:
    """A logarithmic axis with numbers at the lengths, but where they would be too near."""
    from matplotlib.ticker import NullLocator

    kept = [lengths[0]]
    for length in lengths:
        if math.log(length / kept[-1]) >= TICK_SHARE * math.log(lengths[-1] / lengths[0]):
            kept.append(length)
    axes.set_xscale("log")
    axes.set_xticks(kept, [compact(length) for length in kept])
    axes.xaxis.set_minor_locator(NullLocator())


def _name(column: Column) -> str:
    return "-".join(part for part in column if part)


def _memory_column(table: Table) -> Column | None:
    """Memory in use, or where it was not measured the size on disk."""
    for metric in ("memory", "size_on_disk"):
        if ("", "", metric) in table.columns:
            return ("", "", metric)
    return None


def _figure(table: Table, column: Column, memory: Column) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE_INCHES, layout="constrained")
    axes = figure.add_subplot()
    _logarithmic(axes, "x")
    if column[2] in SPEEDS:
        _logarithmic(axes, "y")
    for index, row in enumerate(table.rows):
        if column in row.cells and memory in row.cells:
            _draw(axes, table, index, column, memory)
    axes.set_xlabel(table.header(memory) + (" over a bare process" if "memory" in memory else ""))
    axes.set_ylabel(table.header(column))
    axes.margins(x=0.15, y=0.15)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2, frameon=False)
    return figure


def compact(value: float) -> str:
    """A count as 96M or 1.5B."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}"


def _logarithmic(axes: Any, which: str) -> None:
    """A logarithmic axis with plain numbers at 1, 2 and 5."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis = getattr(axes, f"{which}axis")
    getattr(axes, f"set_{which}scale")("log")
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:,.10g}"))
    axis.set_minor_formatter(NullFormatter())


def _draw(axes: Any, table: Table, index: int, column: Column, memory: Column) -> None:
    """One row's point, with its 95 % interval, or the range of its repeats."""
    row = table.rows[index]
    result = row.cells[column]
    low, high = result.interval or result.details.get("range") or (result.value, result.value)
    bars = [[max(0.0, result.value - low)], [max(0.0, high - result.value)]]
    axes.errorbar(
        row.cells[memory].value,
        result.value,
        yerr=bars,
        marker=MARKERS[index % len(MARKERS)],
        color=OKABE_ITO[index % len(OKABE_ITO)],
        markersize=8,
        markerfacecolor="none",
        markeredgewidth=1.6,
        elinewidth=0.8,
        capsize=3,
        linestyle="none",
        label=label(table, row),
    )


def label(table: Table, row: Row) -> str:
    """A row's name in a picture, with what else tells it from others in the table."""
    words = [row.method, f"{row.backend} {row.precision}".strip()]
    for name in table.identity:
        if name == "seed":
            words.append("" if row.seed is None else f"seed {row.seed}")
        elif name not in ("method", "backend", "precision"):
            words.append(getattr(row, name))
    return ", ".join(filter(None, words))


def _save(figure: Any, target: Any, form: str) -> None:
    metadata = {"Date": None} if form == "svg" else {}
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure.savefig(target, format=form, dpi=DOTS_PER_INCH, metadata=metadata)
