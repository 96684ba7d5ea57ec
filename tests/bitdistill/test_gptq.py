"""GPTQ against its definition, and master weights that keep what it chose."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from bitdistill import gptq as module
from bitdistill.gptq import (
    FACTORS,
    MARGIN,
    Rounded,
    gptq,
    inverse_factor,
    latent_weights,
    output_error,
    round_columns,
)
from bitdistill.quantize import WEIGHT_EPS, BitLinear, ternarize


def problem(rows: int, columns: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix and H = X X^T of inputs whose channels are correlated and of unlike size."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator)
    mix = mix * torch.rand(columns, generator=generator) ** 2 + 0.3
    x = torch.randn(4 * columns, columns, generator=generator) @ mix
    return torch.randn(rows, columns, generator=generator) * 0.02, x.T @ x


def plain(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return scale * (weight / (scale + WEIGHT_EPS)).round().clamp(-1, 1)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_error_is_far_below_rounding_to_nearest(seed: int) -> None:
    weight, hessian = problem(24, 64, seed)
    rounded = gptq(weight, hessian)
    quantised = rounded.scale * rounded.trits
    assert rounded.error == pytest.approx(output_error(weight - quantised, hessian), rel=1e-4)
    trits, absmean = ternarize(weight)
    nearest = [output_error(weight - absmean * trits, hessian)]
    for factor in FACTORS:  # whatever scale rounding to nearest is given
        scale = (absmean * factor).bfloat16().float()
        nearest.append(output_error(weight - plain(weight, scale), hessian))
    assert rounded.error < 0.7 * min(nearest)


def by_definition(weight: np.ndarray, hessian: np.ndarray, scale: float) -> np.ndarray:
    """Column by column, with the inverse of what is left of H computed anew each time (OBQ)."""
    work, trits = weight.copy(), np.zeros_like(weight)
    for j in range(weight.shape[1]):
        inverse = np.linalg.inv(hessian[j:, j:])
        trits[:, j] = np.clip(np.round(work[:, j] / (scale + WEIGHT_EPS)), -1, 1)
        error = (work[:, j] - scale * trits[:, j]) / inverse[0, 0]
        work[:, j:] -= np.outer(error, inverse[0])
    return trits


@pytest.mark.parametrize("block", [1, 5, 128])
def test_columns_are_rounded_as_defined(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(module, "BLOCK", block)
    weight, hessian = (x.double() for x in problem(6, 17))
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(17)
    scales = [0.02, 0.03]
    found, _ = round_columns(weight, inverse_factor(hessian), torch.tensor(scales))
    for trits, scale in zip(found, scales, strict=True):
        expected = by_definition(weight.numpy(), damped.numpy(), scale)
        np.testing.assert_array_equal(trits.numpy(), expected)
        assert 0 < (expected == 0).mean() < 1


@pytest.mark.parametrize("rows", [1, 24])
def test_master_weights_keep_trits_and_scale(rows: int) -> None:
    weight, hessian = problem(rows, 48)
    rounded = gptq(weight, hessian)
    latent = latent_weights(rounded)
    trits, scale = ternarize(latent)
    assert torch.equal(trits, rounded.trits)
    assert torch.equal(scale, rounded.scale)
    distance = (latent / (scale + WEIGHT_EPS)).abs().sub(0.5).abs()
    assert float(distance.min()) > 0.99 * MARGIN


@pytest.mark.parametrize(
    "values",
    [
        lambda: torch.tensor([[0.5, -0.5, 0.1, 0.0]]),  # on the threshold, both sides
        lambda: torch.tensor([[7.0, -9.0, 0.49, 0.0]]),
        lambda: torch.full((2, 3), 0.55),  # nothing beyond the margin to stretch
    ],
)
def test_master_weights_of_extreme_values(values: Callable[[], torch.Tensor]) -> None:
    trits = torch.tensor([[1, -1, 0, 0]]) if values().shape[1] == 4 else torch.ones(2, 3)
    rounded = Rounded(trits.to(torch.int8), torch.tensor(1.0), values(), 0.0)
    found, scale = ternarize(latent_weights(rounded))
    assert torch.equal(found, rounded.trits)
    assert float(scale) == 1.0


def test_a_layer_computes_what_gptq_chose() -> None:
    weight, hessian = problem(8, 32)
    rounded = gptq(weight, hessian)
    linear = BitLinear(32, 8, activation_bits=None)
    with torch.no_grad():
        linear.weight.copy_(latent_weights(rounded))
    x = torch.randn(5, 32)
    expected = x @ (rounded.scale * rounded.trits).T
    torch.testing.assert_close(linear(x), expected, rtol=1e-5, atol=1e-6)


def test_nothing_to_choose() -> None:
    for weight, hessian in (
        (torch.zeros(3, 4), torch.eye(4)),
        (torch.randn(3, 4), torch.zeros(4, 4)),
    ):
        rounded = gptq(weight, hessian)
        assert torch.equal(rounded.trits, ternarize(weight)[0])
        assert torch.equal(ternarize(latent_weights(rounded))[0], rounded.trits)
