"""What a node of ONNX Runtime adds to the kernel that it calls, one token at a time.

    python benchmarks/op_overhead.py
    python benchmarks/op_overhead.py --threads 2 --clock wall

A chain of 201 TernaryLinear nodes of one matrix, less a chain of one, in a session: a node's time
without `run` itself. Beside it the same product through the C interface (on two threads: on a pool
of our own), in turn. The matrix stays in the caches, so that the difference is not lost in waiting
for memory. `--clock cpu` counts the time of the process, which other programs disturb less; it
means nothing on two threads, which wait for each other busily. Prints a JSON line a matrix.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from bitdistill.backends import kernels
from bitdistill.backends.kernels.bench.direct import bench_library, packed_copies
from bitdistill.backends.kernels.binding import Input, Kernels, Ternary
from bitdistill.backends.kernels.pool import Pool

NODES, RUNS, CALLS = 201, 5, 400
CLOCKS = {"cpu": time.process_time, "wall": time.perf_counter}


def chain(packed: NDArray[np.uint8], columns: int, nodes: int, threads: int) -> Callable[[], None]:
    """Runs `nodes` products of a square matrix, each of the result before it."""
    attributes = {"N": columns, "K": columns, "scale_rows": columns}
    attributes |= {"layout": 1, "activation_bits": 8}
    names = ["x", *(f"h{i}" for i in range(1, nodes)), "y"]
    steps = [
        helper.make_node("TernaryLinear", [a, "W", "s"], [b], domain="bitdistill", **attributes)
        for a, b in pairwise(names)
    ]
    constants = [numpy_helper.from_array(packed, "W")]
    constants.append(numpy_helper.from_array(np.array([0.01], np.float32), "s"))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, columns])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(steps, "chain", [x], [y], constants)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("bitdistill", 1)]
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.register_custom_ops_library(str(kernels.library_path()))
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    fed = {"x": np.random.default_rng(0).standard_normal((1, columns)).astype(np.float32)}

    def run() -> None:
        for _ in range(RUNS):
            session.run(None, fed)

    return run


def direct(packed: NDArray[np.uint8], columns: int, pool: Pool | None) -> Callable[[], None]:
    """CALLS products by the kernels themselves, in a loop of C."""
    lib, table = bench_library(), Kernels().table
    scratch = np.empty(lib.bd_scratch_bytes(1, columns, 8) // 8 + 1, np.uint64)
    x = np.random.default_rng(0).standard_normal((1, columns)).astype(np.float32)
    y, scale = np.empty(columns, np.float32), np.full(columns, 0.01, np.float32)
    given = Input(x.ctypes.data, None, 0.0, 1, columns)
    weights = Ternary(packed.ctypes.data, scale.ctypes.data, None, columns, columns)
    copies = (Ternary * CALLS)(*[weights] * CALLS)
    handle = None if pool is None else pool.handle

    def run(_pointed_at: tuple[NDArray[Any], ...] = (x, packed, scale)) -> None:
        pointers = (scratch.ctypes.data, handle, y.ctypes.data)
        lib.bd_time_ternary(table, copies, CALLS, ctypes.byref(given), *pointers)

    return run


def seconds(work: Callable[[], None], clock: Callable[[], float]) -> float:
    """Of one call."""
    start = clock()
    work()
    return clock() - start


def measure(columns: int, threads: int, rounds: int, clock: Callable[[], float]) -> dict[str, Any]:
    """Microseconds of a node, of the kernel, and medians of their difference in a round."""
    packed = packed_copies(columns, columns, 1)[0]
    with Pool(threads) as pool:
        many, one = (chain(packed, columns, nodes, threads) for nodes in (NODES, 1))
        kernel = direct(packed, columns, pool if threads > 1 else None)
        works = (many, one, kernel)
        for work in works:
            work()
        taken = [[seconds(work, clock) for work in works] for _ in range(rounds)]
    nodes = [1e6 * (a - b) / RUNS / (NODES - 1) for a, b, _ in taken]
    alone = [1e6 * c / CALLS for *_, c in taken]
    added = [node - kernel for node, kernel in zip(nodes, alone, strict=True)]
    quartiles = statistics.quantiles(added, n=4)
    return {
        "benchmark": "op-overhead",
        "K": columns,
        "N": columns,
        "threads": threads,
        "isa": Kernels().isa,
        "node_us": round(statistics.median(nodes), 2),
        "kernel_us": round(statistics.median(alone), 2),
        "added_us": round(statistics.median(added), 2),
        "added_quartiles_us": [round(quartiles[0], 2), round(quartiles[2], 2)],
        "rounds": rounds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--columns", type=int, nargs="+", default=[64, 1024, 2048])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--clock", choices=CLOCKS, default="cpu")
    asked = parser.parse_args()
    for columns in asked.columns:
        found = measure(columns, asked.threads, asked.rounds, CLOCKS[asked.clock])
        print(json.dumps(found | {"clock": asked.clock}), flush=True)


if __name__ == "__main__":
    main()
