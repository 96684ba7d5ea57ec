"""One directory, evaluated in a process of its own: `python -m bitdistill.evals.worker JOB`.

A fresh process makes the peak memory honest (nothing else was loaded before) and keeps torch out
of the runs of the other runtimes. The job is a JSON file, written by process.py; the outcome is
written beside it. stdout carries progress as JSON lines, stderr is free text.

The order is: load, time one sequence, take the peak memory, then predict. So the peak is that of
serving one sequence, and the peak of the whole evaluation, batches included, is reported as well.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bitdistill.evals.environment import peak_memory, versions

Progress = Callable[[str, int, int], None]


def execute(job: dict[str, Any], progress: Progress, load: Callable[..., Any]) -> dict[str, Any]:
    """Evaluate `job["path"]`; the job and the outcome are plain JSON values.

    `load(path, threads=...)` returns a Runtime; `progress(stage, done, total)` reports.
    """
    from bitdistill.evals.predict import predict
    from bitdistill.tasks import Example, Task

    task = Task.from_json(job["task"])
    examples = [Example(**example) for example in job["examples"]]
    bare = peak_memory()
    progress("load", 0, 1)
    runtime = load(job["path"], threads=job["threads"])
    progress("load", 1, 1)
    outcome: dict[str, Any] = {"speed": None, "memory": {"bare": bare, "load": peak_memory()}}
    if job["speed"]:
        outcome["speed"] = _time(runtime, job, progress)
        outcome["memory"]["serve"] = peak_memory()
    predictions = predict(
        runtime,
        task,
        examples,
        max_length=job["max_length"],
        batch_size=job["batch_size"],
        progress=lambda done, total: progress("predict", done, total),
    )
    outcome["memory"]["evaluate"] = peak_memory()
    outcome["predictions"] = dataclasses.asdict(predictions)
    outcome["backend"] = runtime.name
    outcome["versions"] = versions()
    return outcome


def _time(runtime: Any, job: dict[str, Any], progress: Progress) -> dict[str, Any]:
    from bitdistill.evals.bench import measure

    progress("time", 0, 1)
    speed = measure(runtime, seed=job["seed"], **job["bench"])
    progress("time", 1, 1)
    return dataclasses.asdict(speed)


def _load(path: str, threads: int | None) -> Any:
    from bitdistill.backends import load  # here, so that the bare process is bare

    return load(path, threads=threads)


def _print_progress(stage: str, done: int, total: int) -> None:
    print(json.dumps({"stage": stage, "done": done, "total": total}), flush=True)


def main(job_file: str) -> int:
    """Run a job file and write `outcome.json` beside it; 1 for an error that has a remedy."""
    path = Path(job_file)
    job = json.loads(path.read_text(encoding="utf-8"))
    status = 0
    try:
        outcome = execute(job, _print_progress, _load)
    except (ValueError, OSError, ImportError, MemoryError) as error:
        # Said in a sentence by whoever raised it; anything else keeps its traceback on stderr.
        outcome, status = {"error": f"{error}" or type(error).__name__}, 1
    (path.parent / "outcome.json").write_text(json.dumps(outcome), encoding="utf-8")
    return status


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
