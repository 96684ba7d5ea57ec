"""Evaluate directories side by side: teacher, students, artifacts, on one task.

    results = run(["runs/teacher", "runs/student", "out/onnx"], data="test.jsonl")
    write_jsonl(results, "results.jsonl")
    print(render(results, "markdown"))

Examples are read once, here. First all rows are timed in turn (alternate.py); then every row
predicts every split in a process of its own (worker.py). The metrics are computed here from the
predictions (summary.py), so a metric cannot depend on the backend. What is measured is kept in a
store (store.py): a run that was killed goes on, and a finished one measures nothing again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitdistill import manifest
from bitdistill.backends.search import Search
from bitdistill.evals import environment
from bitdistill.evals.directories import (
    RUNTIME_PACKAGES,
    Directory,
    Variant,
    choose_task,
    open_directories,
)
from bitdistill.evals.examples import ExampleSet, read_sets
from bitdistill.evals.predict import Options, Scoring
from bitdistill.evals.process import THREAD_VARIABLES, run_worker
from bitdistill.evals.results import Result
from bitdistill.evals.store import Store, read_complete
from bitdistill.tasks import Task

if TYPE_CHECKING:
    from bitdistill.evals.bench import Plan

ISA_VARIABLE = "BITDISTILL_ISA"  # which of our kernels run
Progress = Callable[[str, int, int], None]
Outcome = dict[str, Any]
Execute = Callable[[dict[str, Any], Progress], Outcome]
TimeRows = Callable[[Sequence[dict[str, Any]], Progress], list[Outcome]]


def run(
    paths: str | Path | Variant | Sequence[str | Path | Variant],
    task: Task | str | None = None,
    data: str | Path | Sequence[str | Path] | None = None,
    *,
    split: str | Sequence[str] | None = None,
    limit: int | None = None,
    columns: dict[str, str] | None = None,
    threads: int | None = None,
    device: str | None = None,
    floor: bool = False,
    speed: bool = True,
    seed: int = 0,
    batch_size: int = 16,
    max_length: int | None = None,
    scoring: Scoring = "likelihood",
    search: dict[str, Any] | None = None,
    plan: Plan | None = None,
    llama_bench: str | Path | None = None,
    store: str | Path | None = None,
    progress: Progress | None = None,
    execute: Execute = run_worker,
    time: TimeRows | None = None,
) -> list[Result]:
    """Evaluate a directory, or each of several, on a task; one Result per row, split and metric.

    `task` defaults to the one in the first directory's manifest. `data` is one or more local files,
    each a split named after it; without one (and without `split`), the validation file that
    training recorded, else the splits of the task's hub data set. `limit` takes the first examples.
    `max_length` is in tokens, prompt and answer together; the shortest context of the artifacts by
    default. `device` ("cuda") is where directories in PyTorch predict, and `floor` adds students in
    fp64: how many predictions rounding alone changes; both only without `speed`. `scoring`
    is how label tasks are answered, `search` how summaries are generated (fields of
    backends.generation.Search; the task's `max_new_tokens` by default). `plan` says what is timed,
    `llama_bench` names the program that times GGUF files. `store` is a folder that keeps what was
    measured (None: nothing is kept). `progress` is called with "<directory>: <stage>", done and
    total; `execute` and `time` run the work (None: alternate.py).

    Everything is checked before the first model is loaded: FormatError, ValueError, ImportError or
    FileNotFoundError say what is wrong. WorkerError when a directory cannot be evaluated.
    """
    if speed and (device is not None or floor):
        raise ValueError(
            "speed is that of rows as they are deployed; ask for device and floor in a run without"
            " it (--no-speed)"
        )
    paths = [paths] if isinstance(paths, str | Path | Variant) else paths
    directories = open_directories(paths, device, floor)
    program = _llama_bench(directories, llama_bench) if speed else None
    task = choose_task(directories, task)
    _check_options(task, scoring, search)
    sets = read_sets(directories, task, data, split, limit, columns)
    if max_length is None:  # the same prompts for every row, also where one context is shorter
        max_length = min((d.context for d in directories if d.context), default=None)
    perplexity = task.kind == "summary" and "perplexity" in task.metrics
    generate = Search(**{"max_new_tokens": task.max_new_tokens, **(search or {})})
    options = Options(max_length, batch_size, scoring, generate, perplexity)
    say = progress or (lambda stage, done, total: None)
    with contextlib.ExitStack() as stack:
        folder = store or stack.enter_context(tempfile.TemporaryDirectory(prefix="bitdistill-"))
        work = _Work(Store(Path(folder)), task, options, threads, seed, say, execute, time)
        speeds = None
        if speed:
            speeds = work.time_all(directories, plan, program)
        rows = [work.predict(directory, sets) for directory in directories if directory.is_scored]
    settings = {
        "threads": threads,
        "limit": limit,
        "seed": seed,
        "options": dataclasses.asdict(options),
        "task": manifest.fingerprint(task.to_json()),
    }
    from bitdistill.evals.summary import Measured, summarise

    by_split = [list(column) for column in zip(*rows, strict=True)]
    return summarise(Measured(directories, task, sets, by_split, speeds, seed, settings))


def _check_options(task: Task, scoring: Scoring, search: dict[str, Any] | None) -> None:
    """ValueError for what a task of this kind would leave unused."""
    if task.kind == "label" and search:
        raise ValueError(
            f"beams, length penalty and new tokens are of summaries, and task {task.name!r} has "
            "labels; leave them out"
        )
    if task.kind == "summary" and scoring == "greedy":
        raise ValueError(
            f"scoring is of label tasks, and the summaries of task {task.name!r} are generated "
            "anyway; leave it out"
        )


def _llama_bench(directories: Sequence[Directory], name: str | Path | None) -> Path | None:
    """The program that times GGUF files, or None where llama-cpp-python does."""
    from bitdistill.evals import gguf

    files = [directory.path for directory in directories if not directory.is_scored]
    if name is not None:
        return gguf.find_program(name)
    if files:
        gguf.require_package(files[0])
    return None


@dataclass(frozen=True)
class _Work:
    """Everything that one run measures, each thing once."""

    store: Store
    task: Task
    options: Options
    threads: int | None
    seed: int
    say: Progress
    execute: Execute
    time: TimeRows | None

    def predict(self, directory: Directory, sets: Sequence[ExampleSet]) -> list[Outcome]:
        """Predictions of one row on every split, from the store where they are there."""
        found: dict[str, Outcome] = {}
        missing: dict[str, dict[str, Any]] = {}
        files: dict[str, str] = {}
        for part in sets:
            identity = self._identity(directory, part)
            log = self.store.predictions(identity)
            files[part.split] = log.name
            known = read_complete(log, len(part.examples))
            if known is not None:
                found[part.split] = known
            else:
                examples = [vars(example) for example in part.examples]
                self.store.keep_examples(part.fingerprint, examples)
                missing[part.split] = {
                    "examples": examples, "log": str(log), "identity": identity,
                }  # fmt: skip
        if missing:
            outcome = self._execute(directory, list(missing.values()))
            found |= dict(zip(missing, outcome["parts"], strict=True))
        return [found[part.split] | {"file": files[part.split]} for part in sets]

    def _identity(self, directory: Directory, part: ExampleSet) -> dict[str, Any]:
        """Everything that predictions depend on."""
        return {
            "directory": directory.hash,
            "task": self.task.to_json(),
            "examples": part.fingerprint,
            "options": dataclasses.asdict(self.options),
            **self._conditions([directory]),
        }

    def _execute(self, directory: Directory, parts: list[dict[str, Any]]) -> Outcome:
        job = {
            "path": str(directory.path),
            "load": directory.load,
            "task": self.task.to_json(),
            "threads": self.threads,
            "options": dataclasses.asdict(self.options),
            "parts": parts,
        }
        name = directory.name
        return self.execute(job, lambda stage, d, n: self.say(f"{name}: {stage}", d, n))

    def time_all(
        self, directories: Sequence[Directory], plan: Plan | None, llama_bench: Path | None
    ) -> list[Outcome]:
        """Timings of all rows, made together; timings of another set of rows are not reused."""
        from bitdistill.evals.alternate import time_rows
        from bitdistill.evals.bench import Plan

        plan, time = plan or Plan(), self.time or time_rows
        common = {"threads": self.threads, "plan": dataclasses.asdict(plan), "seed": self.seed}
        identity = {
            "rows": [directory.hash for directory in directories],
            "llama_bench": None if llama_bench is None else manifest.hash_file(llama_bench),
            **common,
            **self._conditions(directories),
        }
        jobs: list[dict[str, Any]] = [
            common
            | {
                "path": str(directory.path),
                "name": directory.name,
                "bytes": directory.bytes,
                "load": directory.load,
                "llama_bench": None
                if directory.is_scored or llama_bench is None
                else str(llama_bench),
            }
            for directory in directories
        ]
        measured: list[Outcome] = self.store.once(identity, lambda: time(jobs, self.say))
        return measured

    def _conditions(self, directories: Sequence[Directory]) -> dict[str, Any]:
        """What else a measurement depends on: threads, cores, instruction set, versions."""
        packages = {"bitdistill", "tokenizers"}.union(
            *(RUNTIME_PACKAGES.get(directory.backend, ()) for directory in directories)
        )
        return {
            "threads": self.threads,
            # a worker that is told its threads sets these variables itself
            "variables": {
                name: os.environ.get(name)
                for name in (ISA_VARIABLE, *(THREAD_VARIABLES if self.threads is None else ()))
            },
            "cores": environment.usable_cores(),
            "processor": environment.machine()["processor"],
            "versions": {name: environment.version(name) for name in sorted(packages)},
        }
