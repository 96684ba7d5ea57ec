"""One-node models of the operators, their sessions, and what they must return."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from bitdistill.backends import kernels
from bitdistill.backends.kernels.binding import Kernels
from bitdistill.packing import pack_kernel

F = np.float32
ATTRIBUTES = {"scale_rows": 1, "layout": 1, "activation_bits": 8, "epsilon": 1e-6}
TYPES = {
    np.dtype(F): TensorProto.FLOAT,
    np.dtype(np.uint8): TensorProto.UINT8,
    np.dtype(np.float16): TensorProto.FLOAT16,
    np.dtype(np.float64): TensorProto.DOUBLE,
    np.dtype(np.int8): TensorProto.INT8,
    np.dtype(np.int32): TensorProto.INT32,
}


def model(
    op: str,
    x_shape: list[Any],
    inputs: dict[str, NDArray],
    fed: tuple[str, ...] = (),
    x_type: int = TensorProto.FLOAT,
    **attributes: Any,
) -> bytes:
    """One node. Inputs named "" are absent; those in `fed` are graph inputs, not initializers."""
    names = ["" if name.startswith("absent") else name for name in inputs]
    node = helper.make_node(op, ["x", *names], ["y"], "layer 7", domain="bitdistill", **attributes)
    given = [helper.make_tensor_value_info("x", x_type, x_shape)]
    given += [
        helper.make_tensor_value_info(n, TYPES[inputs[n].dtype], [None] * inputs[n].ndim)
        for n in fed
    ]
    constants = [numpy_helper.from_array(a, n) for n, a in inputs.items() if n in names]
    constants = [tensor for tensor in constants if tensor.name not in fed]
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph([node], "test", given, [y], constants)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("bitdistill", 1)]
    proto = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    assert isinstance(proto, onnx.ModelProto)
    return proto.SerializeToString()


def session(proto: bytes, threads: int = 2) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.register_custom_ops_library(str(kernels.library_path()))
    return onnxruntime.InferenceSession(proto, options, providers=["CPUExecutionProvider"])


def layer(k: int = 100, n: int = 75, seed: int = 0, scale_rows: int = 1) -> dict[str, NDArray]:
    rng = np.random.default_rng(seed)
    return {
        "W": pack_kernel(rng.integers(-1, 2, (n, k)).astype(np.int8)),
        "scale": rng.random(n // scale_rows, F),
        "norm_weight": rng.standard_normal(k, F),
        "bias": rng.standard_normal(n, F),
    }


def expected(
    x: NDArray,
    inputs: dict[str, NDArray],
    bits: int = 8,
    isa: str = "scalar",
    scale_rows: int = 1,
) -> NDArray:
    """What the C ABI, which takes one scale a row, returns."""
    scale = np.repeat(inputs["scale"], scale_rows)
    rows = x.reshape(-1, x.shape[-1])
    y = Kernels(isa).ternary_linear(
        rows,
        inputs["W"],
        scale,
        norm_weight=inputs.get("norm_weight"),
        epsilon=1e-6,
        bias=inputs.get("bias"),
        activation_bits=bits,
    )
    return y.reshape(*x.shape[:-1], len(scale))


def ternary_model(inputs: dict[str, NDArray], fed: tuple[str, ...] = (), **changes: Any) -> bytes:
    attributes = {"N": 75, "K": 100, **ATTRIBUTES, **changes}
    attributes = {name: value for name, value in attributes.items() if value is not None}
    return model("TernaryLinear", ["batch", "time", 100], inputs, fed, **attributes)
