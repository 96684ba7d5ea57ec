"""The commands at work: results on stdout, talk on stderr, and nothing destroyed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from short_runs import Done, copy

import bitdistill
from bitdistill import manifest
from bitdistill.tasks import TASKS


def test_recipes(cli: Callable[..., Done]) -> None:
    from bitdistill.config import dump_config, load_config, part_names, recipe_names

    assert cli("recipes") == Done(0, "\n".join(recipe_names()) + "\n", "")
    assert cli("recipes", "--parts") == Done(0, "\n".join(part_names()) + "\n", "")
    assert cli("recipes", "tiny").out == dump_config(load_config("tiny"))


def test_dry_run(cli: Callable[..., Done], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = cli(
        "train", "--dry-run", "--set", "task.limit_train=12", "--set", "distill.batch_size=2"
    )
    assert done.code == 0
    for text in (
        "limit_train: 12",
        "data: 12 training examples, ",
        "M of them ternary (",
        "one step: ",
        "ce ",
        "relations ",
        "MiB for the student's training state, ",
    ):
        assert text in done.out
    for stage in ("base", "teacher", "bitnet-sft", "student"):
        assert f"time: stage {stage} about " in done.out
    assert list(tmp_path.iterdir()) == []


def test_train_prints_the_student_and_talks_on_stderr(
    cli: Callable[..., Done],
    tmp_path: Path,
    tokenizer: Any,
    reviews: Path,
    make_teacher: Callable[..., Any],
) -> None:
    make_teacher("llama").save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    settings = [f"model.source={tmp_path / 'm'}", f"task={{name: sst2, train: {reviews}}}"]
    settings += ["base.enabled=false", "bitnet_sft.enabled=false", "student.calibration_batches=1"]
    settings += [f"{s}.{k}" for s in ("teacher", "distill") for k in ("steps=1", "batch_size=2")]
    arguments = [part for setting in settings for part in ("--set", setting)]
    done = cli("train", "--out", tmp_path / "run", *arguments)
    assert (done.code, done.out) == (0, f"{tmp_path / 'run' / 'student'}\n")
    assert "teacher: started" in done.err
    assert "student: step 1/1" in done.err
    again = cli("train", "--out", tmp_path / "run", *arguments)
    assert again.out == done.out
    assert again.err.count("complete, skipped") == 3
    pytest.importorskip("matplotlib")
    drawn = cli("plot", tmp_path / "run", "--out", tmp_path / "pictures" / "p")
    names = ("loss-teacher", "loss-student", "run-weights-student", "run-layers-student")
    expected = [tmp_path / "pictures" / f"p-{n}.{end}" for n in names for end in ("png", "svg")]
    assert (drawn.code, drawn.out.split()) == (0, list(map(str, expected)))
    assert all(path.is_file() for path in expected)
    assert "has no log.jsonl; give a directory of" in cli("plot", tmp_path, "--out", "p").err
    other = cli("train", "--out", tmp_path / "run", *arguments, "--set", "distill.anneal=0")
    assert other.code == 1
    assert other.err.splitlines()[-1].startswith(f"Error: {tmp_path / 'run' / 'student'} was made")


def test_export(
    cli: Callable[..., Done],
    refused: Callable[..., str],
    student_dir: Callable[..., Path],
    tmp_path: Path,
) -> None:
    out = tmp_path / "onnx"
    arguments = ["export", student_dir("qwen3"), "--out", out, "--target"]
    assert refused(*arguments, "onx") == "unknown target 'onx'; did you mean 'onnx'?"
    assert not out.exists()
    done = cli(*arguments, "onnx")
    assert (done.code, done.out) == (0, f"{out}\n")
    # the student is random and the cache 16 bits: how many tokens that costs is not what is tested
    assert done.err.splitlines()[-2].startswith("parity with PyTorch: within the noise floor; with")
    assert done.err.splitlines()[-1].startswith("bits per weight: body 2.0")
    assert manifest.read_manifest(out, "artifact")["parity"]["passed"]
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    assert refused(*arguments, "onnx") == (
        f"{out} exists; pass --force to replace it, or another --out"
    )
    assert refused(*arguments, "onnx", "--force", "--embed-bits", "7")
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    again = cli(*arguments, "onnx", "--force", "--no-parity")
    assert (again.code, again.err.split(":")[0]) == (0, "bits per weight")
    assert "parity" not in manifest.read_manifest(out)


def test_only_students_are_exported(
    refused: Callable[..., str], artifact: Path, student_dir: Callable[..., Path], tmp_path: Path
) -> None:
    message = refused("export", artifact, "--target", "mlx", "--out", tmp_path / "out")
    assert message.startswith(f"{artifact} holds an artifact, only a student can be exported; give")
    precious = copy(student_dir(), tmp_path / "precious")
    message = refused("export", student_dir(), "--target", "onnx", "--out", precious, "--force")
    assert message == f"{precious} holds a student and is not replaced; choose another --out"
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("years of work")
    message = refused("export", student_dir(), "--target", "onnx", "--out", foreign, "--force")
    assert message == f"{foreign} was not written by bitdistill and will not be replaced"


def test_eval(cli: Callable[..., Done], artifact: Path, reviews: Path, tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    done = cli(
        "eval",
        artifact,
        "--data",
        reviews,
        "--limit",
        "3",
        "--no-speed",
        "--format",
        "json",
        "--out",
        results,
    )
    assert done.code == 0
    rows = json.loads(done.out) if done.out.startswith("[") else done.out.splitlines()
    assert rows
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    accuracy = next(line for line in lines if line["metric"] == "accuracy")
    assert (accuracy["n"], accuracy["backend"], accuracy["task"]) == (3, "onnx", "sst2")
    assert "predict" in done.err


def test_mistakes_in_eval(refused: Callable[..., str], artifact: Path, reviews: Path) -> None:
    assert "unknown task 'sst22'; did you mean" in refused("eval", artifact, "--task", "sst22")
    message = refused("eval", artifact, "--task", "sst2", "--task", "qnli")
    assert "'sst2' and 'qnli': one run is of one task; evaluate each in a run of its own" in message
    assert "range x>=0" in refused("eval", artifact, "--seed", "-1")
    assert "(OfflineMode" in refused("eval", artifact)
    assert "is given twice" in refused("eval", artifact, artifact, "--data", reviews)
    message = refused("eval", artifact, "--data", reviews, "--column", "sentence=text")
    assert message.startswith("column 'text' is missing; the data has sentence, label; map it")
    assert "data file" in refused("eval", artifact, "--data", reviews.with_name("none.csv"))


def test_an_altered_artifact(
    refused: Callable[..., str], artifact: Path, reviews: Path, tmp_path: Path
) -> None:
    """One flipped bit is found by its hash, a cut file by its size, before anything runs."""
    altered = copy(artifact, tmp_path / "altered")
    file = max(altered.iterdir(), key=lambda p: p.stat().st_size)
    content = file.read_bytes()
    file.write_bytes(content[:-9] + bytes([content[-9] ^ 4]) + content[-8:])
    expected = f"{file} does not match the hash in its manifest: altered; make or copy it again"
    assert refused("generate", altered, "the film") == expected
    assert expected in refused("eval", altered, "--data", reviews, "--no-speed")
    file.write_bytes(content[:-9])
    for arguments in (["generate", altered, "the film"], ["eval", altered, "--data", reviews]):
        assert f"{file} has {len(content) - 9} bytes, its manifest says" in refused(*arguments)
    file.unlink()
    assert f"{file} is missing; make or copy" in refused("generate", altered, "the film")


def test_generate(
    cli: Callable[..., Done],
    refused: Callable[..., str],
    artifact: Path,
    student_dir: Callable[..., Path],
) -> None:
    student = student_dir("qwen3", task=TASKS["sst2"].to_json())
    texts = [
        cli("generate", d, "the film is", "--max-new-tokens", "5") for d in (student, artifact)
    ]
    assert texts[0].code == texts[1].code == 0
    assert texts[0].out.endswith("\n")
    assert texts[0].out == texts[1].out
    sampled = [
        cli("generate", artifact, "the film", "--temperature", "2", "--seed", seed).out
        for seed in ("1", "1", "2")
    ]
    assert sampled[0] == sampled[1] != sampled[2]
    asked = [
        cli("generate", artifact, f"the {{film}} 100 %{end}", "--task-prompt") for end in ("", "\n")
    ]
    assert asked[0].code == 0
    assert asked[0].out == asked[1].out  # spaces around a text are not of it
    message = refused("generate", student_dir("llama"), "the film", "--task-prompt")
    assert message == "this directory records no task; leave out --task-prompt"
    assert "range x>=1" in refused("generate", artifact, "the", "--max-new-tokens", "0")
    assert "range x>=0" in refused("generate", artifact, "the", "--seed", "-1")
    assert refused("generate", artifact, "the", "--temperature", "-1")
    assert refused("generate", artifact, "the", "--top-p", "3")


def test_doctor(cli: Callable[..., Done], monkeypatch: pytest.MonkeyPatch) -> None:
    done = cli("doctor")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith(f"bitdistill {bitdistill.__version__}, Python 3.")
    for name in ("torch", "onnx", "mlx"):
        assert any(
            line.split()[:2] == [name, "usable"]
            or (line.strip().startswith(f"{name} ") and "usable" in line)
            for line in done.out.splitlines()
        )
    assert "instruction sets" in done.out

    from bitdistill import doctor

    def broken() -> str:
        raise RuntimeError("no library here")

    monkeypatch.setitem(doctor.CHECKS, "onnx", broken)
    done = cli("doctor")
    assert done.code == 1
    assert "BROKEN: no library here; pip install onnxruntime" in done.out
    assert done.err == "Error: something that is required is missing; see above\n"


def test_an_installation_that_cannot_run_an_artifact(
    refused: Callable[..., str], artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = tmp_path / "libbitdistill_ops.so"
    library.write_bytes(b"not a library")
    monkeypatch.setattr("bitdistill.backends.onnx_session.library_path", lambda: library)
    message = refused("generate", artifact, "the film")
    assert message.endswith("; reinstall bitdistill on this machine")
