"""Fixtures for runs of a few steps on tiny random models, and for the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from short_runs import TEXTS, WORDS, Done, packed_batches, task_batches

import bitdistill
from bitdistill.cli import main
from bitdistill.config import load_config
from bitdistill.data import Batches
from bitdistill.objective import make_objective
from bitdistill.progress import Reporter
from bitdistill.schema import Config, Machine, Training
from bitdistill.student import make_student
from bitdistill.tasks import TASKS
from bitdistill.training import Fit

CPU = Machine(device="cpu", precision="float32")
SHORT = {"steps": 2, "batch_size": 2, "max_length": 24, "learning_rate": 1e-3}


@pytest.fixture
def start(make_teacher: Callable[..., Any], tokenizer: Any, tmp_path: Path) -> Callable[..., Fit]:
    """`start(settings, data, name, **machine)`: a Fit of a tiny student; `data`: task, packed."""

    def make(
        options: Training, data: str | Batches = "task", name: str = "student", **machine: Any
    ) -> Fit:
        teacher = make_teacher("qwen3")
        torch.manual_seed(1)
        if data == "packed":
            documents = [TEXTS, TEXTS[::-1]]
            data = packed_batches(documents, tokenizer, 8, options.batch_size, options.accumulate)
        elif data == "task":
            data = task_batches(options.batch_size, options.accumulate)
        assert not isinstance(data, str)
        return Fit(
            name,
            make_objective(make_student(teacher), teacher, options),
            data,
            options,
            CPU.model_copy(update=machine),
            Reporter(tmp_path / "log.jsonl", quiet=True),
            tmp_path / f"{name}.training",
        )

    return make


@pytest.fixture
def recipe(
    make_teacher: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> Callable[..., Config]:
    """`recipe(*settings)`: a run of two steps a stage on a local random teacher and file."""
    import datasets

    datasets.config.HF_DATASETS_CACHE = tmp_path / "cache"
    make_teacher("qwen3").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "README.md").write_text("---\nlicense: mit\n---\n")
    rows = [
        {"sentence": f"{WORDS[i]} {WORDS[-i]}", "label": i % 2, "gist": WORDS[i]} for i in range(12)
    ]
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "name": "test",
        "model": {"source": str(tmp_path / "model")},
        "task": {"name": "sst2", "train": str(data), "validation": str(data)},
        "machine": {"device": "cpu"},
        "teacher": SHORT,
        "bitnet_sft": SHORT | {"enabled": False},
        "pretrain": SHORT | {"enabled": False, "logits": {"weight": 0.5, "temperature": 1.0}},
        "distill": SHORT
        | {
            "anneal": 0.5,
            "logits": {"weight": 1.0, "temperature": 2.0},
            "relations": {"target_ratio": 0.1, "split_heads": 4},
        },
        "student": {"calibration_batches": 2},
    }
    file = tmp_path / "test.yaml"
    file.write_text(yaml.safe_dump(values))
    return lambda *settings: load_config(str(file), settings)


@pytest.fixture
def cli(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., Done]:
    """`cli("train", ...)`: run a command in this process; an unforeseen error fails the test."""
    monkeypatch.chdir(tmp_path)  # where `eval` keeps what it measured
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


@pytest.fixture(scope="session")
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
