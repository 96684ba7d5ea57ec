"""The external data file of an ONNX model, written one tensor at a time.

Tensors go to the file as they are made, so an export holds one of them in memory, whatever the
model's size. Large ones start on a page boundary: ONNX Runtime maps the file and reads the weights
where they lie. Each of the small ones would so take a page of memory; they are in the model itself.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

PAGE = 4096
CACHE_LINE = 64
SMALL = 1024  # bytes


class TensorFile:
    """A data file beside the model; `parts` counts the bytes stored for each part of the model."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.parts: Counter[str] = Counter()
        self.values: dict[str, ir.Value] = {}
        self._stream = path.open("wb")

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stream.close()

    def add(self, name: str, array: NDArray[Any], part: str) -> ir.Value:
        """Append an array, unless it is small, and return the initializer for it."""
        self.parts[part] += array.nbytes
        if array.nbytes <= SMALL:
            return self._keep(ir.tensor(array, name=name))
        array = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
        alignment = PAGE if array.nbytes >= PAGE else CACHE_LINE
        self._stream.write(bytes(-self._stream.tell() % alignment))
        offset = self._stream.tell()
        self._stream.write(array.data)
        return self._stored(
            name, offset, array.nbytes, ir.DataType.from_numpy(array.dtype), array.shape
        )

    def alias(self, name: str, value: ir.Value, shape: tuple[int, ...]) -> ir.Value:
        """An initializer of another shape that refers to the bytes of one stored before."""
        stored = value.const_value
        if not isinstance(stored, ir.ExternalTensor):
            return self._keep(ir.tensor(stored.numpy().reshape(shape), name=name))
        return self._stored(name, stored.offset, stored.length, stored.dtype, shape)

    def _stored(
        self, name: str, offset: int, length: int, dtype: ir.DataType, shape: tuple[int, ...]
    ) -> ir.Value:
        tensor = ir.ExternalTensor(
            self.path.name,
            offset,
            length,
            dtype,
            shape=ir.Shape(shape),
            name=name,
            base_dir=self.path.parent,
        )
        return self._keep(tensor)

    def _keep(self, tensor: ir.TensorProtocol) -> ir.Value:
        name = tensor.name
        if name in self.values:
            raise ValueError(f"tensor {name!r} is stored twice")
        kind = ir.TensorType(tensor.dtype)
        value = ir.Value(name=name, shape=ir.Shape(tensor.shape), type=kind, const_value=tensor)
        self.values[name] = value
        return value
