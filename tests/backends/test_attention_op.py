"""The operator Attention inside ONNX Runtime: batches, caches in place or copied, and refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest
from attention_models import (
    ATTRIBUTES,
    CONTEXT,
    FREQUENCIES,
    GIVEN,
    HEADS,
    KV_HEADS,
    RESULTS,
    SIZE,
    F,
    Inputs,
    cache_memory,
    cached_model,
    feed,
    run_in_place,
)
from numpy.typing import NDArray
from onnx import helper
from op_models import session

from bitdistill.backends.kernels.binding import Kernels
from bitdistill.backends.kernels.binding_attention import Head
from bitdistill.backends.kv_cache import DTYPES, row_elements


def attention(bits: int, threads: int = 2, **changes: Any) -> onnxruntime.InferenceSession:
    """A session of one packed node with norms."""
    rng = np.random.default_rng(1)
    constants = {
        "frequencies": changes.pop("frequencies", FREQUENCIES),
        "q_norm": rng.random(SIZE, F) + F(0.5),
        "k_norm": rng.random(SIZE, F) + F(0.5),
    }
    attributes = {k: v for k, v in (ATTRIBUTES | changes).items() if v is not None}
    names = ["x", "", "", *GIVEN, *constants]
    node = helper.make_node("Attention", names, RESULTS, "layer 7", "", "bitdistill", **attributes)
    return session(cached_model([node], bits, constants), threads)


def alone(x_TC: NDArray, at: list[Head]) -> NDArray[np.float32]:
    """What the C interface gives for one sequence, (T, heads * D); the heads' caches advance."""
    q, k, v = np.split(x_TC, np.cumsum([HEADS, KV_HEADS]) * SIZE, 1)
    group = HEADS // KV_HEADS
    y = np.empty((len(q), KV_HEADS, group, SIZE), F)
    for h, head in enumerate(at):
        part = slice(h * SIZE, (h + 1) * SIZE)
        mine = np.ascontiguousarray(q.reshape(-1, KV_HEADS, group, SIZE)[:, h])
        keys, values = (np.ascontiguousarray(z[:, part]) for z in (k, v))
        y[:, h] = head.attend(Kernels(), mine, keys, values)
    return y.reshape(len(q), -1)


def heads(bits: int, window: int = 0) -> list[Head]:
    rng = np.random.default_rng(1)
    norms = [rng.random(SIZE, F) + F(0.5) for _ in range(2)]
    angles = np.arange(CONTEXT, dtype=F)[:, None] * FREQUENCIES
    wide = angles.astype(np.float64)
    turn = {"cos": np.cos(wide).astype(F), "sin": np.sin(wide).astype(F)}
    shape = (CONTEXT, row_elements(SIZE, bits))
    return [
        Head(
            *(np.zeros(shape, DTYPES[bits]) for _ in range(2)),
            scale=0.25, window=window, q_norm=norms[0], k_norm=norms[1], **turn,
        )
        for _ in range(KV_HEADS)
    ]  # fmt: skip


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("window", [0, 8])
@pytest.mark.parametrize("bits", [32, 16, 8])
def test_a_padded_batch_then_steps_equal_each_sequence_alone(
    bits: int, window: int, threads: int
) -> None:
    """Without a buffer to share, the past is copied into a longer present."""
    node = attention(bits, threads, local_window_size=window)
    lengths = [40, 1, 23]
    given = feed(bits, lengths, 40, 40, 0)
    expected = [heads(bits, window) for _ in lengths]
    y, *present = node.run(None, given)
    for b, length in enumerate(lengths):
        assert np.array_equal(y[b, :length], alone(given["x"][b, :length], expected[b]))
        assert not y[b, length:].any()
    for step in range(3):
        lengths = [length + 1 for length in lengths]
        given = feed(bits, lengths, 1, max(lengths), 0, seed=step + 1)
        given |= {"past_key": present[0], "past_value": present[1]}
        y, *present = node.run(None, given)
        assert present[0].shape[2] == max(lengths)
        for b, at in enumerate(expected):
            assert np.array_equal(y[b], alone(given["x"][b], at))
    for b, at in enumerate(expected):
        for h, head in enumerate(at):
            held = slice(0, lengths[b])
            assert np.array_equal(present[0][b, h, held], head.keys[held])
            assert np.array_equal(present[1][b, h, held], head.values[held])


@pytest.mark.parametrize("bits", [32, 16, 8])
def test_a_shared_buffer_is_written_in_place(bits: int) -> None:
    node, at = attention(bits), heads(bits)
    memory = cache_memory(feed(bits, [5], 5, 5, CONTEXT))
    places = [value.data_ptr() for value in memory]
    held = 0
    for tokens in (5, 1, 7):
        held += tokens
        given = feed(bits, [held], tokens, held, 0, seed=held)
        y = run_in_place(node, given, memory)
        assert np.array_equal(y[0], alone(given["x"][0], at))
    assert [value.data_ptr() for value in memory] == places
    found = memory[0].numpy()[0, :, :held]
    assert np.array_equal(found, np.stack([head.keys[:held] for head in at]))


REFUSED = [
    ({"x": np.zeros((1, 2, 150), F)}, "query has 150 columns, which are not 10 heads"),
    ({"past_key": np.zeros((1, 3, 0, 16), F)}, "past_key must have the shape .1, 2, 0, 16."),
    ({"lengths": np.array([5], np.int32)}, r"seqlens_k\[0\] = 5 does not fit 2 tokens"),
    ({"lengths": np.array([-1], np.int32)}, r"seqlens_k\[0\] = -1 does not fit"),
    ({"total": np.array(65, np.int32)}, "total_sequence_length 65 is not between 2 .* of 64"),
    ({"total": np.array(1, np.int32)}, "total_sequence_length 1 is not between 2 tokens"),
    ({"total": np.array(9, np.int32), "lengths": np.array([8], np.int32)}, "room for 0"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_inputs_that_do_not_fit_are_refused(changes: Inputs, message: str) -> None:
    given = feed(32, [2], 2, 2, 0) | changes
    with pytest.raises(Exception, match=f"layer 7.*{message}"):
        attention(32).run(None, given)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_num_heads": 4}, "are not those of a model; export it again"),
        ({"context": 0}, "are not those of a model; export it again"),
        ({"local_window_size": -1}, "are not those of a model; export it again"),
        ({"scale": None}, "attribute scale is missing; export the model again"),
        ({"frequencies": np.zeros((2, 4), F)}, "frequencies must be a constant vector"),
    ],
)
def test_nodes_that_make_no_sense_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception, match=message):
        attention(32, **changes)
