"""The runner's results on invented outcomes: rows, splits, agreement, nothing twice."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from invented import PREDICTIONS, TASK, Make, execute, refuse, time

from bitdistill.evals import Variant, run
from bitdistill.evals.directories import open_directories
from bitdistill.evals.store import PredictionLog


def test_results_of_a_whole_run(make: Make, data: Path) -> None:
    student = make("student")
    fingerprint = open_directories([student])[0].student
    artifact = make("onnx", "artifact", target="onnx", student_fingerprint=fingerprint, seed=3)
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
    assert (one.task, one.split, one.seed, one.n, one.unit) == ("mood", "heldout", 3, 4, "%")
    assert one.settings["seed"] == 5
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


def test_results_say_how_a_row_was_trained(make: Make, data: Path) -> None:
    """In every row of it, of sizes as well; nothing is said of what was not trained here."""
    made = {"recipe": "mood+paper", "fingerprint": "f00d", "overrides": ["distill.steps=9"]}
    student = make("student", **made, metrics={"tokens_in_all": 123, "steps": 9})
    results = run([student, make("teacher", "teacher")], data=data, speed=False, execute=execute)
    own = [r.settings for r in results if r.artifact == "student"]
    assert [settings["training"] for settings in own] == [made] * len(own)
    assert {settings["training_tokens"] for settings in own} == {123}
    assert {settings["threads"] for settings in own} == {None}
    others = [r.settings for r in results if r.artifact == "teacher"]
    assert others
    assert not any({"training", "training_tokens"} & settings.keys() for settings in others)


def test_a_student_in_fp64_shows_what_rounding_changes(make: Make, data: Path) -> None:
    """Beside the student it is another row, compared with it as artifacts are; teachers are not."""
    student, teacher = make("student"), make("teacher", "teacher", method="fp16-sft")
    fingerprint = open_directories([student])[0].student
    artifact = make("onnx", "artifact", target="onnx", student_fingerprint=fingerprint)
    loaded: list[tuple[str, dict[str, str]]] = []

    def note(job: dict[str, Any], progress: Any) -> Any:
        loaded.append((Path(job["path"]).name, job["load"]))
        found = execute(job, progress)
        if "dtype" in job["load"]:
            for record in found["parts"][0]["records"]:
                record["label"] = 1 - record["label"]
        return found

    paths = [teacher, student, artifact]
    results = run(paths, data=data, speed=False, floor=True, device="cuda", execute=note)
    gpu = {"device": "cuda"}
    assert loaded == [
        ("teacher", gpu), ("student", gpu), ("onnx", {}), ("student", gpu | {"dtype": "float64"}),
    ]  # fmt: skip
    agreed = {(r.artifact, r.precision): r.value for r in results if r.metric == "agreement"}
    assert agreed == {
        ("onnx", "1.58-bit"): 75.0,
        ("student (cuda) (float64)", "1.58-bit in fp64"): 0.0,
    }
    for option in ({"floor": True}, {"device": "cuda"}):
        with pytest.raises(ValueError, match="ask for device and floor in a run without it"):
            run(paths, data=data, execute=refuse, **option)  # type: ignore[arg-type]


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


def test_another_configuration_is_timed_again(
    make: Make, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, calls = make("student"), []

    def count(jobs: Any, progress: Any) -> Any:
        calls.append(len(jobs))
        return time(jobs, progress)

    def timed(**options: Any) -> int:
        run([student], data=data, execute=execute, time=count, store=tmp_path / "s", **options)
        return len(calls)

    for name in ("BITDISTILL_ISA", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    assert [timed(), timed(threads=1)] == [1, 2]
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert timed(threads=1) == 2  # a worker is told its threads
    assert timed() == 3
    monkeypatch.setenv("BITDISTILL_ISA", "avx2")
    assert [timed(), timed()] == [4, 4]
    monkeypatch.setattr("bitdistill.evals.environment.usable_cores", lambda: 64)
    assert timed() == 5


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
