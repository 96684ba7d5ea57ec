"""A decoder layer as one node, `bitdistill.DecoderLayer`: its products, attention and residuals.

A layer that norms what attention or the MLP gives before adding it (Gemma), whose projections have
norms of their own (`allnorm`), or whose intermediate size is not divisible by 32, is made of nodes
of its own for each of these (onnx_graph.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from bitdistill import packing
from bitdistill.decoder import LayerSpec
from bitdistill.exporters import onnx_attention
from bitdistill.exporters.onnx_linears import DEFAULT, stored_inputs

if TYPE_CHECKING:
    from bitdistill.exporters.onnx_graph import DecoderGraph


# In the order of the operator's inputs, with the block norm that precedes each.
PARTS = {
    "self_attn.qkv_proj": "input_norm",
    "self_attn.o_proj": None,
    "mlp.gate_up_proj": "mlp_norm",
    "mlp.down_proj": None,
}


def fits(graph: DecoderGraph) -> bool:
    """Whether the layers of this decoder are what the operator computes."""
    names = graph.spec.names
    added_norms = (names.post_attention_norm, names.post_mlp_norm)
    whole_blocks = graph.spec.intermediate % packing.BLOCK_ROWS == 0
    usual = added_norms == (None, None) and set(graph.stored) == set(PARTS)
    return graph.ops == DEFAULT and usual and whole_blocks


def layer(graph: DecoderGraph, x: ir.Value, index: int, spec: LayerSpec) -> ir.Value:
    """x (B, T, hidden) -> the layer's output, the last sum of its residuals."""
    inputs, presents, attributes = onnx_attention.surroundings(graph, index, spec)
    inputs += [None] * (onnx_attention.SURROUNDINGS - len(inputs))  # the norms of q and k
    matrices: list[ir.Value | None] = []
    scales = []
    for name, norm in PARTS.items():
        block_norm = norm and f"model.layers.{index}.{getattr(graph.spec.names, norm)}"
        matrix = graph.matrix(name, index, block_norm)
        matrices += stored_inputs(graph, matrix)
        scales.append(matrix.scales)
    # In one tensor: each takes a page of memory, and 3 KB of the session's.
    scale = graph.data.add(f"model.layers.{index}.scale", np.concatenate(scales), "body")
    inputs += [scale, *matrices]
    while inputs[-1] is None:
        inputs.pop()
    sizes = {
        "hidden_size": graph.spec.hidden,
        "intermediate_size": graph.spec.shape("mlp.up_proj")[0],
        "head_size": graph.spec.head_dim,
        "layout": graph.layout,
        "activation_bits": graph.spec.activation_bits or 0,
        "activation": graph.spec.activation,
        "added_epsilon": graph.spec.added_norm_eps,
    }
    y = ir.Value(name=f"layers.{index}.mlp_residual")
    outputs, attributes = [y, *presents], attributes | sizes
    graph.append("DecoderLayer", [x, *inputs], outputs, "bitdistill", attributes, f"layers.{index}")
    graph.outputs += presents
    return y
