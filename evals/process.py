"""Start a worker process, pass its progress on, and turn its failure into one sentence."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

Progress = Callable[[str, int, int], None]
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
TAIL = 2000


class WorkerError(RuntimeError):
    """A directory could not be evaluated; `tail` is the end of what its process wrote on stderr."""

    def __init__(self, message: str, tail: str = "") -> None:
        super().__init__(message)
        self.tail = tail


def run_worker(
    job: dict[str, Any], progress: Progress, module: str = "bitdistill.evals.worker"
) -> dict[str, Any]:
    """Run one job (see worker.py) in a fresh Python process and return its outcome.

    The process is ended when this call is interrupted. Raises WorkerError.
    """
    with tempfile.TemporaryDirectory(prefix="bitdistill-eval-") as folder:
        job_file = Path(folder) / "job.json"
        job_file.write_text(json.dumps(job), encoding="utf-8")
        with (Path(folder) / "stderr").open("w+b") as stderr:
            code = _wait([sys.executable, "-m", module, str(job_file)], job, stderr, progress)
            stderr.seek(0)
            tail = stderr.read()[-TAIL:].decode("utf-8", errors="replace").strip()
        outcome_file = job_file.with_name("outcome.json")
        if not outcome_file.is_file():
            raise WorkerError(_sentence(job["path"], code, tail), tail)
        outcome = json.loads(outcome_file.read_text(encoding="utf-8"))
    if "error" in outcome:
        raise WorkerError(f"{job['path']} cannot be evaluated: {outcome['error']}", tail)
    return outcome


def _wait(command: list[str], job: dict[str, Any], stderr: Any, progress: Progress) -> int:
    environment = dict(os.environ)
    if job["threads"] is not None:
        environment |= dict.fromkeys(THREAD_VARIABLES, str(job["threads"]))
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr, env=environment
    )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            _pass_on(line, progress)
        return process.wait()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        process.stdout.close()


def _pass_on(line: bytes, progress: Progress) -> None:
    """Report a progress line; a library may print other things on stdout, which are dropped."""
    try:
        event = json.loads(line)
        step = str(event["stage"]), int(event["done"]), int(event["total"])
    except (ValueError, KeyError, TypeError):
        return
    progress(*step)


def _sentence(path: str, code: int, tail: str) -> str:
    if code == -9:
        return (
            f"the process that evaluated {path} was killed (signal 9), most likely for lack of "
            "memory; close other programs, or lower batch_size"
        )
    if code < 0:
        return f"the process that evaluated {path} ended by signal {-code}; run `bitdistill doctor`"
    last = tail.splitlines()[-1] if tail else "nothing on stderr"
    return f"the process that evaluated {path} failed (exit status {code}): {last}"
