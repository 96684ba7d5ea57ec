"""A report in one HTML file: tables, pictures, comparisons, disagreements, settings.

Everything is inside the file; it opens without a network and runs no scripts.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bitdistill.evals.results import Result
from bitdistill.evals.store import Record, read_disagreements
from bitdistill.evals.tables import TASK_METRICS, build, grid

SHOWN = 200  # disagreements of one split
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 95em; margin: 2em auto; padding: 0 1em; }
table { border-collapse: collapse; margin: 1em 0; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid #ccc; padding: .3em .8em; text-align: right; }
td:not(.text) { white-space: nowrap; }
th { border-bottom: 2px solid #444; vertical-align: bottom; }
th:first-child, td:first-child, .text { text-align: left; }
.scroll { overflow-x: auto; } .wrong { color: #a33; } .prompt { white-space: pre-wrap; }
svg { max-width: 34em; width: 100%; height: auto; } summary { cursor: pointer; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: 12px; }
@media print { body { max-width: none; margin: 0; } details > * { display: block; } }
"""


def write_report(results: Sequence[Result], path: str | Path, store: str | Path) -> None:
    """Write the report of results to `path`.

    Disagreements are shown as far as `store` still holds the predictions. ValueError for no
    results.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(page(results, Path(store)), encoding="utf-8")
    partial.replace(path)


def page(results: Sequence[Result], store: Path) -> str:
    """The whole document."""
    model = ", ".join(dict.fromkeys(r.model for r in results))
    title = f"Evaluation of {model}"
    sections = [
        *_tables(results),
        *_pictures(results),
        *_comparisons(results),
        *_confusions(results),
        *_disagreements(results, store),
        *_settings(results),
    ]
    body = "\n".join(sections)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width">\n<title>{escape(title)}</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n{body}\n"
        "</body>\n</html>\n"
    )


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], text_columns: int = 1) -> str:
    """An HTML table; cells are escaped here."""
    classes = [' class="text"' if i < text_columns else "" for i in range(len(header))]
    head = "".join(
        f'<th scope="col"{c}>{escape(name)}</th>' for c, name in zip(classes, header, strict=True)
    )
    lines = []
    for row in rows:
        cells = zip(classes, row, strict=True)
        lines.append("".join(f"<td{c}>{escape(cell)}</td>" for c, cell in cells))
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return (
        f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def _tables(results: Sequence[Result]) -> Iterable[str]:
    for table in build(results, complete=True):
        yield f"<h2>{table.title}</h2>"
        shown = grid(table)
        yield _table(shown.header, shown.rows, text_columns=shown.names)


def _pictures(results: Sequence[Result]) -> Iterable[str]:
    if find_spec("matplotlib") is None:
        yield "<p>No pictures: matplotlib is not installed.</p>"
        return
    from bitdistill.evals.plots import figures, svg

    try:
        drawn = figures(results)
    except ValueError as error:
        yield f"<p>No pictures: {escape(str(error))}.</p>"
        return
    yield "<h2>Pictures</h2>"
    for name, figure in drawn.items():
        yield f'<figure role="img" aria-label="{escape(name)}">{svg(figure)}</figure>'


def name_of(row: Result | dict[str, Any]) -> str:
    """A row's name: method, backend, precision, directory."""
    value = row if isinstance(row, dict) else row.to_json()
    parts = [value["method"], value["backend"], value["precision"]]
    return f"{' '.join(filter(None, parts))} ({value['artifact']})"


def _comparisons(results: Sequence[Result]) -> Iterable[str]:
    """Every two rows: difference, interval, and what the tests say."""
    found = [r for r in results if r.metric == "difference"]
    if not found:
        return
    yield "<h2>Differences between rows</h2>"
    yield (
        "<p>First less second on the same examples; the interval and p are a paired bootstrap's, "
        "McNemar's test is exact.</p>"
    )
    header = ["First", "Second", "Split", "Metric", "Difference", "95 % interval", "p",
              "Right in first / second alone", "McNemar p"]  # fmt: skip
    yield _table(header, (_comparison(r) for r in found), text_columns=4)


def _comparison(r: Result) -> list[str]:
    low, high = r.interval or (float("nan"), float("nan"))
    details = r.details
    alone, p, p_paired = "", "", ""
    if "p_bootstrap" in details:
        p_paired = f"{details['p_bootstrap']:.3g}"
    if "p_mcnemar" in details:
        alone = f"{details['only_first']} / {details['only_second']}"
        p = f"{details['p_mcnemar']:.3g}"
    return [
        name_of(r), name_of(details["against"]), f"{r.asked} {r.split}",
        TASK_METRICS[details["of"]], f"{r.value:+.2f}", f"{low:+.2f} to {high:+.2f}",
        p_paired, alone, p,
    ]  # fmt: skip


def _confusions(results: Sequence[Result]) -> Iterable[str]:
    found = [r for r in results if "confusion" in r.details]
    if found:
        yield "<h2>Confusion matrices</h2>\n<p>Rows are true labels, columns predicted ones.</p>"
    for r in found:
        labels, matrix = r.details["labels"], r.details["confusion"]
        other = any(row[-1] for row in matrix)
        width = len(labels) + other
        rows = [[label, *map(str, row[:width])] for label, row in zip(labels, matrix, strict=True)]
        yield f"<details><summary>{escape(name_of(r))}, {escape(f'{r.asked} {r.split}')}</summary>"
        yield _table(["", *labels, *["other"] * other], rows) + "</details>"


def _disagreements(results: Sequence[Result], store: Path) -> Iterable[str]:
    yield "<h2>Disagreements</h2>"
    parts: dict[tuple[str, str, str], dict[str, Result]] = {}
    for r in results:
        if "predictions" in r.settings:
            rows = parts.setdefault((r.asked, r.split, r.settings["examples"]), {})
            rows[r.settings["predictions"]] = r
    for (task, split, examples), rows in parts.items():
        found = read_disagreements(store, examples, list(rows))
        if found is None:
            told = f"{task} {split}: not known, {store} does not hold the predictions of every row."
            yield f"<p>{escape(told)}</p>"
            continue
        yield (
            f"<details><summary>{escape(f'{task} {split}')}: {len(found)} examples on which rows "
            f"differ{f', the first {SHOWN} shown' if len(found) > SHOWN else ''}</summary>"
        )
        yield _examples(found[:SHOWN], [name_of(r) for r in rows.values()]) + "</details>"


def _examples(found: Sequence[tuple[Record, list[Record]]], names: Sequence[str]) -> str:
    titles = ("#", "Example", "Answer", *names)
    header = "".join(f'<th scope="col" class="text">{escape(title)}</th>' for title in titles)
    lines = []
    for example, records in found:
        cells = [f"<td>{example['index']}</td>"]
        cells.append(f'<td class="text prompt">{escape(example["prompt"])}</td>')
        cells.append(f'<td class="text">{escape(example["answer"].strip())}</td>')
        cells += [_prediction(example, record) for record in records]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return (
        f'<div class="scroll"><table class="disagreements"><thead><tr>{header}</tr></thead>\n'
        + "\n".join(lines)
        + "</table></div>"
    )


def _prediction(example: Record, record: Record) -> str:
    """A label by its number and log-likelihoods, or a text."""
    if "label" not in record:
        return f'<td class="text prompt">{escape(record["text"])}</td>'
    scores = ", ".join(f"{score:.2f}" for score in record.get("scores", []))
    wrong = "" if record["label"] == example["label"] else " wrong"
    said = record.get("text", scores)
    return f'<td class="text{wrong}">{record["label"]} ({escape(said)})</td>'


def _settings(results: Sequence[Result]) -> Iterable[str]:
    yield "<h2>Settings</h2>"
    seen = set()
    for r in results:
        if r.metric == "difference" or (r.artifact_hash, r.asked, r.split) in seen:
            continue
        seen.add((r.artifact_hash, r.asked, r.split))
        keys = ("artifact_hash", "student", "seed", "task_version", "machine", "versions")
        shown = {key: getattr(r, key) for key in keys} | {"settings": r.settings}
        text = escape(json.dumps(shown, indent=1, ensure_ascii=False, default=str))
        title = f"{name_of(r)}, {r.asked} {r.split}"
        yield f"<details><summary>{escape(title)}</summary><pre>{text}</pre></details>"
