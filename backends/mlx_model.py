"""A decoder of any family in mlx.nn, built from a DecoderSpec (see decoder.py for the block).

Module names are those of the checkpoint, so the file's tensors load by name. Rotary, attention and
norms are MLX's own fused operations. Nothing here knows files or tokens: see mlx_runtime.py.

Shapes: B sequences, T tokens, H hidden, V vocabulary, S keys (cached and new).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import mlx.core as mx
from mlx import nn

from bitdistill.backends.mlx_linear import Norm, Precision, TernaryLinear, apply_shared
from bitdistill.decoder import DecoderSpec, LayerSpec, RotarySpec

Mask: TypeAlias = mx.array | str | None


class KeyValueCache:
    """Keys and values of one sequence in every layer; `length` tokens are held, `capacity` fit."""

    def __init__(self, spec: DecoderSpec, capacity: int, dtype: mx.Dtype) -> None:
        shape = (1, spec.kv_heads, capacity, spec.head_dim)
        self.length, self.capacity = 0, capacity
        self.keys = [mx.zeros(shape, dtype) for _ in spec.layers]
        self.values = [mx.zeros(shape, dtype) for _ in spec.layers]

    def extend(self, layer: int, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Write new keys and values behind those held; returns all of them. Length stays."""
        end = self.length + keys.shape[2]
        self.keys[layer][:, :, self.length : end] = keys
        self.values[layer][:, :, self.length : end] = values
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]


class Rotary:
    """Half-split rotation by the spec's own frequencies (MLX takes periods)."""

    def __init__(self, spec: RotarySpec) -> None:
        self.periods = 1.0 / mx.array(spec.frequencies, mx.float32)
        self.scale = spec.scale
        self.size = 2 * len(spec.frequencies)

    def __call__(self, x: mx.array, offset: int) -> mx.array:
        """Rotate (B, heads, T, head_dim), whose first token is at position `offset`."""
        x = mx.fast.rope(
            x, self.size, traditional=False, base=None, scale=1.0, offset=offset, freqs=self.periods
        )
        return x if self.scale == 1.0 else x * self.scale


class Attention(nn.Module):
    """Grouped-query attention with rotary positions, optional q/k norms and a cache."""

    def __init__(self, spec: DecoderSpec, make: Callable[[str], TernaryLinear]) -> None:
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, make(f"self_attn.{name}"))
        if spec.qk_norm:
            self.q_norm = Norm(spec.head_dim, spec.norm_eps, spec.norm_offset)
            self.k_norm = Norm(spec.head_dim, spec.norm_eps, spec.norm_offset)
        self._scale = spec.attention_scale
        self._head_dim = spec.head_dim

    def _heads(self, x_BTN: mx.array, norm: str, rotary: Rotary, offset: int) -> mx.array:
        batch, length, _ = x_BTN.shape
        x = x_BTN.reshape(batch, length, -1, self._head_dim)
        if norm in self:
            x = self[norm](x)
        return rotary(x.transpose(0, 2, 1, 3), offset)

    def __call__(
        self, x: mx.array, rotary: Rotary, mask: Mask, cache: KeyValueCache | None, layer: int
    ) -> mx.array:
        """(B, T, H) -> (B, T, H)."""
        batch, length, _ = x.shape
        offset = 0 if cache is None else cache.length
        q, k, v = apply_shared((self.q_proj, self.k_proj, self.v_proj), x)
        queries = self._heads(q, "q_norm", rotary, offset)
        keys = self._heads(k, "k_norm", rotary, offset)
        values = v.reshape(batch, length, -1, self._head_dim).transpose(0, 2, 1, 3)
        if cache is not None:
            keys, values = cache.extend(layer, keys, values)
        y = mx.fast.scaled_dot_product_attention(
            queries, keys, values, scale=self._scale, mask=mask
        )
        return self.o_proj(y.transpose(0, 2, 1, 3).reshape(batch, length, -1))


class FeedForward(nn.Module):
    """down(act(gate) * up)."""

    def __init__(self, spec: DecoderSpec, make: Callable[[str], TernaryLinear]) -> None:
        super().__init__()
        for name in ("gate_proj", "up_proj", "down_proj"):
            setattr(self, name, make(f"mlp.{name}"))
        self._activation = nn.silu if spec.activation == "silu" else nn.gelu_approx

    def __call__(self, x: mx.array) -> mx.array:
        gate, up = apply_shared((self.gate_proj, self.up_proj), x)
        return self.down_proj(self._activation(gate) * up)


class Block(nn.Module):
    """One layer; its norms have the family's names."""

    def __init__(self, spec: DecoderSpec, layer: LayerSpec) -> None:
        super().__init__()
        names = self._names = spec.names
        for name in (
            names.input_norm,
            names.mlp_norm,
            names.post_attention_norm,
            names.post_mlp_norm,
        ):
            if name is not None:
                setattr(self, name, Norm(spec.hidden, spec.norm_eps, spec.norm_offset))

        def make(linear: str) -> TernaryLinear:
            eps = spec.added_norm_eps if spec.has_norm(linear) else None
            bias = spec.has_bias(linear)
            return TernaryLinear(spec.shape(linear), bias, eps, spec.activation_bits)

        self.self_attn = Attention(spec, make)
        self.mlp = FeedForward(spec, make)
        self._layer = layer

    def _after(self, name: str | None, x: mx.array) -> mx.array:
        return x if name is None else self[name](x)

    def __call__(
        self,
        x: mx.array,
        rotary: list[Rotary],
        masks: dict[int | None, Mask],
        cache: KeyValueCache | None,
        index: int,
    ) -> mx.array:
        """(B, T, H) -> (B, T, H)."""
        names, layer = self._names, self._layer
        mask = masks[layer.window]
        y = self.self_attn(self[names.input_norm](x), rotary[layer.rotary], mask, cache, index)
        x = x + self._after(names.post_attention_norm, y)
        return x + self._after(names.post_mlp_norm, self.mlp(self[names.mlp_norm](x)))


class Backbone(nn.Module):
    """Embedding, layers and final norm."""

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(spec.vocabulary, spec.hidden)
        self.layers = [Block(spec, layer) for layer in spec.layers]
        self.norm = Norm(spec.hidden, spec.norm_eps, spec.norm_offset)


def attention_mask(length: int, offset: int, window: int | None) -> Mask:
    """What `length` queries behind `offset` keys see: their past, at most `window` tokens of it."""
    total = offset + length
    if window is None or window >= total:
        return None if length == 1 else "causal"
    queries, keys = mx.arange(offset, total)[:, None], mx.arange(total)[None]
    return (keys <= queries) & (keys > queries - window)


class Decoder(nn.Module):
    """Tokens -> hidden states -> logits. Load weights, then `prepare`, then call."""

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self.model = Backbone(spec)
        if not spec.tied:
            self.lm_head = nn.Linear(spec.hidden, spec.vocabulary, bias=False)
        self._spec = spec
        self._rotary = [Rotary(rotary) for rotary in spec.rotary]

    def prepare(self, precision: Precision) -> None:
        """Check and convert the loaded weights; ValueError names the module that is malformed."""
        owned = {id(m.norm) for m in self.modules() if isinstance(m, TernaryLinear) and m.has_norm}
        for path, module in self.named_modules():
            if isinstance(module, TernaryLinear):
                try:
                    module.prepare(precision)
                except ValueError as error:
                    raise ValueError(f"{path}: {error}; export the student again") from None
            elif isinstance(module, Norm) and id(module) not in owned:
                module.prepare(precision.dtype)
        tables = [self.model.embed_tokens] + ([] if self._spec.tied else [self.lm_head])
        for table in tables:
            table.weight = table.weight.astype(precision.dtype)
            mx.eval(table.weight)

    def hidden(self, tokens_BT: mx.array, cache: KeyValueCache | None = None) -> mx.array:
        """Final-norm hidden states (B, T, H); with a cache (B = 1) the tokens follow those held."""
        spec, length = self._spec, tokens_BT.shape[1]
        offset = 0 if cache is None else cache.length
        windows = {layer.window for layer in spec.layers}
        masks = {window: attention_mask(length, offset, window) for window in windows}
        x = self.model.embed_tokens(tokens_BT)
        if spec.embedding_scale != 1.0:
            x = x * spec.embedding_scale
        for index, layer in enumerate(self.model.layers):
            x = layer(x, self._rotary, masks, cache, index)
        if cache is not None:
            cache.length += length
        return self.model.norm(x)

    def logits(self, hidden_PH: mx.array) -> mx.array:
        """(P, H) -> fp32 (P, V). The table stands on the left: BLAS is faster at that order."""
        table = self.model.embed_tokens if self._spec.tied else self.lm_head
        return (table.weight @ hidden_PH.T).T.astype(mx.float32)
