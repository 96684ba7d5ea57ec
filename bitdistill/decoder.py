"""What a runtime must know of a decoder, whatever its family: one table, one dataclass.

Exporters and runtimes read a `DecoderSpec` and never a Hugging Face config, so a family is added
here once: a row in FAMILIES, and the lines in `decoder_spec` that say how its config spells it.
The spec is plain JSON (it is stored in every artifact's manifest). Only `config_class` and
`decoder_spec` need transformers: rotary frequencies are taken from the family's own module.

A block, with the parts a family may lack in brackets:

    h = x + [post_attention_norm] o_proj(attention([q_norm] q, [k_norm] k, v))    of input_norm(x)
    x = h + [post_mlp_norm] down_proj(act(gate) * up)                             of mlp_norm(h)

Every linear may own an RMSNorm on its input (`norm_style`): `paper` (SubLN) on o_proj and
down_proj, `allnorm` on all seven, `none` on none.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

NormStyle = Literal["paper", "allnorm", "none"]

ATTENTION_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_LINEARS = ("gate_proj", "up_proj", "down_proj")
LINEARS = tuple(f"self_attn.{n}" for n in ATTENTION_LINEARS) + tuple(
    f"mlp.{n}" for n in MLP_LINEARS
)
NORMED_LINEARS: dict[str, frozenset[str]] = {
    "paper": frozenset({"self_attn.o_proj", "mlp.down_proj"}),
    "allnorm": frozenset(LINEARS),
    "none": frozenset(),
}
MODEL_TYPE_PREFIX = "bitdistill_"


@dataclass(frozen=True)
class Family:
    """How one Hugging Face architecture spells the parts of a block.

    `input_norm`, `mlp_norm`, `post_attention_norm` and `post_mlp_norm` are module names below a
    layer. `module` is the transformers module; `prefix` its class prefix. `qkv_bias`: q, k and v
    have biases, which no config says. `half` is the 16-bit type that MLX computes in and stores.
    """

    module: str
    prefix: str
    input_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    post_attention_norm: str | None = None
    post_mlp_norm: str | None = None
    qk_norm: bool = False
    qkv_bias: bool = False
    norm_offset: float = 0.0
    scaled_embedding: bool = False
    config: str = "Config"
    half: Literal["float16", "bfloat16"] = "float16"


FAMILIES: dict[str, Family] = {
    "llama": Family("llama", "Llama"),
    "qwen2": Family("qwen2", "Qwen2", qkv_bias=True),
    "qwen3": Family("qwen3", "Qwen3", qk_norm=True),
    "gemma3_text": Family(
        "gemma3",
        "Gemma3",
        mlp_norm="pre_feedforward_layernorm",
        post_attention_norm="post_attention_layernorm",
        post_mlp_norm="post_feedforward_layernorm",
        qk_norm=True,
        norm_offset=1.0,
        scaled_embedding=True,
        config="TextConfig",
        half="bfloat16",  # mlx-lm sums residuals in float16 where the embedding is float16
    ),
}


def family_of(model_type: str) -> str:
    """The family of a teacher's or student's model_type; ValueError names the known ones."""
    family = model_type.removeprefix(MODEL_TYPE_PREFIX)
    if family not in FAMILIES:
        raise ValueError(
            f"architecture {model_type!r} is not supported; known: {', '.join(FAMILIES)} "
            "(add a row to FAMILIES in bitdistill/decoder.py)"
        )
    return family


@functools.cache
def config_class(family: str) -> type[Any]:
    """The student's config class of a family: the stock one under our model_type."""
    row = FAMILIES[family]
    module = import_module(f"transformers.models.{row.module}.configuration_{row.module}")
    stock = getattr(module, f"{row.prefix}{row.config}")
    body = {"model_type": MODEL_TYPE_PREFIX + family, "__module__": __name__}
    return type(f"Bitdistill{row.prefix}Config", (stock,), body)


@dataclass(frozen=True)
class LayerSpec:
    """One layer: its rotary table (an index into `rotary`) and attention window (None = global)."""

    rotary: int
    window: int | None


@dataclass(frozen=True)
class RotarySpec:
    """angle(position, i) = position * frequencies[i]; cos and sin are multiplied by `scale`.

    Half-split rotation as in Hugging Face: element i pairs with i + head_dim / 2.
    """

    frequencies: tuple[float, ...]
    scale: float

    def tables(self, positions: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """cos and sin of the first `positions`, float32 (positions, head_dim / 2).

        Angles are rounded to fp32 as in Hugging Face, whose model this has to equal: at position
        8000 that rounding is worth 5e-4 radians. Their cosines are taken in fp64.
        """
        turns = np.arange(positions, dtype=np.float32)
        angles = np.outer(turns, np.array(self.frequencies, np.float32)).astype(np.float64)
        cos, sin = np.cos(angles) * self.scale, np.sin(angles) * self.scale
        return cos.astype(np.float32), sin.astype(np.float32)


@dataclass(frozen=True)
class DecoderSpec:
    """Sizes and switches of a whole decoder. Weights are (out, in); names are the checkpoint's."""

    family: str
    vocabulary: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int
    norm_eps: float
    norm_offset: float  # gemma: a block or qk norm multiplies by (offset + weight)
    activation: Literal["silu", "gelu_tanh"]
    attention_scale: float  # multiplies q . k
    embedding_scale: float
    tied: bool
    qkv_bias: bool
    output_bias: bool  # o_proj has a bias
    mlp_bias: bool
    qk_norm: bool
    norm_style: NormStyle
    added_norm_eps: float
    activation_bits: int | None
    rotary: tuple[RotarySpec, ...]
    layers: tuple[LayerSpec, ...]

    @property
    def names(self) -> Family:
        """The family's module names."""
        return FAMILIES[self.family]

    def has_norm(self, linear: str) -> bool:
        """Whether `linear` (one of LINEARS) owns an RMSNorm on its input."""
        return linear in NORMED_LINEARS[self.norm_style]

    def has_bias(self, linear: str) -> bool:
        """Whether `linear` (one of LINEARS) has a bias."""
        if linear.startswith("mlp."):
            return self.mlp_bias
        return self.output_bias if linear.endswith("o_proj") else self.qkv_bias

    def shape(self, linear: str) -> tuple[int, int]:
        """(out, in) of one of LINEARS."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "self_attn.q_proj": (queries, self.hidden),
            "self_attn.k_proj": (keys, self.hidden),
            "self_attn.v_proj": (keys, self.hidden),
            "self_attn.o_proj": (self.hidden, queries),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }[linear]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> DecoderSpec:
        """The inverse of `to_json`, through JSON text or not; ValueError for odd rotary tables."""
        rotary = tuple(RotarySpec(tuple(r["frequencies"]), r["scale"]) for r in value["rotary"])
        layers = tuple(LayerSpec(**layer) for layer in value["layers"])
        if any(2 * len(table.frequencies) != value["head_dim"] for table in rotary):
            raise ValueError(
                f"rotary tables are not of half the head size {value['head_dim']}, so the "
                "decoder's description was altered; export the student again"
            )
        return cls(**{**value, "rotary": rotary, "layers": layers})


def _activation(config: dict[str, Any]) -> Literal["silu", "gelu_tanh"]:
    name = config.get("hidden_activation") or config.get("hidden_act")
    known: dict[str | None, Literal["silu", "gelu_tanh"]]
    known = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
    if name not in known:
        raise ValueError(
            f"activation {name!r} is not supported; known: {', '.join(map(str, known))}"
        )
    return known[name]


def _rotary(family: Family, config: Any) -> tuple[list[str], tuple[RotarySpec, ...]]:
    """Rotary tables by layer type, read from the family's own rotary module (which is cheap)."""
    modeling = import_module(f"transformers.models.{family.module}.modeling_{family.module}")
    module = getattr(modeling, f"{family.prefix}RotaryEmbedding")(config)
    kinds = sorted(set(config.layer_types or ())) if not hasattr(module, "inv_freq") else [""]
    tables = []
    for kind in kinds:
        prefix = f"{kind}_" if kind else ""
        rope_type = module.rope_type[kind] if kind else module.rope_type
        if rope_type in ("dynamic", "longrope"):
            raise ValueError(f"rope type {rope_type!r} changes with length; it cannot be exported")
        frequencies = getattr(module, f"{prefix}inv_freq").tolist()
        tables.append(
            RotarySpec(tuple(frequencies), float(getattr(module, f"{prefix}attention_scaling")))
        )
    return kinds, tuple(tables)


def head_width(config: Any) -> int:
    """Width of an attention head; some configurations leave it to their other sizes."""
    stated: int | None = getattr(config, "head_dim", None)
    return stated or int(config.hidden_size) // int(config.num_attention_heads)


def decoder_spec(config: Any) -> DecoderSpec:
    """The spec of a student from its (transformers) config, as `config_class` makes it.

    Raises ValueError for an architecture, activation or rotary type that is not supported.
    """
    family = FAMILIES[family_of(config.model_type)]
    values = config.to_dict()
    for cap in ("attn_logit_softcapping", "final_logit_softcapping"):
        if values.get(cap) is not None:
            raise ValueError(f"{cap} is not supported")
    if values.get("use_bidirectional_attention"):
        raise ValueError("use_bidirectional_attention is not supported: a decoder's is causal")
    head_dim = head_width(config)
    kinds, rotary = _rotary(family, config)
    layer_types = getattr(config, "layer_types", None) or ["full_attention"] * (
        config.num_hidden_layers
    )
    layers = tuple(
        LayerSpec(
            rotary=kinds.index(kind) if len(kinds) > 1 else 0,
            window=config.sliding_window if kind == "sliding_attention" else None,
        )
        for kind in layer_types
    )
    bias = bool(values.get("attention_bias", False))
    scale = values.get("query_pre_attn_scalar") or head_dim
    extra = config.bitdistill
    return DecoderSpec(
        family=family_of(config.model_type),
        vocabulary=config.vocab_size,
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        context=config.max_position_embeddings,
        norm_eps=config.rms_norm_eps,
        norm_offset=family.norm_offset,
        activation=_activation(values),
        attention_scale=scale**-0.5,
        embedding_scale=config.hidden_size**0.5 if family.scaled_embedding else 1.0,
        tied=bool(config.tie_word_embeddings),
        qkv_bias=bias or family.qkv_bias,
        output_bias=bias and not family.qkv_bias,  # transformers ignores the setting there
        mlp_bias=bool(values.get("mlp_bias", False)),
        qk_norm=family.qk_norm,
        norm_style=extra["norm_style"],
        added_norm_eps=extra["added_norm_eps"],
        activation_bits=extra["activation_bits"],
        rotary=rotary,
        layers=layers,
    )
