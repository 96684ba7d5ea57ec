"""From what was measured to results: metrics, comparisons of every two rows, speed, sizes, ratios.

Pure functions of predictions and timings; nothing is run here.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bitdistill.evals import environment, metrics
from bitdistill.evals.bench import ratio
from bitdistill.evals.directories import METRICS, Directory
from bitdistill.evals.examples import ExampleSet
from bitdistill.evals.metrics import Metric, Score
from bitdistill.evals.resampling import Resamples
from bitdistill.evals.results import Result
from bitdistill.tasks import Example, Task

Outcome = dict[str, Any]
TRAINING = ("recipe", "overrides", "fingerprint", "seconds", "device")
DEFAULT_SUMMARY_METRICS = METRICS["summary"][:-1]  # perplexity costs another forward


@dataclass(frozen=True)
class Measured:
    """Everything a run measured: predictions by split and scored row, timings by row or None."""

    directories: list[Directory]
    task: Task
    sets: list[ExampleSet]
    outcomes: list[list[Outcome]]
    speeds: list[Outcome] | None
    seed: int
    settings: dict[str, Any]


def summarise(measured: Measured) -> list[Result]:
    """Results of all rows: for each split its metrics and differences, then speed and sizes."""
    scored = [d for d in measured.directories if d.is_scored]
    machine = environment.machine()
    results = []
    for part, outcomes in zip(measured.sets, measured.outcomes, strict=True):
        rows = list(zip(scored, outcomes, strict=True))
        table = [_metrics(outcome, measured.task, part) for _, outcome in rows]
        _add_agreement(rows, table, measured.task)
        resamples = Resamples(len(part.examples), measured.seed)
        for index, (directory, outcome) in enumerate(rows):
            head = _head(measured, directory, part.split, machine)
            head["versions"] = outcome["versions"]
            head["settings"] |= _own_settings(outcome, part)
            scores = [metric.score(resamples) for metric in table[index]]
            scores += _differences(rows, table, index, resamples)
            results += [Result(**head, **asdict(score)) for score in scores]
    heads = [_head(measured, d, measured.sets[0].split, machine) for d in measured.directories]
    for head, speed in zip(heads, measured.speeds or [], strict=False):
        head["versions"] = speed["facts"]["versions"]
    results += [Result(**heads[index], **asdict(score)) for index, score in _measurements(measured)]
    return results


def _head(
    measured: Measured, directory: Directory, split: str, machine: dict[str, Any]
) -> dict[str, Any]:
    """What all results of one row share."""
    return {
        "method": directory.manifest["method"],
        "model": directory.manifest["base_model"] or measured.directories[0].manifest["base_model"],
        "backend": directory.backend,
        "precision": directory.precision,
        "task": measured.task.name,
        "task_version": measured.task.version,
        "split": split,
        "seed": directory.manifest.get("seed"),
        "artifact": directory.name,
        "artifact_hash": directory.hash,
        "student": directory.student,
        "machine": machine,
        "settings": measured.settings | _training(directory),
    }


def _training(directory: Directory) -> dict[str, Any]:
    """How a teacher or student was trained, as far as its manifest says: the recipe, what was set
    otherwise, and the fingerprint of all that its last stage depended on; the time and device of
    that stage; the tokens of all stages together. Nothing of an artifact, whose `student` was."""
    content = directory.manifest
    found = {key: content[key] for key in TRAINING if key in content}
    settings: dict[str, Any] = {"training": found} if found else {}
    tokens = content.get("metrics", {}).get("tokens_in_all")
    return settings if tokens is None else settings | {"training_tokens": tokens}


def _own_settings(outcome: Outcome, part: ExampleSet) -> dict[str, Any]:
    """What belongs to one row's predictions."""
    own = {key: outcome[key] for key in ("truncated", "prompt_tokens", "answer_tokens", "seconds")}
    own["single_token_answers"] = max(outcome["answer_tokens"], default=0) == 1
    own["peak_memory_mib"] = outcome["peak_memory"]
    return own | {"examples": part.fingerprint, "predictions": outcome["file"]}


def _answers(outcome: Outcome, task: Task) -> list[Any]:
    return [record["label" if task.kind == "label" else "text"] for record in outcome["records"]]


def _metrics(outcome: Outcome, task: Task, part: ExampleSet) -> list[Metric]:
    """The task's metrics of one row on one split."""
    compute = _label_metrics if task.kind == "label" else _summary_metrics
    return list(compute(outcome, task, part.examples))


def _label_metrics(outcome: Outcome, task: Task, examples: Sequence[Example]) -> Iterator[Metric]:
    wanted = task.metrics or METRICS["label"]
    records, labels = outcome["records"], [e.label for e in examples if e.label is not None]
    names = [label.strip() for label in task.labels]
    if "accuracy" in wanted:
        yield metrics.accuracy(_answers(outcome, task), labels, names)
    if "scores" not in records[0]:  # answers that were generated have no likelihoods
        return
    scores = [record["scores"] for record in records]
    if "ece" in wanted:
        yield metrics.calibration(scores, labels)
    if "perplexity" in wanted:
        right = [row[label] for row, label in zip(scores, labels, strict=True)]
        yield metrics.perplexity(right, [outcome["answer_tokens"][label] for label in labels])


def _summary_metrics(outcome: Outcome, task: Task, examples: Sequence[Example]) -> Iterator[Metric]:
    wanted = task.metrics or DEFAULT_SUMMARY_METRICS
    texts, records = _answers(outcome, task), outcome["records"]
    targets = [example.answer.strip() for example in examples]
    for metric in (*metrics.rouge(texts, targets), metrics.bleu(texts, targets)):
        if metric.name in wanted:
            yield metric
    if "perplexity" in wanted:
        found = [record["log_likelihood"] for record in records]
        yield metrics.perplexity(found, [record["tokens"] for record in records])


def _add_agreement(
    rows: Sequence[tuple[Directory, Outcome]], table: list[list[Metric]], task: Task
) -> None:
    """Compare predictions with those of the same student's first row in PyTorch, where it has one.

    The student in fp64 is compared too: as many as it changes, rounding alone changes.
    """
    first: dict[str, int] = {}
    for index, (directory, _) in enumerate(rows):
        if directory.backend == "torch" and directory.student is not None:
            first.setdefault(directory.student, index)
    for index, (directory, outcome) in enumerate(rows):
        reference = first.get(directory.student or "", index)
        if reference != index:
            answers = _answers(rows[reference][1], task)
            table[index].append(metrics.agreement(_answers(outcome, task), answers))


def _differences(
    rows: Sequence[tuple[Directory, Outcome]],
    table: Sequence[list[Metric]],
    index: int,
    resamples: Resamples,
) -> Iterator[Score]:
    """This row less every row before it, metric by metric, with McNemar and paired bootstrap."""
    mine = {metric.name: metric for metric in table[index]}
    if resamples.n < 2:
        return
    for other, (directory, _) in itertools.islice(enumerate(rows), index):
        for theirs in table[other]:
            if theirs.name in mine and theirs.name != "agreement":
                found = asdict(metrics.difference(mine[theirs.name], theirs, resamples))
                details = {"of": found.pop("metric"), "against": _reference(directory)}
                value, interval, n = (found.pop(key) for key in ("value", "interval", "n"))
                details |= {name: item for name, item in found.items() if item is not None}
                yield Score("difference", value, theirs.unit, n, None, interval, details)


def _reference(directory: Directory) -> dict[str, Any]:
    """How a result names the row it is compared with."""
    return {
        "method": directory.manifest["method"],
        "backend": directory.backend,
        "precision": directory.precision,
        "artifact": directory.name,
        "artifact_hash": directory.hash,
    }


def reference_row(directories: Sequence[Directory]) -> int:
    """The row that speed and memory are compared with: the teacher in PyTorch, or the first."""
    for index, directory in enumerate(directories):
        if directory.manifest["method"] == "fp16-sft" and directory.backend == "torch":
            return index
    return 0


def _measurements(measured: Measured) -> Iterator[tuple[int, Score]]:
    """Speed, memory and size of every row, as (row, figure); ratios are to the reference row."""
    base = reference_row(measured.directories)
    against = {"against": _reference(measured.directories[base])}
    for index, directory in enumerate(measured.directories):
        figures = _sizes(directory)
        if measured.speeds is not None:
            row, reference = measured.speeds[index], measured.speeds[base]
            figures = [*_speeds(row), *figures]
            for what in ("prefill", "decode"):
                found = ratio([row["speed"], reference["speed"]], what)
                n = min(len(row["speed"]["rounds"]), len(reference["speed"]["rounds"]))
                value = found.pop("value")
                figures.append(Score(f"{what}_ratio", value, "x", n, None, None, against | found))
        yield from ((index, figure) for figure in figures)
    yield from _size_ratios(measured, base, against)


def _speeds(row: Outcome) -> list[Score]:
    speed, memory, n = row["speed"], row["memory"], len(row["speed"]["rounds"])
    details = {key: speed[key] for key in ("prefill_tokens", "decode_tokens")} | row["facts"]
    figures = [
        Score(f"{kind}_speed", speed[kind], "tokens/s", n, None, None,
              details | {"range": speed[f"{kind}_range"]})
        for kind in ("prefill", "decode")
    ]  # fmt: skip
    for name in ("first_token_ms", "token_p50_ms", "token_p95_ms"):
        figures.append(Score(name.removesuffix("_ms"), speed[name], "ms", n, None, None, {}))
    if memory:
        over = memory["serve"] - memory["bare"]
        figures.append(Score("memory", over, "MiB", 1, None, None, memory))
    return figures


def _sizes(directory: Directory) -> list[Score]:
    size = directory.bytes / environment.MIB
    details = {"parts": directory.parts} if directory.parts else {}
    return [Score("size_on_disk", size, "MiB", 1, None, None, details)]


def _size_ratios(
    measured: Measured, base: int, against: dict[str, Any]
) -> Iterator[tuple[int, Score]]:
    """Memory and size as shares of the reference row's."""
    for index, directory in enumerate(measured.directories):
        share = directory.bytes / measured.directories[base].bytes
        yield index, Score("size_ratio", share, "x", 1, None, None, against)
        if measured.speeds is None:
            continue
        pair = [measured.speeds[i]["memory"] for i in (index, base)]
        if all(pair):
            mine, theirs = (memory["serve"] - memory["bare"] for memory in pair)
            yield index, Score("memory_ratio", mine / theirs, "x", 1, None, None, against)
