"""The ONNX Runtime operators: results, shapes and threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from op_models import ATTRIBUTES, F, expected, layer, model, session, ternary_model

from bitdistill.backends.kernels.binding import Kernels


@pytest.mark.parametrize("bits", [8, 0])
@pytest.mark.parametrize("optional", [(), ("norm_weight",), ("bias",), ("norm_weight", "bias")])
def test_a_session_equals_the_oracle(bits: int, optional: tuple[str, ...]) -> None:
    inputs = layer()
    used = {"W": inputs["W"], "scale": inputs["scale"]}
    used |= {n if n in optional else f"absent {n}": inputs[n] for n in ("norm_weight", "bias")}
    run = session(ternary_model(used, activation_bits=bits))
    for shape in [(1, 1, 100), (2, 3, 100), (1, 70, 100), (0, 5, 100), (2, 0, 100)]:
        x = np.random.default_rng(1).standard_normal(shape, F)
        (y,) = run.run(None, {"x": x})
        assert y.shape == (*shape[:-1], 75)
        assert np.array_equal(y, expected(x, {n: a for n, a in used.items() if " " not in n}, bits))


@pytest.mark.parametrize("fed", [(), ("scale",), ("W",), ("W", "scale")])
@pytest.mark.parametrize("scale_rows", [1, 5, 25, 75])
def test_rows_share_scales(scale_rows: int, fed: tuple[str, ...]) -> None:
    """Expanded once where both are constant, else for each run."""
    inputs = layer(scale_rows=scale_rows)
    run = session(ternary_model(inputs, fed, scale_rows=scale_rows))
    for tokens in (1, 70):
        x = np.random.default_rng(tokens).standard_normal((1, tokens, 100), F)
        (y,) = run.run(None, {"x": x, **{name: inputs[name] for name in fed}})
        assert np.array_equal(y, expected(x, inputs, scale_rows=scale_rows))


def test_fed_scales_are_those_of_their_run() -> None:
    """Runs at the same time, with scales of their own."""
    inputs = layer(512, 700, scale_rows=100)
    attributes = {"N": 700, "K": 512, **ATTRIBUTES, "scale_rows": 100}
    run = session(model("TernaryLinear", ["t", 512], inputs, ("scale",), **attributes))
    x = np.random.default_rng(7).standard_normal((9, 512), F)
    scales = [np.random.default_rng(seed).random(7, F) for seed in range(16)]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda scale: run.run(None, {"x": x, "scale": scale})[0], scales))
    for scale, y in zip(scales, results, strict=True):
        own = {**inputs, "scale": scale}
        assert np.array_equal(y, expected(x, own, isa=Kernels().isa, scale_rows=100))


def test_trailing_optional_inputs_may_be_left_out() -> None:
    inputs = {name: layer()[name] for name in ("W", "scale")}
    x = np.ones((1, 2, 100), F)
    (y,) = session(ternary_model(inputs, epsilon=None)).run(None, {"x": x})
    assert np.array_equal(y, expected(x, inputs))


def test_ranks_from_one_to_eight() -> None:
    inputs = layer()
    for rank in range(1, 9):
        shape = [1] * (rank - 1) + [100]
        proto = model("TernaryLinear", shape, inputs, N=75, K=100, **ATTRIBUTES)
        x = np.random.default_rng(rank).standard_normal(shape).astype(F)
        (y,) = session(proto).run(None, {"x": x})
        assert np.array_equal(y, expected(x, inputs))


VERSION = tuple(int(part) for part in onnxruntime.__version__.split(".")[:2])


@pytest.mark.skipif(
    VERSION < (1, 24), reason="older runtimes crash in it; the library leaves it out"
)
def test_shapes_are_inferred_with_their_names() -> None:
    run = session(ternary_model(layer()))
    assert run.get_outputs()[0].shape == ["batch", "time", 75]
    table = np.zeros((9, 100), np.float16)
    run = session(model("HeadLinear", ["batch", 100], {"W": table}))
    assert run.get_outputs()[0].shape == ["batch", 9]


@pytest.mark.parametrize("tokens", [1, 2, 40])
def test_thread_counts_give_the_same_bits(tokens: int) -> None:
    """Wide enough that the rows are split."""
    inputs = layer(1024, 4000)
    proto = model("TernaryLinear", ["t", 1024], inputs, N=4000, K=1024, **ATTRIBUTES)
    x = np.random.default_rng(2).standard_normal((tokens, 1024), F)
    results = [session(proto, threads).run(None, {"x": x})[0] for threads in (1, 2, 3)]
    assert np.array_equal(results[0], expected(x, inputs, isa=Kernels().isa))
    assert all(np.array_equal(result, results[0]) for result in results[1:])


def test_concurrent_runs_of_one_session() -> None:
    """Runs of different sizes share a session and, in turn, a thread's scratch memory."""
    inputs = layer(512, 700)
    proto = model("TernaryLinear", ["t", 512], inputs, N=700, K=512, **ATTRIBUTES)
    run = session(proto)
    rng = np.random.default_rng(3)
    xs = [rng.standard_normal((int(rng.integers(1, 30)), 512), F) for _ in range(24)]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda x: run.run(None, {"x": x})[0], xs))
    for x, y in zip(xs, results, strict=True):
        assert np.array_equal(y, expected(x, inputs, isa=Kernels().isa))


@pytest.mark.parametrize("tokens", [0, 1, 3])
def test_the_head(tokens: int) -> None:
    rng = np.random.default_rng(4)
    table = rng.standard_normal((5000, 65), F).astype(np.float16)
    x = rng.standard_normal((tokens, 65), F)
    for threads in (1, 2):
        run = session(model("HeadLinear", ["t", 65], {"W": table}), threads)
        (y,) = run.run(None, {"x": x})
        assert np.array_equal(y, Kernels("scalar").head(x, table))


def test_a_tied_table_serves_lookup_and_head() -> None:
    """One float16 initializer with two readers: Gather, and the head."""
    table = np.random.default_rng(5).standard_normal((50, 32), F).astype(np.float16)
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["rows"]),
        helper.make_node("Cast", ["rows"], ["x"], to=TensorProto.FLOAT),
        helper.make_node("HeadLinear", ["x", "table"], ["y"], domain="bitdistill"),
    ]
    graph = helper.make_graph(
        nodes,
        "tied",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["t"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(table, "table")],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("bitdistill", 1)]
    proto = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    (y,) = session(proto.SerializeToString()).run(None, {"ids": np.array([7, 3])})
    assert np.array_equal(y, Kernels("scalar").head(table[[7, 3]].astype(F), table))


def test_many_sessions_share_the_library() -> None:
    proto, x = ternary_model(layer()), np.ones((1, 1, 100), F)
    sessions = [session(proto, 1) for _ in range(5)]
    results = [run.run(None, {"x": x})[0] for run in sessions]
    del sessions
    assert all(np.array_equal(result, results[0]) for result in results)
