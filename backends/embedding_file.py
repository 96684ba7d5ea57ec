"""An embedding that stays on disk: rows are read when tokens ask for them (NumPy only).

A classifier reads few of its 150,000 words' rows, and no head needs the table. The file is read and
not mapped: a mapped page is resident with all its neighbours (up to 2 MiB around it on Linux 6.18),
and 128 scattered rows would cost 75 MB.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitdistill.manifest import FormatError

NAME = "embedding.bin"
DTYPES: dict[str, np.dtype[Any]] = {"float16": np.dtype("<f2"), "float32": np.dtype("<f4")}


class EmbeddingFile:
    """Rows of a table (V, K), stored without a header as `dtype` "float16" or "float32".

    May be read by several threads at once. Raises FormatError where the file is not of that size,
    when it is opened or later.
    """

    def __init__(self, path: Path, rows: int, columns: int, dtype: str) -> None:
        self.path, self.dtype, self.columns = path, DTYPES[dtype], columns
        self.row_bytes = columns * self.dtype.itemsize
        self._stream = path.open("rb", buffering=0)
        if not hasattr(os, "pread"):  # as on Windows; elsewhere the module's 0.1 MB are not needed
            import threading

            self._lock = threading.Lock()
        if path.stat().st_size != rows * self.row_bytes:
            raise FormatError(f"{path} is not a table of {rows} x {columns} {dtype}; copy it again")

    def rows(self, tokens: NDArray[np.integer]) -> NDArray[np.float32]:
        """Token ids (...) -> float32 (..., K)."""
        rows = np.empty((tokens.size, self.columns), np.float32)
        for row, token in zip(rows, tokens.ravel().tolist(), strict=True):
            stored = self._read(token * self.row_bytes)
            if len(stored) != self.row_bytes:
                raise FormatError(f"{self.path} became shorter while in use; copy it again")
            row[:] = np.frombuffer(stored, self.dtype)
        return rows.reshape(*tokens.shape, self.columns)

    def _read(self, offset: int) -> bytes:
        """A row's bytes, by one call that no other thread's comes between."""
        if hasattr(os, "pread"):
            return os.pread(self._stream.fileno(), self.row_bytes, offset)
        with self._lock:  # the stream's position is shared by all threads
            self._stream.seek(offset)
            return self._stream.read(self.row_bytes)
