"""One row of a benchmark, in a process of its own: `python -m bitdistill.evals.timer JOB`.

A fresh process makes the peak memory honest: nothing else was loaded before. It loads, warms up and
says so on stdout; then each line on stdin asks for one repeat, or to warm up again, and the end of
stdin for the end. Answers are JSON lines. So several rows can be loaded and repeated in turn
(alternate.py).
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from bitdistill.evals.environment import peak_memory, versions


def serve(
    job: dict[str, Any],
    load: Callable[..., Any],
    requests: Iterable[str],
    say: Callable[[dict[str, Any]], None],
) -> None:
    """Answer requests, `warm` or `repeat`. Memory is in MiB: bare process, model loaded, peak."""
    bare = peak_memory()
    from bitdistill.evals.bench import Bench, Plan

    runtime = load(job["path"], threads=job["threads"], **job["load"])
    loaded = peak_memory()
    bench = Bench(runtime, Plan(**job["plan"]), job["seed"])
    say({"prefill_tokens": bench.prefill_tokens, "backend": runtime.name, "versions": versions()})
    for request in requests:
        if request.strip() == "warm":
            bench.warm()
            say({"warm": True})
        else:
            say(dataclasses.asdict(bench.repeat()))
    say({"memory": {"bare": bare, "load": loaded, "serve": peak_memory()}})


def _load(path: str, threads: int | None, **options: Any) -> Any:
    if path.endswith(".gguf"):
        from bitdistill.evals.gguf import LlamaCpp

        return LlamaCpp(path, threads)
    from bitdistill.backends import load  # here, so that the bare process is bare

    return load(path, threads=threads, **options)


def _say(answer: dict[str, Any]) -> None:
    print(json.dumps(answer), flush=True)


def main(job_file: str) -> int:
    """Serve a job file; 1 for an error that has a remedy, which is said as the last answer."""
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    try:
        serve(job, _load, sys.stdin, _say)
    except BrokenPipeError:  # whoever asked for this is gone
        return 1
    except (ValueError, OSError, ImportError, MemoryError) as error:
        _say({"error": f"{error}" or type(error).__name__})
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
