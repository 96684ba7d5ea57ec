"""The kernels' own threads, and several layers of one input on them (ctypes, as binding.py).

    with Pool(2) as pool:
        q, k, v = ternary_layers(Kernels(), x, [query, key, value], pool=pool)

Inside ONNX Runtime its threads are used instead.
"""

from __future__ import annotations

import ctypes as c
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from bitdistill.backends.kernels.binding import BODY, Floats, Input, Kernels, Ternary, library
from bitdistill.packing import base3_shape, kernel_shape


class Pool:
    """`threads` threads, the calling one counted. Any thread may call; a busy pool is not waited
    for (the call works alone). Raises ValueError for fewer than 1, RuntimeError when the system
    has no more."""

    def __init__(self, threads: int) -> None:
        if threads < 1:
            raise ValueError(f"a pool needs at least 1 thread, got {threads}")
        self._pool: int | None = library().bd_pool_create(threads)
        if self._pool is None:
            raise RuntimeError(f"the system has no {threads} threads; ask for fewer")

    @property
    def handle(self) -> int:
        """The BdPool *; RuntimeError once closed."""
        if self._pool is None:
            raise RuntimeError("this pool is closed; make another")
        return self._pool

    @property
    def threads(self) -> int:
        return library().bd_pool_threads(self.handle)

    def run(self, total: int, body: Callable[[int, int], None]) -> None:
        """body(first, last) on one part of range(total) for each thread."""
        library().bd_pool_run(self.handle, total, BODY(lambda _, a, b: body(a, b)), None)

    def close(self) -> None:
        """Ends the threads; no call may be running."""
        library().bd_pool_destroy(self._pool)
        self._pool = None

    def __enter__(self) -> Pool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


@dataclass(frozen=True)
class Layer:
    """packed uint8 in a kernel layout (two bits, or base 3), scale (N,), bias (N,) or None."""

    packed: NDArray[np.uint8]
    scale: Floats
    bias: Floats | None = None
    base3: bool = False

    def pointers(self, columns: int) -> Ternary:
        """Raises ValueError when the arrays are not those of an (N, columns) matrix."""
        rows = self.scale.shape[0]
        shape = (base3_shape if self.base3 else kernel_shape)(rows, columns)
        if self.packed.dtype != np.uint8 or self.packed.shape != shape:
            raise ValueError(f"packed must be uint8 {shape}")
        arrays: list[NDArray] = [self.packed, self.scale]
        if self.bias is not None:
            arrays.append(self.bias)
        if not all(array.flags.c_contiguous for array in arrays):
            raise ValueError("packed, scale and bias must be contiguous")
        bias = None if self.bias is None else self.bias.ctypes.data
        pointers = (self.packed.ctypes.data, self.scale.ctypes.data, bias)
        return Ternary(*pointers, rows, columns, self.base3)


def ternary_layers(
    kernels: Kernels,
    x: Floats,
    layers: Sequence[Layer],
    *,
    pool: Pool | None = None,
    norm_weight: Floats | None = None,
    epsilon: float = 0.0,
    activation_bits: int = 8,
) -> list[Floats]:
    """x (M, K) through layers that share it: [y (M, N) of each]; x is quantised once.

    Layers in base 3 need `activation_bits` of 8 (ValueError).
    """
    if activation_bits != 8 and any(layer.base3 for layer in layers):
        raise ValueError(f"weights in base 3 need 8 activation bits, got {activation_bits}")
    tokens, columns = x.shape
    x = np.ascontiguousarray(x, np.float32)
    weights = (Ternary * len(layers))(*(layer.pointers(columns) for layer in layers))
    norm = None if norm_weight is None else norm_weight.ctypes.data
    source = Input(x.ctypes.data, norm, epsilon, tokens, columns)
    scratch = np.empty(
        library().bd_scratch_bytes(tokens, columns, activation_bits) // 8 + 1, np.uint64
    )
    ys = [np.empty((tokens, layer.scale.shape[0]), np.float32) for layer in layers]
    library().bd_ternary_layers(
        kernels.table, weights, len(layers), source, activation_bits, scratch.ctypes.data,
        None if pool is None else pool.handle, (c.c_void_p * len(ys))(*(y.ctypes.data for y in ys)),
    )  # fmt: skip
    return ys
