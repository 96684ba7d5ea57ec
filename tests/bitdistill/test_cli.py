"""The command line: what it prints where, and that a user's mistake is one sentence."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import bitdistill
from bitdistill import manifest
from bitdistill.cli import main
from bitdistill.tasks import TASKS

COMMANDS = {"train", "recipes", "export", "eval", "generate", "doctor"}
HEAVY = {"torch", "transformers", "datasets", "onnx", "onnxruntime", "mlx", "numpy", "pydantic"}
QUICK = ("limit_train=12", "batch_size=2")


class Done(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Done]:
    """`cli("train", ...)`: run a command in this process; an unforeseen error fails the test."""
    for name in ("HF_DATASETS_DISABLE_PROGRESS_BARS", "TRANSFORMERS_VERBOSITY"):
        monkeypatch.setenv(name, "1" if name.startswith("HF") else "error")

    def run(*arguments: str | Path) -> Done:
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments], prog_name="bitdistill")
        code = caught.value.code
        assert isinstance(code, int)
        return Done(code, *capfd.readouterr())

    return run


@pytest.fixture
def refused(cli: Callable[..., Done]) -> Callable[..., str]:
    """`refused(...)`: the one sentence with which a command fails; stdout must be empty."""

    def run(*arguments: str | Path) -> str:
        done = cli(*arguments)
        assert done.code != 0
        assert done.out == ""
        assert "Traceback" not in done.err
        lines = [line for line in done.err.splitlines() if line.startswith("Error: ")]
        assert len(lines) == 1
        assert done.err.splitlines()[-1] == lines[0]
        return lines[0].removeprefix("Error: ")

    return run


@pytest.fixture(scope="module")
def artifact(student_dir: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ONNX artifact of a random student of the task sst2."""
    student = student_dir("qwen3", task=TASKS["sst2"].to_json())
    out = tmp_path_factory.mktemp("artifacts") / "onnx"
    return bitdistill.exporters.export(student, "onnx", out)


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    file = tmp_path / "reviews.jsonl"
    rows = [{"sentence": word, "label": i % 2} for i, word in enumerate("the film is good".split())]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def copy(source: Path, target: Path) -> Path:
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


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
    for arguments in (["eval", student], ["generate", student, "hello"],
                      ["export", student, "--target", "mlx", "--out", tmp_path / "o"]):  # fmt: skip
        message = refused(*arguments)
        assert message.startswith(f"{student} has format version 7, this bitdistill reads 1; make")
    assert not (tmp_path / "o").exists()


def test_wrong_data_for_training(refused: Callable[..., str], tmp_path: Path, tokenizer: Any,
                                 make_teacher: Callable[..., Any]) -> None:  # fmt: skip
    make_teacher("llama").save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    start = ["train", "--out", tmp_path / "run", "--set", f"model.source={tmp_path / 'm'}", "--set"]
    start += ["base.enabled=false", "--set"]
    data = tmp_path / "data.csv"
    messages = {
        "sentence,label\na,5\n": "example 0 has label 5, task 'sst2' has 0..1 (negative, positive)",
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


# --- commands that succeed ------------------------------------------------------------------------


def test_recipes(cli: Callable[..., Done]) -> None:
    from bitdistill.config import dump_config, load_config, recipe_names

    assert cli("recipes") == Done(0, "\n".join(recipe_names()) + "\n", "")
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
    cli: Callable[..., Done], tmp_path: Path, tokenizer: Any, reviews: Path,
    make_teacher: Callable[..., Any],
) -> None:  # fmt: skip
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
    other = cli("train", "--out", tmp_path / "run", *arguments, "--set", "distill.anneal=0")
    assert other.code == 1
    assert other.err.splitlines()[-1].startswith(f"Error: {tmp_path / 'run' / 'student'} was made")


def test_export(
    cli: Callable[..., Done], refused: Callable[..., str], student_dir: Callable[..., Path],
    tmp_path: Path,
) -> None:  # fmt: skip
    out = tmp_path / "onnx"
    arguments = ["export", student_dir("qwen3"), "--out", out, "--target"]
    assert refused(*arguments, "onx") == "unknown target 'onx'; did you mean 'onnx'?"
    assert not out.exists()
    done = cli(*arguments, "onnx")
    assert (done.code, done.out) == (0, f"{out}\n")
    assert done.err.splitlines()[-1] == "parity with PyTorch: within the noise floor"
    assert manifest.read_manifest(out, "artifact")["parity"]["passed"]
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    assert refused(*arguments, "onnx") == (
        f"{out} exists; pass --force to replace it, or another --out"
    )
    assert refused(*arguments, "onnx", "--force", "--embed-bits", "7")
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    again = cli(*arguments, "onnx", "--force", "--no-parity")
    assert (again.code, again.err) == (0, "")
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
    done = cli("eval", artifact, "--data", reviews, "--limit", "3", "--no-speed", "--format", "json",
               "--out", results)  # fmt: skip
    assert done.code == 0
    rows = json.loads(done.out) if done.out.startswith("[") else done.out.splitlines()
    assert rows
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    accuracy = next(line for line in lines if line["metric"] == "accuracy")
    assert (accuracy["n"], accuracy["backend"], accuracy["task"]) == (3, "onnx", "sst2")
    assert "predict" in done.err


def test_mistakes_in_eval(refused: Callable[..., str], artifact: Path, reviews: Path) -> None:
    assert "unknown task 'sst22'; did you mean" in refused("eval", artifact, "--task", "sst22")
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
    cli: Callable[..., Done], refused: Callable[..., str], artifact: Path,
    student_dir: Callable[..., Path],
) -> None:  # fmt: skip
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
    assert cli("generate", artifact, "the {film} 100 %", "--task-prompt").code == 0
    message = refused("generate", student_dir("llama"), "the film", "--task-prompt")
    assert message == "this directory records no task; leave out --task-prompt"
    assert "range x>=1" in refused("generate", artifact, "the", "--max-new-tokens", "0")
    assert refused("generate", artifact, "the", "--temperature", "-1")
    assert refused("generate", artifact, "the", "--top-p", "3")


def test_doctor(cli: Callable[..., Done], monkeypatch: pytest.MonkeyPatch) -> None:
    done = cli("doctor")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith(f"bitdistill {bitdistill.__version__}, Python 3.")
    for name in ("torch", "onnx", "mlx"):
        assert any(line.split()[:2] == [name, "usable"] or (line.strip().startswith(f"{name} ") and
                   "usable" in line) for line in done.out.splitlines())  # fmt: skip
    assert "instruction sets" in done.out

    from bitdistill import doctor

    def broken() -> str:
        raise RuntimeError("no library here")

    monkeypatch.setitem(doctor.CHECKS, "onnx", broken)
    done = cli("doctor")
    assert done.code == 1
    assert "BROKEN: no library here; pip install onnxruntime" in done.out
    assert done.err == "Error: something that is required is missing; see above\n"
