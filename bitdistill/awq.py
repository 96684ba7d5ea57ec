"""AWQ on the ternary grid: channels are scaled by the activation that they carry.

AWQ (arXiv 2306.00978) multiplies column k of a matrix by s_k and divides its input by it. In full
precision that changes nothing, but rounding then errs less where the input is large:

    s = mean|x|^alpha, divided by the root of its largest times its smallest value,

with the alpha of least error of the layer's output, activations rounded as well. On a fine grid
loud channels want larger weights, alpha in (0, 1). On the ternary grid larger weights are only cut
off at D, and D = mean |W| is below the best scale (gptq.py), so loud channels want smaller ones:
alpha is searched in [-1, 1], and is negative nearly always. Alpha 0 is plain absmean, so no layer
becomes worse on the calibration tokens. The division is folded into the gain of the norm before the
matrix, be it the block's or an added one: the student keeps its shape and one scale a matrix.
Where no norm precedes (`o_proj` and `down_proj` without added norms) a matrix is left alone: AWQ
would fold into the rows of `v_proj` and `up_proj`, whose own single scale could not hold that.
Left out: AWQ's clipping of weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitdistill.quantize import BitLinear, quantize_activations, ternarize

EXPONENTS = tuple(i / 10 for i in range(-10, 11) if i)


def product_error(
    x_MK: Tensor, linear: BitLinear, exact_MN: Tensor, scales_K: Tensor | None = None
) -> float:
    """|x W^T - Q(x / s) Q(W s)^T|^2, given x W^T."""
    weight, x = linear.weight.detach(), x_MK
    if scales_K is not None:
        weight, x = weight * scales_K, x / scales_K
    trits, scale = ternarize(weight)
    down: Tensor | float = 1.0
    if linear.activation_bits is not None:
        x, down = quantize_activations(x)
    return float((F.linear(x, trits.to(x.dtype)) * (down * scale) - exact_MN).square().sum())


@torch.no_grad()
def search(x_MK: Tensor, linears: Sequence[BitLinear]) -> tuple[Tensor, float, float]:
    """The scales s (K,) of least error for inputs (M, K), and the relative errors with and without:
    |x W^T - Q(x / s) Q(W s)^T|^2 / |x W^T|^2 over all the linears that read x."""
    exact = [F.linear(x_MK, linear.weight) for linear in linears]
    total = max(sum(float(y.square().sum()) for y in exact), 1e-30)

    def error(scales: Tensor | None = None) -> float:
        pairs = zip(linears, exact, strict=True)
        return sum(product_error(x_MK, linear, y, scales) for linear, y in pairs) / total

    size = x_MK.abs().mean(0).clamp_min(1e-8)
    best = torch.ones_like(size)
    plain = least = error()
    for exponent in EXPONENTS:
        scales = size**exponent
        scales = scales / (scales.max() * scales.min()).sqrt()
        found = error(scales)
        if found < least:
            best, least = scales, found
    return best, least, plain


@torch.no_grad()
def fold(scales_K: Tensor, linears: Sequence[BitLinear], norm: nn.Module, offset: float) -> None:
    """Multiply columns by s and divide the gain of the norm before them, which is offset + weight.

    In full precision the model computes what it did.
    """
    for linear in linears:
        linear.weight *= scales_K
    norm.weight.copy_((norm.weight + offset) / scales_K - offset)  # type: ignore[operator]
