"""MLX artifacts on disk: exact trits and scales, stock layout, sizes, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from bitdistill import manifest, packing
from bitdistill.backends import mlx_layout
from bitdistill.checkpoint import StudentFiles
from bitdistill.exporters import export, tensor_files
from bitdistill.exporters.tensor_files import TensorWriter, bfloat16

StudentDir = Callable[..., Path]


def reference_ternary(weight: np.ndarray) -> tuple[np.ndarray, float]:
    """Absmean trits and bf16 scale in NumPy, written from the formulas alone."""
    mean = torch.from_numpy(weight).abs().mean().numpy()  # the same fp32 sum
    bits = int(mean.view(np.uint32))
    bits = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000
    scale = np.uint32(bits).view(np.float32)
    return np.clip(np.rint(weight / (scale + np.float32(1e-6))), -1, 1), float(scale)


def check_linears(student: Path, artifact: Path) -> None:
    """Every linear of the artifact dequantises, by MLX itself, to exactly D times its trits."""
    master = load_file(student / "model.safetensors")
    tensors = mx.load(str(artifact / "model.safetensors"))
    paths = [name.removesuffix(".scales") for name in tensors if name.endswith(".scales")]
    assert len(paths) == 14
    for path in paths:
        trits, scale = reference_ternary(master[f"{path}.weight"].numpy())
        words, scales, biases = (tensors[f"{path}.{p}"] for p in ("weight", "scales", "biases"))
        group = trits.shape[1] // scales.shape[1]
        codes = np.array(words)[:, :, None] >> (2 * np.arange(16, dtype=np.uint32)) & 3
        assert np.array_equal(codes.reshape(trits.shape).astype(int) - 1, trits), path
        assert set(np.array(scales.astype(mx.float32)).ravel().tolist()) == {scale}, path
        wide = (scales.astype(mx.float32), biases.astype(mx.float32))
        stock = np.array(mx.dequantize(words, *wide, group, 2))
        assert np.array_equal(stock, trits.astype(np.float32) * np.float32(scale)), path


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3_text"])
@pytest.mark.parametrize("norm_style", ["paper", "allnorm", "none"])
def test_trits_and_scales_are_the_students(
    student_dir: StudentDir, tmp_path: Path, family: str, norm_style: str
) -> None:
    student = student_dir(family, norm_style)
    artifact = export(student, "mlx", tmp_path / "artifact")
    check_linears(student, artifact)
    master = load_file(student / "model.safetensors")
    written = load_file(artifact / "model.safetensors")
    dense = {name for name in master if f"{name.removesuffix('.weight')}.scales" not in written}
    assert dense == {n for n in written if n in master and written[n].dtype != torch.uint32}
    for name in dense:
        half = torch.bfloat16 if family == "gemma3_text" else torch.float16
        stored = master[name].to(half) if name == mlx_layout.EMBEDDING else master[name]
        assert written[name].dtype == stored.dtype, name
        assert torch.equal(written[name], stored), name


SIZES: dict[str, Any] = {
    "128": ({"hidden_size": 128, "intermediate_size": 256}, {128}, 2.25),
    "64": ({"hidden_size": 64, "intermediate_size": 192}, {64}, 2.5),
    "32": ({"hidden_size": 96, "intermediate_size": 160, "num_attention_heads": 3}, {32}, 3.0),
}


@pytest.mark.parametrize("size", SIZES)
def test_bits_per_weight(student_dir: StudentDir, tmp_path: Path, size: str) -> None:
    overrides, groups, bits = SIZES[size]
    student = student_dir("llama", num_key_value_heads=1, **overrides)
    artifact = export(student, "mlx", tmp_path / "artifact")
    content = manifest.read_manifest(artifact, "artifact")
    parts = content["parts"]
    assert parts["body_bits_per_weight"] == bits
    assert parts["embedding_bits_per_weight"] == 16
    assert parts["head"] == 0  # tied: stored once
    assert parts["total"] == sum(parts[p] for p in ("body", "embedding", "head", "norms"))
    file = artifact / "model.safetensors"
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert file.stat().st_size == header + parts["total"]
    storage = {"embedding": "float16", "norms": "float32", "biases": "float32"}
    assert content["storage"] == storage
    index = json.loads((artifact / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == parts["total"]
    assert set(index["weight_map"].values()) == {file.name}
    quantization = json.loads((artifact / "config.json").read_text())["quantization"]
    assert {quantization["group_size"]} == groups


def test_group_size_is_chosen_for_each_path(student_dir: StudentDir, tmp_path: Path) -> None:
    """SmolLM2's width: K = 576 takes groups of 64, its down projection (here K = 128) 128."""
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3}
    student = student_dir("llama", hidden_size=576, intermediate_size=128, **heads)
    artifact = export(student, "mlx", tmp_path / "artifact")
    check_linears(student, artifact)
    config = json.loads((artifact / "config.json").read_text())
    assert config["model_type"] == "bitdistill_llama"
    assert config["quantization"] == config["quantization_config"]
    down = {"group_size": 128, "bits": 2, "mode": "affine"}
    assert config["quantization"] == {
        "group_size": 64,
        "bits": 2,
        "mode": "affine",
        "model.layers.0.mlp.down_proj": down,
        "model.layers.1.mlp.down_proj": down,
    }
    bits = manifest.read_manifest(artifact)["parts"]["body_bits_per_weight"]
    assert 2.25 < bits <= 2.5


@pytest.mark.parametrize("columns", [48, 72])
def test_columns_without_a_group_are_refused(
    student_dir: StudentDir, tmp_path: Path, columns: int
) -> None:
    student = student_dir("llama", intermediate_size=columns)
    with pytest.raises(ValueError, match=f"K = {columns} is divisible by none.*--target onnx"):
        export(student, "mlx", tmp_path / "artifact")
    assert list(tmp_path.iterdir()) == []


def test_both_readers_agree(student_dir: StudentDir, tmp_path: Path) -> None:
    artifact = export(student_dir("qwen2"), "mlx", tmp_path / "artifact")
    file = artifact / "model.safetensors"
    arrays = mx.load(str(file))
    with safe_open(file, "np") as reader:
        assert reader.metadata() == {"format": "mlx"}
        assert set(reader.keys()) == set(arrays)
        for name, array in arrays.items():
            other = reader.get_tensor(name)
            assert other.dtype == np.array(array).dtype, name
            assert np.array_equal(other, np.array(array)), name


def test_untied_head_and_32_bit_tables(student_dir: StudentDir, tmp_path: Path) -> None:
    student = student_dir("qwen3", tie_word_embeddings=False)
    artifact = export(student, "mlx", tmp_path / "artifact", embed_bits=32)
    master = load_file(student / "model.safetensors")
    written = load_file(artifact / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(written[name], master[name])
    content = manifest.read_manifest(artifact)
    assert content["storage"]["embedding"] == "float32"
    assert content["parts"]["head"] == content["parts"]["embedding"] == 4 * written[name].numel()


def test_scales_that_float16_cannot_hold(student_dir: StudentDir, tmp_path: Path) -> None:
    student = student_dir("llama", initializer_range=1e-6)
    artifact = export(student, "mlx", tmp_path / "artifact")
    check_linears(student, artifact)
    scales = load_file(artifact / "model.safetensors")["model.layers.0.mlp.up_proj.scales"]
    assert scales.dtype == torch.bfloat16


def test_shards_have_an_index(
    student_dir: StudentDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = student_dir("qwen3")
    whole = export(student, "mlx", tmp_path / "whole")
    monkeypatch.setattr(tensor_files, "SHARD_BYTES", 20_000)
    artifact = export(student, "mlx", tmp_path / "shards")
    files = sorted(artifact.glob("model*.safetensors"))
    assert len(files) > 2
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((artifact / "model.safetensors.index.json").read_text())
    expected = load_file(whole / "model.safetensors")
    assert index["metadata"]["total_size"] == manifest.read_manifest(artifact)["parts"]["total"]
    assert set(index["weight_map"]) == set(expected)
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(artifact / file)[name], expected[name]), name
    assert not list(artifact.glob("*.part"))


def test_writer_keeps_types_and_values(tmp_path: Path) -> None:
    values = np.array([[1.0, -0.5], [3.140625, 0.0]], np.float32)  # exact in bf16
    with TensorWriter(tmp_path, ["a", "b", "c"]) as writer:
        assert writer.add("a", values.T) == 16  # not contiguous
        assert writer.add("b", bfloat16(values), "BF16") == 8
        assert writer.add("c", np.array([7], np.uint32)) == 4
    written = load_file(tmp_path / "model.safetensors")
    assert written["a"].tolist() == values.T.tolist()
    assert written["b"].dtype == torch.bfloat16
    assert written["b"].tolist() == values.tolist()
    assert written["c"].tolist() == [7]


def test_the_read_back_check_sees_a_wrong_trit(
    student_dir: StudentDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = packing.pack_affine

    def pack_wrongly(trits: np.ndarray) -> np.ndarray:
        trits = trits.copy()
        trits[-1, -1] = 1 if trits[-1, -1] == 0 else 0
        return pack(trits)

    student = student_dir("llama")
    monkeypatch.setattr(packing, "pack_affine", pack_wrongly)
    with pytest.raises(OSError, match=r"layers\.0\.self_attn\.q_proj was read back different"):
        export(student, "mlx", tmp_path / "artifact")
    assert list(tmp_path.iterdir()) == []


def test_values_beyond_float16_are_refused(
    student_dir: StudentDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = StudentFiles.tensor
    student = student_dir("llama")
    monkeypatch.setattr(StudentFiles, "tensor", lambda self, name: read(self, name) * 1e6)
    with pytest.raises(ValueError, match="beyond float16's range; export with --dtype bfloat16"):
        export(student, "mlx", tmp_path / "artifact")


def test_other_table_widths_are_refused(student_dir: StudentDir, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be one of 32, 16, 8, 6, 4 for mlx, got 5"):
        export(student_dir("llama"), "mlx", tmp_path / "artifact", embed_bits=5)


def test_a_student_with_other_tensors_is_refused(
    student_dir: StudentDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = student_dir("llama")
    names = [*StudentFiles(student).names, "model.surprise"]
    monkeypatch.setattr(StudentFiles, "names", names)
    with pytest.raises(manifest.FormatError, match=r"1 differ: model\.surprise"):
        export(student, "mlx", tmp_path / "artifact")
