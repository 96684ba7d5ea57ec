"""A teacher as an ONNX model of stock operators: the baselines that artifacts are measured with.

The graph is the artifacts' own (onnx_graph.py: the same attention, cache and inputs), with each
ternary matrix replaced by what ONNX Runtime offers for full-precision models: `MatMul` (fp32), or
`MatMulNBits` with weights rounded to the nearest of 16 or 4 levels in blocks, as ONNX Runtime's own
quantiser does. The quantised models hold the embedding in fp16 and the head in 8 bits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from safetensors import safe_open

from bitdistill import checkpoint, manifest
from bitdistill.decoder import DecoderSpec, decoder_spec
from bitdistill.exporters.base import Options
from bitdistill.exporters.onnx_graph import DecoderGraph, Reader
from bitdistill.exporters.onnx_nodes import Ends
from bitdistill.exporters.onnx_tensors import TensorFile
from bitdistill.names import suggest

KINDS = {"fp32": 32, "int4": 4, "int2": 2}
BLOCK = 32
HEAD_BITS = 8
INT8_COMPUTE = 4  # MatMulNBits' accuracy_level: activations are quantised to 8 bits too
MODEL, DATA = "model.onnx", "model.onnx.data"


def export_stock(
    teacher: str | Path, kind: str, out: str | Path, content: dict[str, Any] | None = None
) -> Path:
    """Write a teacher's directory as a stock ONNX model of `kind`: fp32, int4 or int2.

    `content` stands for the manifest that a Hugging Face directory lacks. FormatError where
    `teacher` holds something else, FileExistsError where `out` exists, ValueError for an unknown
    kind.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind of baseline {kind!r}{suggest(kind, KINDS)}")
    path, out = Path(teacher), Path(out)
    content = content or manifest.read_manifest(path, "teacher")
    spec, stop_tokens = _spec(path)
    with manifest.new_directory(out) as partial:
        with _Tensors(path, content) as tensors, TensorFile(partial / DATA) as data:
            graph = StockGraph(spec, KINDS[kind], tensors, data)
            ir.save(graph.build(), partial / MODEL)
        for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
            if (path / name).is_file():
                (partial / name).write_bytes((path / name).read_bytes())
        inherited = {key: content.get(key) for key in ("family", "method", "task", "base_model")}
        described = inherited | {
            "target": "onnx",
            "ops": "portable",
            "label_tokens": None,
            "kv_bits": 32,
            "precision": kind,
            "teacher": manifest.fingerprint(content["files"]),
            "decoder": spec.to_json(),
            "context": graph.context,  # rotary tables end there
            "stop_tokens": stop_tokens,
            "parts": dict(data.parts),
        }
        manifest.write_manifest(partial, "artifact", described)
    return out


def _spec(path: Path) -> tuple[DecoderSpec, list[int]]:
    """The teacher's decoder, without added norms or ternary layers, and the ids that end a text."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path)
    config.bitdistill = {
        "norm_style": "none",
        "added_norm_eps": config.rms_norm_eps,
        "activation_bits": None,
    }
    return decoder_spec(config), checkpoint.stop_tokens(path, config.to_dict())


class _Tensors:
    """The tensors of a directory, in fp32, one at a time; none of them is ternary."""

    def __init__(self, path: Path, content: dict[str, Any]) -> None:
        self.files = [safe_open(file, "pt") for file in manifest.weight_files(path, content)]

    def __enter__(self) -> _Tensors:
        return self

    def __exit__(self, *error: object) -> None:
        self.files.clear()

    def tensor(self, name: str) -> NDArray[np.float32]:
        for file in self.files:
            if name in file.keys():  # noqa: SIM118  (not a mapping)
                return cast(NDArray[np.float32], file.get_tensor(name).float().numpy())
        raise manifest.FormatError(f"the teacher has no tensor {name!r}; save it again")

    def rows(self, name: str) -> NDArray[np.float32]:
        return self.tensor(name)

    def ternary(self, linear: str) -> tuple[NDArray[np.int8], float]:
        raise RuntimeError(f"{linear}: a stock graph has no ternary matrices")


class StockGraph(DecoderGraph):
    """The decoder's graph with stock matrices of `bits` bits (32: fp32)."""

    def __init__(self, spec: DecoderSpec, bits: int, reader: Reader, data: TensorFile) -> None:
        self.bits = bits
        options = Options(embed_bits=32 if bits == 32 else 16, ops="portable")
        context = options.resolve_context(spec.context)
        super().__init__(spec, context, options, None, reader, data)

    def linear(self, name: str, ends: Ends, index: int, block_norm: str | None = None) -> ir.Value:
        """One stored matrix; linears that read the same input are stacked, as in the artifacts."""
        prefix, parts = f"model.layers.{index}", self.stored[name]
        node = f"layers.{index}.{name}"
        weights = np.concatenate([self.reader.tensor(f"{prefix}.{part}.weight") for part in parts])
        x = self.gated(ends, weights.shape[1], node)
        if block_norm is not None:
            x = self.norm(x, block_norm, f"{node}.norm")
        y = self.product(f"{prefix}.{name}", x, weights, self.bits, "body")
        bias = self._bias(prefix, parts)
        if bias is not None:
            stored = self.data.add(f"{prefix}.{name}.bias", bias, "body")
            y = self.op("Add", [y, stored], f"{prefix}.{name}.biased")
        return self.added(y, ends)

    def product(
        self,
        name: str,
        x: ir.Value,
        weights_NK: NDArray[np.float32],
        bits: int,
        part: str,
        output: str | None = None,
    ) -> ir.Value:
        """x @ weights^T, with weights of `bits` bits."""
        if bits == 32:
            weights = self.data.add(f"{name}.weight", np.ascontiguousarray(weights_NK.T), part)
            return self.op("MatMul", [x, weights], name, output=output)
        packed, scales = quantize_blocks(weights_NK, bits)
        inputs = [
            x,
            self.data.add(f"{name}.weight", packed, part),
            self.data.add(f"{name}.scale", scales, part),
        ]
        rows, columns = weights_NK.shape
        return self.op(
            "MatMulNBits", inputs, name, "com.microsoft", output=output, N=rows, K=columns,
            bits=bits, block_size=BLOCK, accuracy_level=INT8_COMPUTE,
        )  # fmt: skip

    def head(self, x: ir.Value) -> ir.Value:
        """Hidden states -> logits (P, V) of the asked positions; in 8 bits beside 4 or 2."""
        if self.bits == 32:
            return super().head(x)
        flat = self.constant("flat_shape", np.array([-1, self.spec.hidden], np.int64))
        x = self.op("Reshape", [x, flat], "flatten")
        x = self.op("Gather", [x, self.inputs["logit_rows"]], "asked_rows", axis=0)
        x = self.norm(x, "model.norm", "norm")
        name = "model.embed_tokens.weight" if self.spec.tied else "lm_head.weight"
        return self.product(
            "lm_head.quantized", x, self.reader.tensor(name), HEAD_BITS, "head", "logits"
        )


def quantize_blocks(
    weights_NK: NDArray[np.float32], bits: int
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Codes (N, K / BLOCK, BLOCK * bits / 8) and scales (N * K / BLOCK) of MatMulNBits.

    weight = scale * (code - 2^(bits-1)); the weight of largest size in a block is the lowest code,
    as in ONNX Runtime's symmetric quantiser. Low bits of a byte come first.
    """
    rows, columns = weights_NK.shape
    blocks = -(-columns // BLOCK)
    padded = np.zeros((rows, blocks * BLOCK), np.float32)
    padded[:, :columns] = weights_NK
    blocked = padded.reshape(rows, blocks, BLOCK)
    middle = 1 << (bits - 1)
    place = np.abs(blocked).argmax(-1)[..., None]
    scales = np.take_along_axis(blocked, place, -1) / -middle
    inverse = np.divide(1.0, scales, out=np.zeros_like(scales), where=scales != 0)
    codes = np.clip(np.rint(blocked * inverse) + middle, 0, 2 * middle - 1).astype(np.uint8)
    each = 8 // bits
    shifts = (np.arange(each) * bits).astype(np.uint8)
    packed = (codes.reshape(rows, blocks, -1, each) << shifts).sum(-1, dtype=np.uint8)
    return packed, scales.reshape(-1).astype(np.float32)
