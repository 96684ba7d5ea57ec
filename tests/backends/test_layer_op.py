"""DecoderLayer gives the bits of the TernaryLinear and Attention nodes that it stands for."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import onnxruntime
import pytest
from attention_models import CONTEXT, Inputs, cache_memory, feed, run_in_place
from layer_models import BLOCK_NORMS, PARTS, Layer, separate, whole
from op_models import session

Session = onnxruntime.InferenceSession
WIDE = Layer(hidden=256, wide=704)  # enough rows for several pieces on each of many threads

LAYERS = {
    "usual": Layer(),
    "cache 32": Layer(bits=32),
    "cache 8": Layer(bits=8),
    "without norms of heads": Layer(head_norms=False),
    "without any norm": Layer(norms=(), head_norms=False),
    "norms of the block": Layer(norms=BLOCK_NORMS),
    "norms of o and down": Layer(norms=("o_proj", "down_proj")),
    "a bias of qkv": Layer(norms=BLOCK_NORMS, biases=("qkv_proj",)),
    "biases": Layer(biases=PARTS),
    "base 3": Layer(layout=2),
    "base 3, window, cache 8": Layer(layout=2, bits=8, window=8, biases=PARTS),
    "floats": Layer(activation_bits=0),
    "floats, gelu, window": Layer(activation_bits=0, activation="gelu_tanh", window=8),
    "gelu": Layer(activation="gelu_tanh", biases=("o_proj", "down_proj")),
    "window": Layer(window=3, bits=32),
    "wide": WIDE,
    "wide, base 3": Layer(hidden=256, wide=704, layout=2),
}
# Lengths of the sequences in the end, and tokens of the call: prompts, padded on the right or not,
# then what follows them.
CALLS = [
    [([1], 1), ([2], 1), ([9], 7), ([10], 1)],
    [([7], 7), ([15], 8), ([16], 1), ([56], 40)],
    [([8], 8), ([9], 1)],
    [([40, 1, 23], 40), ([41, 2, 24], 1), ([46, 7, 29], 5), ([47, 8, 30], 1)],
    [([3, 2], 3), ([4, 3], 1)],
]


def step(run: Session, given: Inputs, past: list[Any]) -> list[Any]:
    """Y and present of one call."""
    if past:
        given = given | {"past_key": past[0], "past_value": past[1]}
    results: list[Any] = run.run(None, given)
    return results


def same_cache(one: list[Any], other: list[Any], lengths: list[int]) -> bool:
    """What the sequences hold; behind their ends is nothing that was written."""
    return all(
        a.shape == b.shape and np.array_equal(a[i, :, :length], b[i, :, :length])
        for a, b in zip(one, other, strict=True)
        for i, length in enumerate(lengths)
    )


def check(layer: Layer, one: Session, other: Session, calls: list[tuple[list[int], int]]) -> None:
    pasts: list[list[Any]] = [[], []]
    for seed, (lengths, tokens) in enumerate(calls):
        given = feed(layer.bits, lengths, tokens, max(lengths), 0, seed, layer.hidden)
        x = given["x"].copy()
        (y, *pasts[0]), (expected, *pasts[1]) = (
            step(run, given, past) for run, past in zip((one, other), pasts, strict=True)
        )
        assert np.isfinite(expected).all()
        assert np.array_equal(given["x"], x)  # y may lie where x does, unless it is a caller's
        assert np.array_equal(y, expected), (lengths, tokens)
        assert same_cache(pasts[0], pasts[1], lengths), (lengths, tokens)


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_prompts_chunks_and_steps_equal_separate_nodes(layer: Layer) -> None:
    one, other = session(whole(layer)), session(separate(layer))
    for calls in CALLS:
        check(layer, one, other, calls)


@pytest.mark.parametrize("threads", [1, 2, 3, 9])
@pytest.mark.parametrize("layer", [WIDE, Layer(hidden=256, wide=704, layout=2, bits=8)])
def test_thread_counts_give_the_same_bits(layer: Layer, threads: int) -> None:
    """One thread, which has no others to wait for, up to more than there are processors."""
    one, other = session(whole(layer), threads), session(separate(layer), 1)
    for calls in CALLS:
        check(layer, one, other, calls)


@pytest.mark.parametrize("bits", [32, 16, 8])
def test_a_shared_buffer_is_written_in_place(bits: int) -> None:
    layer = Layer(bits=bits)
    runs = session(whole(layer)), session(separate(layer))
    memories = [cache_memory(feed(bits, [5], 5, 5, CONTEXT)) for _ in runs]
    places = [value.data_ptr() for memory in memories for value in memory]
    held = 0
    for tokens in (5, 1, 7, 1, 20):
        held += tokens
        given = feed(bits, [held], tokens, held, 0, held, layer.hidden)
        y, expected = (run_in_place(*run) for run in
                       ((a, given, b) for a, b in zip(runs, memories, strict=True)))  # fmt: skip
        assert np.array_equal(y, expected)
    assert [value.data_ptr() for memory in memories for value in memory] == places
    for mine, theirs in zip(*memories, strict=True):
        assert np.array_equal(mine.numpy(), theirs.numpy())  # and nothing behind the end


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0, 0)])
def test_nothing_in_is_nothing_out(shape: tuple[int, int]) -> None:
    layer = Layer()
    lengths = [3] * shape[0]
    total = 3 if shape[0] else max(shape[1], 1)
    given = feed(layer.bits, lengths, shape[1], total, 3, 0, layer.hidden)
    results = [session(proto).run(None, given) for proto in (whole(layer), separate(layer))]
    assert [a.shape for a in results[0]] == [a.shape for a in results[1]]
    assert results[0][0].shape == (*shape, layer.hidden)


def decode(run: Session, seed: int) -> list[Any]:
    """Every y of a prompt and some steps, and the cache in the end."""
    rng = np.random.default_rng(seed)
    results: list[Any] = []
    past: list[Any] = []
    held = 0
    for tokens in (int(rng.integers(1, 12)), 1, 1, 3, 1, 1, 1, 1):
        held += tokens
        given = feed(WIDE.bits, [held], tokens, held, 0, seed + held, WIDE.hidden)
        y, *past = step(run, given, past)
        results.append(y)
    return [*results, *past]


@pytest.mark.parametrize("sessions", [1, 3])
def test_runs_at_the_same_time(sessions: int) -> None:
    """Of one session, whose threads are then short, and of several with threads of their own."""
    runs = [session(whole(WIDE), 3) for _ in range(sessions)]
    other = session(separate(WIDE), 1)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: decode(runs[i % sessions], i), range(12)))
    for seed, results in enumerate(found):
        for a, b in zip(results, decode(other, seed), strict=True):
            assert np.array_equal(a, b)


def test_sessions_come_and_go() -> None:
    """Those of one model share a table of the rotation, which the last one to go takes along."""
    layer = Layer(layout=2)
    expected = decode(session(separate(WIDE), 1), 5)
    for _ in range(3):
        check(layer, session(whole(layer)), session(separate(layer)), CALLS[2])
    assert all(map(np.array_equal, decode(session(whole(WIDE)), 5), expected))


@pytest.mark.skipif(
    tuple(map(int, onnxruntime.__version__.split(".")[:2])) < (1, 24),
    reason="older runtimes crash in it; the library leaves it out",
)
def test_the_shape_of_y_is_inferred() -> None:
    y = session(whole(Layer())).get_outputs()[0]
    assert y.shape == ["batch", "time", 100]
