"""Rows are repeated in turn, each in a process of its own; failures become one sentence."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from bitdistill.evals import alternate
from bitdistill.evals.alternate import time_rows
from bitdistill.evals.bench import Repeat
from bitdistill.evals.gguf import LlamaBench, LlamaCpp
from bitdistill.evals.process import WorkerError
from bitdistill.evals.timer import serve


def job(path: Path, name: str = "row", **changes: Any) -> dict[str, Any]:
    plan = {"prefill_tokens": 8, "decode_tokens": 4, "repeats": 3, "budget": 60.0}
    return {
        "path": str(path), "name": name, "bytes": 1000, "threads": 1, "load": {}, "plan": plan,
        "seed": 0,
    } | changes  # fmt: skip


def silent(stage: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


class Recorder:
    """A row that notes what is asked of it."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.name, self.facts, self.memory = job["name"], {"prefill_tokens": 8}, {"serve": 1.0}
        self.events: list[tuple[str, str]] = job["load"]["events"]

    def start(self) -> None:
        self.events.append((self.name, "start"))

    def repeat(self) -> Repeat:
        self.events.append((self.name, "repeat"))
        return Repeat(0.1, [0.1])

    def end(self) -> None:
        self.events.append((self.name, "end"))

    def close(self) -> None:
        self.events.append((self.name, "close"))


@pytest.mark.parametrize("together", [True, False])
def test_rows_take_turns(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, together: bool) -> None:
    monkeypatch.setattr(alternate, "TimedProcess", Recorder)
    monkeypatch.setattr(alternate, "available_memory", lambda: 1e9 if together else 3000.0)
    events: list[tuple[str, str]] = []
    jobs = [job(tmp_path, name, load={"events": events}) for name in "ab"]
    jobs[1]["plan"] = jobs[1]["plan"] | {"repeats": 2}
    figures = time_rows(jobs, silent)
    repeats = [name for name, event in events if event == "repeat"]
    assert repeats == ["a", "b", "a", "b", "a"]
    starts = [(name, "start") for name in repeats]  # a row warms up for each of its turns
    assert [e for e in events if e[1] in ("start", "repeat")] == [
        event for start in starts for event in (start, (start[0], "repeat"))
    ]
    assert [len(f["speed"]["rounds"]) for f in figures] == [3, 2]
    assert figures[0]["facts"] == {
        "prefill_tokens": 8, "alternated": True, "loaded_together": together,
    }  # fmt: skip
    ends = [event for name, event in events if name == "a" and event == "end"]
    assert len(ends) == (1 if together else 4)  # also after each repeat
    assert events[-2:] == [("a", "close"), ("b", "close")]


@pytest.mark.parametrize("together", [True, False])
def test_a_row_alone_stays_warm(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, together: bool
) -> None:
    monkeypatch.setattr(alternate, "TimedProcess", Recorder)
    monkeypatch.setattr(alternate, "available_memory", lambda: 1e9 if together else 1000.0)
    events: list[tuple[str, str]] = []
    time_rows([job(tmp_path, "a", load={"events": events})], silent)
    assert [event for _, event in events].count("start") == (1 if together else 3)


def test_a_process_warms_up_when_it_is_asked_to(tmp_path: Path, table_runtime: Any) -> None:
    said: list[dict[str, Any]] = []
    runtime = table_runtime()
    serve(job(tmp_path), lambda *_, **__: runtime, ["warm\n", "repeat\n"], said.append)
    assert [next(iter(answer)) for answer in said] == ["prefill_tokens", "warm", "first", "memory"]
    assert runtime.fed == [*(8, 1, 1), *(8, 1), *(8, 1, 1, 1, 1)]  # loading, warm, repeat


def test_a_row_over_its_budget_is_repeated_less(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(alternate, "TimedProcess", Recorder)
    events: list[tuple[str, str]] = []
    jobs = [job(tmp_path, name, load={"events": events}) for name in "ab"]
    jobs[0]["plan"] = jobs[0]["plan"] | {"budget": 0.0}
    figures = time_rows(jobs, silent)
    assert [len(f["speed"]["rounds"]) for f in figures] == [1, 3]


def test_real_models_in_turn(student_dir: Callable[..., Path], tmp_path: Path) -> None:
    from bitdistill.exporters.base import export

    student = student_dir("qwen3", "paper")
    artifact = export(student, "onnx", tmp_path / "onnx")
    seen: list[str] = []
    figures = time_rows(
        [job(student, "student"), job(artifact, "onnx")],
        lambda stage, done, total: seen.append(f"{stage} {done}/{total}"),
    )
    assert seen == [f"{row}: time {i}/3" for i in range(3) for row in ("student", "onnx")]
    for figure, package in zip(figures, ("torch", "onnxruntime"), strict=True):
        assert len(figure["speed"]["rounds"]) == 3
        assert figure["speed"]["decode"] > 0
        assert package in figure["facts"]["versions"]
        memory = figure["memory"]
        assert 0 < memory["bare"] < 60
        assert memory["bare"] < memory["load"] <= memory["serve"]
    assert "torch" not in figures[1]["facts"]["versions"]
    assert figures[1]["memory"]["serve"] < figures[0]["memory"]["serve"]


def test_a_row_that_cannot_be_timed_is_named(tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match=r"none cannot be timed: .*does not exist; check the"):
        time_rows([job(tmp_path / "none")], silent)


def test_a_row_that_dies_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "suicide.py").write_text("import os\nos.kill(os.getpid(), 9)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    row = alternate.TimedProcess(job(tmp_path), module="suicide")
    with pytest.raises(WorkerError, match=r"was killed \(signal 9\), most likely for lack of"):
        row.start()
    row.close()


@pytest.mark.parametrize("turn", ["start", "repeat"])
def test_a_row_that_died_before_its_turn_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, turn: str
) -> None:
    """The system takes the memory that rows loaded side by side are short of at any time."""
    body = "import os\nprint('{\"prefill_tokens\": 8}', flush=True)\nos.kill(os.getpid(), 9)\n"
    (tmp_path / "sleeper.py").write_text(body)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    row = alternate.TimedProcess(job(tmp_path), module="sleeper")
    row.start()
    assert row._process is not None
    row._process.popen.wait()
    with pytest.raises(WorkerError, match=r"was killed \(signal 9\), most likely for lack of"):
        getattr(row, turn)()
    row.close()


def program(path: Path, body: str) -> str:
    path.write_text(f"#!{sys.executable}\n{body}")
    path.chmod(0o755)
    return str(path)


def test_llama_bench(tmp_path: Path) -> None:
    tests = [{"n_prompt": 8, "n_gen": 0, "samples_ns": [2e9], "build_commit": "abc"},
             {"n_prompt": 0, "n_gen": 4, "samples_ns": [1e9], "build_commit": "abc"}]  # fmt: skip
    body = (
        "import json, sys, time\nx = bytearray(30_000_000)\ntime.sleep(0.2)\n"
        f"open({str(tmp_path / 'seen')!r}, 'w').write(' '.join(sys.argv[1:]))\n"
        f"print(json.dumps({tests!r}))\n"
    )
    name = program(tmp_path / "llama-bench", body)
    gguf = tmp_path / "model.gguf"
    (figures,) = time_rows([job(gguf, llama_bench=name)], silent)
    assert (tmp_path / "seen").read_text() == f"-m {gguf} -o json -r 1 -p 8 -n 4 -t 1"
    assert (figures["speed"]["prefill"], figures["speed"]["decode"]) == (4.0, 4.0)
    assert figures["facts"]["versions"] == {"llama.cpp": "abc"}
    assert figures["memory"]["serve"] > 28


def test_llama_bench_that_fails(tmp_path: Path) -> None:
    name = program(tmp_path / "bad", "import sys\nsys.exit('error: no such model')\n")
    with pytest.raises(WorkerError, match=r"bad failed on .*m.gguf: error: no such model"):
        LlamaBench(job(tmp_path / "m.gguf", llama_bench=name)).repeat()
    with pytest.raises(WorkerError, match=r"nothing cannot be run .*; give a llama-bench"):
        LlamaBench(job(tmp_path / "m.gguf", llama_bench=str(tmp_path / "nothing"))).repeat()


def test_gguf_through_llama_cpp_python(monkeypatch: pytest.MonkeyPatch) -> None:
    from bitdistill.evals.bench import Plan, measure

    calls: list[Any] = []

    class Llama:
        """The part of the package's class that is used."""

        def __init__(self, path: str, **options: Any) -> None:
            calls.append((path, options["n_threads"]))
            self._scores = np.zeros((0, 7), np.float32)

        def n_vocab(self) -> int:
            return 7

        def reset(self) -> None:
            calls.append("reset")
            self._scores = self._scores[:0]

        def eval(self, tokens: list[int]) -> None:
            calls.append(len(tokens))
            self._scores = np.vstack([self._scores, np.zeros((len(tokens), 7), np.float32)])

    monkeypatch.setitem(sys.modules, "llama_cpp", SimpleNamespace(Llama=Llama))
    measure(LlamaCpp("model.gguf", 2), Plan(8, 2, 1))  # type: ignore[arg-type]
    assert calls == [("model.gguf", 2), "reset", 8, 1, 1, "reset", 8, 1, 1]
