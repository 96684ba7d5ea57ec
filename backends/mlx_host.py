"""An MLX artifact's decoder on a CPU without Metal: the leaves of mlx_architecture.py, in fp32.

MLX's Linux wheel has scalar 2-bit code and a reference BLAS, both many times slower than this
machine can be, and a hop between its arrays and ours costs as much as a small layer. So on such a
machine the decoder's structure stays and its leaves are replaced, by the kernels that ONNX
artifacts run on, which keep to the same arithmetic: int8 rounded half to even, exact integer sums,
one fp32 scale after the sum. What they multiply is unpacked, at load, from the words that the file
holds and MLX would read. A leaf gives back the kind of array that it is given: NumPy's all the way
through in fp32, MLX's where activations are 16 bits wide and only their type is to be rounded to.
Tests hold all of it against MLX's own operations and against PyTorch.
"""

from __future__ import annotations

import ctypes as c
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn
from numpy.typing import NDArray

from bitdistill import packing
from bitdistill.backends.kernels.binding import Kernels
from bitdistill.backends.kernels.binding_gate import ACTIVATIONS, Gate
from bitdistill.backends.kernels.pool import Layer, Pool, ternary_layers
from bitdistill.backends.mlx_linear import Norm, TernaryLinear

Floats = NDArray[np.float32]

# glibc's numbers (malloc.h) and this process's values, in bytes.
M_TRIM_THRESHOLD, KEPT = -1, 1 << 30
M_MMAP_THRESHOLD, MAPPED = -3, 32 << 20


def keep_freed_memory() -> None:
    """Have glibc keep freed blocks: every array of a layer is taken from it and freed at once.

    By default blocks of some hundred KB go back to the system and come back as pages to be
    filled with zeros. Other C libraries are left alone.
    """
    mallopt = getattr(c.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, MAPPED)
        mallopt(M_TRIM_THRESHOLD, KEPT)


def floats(x: Any) -> Floats:
    """A contiguous fp32 array of NumPy's, not copied where it is one or MLX has one."""
    if not isinstance(x, np.ndarray):
        x = np.array(x.astype(mx.float32), copy=False)
    return np.ascontiguousarray(x, np.float32)


def like(y: Floats, x: Any) -> Any:
    """`y` as the kind of array that `x` is."""
    return y if isinstance(x, np.ndarray) else mx.array(y).astype(x.dtype)


class Workers:
    """The kernels of this CPU, and a pool of `threads` threads to run them on."""

    def __init__(self, threads: int) -> None:
        self.kernels, self.pool = Kernels(), Pool(threads)
        weakref.finalize(self, self.pool.close)

    def share(self, tokens: int, total: int, body: Callable[[int, int], None]) -> None:
        """body(first, last) on one part of range(total) for each thread; it must not raise.

        One token is worth waking no thread.
        """
        if tokens > 1:
            self.pool.run(total, body)
        else:
            body(0, total)


class HostProduct:
    """A ternary linear, whole: norm, rounding, product, scale and bias in one call."""

    def __init__(self, linear: TernaryLinear, workers: Workers) -> None:
        words = np.array(linear.weight)
        rows, self.columns = len(words), words.shape[1] * 16
        packed = packing.pack_kernel(packing.unpack_affine(words, self.columns))
        scale = np.full(rows, floats(linear.scales)[0, 0])
        bias = floats(linear.bias).copy() if "bias" in linear else None
        self.layer = Layer(packed, scale, bias)
        self.norm = floats(linear.norm.gain).copy() if "norm" in linear else None
        self.epsilon = linear.norm.eps if "norm" in linear else 0.0
        self.bits = 8 if linear.quantized else 0
        self.workers = workers

    def __call__(self, linears: Sequence[TernaryLinear], x: Any) -> list[Any]:
        """x (..., K) through linears that share it, of which this is the first's: (..., N) each."""
        ys = ternary_layers(
            self.workers.kernels,
            floats(x).reshape(-1, self.columns),
            [linear.together.layer for linear in linears],
            pool=self.workers.pool,
            norm_weight=self.norm,
            epsilon=self.epsilon,
            activation_bits=self.bits,
        )
        return [like(y.reshape(*x.shape[:-1], y.shape[-1]), x) for y in ys]


class HostGate:
    """act(gate) * up, of (..., K)."""

    def __init__(self, activation: str, workers: Workers) -> None:
        self.activation, self.workers = ACTIVATIONS[activation], workers

    def __call__(self, gate: Any, up: Any) -> Any:
        first, second = floats(gate), floats(up)
        out, columns = np.empty_like(first), first.shape[-1]
        addresses = (first.ctypes.data, second.ctypes.data)
        call = Gate(*addresses, columns, columns, self.activation)
        run, to = self.workers.kernels.table.gate, out.ctypes.data
        tokens = first.size // columns
        self.workers.share(tokens, tokens, lambda a, b: run(call, to, a, b))
        return like(out, gate)


class HostNorm:
    """x / rms(x) * gain over the last axis."""

    def __init__(self, norm: Norm) -> None:
        self.gain = floats(norm.gain)

    def __call__(self, norm: Norm, x: Any) -> Any:
        values = floats(x)
        squares = np.square(values).mean(axis=-1, keepdims=True)
        return like(values * (1 / np.sqrt(squares + np.float32(norm.eps))) * self.gain, x)


class HostHead:
    """x (P, K) -> x . t (P, N) in fp32."""

    def __init__(self, matrix_NK: NDArray[Any]) -> None:
        self.matrix_NK = np.ascontiguousarray(matrix_NK, np.float32)

    def __call__(self, x_PK: Any) -> Floats:
        x_PK = floats(x_PK)
        if len(x_PK) == 1:
            # Row by row, on this thread: those that a BLAS would wake for a matrix go on spinning
            # for a while, and the next token's layers need the processors.
            return np.matmul(self.matrix_NK[:, None], x_PK[0, :, None])[:, :, 0].T
        return x_PK @ self.matrix_NK.T


def dense_table(table: nn.Module) -> Floats:
    """An embedding or head as an fp32 matrix (V, H), a view of it where it is one already."""
    if "scales" not in table:
        return floats(table.weight)
    packed = (table.weight, table.scales, table.biases)
    return floats(mx.dequantize(*packed, group_size=table.group_size, bits=table.bits))


def move_product(linear: TernaryLinear, workers: Workers) -> None:
    """Unpack a linear's words, and drop them for the form that runs here."""
    linear.together = HostProduct(linear, workers)
    for name in ("weight", "scales", "biases"):
        del linear[name]
