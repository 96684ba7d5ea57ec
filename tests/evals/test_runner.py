"""The runner's logic on invented outcomes: tasks, data, agreement, results, errors."""

from __future__ import annotations

import dataclasses
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bitdistill import manifest
from bitdistill.evals import Variant, run
from bitdistill.evals.bench import Repeat, speed_of, to_json
from bitdistill.evals.directories import open_directories
from bitdistill.evals.store import PredictionLog
from bitdistill.tasks import Task

TASK = Task("mood", "label", "{text}\nMood:", ("text",), "label", (" bad", " good"))
PREDICTIONS = {"teacher": [1, 0, 1, 0], "student": [1, 0, 0, 0], "onnx": [1, 0, 1, 0]}
SPEEDS = {"teacher": 10.0, "student": 5.0, "onnx": 40.0}
Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """`make(name, kind, **content)`: a directory that has a manifest and some bytes of weights."""

    def write(name: str, kind: str = "student", **content: Any) -> Path:
        path = tmp_path / name
        path.mkdir()
        (path / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}" + bytes(2**20))
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
    return {"parts": [predict(job["path"], part) for part in job["parts"]]}


def predict(path: str, part: dict[str, Any]) -> dict[str, Any]:
    labels = PREDICTIONS[Path(path).name][: len(part["examples"])]
    records = [{"i": i, "label": label, "scores": [-1.0, -2.0]} for i, label in enumerate(labels)]
    return {
        "backend": "onnx" if "onnx" in path else "torch", "versions": {"python": "3"},
        "peak_memory": 40.0, "records": records, "truncated": 1, "prompt_tokens": 9,
        "answer_tokens": [1, 1], "seconds": {"load": 1.0, "predict": 2.0, "compute": 1.9},
    }  # fmt: skip


def time(jobs: Any, progress: Any) -> list[dict[str, Any]]:
    """What timing rows in turn would bring back."""
    return [
        {
            "speed": to_json(
                speed_of([Repeat(1 / SPEEDS[job["name"]], [1 / SPEEDS[job["name"]]])] * 3, 1)
            ),
            "memory": {"bare": 10.0, "load": 20.0, "serve": 30.0 + SPEEDS[job["name"]]},
            "facts": {"versions": {"python": "3"}},
        }
        for job in jobs
    ]


def test_results_of_a_whole_run(make: Make, data: Path) -> None:
    student = make("student")
    fingerprint = open_directories([student])[0].student
    artifact = make("onnx", "artifact", target="onnx", student_fingerprint=fingerprint)
    teacher = make("teacher", "teacher", method="fp16-sft")
    seen: list[tuple[str, int, int]] = []
    results = run(
        [teacher, student, artifact], data=data, seed=5, execute=execute, time=time,
        progress=lambda *event: seen.append(event),
    )  # fmt: skip
    table = {(r.artifact, r.metric): r for r in results if r.metric != "difference"}
    assert {a: table[a, "accuracy"].value for a in PREDICTIONS} == {
        "teacher": 75.0, "student": 50.0, "onnx": 75.0,
    }  # fmt: skip
    assert [a for a, metric in table if metric == "agreement"] == ["onnx"]
    assert table["onnx", "agreement"].value == 75.0
    assert table["teacher", "size_on_disk"].value == pytest.approx(1.0, abs=0.01)
    assert table["onnx", "memory"].value == 30.0 + 40.0 - 10.0
    assert table["onnx", "memory_ratio"].value == pytest.approx(60 / 30)
    assert table["student", "decode_speed"].value == pytest.approx(5.0)
    assert table["student", "decode_speed"].n == 3
    ratios = [table[a, "decode_ratio"].value for a in PREDICTIONS]
    assert ratios == pytest.approx([1.0, 0.5, 4.0])
    assert table["onnx", "decode_ratio"].details["against"]["artifact"] == "teacher"
    assert table["onnx", "size_ratio"].value == pytest.approx(1.0, abs=0.01)
    one = table["onnx", "accuracy"]
    assert (one.task, one.split, one.seed, one.n, one.unit) == ("mood", "heldout", 5, 4, "%")
    assert (one.method, one.backend, one.model) == ("bitdistill", "onnx", "tiny")
    assert one.student == fingerprint
    assert table["teacher", "accuracy"].student is None
    assert one.settings["truncated"] == 1
    assert one.settings["single_token_answers"] is True
    assert one.precision == "1.58-bit"
    assert one.details == {"labels": ["bad", "good"], "confusion": [[1, 0, 0], [1, 2, 0]]}
    assert one.interval is not None
    assert one.machine["cores"] >= 1
    assert seen == [(f"{name}: predict", 4, 4) for name in ("teacher", "student", "onnx")]


def test_artifacts_of_other_students_are_not_compared(make: Make, data: Path) -> None:
    paths = [make("student"), make("onnx", "artifact", target="onnx", student_fingerprint="no")]
    assert "agreement" not in {
        r.metric for r in run(paths, data=data, speed=False, execute=execute)
    }


def test_every_two_rows_are_compared(make: Make, data: Path) -> None:
    paths = [make(name) for name in PREDICTIONS]
    results = run(paths, data=data, speed=False, execute=execute)
    found = [r for r in results if r.metric == "difference" and r.details["of"] == "accuracy"]
    pairs = [(r.artifact, r.details["against"]["artifact"], r.value) for r in found]
    assert pairs == [
        ("student", "teacher", -25.0), ("onnx", "teacher", 0.0), ("onnx", "student", 25.0),
    ]  # fmt: skip
    assert (found[2].details["only_first"], found[2].details["only_second"]) == (1, 0)
    assert found[2].details["p_mcnemar"] == 1.0
    assert found[2].interval is not None


def test_several_files_are_several_splits(make: Make, data: Path) -> None:
    mismatched = data.with_name("mismatched.jsonl")
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    text = "".join(json.dumps(row | {"label": 0}) + "\n" for row in rows)
    mismatched.write_text(text)
    results = run([make("student")], data=[data, mismatched], speed=False, execute=execute)
    found = {r.split: r.value for r in results if r.metric == "accuracy"}
    assert found == {"heldout": 50.0, "mismatched": 75.0}
    assert [r.split for r in results if r.metric == "size_on_disk"] == ["heldout"]
    with pytest.raises(ValueError, match="two data sets are called 'heldout'; name their splits"):
        run([make("other")], data=[data, data], execute=refuse)
    with pytest.raises(ValueError, match="1 splits for 2 data files; name each file's split"):
        run([make("another")], data=[data, mismatched], split="x", execute=refuse)
    named = run([make("onnx")], data=[data, mismatched], split=["x", "y"], speed=False,
                execute=execute)  # fmt: skip
    assert {r.split for r in named} == {"x", "y"}


def test_every_validation_split_of_the_hub_is_the_default(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MNLI has two: a row is loaded once for both."""
    asked: list[Any] = []

    def rows(*arguments: Any, streaming: bool) -> Any:
        asked.append(arguments)
        return ({"text": f"{arguments[2]} {i}", "label": i % 2} for i in range(4))

    monkeypatch.setattr("bitdistill.tasks.hub_rows", rows)
    splits = ("train", "validation_matched", "validation_mismatched")
    task = dataclasses.replace(TASK, hub=("nyu-mll/glue", "mnli"), splits=splits)
    jobs: list[int] = []

    def keep(job: dict[str, Any], progress: Any) -> dict[str, Any]:
        jobs.append(len(job["parts"]))
        return execute(job, progress)

    results = run([make("student")], task, speed=False, execute=keep)
    assert asked == [("nyu-mll/glue", "mnli", split) for split in splits[1:]]
    assert jobs == [2]
    found = [r.split for r in results if r.metric == "accuracy"]
    assert found == ["validation_matched", "validation_mismatched"]
    (one,) = {r.split for r in run([make("onnx")], task, split=splits[2], speed=False,
                                   execute=keep)}  # fmt: skip
    assert one == "validation_mismatched"


def test_a_variant_is_a_row_of_its_own(make: Make, data: Path) -> None:
    teacher = make("teacher", "teacher", method="fp16-sft")
    jobs: list[Any] = []

    def keep(job: dict[str, Any], progress: Any) -> dict[str, Any]:
        jobs.append(job["load"])
        return execute(job, progress)

    paths = [teacher, Variant(teacher, {"dtype": "bfloat16"})]
    results = run(paths, data=data, speed=False, execute=keep)
    assert jobs == [{}, {"dtype": "bfloat16"}]
    assert {r.precision for r in results} == {"fp32", "bf16"}
    assert len({r.artifact_hash for r in results}) == 2


def test_a_gguf_file_is_timed_and_not_scored(make: Make, data: Path, tmp_path: Path) -> None:
    gguf = tmp_path / "Q4_0.gguf"
    gguf.write_bytes(b"gguf")
    teacher = make("teacher", "teacher", method="fp16-sft")
    seen: list[Any] = []

    def keep(jobs: Any, progress: Any) -> Any:
        seen.extend((Path(job["path"]).name, job["llama_bench"]) for job in jobs)
        return time([job | {"name": "teacher"} for job in jobs], progress)

    results = run([teacher, gguf], data=data, execute=execute, time=keep, llama_bench="sh")
    assert seen == [("teacher", None), ("Q4_0.gguf", shutil.which("sh"))]
    own = {r.metric for r in results if r.backend == "llama.cpp"}
    assert "decode_ratio" in own
    assert "accuracy" not in own
    assert {(r.precision, r.model) for r in results if r.backend == "llama.cpp"} == {
        ("Q4_0", "tiny")
    }
    with pytest.raises(ValueError, match="nothing to evaluate; give at least one teacher"):
        run([gguf], data=data, execute=refuse)
    with pytest.raises(FileNotFoundError, match="no-bench is not a program; give the path of"):
        run([teacher, gguf], data=data, llama_bench=tmp_path / "no-bench", execute=refuse)


def test_another_llama_bench_is_timed_again(make: Make, data: Path, tmp_path: Path) -> None:
    gguf, program = tmp_path / "Q4_0.gguf", tmp_path / "llama-bench"
    gguf.write_bytes(b"gguf")
    calls: list[int] = []

    def count(jobs: Any, progress: Any) -> Any:
        calls.append(len(jobs))
        return time([job | {"name": "teacher"} for job in jobs], progress)

    rows = [make("teacher", "teacher", method="fp16-sft"), gguf]
    for content in ("a", "a", "b"):
        program.write_text(content)
        program.chmod(0o755)
        run(rows, data=data, execute=execute, time=count, llama_bench=program, store=tmp_path)
    assert calls == [2, 2]


def test_a_hugging_face_directory_is_a_row(make: Make, data: Path, tmp_path: Path) -> None:
    path = tmp_path / "teacher"
    path.mkdir()
    (path / "config.json").write_text('{"_name_or_path": "some/model"}')
    results = run([path], TASK, data, speed=False, execute=execute)
    assert {(r.method, r.model, r.precision) for r in results} == {("base", "some/model", "fp32")}


def test_nothing_is_measured_twice(make: Make, data: Path, tmp_path: Path) -> None:
    student, calls = make("student"), []

    def once(job: dict[str, Any], progress: Any) -> dict[str, Any]:
        outcome = execute(job, progress)
        for part, found in zip(job["parts"], outcome["parts"], strict=True):
            with PredictionLog(Path(part["log"]), part["identity"]) as log:
                log.append(found["records"])
                log.finish({key: value for key, value in found.items() if key != "records"})
        calls.append("predict")
        return outcome

    def time_once(jobs: Any, progress: Any) -> Any:
        calls.append("time")
        return time(jobs, progress)

    options: Any = {"data": data, "store": tmp_path / "store", "execute": once, "time": time_once}
    first = run([student], **options)
    assert run([student], **options) == first
    assert calls == ["time", "predict"]
    assert run([student], **options | {"seed": 1}) != first  # another bootstrap, other timings
    assert calls == ["time", "predict", "time"]
    for change in ({"batch_size": 2}, {"limit": 3}, {"scoring": "greedy"}, {"threads": 2}):
        run([student], **options, speed=False, **change)
        calls.append("")
    assert calls[3:] == ["predict", ""] * 4
    with pytest.raises(FileExistsError, match="cannot be a folder there; choose another --store"):
        run([student], **options | {"store": data / "store"})


def test_without_speed_nothing_is_timed(make: Make, data: Path) -> None:
    metrics = {r.metric for r in run([make("student")], data=data, speed=False, execute=execute)}
    assert metrics == {"accuracy", "ece", "perplexity", "size_on_disk", "size_ratio"}


def test_a_task_says_what_is_reported(make: Make, data: Path) -> None:
    task = dataclasses.replace(TASK, metrics=("accuracy",), version=3)
    results = run([make("student")], task, data, speed=False, execute=execute)
    assert {r.metric for r in results} == {"accuracy", "size_on_disk", "size_ratio"}
    assert {r.task_version for r in results} == {3}


def test_the_validation_file_of_training_is_the_default(make: Make, data: Path) -> None:
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    data.write_text(
        "".join(json.dumps({"words": r["text"], "label": r["label"]}) + "\n" for r in rows)
    )
    student = make("student", validation=str(data), columns={"text": "words"})
    results = run([student], speed=False, execute=execute)
    assert (results[0].metric, results[0].n, results[0].split) == ("accuracy", 4, "heldout")


def test_a_name_means_the_recorded_task(make: Make, data: Path) -> None:
    teacher = make("teacher", "teacher", task=None)
    jobs: list[Any] = []

    def keep(job: dict[str, Any], progress: Any) -> dict[str, Any]:
        jobs.append(job)
        return execute(job, progress)

    run([teacher, make("student")], "mood", data, speed=False, execute=keep)
    assert [Task.from_json(job["task"]) for job in jobs] == [TASK, TASK]
    assert jobs[0]["parts"][0]["examples"][1] == {
        "index": 1, "prompt": "text 1\nMood:", "answer": " bad", "label": 0,
        "inputs": ("text 1",),
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
        (
            [student], dataclasses.replace(TASK, metrics=("acuracy",)),
            data, ValueError, "a label task has no metric 'acuracy'; did you mean 'accuracy'?",
        ),
        ([tmp_path / "no.gguf"], None, data, FileNotFoundError, "no.gguf does not exist"),
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


def test_a_gguf_file_without_a_program_names_the_pip_command(
    make: Make, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "Q4_0.gguf").write_bytes(b"gguf")
    monkeypatch.setattr("bitdistill.evals.gguf.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install llama-cpp-python, or give a llama-bench"):
        run([make("teacher", "teacher"), tmp_path / "Q4_0.gguf"], data=data, execute=refuse)


def test_a_missing_metric_package_is_found_first(
    make: Make, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "bitdistill.evals.directories.find_spec", lambda name: None if "rouge" in name else 1
    )
    task = Task("short", "summary", "{text}", ("text",), "label")
    with pytest.raises(ImportError, match="needs rouge-score; run: pip install rouge-score"):
        run([make("student")], task, data, execute=refuse)
