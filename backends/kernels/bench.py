"""How fast the kernels are, inside ONNX Runtime, against its own fp32 MatMul in the same run.

    python -m bitdistill.backends.kernels.bench [--quick] [--json] [--threads 1 2]

Each figure is one session that holds enough copies of the layer, each with weights of its own, to
exceed the last-level cache: weights stream from memory as they do in a model. `microseconds` is the
median over runs of one layer, ONNX Runtime's overhead included. gops counts a multiply and an add;
gbytes_per_s is the weight bytes read once per run. Rows: ternary-2bit, head-16bit, ort-fp32.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from bitdistill.backends.kernels import library_path
from bitdistill.backends.kernels.binding import Kernels
from bitdistill.packing import KERNEL_LAYOUT_VERSION, kernel_shape

STREAMED_BYTES = 160 << 20  # more than the last-level cache of most machines
LAYERS = [(1024, 3072), (3072, 1024), (2560, 9728)]
HEAD = (1024, 151_936)
TOKENS = [1, 128]
# The bytes in which every 2-bit code is 0, 1 or 2.
VALID_BYTES = np.array([b for b in range(256) if not b & b >> 1 & 0x55], np.uint8)


@dataclass(frozen=True)
class Case:
    """One layer to time."""

    implementation: str
    threads: int
    K: int
    N: int
    M: int

    @property
    def weight_bytes(self) -> int:
        if self.implementation == "ternary-2bit":
            return int(np.prod(kernel_shape(self.N, self.K))) + 4
        return self.N * self.K * {"head-16bit": 2, "ort-fp32": 4}[self.implementation]


@dataclass(frozen=True)
class Figure:
    """One measured line."""

    implementation: str
    isa: str
    threads: int
    K: int
    N: int
    M: int
    microseconds: float
    gops: float
    gbytes_per_s: float


def _weights(case: Case, rng: np.random.Generator) -> dict[str, NDArray]:
    """Initializers of one copy, by the operator's input order."""
    n, k = case.N, case.K
    if case.implementation == "ternary-2bit":
        packed = VALID_BYTES[rng.integers(0, len(VALID_BYTES), kernel_shape(n, k), np.uint8)]
        return {"W": packed, "scale": np.full(1, 0.02, np.float32)}
    if case.implementation == "head-16bit":
        return {"W": rng.standard_normal((n, k), np.float32).astype(np.float16)}
    return {"W": rng.standard_normal((k, n), np.float32)}


def _node(case: Case, copy: int, inputs: list[str]) -> object:
    outputs = [f"y{copy}"]
    if case.implementation == "ternary-2bit":
        return helper.make_node(
            "TernaryLinear", ["x", *inputs], outputs, domain="bitdistill", N=case.N, K=case.K,
            scale_rows=case.N, layout=KERNEL_LAYOUT_VERSION, activation_bits=8,
        )  # fmt: skip
    if case.implementation == "head-16bit":
        return helper.make_node("HeadLinear", ["x", *inputs], outputs, domain="bitdistill")
    return helper.make_node("MatMul", ["x", *inputs], outputs)


def _session(case: Case) -> tuple[onnxruntime.InferenceSession, int]:
    """A session of independent copies of the layer, and their number."""
    rng = np.random.default_rng(0)
    copies = max(2, STREAMED_BYTES // case.weight_bytes)
    nodes: list[object] = []
    arrays: dict[str, NDArray] = {}
    for copy in range(copies):
        named = {f"{name}{copy}": array for name, array in _weights(case, rng).items()}
        nodes.append(_node(case, copy, list(named)))
        arrays |= named
    return _open(case, nodes, arrays, copies), copies


def _open(
    case: Case, nodes: list, arrays: dict[str, NDArray], copies: int
) -> onnxruntime.InferenceSession:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [case.M, case.K])
    ys = [
        helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, [case.M, case.N])
        for i in range(copies)
    ]
    weights = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("bitdistill", 1)]
    graph = helper.make_graph(nodes, "bench", [x], ys, weights)
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = case.threads
    options.register_custom_ops_library(str(library_path()))
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def measure(case: Case, seconds: float = 1.0) -> Figure:
    """Median time of one layer over runs that last `seconds` together, after one that warms up."""
    session, copies = _session(case)
    x = np.random.default_rng(1).standard_normal((case.M, case.K), np.float32)
    times: list[float] = []
    session.run(None, {"x": x})
    end = time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < end:
        start = time.perf_counter()
        session.run(None, {"x": x})
        times.append((time.perf_counter() - start) / copies)
    median = float(np.median(times))
    isa = "-" if case.implementation == "ort-fp32" else Kernels().isa
    gops = 2e-9 * case.M * case.K * case.N / median
    rate = 1e-9 * case.weight_bytes / median
    return Figure(
        case.implementation, isa, case.threads, case.K, case.N, case.M,
        round(median * 1e6, 2), round(gops, 2), round(rate, 3),
    )  # fmt: skip


def cases(threads: list[int], quick: bool) -> Iterator[Case]:
    """The grid, our kernel and the runtime's own beside each other."""
    for count in threads:
        for k, n in LAYERS[-1:] if quick else LAYERS:
            for m in TOKENS:
                case = Case("ternary-2bit", count, k, n, m)
                yield from (case, replace(case, implementation="ort-fp32"))
        if not quick:
            yield Case("head-16bit", count, *HEAD, 1)


def main() -> None:
    """Print a table, or JSON lines, on stdout."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one layer shape only")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    arguments = parser.parse_args()
    form = "{:<13} {:<7} {:>7} {:>6} {:>7} {:>4} {:>13} {:>8} {:>12}"
    if not arguments.json:
        print(form.format(*Figure.__dataclass_fields__))
    for case in cases(arguments.threads, arguments.quick):
        figure = asdict(measure(case, 0.5 if arguments.quick else 1.5))
        print(json.dumps(figure) if arguments.json else form.format(*figure.values()))
        sys.stdout.flush()


if __name__ == "__main__":
    main()
