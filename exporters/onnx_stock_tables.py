"""Embedding and LM head at 8 or 4 bits with ONNX Runtime's own operators.

GatherBlockQuantized and MatMulNBits read the same bytes under two shapes, so a tied table is in the
file once. The values are those of bitdistill/tables.py: at 8 bits a row's scale is repeated for
each of its blocks, at 4 bits a group's scale is its integer times the row's. MatMulNBits rounds the
head's input to 8 bits a block, except at 4 bits for `--ops integer`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from bitdistill import packing, tables
from bitdistill.exporters.onnx_nodes import NodeBuilder

FLIPPED = 2.01  # steps: the largest value of a 4-bit group may stand this far from its code
ROUNDED = 4.6 / tables.GROUP_LEVELS  # of a row's largest group scale, from rounding the group's own


@dataclass(frozen=True)
class StockTable:
    """Codes uint8 (V, bytes of a row), scales float32 (V, blocks); a value is (code - zero) scale.

    `values` are the initializers: codes for the lookup, the same bytes for the head, scales.
    """

    bits: int
    columns: int
    codes: NDArray[np.uint8]
    scales: NDArray[np.float32]

    def rows(self, start: int, stop: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Values (n, K) of some rows, and the most that rounding can have changed each."""
        codes, scales = self.codes[start:stop], self.scales[start:stop]
        if self.bits == 4:
            codes = np.stack([codes & np.uint8(15), codes >> np.uint8(4)], -1)
        integers = codes.reshape(len(scales), -1).astype(np.float32) - (1 << (self.bits - 1))
        by_column = np.repeat(scales, self.columns // scales.shape[1], 1)
        bound = np.float32(0.501) * by_column
        if self.bits == 4:
            largest = np.abs(scales).max(1, keepdims=True)
            bound = np.float32(FLIPPED) * np.abs(by_column) + np.float32(ROUNDED) * largest
        return integers * by_column, bound


def quantize(table: tables.Rows, bits: int) -> StockTable:
    """float32 (V, K) -> the stock form; ValueError where K is not whole blocks of 32."""
    rows, columns = table.shape
    if columns % tables.BLOCK_COLUMNS:
        raise ValueError(
            f"hidden size {columns} is not divisible by {tables.BLOCK_COLUMNS}, as stock operators "
            "need for a quantised embedding; export with --embed-bits 16, or --ops custom"
        )
    stored = tables.quantize(table, bits)
    if stored.group_scale is None:
        blocks = columns // packing.stock_block(columns)
        scales = np.repeat(stored.scale[:, None], blocks, axis=1)
        return StockTable(bits, columns, stored.codes, scales)
    codes = tables.unpack_codes(stored.codes).reshape(-1, columns)[:rows]
    groups = stored.group_scale.transpose(0, 2, 1).reshape(-1, stored.group_scale.shape[1])[:rows]
    packed = codes[:, ::2] | codes[:, 1::2] << np.uint8(4)
    return StockTable(bits, columns, packed, groups * stored.scale[:, None])


def store(graph: NodeBuilder, name: str, table: StockTable, part: str) -> list[ir.Value]:
    """Write a table: the initializers of the codes, of the same bytes in blocks, of the scales."""
    rows, blocks = table.scales.shape
    codes = graph.data.add(name, table.codes, part)
    blocked = graph.data.alias(
        f"{name}.blocks", codes, (rows, blocks, table.codes.shape[1] // blocks)
    )
    return [codes, blocked, graph.data.add(f"{name}.scale", table.scales, part)]


def lookup(graph: NodeBuilder, values: list[ir.Value], bits: int, ids: ir.Value) -> ir.Value:
    """Token ids -> float rows (..., hidden)."""
    codes, _, scales = values
    return graph.op(
        "GatherBlockQuantized",
        [codes, ids, scales],
        "embed_tokens",
        "com.microsoft",
        bits=bits,
        block_size=_columns(values, bits) // scales.shape[1],
        gather_axis=0,
        quantize_axis=1,
    )


def head(
    graph: NodeBuilder, values: list[ir.Value], bits: int, x: ir.Value, accuracy_level: int
) -> ir.Value:
    """Hidden states (P, hidden) -> the graph's output `logits` (P, V)."""
    _, blocked, scales = values
    columns = _columns(values, bits)
    return graph.op(
        "MatMulNBits",
        [x, blocked, scales],
        "lm_head",
        "com.microsoft",
        output="logits",
        N=scales.shape[0],
        K=columns,
        bits=bits,
        block_size=columns // scales.shape[1],
        accuracy_level=accuracy_level,
    )


def _columns(values: list[ir.Value], bits: int) -> int:
    columns: int = values[0].shape[1] * 8 // bits
    return columns
