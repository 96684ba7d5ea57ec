"""What DecoderLayer refuses, and in which words."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from attention_models import CONTEXT, KV_HEADS, SIZE, F, Inputs, feed
from layer_models import PARTS, SHARED, Layer, separate, whole
from op_models import session

LAYER = Layer(bits=32, biases=PARTS)
AGAIN = "export (it|the model) again"
HUGE = (1 << 62, (1 << 63) - 1, -(1 << 63), -1, 0, (1 << 17) + 1)
SIZES = ("hidden_size", "intermediate_size", "head_size")


def refused(message: str, *arguments: Any, layer: Layer = LAYER, **changes: Any) -> None:
    with pytest.raises(Exception, match=message):
        session(whole(layer, *arguments, **changes))


def given(tokens: int = 2, past: int = 0, **changes: Any) -> Inputs:
    held = tokens + past
    return feed(LAYER.bits, [held], tokens, held, past, 0, LAYER.hidden) | changes


@pytest.mark.parametrize("part", PARTS)
def test_weights_must_be_constant(part: str) -> None:
    message = f"DecoderLayer 'layer 7' {part}: W must be constant; {AGAIN}"
    refused(message, None, (f"{part}.W",))


def test_scales_must_be_constant() -> None:
    refused(f"DecoderLayer 'layer 7': scale must be constant; {AGAIN}", None, ("scale",))


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("member", ["norm_weight", "bias"])
def test_a_norm_or_bias_that_is_fed_is_not_left_out(part: str, member: str) -> None:
    name = f"{part}.{member}"
    run = session(whole(LAYER, None, (name,)))
    with pytest.raises(Exception, match=f"'layer 7' {part}: {member} must be constant; {AGAIN}"):
        run.run(None, given() | {name: LAYER.constants()[name]})


def test_norms_of_heads_may_be_fed() -> None:
    fed = {name: LAYER.constants()[name] for name in SHARED[1:]}
    run, other = session(whole(LAYER, None, tuple(fed))), session(separate(LAYER))
    (y, *_), (expected, *_) = run.run(None, given() | fed), other.run(None, given())
    assert np.array_equal(y, expected)
    with pytest.raises(Exception, match=rf"q_norm must have the shape \({SIZE}\), got \(3\)"):
        run.run(None, given() | fed | {"q_norm": np.ones(3, F)})


def test_frequencies_must_be_constant() -> None:
    refused("frequencies must be a constant vector of float; export", None, ("frequencies",))
    refused("frequencies must be a constant vector", {"frequencies": np.zeros((2, 4), F)})
    run = session(whole(LAYER, {"frequencies": np.ones(SIZE, F)}))
    with pytest.raises(Exception, match=r"frequencies must have the shape \(8\), got \(16\)"):
        run.run(None, given())


MISSING = [
    *((name, "integer attribute") for name in (*SIZES, "num_heads", "kv_num_heads", "context")),
    *((name, "integer attribute") for name in ("layout", "activation_bits", "local_window_size")),
    *((name, "attribute") for name in ("epsilon", "added_epsilon", "scale", "rotary_scale")),
    ("activation", "attribute"),
]


@pytest.mark.parametrize(("name", "kind"), MISSING)
def test_every_attribute_must_be_there(name: str, kind: str) -> None:
    refused(f"'layer 7'.*: the {kind} {name} is missing; {AGAIN}", **{name: None})


ATTRIBUTES: list[tuple[dict[str, Any], str]] = [
    ({"layout": 3}, r"'layer 7' qkv_proj: weight layout 3 is not known here \(.* 1, 2\); export"),
    ({"layout": -1}, "weight layout -1 is not known here"),
    ({"layout": 2}, r"qkv_proj: W must have the shape \(5, 5, 32, 4\), got \(5, 7, 32, 4\)"),
    ({"layout": 2, "activation_bits": 0}, "weight layout 2 needs activation_bits 8; export the"),
    ({"activation_bits": 4}, "activation_bits must be 8 or 0, got 4"),
    ({"activation": "relu"}, "'layer 7': activation must be silu or gelu_tanh, got 'relu'; export"),
    ({"activation": "s" * 40}, "activation must be silu or gelu_tanh, got '"),
    ({"epsilon": -1.0}, f"qkv_proj: its norm needs an epsilon >= 0, got -1; {AGAIN}"),
    ({"epsilon": float("nan")}, "qkv_proj: its norm needs an epsilon >= 0, got -?nan"),
    ({"added_epsilon": -0.5}, "o_proj: its norm needs an epsilon >= 0, got -0.5"),
    ({"local_window_size": -1}, f"are not those of a model; {AGAIN}"),
    ({"context": 0}, f"are not those of a model; {AGAIN}"),
    ({"context": 1 << 62}, f"are not those of a model; {AGAIN}"),
    ({"hidden_size": 84}, r"W must have the shape \(5, 6, 32, 4\), got \(5, 7, 32, 4\); export"),
    ({"intermediate_size": 64}, r"gate_up_proj: .* must have the shape"),
    ({"intermediate_size": 91}, "intermediate_size = 91 must be a multiple of 32"),
    ({"head_size": 32}, r"W must have the shape \(10, 7, 32, 4\), got \(5, 7, 32, 4\); export"),
    ({"num_heads": 2}, r"scale must have the shape \(7\), got \(9\)"),
    ({"num_heads": 12}, r"scale must have the shape \(12\), got \(9\)"),
    ({"num_heads": 5}, f"num_heads = 5, kv_num_heads = 2, .*are not those of a model; {AGAIN}"),
    ({"kv_num_heads": 0}, f"kv_num_heads = 0, .*are not those of a model; {AGAIN}"),
    ({"kv_num_heads": -2}, f"kv_num_heads = -2, .*are not those of a model; {AGAIN}"),
    # each a size that might be, together more than a matrix or a number holds
    ({"num_heads": 1 << 17, "head_size": 1 << 17}, "is out of range"),
    ({"num_heads": 1 << 17, "kv_num_heads": 1 << 17, "head_size": 1 << 17}, "is out of range"),
    ({"num_heads": 1 << 62, "kv_num_heads": 1 << 62}, f"is not that of a model; {AGAIN}"),
    ({"num_heads": -(1 << 63), "kv_num_heads": -1}, f"are not those of a model; {AGAIN}"),
    ({name: 1 << 17 for name in (*SIZES, "num_heads")}, "is out of range"),
]


@pytest.mark.parametrize(("changes", "message"), ATTRIBUTES)
def test_attributes_that_make_no_sense_are_refused(changes: dict[str, Any], message: str) -> None:
    refused(message, **changes)


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("value", HUGE)
def test_absurd_sizes_are_refused(name: str, value: int) -> None:
    refused(f"'layer 7': a size of {value} is not that of a model; {AGAIN}", **{name: value})


def altered(name: str, at: tuple[int, ...], value: int) -> Inputs:
    packed = LAYER.constants()[name].copy()
    packed[at] = value
    return {name: packed}


SHAPES = r"must have the shape \({}\), got \({}\); export"
CONSTANTS: list[tuple[Inputs, str]] = [
    (altered("qkv_proj.W", (4, 6, 31, 3), 0b11_01_01_01), "qkv_proj: W holds the code 3"),
    (altered("down_proj.W", (0, 0, 0, 0), 0xFF), f"down_proj: W holds the code 3.*{AGAIN}"),
    # a matrix cut short
    ({"o_proj.W": np.full((4, 5, 32, 4), 0x55, np.uint8)}, "o_proj: W must have the shape"),
    ({"down_proj.W": np.full((3, 5, 32, 4), 0x55, np.uint8)}, "down_proj: W must have the shape"),
    ({"gate_up_proj.W": np.zeros((0, 0, 0, 0), np.uint8)}, r"\(6, 7, 32, 4\), got \(0, 0, 0, 0\)"),
    ({"qkv_proj.W": np.zeros(5 * 7 * 32 * 4, np.uint8)}, r"qkv_proj: W .*, got \(4480\); export"),
    # scales
    ({"scale": np.ones(8, F)}, "'layer 7': scale " + SHAPES.format(9, 8)),
    ({"scale": np.ones(10, F)}, "scale " + SHAPES.format(9, 10)),
    ({"scale": np.ones(0, F)}, "scale " + SHAPES.format(9, 0)),
    ({"scale": np.ones((), F)}, "scale " + SHAPES.format(9, "")),
    ({"scale": np.ones((1, 9), F)}, "scale " + SHAPES.format(9, "1, 9")),
    ({"scale": np.array([np.nan] * 9, F)}, r"'layer 7': scale\[0\] = -?nan is not finite and >="),
    ({"scale": np.array([1] * 8 + [-1], F)}, r"scale\[8\] = -1 is not finite .*; export"),
    # norms and biases
    ({"o_proj.norm_weight": np.ones(100, F)}, "o_proj: norm_weight " + SHAPES.format(96, 100)),
    ({"down_proj.bias": np.ones(75, F)}, "down_proj: bias " + SHAPES.format(100, 75)),
]


@pytest.mark.parametrize(("changed", "message"), CONSTANTS)
def test_malformed_constants_are_refused(changed: Inputs, message: str) -> None:
    refused(message, changed)


def test_bytes_that_are_not_five_trits_are_refused() -> None:
    layer = Layer(layout=2)
    packed = layer.constants()["o_proj.W"].copy()
    packed[-1, -1, -1, -1] = 1
    message = f"o_proj: W holds a byte without five trits.*{AGAIN}"
    refused(message, {"o_proj.W": packed}, layer=layer)


def test_fewer_bytes_than_the_shape_says_are_refused() -> None:
    """By the runtime, before the operator sees them."""
    model = onnx.ModelProto.FromString(whole(LAYER))
    (weight,) = (t for t in model.graph.initializer if t.name == "qkv_proj.W")
    weight.raw_data = weight.raw_data[:-1]
    with pytest.raises(Exception, match=r"qkv_proj\.W|size mismatch"):  # 1.24: the latter
        session(model.SerializeToString())


def cache(*shape: int, dtype: Any = F) -> Inputs:
    return {name: np.zeros(shape, dtype) for name in ("past_key", "past_value")}


INPUTS: list[tuple[Inputs, str]] = [
    ({"x": np.zeros((1, 2, 99), F)}, r"X must end in hidden_size = 100, got \(1, 2, 99\)"),
    ({"x": np.zeros((1, 2, 0), F)}, r"X must end in hidden_size = 100, got \(1, 2, 0\)"),
    ({"x": np.zeros((1, 3, 100), F)}, "total_sequence_length 2 is not between 3 tokens and"),
    ({"x": np.zeros((2, 2, 100), F)}, r"past_key must have the shape \(2, 2, 0, 16\), got \(1, 2"),
    (cache(1, KV_HEADS, 0, 32), r"past_key must have the shape \(1, 2, 0, 16\), got \(1, 2, 0, 32"),
    (cache(1, 3, 0, SIZE), r"past_key must have the shape \(1, 2, 0, 16\), got \(1, 3, 0, 16\)"),
    (cache(1, KV_HEADS, 0), "past_key 4, got 3 and 3"),
    (
        {"past_value": np.zeros((1, KV_HEADS, 5, SIZE), F)},
        r"past_value must have the shape \(1, 2, 0, 16\), got \(1, 2, 5, 16\)",
    ),
    ({"lengths": np.array([5], np.int32)}, r"seqlens_k\[0\] = 5 does not fit 2 tokens"),
    ({"lengths": np.array([-1], np.int32)}, r"seqlens_k\[0\] = -1 does not fit"),
    ({"lengths": np.array([-(1 << 31)], np.int32)}, r"seqlens_k\[0\] = -2147483648 does not fit"),
    ({"lengths": np.array([1, 1], np.int32)}, r"seqlens_k must have the shape \(1\), got \(2\)"),
    ({"total": np.array(CONTEXT + 1, np.int32)}, "total_sequence_length 65 is not between 2 .* 64"),
    ({"total": np.array(-5, np.int32)}, "total_sequence_length -5 is not between"),
    ({"total": np.array(9, np.int32), "lengths": np.array([8], np.int32)}, "room for 0"),
]


@pytest.mark.parametrize(("changed", "message"), INPUTS)
def test_inputs_that_do_not_fit_are_refused(changed: Inputs, message: str) -> None:
    proto = onnx.ModelProto.FromString(whole(LAYER))
    for value in proto.graph.input:  # so that the runtime leaves the shapes to the operator
        value.type.tensor_type.ClearField("shape")
    with pytest.raises(Exception, match=f"'layer 7'.*{message}"):
        session(proto.SerializeToString()).run(None, given() | changed)


@pytest.mark.parametrize("shape", [(100,), (2, 100), (1, 1, 2, 100)])
def test_x_of_another_rank_is_refused(shape: tuple[int, ...]) -> None:
    proto = onnx.ModelProto.FromString(whole(LAYER))
    for value in proto.graph.input:
        value.type.tensor_type.ClearField("shape")
    run = session(proto.SerializeToString())
    with pytest.raises(Exception, match=f"'layer 7': X must have 3 dimensions, got {len(shape)}"):
        run.run(None, given(x=np.zeros(shape, F)))


def test_a_refused_call_leaves_the_session_as_it_was() -> None:
    run, other = session(whole(LAYER)), session(separate(LAYER))
    for _ in range(3):
        with pytest.raises(Exception, match="X must end in"):
            run.run(None, given(x=np.zeros((1, 2, 99), F)))
        (y, *_), (expected, *_) = run.run(None, given()), other.run(None, given())
        assert np.array_equal(y, expected)


def test_types_are_refused() -> None:
    run = session(whole(LAYER))
    with pytest.raises(Exception, match=r"tensor\(float\)"):
        run.run(None, given() | cache(1, KV_HEADS, 0, SIZE, dtype=np.float16))
    refused(r"tensor\(float\)", {"qkv_proj.W": np.zeros((5, 7, 32, 4), F)})
    refused(r"tensor\(double\)", {"scale": np.ones(9, np.float64)})
