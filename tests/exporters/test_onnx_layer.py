"""Decoder layers that are one node: which they are, and what the node is given."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from bitdistill import checkpoint, exporters
from bitdistill.exporters import to_onnx

Students = Callable[..., Path]
PARTS = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")


def graph_of(artifact: Path) -> onnx.GraphProto:
    return onnx.load(artifact / "model.onnx", load_external_data=False).graph


def layers_of(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    return [node for node in graph.node if node.op_type == "DecoderLayer"]


def attributes_of(node: onnx.NodeProto) -> dict[str, Any]:
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def test_a_layer_is_a_node(artifact: Path) -> None:
    graph = graph_of(artifact)
    assert Counter(node.op_type for node in graph.node) == {
        "DecoderLayer": 2,
        "RMSNorm": 1,  # the last
        "Gather": 2,
        **dict.fromkeys(("Cast", "Reshape", "HeadLinear"), 1),
    }
    first, second = layers_of(graph)
    assert (first.name, first.domain) == ("layers.0", "bitdistill")
    assert list(first.output) == ["layers.0.mlp_residual", "present.0.key", "present.0.value"]
    assert second.input[0] == first.output[0]


def test_a_layers_inputs(artifact: Path) -> None:
    """X, what attention has, scales, then three constants of each matrix."""
    node, block = layers_of(graph_of(artifact))[1], "model.layers.1"
    norms = {
        "self_attn.qkv_proj": f"{block}.input_layernorm.weight",
        "self_attn.o_proj": f"{block}.self_attn.o_proj.norm.weight",
        "mlp.gate_up_proj": f"{block}.post_attention_layernorm.weight",
        "mlp.down_proj": f"{block}.mlp.down_proj.norm.weight",
    }
    matrices = [name for part in PARTS for name in (f"{block}.{part}.weight", norms[part], "")]
    assert list(node.input) == [
        "layers.0.mlp_residual",
        "past_key_values.1.key",
        "past_key_values.1.value",
        "seqlens_k",
        "total_sequence_length",
        "rotary.0.frequencies",
        f"{block}.self_attn.q_norm.weight",
        f"{block}.self_attn.k_norm.weight",
        f"{block}.scale",
        *matrices[:-1],  # an absent bias at the end is left out
    ]


def test_a_layers_attributes(artifact: Path, student: Path) -> None:
    spec = checkpoint.open_student(student).spec
    for node in layers_of(graph_of(artifact)):
        assert attributes_of(node) == {
            "num_heads": 4,
            "kv_num_heads": 2,
            "scale": np.float32(32**-0.5),
            "local_window_size": 0,
            "epsilon": np.float32(spec.norm_eps),
            "added_epsilon": np.float32(spec.added_norm_eps),
            "context": 128,
            "rotary_scale": 1.0,
            "hidden_size": 64,
            "intermediate_size": 96,
            "head_size": 32,
            "layout": 1,
            "activation_bits": 8,
            "activation": b"silu",
        }


def test_options_and_training_reach_the_node(
    student: Path, student_dir: Students, tmp_path: Path
) -> None:
    out = exporters.export(student, "onnx", tmp_path / "small", weight_bits=1.6, context=32)
    attributes = attributes_of(layers_of(graph_of(out))[0])
    assert (attributes["layout"], attributes["context"]) == (2, 32)
    floats = student_dir("qwen3", "paper", None)
    out = exporters.export(floats, "onnx", tmp_path / "floats", kv_bits=8)
    assert attributes_of(layers_of(graph_of(out))[0])["activation_bits"] == 0
    past = next(v for v in graph_of(out).input if v.name == "past_key_values.0.key")
    assert past.type.tensor_type.elem_type == onnx.TensorProto.INT8


@pytest.mark.parametrize(
    ("family", "style", "present"),
    [
        ("llama", "paper", {"o_proj.norm", "down_proj.norm"}),
        ("llama", "none", set()),
        ("qwen2", "paper", {"o_proj.norm", "down_proj.norm", "qkv_proj.bias"}),
        ("qwen3", "none", {"q_norm", "k_norm"}),
    ],
)
def test_what_a_layer_does_not_have_is_left_empty(
    student_dir: Students, family: str, style: str, present: set[str], tmp_path: Path
) -> None:
    graph = graph_of(exporters.export(student_dir(family, style), "onnx", tmp_path / "out"))
    optional = ("q_norm", "k_norm", "o_proj.norm", "down_proj.norm", "bias")
    for node in layers_of(graph):
        given = [name.removesuffix(".weight") for name in node.input if name]
        names = {name for name in given if name.endswith(optional)}
        assert {".".join(n.split(".")[4:]) for n in names} == present
        # the matrices are where they are in every layer
        found = [p for p, name in enumerate(node.input) if name.endswith("_proj.weight")]
        assert found == [9, 12, 15, 18]
        assert node.input[-1]


FITTING = [
    *((family, style, "custom") for family in ("llama", "qwen2", "qwen3") for style in
      ("paper", "none")),
]  # fmt: skip
OTHERS = [
    ("gemma3_text", "paper", "custom"),  # norms what it adds
    ("gemma3_text", "none", "custom"),
    ("qwen3", "allnorm", "custom"),  # seven matrices
    ("llama", "paper", "portable"),
    ("llama", "paper", "integer"),
]


@pytest.mark.parametrize(
    ("family", "style", "ops", "nodes"), [*((*f, 2) for f in FITTING), *((*o, 0) for o in OTHERS)]
)
def test_layers_that_the_operator_does_not_have_are_several_nodes(
    student_dir: Students, family: str, style: str, ops: str, nodes: int, tmp_path: Path
) -> None:
    out = exporters.export(student_dir(family, style), "onnx", tmp_path / "out", ops=ops)
    kinds = Counter(node.op_type for node in graph_of(out).node)
    assert kinds["DecoderLayer"] == nodes
    assert (kinds["TernaryLinear"] > 0) == (ops == "custom" and nodes == 0)


def test_matrices_are_read_back_from_layers(artifact: Path, student: Path) -> None:
    """As the student has them, whichever node holds them."""
    opened = checkpoint.open_student(student)
    for name, trits, scale in to_onnx.read_linears(artifact, opened.spec):
        expected, exact = opened.ternary(name)
        np.testing.assert_array_equal(trits, expected)
        assert scale == exact


@pytest.mark.parametrize(("size", "nodes"), [(96, 2), (100, 0)])
def test_gate_and_up_that_share_a_block_of_rows_need_several_nodes(
    student_dir: Students, size: int, nodes: int, tmp_path: Path
) -> None:
    student = student_dir("llama", intermediate_size=size)
    out = exporters.export(student, "onnx", tmp_path / "out")
    assert len(layers_of(graph_of(out))) == nodes
