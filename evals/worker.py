"""One directory, evaluated in a process of its own: `python -m bitdistill.evals.worker JOB`.

A fresh process keeps torch out of the runs of the other runtimes, and whatever breaks in one. The
job is a JSON file, written by process.py, that says what to load. What to ask is in a second file,
which a line on stdin announces: it is written while the runtime is imported and the model loaded.
The outcome is written beside them. stdout carries progress as JSON lines, the last one says that
the outcome is there; stderr is free text. Predictions go to their own file as they are made
(store.py), so a job that was killed goes on where it stopped.
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
ASKED, OUTCOME = "asked.json", "outcome.json"
DONE = "done"  # the last stage
SWITCH_SECONDS = 0.0005  # a thread that hashes or parses waits no longer for the interpreter
PROGRESS_SECONDS = 0.5  # whoever reads progress takes the processor from whoever predicts
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


def execute(
    job: dict[str, Any],
    progress: Progress,
    load: Callable[..., Any],
    ask: Callable[[], dict[str, Any]] = dict,
) -> dict[str, Any]:
    """Evaluate `job["path"]` on each of `job["parts"]`; job and outcome are plain JSON values.

    `load(path, threads=..., **options)` returns a Runtime; `progress(stage, done, total)` reports.
    `ask()` gives the values of the job that are not needed for loading.
    """
    start = time.perf_counter()
    progress("load", 0, 1)
    runtime = load(job["path"], threads=job["threads"], **job["load"])
    progress("load", 1, 1)
    seconds = time.perf_counter() - start
    job = job | ask()
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
    from bitdistill.evals.predict import Encoded, Options, predict
    from bitdistill.evals.store import PredictionLog
    from bitdistill.tasks import Example, Task

    with PredictionLog(Path(part["log"]), part["identity"]) as log:
        start, computed = time.perf_counter(), watch.seconds
        predictions = predict(
            runtime,
            Task.from_json(job["task"]),
            [Example(**example) for example in part["examples"]],
            Options.from_json(job["options"]),
            encoded=Encoded(**part["encoded"]) if part.get("encoded") else None,
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
    from bitdistill.backends import load

    return load(path, threads=threads, **options)


class Printer:
    """Prints progress: the first and the last of each stage, and what is due in between."""

    def __init__(self) -> None:
        self._stage, self._printed = "", 0.0

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.perf_counter()
        if stage == self._stage and done < total and now - self._printed < PROGRESS_SECONDS:
            return
        self._stage, self._printed = stage, now
        print(json.dumps({"stage": stage, "done": done, "total": total}), flush=True)


def _ask(folder: Path) -> dict[str, Any]:
    """What to ask, once it is there."""
    if not sys.stdin.readline():
        raise BrokenPipeError
    asked: dict[str, Any] = json.loads((folder / ASKED).read_text(encoding="utf-8"))
    return asked


def main(job_file: str) -> int:
    """Run a job file and write the outcome beside it; 1 for an error that has a remedy."""
    path, progress = Path(job_file), Printer()
    sys.setswitchinterval(SWITCH_SECONDS)
    job = json.loads(path.read_text(encoding="utf-8"))
    status = 0
    try:
        outcome = execute(job, progress, _load, lambda: _ask(path.parent))
    except BrokenPipeError:  # whoever asked for this is gone; what was predicted is kept
        return 1
    except (ValueError, OSError, ImportError, MemoryError) as error:
        # Said in a sentence by whoever raised it; anything else keeps its traceback on stderr.
        outcome, status = {"error": f"{error}" or type(error).__name__}, 1
    (path.parent / OUTCOME).write_text(json.dumps(outcome), encoding="utf-8")
    progress(DONE, 1, 1)
    return status


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
