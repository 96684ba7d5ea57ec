"""Start a worker process, pass its progress on, and turn its failure into one sentence."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from bitdistill.evals.predict import encode
from bitdistill.evals.worker import ASKED, DONE, OUTCOME
from bitdistill.manifest import FormatError
from bitdistill.tasks import Example, Task

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

    def ask(self, asked: dict[str, Any]) -> None:
        """Give a worker the rest of its job. One that has ended already says why elsewhere."""
        (self.folder / ASKED).write_text(json.dumps(asked), encoding="utf-8")
        with contextlib.suppress(BrokenPipeError):
            self.stdin.write(b"\n")
            self.stdin.flush()

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

    def close(self, wait: bool = True) -> None:
        """End the process, whatever it is doing; without `wait` it may live a little longer."""
        if self.popen.poll() is None:
            self.popen.kill()
            if wait:
                self.popen.wait()
            else:
                threading.Thread(target=self.popen.wait).start()
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

    While the process loads its runtime and model, the texts are encoded here: the tokenizer's
    parser would hold its interpreter. Once the outcome is there the process is ended, as it is when
    this call is interrupted. Raises WorkerError.
    """
    process = Process(module, {key: job[key] for key in ("path", "threads", "load")})
    try:
        process.ask({"task": job["task"], "options": job["options"], "parts": encoded(job)})
        from bitdistill.evals import summary  # noqa: F401  (the next to be needed)

        for line in process.stdout:
            if _pass_on(line, progress) == DONE:
                break
        outcome_file = process.folder / OUTCOME
        if not outcome_file.is_file():
            raise process.failure()
        outcome = json.loads(outcome_file.read_text(encoding="utf-8"))
        if "error" in outcome:
            message = f"{job['path']} cannot be evaluated: {outcome['error']}"
            raise WorkerError(message, process.failure().tail)
    except BaseException:
        process.close()
        raise
    process.close(wait=False)  # a loaded model takes a while to go
    return outcome


def encoded(job: dict[str, Any]) -> list[dict[str, Any]]:
    """The job's parts with the token ids of their texts.

    Without them where the directory has no tokenizer to read: the worker finds out in its turn,
    after it has checked every file, and knows the reason.
    """
    from bitdistill.backends.tokenizer import (
        Tokenizer,
    )  # the process starts before this is imported

    try:
        tokenizer = Tokenizer(Path(job["path"]))
    except FormatError:
        return list(job["parts"])
    task = Task.from_json(job["task"])
    return [
        part | {"encoded": vars(encode(tokenizer, task, [Example(**e) for e in part["examples"]]))}
        for part in job["parts"]
    ]


def read_answer(line: bytes) -> dict[str, Any] | None:
    """A JSON object on a line; None for what a library may have printed instead."""
    try:
        answer = json.loads(line)
    except ValueError:
        return None
    return answer if isinstance(answer, dict) else None


def _pass_on(line: bytes, progress: Progress) -> str | None:
    """Report a progress line, but for the last, and return its stage; other output is dropped."""
    event = read_answer(line) or {}
    if not {"stage", "done", "total"} <= set(event):
        return None
    stage = str(event["stage"])
    if stage != DONE:
        progress(stage, int(event["done"]), int(event["total"]))
    return stage


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
