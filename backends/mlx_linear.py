"""Ternary linears and norms in MLX, to the letter of quantize.py.

MLX's 2-bit product computes sum(x * (s * code + b)). With s = D and b = -D every term is rounded;
with s = 1 and b = -1 the terms are integers, and q . t comes out exact in fp32 (127 K < 2^24) on
any kernel and in any order of summation. So for int8 activations a layer keeps the stored codes,
takes D out of the stored scales, and gives the stock kernel one shared pair of ones and minus ones.
On Metal that is the stock 2-bit kernel; elsewhere that kernel is scalar code, so there the trits
are held as an fp32 matrix (`dequantize`), transposed, which is the order the BLAS in MLX's Linux
wheel is fastest at, and equally exact. Without activation quantisation the stock kernel gets the
stored scales, as in any mlx-lm model.

Parameters are named and shaped as in the file, so `load_weights` is strict about both; `prepare`
then checks their values and turns them into the form that runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np
from mlx import nn

from bitdistill.backends.mlx_layout import BITS, group_size

ACTIVATION_EPS = 1e-5  # as in quantize.py, which needs torch
_ODD_BITS = 0x55555555


@dataclass
class Precision:
    """How a model computes: the type of activations, and whether trits are held as fp32."""

    dtype: mx.Dtype
    dequantize: bool
    units: dict[tuple[int, ...], tuple[mx.array, mx.array]] = field(default_factory=dict)

    def unit_pair(self, shape: tuple[int, ...]) -> tuple[mx.array, mx.array]:
        """Scales of 1 and biases of -1, fp32, one pair for all layers of a shape."""
        if shape not in self.units:
            self.units[shape] = (mx.ones(shape), -mx.ones(shape))
        return self.units[shape]


class Norm(nn.Module):
    """x / rms(x) * (offset + weight), computed in fp32, in the input's type."""

    def __init__(self, size: int, eps: float, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = mx.zeros((size,))
        self._eps, self._offset = eps, offset

    def prepare(self, dtype: mx.Dtype) -> None:
        """Fold the offset in fp32, then take the type the model computes in."""
        self.weight = (self.weight.astype(mx.float32) + self._offset).astype(dtype)
        mx.eval(self.weight)

    def __call__(self, x: mx.array) -> mx.array:
        return mx.fast.rms_norm(x, self.weight, self._eps)


@dataclass
class Quantized:
    """The input of a linear: values (..., K), and the fp32 factor (..., 1) that restores them."""

    values: mx.array
    down: mx.array | None


def quantize_activations(x: mx.array) -> Quantized:
    """Per-token absmax int8: integers as fp32 (..., K), half to even, and their scale (..., 1)."""
    x = x.astype(mx.float32)
    largest = mx.abs(x).max(axis=-1, keepdims=True)
    up = 127.0 / (largest + ACTIVATION_EPS)
    return Quantized(mx.clip(mx.round(x * up), -128, 127), largest / 127.0)


def unpack_transposed(words: mx.array) -> mx.array:
    """Packed uint32 (N, K/16) -> trits as fp32 (K, N), contiguous.

    Words are transposed before they are unpacked: 16 times fewer elements to move.
    """
    shifts = mx.arange(0, 32, BITS).astype(mx.uint32)[None, :, None]
    codes = (mx.contiguous(words.T)[:, None] >> shifts) & (2**BITS - 1)
    return codes.astype(mx.float32).reshape(-1, words.shape[0]) - 1


class TernaryLinear(nn.Module):
    """(..., K) -> (..., N): own norm, activation quantisation, ternary product, scale, bias."""

    def __init__(
        self,
        shape: tuple[int, int],
        bias: bool,
        norm_eps: float | None,
        activation_bits: int | None,
    ) -> None:
        super().__init__()
        rows, columns = shape
        self._group = group_size(columns)
        self._bits = activation_bits
        self.weight = mx.zeros((rows, columns // 16), mx.uint32)
        self.scales = mx.zeros((rows, columns // self._group))
        self.biases = mx.zeros((rows, columns // self._group))
        if bias:
            self.bias = mx.zeros((rows,))
        if norm_eps is not None:
            self.norm = Norm(columns, norm_eps)

    @property
    def has_norm(self) -> bool:
        """Whether the layer norms its own input, so that nothing can be shared with others."""
        return "norm" in self

    def prepare(self, precision: Precision) -> None:
        """Check the loaded tensors and hold them in the form that runs.

        Raises ValueError for codes, scales or types that are not those of one ternary matrix.
        """
        self._scale: float | None = self._check()
        self._dtype = precision.dtype
        if self.has_norm:
            self.norm.prepare(mx.float32)
        if precision.dequantize:
            self._matrix_KN = unpack_transposed(self.weight)
            mx.eval(self._matrix_KN)
            for name in ("weight", "scales", "biases"):
                del self[name]
        elif self._bits is not None:
            self.scales, self.biases = precision.unit_pair(self.scales.shape)
        else:
            self._scale = None
            self.scales = self.scales.astype(precision.dtype)
            self.biases = self.biases.astype(precision.dtype)

    def _check(self) -> float:
        words, scales, biases = self.weight, self.scales, self.biases
        if words.dtype != mx.uint32:
            raise ValueError(f"packed weights are {words.dtype}, expected uint32")
        scale = scales[0, 0].astype(mx.float32)
        bad_codes = mx.any(words & (words >> 1) & _ODD_BITS)
        constant = mx.all(scales == scales[0, 0]) & mx.all(biases == -scales)
        if bad_codes.item() or not (constant & mx.isfinite(scale) & (scale >= 0)).item():
            raise ValueError("the packed weights are not one ternary matrix with one scale")
        return float(np.array(scale))

    def quantize(self, x: mx.array) -> Quantized:
        """Norm (if the layer has one) and quantise an input (..., K)."""
        if self.has_norm:
            x = self.norm(x.astype(mx.float32))
        if self._bits is None:
            return Quantized(x, None)
        return quantize_activations(x)

    def product(self, x: Quantized) -> mx.array:
        """(..., K) -> (..., N), scaled in fp32 after the sum, in the model's type."""
        y = self._sum(x.values)
        if self._scale is not None:
            y = y * (self._scale if x.down is None else x.down * self._scale)
        if "bias" in self:
            y = y + self.bias
        return y.astype(self._dtype)

    def _sum(self, x: mx.array) -> mx.array:
        if "_matrix_KN" in self:
            return x.astype(mx.float32) @ self._matrix_KN
        x = x.astype(self.scales.dtype)
        packed = (self.weight, self.scales, self.biases)
        return mx.quantized_matmul(x, *packed, transpose=True, group_size=self._group, bits=BITS)

    def __call__(self, x: mx.array) -> mx.array:
        return self.product(self.quantize(x))


def apply_shared(linears: Sequence[TernaryLinear], x: mx.array) -> list[mx.array]:
    """Several linears on one input, which is quantised once unless each norms it for itself."""
    if linears[0].has_norm:
        return [linear(x) for linear in linears]
    shared = linears[0].quantize(x)
    return [linear.product(shared) for linear in linears]
