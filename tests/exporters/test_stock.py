"""Baselines in stock ONNX operators: fp32 is the teacher, 4 and 2 bits are what they should be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from bitdistill import backends, checkpoint, manifest
from bitdistill.exporters import base
from bitdistill.exporters.stock import BLOCK, export_stock, quantize_blocks

TOKENS = [[1, 40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50], [7, 8, 9]]
Make = Callable[..., Path]


@pytest.fixture
def teacher_dir(make_teacher: Callable[..., Any], tokenizer: Any, tmp_path: Path) -> Make:
    """`teacher_dir(family, **config)`: a saved random teacher."""

    def make(family: str, **config: Any) -> Path:
        path = tmp_path / "teacher"
        content = {"method": "fp16-sft", "base_model": "random", "family": family, "task": None}
        model = make_teacher(family, **config)
        checkpoint.save(path, model, tokenizer, "teacher", content, "# A teacher\n")
        return path

    return make


def dequantized(weights: np.ndarray, bits: int) -> np.ndarray:
    """What MatMulNBits multiplies with, from the codes one by one."""
    packed, scales = quantize_blocks(weights, bits)
    rows, columns = weights.shape
    values, each = [], 8 // bits
    for byte in packed.reshape(-1):
        values += [(int(byte) >> bits * i) % (1 << bits) for i in range(each)]
    codes = np.array(values, np.float32).reshape(-1, BLOCK) - (1 << (bits - 1))
    return (codes * scales[:, None]).reshape(rows, -1)[:, :columns]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rounding_is_to_the_nearest_level(bits: int) -> None:
    weights = np.random.default_rng(bits).normal(size=(6, 3 * BLOCK)).astype(np.float32)
    weights[2, :BLOCK] = 0.0
    found = dequantized(weights, bits)
    blocks = weights.reshape(6, 3, BLOCK)
    step = np.abs(blocks).max(-1) / (1 << (bits - 1))
    error = np.abs(found.reshape(6, 3, BLOCK) - blocks)
    top = np.abs(blocks) > step[..., None] * ((1 << (bits - 1)) - 1)  # beyond the last level
    assert (error <= np.where(top, 1.0, 0.5) * step[..., None] + 1e-6).all()
    assert (found[2, :BLOCK] == 0).all()


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3_text"])
def test_fp32_is_the_teacher(teacher_dir: Make, tmp_path: Path, family: str) -> None:
    teacher = teacher_dir(family, tie_word_embeddings=family != "llama")
    artifact = export_stock(teacher, "fp32", tmp_path / "out")
    found, expected = backends.load(artifact), backends.load(teacher)
    for a, b in zip(found.logits(TOKENS), expected.logits(TOKENS), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-3 * np.abs(b).max())
    single = [list(r.generate(TOKENS[0], max_new_tokens=8)) for r in (found, expected)]
    assert single[0] == single[1]


@pytest.mark.parametrize("kind", ["int4", "int2"])
def test_low_bits_are_the_teacher_with_rounded_weights(
    teacher_dir: Make, tmp_path: Path, kind: str
) -> None:
    import torch

    teacher = teacher_dir("qwen3")
    expected = backends.load(teacher)
    with torch.no_grad():
        for name, parameter in expected.model.named_parameters():  # type: ignore[attr-defined]
            if name.endswith("_proj.weight"):
                rounded = dequantized(parameter.numpy(), int(kind[-1]))
                parameter.copy_(torch.from_numpy(rounded))
    found = backends.load(export_stock(teacher, kind, tmp_path / "out"))
    for a, b in zip(found.logits(TOKENS), expected.logits(TOKENS), strict=True):
        # activations and the head are held in 8 bits: a percent of the spread
        assert np.abs(a - b).mean() < 0.06 * b.std()


def test_only_stock_operators_are_used(teacher_dir: Make, tmp_path: Path) -> None:
    teacher = teacher_dir("qwen3")
    for kind, expected in (("fp32", "MatMul"), ("int4", "MatMulNBits")):
        out = export_stock(teacher, kind, tmp_path / kind)
        model = onnx.load(out / "model.onnx", load_external_data=False)
        kinds = {(node.domain, node.op_type) for node in model.graph.node}
        assert expected in {name for _, name in kinds}
        assert not {domain for domain, _ in kinds} & {"bitdistill"}
    sizes = [manifest.read_manifest(tmp_path / k)["parts"]["body"] for k in ("fp32", "int4")]
    assert sizes[1] == sizes[0] * 5 // 32  # 4 bits and a 32-bit scale for 32 weights


def test_what_cannot_be_a_baseline(teacher_dir: Make, student_dir: Make, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown kind of baseline 'int5'; did you mean 'int"):
        export_stock(tmp_path, "int5", tmp_path / "out")
    with pytest.raises(manifest.FormatError, match="holds a student, expected a teacher"):
        export_stock(student_dir("qwen3"), "int4", tmp_path / "out")
    teacher = teacher_dir("qwen3")
    export_stock(teacher, "int4", tmp_path / "out")
    with pytest.raises(FileExistsError):
        export_stock(teacher, "int4", tmp_path / "out")


def test_the_context_is_what_the_graph_has_angles_for(
    teacher_dir: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "DEFAULT_CONTEXT", 64)  # the model's is 128
    model = backends.load(export_stock(teacher_dir("qwen3"), "fp32", tmp_path / "out"))
    assert model.context == 64
    assert np.isfinite(model.logits([[5] * 64])[0]).all()
    with pytest.raises(ValueError, match="65 tokens do not fit, there is room for 64"):
        model.logits([[5] * 65])
