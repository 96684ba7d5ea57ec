"""Bytes of the parts of a model directory, from the headers of its safetensors files alone."""

from __future__ import annotations

import json
import math
import struct
from collections import Counter
from pathlib import Path
from typing import Any

from bitdistill.manifest import FormatError

BITS = {"F64": 64, "I64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16}
BYTE_BITS = 8  # of every other type that models are stored in
LONGEST_HEADER = 100_000_000  # as the format says


def tensor_parts(directory: Path) -> dict[str, int] | None:
    """{"body", "embedding", "head", "norms": bytes, ...}; None where there are no such files."""
    parts: Counter[str] = Counter()
    for file in sorted(directory.glob("*.safetensors")):
        for name, entry in _header(file).items():
            bits = BITS.get(entry["dtype"], BYTE_BITS)
            parts[_part(name)] += math.prod(entry["shape"]) * bits // 8
    return dict(parts) | {"total": parts.total()} if parts else None


def _header(file: Path) -> dict[str, dict[str, Any]]:
    """Name -> dtype and shape: the file begins with the header's length and the header in JSON."""
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8).ljust(8, b"\0"))
        text = stream.read(min(length, LONGEST_HEADER))
    try:
        header = json.loads(text)
    except ValueError:
        raise FormatError(f"{file} is damaged: it has no header; copy it again") from None
    return {name: entry for name, entry in header.items() if name != "__metadata__"}


def _part(tensor: str) -> str:
    if "embed_tokens" in tensor:
        return "embedding"
    if tensor.startswith("lm_head"):
        return "head"
    return "norms" if "norm" in tensor else "body"
