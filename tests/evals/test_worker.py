"""Evaluation in processes of their own: real students, honest memory, failures in one sentence."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bitdistill import manifest
from bitdistill.evals import Plan, environment, process, run, worker
from bitdistill.evals.predict import Options
from bitdistill.evals.process import WorkerError, run_worker
from bitdistill.evals.worker import execute
from bitdistill.tasks import Task

TASK = Task(
    "mood", "label", "{text}\nMood:", ("text",), "label", (" not bad", " good", " dull"),
    max_new_tokens=4,
)  # fmt: skip
TEXTS = ["the film is not good", "we liked it a plot", "very dull and bright", "it is bad"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "test.jsonl"
    rows = [{"text": text, "label": i % 3} for i, text in enumerate(TEXTS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def job(path: Path, **changes: Any) -> dict[str, Any]:
    return {
        "path": str(path), "task": TASK.to_json(), "threads": 1, "load": {},
        "options": dataclasses.asdict(Options(batch_size=4)), "parts": [],
    } | changes  # fmt: skip


def silent(stage: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


def test_importing_evals_loads_no_runtime_and_no_data_package() -> None:
    code = (
        "import sys, bitdistill.evals.runner, bitdistill.evals.tables, bitdistill.evals.worker\n"
        "import bitdistill.evals.predict, bitdistill.evals.bench, bitdistill.evals.parity\n"
        "heavy = ['torch', 'transformers', 'onnxruntime', 'mlx', 'datasets', 'sacrebleu', 'nltk']\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_run_starts_its_processes_before_it_imports_numpy() -> None:
    code = (
        "import sys, bitdistill.cli, bitdistill.evals.runner, bitdistill.evals.process\n"
        "print([name for name in ('numpy', 'tokenizers', 'importlib.abc') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_peak_memory_is_not_inherited_from_a_large_parent() -> None:
    ballast = bytearray(400 * environment.MIB)
    ballast[::4096] = b"x" * len(ballast[::4096])
    code = "from bitdistill.evals.environment import peak_memory; print(peak_memory())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert environment.peak_memory() > 400
    assert float(done.stdout) < 300


def test_a_student_and_its_artifacts_side_by_side(
    student_dir: Callable[..., Path], data: Path, tmp_path: Path
) -> None:
    from bitdistill.exporters.base import export

    path = student_dir("qwen3", "paper")
    artifacts = [export(path, target, tmp_path / target) for target in ("onnx", "mlx")]
    stages: set[str] = set()
    results = run(
        [path, *artifacts], TASK, data, threads=1, plan=Plan(repeats=1),
        progress=lambda stage, done, total: stages.add(stage.split(": ")[1]),
    )  # fmt: skip
    table = {(r.backend, r.metric): r for r in results}
    assert stages == {"load", "time", "predict"}
    for backend, package in (("torch", "torch"), ("onnx", "onnxruntime"), ("mlx", "mlx")):
        accuracy = table[backend, "accuracy"]
        assert accuracy.n == 4
        assert accuracy.value == pytest.approx(100 * _hits(path, data) / 4)
        assert package in accuracy.versions
        assert ("torch" in accuracy.versions) == (backend == "torch")
        seconds = accuracy.settings["seconds"]
        assert 0 < seconds["compute"] < seconds["predict"]
        assert accuracy.settings["peak_memory_mib"] > 20
        assert table[backend, "decode_speed"].value > 0
        assert accuracy.settings["options"]["max_length"] == 128
    assert ("torch", "agreement") not in table
    assert table["onnx", "agreement"].value == table["mlx", "agreement"].value == 100.0
    assert table["onnx", "size_on_disk"].value < table["torch", "size_on_disk"].value


def _hits(path: Path, data: Path) -> int:
    """Correct predictions by a plain loop over the student in PyTorch."""
    import torch

    from bitdistill import checkpoint

    model, tokenizer = checkpoint.load(path), checkpoint.load_tokenizer(path)
    hits = 0
    for row in map(json.loads, data.read_text().splitlines()):
        prompt = tokenizer(TASK.prompt.format(**row)).input_ids
        scores = []
        for label in TASK.labels:
            answer = tokenizer(label, add_special_tokens=False).input_ids
            with torch.no_grad():
                logits = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
            tail = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
            scores.append(sum(float(logits[t, a]) for t, a in zip(tail, answer, strict=True)))
        hits += scores.index(max(scores)) == row["label"]
    return hits


def in_process(job: dict[str, Any], progress: Any) -> dict[str, Any]:
    """A worker's work without its process, whose start takes seconds."""
    from bitdistill.backends import load

    return execute(job, progress, load)


def test_a_summary_task_gives_rouge_and_bleu(student_dir: Callable[..., Path], data: Path) -> None:
    task = dataclasses.replace(TASK, kind="summary", labels=(), target="text", name="echo")
    path = student_dir("qwen3", "paper")
    results = run([path], task, data, speed=False, limit=2, execute=in_process)
    names = [r.metric for r in results]
    assert names[:5] == ["rouge1", "rouge2", "rougeL", "rougeLsum", "bleu"]
    assert all(r.n == 2 and 0 <= r.value <= 100 for r in results[:5])
    task = dataclasses.replace(task, metrics=("bleu", "perplexity"))
    search = {"beams": 2, "min_new_tokens": 2}
    results = run([path], task, data, speed=False, search=search, execute=in_process)
    found = {r.metric: r for r in results}
    assert set(found) == {"bleu", "perplexity", "size_on_disk", "size_ratio"}
    assert found["perplexity"].value > 1
    assert found["bleu"].settings["options"]["search"] == {
        "max_new_tokens": 4, "min_new_tokens": 2, "beams": 2, "length_penalty": 1.0,
    }  # fmt: skip


def test_labels_by_greedy_generation(student_dir: Callable[..., Path], data: Path) -> None:
    path = student_dir("qwen3", "paper")
    results = run([path], TASK, data, speed=False, scoring="greedy", execute=in_process)
    found = {r.metric: r for r in results}
    assert set(found) == {"accuracy", "size_on_disk", "size_ratio"}  # no likelihoods, no ECE
    confusion = found["accuracy"].details["confusion"]
    assert sum(map(sum, confusion)) == 4
    assert found["accuracy"].value == 25 * sum(confusion[i][i] for i in range(3))


def test_an_altered_file_gives_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "artifact"
    path.mkdir()
    (path / "model.onnx").write_bytes(b"one")
    manifest.write_manifest(path, "artifact", {"target": "onnx"})
    (path / "model.onnx").write_bytes(b"two")
    with pytest.raises(WorkerError, match="does not match the hash in its manifest") as caught:
        run_worker(job(path), silent)
    assert "\n" not in str(caught.value)


def test_a_worker_that_breaks_leaves_its_last_words(tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match=r"failed \(exit status 1\): .*No module named") as caught:
        run_worker(job(tmp_path), silent, module="bitdistill.evals.nothing")
    assert "No module named" in caught.value.tail


def test_a_killed_worker_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "suicide.py").write_text(
        "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(
        WorkerError, match=r"was killed \(signal 9\), most likely for lack of memory"
    ):
        run_worker(job(tmp_path), silent, module="suicide")


def test_progress_is_passed_on_and_other_output_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "talker.py").write_text(
        "import json, pathlib, sys\n"
        "print('a library says hello')\n"
        "print(json.dumps({'stage': 'load', 'done': 1, 'total': 2}))\n"
        "print('[1]')\n"
        "pathlib.Path(sys.argv[1]).with_name('outcome.json').write_text('{\"backend\": \"x\"}')\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    seen: list[Any] = []
    outcome = run_worker(job(tmp_path), lambda *event: seen.append(event), module="talker")
    assert (outcome, seen) == ({"backend": "x"}, [("load", 1, 2)])


def test_an_answer_is_taken_before_the_worker_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "slow.py").write_text(
        "import json, os, pathlib, sys, time\n"
        "folder = pathlib.Path(sys.argv[1]).parent\n"
        "sys.stdin.readline()\n"
        "outcome = json.loads((folder / 'asked.json').read_text()) | {'pid': os.getpid()}\n"
        "(folder / 'outcome.json').write_text(json.dumps(outcome))\n"
        "print(json.dumps({'stage': 'done', 'done': 1, 'total': 1}), flush=True)\n"
        "time.sleep(600)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    seen: list[Any] = []
    outcome = run_worker(job(tmp_path), lambda *event: seen.append(event), module="slow")
    assert (outcome["task"], outcome["parts"], seen) == (
        json.loads(json.dumps(TASK.to_json())),
        [],
        [],
    )
    for thread in threading.enumerate():  # one waits for the process, which was told to end
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join(60)
    with pytest.raises(ProcessLookupError):
        os.kill(outcome["pid"], 0)


def test_progress_is_said_twice_a_second(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([10.0, 10.1, 10.2, 10.7, 10.8, 10.9])
    monkeypatch.setattr("bitdistill.evals.worker.time.perf_counter", lambda: next(clock))
    progress = worker.Printer()
    for stage, done in (("load", 0), ("load", 1), *(("predict", done) for done in (1, 2, 3, 4))):
        progress(stage, done, 1 if stage == "load" else 4)
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["stage"], line["done"]) for line in said] == [
        ("load", 0), ("load", 1), ("predict", 1), ("predict", 2), ("predict", 4)
    ]  # fmt: skip


def test_texts_are_encoded_where_the_run_is_asked_for(student_dir: Callable[..., Path]) -> None:
    """The worker is told the ids that it would find itself."""
    from bitdistill.backends import load

    path = student_dir("qwen3", "paper")
    examples = [
        {"index": i, "prompt": f"{text}\nMood:", "answer": " good", "label": 1}
        for i, text in enumerate(TEXTS)
    ]
    asked = job(path, parts=[{"examples": examples}])
    (part,) = process.encoded(asked)
    tokenizer = load(path).tokenizer
    assert part["encoded"] == {
        "prompts": [tokenizer.encode(example["prompt"]) for example in examples],
        "suffix": tokenizer.encode("\nMood:", special=False),
        "answers": [tokenizer.encode(label, special=False) for label in TASK.labels],
    }
    elsewhere = asked | {"path": str(path / "no such place")}
    assert process.encoded(elsewhere) == asked["parts"]  # the worker says what is wrong


def test_an_interrupted_run_ends_its_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "slow.py").write_text(
        "import json, os, time\n"
        "print(json.dumps({'stage': 'x', 'done': os.getpid(), 'total': 1}), flush=True)\n"
        "time.sleep(600)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    pids: list[int] = []

    def interrupt(stage: str, done: int, total: int) -> None:
        pids.append(done)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_worker(job(tmp_path), interrupt, module="slow")
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)


def test_weights_fingerprint_is_that_of_the_exporter(student_dir: Callable[..., Path]) -> None:
    from bitdistill import checkpoint
    from bitdistill.evals.directories import weights_fingerprint

    path = student_dir("qwen3", "paper")
    assert weights_fingerprint(manifest.read_manifest(path)) == (
        checkpoint.open_student(path).fingerprint
    )
