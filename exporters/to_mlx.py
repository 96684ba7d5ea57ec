"""Student -> MLX: the trained trits, unchanged, in the layout of stock 2-bit affine layers.

    w = scale * code + bias,  code = t + 1 in {0, 1, 2},  scale = D,  bias = -D

is exact, and Apple's own 2-bit kernels read it. `mlx_lm.convert -q --q-bits 2` is no substitute: it
fits a grid of four levels to the minimum and maximum of each group and destroys the trits.

Types in the file. `dtype` (float16, for Gemma bfloat16) is what an Apple machine computes in.
Scales have it, or bfloat16, which always holds D, where float16 does not. Embedding and head are in
the 16-bit type, in float32, or in MLX's affine 8, 6 or 4 bits. Norms and biases stay float32: they
are a thousandth of the file, keeping them makes the artifact exact but for the embedding, and our
architecture casts them once, at load. Only in a stock artifact, whose loader casts nothing, they
have `dtype` too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from bitdistill import manifest, packing
from bitdistill.backends.mlx_layout import (
    EMBEDDING,
    HEAD,
    dense_shapes,
    group_size,
    linear_shapes,
    linears,
    table_group,
)
from bitdistill.checkpoint import StudentFiles
from bitdistill.decoder import FAMILIES, DecoderSpec
from bitdistill.exporters.base import Options, Progress
from bitdistill.exporters.mlx_card import loaders
from bitdistill.exporters.mlx_config import artifact_config, artifact_spec, write_model_file
from bitdistill.exporters.mlx_tables import affine, equals, half, holds
from bitdistill.exporters.tensor_files import TensorWriter

EMBED_BITS = (32, 16, 8, 6, 4)
WEIGHT_BITS = (2.0,)
OPTIONS = ("activation_bits", "dtype", "model_file")
_TABLES = (EMBEDDING, HEAD)
_AFFINE = ("weight", "scales", "biases")


def write(student: StudentFiles, out: Path, options: Options, progress: Progress) -> dict[str, Any]:
    """Write the weights and config.json of an MLX artifact into `out`; read them back and compare.

    Returns the manifest's part: parts (bytes), storage, scale_granularity, context. Raises
    ValueError for a student that MLX's 2-bit layout cannot hold, before anything is written, and
    OSError when the disk does not give back what was written.
    """
    spec = artifact_spec(student, options)
    # Nothing in the file depends on the context, so it is the model's own unless one is asked for.
    context = spec.context if options.context is None else options.resolve_context(spec.context)
    _check_names(student)
    config, not_stock = artifact_config(student, spec, options)
    types = _Types(spec, options, stock=not_stock is None)
    sizes = _write_tensors(student, out, types, progress)
    manifest.write_json(out / "config.json", config)
    if "model_file" in config:
        write_model_file(out)
    _compare(student, out, types, progress)
    return {
        "context": context,
        "decoder": spec.to_json(),
        "storage": types.storage,
        "parts": _parts(spec, sizes),
        "scale_granularity": "matrix",
        "loaders": loaders(config, not_stock),
    }


class _Types:
    """How each tensor that is not ternary is stored."""

    def __init__(self, spec: DecoderSpec, options: Options, stock: bool) -> None:
        self.spec, self.bits = spec, options.embed_bits
        own = FAMILIES[spec.family].half
        self.dtype = options.dtype or own
        self.table = own if self.dtype == "float32" else self.dtype
        self.norm = self.dtype if stock else "float32"

    @property
    def storage(self) -> dict[str, str]:
        """Types by part, for the manifest."""
        table = {32: "float32", 16: self.table}.get(self.bits, f"affine{self.bits}")
        return {"embedding": table, "norms": self.norm, "biases": self.norm}

    def scale(self, scale: float) -> str:
        """The type of a ternary matrix's scales: one that holds D exactly."""
        with np.errstate(over="ignore"):
            exact = self.dtype != "float16" or float(np.float16(scale)) == scale
        return self.dtype if exact else "bfloat16"

    def tensors(self, name: str, array: NDArray[np.float32]) -> dict[str, Any]:
        """What is stored for a tensor that is not ternary: name -> (array, raw type)."""
        if not np.isfinite(array).all():
            raise ValueError(f"{name} holds NaN or infinity; the training diverged")
        if name not in _TABLES:
            return {name: half(name, array, self.norm)}
        if self.bits >= 16:
            return {name: half(name, array, self.storage["embedding"])}
        path = name.removesuffix(".weight")
        words, *pair = affine(array, table_group(self.spec), self.bits)
        scales, biases = (half(name, values, self.dtype) for values in pair)
        return {name: (words, None), f"{path}.scales": scales, f"{path}.biases": biases}


def _check_names(student: StudentFiles) -> None:
    """Refuse a student with a tensor too many or too few, before the long work."""
    expected = set(dense_shapes(student.spec))
    expected |= {f"{path}.weight" for path, _ in linears(student.spec)}
    found = set(student.names)
    if student.spec.tied:
        found.discard(HEAD)
    if difference := sorted(expected ^ found):
        raise manifest.FormatError(
            f"{student.path} does not hold exactly the tensors of its architecture "
            f"({len(difference)} differ: {', '.join(difference[:3])}); train or copy it again"
        )


def _write_tensors(
    student: StudentFiles, out: Path, types: _Types, progress: Progress
) -> dict[str, int]:
    """Write all tensors, one at a time; returns bytes by part."""
    dense, paths = dense_shapes(types.spec), dict(linears(types.spec))
    packed = [f"{p}.{part}" for p in paths for part in linear_shapes(types.spec, paths[p])]
    tables = [f"{name.removesuffix('weight')}{part}" for name in _TABLES for part in _AFFINE[1:]]
    sizes = dict.fromkeys(("body", "embedding", "head", "norms"), 0)
    with TensorWriter(out, [*dense, *packed, *tables]) as writer:
        for done, path in enumerate(paths):
            progress(path, done, 2 * len(paths))
            sizes["body"] += _write_linear(writer, student, path, types)
        for name in dense:
            part = {EMBEDDING: "embedding", HEAD: "head"}.get(name, "norms")
            for stored, value in types.tensors(name, student.tensor(name).numpy()).items():
                sizes[part] += writer.add(stored, *value)
    return sizes


def _parts(spec: DecoderSpec, sizes: dict[str, int]) -> dict[str, Any]:
    """Bytes by part, and bits per weight of the body (scales included) and of the tables."""
    weights = sum(int(np.prod(spec.shape(linear))) for _, linear in linears(spec))
    table = spec.vocabulary * spec.hidden * (1 if spec.tied else 2)
    total = sum(sizes.values())
    return {
        **sizes,
        "total": total,
        "body_bits_per_weight": 8 * sizes["body"] / weights,
        "embedding_bits_per_weight": 8 * (sizes["embedding"] + sizes["head"]) / table,
        "total_bits_per_weight": 8 * total / (weights + table),
    }


def _write_linear(writer: TensorWriter, student: StudentFiles, path: str, types: _Types) -> int:
    trits_NK, scale = student.ternary(path)
    rows, columns = trits_NK.shape
    values = np.full((rows, columns // group_size(columns)), scale, np.float32)
    size = writer.add(f"{path}.weight", packing.pack_affine(trits_NK))
    for part, array in (("scales", values), ("biases", -values)):
        size += writer.add(f"{path}.{part}", *half(path, array, types.scale(scale)))
    return size


def _compare(student: StudentFiles, out: Path, types: _Types, progress: Progress) -> None:
    """Read the written files through MLX and compare every value with the student."""
    tensors: dict[str, mx.array] = {}
    for file in sorted(out.glob("model*.safetensors")):
        tensors |= cast(dict[str, mx.array], mx.load(str(file)))
    paths = dict(linears(types.spec))
    for done, path in enumerate(paths):
        progress(f"checking {path}", len(paths) + done, 2 * len(paths))
        trits_NK, scale = student.ternary(path)
        words, *pair = (tensors.pop(f"{path}.{part}") for part in _AFFINE)
        same = np.array_equal(packing.unpack_affine(np.array(words), trits_NK.shape[1]), trits_NK)
        for stored, value in zip(pair, (scale, -scale), strict=True):
            same &= bool(mx.all(stored.astype(mx.float32) == value))
        _demand(same, path)
    for name in dense_shapes(types.spec):
        array = student.tensor(name).numpy()
        path = name.removesuffix(".weight")
        if name in _TABLES and types.bits < 16:
            table = {part: tensors.pop(f"{path}.{part}") for part in _AFFINE}
            _demand(holds(table, array, table_group(types.spec), types.bits), name)
        else:
            _demand(equals(tensors.pop(name), array), name)
    _demand(not tensors, ", ".join(tensors))
    progress("done", 2 * len(paths), 2 * len(paths))


def _demand(same: bool, name: str) -> None:
    if not same:
        raise OSError(f"{name} was read back different from what was written; check the disk")
