"""The kernels' specification (bitdistill_kernels.h) written a second time, in NumPy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

F = np.float32


def fold(lanes: NDArray) -> NDArray:
    """Partial sums (..., 2^n), added in halves."""
    while lanes.shape[-1] > 1:
        half = lanes.shape[-1] // 2
        lanes = lanes[..., :half] + lanes[..., half:]
    return lanes[..., 0]


def lane_sum(values: NDArray, lanes: int) -> NDArray:
    """float32 sums over the last axis, element i in partial sum i mod lanes."""
    pad = [(0, 0)] * (values.ndim - 1) + [(0, -values.shape[-1] % lanes)]
    count = -(-values.shape[-1] // lanes)
    steps = np.pad(values, pad).reshape(*values.shape[:-1], count, lanes)
    total = np.zeros((*values.shape[:-1], lanes), F)
    for i in range(count):
        total = total + steps[..., i, :]
    return fold(total)


def normalised(x: NDArray, weight: NDArray | None, epsilon: float) -> NDArray:
    if weight is None:
        return x
    r = F(1) / np.sqrt(lane_sum(x * x, 32) / F(x.shape[1]) + F(epsilon))
    return x * r[:, None] * weight


def quantized(v: NDArray) -> tuple[NDArray, NDArray]:
    """q as float64 integers, zero for tokens that are not finite, and g / 127 of each token."""
    g = np.abs(v).max(1)
    q = np.clip(np.rint(v * (F(127) / (g + F(1e-5)))[:, None]), -128, 127)
    finite = np.isfinite(g)
    return np.where(finite[:, None], q, 0).astype(np.float64), np.where(
        finite, g / F(127), F("nan")
    )


def oracle(
    x: NDArray, trits: NDArray, scale: NDArray, weight: NDArray | None, bias: NDArray | None
) -> NDArray:
    with np.errstate(all="ignore"):
        q, down = quantized(normalised(x, weight, 1e-6))
        y = (q @ trits.T.astype(np.float64)).astype(F) * (down[:, None] * scale)
        return y if bias is None else y + bias


def float_oracle(v: NDArray, trits: NDArray, scale: NDArray) -> NDArray:
    v = np.pad(v, [(0, 0), (0, -v.shape[1] % 16)])
    trits = np.pad(trits, [(0, 0), (0, -trits.shape[1] % 16)]).astype(F)
    sums = np.zeros((4, len(v), len(trits)), F)
    for group in range(0, v.shape[1], 16):
        for s in range(4):
            for k in range(group + 4 * s, group + 4 * s + 4):
                sums[s] = sums[s] + v[:, k, None] * trits[None, :, k]
    return ((sums[0] + sums[1]) + (sums[2] + sums[3])) * scale


def random_trits(rng: np.random.Generator, n: int, k: int) -> NDArray[np.int8]:
    return rng.integers(-1, 2, (n, k)).astype(np.int8)


def same(a: NDArray, b: NDArray) -> bool:
    return a.dtype == b.dtype and np.array_equal(a, b, equal_nan=True)


EXP = [F(f"{c}") for c in (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3)]
EXP += [F(f"{c}") for c in (4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)]


def faded(x: NDArray) -> NDArray:
    """exp(-x) for x >= 0, zero above 86."""
    n = np.rint(-x * F(1.44269504))
    r = (-x - n * F(0.693359375)) - n * F(-2.12194440e-4)
    p = np.full_like(r, EXP[0])
    for c in EXP[1:]:
        p = p * r + c
    y = np.ldexp((p * (r * r) + r) + F(1), n.astype(np.int32))
    return np.where(x > 86, F(0), y)


def gated(gate: NDArray, up: NDArray, activation: str) -> NDArray:
    """act(gate) * up for numbers of moderate size."""
    z = gate
    if activation == "gelu_tanh":
        z = F(1.5957691216) * (gate + F(0.044715) * (gate * gate * gate))
    e = faded(np.abs(z))
    return gate * np.where(z < 0, e, F(1)) / (F(1) + e) * up
