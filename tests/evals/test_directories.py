"""What is evaluated on what, and what is refused before any model is loaded."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from invented import TASK, Make, execute, refuse

from bitdistill import manifest
from bitdistill.evals import Variant, run
from bitdistill.evals.directories import choose_task, open_directories
from bitdistill.tasks import Task


def test_the_validation_file_of_training_is_the_default(make: Make, data: Path) -> None:
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    data.write_text(
        "".join(json.dumps({"words": r["text"], "label": r["label"]}) + "\n" for r in rows)
    )
    student = make("student", validation=str(data), columns={"text": "words"})
    results = run([student], speed=False, execute=execute)
    assert (results[0].metric, results[0].n, results[0].split) == ("accuracy", 4, "heldout")


def test_a_validation_file_that_is_gone_was_recorded_by_training(make: Make, data: Path) -> None:
    student = make("student", validation="data/heldout.csv")
    with pytest.raises(FileNotFoundError) as caught:
        run([student], execute=refuse)
    assert str(caught.value) == (
        "data file data/heldout.csv does not exist here; training recorded it as the validation "
        "file, give it with --data"
    )
    assert run(student, data=data, speed=False, execute=execute)  # as a list of it


def test_a_split_that_is_given_twice_is_named(make: Make, data: Path) -> None:
    student = make("student")
    with pytest.raises(ValueError, match="split 'b' is given twice; give each split once"):
        run([student], split=["a", "b", "b"], execute=refuse)
    with pytest.raises(ValueError, match="two data sets are called 'b'; name their splits with"):
        run([student], data=[data] * 3, split=["a", "b", "b"], execute=refuse)


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


def test_options_of_another_kind_of_task_are_refused(make: Make, data: Path) -> None:
    summary = dataclasses.replace(TASK, kind="summary", labels=())
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (None, {"search": {"beams": 4}}, "are of summaries, and task 'mood' has labels; leave"),
        (summary, {"scoring": "greedy"}, "is of label tasks, and the summaries of task 'mood' are"),
    ]
    plain = make("plain", task=None)
    for task, options, text in cases:
        with pytest.raises(ValueError, match=text):
            run([plain], task or TASK, data, execute=refuse, **options)


def test_rows_of_one_name_are_told_apart_by_their_folders(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("tiny", "mine"):
        (tmp_path / folder).mkdir()
        make(f"{folder}/student")
    monkeypatch.chdir(tmp_path / "tiny")
    paths = [Variant(Path("student"), {"dtype": "bfloat16"}), Path("student")]
    found = open_directories([*paths, Path("../mine/student"), make("onnx")])
    assert [directory.name for directory in found] == [
        "tiny/student (bfloat16)", "tiny/student", "mine/student", "onnx",
    ]  # fmt: skip
    assert [directory.name for directory in open_directories(paths)] == [
        "student (bfloat16)", "student",
    ]  # fmt: skip


def test_a_classifier_of_another_task_is_refused(make: Make, data: Path, tokenizer: Any) -> None:
    """Its head gives the words of other answers no likelihood at all."""
    labels = (" bad", " is")
    own = dataclasses.replace(TASK, labels=labels)
    tokens = [tokenizer.encode(label, add_special_tokens=False)[0] for label in labels]
    path = make(
        "film", "artifact", target="onnx", student_fingerprint="", label_tokens=tokens,
        task=own.to_json(),
    )  # fmt: skip
    tokenizer.save_pretrained(path)
    other = dataclasses.replace(TASK, name="other", labels=(" dull", " plot"))
    for task, answers in ((other, "' dull', ' plot'"), (
        dataclasses.replace(other, kind="summary", labels=()), "summaries")):  # fmt: skip
        with pytest.raises(ValueError) as caught:
            run([path], task, data, speed=False, execute=refuse)
        assert str(caught.value) == (
            f"{path} is a classifier of ' bad', ' is', task 'other' asks for {answers}; evaluate "
            "it on its own task, or export the student without --task"
        )
    assert choose_task(open_directories([path]), None) == own


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


def test_the_harness_without_its_extra_names_the_pip_command() -> None:
    code = (
        "import runpy, sys; sys.modules['lm_eval'] = None; "
        "runpy.run_module('bitdistill.evals.harness', run_name={!r})"
    )
    command, module = (
        subprocess.run([sys.executable, "-c", code.format(name)], capture_output=True, text=True)
        for name in ("__main__", "bitdistill.evals.harness")
    )
    assert command.stderr.startswith("Error: the harness needs lm-eval, which cannot be imported")
    assert command.stderr.endswith("; run: pip install 'bitdistill[lm-eval]'\n")
    assert (command.returncode, "Traceback" in command.stderr) == (1, False)
    assert "ImportError: the harness needs lm-eval" in module.stderr


def test_a_missing_metric_package_is_found_first(
    make: Make, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "bitdistill.evals.directories.find_spec", lambda name: None if "rouge" in name else 1
    )
    task = Task("short", "summary", "{text}", ("text",), "label")
    with pytest.raises(ImportError, match="needs rouge-score; run: pip install rouge-score"):
        run([make("student")], task, data, execute=refuse)
