"""ctypes binding to the gate of bitdistill_kernels.h, for tests and benchmarks."""

from __future__ import annotations

import ctypes as c
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from bitdistill.backends.kernels.binding import Kernels

Floats = NDArray[np.float32]
ACTIVATIONS = {"silu": 1, "gelu_tanh": 2}


class Gate(c.Structure):
    _fields_ = (
        ("gate", c.c_void_p),
        ("up", c.c_void_p),
        ("stride", c.c_int64),
        ("columns", c.c_int64),
        ("activation", c.c_int),
    )


GATE = c.CFUNCTYPE(None, c.POINTER(Gate), c.c_void_p, c.c_int64, c.c_int64)


def gated(kernels: Kernels, both: Floats, activation: str) -> Floats:
    """act(gate) * up of contiguous float32 (M, 2 K), gate first -> (M, K), on this thread."""
    if both.dtype != np.float32 or not both.flags.c_contiguous or both.shape[1] % 2:
        raise ValueError(f"need contiguous float32 (M, 2 K), got {both.dtype} {both.shape}")
    tokens, stride = both.shape
    columns = stride // 2
    start = both.ctypes.data
    call = Gate(start, start + 4 * columns, stride, columns, ACTIVATIONS[activation])
    out = np.empty((tokens, columns), np.float32)
    kernels.table.gate(call, out.ctypes.data, 0, tokens)
    return out
