"""Students that were altered, or whose training diverged: nothing is exported."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitdistill import exporters, manifest

BIAS = "model.layers.0.self_attn.q_proj.bias"


def altered(student: Path, out: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of a student with other tensors and a manifest that agrees with them."""
    shutil.copytree(student, out)
    tensors = load_file(out / "model.safetensors")
    change(tensors)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    content = json.loads((out / manifest.MANIFEST).read_text())
    manifest.write_manifest(out, "student", content)
    return out


def test_a_tensor_without_a_place_is_refused(student: Path, tmp_path: Path) -> None:
    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.self_attn.q_proj.norm.weight"] = torch.ones(64)

    path = altered(student, tmp_path / "student", add)
    with pytest.raises(manifest.FormatError, match=r"has no place for \(.*q_proj.norm.weight\)"):
        exporters.export(path, "onnx", tmp_path / "out")


def test_a_missing_gain_is_refused(student: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.down_proj.norm.weight"
    path = altered(student, tmp_path / "student", lambda tensors: tensors.pop(name))
    with pytest.raises(manifest.FormatError, match=f"has no tensor '{name}'"):
        exporters.export(path, "onnx", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_truncated_student_is_refused(student: Path, tmp_path: Path) -> None:
    path = shutil.copytree(student, tmp_path / "student")
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(manifest.FormatError, match="truncated or altered"):
        exporters.export(path, "onnx", tmp_path / "out")


def test_an_embedding_beyond_float16_needs_32_bits(student: Path, tmp_path: Path) -> None:
    def enlarge(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.embed_tokens.weight"][3, 3] = 1e5

    path = altered(student, tmp_path / "student", enlarge)
    with pytest.raises(ValueError, match="values beyond float16; export with embed_bits=32"):
        exporters.export(path, "onnx", tmp_path / "out")
    out = exporters.export(path, "onnx", tmp_path / "out", embed_bits=32)
    assert manifest.read_manifest(out)["storage"]["embedding"] == "float32"


@pytest.mark.parametrize("target", ["onnx", "mlx"])
@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.norm.weight",
        "model.layers.1.input_layernorm.weight",
        "model.layers.1.self_attn.k_norm.weight",
        "model.layers.0.self_attn.k_proj.weight",
        "model.layers.0.mlp.down_proj.norm.weight",
        BIAS,
    ],
)
def test_a_tensor_of_another_shape_is_refused(
    student_dir: Callable[..., Path], tmp_path: Path, name: str, target: str
) -> None:
    student = student_dir("qwen3", "paper", tie_word_embeddings=False, attention_bias=True)

    def cut(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors[name][:16].clone()

    path = altered(student, tmp_path / "student", cut)
    with pytest.raises(manifest.FormatError, match=rf"holds '{name}' as \(16,.* describes \("):
        exporters.export(path, target, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("model.norm.weight", {}),
        ("model.layers.1.mlp.down_proj.norm.weight", {}),
        (BIAS, {}),
        ("model.embed_tokens.weight", {}),
        ("model.embed_tokens.weight", {"embed_bits": 32}),
    ],
)
def test_values_that_are_no_numbers_are_refused(
    student_dir: Callable[..., Path], tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[3] = float("nan")

    path = altered(student_dir("qwen2", "paper"), tmp_path / "student", spoil)
    with pytest.raises(ValueError, match=f"{name} holds NaN or infinity; the training diverged"):
        exporters.export(path, "onnx", tmp_path / "out", **options)
