"""MLX artifacts with other embeddings, types and activations; stock configs; cards."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from safetensors.torch import load_file

from bitdistill import backends, evals, manifest
from bitdistill.exporters import bits_per_weight, export, mlx_tables, to_mlx

StudentDir = Callable[..., Path]
TABLE = "model.embed_tokens"


def config_of(path: Path) -> dict[str, Any]:
    return json.loads((path / "config.json").read_text())


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("activation_bits", 4, "activation_bits must be 8 or None, got 4"),
        ("dtype", "float64", "unknown dtype 'float64'; did you mean 'float16'?"),
    ],
)
def test_values_that_nothing_computes_are_refused(
    student_dir: StudentDir, tmp_path: Path, option: str, value: Any, message: str
) -> None:
    """The command line has choices; from Python an artifact said 4 bits and computed with 8."""
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        export(student_dir(), "mlx", tmp_path / "artifact", **{option: value})


@pytest.mark.parametrize(("bits", "stored"), [(8, 8.5), (6, 6.5), (4, 4.5)])
@pytest.mark.parametrize("tied", [True, False])
def test_narrow_embeddings(
    student_dir: StudentDir, tmp_path: Path, bits: int, stored: float, tied: bool
) -> None:
    """What MLX itself makes of the trained table, under a key that stock loaders read."""
    student = student_dir("qwen3", tie_word_embeddings=tied)
    path = export(student, "mlx", tmp_path / "artifact", embed_bits=bits)
    content = manifest.read_manifest(path)
    assert content["storage"]["embedding"] == f"affine{bits}"
    assert content["parts"]["embedding_bits_per_weight"] == stored
    assert bits_per_weight(path).startswith("body 2.")
    assert f", embedding {stored:.3f}, total " in bits_per_weight(path)
    tensors = mx.load(str(path / "model.safetensors"))
    master = load_file(student / "model.safetensors")
    quantization = config_of(path)["quantization"]
    for name in (TABLE,) if tied else (TABLE, "lm_head"):
        assert quantization[name] == {"group_size": 64, "bits": bits, "mode": "affine"}
        table = mx.array(master[f"{name}.weight"].numpy())
        words, *pair = mx.quantize(table, group_size=64, bits=bits)
        assert mx.array_equal(tensors[f"{name}.weight"], words)
        for part, values in zip(("scales", "biases"), pair, strict=True):
            assert mx.array_equal(tensors[f"{name}.{part}"], values.astype(mx.float16))


def test_narrow_embeddings_of_a_width_that_only_32_divides(
    student_dir: StudentDir, tmp_path: Path
) -> None:
    student = student_dir("llama", hidden_size=96, intermediate_size=160, num_attention_heads=3,
                          num_key_value_heads=1)  # fmt: skip
    path = export(student, "mlx", tmp_path / "artifact", embed_bits=8)
    assert config_of(path)["quantization"][TABLE]["group_size"] == 32
    assert manifest.read_manifest(path)["parts"]["embedding_bits_per_weight"] == 9


@pytest.mark.parametrize("bits", [8, 4])
def test_parity_with_narrow_embeddings(student_dir: StudentDir, tmp_path: Path, bits: int) -> None:
    """The reference takes the artifact's own table; with its own it would fail."""
    student = student_dir("qwen3", "paper", None)
    path = export(student, "mlx", tmp_path / "artifact", embed_bits=bits)
    tables = backends.load(path).tables()
    assert set(tables) == {f"{TABLE}.weight"}
    assert evals.report(student, path)["passed"]


def test_a_damaged_narrow_embedding_is_noticed(
    student_dir: StudentDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(*arguments: Any) -> tuple[np.ndarray, ...]:
        words, *pair = mlx_tables.affine(*arguments)
        words[-1, -1] ^= np.uint32(0x80)
        return words, *pair

    monkeypatch.setattr(to_mlx, "affine", damaged)
    with pytest.raises(OSError, match=r"embed_tokens\.weight was read back different"):
        export(student_dir("qwen3"), "mlx", tmp_path / "artifact", embed_bits=8)


@pytest.mark.parametrize("bits", [8, None])
def test_activation_bits_are_the_artifacts(
    student_dir: StudentDir, tmp_path: Path, bits: int | None
) -> None:
    """Whatever the student was trained with; parity is then with a student run the same way."""
    student = student_dir("llama", "paper", 8 if bits is None else None)
    path = export(student, "mlx", tmp_path / "artifact", activation_bits=bits)
    assert manifest.read_manifest(path)["decoder"]["activation_bits"] == bits
    assert config_of(path)["bitdistill"]["activation_bits"] == bits
    assert config_of(path)["bitdistill"]["mlx"]["activation_bits"] == bits
    assert evals.report(student, path)["passed"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_stock_artifact_has_one_type(student_dir: StudentDir, tmp_path: Path, dtype: str) -> None:
    student = student_dir("qwen2", "none", None)
    path = export(student, "mlx", tmp_path / "artifact", dtype=dtype)
    tensors = mx.load(str(path / "model.safetensors"))
    types = {n: str(a.dtype).removeprefix("mlx.core.") for n, a in tensors.items()}
    table = types.pop(f"{TABLE}.weight")
    assert table == ("float16" if dtype == "float32" else dtype)
    assert set(types.values()) == {"uint32", dtype}
    assert manifest.read_manifest(path)["storage"]["biases"] == dtype
    assert config_of(path)["model_type"] == "qwen2"
    assert "bitdistill" not in config_of(path)
    assert evals.report(student, path)["passed"]


NOT_STOCK: dict[str, tuple[tuple[Any, ...], dict[str, Any], str]] = {
    "norms": (("qwen3", "paper", None), {}, "it has norms that no stock architecture has"),
    "int8": (("qwen3", "none", 8), {}, "its activations are rounded to int8"),
    "biases": (("qwen3", "none", None), {"attention_bias": True}, "has no attention biases"),
    "scale": (("gemma3_text", "none", None), {"hidden_size": 96}, r"exact sqrt(96) to scale"),
    "windows": (
        ("gemma3_text", "none", None),
        {"layer_types": ["full_attention", "sliding_attention"]},
        "has no layers in this order",
    ),
}


@pytest.mark.parametrize("case", NOT_STOCK)
def test_what_no_stock_architecture_computes_keeps_our_model_type(
    student_dir: StudentDir, tmp_path: Path, case: str
) -> None:
    arguments, overrides, reason = NOT_STOCK[case]
    path = export(student_dir(*arguments, **overrides), "mlx", tmp_path / "artifact")
    assert config_of(path)["model_type"] == f"bitdistill_{arguments[0]}"
    assert reason in (path / "README.md").read_text()


def test_cards_say_who_loads_the_artifact(student_dir: StudentDir, tmp_path: Path) -> None:
    stock = export(student_dir("llama", "none", None), "mlx", tmp_path / "stock", embed_bits=8)
    card = (stock / "README.md").read_text()
    assert "library_name: mlx\npipeline_tag: text-generation\n" in card
    assert "**mlx-lm, without a flag or a further package**: this is a stock `llama` model" in card
    assert "mlx-lm alone was tested. LM Studio and mlx-swift read" in card
    assert "| total bits per weight |" in card
    ours = export(student_dir("llama"), "mlx", tmp_path / "ours")
    card = (ours / "README.md").read_text()
    assert "bitdistill mlx generate --model DIRECTORY" in card
    assert "so do applications that bring their own mlx-lm or mlx-swift" in card
    assert "trust-remote-code" not in card


@pytest.mark.parametrize("options", [{}, {"model_file": True}, {"activation_bits": None}])
def test_every_card_says_what_ruins_the_text(
    student_dir: StudentDir, tmp_path: Path, options: dict[str, Any]
) -> None:
    path = export(student_dir("llama", "none"), "mlx", tmp_path / "artifact", **options)
    card = (path / "README.md").read_text()
    assert "mlx 0.32.4 or newer where activations have 16 bits" in card
    assert "Do not `mlx_lm.fuse` adapters into this model or quantise it again" in card
    assert ("stock `llama` model" in card) == ("activation_bits" in options)


def test_the_model_file_imports_nothing_but_mlx(student_dir: StudentDir, tmp_path: Path) -> None:
    path = export(student_dir("llama"), "mlx", tmp_path / "artifact", model_file=True)
    assert config_of(path)["model_file"] == "bitdistill_model.py"
    assert "bitdistill_model.py" in manifest.read_manifest(path)["files"]
    assert "--trust-remote-code" in (path / "README.md").read_text()
    found = set()
    for node in ast.walk(ast.parse((path / "bitdistill_model.py").read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
    third_party = found - {"__future__", "collections", "functools", "importlib", "math", "re"}
    assert third_party == {"mlx", "mlx_lm", "typing"}
