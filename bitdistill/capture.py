"""The attention that training runs, and the states that the relation loss reads from it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from bitdistill.schema import RelationLoss
from bitdistill.student import layers_of

ATTENTION = "bitdistill_training"
_STATE_PROJECTIONS = ("q_proj", "k_proj", "v_proj")


def _window_mask(query: Tensor, window: int) -> Tensor:
    """Boolean (T, T): a token sees itself and the `window - 1` tokens before it."""
    tokens = query.shape[2]
    ones = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device)
    return ones.tril() & ~ones.tril(-window)


def _training_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal SDPA that builds no padding mask, and hands Q, K, V to the module's capture.

    Padding is on the right, where no real token looks, so plain causal attention is exact for real
    tokens and keeps the fused kernels. `attention_mask`, if any, is (B, 1, T, T) and separates
    packed documents. Q, K, V are (B, heads, T, R), after rotary embedding.
    """
    capture: Capture | None = getattr(module, "bitdistill_capture", None)
    if capture is not None:
        capture.states = [x.transpose(1, 2).flatten(2) for x in (query, key, value)]
    if sliding_window is not None and query.shape[2] > sliding_window:
        near = _window_mask(query, sliding_window)
        attention_mask = near if attention_mask is None else attention_mask & near
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


# registered without a mask function: transformers then builds no mask and asks the data nothing
AttentionInterface.register(ATTENTION, _training_attention)


def layer_index(layer: int | float, depth: int) -> int:
    """An index, or a share of the depth (0.75 of 28 layers is layer 21), as an index.

    Raises ValueError when there is no such layer.
    """
    index = layer if isinstance(layer, int) else min(int(layer * depth), depth - 1)
    if not -depth <= index < depth:
        raise ValueError(f"relations.layer = {layer}: the model has layers 0..{depth - 1}")
    return index % depth


def related_layers(
    options: RelationLoss, student: PreTrainedModel, teacher: PreTrainedModel
) -> tuple[int, int]:
    """The student's and the teacher's layer of the relation loss, at the same relative depth."""
    mine, theirs = len(layers_of(student)), len(layers_of(teacher))
    index = layer_index(options.layer, theirs)
    return round(index / max(theirs - 1, 1) * (mine - 1)), index


class Capture:
    """Q, K and V (B, T, D) of one layer, filled by each forward pass of the model."""

    def __init__(self, model: PreTrainedModel, index: int, options: RelationLoss) -> None:
        self.states: list[Tensor] = []
        attention: Any = layers_of(model)[index].self_attn
        self._attention, self._handles = attention, []
        if options.states == "attention":
            attention.bitdistill_capture = self
            return
        for name in _STATE_PROJECTIONS:
            self._handles.append(getattr(attention, name).register_forward_hook(self._hook))

    def _hook(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.states.append(output)

    def clear(self) -> None:
        """Forget what a recomputation in the backward pass may have added."""
        self.states = []

    def take(self) -> tuple[Tensor, ...]:
        """The states of the last forward pass, which are then forgotten."""
        states, self.states = tuple(self.states), []
        if len(states) != 3:
            raise RuntimeError(f"a forward pass captured {len(states)} of the states Q, K and V")
        return states

    def release(self) -> None:
        """Capture no more."""
        for handle in self._handles:
            handle.remove()
        if hasattr(self._attention, "bitdistill_capture"):
            del self._attention.bitdistill_capture
