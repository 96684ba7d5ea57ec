"""Evaluate directories side by side: teacher, students, artifacts, on one task.

    results = run(["runs/teacher", "runs/student", "out/onnx"], data="test.jsonl")
    write_jsonl(results, "results.jsonl")
    print(render(results, "markdown"))

Examples are read once, here; every directory then predicts them in a process of its own
(worker.py). The metrics are computed here from the predictions that come back, so a metric cannot
depend on the backend.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bitdistill import manifest
from bitdistill.evals import environment, metrics
from bitdistill.evals.directories import Directory, choose_task, open_directories, recorded_data
from bitdistill.evals.process import run_worker
from bitdistill.evals.results import Result
from bitdistill.tasks import Example, Task, load_examples

Progress = Callable[[str, int, int], None]
Outcome = dict[str, Any]
BENCH = {"prefill_tokens": 128, "decode_tokens": 32, "repeats": 5, "budget": 6.0}


def run(
    paths: Sequence[str | Path],
    task: Task | str | None = None,
    data: str | Path | None = None,
    *,
    split: str | None = None,
    limit: int | None = None,
    columns: dict[str, str] | None = None,
    threads: int | None = None,
    speed: bool = True,
    seed: int = 0,
    batch_size: int = 16,
    max_length: int | None = None,
    bench: dict[str, Any] | None = None,
    progress: Progress | None = None,
    execute: Callable[[dict[str, Any], Progress], Outcome] = run_worker,
) -> list[Result]:
    """Evaluate each directory on a task; one Result per directory and metric.

    `task` defaults to the one in the first directory's manifest. `data` is a local file; without
    one (and without `split`), the validation file that training recorded, else the task's hub data
    set. `limit` takes the first examples. `max_length` is in tokens, prompt and answer together;
    the shortest context of the artifacts by default. `bench` overrides BENCH. `progress` is
    called with "<directory>: <stage>", done and total; `execute` runs one job.

    Everything is checked before the first model is loaded: FormatError, ValueError, ImportError or
    FileNotFoundError say what is wrong. WorkerError when a directory cannot be evaluated.
    """
    directories = open_directories(paths)
    task = choose_task(directories, task)
    if data is None and split is None:
        data, recorded = recorded_data(directories, task)
        columns = recorded if columns is None else columns
    if max_length is None:  # the same prompts for every row, also where one context is shorter
        max_length = min((d.context for d in directories if d.context), default=None)
    examples = load_examples(task, data, split, limit, columns)
    common: dict[str, Any] = {
        "task": task.to_json(),
        "examples": [vars(example) for example in examples],
        "threads": threads,
        "speed": speed,
        "seed": seed,
        "batch_size": batch_size,
        "max_length": max_length,
        "bench": BENCH | (bench or {}),
    }
    outcomes = [
        execute(common | {"path": str(directory.path)}, _label(progress, directory))
        for directory in directories
    ]
    shared = {
        "task": task.name,
        "split": split or (task.splits[1] if data is None else Path(data).stem),
        "seed": seed,
        "machine": environment.machine(),
    }
    settings = {key: common[key] for key in ("threads", "batch_size", "max_length")} | {
        "limit": limit,
        "task": manifest.fingerprint(task.to_json()),
        "examples": manifest.fingerprint([[e.prompt, e.answer] for e in examples]),
    }
    return summarise(directories, outcomes, task, examples, shared, settings)


def _label(progress: Progress | None, directory: Directory) -> Progress:
    def report(stage: str, done: int, total: int) -> None:
        if progress is not None:
            progress(f"{directory.path.name}: {stage}", done, total)

    return report


def summarise(
    directories: Sequence[Directory],
    outcomes: Sequence[Outcome],
    task: Task,
    examples: Sequence[Example],
    shared: dict[str, Any],
    settings: dict[str, Any],
) -> list[Result]:
    """Results of all directories, from what their workers brought back.

    `shared` are fields of every Result (task, split, seed, machine); `settings` those of the run.
    """
    pairs = list(zip(directories, outcomes, strict=True))
    torch_answers = {
        directory.student: _answers(outcome, task)
        for directory, outcome in pairs
        if directory.backend == "torch" and directory.student is not None
    }
    results = []
    for directory, outcome in pairs:
        scores = _scores(outcome, task, examples, shared["seed"])
        if directory.is_artifact and directory.student in torch_answers:
            reference = torch_answers[directory.student]
            scores.append(metrics.agreement(_answers(outcome, task), reference))
        rows = [(s.metric, s.value, "%", s.n, s.stderr) for s in scores]
        rows += _measurements(directory, outcome)
        head = shared | _head(directory, outcome, settings)
        results += [
            Result(metric=metric, value=value, unit=unit, n=n, stderr=stderr, **head)
            for metric, value, unit, n, stderr in rows
        ]
    return results


def _answers(outcome: Outcome, task: Task) -> list[Any]:
    return outcome["predictions"]["labels" if task.kind == "label" else "texts"]


def _scores(
    outcome: Outcome, task: Task, examples: Sequence[Example], seed: int
) -> list[metrics.Score]:
    answers = _answers(outcome, task)
    if task.kind == "label":
        return [metrics.accuracy(answers, [e.label for e in examples if e.label is not None])]
    targets = [example.answer.strip() for example in examples]
    return [*metrics.rouge(answers, targets), metrics.bleu(answers, targets, seed)]


def _measurements(
    directory: Directory, outcome: Outcome
) -> list[tuple[str, float, str, int, float | None]]:
    """Speed (n = repeats), memory and size: (metric, value, unit, n, stderr)."""
    rows: list[tuple[str, float, str, int, float | None]] = []
    memory = outcome["memory"]
    if speed := outcome["speed"]:
        for kind in ("prefill", "decode"):
            rows.append((f"{kind}_speed", speed[kind], "tokens/s", speed["repeats"], None))
        rows.append(("peak_memory", memory["serve"], "MiB", 1, None))
    rows.append(("peak_memory_evaluation", memory["evaluate"], "MiB", 1, None))
    rows.append(("size_on_disk", directory.bytes / environment.MIB, "MiB", 1, None))
    return rows


def _head(directory: Directory, outcome: Outcome, settings: dict[str, Any]) -> dict[str, Any]:
    """What all results of one directory share."""
    predictions = outcome["predictions"]
    own = {key: predictions[key] for key in ("truncated", "single_token_answers", "prompt_tokens")}
    return {
        "method": directory.manifest["method"],
        "model": directory.manifest["base_model"],
        "backend": outcome["backend"],
        "artifact": directory.path.name,
        "artifact_hash": manifest.fingerprint(directory.manifest["files"]),
        "student": directory.student,
        "versions": outcome["versions"],
        "settings": settings
        | own
        | {
            "memory": outcome["memory"],
            "speed": outcome["speed"],
            "parts": directory.manifest.get("parts"),
        },
    }
