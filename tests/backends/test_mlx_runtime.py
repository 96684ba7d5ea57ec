"""MLX artifacts at run time: parity with PyTorch, cache, padding, refusals."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx_parity import (
    CLOSE,
    check_noise_floor,
    sequence_errors,
    sequences,
    torch_logits,
    with_altered,
)

from bitdistill import backends, manifest
from bitdistill.backends import mlx_linear, mlx_runtime
from bitdistill.backends.mlx_runtime import MlxRuntime
from bitdistill.exporters import export

Artifact = Callable[..., tuple[Path, Path]]
FAMILIES = ("llama", "qwen2", "qwen3", "gemma3_text")
STYLES = ("paper", "allnorm", "none")


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("family", FAMILIES)
def test_parity_without_activation_quantisation(
    mlx_artifact: Artifact, family: str, style: str
) -> None:
    student, path = mlx_artifact(family, style, None)
    tokens = sequences(3, 24)  # longer than gemma's window of 8
    reference = torch_logits((student, path), tokens, torch.float32)
    for products in mlx_runtime.PRODUCTS:
        runtime = backends.load(path, products=products)
        logits = np.stack(runtime.logits(tokens.tolist()))
        assert sequence_errors(logits, reference).max() < CLOSE


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("family", FAMILIES)
def test_parity_with_int8_activations(mlx_artifact: Artifact, family: str, style: str) -> None:
    student, path = mlx_artifact(family, style, 8)
    tokens = sequences()
    logits = np.stack(backends.load(path).logits(tokens.tolist()))
    check_noise_floor((student, path), tokens, logits)


def test_the_noise_floor_check_can_fail(mlx_artifact: Artifact) -> None:
    """The same artifact run without its int8 activations is not within the noise floor."""
    student, path = mlx_artifact("qwen3", "paper", 8)
    content = manifest.read_manifest(path)
    content["decoder"]["activation_bits"] = None
    tokens = sequences()
    logits = np.stack(MlxRuntime(path, content).logits(tokens.tolist()))
    with pytest.raises(AssertionError):
        check_noise_floor((student, path), tokens, logits)


ROPE = {"rope_theta": 1e4, "original_max_position_embeddings": 16}
VARIANTS: dict[str, dict[str, Any]] = {
    "norm_eps": {"norm_style": "allnorm", "rms_norm_eps": 0.01},  # the added norms keep 1e-8
    "untied": {"tie_word_embeddings": False},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "llama3": {
        "rope_parameters": ROPE
        | {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    },
    "yarn": {"rope_parameters": ROPE | {"rope_type": "yarn", "factor": 4.0}},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_parity_of_variants(mlx_artifact: Artifact, variant: str) -> None:
    student, path = mlx_artifact("llama", activation_bits=None, **VARIANTS[variant])
    tokens = sequences(2, 40)
    logits = np.stack(backends.load(path).logits(tokens.tolist()))
    reference = torch_logits((student, path), tokens, torch.float32)
    assert sequence_errors(logits, reference).max() < CLOSE


@pytest.mark.parametrize("products", mlx_runtime.PRODUCTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_equals_the_full_forward(
    mlx_artifact: Artifact, family: str, products: str
) -> None:
    """Token by token and in chunks, across the edge of the sliding window."""
    _, path = mlx_artifact(family, "paper", None)
    runtime = backends.load(path, products=products)
    tokens = sequences(1, 30)[0].tolist()
    full = runtime.logits([tokens])[0]
    cache = runtime.new_cache(30)
    end = 0
    for size in (5, 1, 1, 1, 1, 7, 1, 12, 1):
        logits = runtime.step(tokens[end : end + size], cache)
        end += size
        assert cache.length == end
        assert np.abs(logits - full[end - 1]).max() < CLOSE * np.ptp(full)
    with pytest.raises(ValueError, match="1 tokens do not fit, there is room for 0"):
        runtime.step([1], cache)


def test_int8_decoding_equals_the_full_forward(mlx_artifact: Artifact) -> None:
    student, path = mlx_artifact("qwen3", "paper", 8)
    runtime = backends.load(path)
    tokens = sequences()
    logits = []
    for sequence in tokens.tolist():
        cache = runtime.new_cache(len(sequence))
        logits.append([runtime.step([token], cache) for token in sequence])
    check_noise_floor((student, path), tokens, np.array(logits))


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_right_padded_batches_equal_single_sequences(mlx_artifact: Artifact, family: str) -> None:
    _, path = mlx_artifact(family, "paper", None)
    runtime = backends.load(path)
    lengths = (20, 3, 11, 1)
    tokens = [list(sequences(1, length)[0]) for length in lengths]
    for sequence, logits in zip(tokens, runtime.logits(tokens), strict=True):
        alone = runtime.logits([sequence])[0]
        assert alone.shape == (len(sequence), runtime.vocabulary)
        assert np.abs(logits - alone).max() < CLOSE * np.ptp(alone)


def test_padding_is_never_looked_at(mlx_artifact: Artifact) -> None:
    _, path = mlx_artifact("gemma3_text", "paper", 8)
    runtime = backends.load(path)
    tokens, lengths, rows = sequences(2, 12), np.array([12, 4]), np.array([[1, 3], [0, 11], [1, 0]])
    other = tokens.copy()
    other[1, 4:] = 7
    first, second = (runtime.logits_at(t, lengths, rows) for t in (tokens, other))
    assert first.shape == (3, runtime.vocabulary)
    assert first.dtype == np.float32
    assert np.array_equal(first, second)


def test_a_batch_in_groups_gives_the_rows_of_the_whole(
    mlx_artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU few tokens are computed at a time; rows come in any order, some groups have none."""
    _, path = mlx_artifact("qwen3", activation_bits=None)
    runtime = backends.load(path, products="cpu")
    tokens = np.array(sequences(5, 12))
    lengths = np.array([12, 3, 5, 12, 7])
    rows = np.array([[4, 6], [0, 11], [4, 0], [1, 2]])
    whole = runtime.logits_at(tokens, lengths, rows)
    assert whole.shape == (4, runtime.vocabulary)
    for limit in (24, 12, 1):  # two sequences at a time, then one
        monkeypatch.setattr(mlx_runtime, "HOST_TOKENS", limit)
        found = runtime.logits_at(tokens, lengths, rows)
        np.testing.assert_allclose(found, whole, rtol=1e-4, atol=1e-4)


def test_greedy_generation_follows_the_full_forward(mlx_artifact: Artifact) -> None:
    _, path = mlx_artifact("llama", "paper", None)
    runtime = backends.load(path)
    prompt = [5, 6, 7]
    made = list(runtime.generate(prompt, max_new_tokens=6, stop=()))
    logits = runtime.logits([prompt + made])[0]
    assert made == logits[2:-1].argmax(-1).tolist()


def test_shards_are_read(
    mlx_artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, whole = mlx_artifact("qwen3", "paper", 8)
    monkeypatch.setattr("bitdistill.exporters.tensor_files.SHARD_BYTES", 20_000)
    shards = export(student, "mlx", tmp_path / "shards")
    tokens = sequences(2, 6).tolist()
    first, second = (backends.load(path).logits(tokens) for path in (whole, shards))
    assert np.array_equal(first, second)


def test_half_precision(mlx_artifact: Artifact) -> None:
    """Without Metal, MLX's own products sum in half precision, and ours do not."""
    student, path = mlx_artifact("llama", "paper", None)
    with pytest.warns(UserWarning, match="without Metal, MLX sums in half precision"):
        backends.load(path, dtype="float16", products="mlx")
    tokens = sequences(2, 12)
    reference = torch_logits((student, path), tokens, torch.float32)
    for dtype, close in (("float16", 2**-7), ("bfloat16", 2**-4)):
        runtime = backends.load(path, dtype=dtype, products="cpu")
        errors = sequence_errors(np.stack(runtime.logits(tokens.tolist())), reference)
        assert errors.max() < close  # a few units in the type's last place, over two layers


def test_unknown_options_are_refused(mlx_artifact: Artifact) -> None:
    path = mlx_artifact("llama", "paper", 8)[1]
    with pytest.raises(ValueError, match="dtype 'float17' is not one of MLX's; did you mean"):
        backends.load(path, dtype="float17")
    with pytest.raises(ValueError, match="products 'gpu' is not one of MLX's; did you mean 'cpu'"):
        backends.load(path, products="gpu")
    with pytest.raises(ValueError, match="threads must be 1 or more, got 0"):
        backends.load(path, threads=0)


def test_metal_computes_in_the_files_type_on_packed_weights(
    mlx_artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = mlx_artifact("llama", "paper", 8)[1]
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    model = backends.load(path).model
    assert model.dtype == model.model.embed_tokens.weight.dtype == mx.float16
    assert model.layers[0].mlp.up_proj.half
    assert model.layers[0].mlp.up_proj.weight.dtype == mx.uint32
    monkeypatch.setattr(mlx_linear, "version", lambda _: "0.32.3")
    with pytest.raises(ValueError, match=r"mlx 0\.32\.3 sums .* pip install -U 'mlx>=0\.32\.4'"):
        backends.load(path)
    assert backends.load(path, dtype="float32").model.dtype == mx.float32


def test_metal_computes_in_fp32_where_the_layers_are(
    mlx_artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The embedding of such an artifact is in 16 bits for its size alone."""
    path = mlx_artifact("llama", "paper", None, options={"dtype": "float32"})[1]
    stored = mx.load(str(path / "model.safetensors"))["model.embed_tokens.weight"]
    assert stored.dtype == mx.float16
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    model = backends.load(path).model
    assert model.dtype == model.model.embed_tokens.weight.dtype == mx.float32


def test_altered_and_truncated_files_are_refused(mlx_artifact: Artifact, tmp_path: Path) -> None:
    path = shutil.copytree(mlx_artifact("llama", "paper", 8)[1], tmp_path / "copy")
    file = path / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(manifest.FormatError, match="does not match the hash"):
        backends.load(path)
    file.write_bytes(data[:-100])
    with pytest.raises(manifest.FormatError, match="truncated or altered"):
        backends.load(path, verify=False)
    with pytest.raises(manifest.FormatError):
        MlxRuntime(path, manifest.read_manifest(path))
    file.write_bytes(b"not tensors")
    with pytest.raises(manifest.FormatError, match="cannot be read"):
        MlxRuntime(path, manifest.read_manifest(path))
    file.unlink()
    with pytest.raises(manifest.FormatError, match=r"has no model\.safetensors"):
        MlxRuntime(path, manifest.read_manifest(path))


def test_weights_that_the_manifest_does_not_list_are_ignored(
    mlx_artifact: Artifact, tmp_path: Path
) -> None:
    whole = mlx_artifact("llama", "paper", 8)[1]
    path = shutil.copytree(whole, tmp_path / "copy")
    gain = mx.load(str(path / "model.safetensors"))["model.norm.weight"]
    mx.save_safetensors(str(path / "model_old.safetensors"), {"model.norm.weight": 0 * gain})
    tokens = sequences(1, 6).tolist()
    first, second = (backends.load(artifact).logits(tokens) for artifact in (whole, path))
    assert np.array_equal(first, second)


@pytest.mark.parametrize("part", ["weight", "scales", "biases"])
def test_weights_that_are_not_ternary_are_refused(
    mlx_artifact: Artifact, tmp_path: Path, part: str
) -> None:
    """A code 3, a group of another scale, a bias that is not -D."""
    whole = mlx_artifact("llama", "paper", 8)[1]
    path = with_altered(whole, tmp_path / "copy", f"model.layers.1.mlp.up_proj.{part}")
    with pytest.raises(manifest.FormatError, match=r"up_proj: .*not one ternary matrix.*export"):
        backends.load(path, verify=False)


def test_tensors_of_another_shape_are_refused(mlx_artifact: Artifact) -> None:
    path = mlx_artifact("llama", "paper", 8)[1]
    content = manifest.read_manifest(path)
    content["decoder"]["vocabulary"] += 1
    with pytest.raises(manifest.FormatError, match=r"embed_tokens\.weight"):
        MlxRuntime(path, content)
    content = manifest.read_manifest(path)
    content["decoder"]["norm_style"] = "none"
    with pytest.raises(manifest.FormatError, match=r"o_proj\.norm\.weight"):
        MlxRuntime(path, content)
