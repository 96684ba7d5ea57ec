"""Exporting to ONNX: what is in the files, and what happens when it cannot be done."""

from __future__ import annotations

import math
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from bitdistill import checkpoint, exporters, manifest, packing
from bitdistill.decoder import RotarySpec

Students = Callable[..., Path]


def graph_of(artifact: Path) -> onnx.GraphProto:
    return onnx.load(artifact / "model.onnx", load_external_data=False).graph


def test_the_graph_is_valid_and_portable(artifact: Path) -> None:
    onnx.checker.check_model(str(artifact / "model.onnx"), full_check=True)
    model = onnx.load(artifact / "model.onnx", load_external_data=False)
    assert model.ir_version == 10
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    assert opsets == {"": 21, "bitdistill": 1, "bitdistill.functions": 1}
    names = [value.name for value in model.graph.input]
    assert names[:4] == ["input_ids", "seqlens_k", "total_sequence_length", "logit_rows"]
    assert names[4:6] == ["past_key_values.0.key", "past_key_values.0.value"]
    assert [value.name for value in model.graph.output][:2] == ["logits", "present.0.key"]


def test_nodes_are_fused_and_named_after_modules(student_dir: Students, tmp_path: Path) -> None:
    """Where a layer is not one node (test_onnx_layer.py)."""
    graph = graph_of(exporters.export(student_dir("gemma3_text"), "onnx", tmp_path / "out"))
    ternary = {node.name: node for node in graph.node if node.op_type == "TernaryLinear"}
    parts = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    assert set(ternary) == {f"layers.{i}.{part}" for i in range(2) for part in parts}
    # the block's norm is the prologue of the stacked projections
    assert ternary["layers.1.self_attn.qkv_proj"].input[3].endswith("1.input_layernorm.weight")
    # the gate is the prologue of down_proj
    down = ternary["layers.1.mlp.down_proj"]
    assert down.input[0] == "layers.1.mlp.gate_up_proj"
    kinds = Counter(node.op_type for node in graph.node)
    assert kinds == {
        "Attention": 2,
        "TernaryLinear": 8,
        "Add": 4,
        "RMSNorm": 5,  # before each sum, and the last; those of q and k are inside Attention
        "Gather": 2,
        **dict.fromkeys(("Cast", "Mul", "Reshape", "HeadLinear"), 1),
    }


def test_allnorm_keeps_seven_matrices_with_their_own_norms(
    student_dir: Students, tmp_path: Path
) -> None:
    out = exporters.export(student_dir("qwen3", "allnorm"), "onnx", tmp_path / "out")
    nodes = [node for node in graph_of(out).node if node.op_type == "TernaryLinear"]
    assert len(nodes) == 14
    for node in nodes:
        epsilon = next(a.f for a in node.attribute if a.name == "epsilon")
        assert node.input[3] == f"model.{node.name}.norm.weight"
        assert epsilon == np.float32(1e-8)
    # gate and up, which read different inputs, meet in down_proj
    down = next(node for node in nodes if node.name == "layers.0.mlp.down_proj")
    assert (down.input[0], down.input[5]) == ("layers.0.mlp.gate_proj", "layers.0.mlp.up_proj")
    # residuals are epilogues
    assert down.input[6] == "layers.0.attention_residual"
    assert down.output[0] == "layers.0.mlp_residual"
    assert not {"Mul", "Add", "Split"} & {node.op_type for node in graph_of(out).node}


def test_residuals_after_a_norm_are_nodes(student_dir: Students, tmp_path: Path) -> None:
    out = exporters.export(student_dir("gemma3_text"), "onnx", tmp_path / "out")
    nodes = {node.name: node for node in graph_of(out).node}
    assert sum(node.op_type == "Add" for node in nodes.values()) == 4
    down = nodes["layers.0.mlp.down_proj"]
    assert not any(name.endswith("residual") for name in down.input)
    assert {a.name: a.s for a in down.attribute}["activation"] == b"gelu_tanh"
    assert "layers.1.mlp_residual" in nodes


def test_windows_are_only_where_the_model_has_them(student_dir: Students, tmp_path: Path) -> None:
    out = exporters.export(student_dir("gemma3_text"), "onnx", tmp_path / "out")
    nodes = [node for node in graph_of(out).node if node.op_type == "Attention"]
    windows = [{a.name: a.i for a in node.attribute}["local_window_size"] for node in nodes]
    assert windows == [8, 0]
    assert nodes[0].input[7] != nodes[1].input[7]  # a rotary table for each kind of layer


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_table_is_stored_once(student_dir: Students, tied: bool, tmp_path: Path) -> None:
    student = student_dir("llama", "paper", 8, tie_word_embeddings=tied)
    out = exporters.export(student, "onnx", tmp_path / "out")
    rows = checkpoint.open_student(student).spec.vocabulary
    tables = [t.name for t in graph_of(out).initializer if list(t.dims) == [rows, 64]]
    assert tables == ["model.embed_tokens.weight"] + ([] if tied else ["lm_head.weight"])
    parts = manifest.read_manifest(out)["parts"]
    assert parts["embedding"] == rows * 64 * 2
    assert parts["head"] == (0 if tied else rows * 64 * 2)


def test_parts_and_manifest(artifact: Path, student: Path) -> None:
    content = manifest.read_manifest(artifact, "artifact")
    manifest.verify_files(artifact, content)
    parts = content["parts"]
    weights = 2 * (64 * 128 + 2 * 64 * 64 + 128 * 64 + 3 * 64 * 96)
    # q, k and v of 128, 64 and 64 rows hold four scales; gate and up two; o and down one each
    scales = 2 * (4 + 1 + 2 + 1)
    # 96 is padded to whole blocks nowhere here, so the body is 2 bits a weight and its scales
    assert parts["body"] == weights // 4 + 4 * scales
    assert parts["body_bits_per_weight"] == pytest.approx(2 + 32 * scales / weights)
    stored = sum(parts[name] for name in ("body", "embedding", "head", "norms", "rotary"))
    assert stored <= parts["total"] <= stored + 80_000
    storage = {"embedding": "float16", "norms": "float32", "cache": "float16"}
    assert content["storage"] == storage
    assert content["kv_bits"] == 16
    assert content["student_fingerprint"] == checkpoint.open_student(student).fingerprint
    assert content["stop_tokens"] == [2]
    assert content["context"] == 128
    assert content["licence"] == "apache-2.0"
    assert content["scale_granularity"] == "matrix"
    assert content["kernel_layout"] == packing.KERNEL_LAYOUT_VERSION
    for name in ("README.md", "config.json", "tokenizer.json", "tokenizer_config.json"):
        assert name in content["files"]
    text = (artifact / "README.md").read_text()
    assert "apache-2.0" in text
    assert "Nothing was measured on Apple hardware" in text


def test_large_tensors_start_on_a_page(artifact: Path) -> None:
    for tensor in graph_of(artifact).initializer:
        place = {entry.key: entry.value for entry in tensor.external_data}
        if place:
            length = int(place["length"])
            assert int(place["offset"]) % (4096 if length >= 4096 else 64) == 0


def test_small_tensors_are_in_the_model(artifact: Path) -> None:
    """Outside, each would take a page of memory."""
    tensors = graph_of(artifact).initializer
    sizes = {t.name: t.data_type == 1 and 4 * math.prod(t.dims) for t in tensors}
    outside = {tensor.name for tensor in tensors if tensor.external_data}
    assert "model.layers.0.scale" in sizes.keys() - outside
    assert all(name not in outside for name, size in sizes.items() if 0 < size <= 1024)
    assert "model.layers.0.mlp.down_proj.weight" in outside


def test_rotary_tables_equal_hugging_face_far_out() -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(hidden_size=64, num_attention_heads=2, max_position_embeddings=8192)
    module = LlamaRotaryEmbedding(config)
    cos, sin = module(torch.zeros(1), torch.arange(8192)[None])
    spec = RotarySpec(tuple(module.inv_freq.tolist()), 1.0)
    ours = spec.tables(8192)
    np.testing.assert_allclose(ours[0], cos[0, :, :16].numpy(), atol=2e-7)
    np.testing.assert_allclose(ours[1], sin[0, :, :16].numpy(), atol=2e-7)


def test_progress_reaches_its_total(student: Path, tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    exporters.export(student, "onnx", tmp_path / "out", progress=lambda *call: calls.append(call))
    names = len(checkpoint.open_student(student).names)
    assert [done for _, done, _ in calls] == list(range(1, names + 14 + 1))
    assert {total for *_, total in calls} == {names + 14}


def test_the_check_sees_a_complete_directory_and_is_stored(student: Path, tmp_path: Path) -> None:
    def check(directory: Path) -> dict[str, Any]:
        manifest.verify_files(directory, manifest.read_manifest(directory, "artifact"))
        return {"agreement": 1.0}

    out = exporters.export(student, "onnx", tmp_path / "out", check=check)
    content = manifest.read_manifest(out)
    assert content["parity"] == {"agreement": 1.0}
    manifest.verify_files(out, content)


def listing(directory: Path) -> dict[str, str]:
    return {p.name: manifest.hash_file(p) for p in directory.iterdir()}


def test_an_existing_directory_is_replaced_only_with_force(
    student: Path, artifact: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(artifact, tmp_path / "out")
    before = listing(out)
    with pytest.raises(FileExistsError, match="exists; pass --force to replace it"):
        exporters.export(student, "onnx", out)
    assert listing(out) == before
    exporters.export(student, "onnx", out, force=True, context=64)
    assert manifest.read_manifest(out)["context"] == 64


def test_force_does_not_replace_a_student(student: Path, tmp_path: Path) -> None:
    out = shutil.copytree(student, tmp_path / "student")
    with pytest.raises(FileExistsError, match="holds a student and is not replaced"):
        exporters.export(out, "onnx", out, force=True)
    assert listing(out) == listing(student)


@pytest.mark.parametrize("stop_at", [1, 12, 30])
def test_an_interrupted_export_leaves_nothing(student: Path, tmp_path: Path, stop_at: int) -> None:
    def interrupt(name: str, done: int, total: int) -> None:
        if done == stop_at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        exporters.export(student, "onnx", tmp_path / "out", progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_replacement_keeps_the_old(
    student: Path, artifact: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(artifact, tmp_path / "out")

    def fail(directory: Path) -> dict[str, Any]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        exporters.export(student, "onnx", out, force=True, check=fail)
    assert listing(out) == listing(artifact)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_only_students_are_exported(
    tmp_path: Path, tokenizer: Any, make_teacher: Callable[..., Any], artifact: Path
) -> None:
    teacher = tmp_path / "teacher"
    model = make_teacher("llama")
    checkpoint.save(teacher, model, tokenizer, "teacher", {}, "card")
    for path, kind in ((teacher, "teacher"), (artifact, "artifact")):
        with pytest.raises(manifest.FormatError, match=f"holds an? {kind}, only a student can be"):
            exporters.export(path, "onnx", tmp_path / "out")
    with pytest.raises(manifest.FormatError, match="does not exist; check the path"):
        exporters.export(tmp_path / "absent", "onnx", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bad_options_are_refused_before_anything_is_written(student: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="unknown target 'onx'; did you mean 'onnx'"):
        exporters.export(student, "onx", out)
    with pytest.raises(ValueError, match="one of 32, 16, 8, 4 for onnx, got 6; did you mean 8"):
        exporters.export(student, "onnx", out, embed_bits=6)
    with pytest.raises(ValueError, match="onnx has no option dtype; leave it out, or choose"):
        exporters.export(student, "onnx", out, dtype="float32")
    for context in (0, 129):
        with pytest.raises(ValueError, match=f"context {context} is not between 1 and"):
            exporters.export(student, "onnx", out, context=context)
    assert list(tmp_path.iterdir()) == []


def test_a_head_size_that_the_runtime_cannot_rotate(student_dir: Students, tmp_path: Path) -> None:
    student = student_dir("llama", "paper", 8, hidden_size=32)
    with pytest.raises(ValueError, match="head size 8 is not a multiple of 16"):
        exporters.export(student, "onnx", tmp_path / "out")
