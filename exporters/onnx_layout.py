"""Which matrices and tables an ONNX artifact stores; needs NumPy only.

A reader of artifacts needs this as much as the exporter does: it says where each linear's rows lie.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from bitdistill.decoder import LINEARS, DecoderSpec, RotarySpec

FUSED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}


def stored_linears(spec: DecoderSpec) -> dict[str, tuple[str, ...]]:
    """The matrices a layer stores: name -> the linears stacked in it along N.

    Linears that own a norm see different inputs and cannot be stacked.
    """
    stored = {}
    for name in LINEARS:
        for fused, parts in FUSED.items():
            if name in parts and not any(spec.has_norm(part) for part in parts):
                stored[fused] = parts
                break
        else:
            stored[name] = (name,)
    return stored


def scale_rows(spec: DecoderSpec, parts: Sequence[str]) -> int:
    """Rows that share one stored scale: all of one matrix, or what divides each of those stacked.

    q, k and v of 576, 192 and 192 rows have blocks of 192 rows and five scales: q's three times.
    """
    return math.gcd(*(spec.shape(part)[0] for part in parts))


def rotary_tables(
    spec: RotarySpec, context: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """cos and sin, float32 (context, head_dim / 2).

    Angles are rounded to fp32 as in Hugging Face, whose model this has to equal: at position 8000
    that rounding is worth 5e-4 radians. Their cosines are taken in fp64.
    """
    positions = np.arange(context, dtype=np.float32)
    angles = np.outer(positions, np.array(spec.frequencies, np.float32)).astype(np.float64)
    cos, sin = np.cos(angles) * spec.scale, np.sin(angles) * spec.scale
    return cos.astype(np.float32), sin.astype(np.float32)
