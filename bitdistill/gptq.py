"""GPTQ on the ternary grid: columns are rounded one by one, the rest takes over their error.

For a linear y = W x and calibration inputs X, GPTQ (arXiv 2210.17323) minimises |W X - V X|^2 over
the grid, here V = D t with t in {-1, 0, 1} and one D for the whole matrix. Column j of W is
rounded, and its error, divided by the Cholesky factor's diagonal, is taken off the columns that are
still to come: with H = X X^T + damping and U the upper Cholesky factor of H^-1,

    e = (w_j - D t_j) / U_jj,    W_k -= e U_jk  for k > j.

Columns go by falling diag(H), those that matter most first. D is searched for: mean |W| times each
of FACTORS, the one with the least error after GPTQ. (At mean |W| itself a third of normally
distributed weights becomes zero; least error wants a scale about 1.5 times as large, where it is
nearly half.) Left out: groups of columns, because an artifact has one scale a matrix.

A student is trained further and rounded by absmean again at every step, so the trits alone are not
enough: `latent_weights` makes master weights whose own absmean rounding gives these trits and D.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bitdistill.quantize import WEIGHT_EPS, round_to_bf16, ternary_scale

DAMPING = 0.01  # of the mean of diag(H)
BLOCK = 128  # columns whose errors are passed on at once
FACTORS = tuple(0.9 + 0.1 * i for i in range(10))
MARGIN = 0.05  # of D, between a master weight and the next rounding threshold


class Rounded(NamedTuple):
    """`values` (N, K): the weights as they were when rounded to `trits` (N, K, int8) in units of
    `scale` (0-d); `error`: |W X - D t X|^2."""

    trits: Tensor
    scale: Tensor
    values: Tensor
    error: float


def output_error(difference_NK: Tensor, hessian_KK: Tensor) -> float:
    """|E X|^2 summed over outputs and tokens, from H = X X^T (K, K)."""
    return float(((difference_NK @ hessian_KK) * difference_NK).sum())


def inverse_factor(hessian_KK: Tensor, damping: float = DAMPING) -> Tensor:
    """U (K, K), upper triangular, with U^T U = (H + damping)^-1."""
    extra = damping * hessian_KK.diagonal().mean()
    damped = hessian_KK + extra * torch.eye(len(hessian_KK), device=hessian_KK.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True)


def round_columns(weight_NK: Tensor, factor_KK: Tensor, scales_S: Tensor) -> tuple[Tensor, Tensor]:
    """For S scales at once, trits (S, N, K) as floats, and the weights as they were when rounded.

    `factor_KK` is `inverse_factor` of the Hessian with columns in the order of the weight's.
    """
    work = weight_NK.expand(len(scales_S), -1, -1).clone()
    trits = torch.empty_like(work)
    scales_S1 = scales_S[:, None]
    columns = work.shape[2]
    for start in range(0, columns, BLOCK):
        end = min(start + BLOCK, columns)
        errors = torch.empty_like(work[:, :, start:end])
        for j in range(start, end):
            trits[:, :, j] = (work[:, :, j] / (scales_S1 + WEIGHT_EPS)).round().clamp(-1, 1)
            error_SN = (work[:, :, j] - scales_S1 * trits[:, :, j]) / factor_KK[j, j]
            work[:, :, j + 1 : end] -= error_SN.unsqueeze(-1) * factor_KK[j, j + 1 : end]
            errors[:, :, j - start] = error_SN
        work[:, :, end:] -= errors @ factor_KK[start:end, end:]
    return trits, work


def gptq(weight_NK: Tensor, hessian_KK: Tensor) -> Rounded:
    """Round a matrix (fp32) with the scale of least output error; H = X X^T in fp32.

    A matrix of zeros, or inputs that are all zero, leave nothing to choose: absmean rounding.
    """
    base = ternary_scale(weight_NK)
    if not base > 0 or not hessian_KK.diagonal().sum() > 0:
        trits = (weight_NK / (base + WEIGHT_EPS)).round().clamp(-1, 1)
        return Rounded(trits.to(torch.int8), base, weight_NK, 0.0)
    order = hessian_KK.diagonal().argsort(descending=True)
    back = order.argsort()
    factor = inverse_factor(hessian_KK[order][:, order])
    scales = round_to_bf16(base * torch.tensor(FACTORS, device=base.device))
    found = round_columns(weight_NK[:, order], factor, scales)
    trits, values = (x[:, :, back] for x in found)
    errors = [
        output_error(weight_NK - scale * trit, hessian_KK)
        for scale, trit in zip(scales, trits, strict=True)
    ]
    best = errors.index(min(errors))
    return Rounded(trits[best].to(torch.int8), scales[best], values[best], errors[best])


def latent_weights(rounded: Rounded) -> Tensor:
    """Master weights (N, K), fp32, whose absmean rounding is exactly `trits` and `scale`.

    Near `values`, but no nearer to a rounding threshold than MARGIN, so that the first steps of
    training do not undo the choice. Where a trit is not zero, what lies beyond that margin is
    stretched or shrunk by one factor, so that the mean of all magnitudes is the scale.
    """
    trits, scale = rounded.trits.double(), rounded.scale.double()
    if not (trits != 0).any():
        return rounded.values
    unit = scale + WEIGHT_EPS
    low, high = (0.5 - MARGIN) * unit, (0.5 + MARGIN) * unit
    values = rounded.values.double()
    zeros = values.clamp(-low, low)
    beyond = (values * trits - high).clamp_min(0)
    is_zero = trits == 0
    wanted = scale * trits.numel() - zeros[is_zero].abs().sum() - high * (~is_zero).sum()
    have = beyond[~is_zero].sum()
    beyond = beyond * (wanted / have) if have > 0 else beyond + wanted / (~is_zero).sum()
    return torch.where(is_zero, zeros, trits * (high + beyond)).float()
