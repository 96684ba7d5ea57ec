"""The integer sums of the kernels at the bounds that their comments prove."""

from __future__ import annotations

import numpy as np
import pytest
from kernel_oracle import random_trits

from bitdistill.backends.kernels.binding import Kernels, available_isas
from bitdistill.packing import pack_kernel

ISAS = available_isas()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("k", [8 * 16 * 4, 65_536, 1 << 17])
@pytest.mark.parametrize("tokens", [1, 2, 6, 7])
def test_integer_sums_are_exact_at_their_bounds(isa: str, k: int, tokens: int) -> None:
    """All -128 or all 127 against all +1 and all -1: the largest sums that int16 has to hold."""
    trits = np.ones((34, k), np.int8)
    trits[::2] = -1
    trits[3] = 0
    for value in (-128, 127):
        q = np.full((tokens, k), value, np.int8)
        expected = q.astype(np.float64) @ trits.T.astype(np.float64)
        assert np.array_equal(Kernels(isa).ternary_dots(q, pack_kernel(trits), 34), expected)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("k", [15 * 16, 15 * 16 + 1, 65_536])
def test_prefill_sums_are_exact_at_their_bounds(isa: str, k: int) -> None:
    """The same with the rows and tokens of prefill, where tables hold sums of four products."""
    trits = np.ones((260, k), np.int8)
    trits[::2] = -1
    for value in (-128, 127):
        q = np.full((48, k), value, np.int8)
        expected = np.tile(q[:, :1].astype(np.float64) * k, (1, 260)) * trits[:, 0]
        assert np.array_equal(Kernels(isa).ternary_dots(q, pack_kernel(trits), 260), expected)


@pytest.mark.parametrize("isa", ISAS)
def test_wide_random_sums_are_exact(isa: str) -> None:
    rng = np.random.default_rng(5)
    trits = random_trits(rng, 40, 65_536 + 7)
    for tokens in (1, 5):
        q = rng.choice(np.array([-128, -127, 127], np.int8), (tokens, 65_536 + 7))
        expected = q.astype(np.float64) @ trits.T.astype(np.float64)
        assert np.array_equal(Kernels(isa).ternary_dots(q, pack_kernel(trits), 40), expected)
