"""Parity of a large model's embedding and head, on real artifacts that are damaged a little."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from bitdistill import backends
from bitdistill.evals import parity, parity_ends, parity_layers
from bitdistill.exporters.base import export

Students = Callable[..., Path]
TABLES = ("model.embed_tokens.weight", "lm_head.weight")


@pytest.fixture(autouse=True)
def _all_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity, "LARGEST", 1000)
    monkeypatch.setattr(parity_ends, "WORDS", 100)  # not a divisor of the vocabulary


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text"])
@pytest.mark.parametrize(
    "options",
    [
        {"embed_bits": 16},
        {"embed_bits": 8},
        {"embed_bits": 4},
        {"embed_bits": 8, "ops": "portable"},
        {"embed_bits": 4, "ops": "integer"},
    ],
)
@pytest.mark.parametrize("tied", [True, False])
def test_both_ends_pass_and_have_a_cost(
    student_dir: Students, tmp_path: Path, family: str, options: dict[str, Any], tied: bool
) -> None:
    student = student_dir(family, "paper", 8, tie_word_embeddings=tied)
    report = parity.report(student, export(student, "onnx", tmp_path / "out", **options))
    assert report["failures"] == []
    assert report["embedding"]["largest"] < 1e-6
    assert report["embedding"]["positions"] == report["head"]["positions"] == 48
    costs = report["storage_cost"]["alone"]
    least, most = {16: (1e-5, 1e-3), 8: (1e-3, 0.02), 4: (0.02, 0.2)}[options["embed_bits"]]
    assert least < costs["embedding"]["median"] < most
    assert least < costs["head"]["median"] < most


def test_the_cost_of_the_head_is_that_of_the_whole_student_without_layers(
    student_dir: Students, tmp_path: Path
) -> None:
    """Logits of the same hidden states, computed by the student's own modules."""
    student = student_dir("qwen3", "paper", 8)
    out = export(student, "onnx", tmp_path / "out", embed_bits=4)
    tokens = list(range(5, 45))
    hidden, logits = parity_layers.layer_outputs(out, tokens, 1)
    content: Any = backends.load(out).manifest
    report = parity_ends.report(student, tokens, hidden, logits, content["storage"])
    import torch

    made = []
    for storage in ({"embedding": "int4"}, {}):
        model: Any = backends.load(student, dtype="float64", storage=storage).model  # type: ignore[attr-defined]
        with torch.inference_mode():
            given = torch.from_numpy(hidden[-1]).double()
            made.append(model.lm_head(model.model.norm(given)).numpy())
    expected = parity.difference(made[:1], made[1:])
    assert report["storage_cost"]["alone"]["head"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("damaged", "failing"),
    [(TABLES[0], "embedding"), (TABLES[1], "head"), ("model.norm.weight", "head")],
)
def test_a_damaged_end_fails(
    student_dir: Students, tmp_path: Path, damaged: str, failing: str
) -> None:
    student = student_dir("qwen3", "paper", 8, tie_word_embeddings=False)
    out = export(student, "onnx", tmp_path / "out", embed_bits=32)
    model = onnx.load(out / "model.onnx", load_external_data=False)
    place = next(t for t in model.graph.initializer if t.name == damaged)
    entries = {e.key: e.value for e in place.external_data}
    if entries:
        count = int(np.prod(place.dims))
        offset = int(entries.get("offset", 0))
        values = np.memmap(out / "model.onnx.data", np.float32, "r+", offset, (count,))
    else:  # a small one, in the model itself
        values = onnx.numpy_helper.to_array(place).copy()
    if failing == "embedding":
        values[:] *= np.float32(1.0001)
    else:
        values[: values.size // 2] *= np.float32(1.01)
    if isinstance(values, np.memmap):
        values.flush()
    else:
        place.CopyFrom(onnx.numpy_helper.from_array(values, damaged))
        onnx.save(model, out / "model.onnx")
    report = parity.report(student, out)
    assert not report["passed"]
    assert {failure.split(":")[0] for failure in report["failures"]} == {failing}


def test_one_wrong_row_of_the_embedding_fails(student_dir: Students, tmp_path: Path) -> None:
    student = student_dir("qwen3", "paper", 8)
    out = export(student, "onnx", tmp_path / "out")
    tokens = list(range(5, 45))
    hidden, logits = parity_layers.layer_outputs(out, tokens, 1)
    storage = backends.load(out).manifest["storage"]
    assert parity_ends.report(student, tokens, hidden, logits, storage)["failures"] == []
    tokens[7] = 6
    [failure] = parity_ends.report(student, tokens, hidden, logits, storage)["failures"]
    assert failure.startswith("embedding: largest error")
