"""Start a worker process, pass its progress on, and turn its failure into one sentence."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

Progress = Callable[[str, int, int], None]
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
TAIL = 2000


class WorkerError(RuntimeError):
    """A directory could not be evaluated; `tail` is the end of what its process wrote on stderr."""

    def __init__(self, message: str, tail: str = "") -> None:
        super().__init__(message)
        self.tail = tail


class Process:
    """A Python module run on a job file, in a process that ends with this object's `close`.

    `folder` holds the job and what the process writes beside it.
    """

    def __init__(self, module: str, job: dict[str, Any]) -> None:
        self.path = job["path"]
        self._temporary = tempfile.TemporaryDirectory(prefix="bitdistill-eval-")
        self.folder = Path(self._temporary.name)
        file = self.folder / "job.json"
        file.write_text(json.dumps(job), encoding="utf-8")
        environment = dict(os.environ)
        if job["threads"] is not None:
            environment |= dict.fromkeys(THREAD_VARIABLES, str(job["threads"]))
        self._stderr = (self.folder / "stderr").open("w+b")
        self.popen = subprocess.Popen(
            [sys.executable, "-m", module, str(file)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=environment,
        )

    @property
    def stdin(self) -> IO[bytes]:
        assert self.popen.stdin is not None
        return self.popen.stdin

    @property
    def stdout(self) -> IO[bytes]:
        assert self.popen.stdout is not None
        return self.popen.stdout

    def failure(self) -> WorkerError:
        """What became of a process that ended without an answer, in one sentence."""
        code = self.popen.wait()
        self._stderr.seek(0)
        tail = self._stderr.read()[-TAIL:].decode("utf-8", errors="replace").strip()
        return WorkerError(_sentence(self.path, code, tail), tail)

    def close(self) -> None:
        """End the process, whatever it is doing."""
        if self.popen.poll() is None:
            self.popen.kill()
            self.popen.wait()
        self.stdout.close()
        try:
            self.stdin.close()
        except BrokenPipeError:
            self.popen.wait()  # it ended before it read everything, which its answer explained
        self._stderr.close()
        self._temporary.cleanup()


def run_worker(
    job: dict[str, Any], progress: Progress, module: str = "bitdistill.evals.worker"
) -> dict[str, Any]:
    """Run one job (see worker.py) in a fresh Python process and return its outcome.

    The process is ended when this call is interrupted. Raises WorkerError.
    """
    process = Process(module, job)
    try:
        for line in process.stdout:
            _pass_on(line, progress)
        outcome_file = process.folder / "outcome.json"
        failure = process.failure()
        if not outcome_file.is_file():
            raise failure
        outcome = json.loads(outcome_file.read_text(encoding="utf-8"))
        if "error" in outcome:
            message = f"{job['path']} cannot be evaluated: {outcome['error']}"
            raise WorkerError(message, failure.tail)
    finally:
        process.close()
    return outcome


def read_answer(line: bytes) -> dict[str, Any] | None:
    """A JSON object on a line; None for what a library may have printed instead."""
    try:
        answer = json.loads(line)
    except ValueError:
        return None
    return answer if isinstance(answer, dict) else None


def _pass_on(line: bytes, progress: Progress) -> None:
    """Report a progress line; other output is dropped."""
    event = read_answer(line) or {}
    if {"stage", "done", "total"} <= set(event):
        progress(str(event["stage"]), int(event["done"]), int(event["total"]))


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
