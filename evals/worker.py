"""One directory, evaluated in a process of its own: `python -m bitdistill.evals.worker JOB`.

A fresh process keeps torch out of the runs of the other runtimes, and whatever breaks in one. The
job is a JSON file, written by process.py; the outcome is written beside it. stdout carries progress
as JSON lines, stderr is free text. Predictions go to their own file as they are made (store.py), so
a job that was killed goes on where it stopped.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bitdistill.evals.environment import peak_memory, versions

Progress = Callable[[str, int, int], None]
COMPUTE = ("logits_at", "step", "start_rows", "step_rows", "select_rows")


class Stopwatch:
    """Seconds spent inside a runtime's own operations."""

    def __init__(self, runtime: Any) -> None:
        self.seconds, self._running = 0.0, False
        for name in COMPUTE:
            setattr(runtime, name, self._timed(getattr(runtime, name)))

    def _timed(self, operation: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            if self._running:  # an operation built on another one counts once
                return operation(*arguments, **options)
            self._running, start = True, time.perf_counter()
            try:
                return operation(*arguments, **options)
            finally:
                self._running = False
                self.seconds += time.perf_counter() - start

        return run


def execute(job: dict[str, Any], progress: Progress, load: Callable[..., Any]) -> dict[str, Any]:
    """Evaluate `job["path"]` on each of `job["parts"]`; job and outcome are plain JSON values.

    `load(path, threads=..., **options)` returns a Runtime; `progress(stage, done, total)` reports.
    """
    start = time.perf_counter()
    progress("load", 0, 1)
    runtime = load(job["path"], threads=job["threads"], **job["load"])
    progress("load", 1, 1)
    seconds = time.perf_counter() - start
    watch = Stopwatch(runtime)
    return {"parts": [_predict(runtime, job, part, watch, seconds, progress)
                      for part in job["parts"]]}  # fmt: skip


def _predict(
    runtime: Any,
    job: dict[str, Any],
    part: dict[str, Any],
    watch: Stopwatch,
    loading: float,
    progress: Progress,
) -> dict[str, Any]:
    """Predictions of one split, kept in its own file; seconds are those of this process."""
    from bitdistill.evals.predict import Options, predict
    from bitdistill.evals.store import PredictionLog
    from bitdistill.tasks import Example, Task

    with PredictionLog(Path(part["log"]), part["identity"]) as log:
        start, computed = time.perf_counter(), watch.seconds
        predictions = predict(
            runtime,
            Task.from_json(job["task"]),
            [Example(**example) for example in part["examples"]],
            Options.from_json(job["options"]),
            known=log.known,
            save=log.append,
            progress=lambda done, total: progress("predict", done, total),
        )
        outcome = dict(vars(predictions))  # not `asdict`, which would copy every record
        records = outcome.pop("records")
        outcome |= {
            "backend": runtime.name,
            "versions": versions(),
            "peak_memory": peak_memory(),
            "seconds": {
                "load": loading,
                "predict": time.perf_counter() - start,
                "compute": watch.seconds - computed,
            },
        }
        log.finish(outcome)
    return outcome | {"records": records}


def _load(path: str, threads: int | None, **options: Any) -> Any:
    from bitdistill.backends import load_with_tokenizer

    return load_with_tokenizer(path, threads=threads, **options)


def _print_progress(stage: str, done: int, total: int) -> None:
    print(json.dumps({"stage": stage, "done": done, "total": total}), flush=True)


def main(job_file: str) -> int:
    """Run a job file and write `outcome.json` beside it; 1 for an error that has a remedy."""
    path = Path(job_file)
    job = json.loads(path.read_text(encoding="utf-8"))
    status = 0
    try:
        outcome = execute(job, _print_progress, _load)
    except BrokenPipeError:  # whoever asked for this is gone; what was predicted is kept
        return 1
    except (ValueError, OSError, ImportError, MemoryError) as error:
        # Said in a sentence by whoever raised it; anything else keeps its traceback on stderr.
        outcome, status = {"error": f"{error}" or type(error).__name__}, 1
    (path.parent / "outcome.json").write_text(json.dumps(outcome), encoding="utf-8")
    return status


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
