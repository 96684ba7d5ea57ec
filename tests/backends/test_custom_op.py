"""The ONNX Runtime operators: results, shapes, threads, and refusals worded for people."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from bitdistill.backends import kernels
from bitdistill.backends.kernels.binding import Kernels
from bitdistill.packing import pack_kernel

F = np.float32
ATTRIBUTES = {"layout": 1, "activation_bits": 8, "epsilon": 1e-6}
TYPES = {
    np.dtype(F): TensorProto.FLOAT,
    np.dtype(np.uint8): TensorProto.UINT8,
    np.dtype(np.float16): TensorProto.FLOAT16,
    np.dtype(np.float64): TensorProto.DOUBLE,
}


def model(
    op: str,
    x_shape: list[Any],
    inputs: dict[str, NDArray],
    fed: tuple[str, ...] = (),
    **attributes: Any,
) -> bytes:
    """One node. Inputs named "" are absent; those in `fed` are graph inputs, not initializers."""
    names = ["" if name.startswith("absent") else name for name in inputs]
    node = helper.make_node(op, ["x", *names], ["y"], "layer 7", domain="bitdistill", **attributes)
    given = [helper.make_tensor_value_info("x", TensorProto.FLOAT, x_shape)]
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


def layer(k: int = 100, n: int = 75, seed: int = 0) -> dict[str, NDArray]:
    rng = np.random.default_rng(seed)
    return {
        "W": pack_kernel(rng.integers(-1, 2, (n, k)).astype(np.int8)),
        "scale": rng.random(n, F),
        "norm_weight": rng.standard_normal(k, F),
        "bias": rng.standard_normal(n, F),
    }


def expected(x: NDArray, inputs: dict[str, NDArray], bits: int = 8, isa: str = "scalar") -> NDArray:
    rows = x.reshape(-1, x.shape[-1])
    y = Kernels(isa).ternary_linear(
        rows,
        inputs["W"],
        inputs["scale"],
        norm_weight=inputs.get("norm_weight"),
        epsilon=1e-6,
        bias=inputs.get("bias"),
        activation_bits=bits,
    )
    return y.reshape(*x.shape[:-1], len(inputs["scale"]))


def ternary_model(inputs: dict[str, NDArray], fed: tuple[str, ...] = (), **changes: Any) -> bytes:
    attributes = {"N": 75, "K": 100, **ATTRIBUTES, **changes}
    attributes = {name: value for name, value in attributes.items() if value is not None}
    return model("TernaryLinear", ["batch", "time", 100], inputs, fed, **attributes)


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


def changed(**changes: NDArray) -> dict[str, NDArray]:
    return {**layer(), **changes}


def with_code_3() -> NDArray:
    packed = layer()["W"].copy()
    packed[2, 6, 31, 3] = 0b11_01_01_01
    return packed


BAD_SCALES = [np.full(75, value, F) for value in (np.nan, np.inf, -1.0)]
NOT_A_SCALE = r"scale\[0\] = -?(nan|inf|1) is not finite"
MALFORMED = [
    (changed(W=with_code_3()), "'layer 7': W holds the code 3"),
    (changed(W=layer(84)["W"]), r"W must have the shape \(3, 7, 32, 4\), got \(3, 6, 32, 4\)"),
    (changed(W=layer()["W"].reshape(3, 7, 128)), r"got \(3, 7, 128\)"),
    (changed(scale=np.ones(74, F)), r"scale must have the shape \(75\), got \(74\)"),
    (changed(scale=np.ones((), F)), r"scale must have the shape \(75\), got \(\)"),
    (changed(norm_weight=np.ones(75, F)), r"norm_weight must have the shape \(100\)"),
    (changed(bias=np.ones((75, 1), F)), r"bias must have the shape \(75\), got \(75, 1\)"),
    *[(changed(scale=scale), NOT_A_SCALE) for scale in BAD_SCALES],
]
BAD_ATTRIBUTES = [
    ({"N": None}, "the integer attribute N is missing"),
    ({"K": None}, "the integer attribute K is missing"),
    ({"layout": None}, "the integer attribute layout is missing"),
    ({"activation_bits": None}, "the integer attribute activation_bits is missing"),
    ({"layout": 2}, r"weight layout 2 is not known here \(this library reads 1\)"),
    ({"activation_bits": 4}, "activation_bits must be 8 or 0, got 4"),
    ({"N": 0}, "N = 0, K = 100 is out of range"),
    ({"N": -5}, "out of range"),
    ({"K": 1 << 18}, "K = 262144 is out of range"),
    ({"N": 1 << 62}, "out of range"),
    ({"N": 64}, r"W must have the shape \(2, 7, 32, 4\)"),
]


@pytest.mark.parametrize(("inputs", "message"), MALFORMED)
def test_malformed_constants_are_refused_by_the_session(
    inputs: dict[str, NDArray], message: str
) -> None:
    with pytest.raises(Exception, match=message):
        session(ternary_model(inputs))


@pytest.mark.parametrize(("attributes", "message"), BAD_ATTRIBUTES)
def test_wrong_attributes_are_refused_by_the_session(
    attributes: dict[str, Any], message: str
) -> None:
    with pytest.raises(Exception, match=message):
        session(ternary_model(layer(), **attributes))


@pytest.mark.parametrize(("inputs", "message"), MALFORMED[1:])
def test_malformed_inputs_are_refused_when_they_arrive(
    inputs: dict[str, NDArray], message: str
) -> None:
    run = session(ternary_model(inputs, tuple(layer())))
    with pytest.raises(Exception, match=message):
        run.run(None, {"x": np.ones((1, 1, 100), F), **inputs})


def test_fed_weights_work_and_their_codes_are_harmless() -> None:
    inputs = layer()
    run = session(ternary_model(inputs, tuple(inputs)))
    x = np.random.default_rng(6).standard_normal((1, 3, 100), F)
    (y,) = run.run(None, {"x": x, **inputs})
    assert np.array_equal(y, expected(x, inputs))
    run.run(None, {"x": x, **inputs, "W": with_code_3()})


def test_activations_of_another_width_are_refused() -> None:
    proto = model("TernaryLinear", ["t", "k"], layer(), N=75, K=100, **ATTRIBUTES)
    run = session(proto)
    for width in (0, 99, 101):
        with pytest.raises(Exception, match=rf"X must end in K = 100, got \(2, {width}\)"):
            run.run(None, {"x": np.ones((2, width), F)})
    head = session(model("HeadLinear", ["t", "k"], {"W": np.ones((4, 8), np.float16)}))
    with pytest.raises(Exception, match=r"X must end in K = 8, got \(2, 9\)"):
        head.run(None, {"x": np.ones((2, 9), F)})


def test_a_scalar_input_is_refused() -> None:
    run = session(model("TernaryLinear", [], layer(), N=75, K=100, **ATTRIBUTES))
    with pytest.raises(Exception, match=r"X must end in K = 100, got \(\)"):
        run.run(None, {"x": np.array(1, F)})


def test_more_dimensions_than_eight_are_refused() -> None:
    shape = [1] * 8 + [100]
    run = session(model("TernaryLinear", shape, layer(), N=75, K=100, **ATTRIBUTES))
    with pytest.raises(Exception, match="rank 9: bitdistill operators take at most 8"):
        run.run(None, {"x": np.ones(shape, F)})


def test_types_are_refused() -> None:
    wrong = changed(W=layer()["W"].astype(F))
    with pytest.raises(Exception, match=r"tensor\(float\)"):
        session(ternary_model(wrong))
    with pytest.raises(Exception, match=r"tensor\(double\)"):
        session(ternary_model(changed(scale=np.ones(75, np.float64))))
    with pytest.raises(Exception, match=r"tensor\(float\)"):
        session(model("HeadLinear", ["t", 8], {"W": np.ones((4, 8), F)}))


def test_a_norm_needs_its_epsilon() -> None:
    run = session(ternary_model(layer(), epsilon=None))
    with pytest.raises(Exception, match="norm_weight needs the attribute epsilon"):
        run.run(None, {"x": np.ones((1, 1, 100), F)})


def test_a_table_of_another_rank_is_refused() -> None:
    with pytest.raises(Exception, match=r"W must be a float16 matrix \(N, K\), got rank 3"):
        session(model("HeadLinear", ["t", 8], {"W": np.ones((4, 8, 1), np.float16)}))


def test_many_sessions_share_the_library() -> None:
    proto, x = ternary_model(layer()), np.ones((1, 1, 100), F)
    sessions = [session(proto, 1) for _ in range(5)]
    results = [run.run(None, {"x": x})[0] for run in sessions]
    del sessions
    assert all(np.array_equal(result, results[0]) for result in results)


def test_an_unknown_instruction_set_is_refused_in_words() -> None:
    code = (
        "import onnxruntime; from bitdistill.backends.kernels import library_path\n"
        "onnxruntime.SessionOptions().register_custom_ops_library(str(library_path()))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "BITDISTILL_ISA": "neon9"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 1  # an exception, not a signal
    assert "BITDISTILL_ISA=neon9 is not an instruction set" in result.stderr


def test_a_missing_library_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "NAMES", ("absent.so",))
    with pytest.raises(FileNotFoundError, match="needs a C\\+\\+17 compiler"):
        kernels.library_path()
