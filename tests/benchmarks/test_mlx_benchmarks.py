"""The scripts that measure MLX exports still run and say what they are asked."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "benchmarks"
TINY = {
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}
Script = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """A script by its name, with a shape "tiny"."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    shapes = importlib.import_module("shapes")
    monkeypatch.setitem(shapes.SHAPES, "tiny", TINY)
    return importlib.import_module


@pytest.fixture
def script(
    module: Callable[[str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> Script:
    """Runs a script; its records."""

    def run(name: str, *arguments: object) -> list[dict[str, Any]]:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        module(name).main()
        return [json.loads(line) for line in capfd.readouterr().out.splitlines()]

    return run


@pytest.mark.slow
def test_exports(script: Script, tmp_path: Path) -> None:
    records = script("mlx_export", "--folder", tmp_path, "--shape", "tiny")
    assert [record["embed_bits"] for record in records] == [16, 8]
    assert [record["embedding"] for record in records] == [16, 8.5]
    # K = 64 costs 2.5 bits and K = 128 costs 2.25: of 20 parts four each for q and o, two each for
    # k and v, and eight each for the MLP's three matrices, of which the last has K = 128
    body = (2.5 * (4 + 2 + 2 + 4 + 8 + 8) + 2.25 * 8) / 36
    for record in records:
        assert record["body"] == pytest.approx(body, abs=1e-3)
        assert record["body"] < record["total"] < record["embedding"]
        assert record["seconds"] > 0
        assert 0 < record["bare_mib"] <= record["peak_mib"]
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_logits_are_those_of_the_student(
    script: Script, module: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    student = module("random_student").make("tiny", tmp_path / "student")
    records = script("mlx_agreement", "logits", student, "--floor")
    assert [record["products"] for record in records] == ["mlx", "cpu", "torch-fp64"]
    for record in records:
        assert 0 < record["error"] < 1e-5
        assert record["top_tokens"] == 100
        assert record["positions"] == 128


def test_errors_are_parts_of_the_spread(module: Callable[[str], ModuleType]) -> None:
    reference = np.zeros((2, 3), np.float32)
    reference[:, 1] = 4
    found = reference.copy()
    found[1, 2] = 6
    record = module("mlx_agreement").compare([found], [reference])
    assert record == {"error": 1.5, "top_tokens": 50.0, "positions": 2}


def test_labels_by_type(script: Script, student_dir: Callable[..., Path], tmp_path: Path) -> None:
    words = {"prompt": "{sentence} is", "columns": ["sentence"], "labels": [" bad", " good"]}
    task = {"name": "words", "kind": "label", "target": "label"} | words
    path = shutil.copytree(student_dir("qwen3", "paper", 8, task), tmp_path / "student")
    data = tmp_path / "validation.jsonl"
    content = json.loads((path / "bitdistill.json").read_text())
    (path / "bitdistill.json").write_text(json.dumps(content | {"validation": str(data)}))
    accuracies = []
    for label in (0, 1):  # of every example: what is right for one is wrong for the other
        rows = [json.dumps({"sentence": text, "label": label}) for text in ("the film", "a plot")]
        data.write_text("\n".join(rows))
        records = script("mlx_agreement", "labels", path)
        assert [record["dtype"] for record in records] == ["float32", "float16", "bfloat16"]
        assert {record["n"] for record in records} == {2}
        assert records[0]["agreement"] == 100
        accuracies.append([record["accuracy"] for record in records])
    assert [sum(pair) for pair in zip(*accuracies, strict=True)] == [100, 100, 100]
