"""An embedding that stays on disk: rows are read when tokens ask for them (NumPy only).

A classifier reads few of its 150,000 words' rows, and no head needs the table. The file is read and
not mapped: a mapped page is resident with all its neighbours (up to 2 MiB around it on Linux 6.18),
and 128 scattered rows would cost 75 MB.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitdistill.manifest import FormatError

NAME = "embedding.bin"
DTYPES: dict[str, np.dtype[Any]] = {"float16": np.dtype("<f2"), "float32": np.dtype("<f4")}


class EmbeddingFile:
    """Rows of a table (V, K), stored without a header as `dtype` "float16" or "float32".

    Raises FormatError where the file is not of that size.
    """

    def __init__(self, path: Path, rows: int, columns: int, dtype: str) -> None:
        self.dtype, self.columns = DTYPES[dtype], columns
        self.row_bytes = columns * self.dtype.itemsize
        self._stream = path.open("rb", buffering=0)
        if path.stat().st_size != rows * self.row_bytes:
            raise FormatError(f"{path} is not a table of {rows} x {columns} {dtype}; copy it again")

    def rows(self, tokens: NDArray[np.integer]) -> NDArray[np.float32]:
        """Token ids (...) -> float32 (..., K)."""
        rows = np.empty((tokens.size, self.columns), np.float32)
        stored = np.empty(self.columns, self.dtype)
        for row, token in zip(rows, tokens.ravel().tolist(), strict=True):
            self._stream.seek(token * self.row_bytes)
            self._stream.readinto(stored.data)
            row[:] = stored
        return rows.reshape(*tokens.shape, self.columns)
