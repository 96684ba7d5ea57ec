"""PyTorch attention over keys and values that are rounded as an artifact's cache rounds them.

Rounding depends on the row alone, so it is done wherever attention reads them; the transformers
cache itself keeps what the model computed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

LARGEST_HALF = 65504.0
LEVELS = 127.0
SMALLEST = 2.0**-100


def _half(x: Tensor) -> Tensor:
    return x.clamp(-LARGEST_HALF, LARGEST_HALF).to(torch.float16).to(x.dtype)


def _codes(x: Tensor) -> Tensor:
    """8 bits, with a scale for each row."""
    g = x.abs().amax(-1, keepdim=True)
    up = torch.where(g < SMALLEST, 0.0, LEVELS / g)
    return torch.round(x * up) * (g / LEVELS)


ROUNDINGS: dict[str, Callable[[Tensor], Tensor]] = {"float16": _half, "int8": _codes}
TYPES = ("float32", *ROUNDINGS)


def round_cache(model: PreTrainedModel, name: str) -> None:
    """Make a model attend to keys and values of a type, one of TYPES."""
    if name in ROUNDINGS:
        model.set_attn_implementation(f"bitdistill_{name}")


def _register(name: str, rounding: Callable[[Tensor], Tensor]) -> None:
    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        return sdpa_attention_forward(module, query, rounding(key), rounding(value), mask, **kwargs)

    AttentionInterface.register(f"bitdistill_{name}", attention)
    AttentionMaskInterface.register(f"bitdistill_{name}", sdpa_mask)


for _name, _rounding in ROUNDINGS.items():
    _register(_name, _rounding)
