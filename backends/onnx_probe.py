"""Does the installed onnxruntime round activations in its 2-bit products? It is asked by one.

`MatMulNBits` with `accuracy_level` 4 may round them to 8 bits, a scale for each block of columns.
It does where onnxruntime has such a kernel for the processor, and multiplies floats elsewhere: on
x86-64 with AVX2 1.24 to 1.28 do not round, 1.29 to 1.32 do; other processors got theirs in other
versions. No version number answers that, so a product of one block does. Its model is written
here as protobuf, because the runtime needs no `onnx`.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import onnxruntime as ort

BLOCK, ROWS = 128, 16
FLOAT, UINT8, INTEGER = 1, 2, 2  # TensorProto's and AttributeProto's types
PLUS_ONES = b"\xff"  # four codes 3, which are +1
LARGE, SMALL = 127.0, 0.4  # in one block 127 / 127 is the step, and 0.4 of it rounds to nothing


def caveat(manifest: dict[str, Any]) -> str | None:
    """What this onnxruntime computes otherwise than an artifact says, and what to do; or None."""
    blocks = manifest.get("storage", {}).get("activations") == "int8 blocks"
    if not blocks or rounds_activations():
        return None
    return (
        f"onnxruntime {ort.__version__} does not round activations in 2-bit products on this "
        "processor, as this artifact asks: expect other logits; run: pip install -U onnxruntime "
        "(with AVX2: 1.29 or later), or export with --ops integer"
    )


@functools.cache
def rounds_activations() -> bool:
    """Whether 2-bit products round activations to 8 bits in blocks of columns."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model(), options, providers=["CPUExecutionProvider"])
    x = np.full((1, BLOCK), SMALL, np.float32)
    x[0, 0] = LARGE
    (y,) = session.run(None, {"x": x})
    return bool(y.max() < LARGE + 1)  # else LARGE + 127 SMALL


def model() -> bytes:
    """A ModelProto: y (1, ROWS) = x (1, BLOCK) times a matrix of ones, of one block a row."""
    weight = _tensor("w", UINT8, (ROWS, 1, BLOCK // 4), PLUS_ONES * (ROWS * BLOCK // 4))
    scale = _tensor("s", FLOAT, (ROWS,), np.ones(ROWS, np.float32).tobytes())
    sizes = {"K": BLOCK, "N": ROWS, "bits": 2, "block_size": BLOCK, "accuracy_level": 4}
    attributes = b"".join(
        _field(5, _field(1, name) + _field(3, value) + _field(20, INTEGER))
        for name, value in sizes.items()
    )
    node = b"".join(_field(1, name) for name in "xws") + _field(2, "y") + _field(4, "MatMulNBits")
    graph = _field(1, node + attributes + _field(7, "com.microsoft")) + _field(2, "probe")
    graph += _field(5, weight) + _field(5, scale)
    graph += _field(11, _value("x", (1, BLOCK))) + _field(12, _value("y", (1, ROWS)))
    domains = [_field(2, 21), _field(1, "com.microsoft") + _field(2, 1)]
    return _field(1, 10) + _field(7, graph) + b"".join(_field(8, domain) for domain in domains)


def _tensor(name: str, kind: int, shape: tuple[int, ...], raw: bytes) -> bytes:
    sizes = b"".join(_field(1, size) for size in shape)
    return sizes + _field(2, kind) + _field(8, name) + _field(9, raw)


def _value(name: str, shape: tuple[int, ...]) -> bytes:
    sizes = b"".join(_field(1, _field(1, size)) for size in shape)
    return _field(1, name) + _field(2, _field(1, _field(1, FLOAT) + _field(2, sizes)))


def _field(number: int, value: int | str | bytes) -> bytes:
    """One field of a protobuf message: an integer, or text, bytes messages with their length."""
    if isinstance(value, int):
        return _integer(number << 3) + _integer(value)
    content = value.encode() if isinstance(value, str) else value
    return _integer(number << 3 | 2) + _integer(len(content)) + content


def _integer(value: int) -> bytes:
    """Seven bits a byte, the lowest first."""
    parts = [value >> shift & 127 for shift in range(0, max(value.bit_length(), 1), 7)]
    return bytes([*(part | 128 for part in parts[:-1]), parts[-1]])
