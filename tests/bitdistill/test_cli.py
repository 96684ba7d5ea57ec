"""The command line: its help, and that a user's mistake is one sentence."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from short_runs import Done, copy

import bitdistill
from bitdistill import manifest
from bitdistill.cli import main

COMMANDS = {"train", "recipes", "report", "export", "eval", "generate", "mlx", "doctor", "plot"}
HEAVY = {"torch", "transformers", "datasets", "onnx", "onnxruntime", "mlx", "numpy", "pydantic"}


# --- help -----------------------------------------------------------------------------------------


def test_help_lists_the_commands(cli: Callable[..., Done]) -> None:
    done = cli("--help")
    assert (done.code, done.err) == (0, "")
    listed = {line.split()[0] for line in done.out.split("Commands:")[1].splitlines() if line}
    assert listed == COMMANDS == set(main.commands)
    assert cli("-h").out == done.out


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_explains_itself(cli: Callable[..., Done], command: str) -> None:
    done = cli(command, "--help")
    assert done.code == 0
    assert f"bitdistill {command}" in done.out
    for parameter in main.commands[command].params:
        if parameter.param_type_name == "option":
            assert parameter.opts[0] in done.out


def test_version(cli: Callable[..., Done]) -> None:
    assert cli("--version") == Done(0, f"bitdistill, version {bitdistill.__version__}\n", "")


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["nonsense"]])
def test_help_and_mistakes_load_no_heavy_package(arguments: list[str]) -> None:
    program = (
        "import sys\nfrom bitdistill.cli import main\n"
        f"try: main({arguments!r})\n"
        "except SystemExit: pass\n"
        f"sys.exit(','.join({HEAVY!r} & set(sys.modules)) or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-500:]


def test_python_m_bitdistill() -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-m", "bitdistill", "--version"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.endswith(f"{bitdistill.__version__}\n")


def test_a_reader_that_leaves_is_no_error() -> None:
    """`bitdistill recipes NAME | head`."""
    command = [sys.executable, "-P", "-m", "bitdistill", "recipes", "tiny"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == b""


def test_a_damaged_file_is_one_line(artifact: Path, tmp_path: Path) -> None:
    """`datasets` would log what it raises, between a user and the message."""
    file = tmp_path / "a.parquet"
    file.write_bytes(b"PAR1, but no more")
    command = [sys.executable, "-P", "-m", "bitdistill", "eval", artifact, "--data", file]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.stderr.count("\n") == 1
    assert "a.parquet cannot be read as parquet (" in done.stderr


# --- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["exprot"], "no command 'exprot'; did you mean 'export'?"),
        (["train", "--recipy", "x"], "No such option"),
        (["train", "--recipe", "tinny"], "unknown recipe 'tinny'; did you mean 'tiny'?"),
        (["train", "--recipe", "own.yaml"], "recipe file own.yaml does not exist; check the path"),
        (["train", "--set", "distil.steps=1"], "unknown key 'distil'; did you mean 'distill'?"),
        (["train", "--set", "seed"], "--set 'seed' is not of the form key.key=value"),
        (["train", "--set", "task.name=sst3"], "unknown task 'sst3'; did you mean 'sst2'?"),
        (["recipes", "tinny"], "unknown recipe 'tinny'; did you mean 'tiny'?"),
        (["export", "none", "--target", "onnx"], "Missing option '--out'"),
        (["export", "none", "--target", "onnx", "--out", "o"], "none does not exist; check the"),
        (["eval"], "Missing argument 'DIRECTORIES...'"),
        (["eval", "none"], "none does not exist; check the path"),
        (["eval", "none", "--format", "html"], "'html' is not one of"),
        (["eval", "none", "--limit", "0"], "0 is not in the range x>=1"),
        (["eval", "none", "--column", "sentence"], "'sentence' is not of the form TASK=FILE"),
        (["generate", "none", "hello"], "none does not exist; check the path"),
        (["generate", "none"], "Missing argument 'PROMPT'"),
    ],
)
def test_mistakes(refused: Callable[..., str], arguments: list[str], message: str) -> None:
    assert message in refused(*arguments)


def test_a_directory_that_is_no_model(refused: Callable[..., str], tmp_path: Path) -> None:
    for command in (["eval"], ["export", "--target", "onnx", "--out", tmp_path / "out"]):
        message = refused(*command, tmp_path)
        assert message == (
            f"{tmp_path} has no bitdistill.json; give a directory written by `bitdistill train` or "
            "`bitdistill export`"
        )
    assert "has no bitdistill.json" in refused("generate", tmp_path, "hello")


def test_a_run_directory_is_answered_with_its_student(
    refused: Callable[..., str], student_dir: Callable[..., Path], tmp_path: Path
) -> None:
    copy(student_dir(), tmp_path / "student")
    assert refused("eval", tmp_path).endswith(f"did you mean {tmp_path / 'student'}?")


def test_another_format_version(
    refused: Callable[..., str], student_dir: Callable[..., Path], tmp_path: Path
) -> None:
    student = copy(student_dir(), tmp_path / "s")
    content = manifest.read_manifest(student)
    (student / manifest.MANIFEST).write_text(json.dumps(content | {"format_version": 7}))
    for arguments in (
        ["eval", student],
        ["generate", student, "hello"],
        ["export", student, "--target", "mlx", "--out", tmp_path / "o"],
    ):
        message = refused(*arguments)
        assert message.startswith(f"{student} has format version 7, this bitdistill reads 1; make")
    assert not (tmp_path / "o").exists()


def test_wrong_data_for_training(
    refused: Callable[..., str], tmp_path: Path, tokenizer: Any, make_teacher: Callable[..., Any]
) -> None:
    make_teacher("llama").save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    start = ["train", "--out", tmp_path / "run", "--set", f"model.source={tmp_path / 'm'}", "--set"]
    start += ["base.enabled=false", "--set"]
    data = tmp_path / "data.csv"
    messages = {
        "sentence,label\na,5\n": "example 0 has label '5', task 'sst2' has 0..1 (negative, pos",
        "text,label\na,1\n": "column 'sentence' is missing; the data has text, label; map it",
        "sentence,label\n": "holds no examples",
        "": "is empty; give a file with at least one example",
        'sentence,label\n"a,1\n': "cannot be read as csv",
    }
    for text, message in messages.items():
        data.write_text(text)
        assert message in refused(*start, f"task={{name: sst2, train: {data}}}")
    data.unlink()
    assert "does not exist" in refused(*start, f"task={{name: sst2, train: {data}}}")
    assert "(OfflineMode" in refused(*start, "task.name=sst2")
    assert "model directory" in refused(*start, f"model.source={tmp_path / 'none'}")
    assert not list((tmp_path / "run").glob("*/"))


def test_a_dry_run_finds_what_a_run_would_meet(refused: Callable[..., str], tmp_path: Path) -> None:
    dry = ["train", "--dry-run", "--out", tmp_path / "run", "--set"]
    assert "does not exist; check model.source" in refused(*dry, f"model.source={tmp_path / 'x'}")
    data = f"task={{name: sst2, train: {tmp_path / 'x.csv'}}}"
    assert "data file" in refused(*dry, data)
    corpus = ["--set", f"corpus.sources=[{tmp_path / 'x.jsonl'}]"]
    assert "x.jsonl does not exist" in refused(*dry, "task.limit_train=4", *corpus)
    (tmp_path / "x.jsonl").write_text('{"txt": "a"}\n')
    assert "has no column 'text', only txt" in refused(*dry, "task.limit_train=4", *corpus)
    validation = f"task={{name: tiny, validation: {tmp_path / 'x.jsonl'}}}"
    assert "column 'sentence' is missing" in refused(*dry, validation)
    assert refused(*dry[:-1], "--until", "studnet").startswith("no stage 'studnet' in this run; it")
    below = tmp_path / "x.jsonl" / "run"
    assert refused(*dry[:2], "--out", below).endswith("a directory there; choose another --out")
    assert not (tmp_path / "run").exists()


def test_outputs_that_cannot_be_written_are_found_first(
    refused: Callable[..., str], artifact: Path, student_dir: Callable[..., Path], tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.write_text("text")
    for out in (file, file / "below"):
        expected = f"{out} cannot be a directory there; choose another --out"
        assert refused("train", "--out", out) == expected
        export = ["export", student_dir(), "--target", "onnx", "--out", out, "--no-parity"]
        assert refused(*export) == refused(*export, "--force") == expected
    for out in (tmp_path, file / "below"):
        message = refused("eval", artifact, "--data", file, "--out", out)
        assert message == f"{out} cannot be a file there; choose another --out"
    assert file.read_text() == "text"
