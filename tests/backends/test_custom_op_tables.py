"""The operators over quantised tables: results, shapes, threads, and what they refuse."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto
from op_models import F, model, session

from bitdistill import tables
from bitdistill.backends.kernels.binding import Kernels, gather
from bitdistill.tables import Table

N, K = 75, 100
VERSION = tuple(int(part) for part in onnxruntime.__version__.split(".")[:2])


def table(bits: int, rows: int = N, columns: int = K) -> Table:
    rng = np.random.default_rng(bits)
    return tables.quantize(rng.standard_normal((rows, columns)).astype(F), bits)


def inputs(stored: Table) -> dict[str, NDArray]:
    given = {"W": stored.codes, "scale": stored.scale}
    return given if stored.group_scale is None else {**given, "group_scale": stored.group_scale}


def proto(op: str, arrays: dict[str, NDArray], fed: tuple[str, ...] = (), **changes: Any) -> bytes:
    attributes = {"N": N, "K": K, "bits": 4 if "group_scale" in arrays else 8, **changes}
    attributes = {name: value for name, value in attributes.items() if value is not None}
    kind, shape = TensorProto.FLOAT, ["batch", "time", attributes.get("K", K)]
    if op == "QuantizedEmbedding":
        kind, shape = TensorProto.INT64, ["batch", "time"]
    return model(op, shape, arrays, fed, kind, **attributes)


@pytest.mark.parametrize("bits", [8, 4])
def test_the_head_equals_the_oracle(bits: int) -> None:
    stored = table(bits)
    for fed in ((), ("W", "scale"), tuple(inputs(stored))):
        run = session(proto("QuantizedHead", inputs(stored), fed))
        for shape in [(1, 1, K), (2, 3, K), (1, 40, K), (0, 5, K)]:
            x = np.random.default_rng(1).standard_normal(shape, F)
            (y,) = run.run(None, {"x": x, **{name: inputs(stored)[name] for name in fed}})
            expected = Kernels("scalar").quantized_head(x.reshape(-1, K), stored)
            assert np.array_equal(y, expected.reshape(*shape[:-1], N))


@pytest.mark.parametrize("bits", [8, 4])
def test_the_embedding_gathers_rows(bits: int) -> None:
    stored = table(bits)
    run = session(proto("QuantizedEmbedding", inputs(stored)))
    for shape in [(1, 1), (2, 30), (0, 3), (1, 700)]:
        ids = np.random.default_rng(2).integers(0, N, shape)
        (y,) = run.run(None, {"x": ids})
        assert np.array_equal(y, gather(stored, ids.ravel()).reshape(*shape, K))


@pytest.mark.skipif(
    VERSION < (1, 24), reason="older runtimes crash in it; the library leaves it out"
)
@pytest.mark.parametrize("bits", [8, 4])
def test_shapes_are_inferred_with_their_names(bits: int) -> None:
    head = session(proto("QuantizedHead", inputs(table(bits))))
    assert head.get_outputs()[0].shape == ["batch", "time", N]
    embedding = session(proto("QuantizedEmbedding", inputs(table(bits))))
    assert embedding.get_outputs()[0].shape == ["batch", "time", K]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("tokens", [1, 2, 5, 40])
def test_thread_counts_give_the_same_bits(bits: int, tokens: int) -> None:
    """Large enough that rows and tokens are split."""
    stored = table(bits, 9000, 256)
    given = proto("QuantizedHead", inputs(stored), N=9000, K=256)
    x = np.random.default_rng(3).standard_normal((1, tokens, 256), F)
    results = [session(given, threads).run(None, {"x": x})[0] for threads in (1, 2, 3)]
    assert np.array_equal(results[0][0], Kernels().quantized_head(x[0], stored))
    assert all(np.array_equal(result, results[0]) for result in results[1:])


@pytest.mark.parametrize("bits", [8, 4])
def test_concurrent_runs_of_one_session(bits: int) -> None:
    stored = table(bits)
    run = session(proto("QuantizedHead", inputs(stored)))
    rng = np.random.default_rng(4)
    xs = [rng.standard_normal((1, int(rng.integers(1, 9)), K), F) for _ in range(24)]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda x: run.run(None, {"x": x})[0], xs))
    for x, y in zip(xs, results, strict=True):
        assert np.array_equal(y[0], Kernels().quantized_head(x[0], stored))


EIGHT, FOUR = inputs(table(8)), inputs(table(4))
MALFORMED = [
    ({**EIGHT, "W": EIGHT["W"][:, :99]}, r"W must have the shape \(75, 100\), got \(75, 99\)"),
    ({**EIGHT, "scale": np.ones(74, F)}, r"scale must have the shape \(75\), got \(74\)"),
    ({**EIGHT, "scale": np.full(75, np.nan, F)}, r"scale\[0\] = -?nan is not finite"),
    ({**EIGHT, "scale": np.full(75, -1, F)}, r"scale\[0\] = -1 is not finite and >= 0"),
    ({**FOUR, "W": FOUR["W"][:, :3]}, r"W must have the shape \(5, 4, 4, 16, 4\), got \(5, 3, 4"),
    ({**FOUR, "group_scale": FOUR["group_scale"][:4]}, r"group_scale must have the shape \(5, 4,"),
]
BAD_ATTRIBUTES = [
    ({"N": None}, "the integer attribute N is missing; export"),
    ({"K": None}, "the integer attribute K is missing"),
    ({"bits": None}, "the integer attribute bits is missing"),
    ({"bits": 6}, "bits must be 8 or 4, got 6"),
    ({"bits": 8}, r"'layer 7': (a table of 8 bits has no group_scale|W must have the shape)"),
    ({"N": 0}, "N = 0, K = 100 is out of range"),
    ({"N": 1 << 40}, "out of range"),
    ({"K": (1 << 14) + 1}, r"K = 16385 is out of range \(K at most 16384\)"),
]


@pytest.mark.parametrize("op", ["QuantizedHead", "QuantizedEmbedding"])
@pytest.mark.parametrize(("arrays", "message"), MALFORMED)
def test_malformed_tables_are_refused(op: str, arrays: dict[str, NDArray], message: str) -> None:
    with pytest.raises(Exception, match=message):
        session(proto(op, arrays))
    run = session(proto(op, arrays, tuple(arrays)))
    x = np.ones((1, 1, K), F) if op == "QuantizedHead" else np.ones((1, 1), np.int64)
    with pytest.raises(Exception, match=message):
        run.run(None, {"x": x, **arrays})


@pytest.mark.parametrize("op", ["QuantizedHead", "QuantizedEmbedding"])
@pytest.mark.parametrize(("attributes", "message"), BAD_ATTRIBUTES)
def test_wrong_attributes_are_refused(op: str, attributes: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception, match=message):
        session(proto(op, FOUR, **attributes))


def test_missing_group_scales_are_refused() -> None:
    arrays = {name: FOUR[name] for name in ("W", "scale")}
    run = session(proto("QuantizedHead", arrays, bits=4))
    with pytest.raises(Exception, match="input group_scale is missing"):
        run.run(None, {"x": np.ones((1, 1, K), F)})


def test_a_group_scale_at_8_bits_is_refused() -> None:
    with pytest.raises(Exception, match="a table of 8 bits has no group_scale; export"):
        session(proto("QuantizedHead", {**EIGHT, "group_scale": FOUR["group_scale"]}, bits=8))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("id_", [-1, N, 1 << 40])
def test_ids_without_a_row_are_refused(bits: int, id_: int) -> None:
    run = session(proto("QuantizedEmbedding", inputs(table(bits))))
    with pytest.raises(Exception, match=rf"id {id_} is not in 0 .. {N - 1}"):
        run.run(None, {"x": np.array([[1, id_]])})


def test_activations_of_another_width_are_refused() -> None:
    run = session(model("QuantizedHead", ["t", "k"], EIGHT, N=N, K=K, bits=8))
    with pytest.raises(Exception, match=r"X must end in K = 100, got \(2, 99\)"):
        run.run(None, {"x": np.ones((2, 99), F)})
