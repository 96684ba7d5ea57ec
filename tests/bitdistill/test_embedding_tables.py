"""Quantised tables: what is stored, how far it is from what was given, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from bitdistill import tables

F = np.float32
# relative, of normal values; a small table scatters around 0.008 and 0.082
ERRORS = {8: 0.01, 4: 0.1}


def relative(found: np.ndarray, table: np.ndarray) -> float:
    return float(np.sqrt(np.square(found - table).sum() / np.square(table).sum()))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", [(1, 1), (16, 32), (33, 70), (5000, 64)])
def test_values_come_back_close(bits: int, shape: tuple[int, int]) -> None:
    table = np.random.default_rng(0).standard_normal(shape).astype(F)
    stored = tables.quantize(table, bits)
    sizes = tables.shapes(*shape, bits)
    assert {name: getattr(stored, name).shape for name in sizes} == sizes
    found = tables.dequantize(stored)
    assert found.shape == shape
    assert relative(found, table) < ERRORS[bits]
    # quantising what was stored changes nothing at 8 bits: its largest value has the code 127
    if bits == 8:
        assert relative(tables.dequantize(tables.quantize(found, 8)), found) < 1e-6


def test_integers_of_few_levels_are_exact() -> None:
    """A group whose values are -8 .. 7 times one step is stored as it is."""
    rng = np.random.default_rng(1)
    table = rng.integers(-8, 8, (20, 96)).astype(F)
    table[:, ::32] = -8
    np.testing.assert_array_equal(tables.dequantize(tables.quantize(table, 4)), table)
    table[:, 1::32] = 127
    table[table == -8] = -127
    np.testing.assert_array_equal(tables.dequantize(tables.quantize(table, 8)), table)


@pytest.mark.parametrize("bits", [8, 4])
def test_rows_of_zeros_and_extremes(bits: int) -> None:
    table = np.random.default_rng(2).standard_normal((6, 64)).astype(F)
    table[0] = 0
    table[1, :32] = 0
    table[2] *= F(1e30)
    table[3] *= F(1e-30)
    found = tables.dequantize(tables.quantize(table, bits))
    assert not found[0].any()
    assert not found[1, :32].any()
    for row in (2, 3, 4):
        assert (
            relative(found[row] / abs(table[row]).max(), table[row] / abs(table[row]).max()) < 0.12
        )


def test_codes_survive_packing() -> None:
    codes = np.random.default_rng(3).integers(0, 16, (3, 16, 5, 32)).astype(np.uint8)
    packed = tables.pack_codes(codes)
    assert packed.shape == (3, 5, 4, 16, 4)
    np.testing.assert_array_equal(tables.unpack_codes(packed), codes)
    # byte (s, r, j) of a block: columns 8 s + j and 8 s + 4 + j of row r
    assert packed[1, 2, 3, 7, 1] == codes[1, 7, 2, 25] | codes[1, 7, 2, 29] << 4


def test_what_cannot_be_quantised_is_refused() -> None:
    table = np.ones((2, 4), F)
    with pytest.raises(ValueError, match="to 8 or 4 bits, not 6"):
        tables.quantize(table, 6)
    with pytest.raises(ValueError, match="at most 16384 columns"):
        tables.quantize(np.ones((1, 16385), F), 8)
    for value in (np.nan, np.inf):
        table[1, 1] = value
        with pytest.raises(ValueError, match="holds NaN or infinity"):
            tables.quantize(table, 4)
