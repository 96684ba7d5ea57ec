"""Pictures of results: accuracy against memory and training tokens, speed against memory.

Made from results alone. Colours are Okabe and Ito's, told apart with colour vision deficiencies;
every row also has a marker and its name beside it, so the pictures hold in black and white print.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bitdistill.evals.results import Result
from bitdistill.evals.tables import Column, Row, Table, build

OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX*"
SIZE_INCHES = (5.2, 3.6)
DOTS_PER_INCH = 300
SPEEDS = ("decode_speed", "prefill_speed")
STYLE: Any = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
         "svg.fonttype": "path", "svg.hashsalt": "bitdistill", "axes.grid": True,
         "grid.color": "#dddddd", "axes.axisbelow": True}  # fmt: skip


def plot(results: Sequence[Result], prefix: str | Path) -> list[Path]:
    """Write PREFIX-accuracy-1.png and .svg, ... for each task column and PREFIX-speed-*; the paths.

    ImportError with the pip command where matplotlib is missing; ValueError where no result can be
    drawn.
    """
    return save_all(figures(results), prefix)


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
    with matplotlib.rc_context(STYLE):
        for table in build(results):
            memory = _memory_column(table)
            if memory is None:
                continue
            scores = [c for c in table.columns if c[0] and c[2] != "agreement"]
            speeds = [c for c in table.columns if c[2] in SPEEDS]
            for column in [*scores, *speeds]:
                found[_name(column)] = _figure(table, column, memory)
        found |= _token_figures(results)
    if not found:
        raise ValueError(
            "there is nothing to draw: memory or size is missing; evaluate with --speed, or "
            "students of several lengths of training"
        )
    return found


def _token_figures(results: Sequence[Result]) -> dict[str, Any]:
    """Scores of PyTorch students against the tokens they were trained on, teachers as lines."""
    groups: dict[tuple[str, str, str], list[Result]] = {}
    for one in results:
        if one.settings.get("training_tokens") is not None and one.interval is not None:
            groups.setdefault((one.task, one.split, one.metric), []).append(one)
    return {
        "-".join((*key, "tokens")): _token_figure(group)
        for key, group in groups.items()
        if len({r.settings["training_tokens"] for r in group if r.student is not None}) > 1
    }


def _token_figure(group: Sequence[Result]) -> Any:
    """A line for each method, its points the mean of the seeds' runs of one length."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE_INCHES, layout="constrained")
    axes = figure.add_subplot()
    _logarithmic(axes, "x")
    for index, method in enumerate(dict.fromkeys(result.method for result in group)):
        own = [r for r in group if r.method == method]
        color, marker = OKABE_ITO[index % len(OKABE_ITO)], MARKERS[index % len(MARKERS)]
        if own[0].student is None:
            mean = sum(r.value for r in own) / len(own)
            axes.axhline(mean, color=color, linestyle="--", linewidth=1.2, label=method)
            continue
        lengths: dict[int, list[float]] = {}
        for r in own:
            lengths.setdefault(r.settings["training_tokens"], []).append(r.value)
        points = [(n, sum(v) / len(v)) for n, v in sorted(lengths.items())]
        tokens, means = zip(*points, strict=True)
        axes.plot(tokens, means, color=color, marker=marker, label=method)
        every = [(r.settings["training_tokens"], r.value) for r in own]
        tokens, values = zip(*every, strict=True)
        axes.scatter(tokens, values, color=color, marker=marker, s=8)
    unit = f" ({group[0].unit})" if group[0].unit else ""
    axes.set_xlabel("training tokens, stages 2 and 3")
    axes.set_ylabel(f"{group[0].task} {group[0].split}: {group[0].metric}{unit}")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2, frameon=False)
    return figure


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
            _draw(axes, row, index, column, memory)
    axes.set_xlabel(table.header(memory) + (" over a bare process" if "memory" in memory else ""))
    axes.set_ylabel(table.header(column))
    axes.margins(x=0.15, y=0.15)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2, frameon=False)
    return figure


def _logarithmic(axes: Any, which: str) -> None:
    """A logarithmic axis with plain numbers at 1, 2 and 5."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis = getattr(axes, f"{which}axis")
    getattr(axes, f"set_{which}scale")("log")
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:,.10g}"))
    axis.set_minor_formatter(NullFormatter())


def _draw(axes: Any, row: Row, index: int, column: Column, memory: Column) -> None:
    """One row's point, with its 95 % interval, or the range of its repeats."""
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
        label=label(row),
    )


def label(row: Row) -> str:
    """A row's name in a picture."""
    return f"{row.method}, {row.backend} {row.precision}".strip()


def _save(figure: Any, target: Any, form: str) -> None:
    metadata = {"Date": None} if form == "svg" else {}
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure.savefig(target, format=form, dpi=DOTS_PER_INCH, metadata=metadata)
