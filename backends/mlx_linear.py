"""Ternary linears and norms in MLX, to the letter of quantize.py; needs nothing but mlx.

MLX's 2-bit product computes sum(x * (s * code + b)). With s = D and b = -D every term is rounded;
with s = 1 and b = -1 the terms are integers, and q . t comes out exact in fp32 (256 K <= 2^24) on
any kernel and in any order of summation. So for int8 activations a layer keeps the stored codes,
takes D out of the stored scales, and gives MLX's kernel one shared pair of ones and minus ones. In
half precision on Metal, whose kernels sum in fp32, q / 128 goes in as fp16, which holds it exactly,
and only the sum is rounded to fp16. Without activation quantisation the kernel gets the stored
scales, as in any mlx-lm model.

Parameters are named and shaped as in the file and stay as they are, so that mlx-lm saves, converts
and fine-tunes a loaded model like any other; `prepare` derives what runs from what was loaded.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cache, partial
from importlib.metadata import version
from typing import Any

import mlx.core as mx
from mlx import nn

BITS = 2
ACTIVATION_EPS = 1e-5
HALF_COLUMNS = 1 << 15  # |q / 128| <= 1: wider sums could leave fp16's range
ODD_BITS = 0x55555555
HALF_NEEDS = (0, 32, 4)  # earlier kernels sum the affine term in half precision
# Off Metal, MLX compiles by calling a C++ compiler, which a user need not have.
fuse = partial(mx.compile, shapeless=True) if mx.metal.is_available() else lambda function: function


@fuse
def _quantize(x: mx.array) -> tuple[mx.array, mx.array]:
    x = x.astype(mx.float32)
    largest = mx.abs(x).max(axis=-1, keepdims=True)
    q = mx.clip(mx.round(x * (127.0 / (largest + ACTIVATION_EPS))), -128, 127)
    return q, largest / 127.0


@mx.custom_function
def quantize_activations(x: mx.array) -> tuple[mx.array, mx.array]:
    """Per-token absmax int8, half to even: integers as fp32 (..., K), and their scale (..., 1).

    Gradients pass straight through the rounding; the largest value is a constant to them. They are
    said here and not inside, because MLX cannot compile custom gradients for every shape at once.
    """
    return _quantize(x)


@quantize_activations.vjp
def _straight_through(x: mx.array, cotangents: Any, outputs: Any) -> mx.array:
    largest = outputs[1] * 127.0
    gradient: mx.array = cotangents[0] * (127.0 / (largest + ACTIVATION_EPS))
    return gradient.astype(x.dtype)


@cache
def unit_pair(shape: tuple[int, ...], half: bool) -> tuple[mx.array, mx.array]:
    """Scales of 1 and biases of -1, one pair for all layers of a shape."""
    ones = mx.ones(shape, mx.float16 if half else mx.float32)
    return ones, -ones


def check_version(dtype: mx.Dtype) -> None:
    """ValueError for half-precision activations before mlx 0.32.4."""
    installed = version("mlx")
    numbers = tuple(int(part) for part in re.findall(r"\d+", installed)[:3])
    if dtype != mx.float32 and numbers < HALF_NEEDS:
        raise ValueError(
            f"mlx {installed} sums 2-bit layers in half precision, which ruins the logits; "
            "pip install -U 'mlx>=0.32.4', or use float32"
        )


def check_ternary(linears: dict[str, TernaryLinear]) -> None:
    """ValueError naming the first of some layers whose weights are not one ternary matrix's.

    MLX computes all answers at once, from the words as they were loaded.
    """
    answers = {path: linear.is_ternary() for path, linear in linears.items()}
    mx.eval(answers)
    for path, answer in answers.items():
        if not answer.item():
            raise ValueError(
                f"{path}: the packed weights are not one ternary matrix with one scale, so they "
                "were altered or quantised again (mlx_lm.fuse does that); export the student again"
            )


class Norm(nn.Module):
    """x / rms(x) * (offset + weight), computed in fp32; `wide` ones stay fp32 in any model."""

    def __init__(self, size: int, eps: float, offset: float = 0.0, wide: bool = False) -> None:
        super().__init__()
        self.weight = mx.zeros((size,))
        self.eps, self._offset, self._wide = eps, offset, wide
        self.normalize: Callable[..., mx.array] = normalize  # on a CPU another: mlx_host.py

    def prepare(self, dtype: mx.Dtype) -> None:
        """Fold the offset in fp32, then take the type the model computes in."""
        gain = self.weight.astype(mx.float32) + self._offset
        self._gain = gain if self._wide else gain.astype(dtype)

    @property
    def gain(self) -> mx.array:
        """offset + weight; no parameter of the module."""
        return self._gain

    def __call__(self, x: mx.array) -> mx.array:
        return self.normalize(self, x)


def normalize(norm: Norm, x: mx.array) -> mx.array:
    """What a norm does, by MLX."""
    return mx.fast.rms_norm(x, norm.gain, norm.eps)


class TernaryLinear(nn.QuantizedLinear):
    """(..., K) -> (..., N): own norm, activation quantisation, ternary product, scale, bias.

    `linear` has rows N, columns K, group, and whether there are a bias and a norm of the layer's
    own. Its parameters are named and shaped as in the file.
    """

    def __init__(self, linear: dict[str, Any], norm_eps: float, quantized: bool) -> None:
        nn.Module.__init__(self)
        rows, columns, group = linear["rows"], linear["columns"], linear["group"]
        self.group_size, self.bits, self.mode = group, BITS, "affine"
        self.weight = mx.zeros((rows, columns // 16), mx.uint32)
        self.scales = mx.zeros((rows, columns // group))
        self.biases = mx.zeros((rows, columns // group))
        if linear["bias"]:
            self.bias = mx.zeros((rows,))
        if linear["norm"]:
            self.norm = Norm(columns, norm_eps, wide=True)
        self.quantized = quantized
        self.together: Any = quantize_once  # on a CPU another: mlx_host.py
        self.freeze()

    def to_quantized(self, **stored: Any) -> TernaryLinear:
        """Nothing to do: `mlx.nn.quantize` asks this of the layers that config.json names."""
        return self

    def is_ternary(self) -> mx.array:
        """Whether codes are 0, 1 and 2, all scales one D and all biases -D; not yet computed."""
        if self.weight.dtype != mx.uint32:
            return mx.array(False)
        scale = self.scales[0, 0]
        good_codes = mx.all((self.weight & (self.weight >> 1) & ODD_BITS) == 0)
        constant = mx.all(self.scales == scale) & mx.all(self.biases == -scale)
        return good_codes & constant & mx.isfinite(scale) & (scale >= 0)

    def prepare(self, dtype: mx.Dtype) -> None:
        """Take D out of the loaded scales, or cast those to `dtype` where they take part."""
        self.scale: float | None = None
        if self.quantized:
            scale: Any = self.scales[0, 0].astype(mx.float32).item()
            self.scale = scale
        else:
            self.scales, self.biases = self.scales.astype(dtype), self.biases.astype(dtype)
        narrow = self.weight.shape[1] * 16 <= HALF_COLUMNS
        self.half = narrow and dtype != mx.float32 and mx.metal.is_available()

    def quantize(self, x: mx.array) -> tuple[mx.array, mx.array | None]:
        """Norm (if the layer has one) and quantise an input: values (..., K) and their scale."""
        y = self.norm(x.astype(mx.float32)) if "norm" in self else x
        if not self.quantized:
            return y.astype(x.dtype), None
        quantized: Any = quantize_activations(y)
        return quantized

    def multiply(self, x: mx.array) -> mx.array:
        """(..., K) -> (..., N): integers times trits, or x times D t."""
        if not self.quantized:
            return self._matmul(x, self.scales, self.biases)
        if self.half:
            y = self._matmul((x * 2**-7).astype(mx.float16), *unit_pair(self.scales.shape, True))
            return y.astype(mx.float32) * 2**7
        return self._matmul(x, *unit_pair(self.scales.shape, False))

    def _matmul(self, x: mx.array, scales: mx.array, biases: mx.array) -> mx.array:
        return mx.quantized_matmul(
            x, self.weight, scales, biases, transpose=True, group_size=self.group_size, bits=BITS
        )

    def product(self, x: mx.array, down: mx.array | None, dtype: mx.Dtype) -> mx.array:
        """A quantised input (..., K) -> (..., N) of type `dtype`, scaled in fp32 after the sum."""
        y = self.multiply(x)
        if self.scale is not None and down is not None:
            y = y * (down * self.scale)
        if "bias" in self:
            y = y + self.bias
        return y.astype(dtype)

    def __call__(self, x: mx.array) -> mx.array:
        return self.together((self,), x)[0]


def quantize_once(linears: Sequence[TernaryLinear], x: mx.array) -> list[mx.array]:
    """Linears on one input, which the first of them norms and quantises."""
    shared = linears[0].quantize(x)
    return [linear.product(*shared, x.dtype) for linear in linears]


def apply_shared(linears: Sequence[nn.Module], x: mx.array) -> list[mx.array]:
    """Linears on one input, quantised once unless one norms it for itself or is no longer ours."""
    if any(type(linear) is not TernaryLinear or "norm" in linear for linear in linears):
        return [linear(x) for linear in linears]
    return linears[0].together(linears, x)
