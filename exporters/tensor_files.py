"""Safetensors written one tensor at a time, so that a large model never lies in memory twice.

The format is eight bytes with the length of a JSON header, the header, then raw little-endian data
without gaps. The header must come first and holds what is known last, so room is kept for it and
the rest of that room is filled with spaces, which the format allows. Written by hand because the
`safetensors` package and `mx.save_safetensors` both take all tensors at once.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from bitdistill import manifest

SHARD_BYTES = 5 << 30
_TYPES = {"float32": "F32", "float16": "F16", "uint32": "U32"}
_ENTRY_BYTES = 160  # of a header entry, its name excepted: generous


def bfloat16(array: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The upper halves of fp32 values, which are their bf16 form where that is exact."""
    return (np.ascontiguousarray(array, np.float32).view(np.uint32) >> 16).astype(np.uint16)


class TensorWriter:
    """Writes model.safetensors, or shards of `shard_bytes` (SHARD_BYTES), and their index.

    `names` are all tensors to come, for the size of the header. Use as a context manager: headers,
    final file names and the index are written on a clean exit.
    """

    def __init__(
        self, directory: Path, names: Iterable[str], shard_bytes: int | None = None
    ) -> None:
        self.directory = directory
        self.shard_bytes = shard_bytes or SHARD_BYTES
        room = 128 + sum(len(name) + _ENTRY_BYTES for name in names)
        self._room = room + -room % 8
        self._shards: list[dict[str, Any]] = []
        self._file: BinaryIO | None = None
        self._offset = 0

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._close_shard()
            self._finish()
        elif self._file is not None:
            self._file.close()

    def add(self, name: str, array: NDArray[Any], dtype: str | None = None) -> int:
        """Append one tensor; returns its size in bytes. `dtype` names raw bits ("BF16")."""
        data = np.ascontiguousarray(array)
        data = data.astype(data.dtype.newbyteorder("<"), copy=False)
        if self._file is not None and self._offset + data.nbytes > self.shard_bytes:
            self._close_shard()
        if self._file is None:
            self._open_shard()
        assert self._file is not None
        self._file.write(data.data)
        end = self._offset + data.nbytes
        self._shards[-1][name] = {
            "dtype": dtype or _TYPES[data.dtype.name],
            "shape": list(data.shape),
            "data_offsets": [self._offset, end],
        }
        self._offset = end
        return data.nbytes

    def _part(self, index: int) -> Path:
        return self.directory / f"model-{index}.safetensors.part"

    def _open_shard(self) -> None:
        self._file = self._part(len(self._shards)).open("wb")
        self._file.write(b"\0" * (8 + self._room))
        self._offset = 0
        self._shards.append({})

    def _close_shard(self) -> None:
        if self._file is None:
            return
        header = {"__metadata__": {"format": "mlx"}} | self._shards[-1]
        text = json.dumps(header, separators=(",", ":")).encode()
        assert len(text) <= self._room, "a tensor was added that `names` did not announce"
        with self._file as file:
            file.seek(0)
            file.write(self._room.to_bytes(8, "little") + text.ljust(self._room))
        self._file = None

    def _finish(self) -> None:
        count = len(self._shards)
        where: dict[str, str] = {}
        for index, entries in enumerate(self._shards):
            file = f"model-{index + 1:05d}-of-{count:05d}.safetensors"
            file = "model.safetensors" if count == 1 else file
            self._part(index).rename(self.directory / file)
            where |= dict.fromkeys(entries, file)
        total = sum(e["data_offsets"][1] for s in self._shards for e in list(s.values())[-1:])
        index_file = {"metadata": {"total_size": total}, "weight_map": where}
        manifest.write_json(self.directory / "model.safetensors.index.json", index_file)
