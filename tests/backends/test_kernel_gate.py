"""The gate of an MLP, act(gate) * up, on every instruction set."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from kernel_oracle import F, gated, same
from numpy.typing import NDArray

from bitdistill.backends.kernels import binding_gate
from bitdistill.backends.kernels.binding import Kernels, available_isas

ISAS = available_isas()
ACTIVATIONS = ("silu", "gelu_tanh")
Function = Callable[[torch.Tensor], torch.Tensor]
TORCH: dict[str, Function] = {
    "silu": torch.nn.functional.silu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
}
ULPS = 4  # of 2^-24: 2.4 and 3.4 were the most


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_equals_the_oracle(isa: str, activation: str) -> None:
    rng = np.random.default_rng(1)
    for tokens in (0, 1, 3):
        for k in (1, 3, 4, 7, 8, 9, 31, 33, 3072):
            both = rng.standard_normal((tokens, 2 * k), F) * F(4)
            expected = gated(both[:, :k], both[:, k:], activation)
            assert same(binding_gate.gated(Kernels(isa), both, activation), expected)


def act(x: NDArray, activation: str, isa: str = "scalar") -> NDArray:
    """act(x) of a vector."""
    both = np.concatenate([x, np.ones_like(x)])[None]
    return binding_gate.gated(Kernels(isa), both, activation)[0]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_is_the_function(activation: str) -> None:
    """Some units in the last place from fp64, and more where exp(-z) is large: z is rounded."""
    x = np.linspace(-30, 30, 2_000_001).astype(F)
    wide = x.astype(np.float64)
    z = wide
    if activation == "gelu_tanh":
        z = 2 * np.sqrt(2 / np.pi) * (wide + 0.044715 * wide**3)
    expected = wide / (1 + np.exp(-np.clip(z, -700, None)))
    found = act(x, activation)
    # a relative error of exp(-z) is the absolute one of z
    slack = ULPS * 2.0**-24 * (1 + np.abs(np.minimum(z, 0)))
    assert (np.abs(found - expected) <= slack * np.abs(expected) + 1e-35).all()
    pytorch = TORCH[activation](torch.from_numpy(x)).numpy()
    assert np.abs(found - pytorch).max() < 1e-6


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_numbers_at_the_ends(isa: str, activation: str) -> None:
    x = np.array([-np.inf, np.nan, np.inf, -3e38, -1e30, -200, 200, 1e30, 3e38, 0.0, -0.0], F)
    found, pytorch = act(x, activation, isa), TORCH[activation](torch.from_numpy(x)).numpy()
    assert np.isnan(found[:2]).all()
    assert np.array_equal(found[2:], pytorch[2:])


@pytest.mark.parametrize("both", [np.ones((1, 3), F), np.ones((1, 4)), np.ones((2, 8), F)[:, ::2]])
def test_other_arrays_are_refused(both: NDArray) -> None:
    with pytest.raises(ValueError, match=r"need contiguous float32 \(M, 2 K\)"):
        binding_gate.gated(Kernels(), both, "silu")
