"""The numerical specification of 1.58-bit linear layers, in PyTorch.

Weights, one scale a matrix:     D = bf16(mean |W|),  t = clip(round(W / (D + e)), -1, 1)
Activations, one scale a token:  g = max |x|,  q = clip(round(x * 127 / (g + e)), -128, 127)
Product:                         y = (q . t) * (g / 127 * D) + bias

(BitNet Distillation, arXiv 2510.13998, eq. 1-2.) D is computed in fp32 and rounded to the nearest
bf16, so that every 16-bit format stores it exactly; t is taken with the rounded D. Rounding is
half-to-even. `q . t` is a sum of integers of magnitude at most 127 K, exact in fp32 for K up to
2^17: the layer computes that product itself, not the product of dequantised values, so PyTorch, the
C++ kernels and MLX agree on it bit for bit, and only the fp32 scaling is rounded.

Gradients pass straight through both roundings. `anneal` blends from full precision (0) to ternary
(1): w + a (Q(w) - w), and the same for activations.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WEIGHT_EPS = 1e-6
ACTIVATION_EPS = 1e-5
MAX_COLUMNS = 1 << 17  # 127 * K must stay below 2^24
INTEGER_ROWS = 32  # CUDA's int8 product refuses 16 and fewer


def wide(x: Tensor) -> Tensor:
    """fp32, or fp64 where the model runs in fp64 (the noise-floor reference)."""
    return x if x.dtype == torch.float64 else x.float()


def round_to_bf16(x: Tensor) -> Tensor:
    """fp32 values -> the nearest bf16 (half to even) as fp32; infinity and NaN stay.

    By its bits, since a compiled `x.bfloat16().float()` is x: inductor keeps intermediate values
    in fp32.
    """
    bits = x.view(torch.int32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) & -0x10000
    return torch.where(torch.isfinite(x), rounded.view(torch.float32), x)


def ternary_scale(weight: Tensor) -> Tensor:
    """D of a matrix: mean |W| in fp32, rounded to bf16; a 0-d fp32 tensor."""
    return round_to_bf16(weight.detach().float().abs().mean())


def ternarize(weight: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Master weights (N, K) -> trits int8 (N, K) and their scale, a 0-d fp32 tensor.

    `scale` is given for some rows of a matrix, whose D they cannot know. Raises ValueError for
    weights that are not finite.
    """
    if scale is None:
        scale = ternary_scale(weight)
    if not torch.isfinite(scale):
        raise ValueError("a weight matrix holds NaN or infinity; the training diverged")
    trits = torch.round(weight.detach().float() / (scale + WEIGHT_EPS)).clamp(-1, 1)
    return trits.to(torch.int8), scale


def absmax_scale(x: Tensor) -> tuple[Tensor, Tensor]:
    """Per-token factors (..., 1) in fp32: `x * up` rounds to int8, `q * down` restores x."""
    g = wide(x.detach()).abs().amax(-1, keepdim=True)
    return 127.0 / (g + ACTIVATION_EPS), g / 127.0


def straight_through(value: Tensor, target: Tensor, amount: float | Tensor = 1.0) -> Tensor:
    """`value + amount * (target - value)` whose gradient is that of `value`."""
    return value + amount * (target - value).detach()


def quantize_activations(x: Tensor, amount: float | Tensor = 1.0) -> tuple[Tensor, Tensor]:
    """Activations (..., K) -> integers in int8 range as fp32 (..., K), and their scale (..., 1).

    The gradient passes straight through the rounding, of which `amount` (0 to 1) is applied.
    """
    up, down = absmax_scale(x)
    x = wide(x) * up
    return straight_through(x, x.round().clamp(-128, 127), amount), down


class _FromCache(torch.autograd.Function):
    """Trits computed before, in units of D; the gradient goes to the master weights as if anew."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, unit: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        return unit.view_as(unit)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (scale,) = ctx.saved_tensors
        return gradient.float() / (scale + WEIGHT_EPS), None, None


class _IntegerProduct(torch.autograd.Function):
    """q . t on int8 tensor cores, exact in int32; backward in the arithmetic of the run.

    x (M, K) and unit (N, K) hold integers in int8 range as floats; the result is fp32 (M, N). A
    compiler may leave them a rounding away (`straight_through` becomes one multiply-add of an
    unrounded product), so that a conversion alone, which truncates, would lose a whole unit.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, unit: Tensor) -> Tensor:
        q, t = x.round().to(torch.int8), unit.round().to(torch.int8)
        device = x.device.type
        mixed = torch.is_autocast_enabled(device)
        ctx.dtype = torch.get_autocast_dtype(device) if mixed else x.dtype
        ctx.save_for_backward(q, t)
        few = q.shape[0]
        if few < INTEGER_ROWS:  # rows of zeros, which are dropped again
            return torch._int_mm(F.pad(q, (0, 0, 0, INTEGER_ROWS - few)), t.T)[:few].float()
        return torch._int_mm(q, t.T).float()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        q, t = ctx.saved_tensors
        d_y = gradient.to(ctx.dtype)
        return (d_y @ t.to(ctx.dtype)).float(), (d_y.T @ q.to(ctx.dtype)).float()


class RMSNorm(nn.Module):
    """The norm that SubLN and allnorm add: x / rms(x) * weight, computed in fp32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x = wide(x)
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


class BitLinear(nn.Linear):
    """A linear layer that is trained and run at 1.58 bits a weight.

    `norm` is the RMSNorm on the layer's own input, where the student's norm style puts one.
    `activation_bits` is 8, or None to leave activations alone. `anneal` is a buffer, so that a
    compiled layer reads it anew at each step; it is not saved: a saved student is fully ternary.
    """

    anneal: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        activation_bits: int | None = 8,
        norm: RMSNorm | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias=bias)
        if activation_bits not in (8, None):
            raise ValueError(f"activation_bits must be 8 or None, got {activation_bits}")
        if in_features > MAX_COLUMNS:
            raise ValueError(f"K = {in_features} is too wide for exact fp32 sums of int8 products")
        self.activation_bits = activation_bits
        self.norm = norm
        self.register_buffer("anneal", torch.ones(()), persistent=False)
        self.frozen_scale: Tensor | None = None
        self.cached: tuple[Tensor, Tensor] | None = None  # trits and D of this optimizer step
        self.integer = False

    def freeze(self) -> None:
        """Replace the master weights by their trits, for inference: nothing is rounded again."""
        trits, self.frozen_scale = ternarize(self.weight)
        self.weight.requires_grad_(False).copy_(trits)

    def _unit_weight(self) -> tuple[Tensor, Tensor]:
        """Trits (with the master weights' gradient) in units of D, and D."""
        if self.frozen_scale is not None:
            return self.weight, self.frozen_scale
        if self.cached is not None:
            return _FromCache.apply(self.weight, *self.cached), self.cached[1]
        scale = ternary_scale(self.weight)
        # always from fp32, as `ternarize`: an fp64 quotient could round to another trit
        unit = self.weight.float() / (scale + WEIGHT_EPS)
        return straight_through(unit, unit.round().clamp(-1, 1), self.anneal), scale

    def _product(self, x: Tensor, unit: Tensor) -> Tensor:
        if not self.integer:
            return F.linear(x, unit)
        return _IntegerProduct.apply(x.flatten(0, -2), unit).unflatten(0, x.shape[:-1])

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N), in the input's dtype."""
        dtype = x.dtype
        if self.norm is not None:
            x = self.norm(x)
        x = wide(x)
        unit, scale = self._unit_weight()
        weight = unit.to(x.dtype)
        if self.activation_bits is None:
            y = F.linear(x, weight) * scale
        else:
            x, down = quantize_activations(x, self.anneal)
            y = self._product(x, weight) * (down * scale)
        if self.bias is not None:
            y = y + self.bias
        return y.to(dtype)


def bit_linears(model: nn.Module) -> list[BitLinear]:
    """Every BitLinear of a model."""
    return [module for module in model.modules() if isinstance(module, BitLinear)]


@torch.no_grad()
def cache_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Round every weight once, for all the forward passes until `forget_weights`."""
    for layer in bit_linears(model):
        layer.cached = None
        unit, scale = layer._unit_weight()
        layer.cached = unit.to(dtype), scale


def forget_weights(model: nn.Module) -> None:
    """The weights are about to change: round them anew."""
    for layer in bit_linears(model):
        layer.cached = None


def set_integer(model: nn.Module, on: bool) -> None:
    """Take products on int8 tensor cores, where the sizes of a layer allow it."""
    for layer in bit_linears(model):
        fits = layer.in_features % 8 == 0 and layer.out_features % 8 == 0
        layer.integer = on and fits and layer.activation_bits is not None


def share_anneal(model: nn.Module) -> Tensor:
    """Let every BitLinear read one tensor, the share of quantisation; returns it.

    One tensor to fill at each step, and a compiler sees that projections which share an input round
    it alike: it rounds once. Call it after the model is on its device.
    """
    layers = bit_linears(model)
    shared = layers[0].anneal if layers else torch.ones(())
    for layer in layers:
        layer.anneal = shared
    return shared
