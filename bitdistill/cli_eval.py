"""The commands that evaluate and show: `bitdistill eval` and `bitdistill report`.

Thin, like cli.py, which registers them. Heavy packages are imported inside the functions.
"""

from __future__ import annotations

import atexit
import gc
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bitdistill.cli_options import with_options

if TYPE_CHECKING:
    from bitdistill.evals import Result, Variant

FORMATS = ("table", "markdown", "csv", "json", "latex")
BASELINES = ("torch-bf16", "onnx-fp32", "onnx-int4", "onnx-int2")
STORE = Path("runs") / "evals"
FILE = click.Path(path_type=Path)

show_options = [
    click.option(
        "--format", "form", default="table", type=click.Choice(FORMATS), show_default=True
    ),
    click.option("--plot", type=FILE, help="Write PLOT-*.png and .svg (needs matplotlib)."),
    click.option("--html", type=FILE, help="Write a report in one HTML file."),
    click.option(
        "--store", type=FILE, default=STORE, show_default=True, help="What was measured is kept."
    ),
]


def _at_most_one(
    context: click.Context, option: click.Parameter, values: tuple[str, ...]
) -> str | None:
    """Of an option that click would otherwise take the last of."""
    if len(values) > 1:
        raise click.BadParameter(
            f"{' and '.join(map(repr, values))}: one run is of one task; evaluate each in a run of "
            "its own, and append to one --out"
        )
    return values[0] if values else None


@click.command("eval")
@click.argument("directories", nargs=-1, required=True, type=FILE)
@click.option(
    "--task",
    multiple=True,
    callback=_at_most_one,
    help="A built-in task, or a YAML file [the first directory's own].",
)
@click.option("--data", type=FILE, multiple=True, help="A local file with the task's columns.")
@click.option("--split", multiple=True, help="A split of the hub data set, or a data file's name.")
@click.option("--limit", type=click.IntRange(min=1), help="Evaluate the first N examples.")
@click.option("--column", "columns", multiple=True, metavar="TASK=FILE", help="Map a column name.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads of the runtimes.")
@click.option("--device", help="cuda: rows in PyTorch predict on the GPU (with --no-speed).")
@click.option("--floor", is_flag=True, help="Students in fp64 too (with --no-speed).")
@click.option("--speed/--no-speed", default=True, help="Measure tokens/s.  [default: speed]")
@click.option("--baseline", multiple=True, type=click.Choice(BASELINES), help="Of the teacher.")
@click.option("--llama-bench", type=FILE, help="A program that times the GGUF files given.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0))
@click.option("--batch-size", default=16, show_default=True, type=click.IntRange(min=1))
@click.option("--max-length", type=click.IntRange(min=2), help="Tokens of prompt and answer.")
@click.option(
    "--scoring",
    default="likelihood",
    show_default=True,
    type=click.Choice(("likelihood", "greedy")),
    help="Labels by likelihood, or by greedy generation.",
)
@click.option("--beams", default=1, show_default=True, help="Summaries: 1 is greedy.")
@click.option("--length-penalty", default=1.0, show_default=True, help="Of beam search.")
@click.option("--min-new-tokens", default=0, show_default=True, help="Of a summary.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), help="Of a summary [the task's].")
@click.option("--out", type=FILE, help="Append the results as JSON lines.")
@with_options(show_options)
def evaluate(
    directories: tuple[Path, ...],
    task: str | None,
    data: tuple[Path, ...],
    split: tuple[str, ...],
    columns: tuple[str, ...],
    baseline: tuple[str, ...],
    out: Path | None,
    form: str,
    plot: Path | None,
    html: Path | None,
    store: Path,
    **options: Any,
) -> None:
    """Score and time directories side by side: teachers, students, artifacts, GGUF files.

    What is measured is kept in the store as it is measured: a run that was stopped goes on, and
    nothing is measured twice.
    """
    from bitdistill import evals

    atexit.register(gc.freeze)  # a search for cycles in all that was imported would end each run
    _check_outputs(out=out, plot=plot, html=html)
    _check_report(html, out, *data)
    if out is not None and out.exists():
        evals.read_jsonl(out)  # what is appended to must be results
    search = {key: options.pop(key) for key in ("beams", "length_penalty", "min_new_tokens")}
    limit = options.pop("max_new_tokens")
    chosen, files, mapping = _task_of(task, data, columns)
    if search != {"beams": 1, "length_penalty": 1.0, "min_new_tokens": 0} or limit is not None:
        options["search"] = search | ({} if limit is None else {"max_new_tokens": limit})
    results = evals.run(
        [*directories, *_baselines(directories, baseline, store)],
        chosen,
        files,
        split=split,
        columns=mapping,
        store=store,
        progress=_say_progress(),
        **options,
    )
    if out is not None:
        evals.write_jsonl(results, out)
    _show(results, form, plot, html, store)


@click.command()
@click.argument("results", nargs=-1, required=True, type=FILE)
@click.option("--seeds", is_flag=True, help="Means over training seeds, and what is lost to FP16.")
@with_options(show_options)
def report(
    results: tuple[Path, ...],
    seeds: bool,
    form: str,
    plot: Path | None,
    html: Path | None,
    store: Path,
) -> None:
    """Show results that `bitdistill eval --out` wrote: a table, pictures, one HTML file.

    With --seeds also the variants of an ablation, and --plot draws a dot for each seed.
    """
    from bitdistill import evals

    _check_outputs(plot=plot, html=html)
    _check_report(html, *results)
    found = [result for path in results for result in evals.read_jsonl(path)]
    _show(found, form, plot, html, store, seeds=seeds)


@click.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Prefix of the files.")
def plot(runs: tuple[Path, ...], out: Path) -> None:
    """Draw training runs: losses, weights before and after each stage, trits by layer.

    From each run's log.jsonl and weights.jsonl. Accuracy against training tokens is drawn from
    results: `bitdistill report RESULTS --plot PREFIX`.
    """
    from bitdistill import evals

    _check_outputs(out=out)
    for path in evals.plot_runs(runs, out):
        click.echo(path)


def _check_outputs(**paths: Path | None) -> None:
    from bitdistill import evals

    for option, path in paths.items():
        if path is not None:
            evals.check_output(path, f"--{option}")


def _check_report(html: Path | None, *read: Path | None) -> None:
    """A report is written anew: it must not take the place of what it is made from."""
    if html is not None and html.resolve() in {path.resolve() for path in read if path is not None}:
        raise click.BadParameter(
            f"{html} is read or appended to; write the report to another file", param_hint="--html"
        )


def _show(
    results: list[Result],
    form: str,
    plot: Path | None,
    html: Path | None,
    store: Path,
    *,
    seeds: bool = False,
) -> None:
    """The table on stdout; pictures and the report in files, whose names go to stderr."""
    from bitdistill import evals

    if plot is not None:
        for path in evals.plot(results, plot, seeds=seeds):
            click.echo(path, err=True)
    if html is not None:
        evals.write_report(results, html, store)
        click.echo(html, err=True)
    if form == "table":
        from rich.console import Console

        for table in evals.rich_tables(results, seeds=seeds):
            Console().print(table)
    else:
        click.echo(evals.render(results, form, seeds=seeds), nl=False)


def _task_of(
    task: str | None, data: tuple[Path, ...], columns: tuple[str, ...]
) -> tuple[Any, list[Path], dict[str, str] | None]:
    """The task, its data files and column map, as the command line and a task's YAML file say."""
    mapping = _column_map(columns)
    if task is None or Path(task).suffix not in (".yaml", ".yml"):
        return task, list(data), mapping
    from bitdistill.config import load_task

    section = load_task(task)
    files = list(data) or ([Path(section.validation)] if section.validation else [])
    return section.resolve(), files, mapping or section.columns or None


def _column_map(columns: tuple[str, ...]) -> dict[str, str] | None:
    pairs = [column.partition("=") for column in columns]
    for name, equals, value in pairs:
        if not equals or not value:
            raise click.BadParameter(
                f"{name!r} is not of the form TASK=FILE", param_hint="--column"
            )
    return {name: value for name, _, value in pairs} or None


def _baselines(
    directories: Sequence[Path], names: tuple[str, ...], store: Path
) -> list[Path | Variant]:
    """The baselines of the teacher among the directories; ONNX ones are made once, in the store."""
    from bitdistill import evals

    if not names:
        return []
    teacher = evals.find_teacher(directories)
    found: list[Path | Variant] = []
    for name in names:
        if name == "torch-bf16":
            found.append(evals.Variant(teacher.path, {"dtype": "bfloat16"}))
            continue
        from bitdistill.exporters.stock import export_stock

        out = store / "baselines" / teacher.hash / name
        if not out.exists():
            click.echo(f"{name}: made from {teacher.path}", err=True)
            export_stock(teacher.path, name.removeprefix("onnx-"), out, teacher.manifest)
        found.append(out)
    return found


def _say_progress() -> Callable[[str, int, int], None]:
    """A rewritten line on a terminal; one line a stage elsewhere."""
    terminal, seen = sys.stderr.isatty(), set()

    def show(stage: str, done: int, total: int) -> None:
        if terminal:
            click.echo(
                f"\r\033[K{stage} {done}/{total}" + "\n" * (done == total), err=True, nl=False
            )
        elif stage not in seen:
            seen.add(stage)
            click.echo(stage, err=True)

    return show
