"""The runner's logic on invented outcomes: tasks, data, agreement, results, errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bitdistill import manifest
from bitdistill.evals import run
from bitdistill.evals.directories import open_directories
from bitdistill.tasks import Task

TASK = Task("mood", "label", "{text}\nMood:", ("text",), "label", (" bad", " good"))
PREDICTIONS = {"teacher": [1, 0, 1, 0], "student": [1, 0, 0, 0], "onnx": [1, 0, 1, 0]}
Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """`make(name, kind, **content)`: a directory that has a manifest and some bytes of weights."""

    def write(name: str, kind: str = "student", **content: Any) -> Path:
        path = tmp_path / name
        path.mkdir()
        (path / "model.safetensors").write_bytes(b"x" * 2**20)
        head = {"method": "bitdistill", "base_model": "tiny", "task": TASK.to_json()}
        manifest.write_manifest(path, kind, head | content)
        return path

    return write


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "heldout.jsonl"
    rows = [{"text": f"text {i}", "label": label} for i, label in enumerate([1, 0, 1, 1])]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def execute(job: dict[str, Any], progress: Any) -> dict[str, Any]:
    """What a worker would bring back."""
    progress("predict", 4, 4)
    name = Path(job["path"]).name
    return {
        "backend": "onnx" if name == "onnx" else "torch",
        "versions": {"python": "3"},
        "memory": {"bare": 10.0, "load": 20.0, "serve": 30.0, "evaluate": 40.0},
        "speed": {"prefill": 100.0, "decode": 50.0, "repeats": 3} if job["speed"] else None,
        "predictions": {
            "labels": PREDICTIONS[name], "texts": [], "truncated": 1, "prompt_tokens": 9,
            "single_token_answers": True,
        },
    }  # fmt: skip


def test_results_of_a_whole_run(make: Make, data: Path) -> None:
    student = make("student")
    fingerprint = open_directories([student])[0].student
    artifact = make("onnx", "artifact", target="onnx", student_fingerprint=fingerprint)
    teacher = make("teacher", "teacher", method="fp16-sft")
    seen: list[tuple[str, int, int]] = []
    results = run(
        [teacher, student, artifact], data=data, seed=5, execute=execute,
        progress=lambda *event: seen.append(event),
    )  # fmt: skip
    table = {(r.artifact, r.metric): r for r in results}
    assert {a: table[a, "accuracy"].value for a in PREDICTIONS} == {
        "teacher": 75.0, "student": 50.0, "onnx": 75.0,
    }  # fmt: skip
    assert [a for a, metric in table if metric == "agreement"] == ["onnx"]
    assert table["onnx", "agreement"].value == 75.0
    assert table["teacher", "size_on_disk"].value == pytest.approx(1.0, abs=0.01)
    assert table["onnx", "peak_memory"].value == 30.0
    assert table["onnx", "peak_memory_evaluation"].value == 40.0
    assert (table["student", "decode_speed"].value, table["student", "decode_speed"].n) == (50.0, 3)
    one = table["onnx", "accuracy"]
    assert (one.task, one.split, one.seed, one.n, one.unit) == ("mood", "heldout", 5, 4, "%")
    assert (one.method, one.backend, one.model) == ("bitdistill", "onnx", "tiny")
    assert one.student == fingerprint
    assert table["teacher", "accuracy"].student is None
    assert one.settings["truncated"] == 1
    assert one.settings["memory"]["bare"] == 10.0
    assert one.machine["cores"] >= 1
    assert seen == [(f"{name}: predict", 4, 4) for name in ("teacher", "student", "onnx")]


def test_artifacts_of_other_students_are_not_compared(make: Make, data: Path) -> None:
    paths = [make("student"), make("onnx", "artifact", target="onnx", student_fingerprint="no")]
    assert "agreement" not in {r.metric for r in run(paths, data=data, execute=execute)}


def test_without_speed_nothing_is_timed(make: Make, data: Path) -> None:
    metrics = {r.metric for r in run([make("student")], data=data, speed=False, execute=execute)}
    assert metrics == {"accuracy", "peak_memory_evaluation", "size_on_disk"}


def test_the_validation_file_of_training_is_the_default(make: Make, data: Path) -> None:
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    data.write_text(
        "".join(json.dumps({"words": r["text"], "label": r["label"]}) + "\n" for r in rows)
    )
    student = make("student", validation=str(data), columns={"text": "words"})
    results = run([student], execute=execute)
    assert (results[0].metric, results[0].n, results[0].split) == ("accuracy", 4, "heldout")


def test_a_name_means_the_recorded_task(make: Make, data: Path) -> None:
    teacher = make("teacher", "teacher", task=None)
    jobs: list[Any] = []

    def keep(job: dict[str, Any], progress: Any) -> dict[str, Any]:
        jobs.append(job)
        return execute(job, progress)

    run([teacher, make("student")], "mood", data, execute=keep)
    assert [Task.from_json(job["task"]) for job in jobs] == [TASK, TASK]
    assert jobs[0]["examples"][1] == {
        "index": 1, "prompt": "text 1\nMood:", "answer": " bad", "label": 0,
    }  # fmt: skip


def refuse(job: dict[str, Any], progress: Any) -> dict[str, Any]:
    raise AssertionError("no model may be loaded before everything is checked")


def test_bad_input_is_found_before_any_model_is_loaded(
    make: Make, data: Path, tmp_path: Path
) -> None:
    student = make("student")
    cases: list[tuple[list[Path], Any, Any, type[Exception], str]] = [
        ([], None, data, ValueError, "nothing to evaluate; give at least one"),
        ([tmp_path / "no"], None, data, manifest.FormatError, "no does not exist; check the path"),
        ([student, student], None, data, ValueError, "given twice; give each once"),
        ([student], "mod", data, ValueError, "unknown task 'mod'"),
        ([student], None, tmp_path / "no.csv", FileNotFoundError, "no.csv does not exist"),
        ([make("plain", task=None)], None, data, ValueError, "records no task; name one with"),
        ([make("corpus", "corpus")], None, data, ValueError, "holds a corpus; give a teacher"),
        (
            [make("tpu", "artifact", target="onx", student_fingerprint="")],
            None, data, ValueError, "is for backend 'onx'; did you mean 'onnx'?",
        ),
        (
            [student, make("other", task=TASK.to_json() | {"prompt": "{text} ?"})],
            None, data, ValueError, "trained for task 'mood' with another prompt",
        ),
    ]  # fmt: skip
    for paths, task, source, error, text in cases:
        with pytest.raises(error, match=text.replace("?", r"\?")):
            run(paths, task, source, execute=refuse)


def test_a_truncated_file_is_found_before_any_model_is_loaded(make: Make, data: Path) -> None:
    student = make("student")
    (student / "model.safetensors").write_bytes(b"short")
    with pytest.raises(manifest.FormatError, match="truncated or altered; make or copy"):
        run([student], data=data, execute=refuse)


@pytest.mark.parametrize(
    ("backend", "package"), [("onnx", "onnxruntime"), ("mlx", "mlx"), ("torch", "torch")]
)
def test_a_missing_runtime_names_the_pip_command(
    make: Make, data: Path, monkeypatch: pytest.MonkeyPatch, backend: str, package: str
) -> None:
    monkeypatch.setattr(
        "bitdistill.evals.directories.find_spec", lambda name: None if name == package else 1
    )
    kind = "student" if backend == "torch" else "artifact"
    path = make("it", kind, target=backend, student_fingerprint="")
    with pytest.raises(ImportError, match=f"needs {package}; run: pip install {package}"):
        run([path], data=data, execute=refuse)


def test_a_missing_metric_package_is_found_first(
    make: Make, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "bitdistill.evals.directories.find_spec", lambda name: None if "rouge" in name else 1
    )
    task = Task("short", "summary", "{text}", ("text",), "label")
    with pytest.raises(ImportError, match="needs rouge-score; run: pip install rouge-score"):
        run([make("student")], task, data, execute=refuse)
