"""How an ONNX artifact holds keys and values, at 32, 16 or 8 bits an element (NumPy only).

At 8 bits a row (one position of one head) is its codes and, in the last four bytes, the float32
scale behind them; backends/kernels/bitdistill_attention.h says how both are made.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from bitdistill.decoder import DecoderSpec

DTYPES: dict[int, np.dtype[Any]] = {
    32: np.dtype(np.float32),
    16: np.dtype(np.float16),
    8: np.dtype(np.int8),
}
STORAGE = {32: "float32", 16: "float16", 8: "int8"}
SCALE_BYTES = 4


def row_elements(head_dim: int, bits: int) -> int:
    """Elements that one position of one head takes."""
    return head_dim + (SCALE_BYTES if bits == 8 else 0)


def shape(spec: DecoderSpec, bits: int, rows: int, positions: int) -> tuple[int, int, int, int]:
    """Of the keys, or the values, of a layer: (rows, KV heads, positions, elements)."""
    return rows, spec.kv_heads, positions, row_elements(spec.head_dim, bits)


def position_bytes(spec: DecoderSpec, bits: int) -> int:
    """Bytes of one position of one sequence, in all layers."""
    row = row_elements(spec.head_dim, bits) * DTYPES[bits].itemsize
    return 2 * len(spec.layers) * spec.kv_heads * row
