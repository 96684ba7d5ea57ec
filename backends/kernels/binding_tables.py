"""ctypes binding to the heads and embeddings of bitdistill_kernels.h; `binding` is its front."""

from __future__ import annotations

import ctypes as c

import numpy as np
from numpy.typing import NDArray

from bitdistill.tables import Table, shapes

Floats = NDArray[np.float32]


class HalfTable(c.Structure):
    _fields_ = (("table", c.c_void_p), ("rows", c.c_int64), ("columns", c.c_int64))


class QuantizedTable(c.Structure):
    _fields_ = (
        ("codes", c.c_void_p),
        ("group_scale", c.c_void_p),
        ("scale", c.c_void_p),
        ("rows", c.c_int64),
        ("columns", c.c_int64),
    )


class HeadTokens(c.Structure):
    _fields_ = (
        ("q", c.c_void_p),
        ("parts", c.c_void_p),
        ("sums", c.c_void_p),
        ("down", c.c_void_p),
        ("tokens", c.c_int64),
        ("columns", c.c_int64),
        ("stride", c.c_int64),
    )


_HALF = c.CFUNCTYPE(
    None, c.POINTER(HalfTable), c.c_void_p, c.c_int64, c.c_void_p, c.c_int64, c.c_int64
)
_HEAD = c.CFUNCTYPE(
    None, c.POINTER(QuantizedTable), c.POINTER(HeadTokens), c.c_void_p, c.c_int64, c.c_int64
)


class HeadTable(c.Structure):
    _fields_ = (("half", _HALF), ("int8", _HEAD), ("int4", _HEAD))


def declare(lib: c.CDLL) -> None:
    """Give the functions of a loaded library their signatures."""
    lib.bd_head_scratch_bytes.restype = c.c_size_t
    lib.bd_head_scratch_bytes.argtypes = [c.c_int64, c.c_int64, c.c_int]
    lib.bd_head_tokens.restype = HeadTokens
    lib.bd_head_tokens.argtypes = [c.c_void_p, c.c_int64, c.c_int64, c.c_int]
    lib.bd_head_quantize.restype = None
    lib.bd_head_quantize.argtypes = [c.c_void_p, c.POINTER(HeadTokens), c.c_int64, c.c_int64]
    for bits in (8, 4):
        function = getattr(lib, f"bd_gather_int{bits}")
        function.restype = None
        function.argtypes = [c.POINTER(QuantizedTable), c.c_void_p, c.c_int64, c.c_void_p]


def quantized_head(lib: c.CDLL, head: HeadTable, x: Floats, table: Table) -> Floats:
    """x (M, K) contiguous, a table (N, K) of 8 or 4 bits -> (M, N), on this thread."""
    tokens, weights = x.shape[0], quantized_table(table)
    size = lib.bd_head_scratch_bytes(tokens, table.columns, table.bits)
    scratch = np.full(size // 8 + 1, 0x5A5A5A5A5A5A5A5A, np.uint64)
    prepared = lib.bd_head_tokens(scratch.ctypes.data, tokens, table.columns, table.bits)
    lib.bd_head_quantize(x.ctypes.data, prepared, 0, tokens)
    y = np.empty((tokens, table.rows), np.float32)
    product, units = (head.int8, table.rows) if table.bits == 8 else (head.int4, len(table.codes))
    product(weights, prepared, y.ctypes.data, 0, units)
    return y


def quantized_table(table: Table) -> QuantizedTable:
    """The C form of a table, which must outlive it; ValueError for arrays that do not fit."""
    wanted = shapes(table.rows, table.columns, table.bits)
    types = {"codes": np.uint8, "group_scale": np.int8, "scale": np.float32}
    pointers: dict[str, int | None] = {"group_scale": None}
    for name, shape in wanted.items():
        array = getattr(table, name)
        if array.dtype != types[name] or array.shape != shape or not array.flags.c_contiguous:
            raise ValueError(f"{name} must be contiguous {types[name].__name__} {shape}")
        pointers[name] = array.ctypes.data
    return QuantizedTable(rows=table.rows, columns=table.columns, **pointers)


def gather_rows(lib: c.CDLL, table: Table, ids: NDArray[np.int64]) -> Floats:
    """Rows (n, K) of a table; ids (n,). IndexError for an id without a row."""
    if ids.size and not 0 <= ids.min() <= ids.max() < table.rows:
        raise IndexError(f"ids must lie in 0 .. {table.rows - 1}")
    ids = np.ascontiguousarray(ids, np.int64)
    rows = np.empty((len(ids), table.columns), np.float32)
    function = getattr(lib, f"bd_gather_int{table.bits}")
    function(quantized_table(table), ids.ctypes.data, len(ids), rows.ctypes.data)
    return rows
