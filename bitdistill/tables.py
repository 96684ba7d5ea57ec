"""Quantised embedding tables <-> bytes: the storage specification of 8 and 4 bits (NumPy only).

A table (V, K) serves the embedding (rows) and a tied LM head (a product). Each row has a float32
scale, so that a value is `integer * scale`, one rounding:

8 bits   codes uint8 (V, K), integer = code - 128 in -127 .. 127; scale = max |row| / 127.
4 bits   codes uint8 (ceil(V/16), ceil(K/32), 4, 16, 4): byte (s, r, j) of a block of 16 rows and 32
         columns holds columns 8 s + j (low bits) and 8 s + 4 + j (high) of row r, so that a SIMD
         lane is a row. group_scale int8 (ceil(V/16), ceil(K/32), 16), one for each row's 32
         columns; integer = group_scale * (code - 8). 4.25 bits a weight, and the row scales.

Integer group scales keep a head's product exact. A group's scale may be negative: its largest value
takes the code that has no opposite (-8). Of five scales the one with the least squared error is
taken, which lowered the error of a normal table from 8.6 % to 8.2 %.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

BLOCK_ROWS = 16
BLOCK_COLUMNS = 32
MAX_COLUMNS = 1 << 14
LEVELS_8 = 127
GROUP_LEVELS = 127
LARGEST_CODES = (-9.0, -8.5, -8.0, -7.5, -7.0)  # what a group's largest value may be mapped to
CHUNK = 4096  # rows at a time: the workspace stays small beside the table

Floats = NDArray[np.float32]


class Rows(Protocol):
    """A float32 matrix (V, K) that is read some rows at a time: an array, or a part of a file."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(V, K)."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice, /) -> Any:
        """These rows, float32."""


@dataclass(frozen=True)
class Table:
    """A quantised (rows, columns) table as it is stored; `group_scale` is None at 8 bits."""

    bits: int
    rows: int
    columns: int
    codes: NDArray[np.uint8]
    scale: Floats
    group_scale: NDArray[np.int8] | None = None


def quantize(table: Rows, bits: int) -> Table:
    """float32 (V, K) -> its 8- or 4-bit form.

    Raises ValueError for another number of bits, values that are not finite, or K beyond 16,384.
    """
    if bits not in (8, 4):
        raise ValueError(f"a table is quantised to 8 or 4 bits, not {bits}")
    rows, columns = table.shape
    if columns > MAX_COLUMNS:
        raise ValueError(f"K = {columns}: a quantised table has at most {MAX_COLUMNS} columns")
    make = _quantize_8 if bits == 8 else _quantize_4
    parts = [make(_finite(table[i : i + CHUNK])) for i in range(0, rows, CHUNK)]
    arrays = [np.concatenate(chunks) for chunks in zip(*parts, strict=True)]
    return Table(bits, rows, columns, *arrays)


def dequantize(table: Table) -> Floats:
    """The values that a Table stands for, float32 (V, K)."""
    if table.group_scale is None:
        return (table.codes.astype(np.float32) - 128) * table.scale[:, None]
    integers = unpack_codes(table.codes).astype(np.int16) - 8
    integers *= table.group_scale.transpose(0, 2, 1)[..., None]
    wide = integers.reshape(len(table.codes) * BLOCK_ROWS, -1)[: table.rows, : table.columns]
    return wide.astype(np.float32) * table.scale[:, None]


def error_bound(table: Table) -> Floats:
    """The most by which a value of a Table may differ from what was quantised, (V, K or 1).

    At 4 bits a group's largest value may stand at -9 steps, one beyond its code, and the opposite
    one two beyond; rounding the group's own scale adds half a row scale for each of 9 steps.
    """
    if table.group_scale is None:
        return np.float32(0.501) * table.scale[:, None]
    steps = np.abs(table.group_scale.astype(np.float32)) * np.float32(2.01) + np.float32(4.6)
    by_row = steps.transpose(0, 2, 1).reshape(-1, steps.shape[1])[: table.rows]
    bounds = np.repeat(by_row, BLOCK_COLUMNS, 1)[:, : table.columns]
    return np.asarray(bounds * table.scale[:, None], np.float32)


def take_rows(table: Table, start: int, stop: int) -> Table:
    """Rows [start, stop) of a Table; `start` must be a multiple of 16."""
    if start % BLOCK_ROWS:
        raise ValueError(f"row {start} is not the first of a block of {BLOCK_ROWS}")
    stop = min(stop, table.rows)
    scale, count = table.scale[start:stop], stop - start
    if table.group_scale is None:
        return Table(table.bits, count, table.columns, table.codes[start:stop], scale)
    blocks = slice(start // BLOCK_ROWS, -(-stop // BLOCK_ROWS))
    return Table(
        table.bits, count, table.columns, table.codes[blocks], scale, table.group_scale[blocks]
    )


def shapes(rows: int, columns: int, bits: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the stored arrays."""
    if bits == 8:
        return {"codes": (rows, columns), "scale": (rows,)}
    blocks, groups = -(-rows // BLOCK_ROWS), -(-columns // BLOCK_COLUMNS)
    return {
        "codes": (blocks, groups, 4, BLOCK_ROWS, 4),
        "scale": (rows,),
        "group_scale": (blocks, groups, BLOCK_ROWS),
    }


def pack_codes(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """4-bit codes (blocks, 16, groups, 32) -> uint8 (blocks, groups, 4, 16, 4)."""
    blocks, rows, groups, _ = codes.shape
    split = codes.reshape(blocks, rows, groups, 4, 2, 4)  # (.., s, half, j)
    packed = split[..., 0, :] | split[..., 1, :] << np.uint8(4)
    return np.ascontiguousarray(packed.transpose(0, 2, 3, 1, 4))


def unpack_codes(packed: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The inverse of `pack_codes`."""
    halves = np.stack([packed & np.uint8(15), packed >> np.uint8(4)], axis=3)
    blocks, groups = packed.shape[:2]  # halves: (block, group, s, half, row, j)
    codes = halves.transpose(0, 4, 1, 2, 3, 5).reshape(blocks, BLOCK_ROWS, groups, BLOCK_COLUMNS)
    return np.ascontiguousarray(codes)


def _finite(rows: Floats) -> Floats:
    rows = np.ascontiguousarray(rows, np.float32)
    if not np.isfinite(rows).all():
        raise ValueError("an embedding table holds NaN or infinity; the training diverged")
    return rows


def _quotient(values: Floats, scale: Floats) -> Floats:
    """values / scale, 0 where the scale is."""
    return np.divide(values, scale, out=np.zeros(np.broadcast(values, scale).shape, np.float32),
                     where=scale != 0)  # fmt: skip


def _quantize_8(rows: Floats) -> tuple[NDArray[np.uint8], Floats]:
    scale = np.abs(rows).max(1) / np.float32(LEVELS_8)
    integers = np.rint(_quotient(rows, scale[:, None])).clip(-LEVELS_8, LEVELS_8)
    return (integers + 128).astype(np.uint8), scale


def _quantize_4(rows: Floats) -> tuple[NDArray[np.uint8], Floats, NDArray[np.int8]]:
    count, columns = rows.shape
    largest = np.abs(rows).max(1)
    unit = _quotient(rows, largest[:, None])  # so that no square overflows or vanishes
    padding = ((0, -count % BLOCK_ROWS), (0, -columns % BLOCK_COLUMNS))
    grouped = np.pad(unit, padding).reshape(-1, -(-columns // BLOCK_COLUMNS), BLOCK_COLUMNS)
    wanted = _group_scales(grouped)
    step = np.abs(wanted).max(1) / np.float32(GROUP_LEVELS)
    integers = np.rint(_quotient(wanted, step[:, None])).clip(-GROUP_LEVELS, GROUP_LEVELS)
    codes = _codes_4(grouped, (integers * step[:, None])[..., None]).astype(np.uint8)
    blocks, groups = len(grouped) // BLOCK_ROWS, grouped.shape[1]
    codes = pack_codes(codes.reshape(blocks, BLOCK_ROWS, groups, BLOCK_COLUMNS))
    by_block = integers.astype(np.int8).reshape(blocks, BLOCK_ROWS, groups).transpose(0, 2, 1)
    return codes, step[:count] * largest, np.ascontiguousarray(by_block)


def _codes_4(grouped: Floats, scale: Floats) -> Floats:
    return (np.rint(_quotient(grouped, scale)) + 8).clip(0, 15)


def _group_scales(grouped: Floats) -> Floats:
    """The scale (V, groups) of each group with the least squared error."""
    at = np.abs(grouped).argmax(-1)[..., None]
    largest = np.take_along_axis(grouped, at, -1)
    best = np.zeros(grouped.shape[:-1], np.float32)
    least = np.full(best.shape, np.inf, np.float32)
    for code in LARGEST_CODES:
        scale = largest / np.float32(code)
        error = np.square((_codes_4(grouped, scale) - 8) * scale - grouped).sum(-1)
        better = error < least
        best = np.where(better, scale[..., 0], best)
        least = np.where(better, error, least)
    return best
