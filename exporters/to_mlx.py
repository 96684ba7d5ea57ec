"""Student -> MLX: the trained trits, unchanged, in the layout of stock 2-bit affine layers.

    w = scale * code + bias,  code = t + 1 in {0, 1, 2},  scale = D,  bias = -D

is exact, and Apple's own 2-bit kernels read it. `mlx_lm.convert -q --q-bits 2` is no substitute: it
fits a grid of four levels to the minimum and maximum of each group and destroys the trits.

Types in the file. Scales are float16, where D is exact in it (else bfloat16, which always holds D):
a stock layer's output takes their type, so half-precision activations stay half. The embedding and
an untied head are float16, or float32 with `embed_bits` 32. Norms and biases stay float32: they
are a thousandth of the file, keeping them makes the artifact exact but for the embedding, and the
runtime casts them once, at load, to the type it computes in.

`config.json` keeps the student's model_type: a loader that does not know it fails, instead of
dropping the norms inside the linears and running without quantised activations.
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
    quantization,
)
from bitdistill.checkpoint import StudentFiles
from bitdistill.decoder import DecoderSpec
from bitdistill.exporters.base import Options, Progress
from bitdistill.exporters.tensor_files import TensorWriter, bfloat16

_TABLES = (EMBEDDING, HEAD)


def write(student: StudentFiles, out: Path, options: Options, progress: Progress) -> dict[str, Any]:
    """Write the weights and config.json of an MLX artifact into `out`; read them back and compare.

    Returns the manifest's part: parts (bytes), storage, scale_granularity, context. Raises
    ValueError for a student that MLX's 2-bit layout cannot hold, before anything is written, and
    OSError when the disk does not give back what was written.
    """
    if options.embed_bits not in (16, 32):
        raise ValueError(f"embed_bits must be 16 or 32, got {options.embed_bits}")
    spec = student.spec
    # Nothing in the file depends on the context, so it is the model's own unless one is asked for.
    context = spec.context if options.context is None else options.resolve_context(spec.context)
    _check_names(student)
    sizes = _write_tensors(student, out, options.embed_bits, progress)
    entry = quantization(spec, options.embed_bits)
    config = student.config | {"quantization": entry, "quantization_config": entry}
    manifest.write_json(out / "config.json", config)
    _compare(student, out, options.embed_bits, progress)
    return {
        "context": context,
        "storage": {"embedding": f"float{options.embed_bits}", "norms": "float32"},
        "parts": _parts(spec, sizes),
        "scale_granularity": "matrix",
    }


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
    student: StudentFiles, out: Path, embed_bits: int, progress: Progress
) -> dict[str, int]:
    """Write all tensors, one at a time; returns bytes by part."""
    dense, paths = dense_shapes(student.spec), dict(linears(student.spec))
    packed = [f"{p}.{part}" for p in paths for part in linear_shapes(student.spec, paths[p])]
    sizes = dict.fromkeys(("body", "embedding", "head", "norms"), 0)
    with TensorWriter(out, [*dense, *packed]) as writer:
        for done, path in enumerate(paths):
            progress(path, done, 2 * len(paths))
            sizes["body"] += _write_linear(writer, student, path)
        for name in dense:
            sizes[_part(name)] += writer.add(name, _dense(student, name, embed_bits))
    return sizes


def _part(name: str) -> str:
    return {EMBEDDING: "embedding", HEAD: "head"}.get(name, "norms")


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


def _write_linear(writer: TensorWriter, student: StudentFiles, path: str) -> int:
    trits_NK, scale = student.ternary(path)
    rows, columns = trits_NK.shape
    values = np.full((rows, columns // group_size(columns)), scale, np.float32)
    with np.errstate(over="ignore"):
        exact = float(np.float16(scale)) == scale
    size = writer.add(f"{path}.weight", packing.pack_affine(trits_NK))
    for part, array in (("scales", values), ("biases", -values)):
        if exact:
            size += writer.add(f"{path}.{part}", array.astype(np.float16))
        else:
            size += writer.add(f"{path}.{part}", bfloat16(array), "BF16")
    return size


def _dense(student: StudentFiles, name: str, embed_bits: int) -> NDArray[Any]:
    """A tensor that is not ternary, in its storage type; ValueError where float16 overflows."""
    array = student.tensor(name).numpy()
    if not np.isfinite(array).all():
        raise ValueError(f"{name} holds NaN or infinity; the training diverged")
    if name not in _TABLES or embed_bits == 32:
        return array
    if np.abs(array).max() > np.finfo(np.float16).max:
        raise ValueError(f"{name} has values beyond float16's range; export with --embed-bits 32")
    return array.astype(np.float16)


def _compare(student: StudentFiles, out: Path, embed_bits: int, progress: Progress) -> None:
    """Read the written files through MLX and compare every value with the student."""
    tensors: dict[str, mx.array] = {}
    for file in sorted(out.glob("model*.safetensors")):
        tensors |= cast(dict[str, mx.array], mx.load(str(file)))
    paths = dict(linears(student.spec))
    for done, path in enumerate(paths):
        progress(f"checking {path}", len(paths) + done, 2 * len(paths))
        trits_NK, scale = student.ternary(path)
        group = {part: tensors.pop(f"{path}.{part}") for part in ("weight", "scales", "biases")}
        words = np.array(group["weight"])
        same = np.array_equal(packing.unpack_affine(words, trits_NK.shape[1]), trits_NK)
        for part, value in (("scales", scale), ("biases", -scale)):
            same &= bool(mx.all(group[part].astype(mx.float32) == value))
        _demand(same, path)
    for name, array in tensors.items():
        stored = _dense(student, name, embed_bits)
        _demand(np.array_equal(np.array(array), stored), name)
    progress("done", 2 * len(paths), 2 * len(paths))


def _demand(same: bool, name: str) -> None:
    if not same:
        raise OSError(f"{name} was read back different from what was written; check the disk")
