"""The embedding and LM head of an ONNX artifact, at 32, 16, 8 or 4 bits an element.

A tied table is stored once and read by two nodes: rows are gathered from it, and the head is a
product with it. At 32 and 16 bits the lookup is the stock Gather; at 8 and 4 both are operators of
ours over the bytes that bitdistill/tables.py specifies, or, for an artifact of stock operators
alone, those of onnx_stock_tables.py. A stock head at 16 bits is widened once, when it is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from bitdistill import tables
from bitdistill.exporters import onnx_stock_tables as stock
from bitdistill.exporters.base import ExportError
from bitdistill.exporters.onnx_linears import BY_BLOCK, UNROUNDED
from bitdistill.exporters.onnx_nodes import NodeBuilder
from bitdistill.manifest import FormatError

STORAGE = {32: "float32", 16: "float16", 8: "int8", 4: "int4"}
PARTS = ("", ".blocks", ".scale", ".group_scale")
CHUNK = 4096  # rows compared at a time


@dataclass(frozen=True)
class StoredTable:
    """The initializers of one table (rows, columns), for the operators `ops`."""

    ops: str
    bits: int
    rows: int
    columns: int
    values: list[ir.Value]

    @property
    def attributes(self) -> dict[str, Any]:
        return {"N": self.rows, "K": self.columns, "bits": self.bits}


def store(
    graph: NodeBuilder, name: str, table: tables.Rows, part: str, bits: int, ops: str
) -> StoredTable:
    """Write a table (V, hidden) to the data file; ValueError for values that do not fit float16."""
    rows, columns = table.shape
    if bits in (8, 4) and ops != "custom":
        values = stock.store(graph, name, stock.quantize(table, bits), part)
        return StoredTable(ops, bits, rows, columns, values)
    if bits in (8, 4):
        stored = tables.quantize(table, bits)
        values = [graph.data.add(name, stored.codes, part)]
        values.append(graph.data.add(f"{name}.scale", stored.scale, part))
        if stored.group_scale is not None:
            values.append(graph.data.add(f"{name}.group_scale", stored.group_scale, part))
        return StoredTable(ops, bits, rows, columns, values)
    values = [graph.data.add(name, as_float(name, table, bits), part)]
    return StoredTable(ops, bits, rows, columns, values)


def check_finite(name: str, values: NDArray[np.float32]) -> None:
    """ValueError for NaN or infinity."""
    if not np.isfinite(values).all():
        raise ValueError(f"{name} holds NaN or infinity; the training diverged")


def as_float(name: str, table: tables.Rows, bits: int) -> NDArray[Any]:
    """A table at 16 or 32 bits; ValueError for values that do not fit."""
    stored = np.empty(table.shape, np.float32 if bits == 32 else np.float16)
    for start in range(0, len(table), CHUNK):  # a table may be the largest tensor: no copy but this
        rows = table[start : start + CHUNK]
        check_finite(name, rows)
        with np.errstate(over="ignore"):
            stored[start : start + CHUNK] = rows
        if bits == 16 and not np.isfinite(stored[start : start + CHUNK]).all():
            raise ValueError(f"{name} holds values beyond float16; export with embed_bits=32")
    return stored


def lookup(graph: NodeBuilder, table: StoredTable, ids: ir.Value) -> ir.Value:
    """Token ids -> float rows (..., hidden)."""
    if table.bits in (8, 4) and table.ops != "custom":
        return stock.lookup(graph, table.values, table.bits, ids)
    if table.bits in (8, 4):
        inputs = [ids, *table.values]
        return graph.op(
            "QuantizedEmbedding", inputs, "embed_tokens", "bitdistill", **table.attributes
        )
    x = graph.op("Gather", [table.values[0], ids], "embed_tokens", axis=0)
    if table.bits == 16:
        x = graph.op("Cast", [x], "embed_tokens/float", to=ir.DataType.FLOAT.value)
    return x


def head(graph: NodeBuilder, table: StoredTable, x: ir.Value) -> ir.Value:
    """Hidden states (P, hidden) -> the graph's output `logits` (P, V)."""
    inputs, output = [x, *table.values], "logits"
    if table.bits in (8, 4) and table.ops != "custom":
        level = UNROUNDED if table.ops == "integer" else BY_BLOCK
        return stock.head(graph, table.values, table.bits, x, level)
    if table.bits == 16 and table.ops != "custom":
        inputs[1] = graph.op("Cast", inputs[1:], "lm_head/float", to=ir.DataType.FLOAT.value)
    if table.bits == 32 or (table.bits == 16 and table.ops != "custom"):
        return graph.op("Gemm", inputs, "lm_head", output=output, transB=1)
    if table.bits == 16:
        return graph.op("HeadLinear", inputs, "lm_head", "bitdistill", output=output)
    return graph.op("QuantizedHead", inputs, "lm_head", "bitdistill", output, **table.attributes)


def read_table(
    model: Path, name: str, rows: int, columns: int
) -> tables.Table | stock.StockTable | NDArray[Any]:
    """A stored table as the model file holds it; FormatError when it has none."""
    initializers = ir.load(model).graph.initializers
    arrays = [
        None if value is None or value.const_value is None else value.const_value.numpy()
        for value in (initializers.get(f"{name}{part}") for part in PARTS)
    ]
    codes, blocks, scale, group_scale = arrays
    if codes is None and blocks is not None:  # a stock head of its own
        codes = blocks.reshape(rows, -1)
    if codes is None:
        raise FormatError(f"{model} has no table {name}; export it again")
    if scale is None:
        return codes
    if scale.ndim == 2:
        return stock.StockTable(codes.shape[1] * 8 // columns, columns, codes, scale)
    return tables.Table(8 if group_scale is None else 4, rows, columns, codes, scale, group_scale)


def compare(
    stored: tables.Table | stock.StockTable | NDArray[Any], table: tables.Rows
) -> dict[str, float]:
    """What rounding costs: the error of a row over its length, its `mean` and `largest`.

    Raises ExportError where a value is further off than rounding explains.
    """
    errors = []
    for start in range(0, len(table), CHUNK):
        exact = table[start : start + CHUNK]
        values, bound = _rows(stored, start, start + len(exact))
        difference = np.abs(values - exact)
        if bound is not None and (difference > bound).any():
            raise ExportError(
                "the embedding read back is not what was written; check the disk and export again"
            )
        length = np.linalg.norm(exact.astype(np.float64), axis=1)
        error = np.linalg.norm(difference.astype(np.float64), axis=1)
        errors.append(np.divide(error, length, out=np.zeros_like(error), where=length > 0))
    relative = np.concatenate(errors)
    return {"mean": float(relative.mean()), "largest": float(relative.max())}


def _rows(
    stored: tables.Table | stock.StockTable | NDArray[Any], start: int, stop: int
) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
    """Values of some rows of a stored table, and what rounding can have changed in each."""
    if isinstance(stored, stock.StockTable):
        return stored.rows(start, stop)
    if isinstance(stored, tables.Table):
        part = tables.take_rows(stored, start, stop)
        return tables.dequantize(part), tables.error_bound(part)
    return stored[start:stop].astype(np.float32), None
