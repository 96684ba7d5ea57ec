"""Attention over a cache of 32, 16 and 8 bits: every instruction set equals the scalar one bit for
bit, which equals NumPy in fp64 over the cache's own values; the cache holds what it should."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from bitdistill.backends.kernels.binding import Kernels, available_isas
from bitdistill.backends.kernels.binding_attention import Head, held_rows, new_cache

F = np.float32
FAST = [isa for isa in available_isas() if isa != "scalar"]
BITS = (32, 16, 8)
SHAPES = [(128, 2, 70), (64, 1, 37), (16, 3, 5), (48, 7, 40), (256, 4, 33)]  # D, G, T


def inputs(size: int, group: int, tokens: int, seed: int = 0) -> dict[str, NDArray]:
    rng = np.random.default_rng(seed)
    angles = np.outer(np.arange(tokens), 1e4 ** -np.linspace(0, 1, size // 2))
    return {
        "q": rng.standard_normal((tokens, group, size), F),
        "k": rng.standard_normal((tokens, size), F) * np.linspace(0.1, 4, size, dtype=F),
        "v": rng.standard_normal((tokens, size), F),
        "cos": np.cos(angles).astype(F),
        "sin": np.sin(angles).astype(F),
        "q_norm": rng.random(size, F) + F(0.5),
        "k_norm": rng.random(size, F) + F(0.5),
    }


def head(given: dict[str, NDArray], bits: int, window: int, rows: int, **changes: Any) -> Head:
    size = given["k"].shape[1]
    cache = new_cache(bits, rows, size), new_cache(bits, rows, size)
    parts = {name: given[name] for name in ("cos", "sin", "q_norm", "k_norm")}
    return Head(*cache, scale=size**-0.5, window=window, **parts | changes)


def run(isa: str, given: dict[str, NDArray], at: Head, pieces: list[int]) -> NDArray[np.float32]:
    """Feed the tokens in pieces."""
    ends = np.cumsum([0, *pieces])
    found = [
        at.attend(Kernels(isa), *(given[name][a:b] for name in ("q", "k", "v")))
        for a, b in itertools.pairwise(ends)
    ]
    return np.concatenate(found)


def prepared(x: NDArray, norm: NDArray | None, cos: NDArray, sin: NDArray) -> NDArray[np.float64]:
    """Norm and rotation in fp64; x (T, ..., D)."""
    x = x.astype(np.float64)
    if norm is not None:
        x = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-6) * norm
    shape = (len(x), *[1] * (x.ndim - 2), -1)
    cos, sin = cos.reshape(shape), sin.reshape(shape)
    a, b = np.split(x, 2, -1)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def reference(given: dict[str, NDArray], at: Head) -> NDArray[np.float64]:
    """Softmax over the visible positions, with what the cache holds."""
    q = prepared(given["q"], at.q_norm, given["cos"], given["sin"])
    keys, values = held_rows(at.keys), held_rows(at.values)
    y = np.empty_like(q)
    for t in range(len(q)):
        low = max(0, t + 1 - at.window) if at.window else 0
        scores = q[t] @ keys[low : t + 1].T * at.scale
        p = np.exp(scores - scores.max(-1, keepdims=True))
        y[t] = p / p.sum(-1, keepdims=True) @ values[low : t + 1]
    return y


@pytest.mark.parametrize("window", [0, 8])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", BITS)
def test_scalar_equals_numpy(bits: int, shape: tuple[int, int, int], window: int) -> None:
    given = inputs(*shape)
    at = head(given, bits, window, shape[2])
    y = run("scalar", given, at, [shape[2]])
    np.testing.assert_allclose(y, reference(given, at), atol=4e-6, rtol=1e-5)


@pytest.mark.parametrize("window", [0, 1, 8, 19])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("isa", FAST)
def test_every_instruction_set_equals_scalar(
    isa: str, bits: int, shape: tuple[int, int, int], window: int
) -> None:
    given, tokens = inputs(*shape), shape[2]
    ours, theirs = (head(given, bits, window, tokens) for _ in range(2))
    expected = run("scalar", given, theirs, [tokens])
    assert np.array_equal(run(isa, given, ours, [tokens]), expected)
    for name in ("keys", "values"):
        assert getattr(ours, name).tobytes() == getattr(theirs, name).tobytes()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("isa", available_isas())
def test_tokens_fed_one_by_one_or_in_pieces_give_the_same_bits(isa: str, bits: int) -> None:
    """A cached step is the whole forward, exactly."""
    given = inputs(64, 2, 45)
    for window in (0, 8):
        whole = run(isa, given, head(given, bits, window, 45), [45])
        for pieces in ([1] * 45, [17, 1, 20, 7]):
            assert np.array_equal(run(isa, given, head(given, bits, window, 60), pieces), whole)


@pytest.mark.parametrize("isa", available_isas())
def test_the_cache_holds_rotated_keys_rounded_once(isa: str) -> None:
    given = inputs(32, 1, 20)
    exact = prepared(given["k"], given["k_norm"], given["cos"], given["sin"])
    for bits, step in ((16, 2.0**-11), (8, 0.5 / 127)):
        at = head(given, bits, 0, 24)
        run(isa, given, at, [20])
        for held, wanted in ((at.keys, exact), (at.values, given["v"])):
            rows = held_rows(held)
            largest = np.abs(wanted).max(1, keepdims=True)
            unit = np.abs(wanted) if bits == 16 else largest
            assert (np.abs(rows[:20] - wanted) <= 1.001 * step * unit + 1e-7).all()
            assert not held[20:].any()


@pytest.mark.parametrize("isa", available_isas())
def test_extremes_of_the_cache(isa: str) -> None:
    """Beyond float16 the largest is kept; rows of zeros and of tiny values do no harm."""
    given = inputs(16, 1, 4)
    given["v"][0], given["v"][1], given["v"][2] = 1e6, 0.0, 1e-38
    given["v"][3] = np.array([-70000, 65519, 65520, 6e-8, 3e-8, 2.9e-8, 1e-5, 0.1] * 2, F)
    at = head(given, 16, 0, 4)
    run(isa, given, at, [4])
    assert np.array_equal(at.values, np.clip(given["v"], -65504, 65504).astype(np.float16))
    at = head(given, 8, 0, 4)
    assert np.isfinite(run(isa, given, at, [4])).all()
    np.testing.assert_allclose(held_rows(at.values)[0], 1e6, rtol=1e-6)
    assert not held_rows(at.values)[1:3].any()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("isa", available_isas())
def test_nan_reaches_every_later_token_and_none_before_in_its_step(isa: str, bits: int) -> None:
    given = inputs(32, 2, 6)
    given["k"][3, 5] = np.nan
    y = run(isa, given, head(given, bits, 0, 6, k_norm=None), [1] * 6)
    assert np.isfinite(y[:3]).all()
    assert np.isnan(y[3:]).all()


@pytest.mark.parametrize("isa", available_isas())
def test_scores_far_apart_are_weights_of_one_and_zero(isa: str) -> None:
    given = inputs(16, 1, 12)
    given["q"][:] = given["k"][4]
    given["k"][4] *= 1e4
    plain = {"cos": None, "sin": None, "q_norm": None, "k_norm": None}
    y = run(isa, given, head(given, 32, 0, 12, **plain), [12])
    np.testing.assert_array_equal(y[4:], np.broadcast_to(given["v"][4], (8, 1, 16)))
