"""The tensors of an MLX artifact: names, shapes and group sizes, for its writer and its reader.

The layout is the stock one of mlx.nn: a ternary linear `PATH` of shape (N, K) is a 2-bit affine
`QuantizedLinear`, that is `PATH.weight` uint32 (N, K/16), `PATH.scales` = D and `PATH.biases` = -D,
both (N, K/group). Everything else keeps the student's name and shape; `PATH.bias` and
`PATH.norm.weight` (the RMSNorm a linear owns) stand beside the packed tensors. A tied head is
stored once, as the embedding.

MLX knows groups of 32, 64 and 128 columns; a larger group costs fewer bits, so the largest that
divides K is taken: 2.25, 2.5 or 3 bits a weight with 16-bit scales.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bitdistill.decoder import LINEARS, DecoderSpec

BITS = 2
GROUP_SIZES = (128, 64, 32)
TABLE_GROUPS = (64, 32)  # finer than it need be: 8-bit embeddings then cost 8.5 bits
BLOCK_NORMS = ("input_norm", "mlp_norm", "post_attention_norm", "post_mlp_norm")
COPIED = (
    *("vocabulary", "hidden", "head_dim", "tied", "activation", "activation_bits", "qk_norm"),
    *("attention_scale", "embedding_scale", "norm_eps", "norm_offset", "added_norm_eps"),
    *("rotary", "layers"),
)
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"

Shapes = dict[str, tuple[int, ...]]


def group_size(columns: int) -> int:
    """The largest group of MLX that divides K; ValueError where none does."""
    for size in GROUP_SIZES:
        if columns % size == 0:
            return size
    raise ValueError(
        f"MLX stores 2-bit weights in groups of 32, 64 or 128 columns and K = {columns} is "
        "divisible by none of them; export this student with --target onnx"
    )


def linears(spec: DecoderSpec) -> Iterator[tuple[str, str]]:
    """(path, kind) of every ternary linear; the kind is one of LINEARS."""
    for index in range(len(spec.layers)):
        for linear in LINEARS:
            yield f"model.layers.{index}.{linear}", linear


def linear_shapes(spec: DecoderSpec, linear: str) -> Shapes:
    """Shapes of the packed tensors of a linear, by the last part of their names."""
    rows, columns = spec.shape(linear)
    groups = columns // group_size(columns)
    return {"weight": (rows, columns // 16), "scales": (rows, groups), "biases": (rows, groups)}


def _layer_shapes(spec: DecoderSpec, index: int) -> Shapes:
    layer = f"model.layers.{index}"
    norms = [getattr(spec.names, norm) for norm in BLOCK_NORMS]
    shapes: Shapes = {f"{layer}.{norm}.weight": (spec.hidden,) for norm in norms if norm}
    if spec.qk_norm:
        for norm in ("q_norm", "k_norm"):
            shapes[f"{layer}.self_attn.{norm}.weight"] = (spec.head_dim,)
    for linear in LINEARS:
        rows, columns = spec.shape(linear)
        if spec.has_norm(linear):
            shapes[f"{layer}.{linear}.norm.weight"] = (columns,)
        if spec.has_bias(linear):
            shapes[f"{layer}.{linear}.bias"] = (rows,)
    return shapes


def dense_shapes(spec: DecoderSpec) -> Shapes:
    """Name and shape of every tensor that is not ternary."""
    shapes: Shapes = {EMBEDDING: (spec.vocabulary, spec.hidden)}
    for index in range(len(spec.layers)):
        shapes |= _layer_shapes(spec, index)
    shapes["model.norm.weight"] = (spec.hidden,)
    if not spec.tied:
        shapes[HEAD] = (spec.vocabulary, spec.hidden)
    return shapes


def table_group(spec: DecoderSpec) -> int:
    """Columns that share a scale in a quantised embedding or head; ValueError where none fits."""
    return next((size for size in TABLE_GROUPS if spec.hidden % size == 0), group_size(spec.hidden))


def table_paths(spec: DecoderSpec) -> list[str]:
    """The modules that hold the embedding and an untied head."""
    return [
        name.removesuffix(".weight") for name in ((EMBEDDING,) if spec.tied else (EMBEDDING, HEAD))
    ]


def quantization(spec: DecoderSpec, embed_bits: int) -> dict[str, object]:
    """The `quantization` entry of config.json: the commonest group, and the paths that differ."""
    sizes = {path: group_size(spec.shape(linear)[1]) for path, linear in linears(spec)}
    common = max(GROUP_SIZES, key=list(sizes.values()).count)
    entry: dict[str, object] = {"group_size": common, "bits": BITS, "mode": "affine"}
    for path, size in sizes.items():
        if size != common:
            entry[path] = {"group_size": size, "bits": BITS, "mode": "affine"}
    if embed_bits < 16:
        for path in table_paths(spec):
            entry[path] = {"group_size": table_group(spec), "bits": embed_bits, "mode": "affine"}
    return entry


def architecture(spec: DecoderSpec) -> dict[str, Any]:
    """What mlx_architecture.py must know of a model, as plain JSON; see DecoderSpec for the words.

    `linears` gives each of LINEARS its rows, columns, group, and whether it has a bias and a norm.
    """
    values = spec.to_json()
    return {key: values[key] for key in COPIED} | {
        "norms": {name: getattr(spec.names, name) for name in BLOCK_NORMS},
        "linears": {
            linear: {
                "rows": rows,
                "columns": columns,
                "group": group_size(columns),
                "bias": spec.has_bias(linear),
                "norm": spec.has_norm(linear),
            }
            for linear in LINEARS
            for rows, columns in [spec.shape(linear)]
        },
    }
