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

from bitdistill.decoder import LINEARS, DecoderSpec

BITS = 2
GROUP_SIZES = (128, 64, 32)
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
    names, layer = spec.names, f"model.layers.{index}"
    norms = (names.input_norm, names.mlp_norm, names.post_attention_norm, names.post_mlp_norm)
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


def quantization(spec: DecoderSpec) -> dict[str, object]:
    """The `quantization` entry of config.json: the commonest group, and the paths that differ."""
    sizes = {path: group_size(spec.shape(linear)[1]) for path, linear in linears(spec)}
    common = max(GROUP_SIZES, key=list(sizes.values()).count)
    entry: dict[str, object] = {"group_size": common, "bits": BITS, "mode": "affine"}
    for path, size in sizes.items():
        if size != common:
            entry[path] = {"group_size": size, "bits": BITS, "mode": "affine"}
    return entry
