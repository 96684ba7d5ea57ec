"""A GGUF file as a row of the benchmark: through a llama-bench program, or llama-cpp-python.

For speed and memory alone; the model inside is somebody else's quantisation of the same shape.
llama-bench decodes from an empty context, where the other rows decode after the prompt.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitdistill.evals.bench import Plan, Repeat
from bitdistill.evals.process import WorkerError

POLL_SECONDS = 0.02


def find_program(name: str | Path) -> Path:
    """The llama-bench that a name or path means; FileNotFoundError where it cannot be run."""
    found = shutil.which(name)
    if found is None:
        raise FileNotFoundError(f"{name} is not a program; give the path of llama-bench")
    return Path(found)


def require_package(path: Path) -> None:
    """ImportError with the pip command where llama-cpp-python, which times `path`, is missing."""
    if find_spec("llama_cpp") is None:
        raise ImportError(
            f"{path} needs llama-cpp-python, which is not installed; run: pip install "
            "llama-cpp-python, or give a llama-bench program"
        )


class LlamaCpp:
    """What the benchmark needs of a runtime, on llama-cpp-python."""

    name = "llama.cpp"
    context = 2048

    def __init__(self, path: str, threads: int | None) -> None:
        from llama_cpp import Llama

        self.model = Llama(
            path,
            n_ctx=self.context,
            n_batch=512,
            n_threads=threads,
            n_threads_batch=threads,
            verbose=False,
        )
        self.vocabulary = int(self.model.n_vocab())

    def new_cache(self, capacity: int) -> Any:
        """The model holds one sequence; a new one forgets the old."""
        self.model.reset()
        return SimpleNamespace(length=0, capacity=capacity)

    def step(self, tokens: Sequence[int], cache: Any) -> NDArray[np.float32]:
        """Feed tokens of the sequence; float32 (V,) logits of the last."""
        self.model.eval(list(tokens))
        cache.length += len(tokens)
        return np.array(self.model._scores[-1], np.float32)


class LlamaBench:
    """A row timed by `llama-bench`, a process for each repeat (its loading is not counted)."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.job, self.plan = job, Plan(**job["plan"])
        self.facts: dict[str, Any] = {
            "prefill_tokens": self.plan.prefill_tokens,
            "backend": "llama.cpp",
            "versions": {},
        }
        self.memory: dict[str, float] = {}
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Nothing stays loaded; the program warms up by itself."""

    def repeat(self) -> Repeat:
        """Prefill and decode, each timed by the program itself; per-token times are its mean."""
        tests = self._run()
        seconds = {}
        for test in tests:
            kind = "prefill" if test["n_gen"] == 0 else "decode"
            seconds[kind] = test["samples_ns"][0] / 1e9
            self.facts["versions"] = {"llama.cpp": str(test.get("build_commit", "unknown"))}
        count = self.plan.decode_tokens
        return Repeat(seconds["prefill"], [seconds["decode"] / count] * count)

    def _run(self) -> list[dict[str, Any]]:
        program, plan = self.job["llama_bench"], self.plan
        command = [program, "-m", self.job["path"], "-o", "json", "-r", "1"]
        command += ["-p", str(plan.prefill_tokens), "-n", str(plan.decode_tokens)]
        if self.job["threads"] is not None:
            command += ["-t", str(self.job["threads"])]
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
        except OSError as error:
            raise WorkerError(f"{program} cannot be run ({error}); give a llama-bench") from error
        watch = threading.Thread(target=self._watch_memory, args=(self._process,))
        watch.start()
        out, err = self._process.communicate()
        watch.join()
        if self._process.returncode:
            last = (err.decode("utf-8", errors="replace").strip() or "no message").splitlines()[-1]
            raise WorkerError(f"{program} failed on {self.job['path']}: {last}")
        tests: list[dict[str, Any]] = json.loads(out)
        return tests

    def _watch_memory(self, process: subprocess.Popen[bytes]) -> None:
        """The high-water mark of the process, as long as it can be read."""
        status, peak = Path(f"/proc/{process.pid}/status"), 0.0
        while process.poll() is None:
            try:
                lines = status.read_text(encoding="utf-8").splitlines()
            except OSError:
                break
            marks = [int(line.split()[1]) for line in lines if line.startswith("VmHWM:")]
            peak = max([peak, *(mark / 1024 for mark in marks)])
            threading.Event().wait(POLL_SECONDS)
        if peak:
            self.memory = {"bare": 0.0, "serve": max(peak, self.memory.get("serve", 0.0))}

    def end(self) -> None:
        """Nothing stays loaded."""

    def close(self) -> None:
        """End the program, if it runs."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()
