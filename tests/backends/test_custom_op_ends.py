"""What TernaryLinear does beside the product: the gate before it and the residual after it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from op_models import ATTRIBUTES, F, expected, layer, model, session

from bitdistill.backends.kernels.binding import Kernels
from bitdistill.backends.kernels.binding_gate import ACTIVATIONS, gated
from bitdistill.packing import pack_layout

K, N = 100, 75
SHAPES = [(1, 1), (2, 3), (1, 70), (0, 5), (2, 0)]


def ends_model(names: tuple[str, ...], bits: int = 8, **attributes: Any) -> bytes:
    """One node with X of any width; of the optional inputs those in `names`."""
    inputs: dict[str, NDArray] = {name: layer()[name] for name in ("W", "scale")}
    for name in ("norm_weight", "bias"):
        inputs[name if name in names else f"absent {name}"] = layer()[name]
    fed = tuple(name for name in ("up", "residual") if name in names)
    for name in ("up", "residual"):
        inputs[name if name in fed else f"absent {name}"] = np.zeros((1, 1, 1), F)
    attributes = {"N": N, "K": K, **ATTRIBUTES, "activation_bits": bits, **attributes}
    return model("TernaryLinear", ["batch", "time", "width"], inputs, fed, **attributes)


def product(both: NDArray, activation: str) -> NDArray:
    flat = np.ascontiguousarray(both.reshape(-1, both.shape[-1]))
    return gated(Kernels(), flat, activation).reshape(*both.shape[:-1], both.shape[-1] // 2)


def result(x: NDArray, names: tuple[str, ...], bits: int = 8) -> NDArray:
    inputs = {name: a for name, a in layer().items() if name in ("W", "scale", *names)}
    return expected(x, inputs, bits)


@pytest.mark.parametrize("bits", [8, 0])
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("names", [(), ("norm_weight",), ("bias", "residual")])
def test_a_gate_is_a_prologue(names: tuple[str, ...], activation: str, bits: int) -> None:
    """Gate and up in one input, or in two, give the bits of the kernels' own gate."""
    one = session(ends_model(names, bits, activation=activation))
    two = session(ends_model((*names, "up"), bits, activation=activation))
    for shape in SHAPES:
        rng = np.random.default_rng(sum(shape))
        both, residual = rng.standard_normal((*shape, 2 * K), F), rng.random((*shape, N), F)
        more = {"residual": residual} if "residual" in names else {}
        y = result(product(both, activation), names, bits)
        if more:
            y = y + residual
        gate, up = (np.ascontiguousarray(half) for half in np.split(both, 2, axis=-1))
        assert np.array_equal(one.run(None, {"x": both, **more})[0], y)
        assert np.array_equal(two.run(None, {"x": gate, "up": up, **more})[0], y)


@pytest.mark.parametrize("bits", [8, 0])
@pytest.mark.parametrize("names", [("residual",), ("norm_weight", "bias", "residual")])
def test_a_residual_is_added_last(names: tuple[str, ...], bits: int) -> None:
    run = session(ends_model(names, bits))
    for shape in SHAPES:
        rng = np.random.default_rng(sum(shape))
        x, residual = rng.standard_normal((*shape, K), F), rng.standard_normal((*shape, N), F)
        (y,) = run.run(None, {"x": x, "residual": residual})
        assert np.array_equal(y, result(x, names, bits) + residual)


@pytest.mark.parametrize("tokens", [1, 7, 8, 130])
def test_thread_counts_give_the_same_bits(tokens: int) -> None:
    """Wide enough that rows, and then tokens, are split."""
    inputs = layer(512, 2100)
    residual = np.zeros((1, 1), F)
    constants = {**inputs, "absent up": residual, "residual": residual}
    attributes = {"N": 2100, "K": 512, **ATTRIBUTES, "activation": "silu"}
    proto = model("TernaryLinear", ["t", 1024], constants, ("residual",), **attributes)
    rng = np.random.default_rng(tokens)
    both, residual = rng.standard_normal((tokens, 1024), F), rng.standard_normal((tokens, 2100), F)
    y = expected(product(both, "silu"), inputs, isa=Kernels().isa) + residual
    for threads in (1, 2, 3):
        run = session(proto, threads)
        assert np.array_equal(run.run(None, {"x": both, "residual": residual})[0], y)


def test_shared_scales_that_are_fed_and_base_3() -> None:
    """The ends do not depend on how weights and scales arrive."""
    rng = np.random.default_rng(9)
    trits = rng.integers(-1, 2, (N, K)).astype(np.int8)
    both, residual = rng.standard_normal((2, 2 * K), F), rng.standard_normal((2, N), F)
    results = []
    for layout in (1, 2):
        inputs = {"W": pack_layout(trits, layout), "scale": np.array([0.5, 2, 1], F)}
        inputs |= {f"absent {i}": residual for i in range(3)} | {"residual": residual}
        attributes = {**ATTRIBUTES, "scale_rows": 25, "layout": layout, "activation": "gelu_tanh"}
        proto = model(
            "TernaryLinear", ["t", 2 * K], inputs, ("scale", "residual"), N=N, K=K, **attributes
        )
        fed = {"x": both, "scale": inputs["scale"], "residual": residual}
        results.append(session(proto).run(None, fed)[0])
    whole = {"W": pack_layout(trits, 1), "scale": np.array([0.5, 2, 1], F)}
    y = expected(product(both, "gelu_tanh"), whole, scale_rows=25) + residual
    assert np.array_equal(results[0], y)
    assert np.array_equal(results[1], y)


@pytest.mark.parametrize("activation", ["relu", "", "s" * 40])
def test_unknown_activations_are_refused(activation: str) -> None:
    with pytest.raises(Exception, match="'layer 7': activation must be silu or gelu_tanh, got '"):
        session(ends_model((), activation=activation))


REFUSED: list[tuple[dict[str, Any], dict[str, tuple[int, ...]], str]] = [
    ({"activation": "silu"}, {"x": (1, 2, K)}, r"X must end in 2 K = 200, got \(1, 2, 100\)"),
    ({}, {"x": (1, 2, K), "up": (1, 2, K)}, "up needs the attribute activation; export"),
    (
        {"activation": "silu"},
        {"x": (1, 2, 2 * K), "up": (1, 2, K)},
        r"X must end in K = 100, got \(1, 2, 200\)",
    ),
    (
        {"activation": "silu"},
        {"x": (1, 2, K), "up": (2, 1, K)},
        r"up must have the shape \(1, 2, 100\), got \(2, 1, 100\)",
    ),
    ({}, {"x": (1, 2, K), "residual": (1, 1, N)}, r"residual must have the shape \(1, 2, 75\)"),
    ({}, {"x": (1, 2, K), "residual": (1, 2, K)}, r"\(1, 2, 75\), got \(1, 2, 100\)"),
]


@pytest.mark.parametrize(("attributes", "shapes", "message"), REFUSED)
def test_inputs_that_do_not_belong_together_are_refused(
    attributes: dict[str, Any], shapes: dict[str, tuple[int, ...]], message: str
) -> None:
    run = session(ends_model(tuple(shapes), **attributes))
    with pytest.raises(Exception, match=message):
        run.run(None, {name: np.ones(shape, F) for name, shape in shapes.items()})
