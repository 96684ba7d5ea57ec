"""Models of the operators that keep a cache, and what they are fed."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnx import NodeProto, helper, numpy_helper
from op_models import TYPES

from bitdistill.backends.kv_cache import DTYPES, row_elements

F = np.float32
HEADS, KV_HEADS, SIZE, CONTEXT = 6, 2, 16, 64
PACKED = (HEADS + 2 * KV_HEADS) * SIZE  # columns of queries, keys and values side by side
FREQUENCIES = (1e4 ** -np.linspace(0, 1, SIZE // 2)).astype(F)
ATTRIBUTES = {
    "num_heads": HEADS,
    "kv_num_heads": KV_HEADS,
    "local_window_size": 0,
    "scale": 0.25,
    "epsilon": 1e-6,
    "context": CONTEXT,
    "rotary_scale": 1.0,
}
GIVEN = ["past_key", "past_value", "lengths", "total"]
RESULTS = ["y", "present_key", "present_value"]
Inputs = dict[str, NDArray]


def cached_model(
    nodes: list[NodeProto], bits: int, constants: Inputs, fed: tuple[str, ...] = ()
) -> bytes:
    """Nodes between x with a past and y with its present; inputs in `fed` are not constant."""
    types: dict[str, Any] = {"x": F, "past_key": DTYPES[bits], "past_value": DTYPES[bits]}
    types |= {"lengths": np.int32, "total": np.int32}
    types |= {name: constants[name].dtype for name in fed}
    ranks = {"x": 3, "past_key": 4, "past_value": 4, "lengths": 1, "total": 0}
    ranks |= {name: constants[name].ndim for name in fed}
    shapes: dict[str, list[Any]] = {name: [None] * rank for name, rank in ranks.items()}
    shapes["x"] = ["batch", "time", None]
    kinds = {name: TYPES[np.dtype(kind)] for name, kind in types.items()}
    inputs = [helper.make_tensor_value_info(n, kinds[n], shape) for n, shape in shapes.items()]
    ends = zip(RESULTS, ("x", "past_key", "past_value"), strict=True)
    outputs = [helper.make_tensor_value_info(name, kinds[like], None) for name, like in ends]
    stored = [numpy_helper.from_array(a, name) for name, a in constants.items() if name not in fed]
    graph = helper.make_graph(nodes, "test", inputs, outputs, stored)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("bitdistill", 1)]
    proto = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    data: bytes = proto.SerializeToString()
    return data


def feed(
    bits: int,
    lengths: list[int],
    tokens: int,
    total: int,
    room: int,
    seed: int = 0,
    columns: int = PACKED,
) -> Inputs:
    """Inputs of sequences that hold `lengths` tokens in the end, with an empty past."""
    shape = (len(lengths), KV_HEADS, room, row_elements(SIZE, bits))
    return {
        "x": np.random.default_rng(seed).standard_normal((len(lengths), tokens, columns), F),
        "past_key": np.zeros(shape, DTYPES[bits]),
        "past_value": np.zeros(shape, DTYPES[bits]),
        "lengths": np.array(lengths, np.int32) - 1,
        "total": np.array(total, np.int32),
    }


def cache_memory(given: Inputs) -> list[onnxruntime.OrtValue]:
    """The past of what is fed, as memory that runs may share."""
    return [onnxruntime.OrtValue.ortvalue_from_numpy(given[name]) for name in GIVEN[:2]]


def run_in_place(
    node: onnxruntime.InferenceSession, given: Inputs, memory: list[onnxruntime.OrtValue]
) -> NDArray[np.float32]:
    """Y of a run whose present is its past's own memory."""
    binding = node.io_binding()
    binding.bind_output("y")
    for name, value in zip(("key", "value"), memory, strict=True):
        binding.bind_ortvalue_input(f"past_{name}", value)
        binding.bind_ortvalue_output(f"present_{name}", value)
    for name in ("x", "lengths", "total"):
        binding.bind_cpu_input(name, given[name])
    node.run_with_iobinding(binding)
    y: NDArray[np.float32] = binding.copy_outputs_to_cpu()[0]
    return y
