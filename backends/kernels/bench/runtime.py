"""Operators inside ONNX Runtime: one session holds independent copies of a layer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from bitdistill.backends.kernels import library_path
from bitdistill.backends.kernels.bench.direct import packed_copies
from bitdistill.backends.kernels.bench.figures import (
    Case,
    Pass,
    copies_of,
)
from bitdistill.backends.kernels.pool import Pool
from bitdistill.packing import KERNEL_LAYOUT_VERSION

BLOCK = 128  # weights that share a scale in MatMulNBits
MICROSOFT = "com.microsoft"
LOOKUP_TABLES = {"mlas.use_lut_gemm": "1"}


@dataclass(frozen=True)
class Layer:
    """The initializers of one copy, in the operator's input order, and its node."""

    arrays: dict[str, NDArray]
    op: str
    domain: str = ""
    attributes: dict[str, Any] = field(default_factory=dict)

    @property
    def weight_bytes(self) -> int:
        return sum(array.nbytes for array in self.arrays.values())


def _random_bytes(*shape: int) -> NDArray[np.uint8]:
    return np.resize(np.random.default_rng(0).integers(0, 256, 1 << 16, np.uint8), shape)


def _fp32(case: Case) -> Layer:
    block = np.random.default_rng(0).standard_normal(1 << 16, np.float32)
    return Layer({"W": np.resize(block, (case.K, case.N))}, "MatMul")


def _int8(case: Case) -> Layer:
    weights: dict[str, NDArray] = {
        "W": _random_bytes(case.K, case.N).view(np.int8),
        "scale": np.full(1, 0.02, np.float32),
    }
    return Layer(weights, "DynamicQuantizeMatMul", MICROSOFT)


def _n_bits(case: Case, bits: int) -> Layer:
    blocks = -(-case.K // BLOCK)
    weights: dict[str, NDArray] = {
        "W": _random_bytes(case.N, blocks, BLOCK * bits // 8),
        "scale": np.full(case.N * blocks, 0.02, np.float32),
    }
    attributes = {"K": case.K, "N": case.N, "bits": bits, "block_size": BLOCK, "accuracy_level": 4}
    return Layer(weights, "MatMulNBits", MICROSOFT, attributes)


def _ternary(case: Case) -> Layer:
    weights: dict[str, NDArray] = {
        "W": packed_copies(case.N, case.K, 1)[0],
        "scale": np.full(1, 0.02, np.float32),
    }
    attributes = {
        "N": case.N, "K": case.K, "scale_rows": case.N, "layout": KERNEL_LAYOUT_VERSION,
        "activation_bits": 8,
    }  # fmt: skip
    return Layer(weights, "TernaryLinear", "bitdistill", attributes)


LAYERS: dict[str, Callable[[Case], Layer]] = {
    "ternary-2bit-ort": _ternary,
    "ort-fp32": _fp32,
    "ort-int8": _int8,
    "ort-4bit": lambda case: _n_bits(case, 4),
    "ort-2bit": lambda case: _n_bits(case, 2),
    "ort-2bit-lut": lambda case: _n_bits(case, 2),
}


def _open(case: Case, layer: Layer, copies: int) -> onnxruntime.InferenceSession:
    nodes, weights, ys = [], [], []
    for i in range(copies):
        names = {name: f"{name}{i}" for name in layer.arrays}
        # Equal weights would be merged into one; these bytes are valid codes of every format.
        layer.arrays["W"].reshape(-1)[:6] = [i // 3**digit % 3 for digit in range(6)]
        weights += [numpy_helper.from_array(a, names[n]) for n, a in layer.arrays.items()]
        nodes.append(
            helper.make_node(
                layer.op, ["x", *names.values()], [f"y{i}"], domain=layer.domain, **layer.attributes
            )
        )
        ys.append(helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, [case.M, case.N]))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [case.M, case.K])
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(MICROSOFT, 1)]
    opsets.append(helper.make_opsetid("bitdistill", 1))
    graph = helper.make_graph(nodes, "bench", [x], ys, weights)
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = case.threads
    # Between runs its threads would take processors from the ceilings beside them.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.register_custom_ops_library(str(library_path()))
    for key, value in LOOKUP_TABLES.items() if case.implementation == "ort-2bit-lut" else ():
        options.add_session_config_entry(key, value)
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


@contextmanager
def session_pass(case: Case) -> Iterator[Pass]:
    """One layer, ONNX Runtime's own cost included; outputs are bound once, so none is allocated."""
    layer = LAYERS[case.implementation](case)
    copies = copies_of(case, layer.weight_bytes)
    session = _open(case, layer, copies)
    binding = session.io_binding()
    binding.bind_cpu_input(
        "x", np.random.default_rng(1).standard_normal((case.M, case.K), np.float32)
    )
    kept = [np.empty((case.M, case.N), np.float32) for _ in range(copies)]
    for i, y in enumerate(kept):
        binding.bind_output(f"y{i}", "cpu", 0, np.float32, y.shape, y.ctypes.data)

    def run(_: Pool) -> float:
        start = time.perf_counter()
        session.run_with_iobinding(binding)
        return time.perf_counter() - start

    yield Pass(run, copies, layer.weight_bytes)
