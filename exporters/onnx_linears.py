"""A ternary matrix in an ONNX graph: how it is stored, multiplied and read back.

One row of OPERATORS for each `--ops`:

custom    `bitdistill.TernaryLinear`: 2 or 1.6 bits a weight; gate, norm, rounding and residual
          inside the node.
portable  MatMulNBits, 2 bits and a scale for each block of columns. Trits are the codes 1, 2, 3
          around the operator's own zero point 2, so weights are exact; it rounds activations to
          8 bits in every block of columns, which is finer than the token's one scale in training.
integer   MatMulInteger, a byte a weight. The token's rounding is written out in nodes, so the
          product is the exact one. Activations are uint8 around 128: the signed form is slow.

The last two need no library of ours, wherever ONNX Runtime's own CPU operators are built in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from bitdistill import packing
from bitdistill.exporters.onnx_nodes import Ends, NodeBuilder
from bitdistill.manifest import FormatError

DEFAULT = "custom"
ACTIVATION_EPS = 1e-5  # of quantize.py
LEVELS = 127.0
ZERO = 128.0
BY_BLOCK, UNROUNDED = 4, 1  # accuracy levels of MatMulNBits: int8 by block, fp32
LAYER_SCALE, LAYER_INPUTS = 8, 3  # of a DecoderLayer: where its scales are; inputs of each matrix


@dataclass(frozen=True)
class Stacked:
    """Linears that read the same input, stacked along N into one matrix.

    `path` names its tensors (`model.layers.0.mlp.gate_up_proj`), `node` its node. `scales` holds
    one scale for every `scale_rows` rows. `norm` is the weight of the RMSNorm on the input.
    """

    path: str
    node: str
    trits: NDArray[np.int8]
    scales: NDArray[np.float32]
    scale_rows: int
    norm: ir.Value | None
    epsilon: float
    bias: NDArray[np.float32] | None
    activation_bits: int | None
    layout: int

    @property
    def row_scales(self) -> NDArray[np.float32]:
        """The scale of every row, (N,)."""
        repeated: NDArray[np.float32] = np.repeat(self.scales, self.scale_rows)
        return repeated


Multiply = Callable[[NodeBuilder, Stacked, Ends], ir.Value]
ReadBack = Callable[[ir.Graph, str, int, int], tuple[NDArray[np.int8], NDArray[np.float32]]]


@dataclass(frozen=True)
class Operators:
    """`multiply` adds a matrix to a graph; `read` gives back its trits (N, K) and row scales."""

    multiply: Multiply
    read: ReadBack


def _bias(graph: NodeBuilder, matrix: Stacked) -> ir.Value | None:
    if matrix.bias is None:
        return None
    return graph.data.add(f"{matrix.path}.bias", matrix.bias, "body")


def _prepared(graph: NodeBuilder, matrix: Stacked, ends: Ends) -> ir.Value:
    """The gate's product and the norm, in stock operators."""
    x = graph.gated(ends, matrix.trits.shape[1], matrix.node)
    if matrix.norm is None:
        return x
    inputs, name = [x, matrix.norm], f"{matrix.node}.norm"
    return graph.op("RMSNorm", inputs, name, "bitdistill.functions", epsilon=matrix.epsilon)


# custom


def stored_inputs(graph: NodeBuilder, matrix: Stacked) -> list[ir.Value | None]:
    """Weight, norm and bias, as DecoderLayer has them in turn; a TernaryLinear has scales too."""
    packed = packing.pack_layout(matrix.trits, matrix.layout)
    return [
        graph.data.add(f"{matrix.path}.weight", packed, "body"),
        matrix.norm,
        _bias(graph, matrix),
    ]


def _custom(graph: NodeBuilder, matrix: Stacked, ends: Ends) -> ir.Value:
    rows, columns = matrix.trits.shape
    gate, *up = ends.inputs
    weight, *others = stored_inputs(graph, matrix)
    scale = graph.data.add(f"{matrix.path}.scale", matrix.scales, "body")
    inputs = [gate, weight, scale, *others, up[0] if up else None, ends.residual]
    while inputs[-1] is None:
        inputs.pop()
    activation = {} if ends.activation is None else {"activation": ends.activation}
    return graph.op(
        "TernaryLinear",
        inputs,
        matrix.node,
        "bitdistill",
        ends.name,
        N=rows,
        K=columns,
        scale_rows=matrix.scale_rows,
        layout=matrix.layout,
        epsilon=matrix.epsilon,
        activation_bits=matrix.activation_bits or 0,
        **activation,
    )


def _read_custom(
    graph: ir.Graph, path: str, rows: int, columns: int
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    found = next((n for n in graph if _place(n, path) is not None), None)
    if found is None:
        raise FormatError(f"the model has no matrix {path}; export it again")
    place = _place(found, path) or 0
    if found.op_type == "DecoderLayer":
        scales = _layer_scales(found, path, (place - LAYER_SCALE - 1) // LAYER_INPUTS)
        shared = rows // len(scales)
    else:
        rows, columns, shared = (_integer_of(found, path, n) for n in ("N", "K", "scale_rows"))
        scales = _own_scales(found, path, place + 1, rows, shared)
    weight = _constant(found, path, place)
    trits = packing.unpack_layout(weight, rows, columns, _integer_of(found, path, "layout"))
    repeated: NDArray[np.float32] = np.repeat(scales, shared)
    return trits, repeated


def _place(node: ir.Node, path: str) -> int | None:
    """Where a node of ours has a matrix among its inputs."""
    if node.op_type not in ("TernaryLinear", "DecoderLayer"):
        return None
    names = [value and value.name for value in node.inputs]
    return names.index(f"{path}.weight") if f"{path}.weight" in names else None


def _integer_of(node: ir.Node, path: str, name: str) -> int:
    if name not in node.attributes:
        raise FormatError(f"{path} was written by an older version; export it again")
    value: int = node.attributes[name].as_int()
    return value


def _constant(node: ir.Node, path: str, index: int) -> NDArray[Any]:
    value = node.inputs[index] if index < len(node.inputs) else None
    if value is None or value.const_value is None:
        raise FormatError(f"the weight and scale of {path} are not stored; export it again")
    array: NDArray[Any] = value.const_value.numpy()
    return array


def _own_scales(
    node: ir.Node, path: str, index: int, rows: int, shared: int
) -> NDArray[np.float32]:
    """The scales of a TernaryLinear, one for `shared` rows."""
    scales = _constant(node, path, index)
    if shared < 1 or scales.shape != (rows / shared,):
        raise FormatError(
            f"{node.name} has {scales.size} scales of {shared} rows each for its {rows} rows; "
            "export it again"
        )
    return scales


def _layer_scales(node: ir.Node, path: str, part: int) -> NDArray[np.float32]:
    """Those of one matrix of a DecoderLayer, which has the scales of all in one tensor."""
    heads, keys = (_integer_of(node, path, name) for name in ("num_heads", "kv_num_heads"))
    counts = [heads // max(keys, 1) + 2, 1, 2, 1]  # of qkv, o, gate_up and down
    scales = _constant(node, path, LAYER_SCALE)
    if scales.shape != (sum(counts),):
        raise FormatError(
            f"{node.name} has {scales.size} scales, not {sum(counts)}; export it again"
        )
    first = sum(counts[:part])
    return scales[first : first + counts[part]]


# portable


def _portable(graph: NodeBuilder, matrix: Stacked, ends: Ends) -> ir.Value:
    rows, columns = matrix.trits.shape
    block = packing.stock_block(columns)
    scales = np.repeat(matrix.row_scales[:, None], -(-columns // block), axis=1)
    inputs = [
        _prepared(graph, matrix, ends),
        graph.data.add(f"{matrix.path}.weight", packing.pack_stock(matrix.trits), "body"),
        graph.data.add(f"{matrix.path}.scale", scales, "body"),
    ]
    if matrix.bias is not None:
        inputs += [None, None, _bias(graph, matrix)]  # zero points and group indices are absent
    y = graph.op(
        "MatMulNBits",
        inputs,
        matrix.node,
        "com.microsoft",
        N=rows,
        K=columns,
        bits=2,
        block_size=block,
        accuracy_level=BY_BLOCK if matrix.activation_bits else UNROUNDED,
    )
    return graph.added(y, ends)


def _read_portable(
    graph: ir.Graph, path: str, rows: int, columns: int
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    trits = packing.unpack_stock(_array(graph, f"{path}.weight"), rows, columns)
    scales = _array(graph, f"{path}.scale")
    if (scales != scales[:, :1]).any():
        raise FormatError(f"the blocks of a row of {path} have different scales; export it again")
    return trits, np.ascontiguousarray(scales[:, 0])


# integer


def _integer(graph: NodeBuilder, matrix: Stacked, ends: Ends) -> ir.Value:
    quantised, largest = _quantise(graph, _prepared(graph, matrix, ends), matrix.node)
    weight = graph.data.add(f"{matrix.path}.weight", np.ascontiguousarray(matrix.trits.T), "body")
    scales = matrix.scales if len(matrix.scales) == 1 else matrix.row_scales
    scale = graph.data.add(f"{matrix.path}.scale", scales, "body")
    zero = graph.constant("zero_point", np.uint8(ZERO))
    sums = graph.op("MatMulInteger", [quantised, weight, zero], f"{matrix.node}.sums")
    sums = graph.op("Cast", [sums], f"{matrix.node}.float", to=ir.DataType.FLOAT.value)
    # A Div last: where it is a Mul, ONNX Runtime fuses all this and takes one scale for all tokens.
    factor = graph.op("Mul", [largest, scale], f"{matrix.node}.max_scale")
    factor = graph.op("Div", [factor, _levels(graph)], f"{matrix.node}.factor")
    bias = _bias(graph, matrix)
    if bias is None:
        return graph.added(graph.op("Mul", [sums, factor], matrix.node), ends)
    y = graph.op("Mul", [sums, factor], f"{matrix.node}.product")
    return graph.added(graph.op("Add", [y, bias], matrix.node), ends)


def _quantise(graph: NodeBuilder, x: ir.Value, node: str) -> tuple[ir.Value, ir.Value]:
    """x (..., K) -> uint8 round(127 x / (max |x| + e)) + 128, and max |x| (..., 1)."""

    def op(kind: str, inputs: list[ir.Value], name: str, **attributes: Any) -> ir.Value:
        return graph.op(kind, inputs, f"{node}.{name}", **attributes)

    epsilon = graph.constant("activation_epsilon", np.float32(ACTIVATION_EPS))
    axes = graph.constant("last_axis", np.array([-1], np.int64))
    largest = op("ReduceMax", [op("Abs", [x], "abs"), axes], "max", keepdims=1)
    up = op("Div", [_levels(graph), op("Add", [largest, epsilon], "max_epsilon")], "up")
    rounded = op("Round", [op("Mul", [x, up], "scaled")], "rounded")
    shifted = op("Add", [rounded, graph.constant("zero", np.float32(ZERO))], "shifted")
    quantised = op("Cast", [shifted], "uint8", to=ir.DataType.UINT8.value)
    return quantised, largest


def _levels(graph: NodeBuilder) -> ir.Value:
    return graph.constant("levels", np.float32(LEVELS))


def _read_integer(
    graph: ir.Graph, path: str, rows: int, columns: int
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    trits = _array(graph, f"{path}.weight").T
    if trits.shape != (rows, columns) or trits.dtype != np.int8 or abs(trits).max() > 1:
        raise FormatError(f"{path} is not a ternary {rows} x {columns} matrix; export it again")
    scales = _array(graph, f"{path}.scale")
    return trits, np.ascontiguousarray(np.broadcast_to(scales, rows))


def _array(graph: ir.Graph, name: str) -> NDArray[Any]:
    value = graph.initializers.get(name)
    if value is None or value.const_value is None:
        raise FormatError(f"the model has no tensor {name}; export it again")
    array: NDArray[Any] = value.const_value.numpy()
    return array


OPERATORS = {
    "custom": Operators(_custom, _read_custom),
    "portable": Operators(_portable, _read_portable),
    "integer": Operators(_integer, _read_integer),
}
