"""ctypes binding to the kernels' attention (bitdistill_attention.h), for tests and benchmarks.

Shapes: T tokens, G query heads of one key head, S positions of the cache, D head size.
"""

from __future__ import annotations

import ctypes as c
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from bitdistill.backends.kernels.binding import Kernels
from bitdistill.backends.kv_cache import DTYPES, SCALE_BYTES, row_elements

Floats = NDArray[np.float32]


class AttentionCall(c.Structure):
    _fields_ = (
        *((name, c.c_void_p) for name in ("q", "k", "v", "y")),
        *((name, c.c_int64) for name in ("q_stride", "k_stride", "v_stride", "y_stride")),
        *((name, c.c_void_p) for name in ("keys", "values", "cos", "sin", "q_norm", "k_norm")),
        ("epsilon", c.c_float),
        ("scale", c.c_float),
        *((name, c.c_int64) for name in ("past", "group", "head_size", "window", "cache_bits")),
    )


def new_cache(bits: int, positions: int, head_size: int) -> NDArray:
    """An empty cache of one key head: (S, D) of float32 or float16, (S, D + 4) of int8."""
    return np.zeros((positions, row_elements(head_size, bits)), DTYPES[bits])


def held_rows(cache: NDArray) -> NDArray[np.float64]:
    """What the rows of a cache stand for, float64 (S, D)."""
    if cache.dtype != np.int8:
        return cache.astype(np.float64)
    codes, scale = cache[:, :-SCALE_BYTES], cache[:, -SCALE_BYTES:].copy().view(np.float32)
    return codes.astype(np.float64) * scale


@dataclass
class Head:
    """One key head of one sequence; `keys` and `values` are its cache, written by `attend`."""

    keys: NDArray
    values: NDArray
    scale: float
    window: int = 0
    cos: Floats | None = None
    sin: Floats | None = None
    q_norm: Floats | None = None
    k_norm: Floats | None = None
    epsilon: float = 1e-6
    length: int = field(default=0, init=False)

    def attend(self, kernels: Kernels, q_TGD: Floats, k_TD: Floats, v_TD: Floats) -> Floats:
        """Feed T tokens after those held; float32 (T, G, D)."""
        tokens, group, size = q_TGD.shape
        y = np.full_like(q_TGD, np.nan)
        bits = 8 * self.keys.itemsize
        arrays = (q_TGD, k_TD, v_TD, y)
        cache = (self.keys, self.values, self.cos, self.sin, self.q_norm, self.k_norm)
        strides = (group * size, size, size, group * size)
        call = AttentionCall(
            *map(address, arrays), *strides, *map(address, cache), self.epsilon, self.scale,
            self.length, group, size, self.window, bits,
        )  # fmt: skip
        kernels.attention(call, tokens)
        self.length += tokens
        return y


def address(array: NDArray | None) -> int | None:
    """Where an array's elements lie; None for no array."""
    return None if array is None else array.ctypes.data
