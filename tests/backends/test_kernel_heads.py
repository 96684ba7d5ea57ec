"""Quantised embedding and head, bit for bit against their specification written in NumPy."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from kernel_oracle import F, same
from numpy.typing import NDArray

from bitdistill import tables
from bitdistill.backends.kernels.binding import Kernels, available_isas, gather
from bitdistill.tables import Table

ISAS = available_isas()
SHAPES = [(1, 1), (5, 7), (16, 32), (17, 33), (100, 31), (33, 64), (48, 129), (40, 257), (3, 1000)]
TOKENS = (0, 1, 2, 3, 4, 5, 9)


def integers(table: Table) -> NDArray[np.float64]:
    """w as the header defines it, (N, K): by loops over the bytes' places."""
    if table.group_scale is None:
        return table.codes.astype(np.float64) - 128
    out = np.zeros((len(table.codes) * 16, table.codes.shape[1] * 32))
    for s in range(4):
        for half in range(2):
            for j in range(4):
                code = table.codes[:, :, s, :, j] >> 4 * half & 15
                value = table.group_scale * (code.astype(np.float64) - 8)
                out[:, 8 * s + 4 * half + j :: 32] = value.transpose(0, 2, 1).reshape(len(out), -1)
    return out[: table.rows, : table.columns]


def rounded(x: NDArray, bits: int) -> tuple[NDArray[np.float64], NDArray]:
    """q (M, K) and the steps it counts (M,), for a table of so many bits."""
    g = np.abs(x).max(1) if x.size else np.zeros(len(x), F)
    finite = np.isfinite(g)
    used = finite & (g >= F(2.0**-100))
    some = np.where(used, g, F(1))
    up = F(8064) / some if bits == 8 else F(1) / (some / F(127))
    q = np.where(used[:, None], np.rint(x * up[:, None]), F(0))
    return q.astype(np.float64), np.where(finite, g / F(8064 if bits == 8 else 127), F("nan"))


def oracle(x: NDArray, table: Table) -> NDArray:
    w = integers(table).T
    with np.errstate(all="ignore"):
        if table.bits == 8:
            q, down = rounded(x, 8)
            return (q @ w).astype(F) * (down[:, None] * table.scale)
        y = np.zeros((len(x), table.rows), F)
        for first in range(0, table.columns, 32):
            group = slice(first, first + 32)
            q, down = rounded(x[:, group], 4)
            y += (q @ w[group]).astype(F) * down[:, None]
        return y * table.scale


def random_table(rng: np.random.Generator, rows: int, columns: int, bits: int) -> Table:
    """Any bytes at all: none is invalid."""
    shapes = tables.shapes(rows, columns, bits)
    group_scale = None
    if bits == 4:
        group_scale = rng.integers(-128, 128, shapes["group_scale"]).astype(np.int8)
    codes = rng.integers(0, 256, shapes["codes"]).astype(np.uint8)
    return Table(bits, rows, columns, codes, rng.random(rows, F), group_scale)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_head_equals_the_oracle(isa: str, bits: int, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(shape[1])
    table = random_table(rng, *shape, bits)
    for tokens in TOKENS:
        x = rng.standard_normal((tokens, shape[1]), F) * F(10.0 ** rng.integers(-6, 6))
        assert same(Kernels(isa).quantized_head(x, table), oracle(x, table)), tokens


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("sign", [-1, 1])
def test_sums_are_exact_at_their_bounds(isa: str, bits: int, sign: int) -> None:
    """The largest activations against the largest integers of either sign, at the widest K."""
    table = random_table(np.random.default_rng(1), 18, tables.MAX_COLUMNS, bits)
    table.codes[:] = 255
    table.codes[: len(table.codes) // 2] = 0
    if table.group_scale is not None:
        table.group_scale[:] = -128
        table.group_scale[..., ::3] = 127
    x = np.full((3, tables.MAX_COLUMNS), sign, F)
    x[1, ::2] *= -1
    x[2, :] *= np.where(np.arange(tables.MAX_COLUMNS) % 32 < 16, 1, -1)
    for tokens in (x, *np.split(x, 3)):  # one token takes other loops
        assert same(Kernels(isa).quantized_head(tokens, table), oracle(tokens, table))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    "value", [0.0, -0.0, 1e-45, 1e-38, 7e-31, 8e-31, 1e19, 3.4e38, np.inf, -np.inf, np.nan]
)
def test_extreme_tokens(isa: str, bits: int, value: float) -> None:
    """Beside tokens that must not be disturbed."""
    rng = np.random.default_rng(2)
    table = random_table(rng, 35, 70, bits)
    x = rng.standard_normal((4, 70), F)
    x[1] = value
    x[2, 69] = value
    y = Kernels(isa).quantized_head(x, table)
    assert same(y, oracle(x, table))
    assert np.isfinite(y[[0, 3]]).all()
    assert np.isnan(y[1:3]).all() != np.isfinite(value)


@pytest.mark.parametrize("isa", ISAS)
def test_groups_of_a_4_bit_head_have_steps_of_their_own(isa: str) -> None:
    """A huge column costs its own 32 their precision, and no others."""
    rng = np.random.default_rng(6)
    table = random_table(rng, 50, 96, 4)
    x = rng.standard_normal((2, 96), F)
    x[0, 40] = 1e4
    found = Kernels(isa).quantized_head(x, table)
    wanted = x.astype(np.float64) @ tables.dequantize(table).T.astype(np.float64)
    spread = np.abs(tables.dequantize(table)[:, 32:64]).sum(1)
    others = np.abs(tables.dequantize(table)).sum(1) * np.abs(x[1]).max() / 254
    assert (np.abs(found[0] - wanted[0]) <= spread * (0.51e4 / 127) + others).all()
    assert (np.abs(found[1] - wanted[1]) <= 1.01 * others).all()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_gathered_rows_are_the_dequantised_table(bits: int, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(3)
    table = random_table(rng, *shape, bits)
    ids = rng.integers(0, shape[0], 20)
    rows = integers(table).astype(F) * table.scale[:, None]
    assert same(gather(table, ids), rows[ids])
    assert same(tables.dequantize(table), rows)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", [8, 4])
def test_tables_may_start_at_any_byte(isa: str, bits: int) -> None:
    rng = np.random.default_rng(4)
    table = random_table(rng, 40, 100, bits)
    x = rng.standard_normal((2, 100), F)
    moved = {}
    for name in ("codes", "group_scale"):
        array = getattr(table, name)
        if array is not None:
            raw = np.empty(array.nbytes + 3, np.uint8)[3:].view(array.dtype)
            moved[name] = raw.reshape(array.shape)
            moved[name][:] = array
    shifted = dataclasses.replace(table, **moved)
    assert same(Kernels(isa).quantized_head(x, shifted), oracle(x, table))
    assert same(gather(shifted, np.arange(40)), tables.dequantize(table))


def test_the_binding_refuses_what_does_not_fit() -> None:
    table = random_table(np.random.default_rng(5), 20, 40, 4)
    with pytest.raises(ValueError, match=r"codes must be contiguous uint8 \(2, 2, 4, 16, 4\)"):
        gather(dataclasses.replace(table, codes=table.codes[:1]), np.zeros(1, np.int64))
    with pytest.raises(ValueError, match=r"group_scale must be contiguous int8 \(2, 2, 16\)"):
        Kernels().quantized_head(
            np.zeros((1, 40), F), dataclasses.replace(table, group_scale=table.scale)
        )
    with pytest.raises(IndexError, match=r"ids must lie in 0 .. 19"):
        gather(table, np.array([20]))
