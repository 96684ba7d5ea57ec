"""A ternary student of any family, for MLX and mlx-lm; with mlx_linear.py it needs only mlx.

It is used three ways: `bitdistill.backends` runs MLX artifacts with it; `import bitdistill` gives
it to mlx-lm as the architecture of students (mlx-lm then loads, serves and fine-tunes them); and an
export with `--with-model-file` puts both modules, as one file, into the artifact, for an mlx-lm
without bitdistill. Everything it must know of a model is in config.json under `bitdistill.mlx`; see
`architecture` in mlx_layout.py. Rotary, attention and norms are MLX's own fused operations.

Shapes: B sequences, T tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
from mlx import nn

from bitdistill.backends.mlx_linear import (
    Norm,
    TernaryLinear,
    apply_shared,
    check_ternary,
    check_version,
    fuse,
)


class ModelArgs:
    """`decoder` describes the model; see `architecture` in mlx_layout.py."""

    def __init__(self, model_type: str, decoder: dict[str, Any]) -> None:
        self.model_type, self.decoder = model_type, decoder

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> ModelArgs:
        """From a config.json."""
        return cls(config["model_type"], config["bitdistill"]["mlx"])


class Rotary:
    """Half-split rotation by the model's own frequencies (MLX takes periods)."""

    def __init__(self, frequencies: Sequence[float], scale: float) -> None:
        self.periods = 1.0 / mx.array(list(frequencies), mx.float32)
        self.scale = scale
        self.size = 2 * len(frequencies)

    def __call__(self, x: mx.array, offset: int | mx.array) -> mx.array:
        """Rotate (B, heads, T, head_dim), whose first token is at position `offset`."""
        x = mx.fast.rope(
            x, self.size, traditional=False, base=None, scale=1.0, offset=offset, freqs=self.periods
        )
        return x if self.scale == 1.0 else x * self.scale


def attend(queries: mx.array, cache: Any, keys: mx.array, values: mx.array, **how: Any) -> mx.array:
    """Scaled dot-product attention; an mlx-lm cache of quantised keys brings its own."""
    if hasattr(cache, "bits"):
        from mlx_lm.models.base import scaled_dot_product_attention

        return scaled_dot_product_attention(queries, keys, values, cache=cache, **how)
    return mx.fast.scaled_dot_product_attention(queries, keys, values, **how)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions, optional q/k norms and a cache."""

    def __init__(self, spec: dict[str, Any], make: Callable[[str], TernaryLinear]) -> None:
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, make(f"self_attn.{name}"))
        if spec["qk_norm"]:
            self.q_norm = Norm(spec["head_dim"], spec["norm_eps"], spec["norm_offset"])
            self.k_norm = Norm(spec["head_dim"], spec["norm_eps"], spec["norm_offset"])
        self.scale, self.head_dim = spec["attention_scale"], spec["head_dim"]
        self.mix: Callable[..., mx.array] = mix  # on a CPU another: mlx_host_attention.py

    def heads(self, x_BTN: mx.array) -> mx.array:
        """(B, T, heads * head_dim) -> (B, T, heads, head_dim)."""
        batch, length, _ = x_BTN.shape
        return x_BTN.reshape(batch, length, -1, self.head_dim)

    def __call__(self, x: mx.array, rotary: Rotary, mask: Any, cache: Any) -> mx.array:
        """(B, T, H) -> (B, T, H)."""
        projected = apply_shared((self.q_proj, self.k_proj, self.v_proj), x)
        return self.o_proj(self.mix(self, *projected, rotary, mask, cache))


def mix(
    layer: Attention, q: mx.array, k: mx.array, v: mx.array, rotary: Rotary, mask: Any, cache: Any
) -> mx.array:
    """What attention does between its projections, (B, T, N) -> (B, T, heads * head_dim)."""
    offset = 0 if cache is None else cache.offset
    batch, length, _ = q.shape
    q, k, v = map(layer.heads, (q, k, v))
    if "q_norm" in layer:
        q, k = layer.q_norm(q), layer.k_norm(k)
    q, k, v = (heads.transpose(0, 2, 1, 3) for heads in (q, k, v))
    q, k = rotary(q, offset), rotary(k, offset)
    if cache is not None:
        k, v = cache.update_and_fetch(k, v)
    y = attend(q, cache, k, v, scale=layer.scale, mask=mask)
    return y.transpose(0, 2, 1, 3).reshape(batch, length, -1)


@fuse
def silu_product(gate: mx.array, up: mx.array) -> mx.array:
    """silu(gate) * up."""
    return gate * mx.sigmoid(gate) * up


@fuse
def gelu_product(gate: mx.array, up: mx.array) -> mx.array:
    """gelu(gate) * up, by the tanh approximation."""
    inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
    return 0.5 * gate * (1 + mx.tanh(inner)) * up


class FeedForward(nn.Module):
    """down(act(gate) * up)."""

    def __init__(self, spec: dict[str, Any], make: Callable[[str], TernaryLinear]) -> None:
        super().__init__()
        for name in ("gate_proj", "up_proj", "down_proj"):
            setattr(self, name, make(f"mlp.{name}"))
        self.combine = silu_product if spec["activation"] == "silu" else gelu_product

    def __call__(self, x: mx.array) -> mx.array:
        gate, up = apply_shared((self.gate_proj, self.up_proj), x)
        return self.down_proj(self.combine(gate, up))


class Block(nn.Module):
    """One layer; its norms have the family's names."""

    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__()
        self._names = spec["norms"]
        for name in filter(None, self._names.values()):
            setattr(self, name, Norm(spec["hidden"], spec["norm_eps"], spec["norm_offset"]))

        def make(linear: str) -> TernaryLinear:
            quantized = spec["activation_bits"] is not None
            return TernaryLinear(spec["linears"][linear], spec["added_norm_eps"], quantized)

        self.self_attn = Attention(spec, make)
        self.mlp = FeedForward(spec, make)

    def _norm(self, which: str, x: mx.array) -> mx.array:
        name = self._names[which]
        return x if name is None else self[name](x)

    def __call__(self, x: mx.array, rotary: Rotary, mask: Any, cache: Any) -> mx.array:
        """(B, T, H) -> (B, T, H)."""
        y = self.self_attn(self._norm("input_norm", x), rotary, mask, cache)
        x = x + self._norm("post_attention_norm", y)
        return x + self._norm("post_mlp_norm", self.mlp(self._norm("mlp_norm", x)))


class Backbone(nn.Module):
    """Embedding, layers and final norm."""

    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(spec["vocabulary"], spec["hidden"])
        self.layers = [Block(spec) for _ in spec["layers"]]
        self.norm = Norm(spec["hidden"], spec["norm_eps"], spec["norm_offset"])
        self._scale, self._layers = spec["embedding_scale"], spec["layers"]
        self._rotary = [Rotary(**rotary) for rotary in spec["rotary"]]

    def __call__(self, tokens_BT: mx.array, cache: Any, embeddings: mx.array | None) -> mx.array:
        """Final-norm hidden states (B, T, H); with a cache the tokens follow those held."""
        x = self.embed_tokens(tokens_BT) if embeddings is None else embeddings
        if self._scale != 1.0:
            x = x * self._scale
        caches = cache or [None] * len(self.layers)
        of_window = {layer["window"]: c for layer, c in zip(self._layers, caches, strict=True)}
        masks = {w: attention_mask(x.shape[1], held, w) for w, held in of_window.items()}
        for block, layer, held in zip(self.layers, self._layers, caches, strict=True):
            x = block(x, self._rotary[layer["rotary"]], masks[layer["window"]], held)
        return self.norm(x)


def attention_mask(length: int, cache: Any, window: int | None) -> Any:
    """What `length` queries see: their past, at most `window` tokens of it."""
    if cache is not None:
        return cache.make_mask(length, return_array=False, window_size=window)
    if window is None or window >= length:
        return None if length == 1 else "causal"
    queries, keys = mx.arange(length)[:, None], mx.arange(length)[None]
    return (keys <= queries) & (keys > queries - window)


class Model(nn.Module):
    """The whole decoder, as mlx-lm expects a model to be."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.args, self.model_type, self._spec = args, args.model_type, args.decoder
        self.model = Backbone(args.decoder)
        if not args.decoder["tied"]:
            self.lm_head = nn.Linear(args.decoder["hidden"], args.decoder["vocabulary"], bias=False)
        self.dtype: mx.Dtype | None = None

    @property
    def layers(self) -> list[Block]:
        """The blocks."""
        return self.model.layers

    @property
    def head(self) -> nn.Module:
        """The embedding table where it is also the head, else the head."""
        return self.model.embed_tokens if self._spec["tied"] else self.lm_head

    def load_weights(self, file_or_weights: Any, strict: bool = True) -> Model:
        """Load, then take the type to compute in: `dtype`, else the file's own on Metal, or fp32.

        The file's own is that of the ternary layers where they are in fp32: the embedding's table
        can be in 16 bits for its size alone.

        Raises ValueError for half precision on an mlx whose kernels get it wrong, and for weights
        that are not ternary: for int8 activations one number is taken as the scale of a matrix.
        """
        super().load_weights(file_or_weights, strict)
        linears = {p: m for p, m in self.named_modules() if isinstance(m, TernaryLinear)}
        check_ternary(linears)
        table = self.model.embed_tokens
        wide = any(linear.scales.dtype == mx.float32 for linear in linears.values())
        stored = mx.float32 if wide else table.get("scales", table.weight).dtype
        self.dtype = self.dtype or (stored if mx.metal.is_available() else mx.float32)
        check_version(self.dtype)
        for module in {id(m): m for m in (table, self.head)}.values():
            floats = {k: v for k, v in module.parameters().items() if v.dtype != mx.uint32}
            module.update({k: v.astype(self.dtype) for k, v in floats.items()})
        for module in self.modules():
            if isinstance(module, Norm | TernaryLinear):
                module.prepare(self.dtype)
        return self

    def hidden(self, tokens_BT: mx.array, cache: Any = None, embeddings: Any = None) -> mx.array:
        """Final-norm hidden states (B, T, H)."""
        return self.model(tokens_BT, cache, embeddings)

    def __call__(
        self, inputs: mx.array, cache: Any = None, input_embeddings: mx.array | None = None
    ) -> mx.array:
        """Token ids (B, T) -> logits (B, T, V)."""
        return self.logits(self.hidden(inputs, cache, input_embeddings))

    def logits(self, hidden: mx.array) -> mx.array:
        """(..., H) -> (..., V)."""
        return self.head.as_linear(hidden) if self._spec["tied"] else self.head(hidden)

    def make_cache(self) -> list[Any]:
        """An mlx-lm cache for each layer, of the layer's window where it has one."""
        from mlx_lm.models.cache import KVCache, RotatingKVCache

        windows = [layer["window"] for layer in self._spec["layers"]]
        return [RotatingKVCache(max_size=window) if window else KVCache() for window in windows]
