"""config.json of an MLX artifact, and the model file for an mlx-lm without bitdistill.

A student without added norms, exported without int8 activations, is an ordinary model of its
family: it keeps the family's own model_type, and every MLX application loads it. mlx-lm must then
compute what the student computes. Its rotation is therefore built here and compared, frequency by
frequency, and what it has no setting for is refused. Any other student keeps a model_type of our
own: a loader that does not know it fails, instead of dropping norms or int8 activations.
"""

from __future__ import annotations

import ast
import dataclasses
import math
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from bitdistill.backends.mlx_layout import architecture, quantization
from bitdistill.checkpoint import StudentFiles
from bitdistill.decoder import MODEL_TYPE_PREFIX, DecoderSpec
from bitdistill.exporters.base import Options

MODEL_FILE = "bitdistill_model.py"
_SOURCES = ("mlx_linear", "mlx_architecture")
_CLOSE = 1e-5  # relative, of rotary frequencies: fp32 powers in another order


def artifact_spec(student: StudentFiles, options: Options) -> DecoderSpec:
    """The decoder that the artifact runs: the student's, with the activation bits asked for."""
    if options.activation_bits == "trained":
        return student.spec
    return dataclasses.replace(student.spec, activation_bits=options.activation_bits)


def artifact_config(
    student: StudentFiles, spec: DecoderSpec, options: Options
) -> tuple[dict[str, Any], str | None]:
    """config.json, and why it is not a stock one (None where it is)."""
    entry = quantization(spec, options.embed_bits)
    entries = {"quantization": entry, "quantization_config": entry}
    config, reason = _stock(student.config, spec)
    if config is not None:
        return config | entries, None
    extra = student.config["bitdistill"] | {"activation_bits": spec.activation_bits}
    config = student.config | {"bitdistill": extra | {"mlx": architecture(spec)}} | entries
    if options.model_file:
        config["model_file"] = MODEL_FILE
    return config, reason


def _stock(config: dict[str, Any], spec: DecoderSpec) -> tuple[dict[str, Any] | None, str]:
    """The config of the family's own architecture in mlx-lm, or None and the reason."""
    if spec.norm_style != "none":
        return None, "it has norms that no stock architecture has"
    if spec.activation_bits is not None:
        return None, "its activations are rounded to int8, which no stock architecture does"
    stock = {key: value for key, value in config.items() if key != "bitdistill"}
    stock["model_type"] = config["model_type"].removeprefix(MODEL_TYPE_PREFIX)
    stock["architectures"] = [
        name.removeprefix("Bitdistill") for name in config.get("architectures") or []
    ]
    stock["head_dim"] = spec.head_dim
    lacking = _lacking(spec)
    if lacking:
        return None, f"mlx-lm's {stock['model_type']} has no {lacking}"
    stock |= _rotary_settings(config, spec)
    if not _same_rotary(stock, spec):
        return None, f"mlx-lm's {stock['model_type']} would rotate by other angles"
    return stock, ""


def _lacking(spec: DecoderSpec) -> str | None:
    """What the student has and mlx-lm's architecture of its family cannot express."""
    if spec.family == "qwen3" and (spec.qkv_bias or spec.output_bias):
        return "attention biases"
    if spec.family == "qwen2" and spec.head_dim * spec.heads != spec.hidden:
        return "heads of another size"
    if spec.family != "llama" and spec.mlp_bias:
        return "biases in its MLP"
    if spec.family != "gemma3_text":
        return "attention windows" if any(layer.window for layer in spec.layers) else None
    if spec.qkv_bias or spec.output_bias:
        return "attention biases"
    if _pattern(spec) is None:
        return "layers in this order"
    # mlx-lm multiplies the embedding by bfloat16(sqrt(hidden))
    bits = np.float32(math.sqrt(spec.hidden)).view(np.uint32)
    return None if bits & 0xFFFF == 0 else f"exact sqrt({spec.hidden}) to scale its embedding by"


def _pattern(spec: DecoderSpec) -> int | None:
    """p, where exactly every p-th layer is global, as mlx-lm counts them."""
    windows = [layer.window for layer in spec.layers]
    if None not in windows:
        return None
    period = windows.index(None) + 1
    regular = all((w is None) == ((i + 1) % period == 0) for i, w in enumerate(windows))
    return period if regular else None


def _rotary_settings(config: dict[str, Any], spec: DecoderSpec) -> dict[str, Any]:
    """The rotation as mlx-lm's configs spell it, from how transformers 5 does."""
    parameters = config["rope_parameters"]
    settings: dict[str, Any] = {}
    if spec.family == "gemma3_text":
        settings["rope_local_base_freq"] = parameters["sliding_attention"]["rope_theta"]
        settings["sliding_window_pattern"] = _pattern(spec)
        parameters = parameters["full_attention"]
    settings["rope_theta"] = parameters["rope_theta"]
    scaled = parameters["rope_type"] != "default"
    return settings | {"rope_scaling": parameters if scaled else None}


def _same_rotary(config: dict[str, Any], spec: DecoderSpec) -> bool:
    """Whether mlx-lm rotates every layer as the student does."""
    from mlx_lm.models.rope_utils import initialize_rope

    context = config["max_position_embeddings"]
    scaled = (config["rope_theta"], False, config["rope_scaling"], context)
    same = []
    for layer in spec.layers:
        local = layer.window is not None
        ours = spec.rotary[layer.rotary]
        how = (config["rope_local_base_freq"], False) if local else scaled
        frequencies, scale = _frequencies(initialize_rope(spec.head_dim, *how))
        same.append(
            np.allclose(frequencies, ours.frequencies, rtol=_CLOSE, atol=0)
            and abs(scale - ours.scale) < _CLOSE
        )
    return all(same)


def _frequencies(rotary: Any) -> tuple[Any, float]:
    """Frequencies of one of mlx-lm's rotations, and the factor on what it rotates."""
    if hasattr(rotary, "_freqs"):
        return 1 / np.array(rotary._freqs), float(getattr(rotary, "mscale", 1.0))
    exponents = np.arange(0, rotary.dims, 2) / rotary.dims
    return rotary.scale * rotary.base**-exponents, 1.0


def write_model_file(out: Path) -> None:
    """Put the architecture into the artifact as one module that imports nothing but mlx."""
    folder = resources.files("bitdistill.backends")
    parts = [f'"""{MODEL_FILE}: written by bitdistill, for `mlx_lm --trust-remote-code`."""\n']
    parts.append("from __future__ import annotations\n")
    for name in _SOURCES:
        lines = folder.joinpath(f"{name}.py").read_text(encoding="utf-8").splitlines(keepends=True)
        for node in ast.parse("".join(lines)).body:
            module = getattr(node, "module", None) or ""
            if module == "__future__" or module.startswith("bitdistill"):
                lines[node.lineno - 1 : node.end_lineno] = [""] * _lines(node)
        parts.append("".join(lines))
    (out / MODEL_FILE).write_text("\n".join(parts), encoding="utf-8")


def _lines(node: ast.stmt) -> int:
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1
