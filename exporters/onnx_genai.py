"""What onnxruntime-genai needs beside the model: its configuration, and a graph of its interface.

GenAI feeds `input_ids`, `attention_mask` and the cache, and reads logits (B, 1, V) of the last
token of every sequence. `model_genai.onnx` is the same decoder with these ends: it derives lengths
and rows from the mask in a few nodes, and refers to the weights of `model.onnx.data`, so it costs
some kilobytes of disk. The graph of our own runtime is left as it is.

The cache is one buffer for past and present. GenAI loads custom operators only from inside the
model's directory (or its working directory): `with_library` copies them there.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from bitdistill import manifest
from bitdistill.backends import kv_cache
from bitdistill.backends.kernels import library_path
from bitdistill.decoder import DecoderSpec
from bitdistill.exporters.onnx_nodes import typed_value

MODEL = "model_genai.onnx"
CONFIG = "genai_config.json"
MAX_LENGTH = 2048  # of a generation unless the caller asks for another; GenAI allocates it at once


def write_graph(model: ir.Model, out: Path) -> None:
    """Change a decoder's ends to GenAI's and save it as model_genai.onnx; `model` is altered."""
    graph = model.graph
    inputs = {value.name: value for value in graph.inputs}
    mask = typed_value("attention_mask", ["batch", "total"], ir.DataType.INT64)
    front = _Front(graph)
    lengths = front.op("ReduceSum", mask, front.constant("axis_1", [1]), keepdims=0)
    total = front.op("ReduceMax", lengths, keepdims=0)
    one = front.constant("one", 1)
    front.replace(inputs["seqlens_k"], front.int32(front.op("Sub", lengths, one)))
    front.replace(inputs["total_sequence_length"], front.int32(total))
    front.replace(inputs["logit_rows"], _last_rows(front, inputs["input_ids"], lengths, total))
    cache = [value for value in graph.inputs if str(value.name).startswith("past_key_values.")]
    graph.inputs[:] = [inputs["input_ids"], mask, *cache]
    graph.insert_before(graph[0], front.nodes)
    _widen_logits(graph)
    ir.save(model, out / MODEL)


class _Front:
    """Nodes to be put before a graph's own, with their constants."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.nodes: list[ir.Node] = []

    def op(self, kind: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        output = ir.Value(name=f"genai.{len(self.nodes)}")
        node = ir.node(kind, inputs, attributes=attributes, outputs=[output])
        node.name = f"genai/{kind}_{len(self.nodes)}"
        self.nodes.append(node)
        return output

    def constant(self, name: str, value: int | list[int]) -> ir.Value:
        tensor = ir.tensor(np.array(value, np.int64), name=f"genai.{name}")
        kind = ir.TensorType(tensor.dtype)
        made = ir.Value(name=tensor.name, shape=tensor.shape, type=kind, const_value=tensor)
        self.graph.initializers.add(made)
        return made

    def int32(self, value: ir.Value) -> ir.Value:
        return self.op("Cast", value, to=ir.DataType.INT32.value)

    def replace(self, old: ir.Value, new: ir.Value) -> None:
        ir.convenience.replace_all_uses_with(old, new)


def _last_rows(front: _Front, ids: ir.Value, lengths: ir.Value, total: ir.Value) -> ir.Value:
    """Positions of B * T that hold the last token of every sequence, padding on the right.

    length - 1 - (total - T) is negative where a shorter sequence of a batch is decoded: T is 1.
    """
    zero, one = front.constant("zero", 0), front.constant("one_too", 1)
    shape = front.op("Shape", ids)
    batch, count = (front.op("Gather", shape, index, axis=0) for index in (zero, one))
    before = front.op("Sub", total, count)
    last = front.op("Max", front.op("Sub", front.op("Sub", lengths, one), before), zero)
    first = front.op("Mul", front.op("Range", zero, batch, one), count)
    return front.op("Add", first, last)


def _widen_logits(graph: ir.Graph) -> None:
    """logits (B, V) -> (B, 1, V)."""
    flat = graph.outputs[0]
    words = flat.shape[1]
    flat.name = "logits_of_rows"
    axes = ir.tensor(np.array([1], np.int64), name="genai.logits_axis")
    axis = ir.Value(
        name=axes.name, shape=axes.shape, type=ir.TensorType(axes.dtype), const_value=axes
    )
    graph.initializers.add(axis)
    logits = typed_value("logits", ["batch", 1, words])
    graph.append(ir.node("Unsqueeze", [flat, axis], outputs=[logits]))
    graph.outputs[0] = logits


def write_config(
    spec: DecoderSpec,
    context: int,
    config: dict[str, Any],
    stop: list[int],
    out: Path,
    ops: str,
    kv_bits: int,
) -> None:
    """Write genai_config.json; `config` is the student's, for the ids of special tokens."""
    session: dict[str, Any] = {
        "log_id": "onnxruntime-genai",
        "intra_op_num_threads": 0,  # onnxruntime's own choice; GenAI's is half the cores
        "provider_options": [],
    }
    if ops == "custom":
        session["custom_ops_library"] = library_path().name
    bos, pad = (config.get(f"{name}_token_id") for name in ("bos", "pad"))
    first = stop[0] if stop else 0
    model = {
        "type": spec.family,
        "context_length": context,
        "vocab_size": spec.vocabulary,
        "bos_token_id": first if bos is None else bos,
        "eos_token_id": stop or [first],
        "pad_token_id": first if pad is None else pad,
        "decoder": _decoder(spec, session, kv_bits),
    }
    search = {"do_sample": False, "max_length": min(context, MAX_LENGTH), "num_beams": 1}
    search["past_present_share_buffer"] = True
    manifest.write_json(out / CONFIG, {"model": model, "search": search})


def _decoder(spec: DecoderSpec, session: dict[str, Any], kv_bits: int) -> dict[str, Any]:
    past = {f"past_{part}_names": f"past_key_values.%d.{part}" for part in ("key", "value")}
    present = {f"present_{part}_names": f"present.%d.{part}" for part in ("key", "value")}
    return {
        "session_options": session,
        "filename": MODEL,
        "head_size": kv_cache.row_elements(spec.head_dim, kv_bits),  # GenAI: of the cache alone
        "hidden_size": spec.hidden,
        "num_attention_heads": spec.heads,
        "num_hidden_layers": len(spec.layers),
        "num_key_value_heads": spec.kv_heads,
        "inputs": {"input_ids": "input_ids", "attention_mask": "attention_mask", **past},
        "outputs": {"logits": "logits", **present},
    }


def copy_library(out: Path) -> None:
    """Copy the custom-op library of this installation into the artifact."""
    shutil.copyfile(library_path(), out / library_path().name)
