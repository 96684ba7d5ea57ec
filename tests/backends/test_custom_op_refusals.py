"""What the ONNX Runtime operators refuse, and in which words."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from op_models import ATTRIBUTES, F, expected, layer, model, session, ternary_model

from bitdistill.backends import kernels


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
    ({"scale_rows": None}, "attribute scale_rows is missing; export the model again"),
    ({"layout": None}, "the integer attribute layout is missing"),
    ({"activation_bits": None}, "the integer attribute activation_bits is missing"),
    ({"layout": 3}, r"weight layout 3 is not known here \(this library reads 1, 2\)"),
    ({"layout": 2}, r"W must have the shape \(3, 5, 32, 4\), got \(3, 7, 32, 4\)"),
    ({"layout": 2, "activation_bits": 0}, "layout 2 needs activation_bits 8; export the model"),
    ({"activation_bits": 4}, "activation_bits must be 8 or 0, got 4"),
    ({"N": 0}, "N = 0, K = 100 is out of range"),
    ({"N": -5}, "out of range"),
    ({"K": 1 << 18}, "K = 262144 is out of range"),
    ({"N": 1 << 62}, "out of range"),
    ({"scale_rows": 0}, "scale_rows = 0 must be at least 1 and divide N = 75"),
    ({"scale_rows": -25}, "scale_rows = -25 must be at least 1"),
    ({"scale_rows": 2}, "scale_rows = 2 must be at least 1 and divide N = 75"),
    ({"scale_rows": 150}, "scale_rows = 150 must be at least 1 and divide N = 75"),
    ({"scale_rows": 25}, r"scale must have the shape \(3\), got \(75\)"),
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


SHARED = [
    (np.ones(75, F), r"scale must have the shape \(3\), got \(75\)"),
    (np.ones(2, F), r"scale must have the shape \(3\), got \(2\)"),
    (np.ones((3, 1), F), r"scale must have the shape \(3\), got \(3, 1\)"),
    (np.array([1, 1, np.nan], F), r"scale\[2\] = -?nan is not finite"),
    (np.array([1, -1, 1], F), r"scale\[1\] = -1 is not finite and >= 0"),
]


@pytest.mark.parametrize(("scale", "message"), SHARED)
def test_malformed_shared_scales_are_refused(scale: NDArray, message: str) -> None:
    inputs = changed(scale=scale)
    with pytest.raises(Exception, match=message):
        session(ternary_model(inputs, scale_rows=25))
    run = session(ternary_model(inputs, ("scale",), scale_rows=25))
    with pytest.raises(Exception, match=message):
        run.run(None, {"x": np.ones((1, 1, 100), F), "scale": scale})


def test_a_false_row_count_takes_no_memory() -> None:
    """One scale for two billion rows, of weights that are yet to come."""
    rows = (1 << 31) - 1
    inputs = changed(scale=np.ones(1, F))
    del inputs["bias"]
    run = session(ternary_model(inputs, ("W",), N=rows, scale_rows=rows))
    with pytest.raises(Exception, match=r"W must have the shape \(67108864, 7, 32, 4\)"):
        run.run(None, {"x": np.ones((1, 1, 100), F), "W": inputs["W"]})


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
