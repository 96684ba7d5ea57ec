"""Quantised embeddings in ONNX artifacts: what is stored, computed, reported and refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from bitdistill import backends, checkpoint, exporters, manifest, tables
from bitdistill.evals import parity
from bitdistill.exporters import onnx_tables
from bitdistill.exporters.base import ExportError

Students = Callable[..., Path]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TIGHT = 1e-4


def initializers(artifact: Path) -> dict[str, list[int]]:
    graph = onnx.load(artifact / "model.onnx", load_external_data=False).graph
    return {tensor.name: list(tensor.dims) for tensor in graph.initializer}


def table_of(student: Path, name: str = EMBEDDING) -> np.ndarray:
    return checkpoint.open_student(student).tensor(name).numpy()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("tied", [True, False])
def test_what_is_stored(student_dir: Students, tmp_path: Path, bits: int, tied: bool) -> None:
    student = student_dir("llama", "paper", 8, tie_word_embeddings=tied)
    out = exporters.export(student, "onnx", tmp_path / "out", embed_bits=bits)
    sizes = initializers(out)
    shapes = tables.shapes(*table_of(student).shape, bits)
    names = [EMBEDDING] if tied else [EMBEDDING, HEAD]
    expected = {
        name if part == "codes" else f"{name}.{part}": list(shape)
        for name in names
        for part, shape in shapes.items()
    }
    found = {name: shape for name, shape in sizes.items() if name.startswith(tuple(names))}
    assert found == expected
    assert (HEAD in sizes) != tied
    for name in names:
        stored = onnx_tables.read_table(out / "model.onnx", name, *table_of(student, name).shape)
        assert isinstance(stored, tables.Table)
        again = tables.quantize(table_of(student, name), bits)
        np.testing.assert_array_equal(tables.dequantize(stored), tables.dequantize(again))


@pytest.mark.parametrize(("bits", "least", "most"), [(8, 0.003, 0.012), (4, 0.05, 0.14)])
def test_what_is_reported(
    student_dir: Students, tmp_path: Path, bits: int, least: float, most: float
) -> None:
    student = student_dir("llama", "paper", 8, tie_word_embeddings=False)
    out = exporters.export(student, "onnx", tmp_path / "out", embed_bits=bits)
    content = manifest.read_manifest(out)
    rows, columns = table_of(student).shape
    blocks = -(-rows // 16) * 16
    size = {8: rows * columns, 4: blocks * columns * 17 // 32}[bits] + 4 * rows
    assert content["parts"]["embedding"] == content["parts"]["head"] == size
    assert content["parts"]["embedding_bits_per_weight"] == 8 * size / (rows * columns)
    assert content["storage"]["embedding"] == f"int{bits}"
    assert set(content["embedding_error"]) == {"embedding", "head"}
    for error in content["embedding_error"].values():
        assert least < error["mean"] <= error["largest"] < most
    assert f"stored as int{bits}: a row is off by" in (out / "README.md").read_text()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    ("family", "tied"), [("llama", True), ("gemma3_text", True), ("qwen2", False)]
)
def test_equals_pytorch_with_the_same_rounding(
    student_dir: Students, tmp_path: Path, bits: int, family: str, tied: bool
) -> None:
    """Without int8 activations; the head's own rounding may flip one, worth a part of a step."""
    student = student_dir(family, "paper", None, tie_word_embeddings=tied)
    out = exporters.export(student, "onnx", tmp_path / "out", embed_bits=bits, kv_bits=32)
    storage = manifest.read_manifest(out)["storage"]
    random = np.random.default_rng(3)
    tokens = [random.integers(3, 280, n).tolist() for n in (40, 17, 1)]
    found = np.concatenate(backends.load(out).logits(tokens))
    reference = np.concatenate(backends.load(student, storage=storage).logits(tokens))
    error = np.abs(found - reference).max(-1) / reference.std()
    assert np.median(error) < TIGHT
    assert error.max() < 10 * TIGHT
    trained = np.concatenate(backends.load(student).logits(tokens))
    assert np.median(np.abs(found - trained).max(-1) / trained.std()) > 50 * TIGHT


@pytest.mark.parametrize("bits", [8, 4])
def test_the_parity_report_states_the_cost(
    student_dir: Students, tmp_path: Path, bits: int
) -> None:
    student = student_dir("qwen3", "paper", 8)
    out = exporters.export(
        student, "onnx", tmp_path / "out", embed_bits=bits,
        check=lambda path: parity.report(student, path),
    )  # fmt: skip
    report: dict[str, Any] = manifest.read_manifest(out)["parity"]
    assert report["failures"] == []
    cost = report["storage_cost"]
    assert cost["median"] > report["artifact"]["median"]
    assert 0 < cost["top_token_agreement"] <= 1
    assert f"{cost['top_token_agreement']:.1%} of top tokens" in parity.verdict(report)


def test_a_table_that_changed_on_disk_is_noticed(student_dir: Students, tmp_path: Path) -> None:
    table = np.random.default_rng(0).standard_normal((40, 64)).astype(np.float32)
    for bits in (8, 4):
        stored = tables.quantize(table, bits)
        assert onnx_tables.compare(stored, table)["mean"] < 0.1
        stored.codes.reshape(-1)[100] ^= 0x88
        with pytest.raises(ExportError, match="embedding read back is not what was written"):
            onnx_tables.compare(stored, table)
    out = exporters.export(student_dir("llama"), "onnx", tmp_path / "out")
    with pytest.raises(manifest.FormatError, match="has no table absent; export it again"):
        onnx_tables.read_table(out / "model.onnx", "absent", 1, 1)


def test_a_table_that_is_too_wide_is_refused_early(
    student_dir: Students, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "MAX_COLUMNS", 32)
    with pytest.raises(ValueError, match="hidden size 64: a quantised embedding has at most 32"):
        exporters.export(student_dir("llama"), "onnx", tmp_path / "out", embed_bits=8)
    assert list(tmp_path.iterdir()) == []
