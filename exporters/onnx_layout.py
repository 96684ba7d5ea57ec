"""Which matrices and tables an ONNX artifact stores.

A reader of artifacts needs this as much as the exporter does: it says where each linear's rows lie.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from bitdistill.decoder import LINEARS, DecoderSpec

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
