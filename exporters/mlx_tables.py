"""Embedding and head of an MLX artifact: in 32 or 16 bits, or in MLX's affine 8, 6 or 4 bits.

A table is read, stored and compared some thousand rows at a time where it is quantised; each row's
groups are independent of every other row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from bitdistill.exporters.tensor_files import bfloat16

_ROWS = 8192
_STEPS = 2.0  # MLX moves a group's grid so that it holds zero, and may clip by a step


def half(name: str, array: NDArray[np.float32], dtype: str) -> tuple[NDArray[Any], str | None]:
    """fp32 values in a 16-bit type (or float32), and what TensorWriter calls raw bits of it.

    bfloat16 is rounded to nearest even. Raises ValueError where float16 overflows.
    """
    if dtype == "bfloat16":
        bits = array.view(np.uint32)
        rounded = bits + (np.uint32(0x7FFF) + (bits >> 16 & 1))
        return bfloat16(rounded.view(np.float32)), "BF16"
    if dtype == "float16" and max(array.max(), -array.min()) > np.finfo(np.float16).max:
        raise ValueError(
            f"{name} has values beyond float16's range; export with --dtype bfloat16, or with "
            "--embed-bits 32 if it is the embedding"
        )
    return array.astype(np.dtype(dtype)), None


def affine(
    table_VH: NDArray[np.float32], group: int, bits: int
) -> tuple[NDArray[np.uint32], NDArray[np.float32], NDArray[np.float32]]:
    """MLX's affine quantisation: words (V, H bits / 32), scales and biases (V, H / group).

    Scales and biases are fp32, to be rounded to the type they are stored in.
    """
    parts = [
        [np.array(part) for part in mx.quantize(mx.array(rows), group_size=group, bits=bits)]
        for rows in _chunks(table_VH)
    ]
    words, scales, biases = (np.concatenate(part) for part in zip(*parts, strict=True))
    return words, scales, biases


def equals(stored: mx.array, array: NDArray[np.float32]) -> bool:
    """Whether a stored tensor is `array`, rounded by MLX to the tensor's type."""
    return stored.shape == array.shape and all(
        bool(
            mx.array_equal(stored[i * _ROWS : (i + 1) * _ROWS], mx.array(rows).astype(stored.dtype))
        )
        for i, rows in enumerate(_chunks(array))
    )


def _chunks(table: NDArray[Any]) -> list[NDArray[Any]]:
    return [table[start : start + _ROWS] for start in range(0, len(table), _ROWS)]


def holds(
    stored: Mapping[str, mx.array], table_VH: NDArray[np.float32], group: int, bits: int
) -> bool:
    """Whether stored affine tensors dequantise, by MLX, to a table within _STEPS of its steps."""
    names = ("weight", "scales", "biases")
    for start in range(0, len(table_VH), _ROWS):
        rows = slice(start, start + _ROWS)
        words, scales, biases = (stored[name][rows] for name in names)
        wide = (scales.astype(mx.float32), biases.astype(mx.float32))
        values = np.array(mx.dequantize(words, *wide, group_size=group, bits=bits))
        step = np.repeat(np.abs(np.array(wide[0])), group, axis=1)
        if not (np.abs(values - table_VH[rows]) <= _STEPS * step).all():
            return False
    return True
