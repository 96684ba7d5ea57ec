"""Building ONNX graphs by hand: nodes, small constants, and the one function of our own.

Everything is named after the module it comes from, which is what a reader sees in Netron.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from bitdistill.exporters.onnx_tensors import TensorFile

IR_VERSION = 10
OPSETS = {"": 21, "com.microsoft": 1, "bitdistill": 1, "bitdistill.functions": 1}


def typed_value(
    name: str, shape: Sequence[int | str], dtype: ir.DataType = ir.DataType.FLOAT
) -> ir.Value:
    """A typed input or output of the graph."""
    return ir.Value(name=name, shape=ir.Shape(list(shape)), type=ir.TensorType(dtype))


def rms_norm_function() -> ir.Function:
    """x / sqrt(mean(x^2) + epsilon) * weight over the last axis, in stock operators."""
    x, weight = ir.Value(name="x"), ir.Value(name="weight")
    nodes: list[ir.Node] = []

    def op(kind: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        output = ir.Value(name=f"{kind.lower()}_{len(nodes)}")
        nodes.append(ir.node(kind, inputs, attributes=attributes, outputs=[output]))
        return output

    two = op("Constant", value_float=2.0)
    axis = op("Constant", value_ints=[-1])
    epsilon = ir.Value(name="epsilon_value")
    reference = ir.RefAttr("value_float", "epsilon", ir.AttributeType.FLOAT)
    nodes.append(ir.Node("", "Constant", [], [reference], outputs=[epsilon]))
    mean = op("ReduceMean", op("Pow", x, two), axis, keepdims=1)
    normed = op("Div", x, op("Sqrt", op("Add", mean, epsilon)))
    result = op("Mul", normed, weight)
    graph = ir.Graph([x, weight], [result], nodes=nodes, opset_imports={"": OPSETS[""]})
    declared = ir.Attr("epsilon", ir.AttributeType.FLOAT, None)
    return ir.Function("bitdistill.functions", "RMSNorm", graph=graph, attributes=[declared])


@dataclass(frozen=True)
class Ends:
    """What a matrix is multiplied with, and what becomes of the result.

    `inputs` is x, or with `activation` what act(gate) * up is made of: gate and up, or one value
    that holds both side by side. `residual` is added to the result, which is then called `name`.
    """

    inputs: list[ir.Value]
    activation: str | None = None
    residual: ir.Value | None = None
    name: str | None = None


class NodeBuilder:
    """Nodes in order, constants inside the model, and the data file for everything large."""

    def __init__(self, data: TensorFile) -> None:
        self.data = data
        self.nodes: list[ir.Node] = []
        self.constants: dict[str, ir.Value] = {}

    def constant(self, name: str, value: NDArray[Any] | np.generic) -> ir.Value:
        """A small initializer inside the model file, made once."""
        if name not in self.constants:
            tensor = ir.tensor(np.asarray(value), name=name)
            kind = ir.TensorType(tensor.dtype)
            self.constants[name] = ir.Value(
                name=name, shape=tensor.shape, type=kind, const_value=tensor
            )
        return self.constants[name]

    def op(
        self,
        kind: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        domain: str = "",
        output: str | None = None,
        **attributes: Any,
    ) -> ir.Value:
        """Append a node with one output, which has the node's name."""
        value = ir.Value(name=output or name)
        self.append(kind, inputs, [value], domain, attributes, name)
        return value

    def split(self, x: ir.Value, sizes: list[int], name: str) -> list[ir.Value]:
        """Cut the last axis into pieces of the given sizes."""
        pieces = [ir.Value(name=f"{name}.{i}") for i in range(len(sizes))]
        cuts = self.constant("split_" + "_".join(map(str, sizes)), np.array(sizes, np.int64))
        self.append("Split", [x, cuts], pieces, "", {"axis": -1}, name)
        return pieces

    def gated(self, ends: Ends, width: int, node: str) -> ir.Value:
        """What enters a matrix of `width` columns: x, or act(gate) * up."""
        if ends.activation is None:
            return ends.inputs[0]
        halves = ends.inputs
        if len(halves) == 1:
            halves = self.split(halves[0], [width] * 2, f"{node}.split")
        gate, up = halves
        if ends.activation == "gelu_tanh":
            gate = self.op("Gelu", [gate], f"{node}.gelu", approximate="tanh")
        else:
            sigmoid = self.op("Sigmoid", [gate], f"{node}.sigmoid")
            gate = self.op("Mul", [gate, sigmoid], f"{node}.silu")
        return self.op("Mul", [gate, up], f"{node}.gated")

    def added(self, y: ir.Value, ends: Ends) -> ir.Value:
        """What leaves a matrix: y, or its sum with the residual."""
        if ends.residual is None:
            return y
        return self.op("Add", [ends.residual, y], str(ends.name))

    def append(
        self,
        kind: str,
        inputs: Sequence[ir.Value | None],
        outputs: list[ir.Value],
        domain: str,
        attributes: dict[str, Any],
        name: str | None = None,
    ) -> None:
        node = ir.node(kind, inputs, attributes=attributes, domain=domain, outputs=outputs)
        node.name = name or outputs[0].name
        self.nodes.append(node)
