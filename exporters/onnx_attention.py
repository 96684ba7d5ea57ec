"""Rotation, cache update and causal attention, by one node.

`bitdistill.Attention` takes the norms of queries and keys inside and a cache of 32, 16 or 8 bits.
Artifacts of stock operators alone have `com.microsoft.GroupQueryAttention`, whose cache is fp32 on
CPUs, and separate nodes for the norms.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from bitdistill.backends import kv_cache
from bitdistill.decoder import DecoderSpec, LayerSpec, RotarySpec
from bitdistill.exporters.onnx_linears import DEFAULT
from bitdistill.exporters.onnx_nodes import typed_value

if TYPE_CHECKING:
    from bitdistill.exporters.onnx_graph import DecoderGraph

KV_BITS = tuple(kv_cache.DTYPES)
DEFAULT_KV_BITS = {"custom": 16}  # stock operators: 32
HEAD_SIZE_MULTIPLE = 16  # what either operator can rotate
SURROUNDINGS = 7  # inputs of our own operator behind query, key and value


def resolve_bits(bits: int | None, ops: str) -> int:
    """Bits of an element of the cache; ValueError for what the operators do not have."""
    if bits is None:
        return DEFAULT_KV_BITS.get(ops, 32)
    if ops != DEFAULT and bits != 32:
        raise ValueError(
            f"onnxruntime's own attention keeps keys and values at 32 bits; leave --kv-bits {bits} "
            "out, or use --ops custom"
        )
    return bits


def cache_value(name: str, spec: DecoderSpec, bits: int, positions: str) -> ir.Value:
    """A typed past or present of one layer."""
    _, heads, _, elements = kv_cache.shape(spec, bits, 1, 1)
    dtype = ir.DataType.from_numpy(kv_cache.DTYPES[bits])
    return typed_value(name, ["batch", heads, positions, elements], dtype)


def rotary(graph: DecoderGraph, index: int, spec: RotarySpec) -> list[ir.Value]:
    """What an attention node is given of a rotary table: frequencies, or cosines and sines."""
    name = f"rotary.{index}"
    if graph.ops == DEFAULT:
        frequencies = np.array(spec.frequencies, np.float32)
        return [graph.data.add(f"{name}.frequencies", frequencies, "rotary")]
    cos, sin = spec.tables(graph.context)
    return [
        graph.data.add(f"{name}.cos", cos, "rotary"),
        graph.data.add(f"{name}.sin", sin, "rotary"),
    ]


def attend(
    graph: DecoderGraph, projected: list[ir.Value], index: int, layer: LayerSpec
) -> ir.Value:
    """Attention of projected q, k and v, or of all three in one tensor: (B, T, heads * D)."""
    spec, block = graph.spec, f"layers.{index}.self_attn"
    own = graph.ops == DEFAULT
    if spec.qk_norm and not own:
        q, k, v = _split(graph, projected, block)
        projected = [
            _head_norm(graph, q, f"{block}.q_norm", spec.heads),
            _head_norm(graph, k, f"{block}.k_norm", spec.kv_heads),
            v,
        ]
    around, present, attributes = surroundings(graph, index, layer)
    # A packed projection (q, k and v in one tensor) leaves the key and value inputs empty.
    inputs = [*projected, *([None] * (3 - len(projected))), *around]
    y = ir.Value(name=f"{block}.attention")
    operator = ("Attention", "bitdistill") if own else ("GroupQueryAttention", "com.microsoft")
    graph.append(operator[0], inputs, [y, *present], operator[1], attributes)
    graph.outputs += present
    return y


def surroundings(
    graph: DecoderGraph, index: int, layer: LayerSpec
) -> tuple[list[ir.Value | None], list[ir.Value], dict[str, Any]]:
    """Inputs behind query, key and value, outputs behind the first, and attributes."""
    spec, own = graph.spec, graph.ops == DEFAULT
    inputs = [
        *(graph.inputs[f"past_key_values.{index}.{part}"] for part in ("key", "value")),
        graph.inputs["seqlens_k"],
        graph.inputs["total_sequence_length"],
        *graph.rotary[layer.rotary],
    ]
    if spec.qk_norm and own:
        block = f"model.layers.{index}.self_attn"
        inputs += [graph.norm_weight(f"{block}.{name}") for name in ("q_norm", "k_norm")]
    present = [
        cache_value(f"present.{index}.{part}", spec, graph.kv_bits, "present")
        for part in ("key", "value")
    ]
    attributes = _attributes(graph, layer.window)
    if own:
        scale = spec.rotary[layer.rotary].scale
        attributes |= {"epsilon": spec.norm_eps, "context": graph.context, "rotary_scale": scale}
    else:
        attributes |= {"do_rotary": 1}
    return list(inputs), present, attributes


def _attributes(graph: DecoderGraph, window: int | None) -> dict[str, Any]:
    near = window is not None and window < graph.context
    everything = 0 if graph.ops == DEFAULT else -1
    return {
        "num_heads": graph.spec.heads,
        "kv_num_heads": graph.spec.kv_heads,
        "scale": graph.spec.attention_scale,
        "local_window_size": window if near else everything,
    }


def _split(graph: DecoderGraph, projected: list[ir.Value], block: str) -> list[ir.Value]:
    if len(projected) == 3:
        return projected
    queries, keys = (n * graph.spec.head_dim for n in (graph.spec.heads, graph.spec.kv_heads))
    return graph.split(projected[0], [queries, keys, keys], f"{block}.split")


def _head_norm(graph: DecoderGraph, x: ir.Value, name: str, heads: int) -> ir.Value:
    """RMSNorm over each head of (B, T, heads * head_dim)."""
    size = graph.spec.head_dim
    by_head = graph.constant(f"heads_{heads}", np.array([0, 0, heads, size], np.int64))
    flat = graph.constant(f"flat_{heads}", np.array([0, 0, heads * size], np.int64))
    x = graph.op("Reshape", [x, by_head], f"{name}.heads")
    x = graph.norm(x, f"model.{name}", name)
    return graph.op("Reshape", [x, flat], f"{name}.flat")
