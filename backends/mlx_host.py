"""Products on the CPU for an MLX artifact, where there is no Metal.

MLX's Linux wheel has scalar 2-bit code and a reference BLAS, both many times slower than this
machine can be. So on such a machine the products and their scaling leave MLX; norms, activation
rounding and rotations stay. What is multiplied is unpacked, at load, from the words that the file
holds and MLX would read: for int8 activations into the layout of our own kernels, whose integer
sums are as exact as MLX's and therefore equal; otherwise into an fp32 matrix for NumPy's BLAS,
which also multiplies tables and attention scores. Tests hold both against MLX's own product.
"""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn
from numpy.typing import NDArray

from bitdistill import packing
from bitdistill.backends import mlx_architecture
from bitdistill.backends.kernels.binding import Kernels
from bitdistill.backends.mlx_architecture import Attention, FeedForward, Model
from bitdistill.backends.mlx_linear import TernaryLinear

Floats = NDArray[np.float32]


# glibc's numbers (malloc.h) and this process's values, in bytes.
M_TRIM_THRESHOLD, KEPT = -1, 1 << 30
M_MMAP_THRESHOLD, MAPPED = -3, 32 << 20


def keep_freed_memory() -> None:
    """Have glibc keep freed blocks: MLX on a CPU takes every array from it and frees it at once.

    By default blocks of some hundred KB go back to the system and come back as pages to be
    filled with zeros, 150 faults a token of a 135M model. Other C libraries are left alone.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, MAPPED)
        mallopt(M_TRIM_THRESHOLD, KEPT)


def view(x: mx.array) -> Floats:
    """An evaluated fp32 array, not copied."""
    return np.array(x.astype(mx.float32), copy=False)


class Workers:
    """The kernels of this CPU, and `threads` threads to run them on."""

    def __init__(self, threads: int) -> None:
        self.kernels, self.pool, self.threads = Kernels(), ThreadPoolExecutor(threads), threads


class IntegerProduct:
    """q (..., K) -> q . t (..., N), exact, by the kernels; tokens are shared among threads.

    `factor`, the tokens' scales (..., 1), is multiplied in fp32 afterwards, as MLX would.
    """

    def __init__(self, trits_NK: packing.Trits, workers: Workers) -> None:
        self.rows = len(trits_NK)
        self.packed = packing.pack_kernel(trits_NK)
        self.workers = workers

    def __call__(self, x: mx.array, factor: mx.array | None = None) -> mx.array:
        given = [x] if factor is None else [x, factor]
        mx.eval(given)
        q, *scales = (view(array).reshape(-1, array.shape[-1]) for array in given)
        y = np.empty((len(q), self.rows), np.float32)
        step = -(-len(q) // self.workers.threads)

        def multiply(start: int) -> None:
            part = slice(start, start + step)
            integers = q[part].astype(np.int8)
            y[part] = self.workers.kernels.ternary_dots(integers, self.packed, self.rows)
            for scale in scales:
                y[part] *= scale[part]

        if step == len(q):
            multiply(0)  # waking a thread takes longer than one token
        else:
            list(self.workers.pool.map(multiply, range(0, len(q), step)))
        return mx.array(y.reshape(*x.shape[:-1], self.rows))


class FloatProduct:
    """x (..., K) -> x . t (..., N) in fp32, by NumPy's BLAS, and then times a number."""

    def __init__(self, matrix_NK: NDArray[Any]) -> None:
        self.matrix_NK = np.ascontiguousarray(matrix_NK, np.float32)

    def __call__(self, x: mx.array, factor: float | None = None) -> mx.array:
        y = view(x).reshape(-1, x.shape[-1]) @ self.matrix_NK.T
        if factor is not None:
            y *= np.float32(factor)
        return mx.array(y.reshape(*x.shape[:-1], -1))


def attend(
    q: mx.array, cache: Any, k: mx.array, v: mx.array, *, scale: float, mask: Any
) -> mx.array:
    """Scaled dot-product attention: q (B, heads, T, D), k and v (B, kv_heads, S, D)."""
    mx.eval(q, k, v)
    batch, _, length, size = q.shape
    keys, values = view(k)[:, :, None], view(v)[:, :, None]
    queries = view(q).reshape(batch, keys.shape[1], -1, length, size)
    scores = queries @ keys.swapaxes(-1, -2)
    scores *= np.float32(scale)
    if mask is not None:
        total = keys.shape[3]
        seen = np.tri(length, total, total - length, bool) if mask == "causal" else np.array(mask)
        scores[..., ~seen] = -np.inf
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=-1, keepdims=True)
    return mx.array((scores @ values).reshape(q.shape))


def silu_product(gate: mx.array, up: mx.array) -> mx.array:
    """silu(gate) * up."""
    with np.errstate(over="ignore"):  # exp(-gate) may be infinite: the quotient is then zero
        y = np.exp(-view(gate))
    y += 1
    np.divide(view(gate), y, out=y)
    y *= view(up)
    return mx.array(y)


def dense_table(table: nn.Module) -> Floats:
    """An embedding or head as an fp32 matrix (V, H), a view of it where it is one already."""
    if "scales" not in table:
        return view(table.weight)
    packed = (table.weight, table.scales, table.biases)
    return view(mx.dequantize(*packed, group_size=table.group_size, bits=table.bits))


def move_products(model: Model, threads: int) -> FloatProduct:
    """Replace the products of a loaded model by those above; returns that of its head.

    Packed weights are dropped from the model.
    """
    keep_freed_memory()
    workers = Workers(threads)
    for module in model.modules():
        if isinstance(module, TernaryLinear):
            move_product(module, workers)
        elif isinstance(module, Attention):
            module.attend = attend
        elif isinstance(module, FeedForward) and module.combine is mlx_architecture.silu_product:
            module.combine = silu_product
    return FloatProduct(dense_table(model.head))


def move_product(linear: TernaryLinear, workers: Workers) -> None:
    """Unpack a linear's words, and drop them for the form that runs here."""
    words = np.array(linear.weight)
    trits = packing.unpack_affine(words, words.shape[1] * 16)
    if linear.quantized:
        linear.host_product = IntegerProduct(trits, workers)
    else:
        linear.scale = float(view(linear.scales)[0, 0])
        linear.host_product = FloatProduct(trits)
    for name in ("weight", "scales", "biases"):
        del linear[name]
