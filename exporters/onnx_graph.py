"""The decoder as an ONNX graph, built node by node (IR 10, opset 21); nothing is traced.

Inputs   input_ids int64 (B, T)            right-padded where B > 1; of a classifier the rows
                                           instead, embeddings float32 (B, T, hidden)
         seqlens_k int32 (B)               length of each sequence, past included, minus 1
         total_sequence_length int32 ()    the longest of them, past included
         logit_rows int64 (P)              positions of B * T whose logits are wanted
         past_key_values.{i}.key/.value    (B, KV heads, S, ...), of backends/kv_cache.py
Outputs  logits float32 (P, V), present.{i}.key/.value; a present may share its past's buffer.

A layer is one `bitdistill.DecoderLayer` (onnx_layer.py) where that has all of it. Elsewhere every
ternary matrix is one `bitdistill.TernaryLinear`, or the stock operators that onnx_linears.py
puts in its place; its RMSNorm prologue is the linear's own norm, or the block's where nothing else
reads that. Matrices that read the same input are stacked
(`qkv_proj`, `gate_up_proj`), with one scale for each `scale_rows` rows. An MLP's gate is the
prologue of `down_proj`, and a residual that no norm precedes the epilogue of the linear before it;
the sum is called `layers.{i}.attention_residual` or `mlp_residual` either way. Attention, with
rotation and cache, is one node as well (onnx_attention.py). The norms that remain are a
model-local function, one node in Netron and one fused kernel in ONNX Runtime.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from bitdistill import packing, tables
from bitdistill.decoder import DecoderSpec, LayerSpec
from bitdistill.exporters import onnx_attention, onnx_layer, onnx_tables
from bitdistill.exporters.base import Options
from bitdistill.exporters.onnx_layout import FUSED, scale_rows, stored_linears
from bitdistill.exporters.onnx_linears import DEFAULT, OPERATORS, Stacked
from bitdistill.exporters.onnx_nodes import (
    IR_VERSION,
    OPSETS,
    Ends,
    NodeBuilder,
    rms_norm_function,
    typed_value,
)
from bitdistill.exporters.onnx_tensors import TensorFile


class Reader(Protocol):
    """Gives a student's tensors by name."""

    def tensor(self, name: str) -> NDArray[np.float32]:
        """A whole one."""

    def rows(self, name: str) -> tables.Rows:
        """A matrix to be read some rows at a time."""

    def ternary(self, linear: str) -> tuple[NDArray[np.int8], float]:
        """Trits (N, K) and scale of a linear."""


class DecoderGraph(NodeBuilder):
    """Builds the graph of one decoder; `build` is the whole, read top to bottom."""

    def __init__(
        self,
        spec: DecoderSpec,
        context: int,
        options: Options,
        label_rows: NDArray[np.float32] | None,
        reader: Reader,
        data: TensorFile,
    ) -> None:
        super().__init__(data)
        self.spec, self.context, self.ops = spec, context, options.ops or DEFAULT
        self.kv_bits = onnx_attention.resolve_bits(options.kv_bits, self.ops)
        self.label_rows = label_rows
        self.embed_bits, self.layout = options.embed_bits, packing.LAYOUTS[options.weight_bits]
        self.reader = reader
        self.stored = stored_linears(spec)
        self.outputs: list[ir.Value] = []

    def build(self) -> ir.Model:
        """The model, its tensors written to the data file."""
        self.inputs = self._inputs()
        self.rotary = [
            onnx_attention.rotary(self, index, rotary)
            for index, rotary in enumerate(self.spec.rotary)
        ]
        x = self.embedding()
        for index, layer in enumerate(self.spec.layers):
            x = self.layer(x, index, layer)
        logits = self.head(x)
        return self._model([logits, *self.outputs])

    # The parts of a decoder

    def embedding(self) -> ir.Value:
        """Token ids -> (B, T, hidden); a classifier is fed the rows themselves."""
        if self.label_rows is not None:
            return self._scaled(self.inputs["embeddings"])
        self.table = self._table("model.embed_tokens.weight", "embedding")
        return self._scaled(onnx_tables.lookup(self, self.table, self.inputs["input_ids"]))

    def _scaled(self, x: ir.Value) -> ir.Value:
        if self.spec.embedding_scale != 1.0:
            scale = self.constant("embedding_scale", np.float32(self.spec.embedding_scale))
            x = self.op("Mul", [x, scale], "embed_tokens/scale")
        return x

    def layer(self, x: ir.Value, index: int, layer: LayerSpec) -> ir.Value:
        """One node where an operator has all of a layer, or one for each matrix and attention."""
        if onnx_layer.fits(self):
            return onnx_layer.layer(self, x, index, layer)
        return self.mlp(self.attention(x, index, layer), index)

    def attention(self, x: ir.Value, index: int, layer: LayerSpec) -> ir.Value:
        """x + [norm] o_proj(attention of input_norm(x))."""
        names = self.spec.names
        projected = self._project(x, index, names.input_norm, "self_attn.qkv_proj")
        y = onnx_attention.attend(self, projected, index, layer)
        ends = (names.post_attention_norm, "attention_residual")
        return self._added("self_attn.o_proj", [y], index, x, *ends)

    def mlp(self, x: ir.Value, index: int) -> ir.Value:
        """x + [norm] down_proj(act(gate) * up) of mlp_norm(x)."""
        names = self.spec.names
        projected = self._project(x, index, names.mlp_norm, "mlp.gate_up_proj")
        ends = (names.post_mlp_norm, "mlp_residual")
        return self._added("mlp.down_proj", projected, index, x, *ends)

    def head(self, x: ir.Value) -> ir.Value:
        """Hidden states -> logits (P, V) of the asked positions alone."""
        flat = self.constant("flat_shape", np.array([-1, self.spec.hidden], np.int64))
        x = self.op("Reshape", [x, flat], "flatten")
        x = self.op("Gather", [x, self.inputs["logit_rows"]], "asked_rows", axis=0)
        x = self.norm(x, "model.norm", "norm")
        if self.label_rows is not None:
            rows = self.data.add("label_head.weight", self.label_rows, "head")
            return self.op("Gemm", [x, rows], "label_head", output="logits", transB=1)
        table = self.table if self.spec.tied else self._table("lm_head.weight", "head")
        return onnx_tables.head(self, table, x)

    # Pieces of the parts

    def _project(self, x: ir.Value, index: int, norm: str, fused: str) -> list[ir.Value]:
        """Projections of norm(x): one stacked matrix with the norm inside, or each on its own."""
        block_norm = f"model.layers.{index}.{norm}"
        if fused in self.stored:
            return [self.linear(fused, Ends([x]), index, block_norm)]
        normed = self.norm(x, block_norm, f"layers.{index}.{norm}")
        return [self.linear(part, Ends([normed]), index) for part in FUSED[fused]]

    def _added(
        self,
        name: str,
        inputs: list[ir.Value],
        index: int,
        x: ir.Value,
        norm: str | None,
        result: str,
    ) -> ir.Value:
        """x + [norm] of a linear of attention's output, or of an MLP's gate and up."""
        activation = self.spec.activation if name == "mlp.down_proj" else None
        result = f"layers.{index}.{result}"
        if norm is None:
            return self.linear(name, Ends(inputs, activation, x, result), index)
        y = self.linear(name, Ends(inputs, activation), index)
        y = self.norm(y, f"model.layers.{index}.{norm}", f"layers.{index}.{norm}")
        return self.op("Add", [x, y], result)

    def linear(self, name: str, ends: Ends, index: int, block_norm: str | None = None) -> ir.Value:
        """The product with one stored ternary matrix."""
        return OPERATORS[self.ops].multiply(self, self.matrix(name, index, block_norm), ends)

    def matrix(self, name: str, index: int, block_norm: str | None = None) -> Stacked:
        """One stored ternary matrix, with the norm on its input if it has one."""
        spec, prefix = self.spec, f"model.layers.{index}"
        parts, path = self.stored[name], f"model.layers.{index}.{name}"
        read = [self.reader.ternary(f"{prefix}.{part}") for part in parts]
        shared = scale_rows(spec, parts)
        scales = [np.full(len(trits) // shared, scale, np.float32) for trits, scale in read]
        norm, epsilon = self._prologue(path, parts[0], block_norm)
        return Stacked(
            path=path,
            node=f"layers.{index}.{name}",
            trits=np.concatenate([trits for trits, _ in read]),
            scales=np.concatenate(scales),
            scale_rows=shared,
            norm=norm,
            epsilon=epsilon,
            bias=self._bias(prefix, parts),
            activation_bits=spec.activation_bits,
            layout=self.layout,
        )

    def _prologue(
        self, name: str, part: str, block_norm: str | None
    ) -> tuple[ir.Value | None, float]:
        """Weight and epsilon of the norm inside a ternary node: the block's, its own, or none."""
        if block_norm is not None:
            return self.norm_weight(block_norm), self.spec.norm_eps
        if not self.spec.has_norm(part):
            return None, self.spec.norm_eps
        weight = self.reader.tensor(f"{name}.norm.weight")
        return self.data.add(f"{name}.norm.weight", weight, "norms"), self.spec.added_norm_eps

    def _bias(self, prefix: str, parts: Sequence[str]) -> NDArray[np.float32] | None:
        if not self.spec.has_bias(parts[0]):
            return None
        return np.concatenate([self.reader.tensor(f"{prefix}.{part}.bias") for part in parts])

    def norm(self, x: ir.Value, weight: str, name: str) -> ir.Value:
        """A norm of the teacher's architecture, over the last axis."""
        inputs = [x, self.norm_weight(weight)]
        return self.op("RMSNorm", inputs, name, "bitdistill.functions", epsilon=self.spec.norm_eps)

    # Tensors

    def norm_weight(self, module: str) -> ir.Value:
        """The factor a block norm multiplies by: gemma's 1 + w is stored as such."""
        weight = self.reader.tensor(f"{module}.weight") + np.float32(self.spec.norm_offset)
        return self.data.add(f"{module}.weight", weight, "norms")

    def _table(self, name: str, part: str) -> onnx_tables.StoredTable:
        """The embedding or head (V, hidden)."""
        return onnx_tables.store(
            self, name, self.reader.rows(name), part, self.embed_bits, self.ops
        )

    # The model

    def _inputs(self) -> dict[str, ir.Value]:
        spec = self.spec
        tokens = typed_value("input_ids", ["batch", "sequence"], ir.DataType.INT64)
        if self.label_rows is not None:
            tokens = typed_value("embeddings", ["batch", "sequence", spec.hidden])
        values = [
            tokens,
            typed_value("seqlens_k", ["batch"], ir.DataType.INT32),
            typed_value("total_sequence_length", [], ir.DataType.INT32),
            typed_value("logit_rows", ["rows"], ir.DataType.INT64),
            *(
                onnx_attention.cache_value(
                    f"past_key_values.{i}.{part}", spec, self.kv_bits, "past"
                )
                for i in range(len(spec.layers))
                for part in ("key", "value")
            ),
        ]
        return {str(value.name): value for value in values}

    def _model(self, outputs: list[ir.Value]) -> ir.Model:
        logits = outputs[0]
        words = self.spec.vocabulary if self.label_rows is None else len(self.label_rows)
        logits.shape = ir.Shape(["rows", words])
        logits.type = ir.TensorType(ir.DataType.FLOAT)
        domains = {node.domain for node in self.nodes}
        stored = [*self.data.values.values(), *self.constants.values()]
        graph = ir.Graph(
            list(self.inputs.values()),
            outputs,
            nodes=self.nodes,
            initializers=[value for value in stored if value.uses()],
            opset_imports={d: v for d, v in OPSETS.items() if d in ("", *domains)},
            name=f"{self.spec.family}_decoder",
        )
        model = ir.Model(graph, ir_version=IR_VERSION, functions=[rms_norm_function()])
        model.producer_name = "bitdistill"
        return model
