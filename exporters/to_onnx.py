"""Student -> ONNX Runtime (CPU): model.onnx, its weights in model.onnx.data.

The graph is built directly (onnx_graph.py) and its tensors are streamed to the data file, so the
memory needed is that of the largest tensor. What was written is then read back: every trit and
scale is recovered from the packed bytes and compared with the student, and every tensor of the
student must have been used. The model needs the custom-op library that bitdistill installs.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from bitdistill import packing, tables
from bitdistill.backends import kv_cache
from bitdistill.backends.embedding_file import NAME as EMBEDDING_FILE
from bitdistill.checkpoint import StudentFiles
from bitdistill.decoder import LINEARS, DecoderSpec
from bitdistill.exporters import onnx_attention as attention
from bitdistill.exporters import onnx_classifier as classifier
from bitdistill.exporters import onnx_genai as genai
from bitdistill.exporters.base import ExportError, Options, Progress
from bitdistill.exporters.onnx_graph import DecoderGraph
from bitdistill.exporters.onnx_layout import stored_linears
from bitdistill.exporters.onnx_linears import DEFAULT, OPERATORS
from bitdistill.exporters.onnx_tables import STORAGE, check_finite, compare, read_table
from bitdistill.exporters.onnx_tensors import TensorFile
from bitdistill.manifest import FormatError

EMBED_BITS = (32, 16, 8, 4)
WEIGHT_BITS = tuple(packing.LAYOUTS)
OPS = tuple(OPERATORS)
KV_BITS = attention.KV_BITS
MODEL = "model.onnx"
DATA = "model.onnx.data"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
OPTIONS = ("ops", "with_library", "task", "kv_bits")


class _Reader:
    """Reads a student's tensors, notes which were used, and reports progress."""

    def __init__(self, student: StudentFiles, progress: Progress) -> None:
        self.student, self.progress = student, progress
        self.unread = {
            name
            for name in student.names
            if not (student.spec.tied and name == HEAD)  # a copy of the embedding
        }
        self.done = 0
        # Every linear is read a second time, to be compared with what was written.
        self.total = len(self.unread) + len(student.spec.layers) * len(LINEARS)

    def step(self, name: str) -> None:
        self.done += 1
        self.progress(name, self.done, self.total)

    def tensor(self, name: str) -> NDArray[np.float32]:
        value: NDArray[np.float32] = self.student.tensor(name).numpy()
        check_finite(name, value)
        self.unread.discard(name)
        self.step(name)
        return value

    def rows(self, name: str) -> tables.Rows:
        self.unread.discard(name)
        self.step(name)
        return self.student.rows(name)

    def ternary(self, linear: str) -> tuple[NDArray[np.int8], float]:
        value = self.student.ternary(linear)
        self.unread.discard(f"{linear}.weight")
        self.step(linear)
        return value


def write(student: StudentFiles, out: Path, options: Options, progress: Progress) -> dict[str, Any]:
    """Write model.onnx and model.onnx.data into `out`; the result is its part of the manifest.

    Raises ValueError for a model or option that this target cannot represent, FormatError when the
    student holds tensors of another architecture, ExportError when what was written is not what
    the student says (a broken disk or a bug; the directory is discarded).
    """
    spec, ops = student.spec, options.ops or DEFAULT
    check_supported(spec, options)
    context = options.resolve_context(spec.context)
    task = None if options.task is None else classifier.find_task(student, options.task)
    labels = None if task is None else classifier.label_tokens(student, task)
    reader = _Reader(student, progress)
    with TensorFile(out / DATA) as data:
        rows = (
            None
            if labels is None
            else classifier.write_tables(reader.rows, spec, labels, options.embed_bits, data, out)
        )
        graph = DecoderGraph(spec, context, options, rows, reader, data)
        model = graph.build()
        ir.save(model, out / MODEL)
    if reader.unread:
        raise FormatError(
            f"{student.path} holds tensors that its architecture has no place for "
            f"({', '.join(sorted(reader.unread)[:3])}); it was altered or another version wrote it"
        )
    if labels is None:  # GenAI generates text
        genai.write_graph(model, out)
        genai.write_config(
            spec, context, student.config, student.stop_tokens, out, ops, graph.kv_bits
        )
    if options.with_library:
        genai.copy_library(out)
    verify(student, out, reader, ops)
    errors = classifier.errors(student, out) if labels else table_errors(student, out)
    content: dict[str, Any] = {
        "context": context,
        "ops": ops,
        "kernel_layout": packing.LAYOUTS[options.weight_bits] if ops == DEFAULT else None,
        "scale_granularity": "matrix",
        "label_tokens": labels,
        "kv_bits": graph.kv_bits,
        "storage": _storage(spec, ops, options.embed_bits, graph.kv_bits),
        "embedding_error": errors,
        "parts": _parts(spec, data, labels, out),
    }
    return content if task is None else content | {"task": task.to_json()}


def check_supported(spec: DecoderSpec, options: Options) -> None:
    """ValueError for what this target cannot represent."""
    if options.task is not None and options.embed_bits in (8, 4):
        raise ValueError(
            "a classifier's embedding stays on disk, where fewer bits save no memory; export with "
            "--embed-bits 16"
        )
    if options.embed_bits in (8, 4) and spec.hidden > tables.MAX_COLUMNS:
        raise ValueError(
            f"hidden size {spec.hidden}: a quantised embedding has at most {tables.MAX_COLUMNS} "
            "columns; export with --embed-bits 16"
        )
    _check_operators(spec, options)
    attention.resolve_bits(options.kv_bits, options.ops or DEFAULT)
    if options.weight_bits != 2 and spec.activation_bits is None:
        raise ValueError(
            "the kernels read 1.6-bit weights with 8-bit activations alone, and this student's are "
            "not quantised; export with --weight-bits 2"
        )
    if spec.head_dim % attention.HEAD_SIZE_MULTIPLE:
        raise ValueError(
            f"head size {spec.head_dim} is not a multiple of {attention.HEAD_SIZE_MULTIPLE}, which "
            "attention needs; export with target mlx, or use another teacher"
        )


def _check_operators(spec: DecoderSpec, options: Options) -> None:
    if options.ops in (None, DEFAULT):
        return
    if options.with_library:
        raise ValueError(f"an artifact with --ops {options.ops} needs no library; leave it out")
    if options.weight_bits != 2:
        raise ValueError("stock operators have no 1.6-bit weights; export with --weight-bits 2")
    if options.ops == "integer" and spec.activation_bits is None:
        raise ValueError("this student's activations are not rounded; use --ops custom or portable")
    if options.ops == "integer" and options.embed_bits == 8:
        raise ValueError(
            "onnxruntime's own operators multiply with an 8-bit head exactly only by way of a "
            "float copy, which takes 0.6 s a token for 150,000 words; choose --embed-bits 16 or 4"
        )


def _storage(spec: DecoderSpec, ops: str, embed_bits: int, kv_bits: int) -> dict[str, str]:
    """What is rounded, so that PyTorch can be given the same roundings for comparison."""
    storage = {"embedding": STORAGE[embed_bits], "norms": "float32"}
    if kv_bits != 32:
        storage["cache"] = kv_cache.STORAGE[kv_bits]
    if ops == "portable" and spec.activation_bits is not None:
        storage["activations"] = "int8 blocks"
    if ops != DEFAULT and embed_bits in (8, 4):
        storage["head_activations"] = "int8 blocks" if ops == "portable" else "float32"
    return storage


def _parts(
    spec: DecoderSpec, data: TensorFile, labels: list[int] | None, out: Path
) -> dict[str, int | float]:
    """Bytes of each part; bits per ternary weight include scales, biases and padding."""
    names = ("body", "embedding", "head", "norms", "rotary")
    parts: dict[str, int | float] = {name: data.parts[name] for name in names}
    weights = len(spec.layers) * sum(n * k for n, k in map(spec.shape, LINEARS))
    files = [out / name for name in (MODEL, DATA, EMBEDDING_FILE)]
    parts["total"] = sum(file.stat().st_size for file in files if file.exists())
    parts["body_bits_per_weight"] = 8 * data.parts["body"] / weights
    head = len(labels) if labels else 0 if spec.tied else spec.vocabulary
    table = (spec.vocabulary + head) * spec.hidden
    parts["embedding_bits_per_weight"] = 8 * (data.parts["embedding"] + data.parts["head"]) / table
    return parts


def table_errors(student: StudentFiles, out: Path) -> dict[str, dict[str, float]]:
    """What rounding costs the embedding and an untied head, measured on the written file."""
    names = {"embedding": EMBEDDING} | ({} if student.spec.tied else {"head": HEAD})
    errors = {}
    for part, name in names.items():
        table = student.rows(name)
        errors[part] = compare(read_table(out / MODEL, name, *table.shape), table)
    return errors


def read_linears(
    out: Path, spec: DecoderSpec, ops: str = DEFAULT
) -> Iterator[tuple[str, NDArray[np.int8], float]]:
    """(name, trits (N, K), scale) of every linear, recovered from an artifact's model file.

    Raises FormatError when packed bytes, scales or the nodes that use them are not well-formed.
    """
    graph = ir.load(out / MODEL).graph
    for index in range(len(spec.layers)):
        prefix = f"model.layers.{index}"
        for stored, parts in stored_linears(spec).items():
            rows = [spec.shape(part)[0] for part in parts]
            columns = spec.shape(parts[0])[1]
            read = OPERATORS[ops].read(graph, f"{prefix}.{stored}", sum(rows), columns)
            ends = np.cumsum(rows)[:-1]
            pieces = (np.split(array, ends) for array in read)
            for part, trits, scales in zip(parts, *pieces, strict=True):
                yield f"{prefix}.{part}", trits, _one_scale(f"{prefix}.{part}", scales)


def _one_scale(linear: str, scales: NDArray[np.float32]) -> float:
    scale = np.unique(scales)
    if len(scale) != 1 or not np.isfinite(scale[0]):
        raise FormatError(
            f"the rows of {linear} have the scales {scale[:3].tolist()}, not one finite "
            "scale; export it again"
        )
    return float(scale[0])


def verify(student: StudentFiles, out: Path, reader: _Reader, ops: str) -> None:
    """ExportError unless the written files hold every trit and scale of the student."""
    for name, trits, scale in read_linears(out, student.spec, ops):
        expected, expected_scale = student.ternary(name)
        if scale != expected_scale or not np.array_equal(trits, expected):
            raise ExportError(
                f"{name} read back from {out / DATA} is not what was written; check the disk "
                "and export again"
            )
        reader.step(f"verify {name}")
