"""Pictures of training runs: losses, weights before and after a stage, trits by layer.

Made from what a run writes beside its stages: log.jsonl (a line every ten steps) and weights.jsonl
(zeros and flips of every linear, histograms before and after each stage). Colours and files are as
in plots.py; the maps' colours (cividis) read alike with and without colour vision deficiencies.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bitdistill.evals.plots import (
    MARKERS,
    OKABE_ITO,
    STYLE,
    compact,
    require_matplotlib,
    save_all,
)

TERMS = ("ce", "logits", "prompt", "relations", "alignment")
LABELS = {
    "ce": "cross-entropy",
    "logits": "logits KL, weighted",
    "prompt": "prompt KL, weighted",
    "relations": "attention relations, weighted",
    "alignment": "alignment, weighted",
}
SHARES = {"zero_fraction": "zero trits", "flip_rate": "trits changed between records"}
REACH, THRESHOLD, NEAR = 3.0, 0.5, 0.1  # in units of the scale, as monitor.py counts
CIVIDIS = "cividis"
KEPT = {"log.jsonl": 60, "weights.jsonl": 10}  # records of a stage that keep_records keeps
DIGITS = 4
Record = dict[str, Any]


def plot_runs(runs: Sequence[str | Path], prefix: str | Path) -> list[Path]:
    """Write PREFIX-loss-STAGE.png and .svg of all runs together, and for each run
    PREFIX-RUN-weights-STAGE.* and PREFIX-RUN-layers-STAGE.*; the paths.

    FileNotFoundError for a directory without log.jsonl, ImportError with the pip command where
    matplotlib is missing.
    """
    return save_all(run_figures(runs), prefix)


def run_figures(runs: Sequence[str | Path]) -> dict[str, Any]:
    """Name -> matplotlib figure, for every figure that the runs have data for."""
    matplotlib = require_matplotlib()
    folders = {Path(run).as_posix(): Path(run) for run in runs}
    if len({folder.name for folder in folders.values()}) == len(folders):
        folders = {folder.name: folder for folder in folders.values()}
    logs = {name: read_records(folder / "log.jsonl") for name, folder in folders.items()}
    found = {}
    with matplotlib.rc_context(STYLE):
        for stage in _stages(record for log in logs.values() for record in log):
            found[f"loss-{stage}"] = _losses(logs, stage)
        for name, folder in folders.items():
            run, file = name.replace("/", "_"), folder / "weights.jsonl"
            records = read_records(file) if file.is_file() else []
            for stage in _stages(records):
                own = [record for record in records if record["stage"] == stage]
                histograms = [r for r in own if "histogram" in r]
                if len(histograms) > 1:
                    found[f"{run}-weights-{stage}"] = _histograms(histograms[0], histograms[-1])
                shares = [r for r in own if "zero_fraction" in r]
                if shares:
                    found[f"{run}-layers-{stage}"] = _layers(shares)
    return found


def read_records(file: Path) -> list[Record]:
    """The JSON lines of a run; of a step that was run again, after a resumed save, the last.

    FileNotFoundError says what is missing, ValueError names a line that is not JSON.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file.parent} has no {file.name}; give a directory of `train`")
    found: dict[tuple[str, int, bool], Record] = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            record = json.loads(line)
        except ValueError:
            raise ValueError(f"{file} line {number} is not JSON; remove the line") from None
        found[record["stage"], record["step"], "histogram" in record] = record
    return list(found.values())


def keep_records(run: str | Path, folder: str | Path) -> None:
    """Write a run's records into `folder`, few enough to publish, for `plot_runs`.

    KEPT of each file and stage at even distances, first and last included, and all histograms;
    numbers with DIGITS digits, and no time of day. FileNotFoundError where there is no log.
    """
    folder = Path(folder)
    for name, most in KEPT.items():
        file = Path(run) / name
        if name == "weights.jsonl" and not file.is_file():
            continue  # runs of several devices have none
        records = _thinned(read_records(file), most)
        folder.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(_rounded(record)) + "\n" for record in records]
        (folder / name).write_text("".join(lines), encoding="utf-8")


def _thinned(records: Sequence[Record], most: int) -> list[Record]:
    found = []
    for stage in _stages(records):
        own = [record for record in records if record["stage"] == stage]
        plain = [index for index, record in enumerate(own) if "histogram" not in record]
        last, gaps = len(plain) - 1, min(most, len(plain)) - 1
        kept = {plain[round(i * last / gaps)] for i in range(gaps + 1)} if gaps > 0 else {*plain}
        found += [r for index, r in enumerate(own) if index in kept or "histogram" in r]
    return found


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items() if key != "time"}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def near_threshold(counts: Sequence[int]) -> float:
    """The share of a histogram within NEAR of a rounding threshold, on either side."""
    width = 2 * REACH / len(counts)
    centres = [-REACH + (i + 0.5) * width for i in range(len(counts))]
    near = sum(n for n, c in zip(counts, centres, strict=True) if abs(abs(c) - THRESHOLD) < NEAR)
    return near / sum(counts)


def _stages(records: Iterable[Record]) -> list[str]:
    return list(dict.fromkeys(record["stage"] for record in records))


def _losses(logs: dict[str, list[Record]], stage: str) -> Any:
    """A panel for each term; every run a line over its training tokens."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    own = {run: [r for r in log if r["stage"] == stage] for run, log in logs.items()}
    terms = [t for t in TERMS if any(t in r for log in own.values() for r in log)]
    figure = Figure(figsize=(5.2, 2.2 * len(terms) + 0.8), layout="constrained")
    for index, term in enumerate(terms):
        axes = figure.add_subplot(len(terms), 1, index + 1)
        for number, (run, log) in enumerate(own.items()):
            points = [(r["tokens"], r[term]) for r in log if term in r]
            if points:
                xs, ys = zip(*points, strict=True)
                axes.plot(xs, ys, marker=MARKERS[number % len(MARKERS)], markersize=4,
                          markevery=max(1, len(points) // 8), linewidth=1.2, label=run,
                          color=OKABE_ITO[number % len(OKABE_ITO)])  # fmt: skip
        axes.set_ylabel(LABELS[term])
        axes.xaxis.set_major_formatter(FuncFormatter(lambda tokens, place: compact(tokens)))
    axes.set_xlabel(f"training tokens of stage {stage}")
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=2, frameon=False)
    return figure


def _histograms(before: Record, after: Record) -> Any:
    """Master weights in units of their scale, a panel for each kind of linear."""
    from matplotlib.figure import Figure

    kinds = list(before["histogram"])
    rows = -(-len(kinds) // 2)
    figure = Figure(figsize=(7.0, 1.9 * rows + 0.6), layout="constrained")
    for index, kind in enumerate(kinds):
        axes = figure.add_subplot(rows, 2, index + 1)
        shares = []
        for name, record, color, line in (
            ("before", before, OKABE_ITO[0], "--"),
            ("after", after, OKABE_ITO[1], "-"),
        ):
            counts = record["histogram"][kind]
            width = 2 * REACH / len(counts)
            edges = [-REACH + i * width for i in range(len(counts) + 1)]
            density = [n / sum(counts) / width for n in counts]
            axes.stairs(density, edges, color=color, linestyle=line, label=name)
            shares.append(f"{name} {near_threshold(counts):.1%}")
        for threshold in (-THRESHOLD, THRESHOLD):
            axes.axvspan(threshold - NEAR, threshold + NEAR, color="#eeeeee", zorder=0)
        axes.set_title(f"{kind}: near a threshold {', '.join(shares)}", fontsize=8)
        axes.set_xlabel("weight / scale (what lies beyond is in the outer bins)")
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=2, frameon=False)
    return figure


def _layers(records: list[Record]) -> Any:
    """Zeros and flips: by layer and kind at the last record, and their means over the stage."""
    from matplotlib.figure import Figure

    shares = [share for share in SHARES if any(share in record for record in records)]
    figure = Figure(figsize=(7.0, 2.6 * len(shares) + 0.6), layout="constrained")
    for index, share in enumerate(shares):
        own = [record for record in records if share in record]
        axes = figure.add_subplot(len(shares), 2, 2 * index + 1)
        for number, (kind, values) in enumerate(own[-1][share].items()):
            axes.plot(range(len(values)), values, marker=MARKERS[number % len(MARKERS)],
                      color=OKABE_ITO[number % len(OKABE_ITO)], markersize=3.5, linewidth=1,
                      label=kind)  # fmt: skip
        axes.set_title(f"{SHARES[share]}, step {own[-1]['step']}", fontsize=8)
        axes.set_xlabel("layer")
        axes = figure.add_subplot(len(shares), 2, 2 * index + 2)
        _map(figure, axes, own, share)
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4, frameon=False)
    return figure


def _map(figure: Any, axes: Any, records: list[Record], share: str) -> None:
    """Layer by step, the mean over kinds of linear, as colours."""
    steps = [record["step"] for record in records]
    columns = [
        [sum(values) / len(values) for values in zip(*record[share].values(), strict=True)]
        for record in records
    ]
    rows = list(zip(*columns, strict=True))
    edges = [steps[0] - (steps[1] - steps[0] if len(steps) > 1 else 1), *steps]
    image = axes.pcolormesh(edges, [i - 0.5 for i in range(len(rows) + 1)], rows, cmap=CIVIDIS)
    figure.colorbar(image, ax=axes)
    axes.set_title(f"{SHARES[share]}, mean of the kinds", fontsize=8)
    axes.set_xlabel("step")
    axes.set_ylabel("layer")
    axes.grid(False)
