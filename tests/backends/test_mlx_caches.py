"""MLX artifacts in mlx-lm: its key-value caches, saved prompts and batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx_lm.models import cache as caches
from mlx_parity import CLOSE, check_noise_floor, sequences

Artifact = Callable[..., tuple[Path, Path]]
FAMILIES = ("llama", "qwen2", "qwen3", "gemma3_text")
PROMPT = [5, 6, 7, 8]
TALKATIVE = {"tie_word_embeddings": False}  # tied, random models repeat one token


def load(path: Path) -> tuple[Any, Any]:
    """`mlx_lm.load`, which finds our architectures because bitdistill is imported."""
    return mlx_lm.load(str(path))


@pytest.mark.parametrize("style", ["paper", "none"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_cached_decoding_equals_the_full_forward(
    mlx_artifact: Artifact, family: str, style: str
) -> None:
    """With mlx-lm's caches, in chunks and token by token, across the edge of the window."""
    model, _ = load(mlx_artifact(family, style, None, options={"dtype": "float32"})[1])
    tokens = mx.array(sequences(1, 30))
    full = np.array(model(tokens))[0]
    cache = caches.make_prompt_cache(model)
    start = 0
    for size in (5, 1, 1, 1, 1, 7, 1, 12, 1):
        logits = np.array(model(tokens[:, start : start + size], cache=cache))[0]
        assert np.abs(logits - full[start : start + size]).max() < 10 * CLOSE * np.ptp(full)
        start += size


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_decoding_with_int8_activations(mlx_artifact: Artifact, family: str) -> None:
    pair = mlx_artifact(family, "paper", 8)
    model, _ = load(pair[1])
    tokens = sequences()
    cache = caches.make_prompt_cache(model)
    parts = [
        np.array(model(mx.array(tokens[:, start:end]), cache=cache))
        for start, end in ((0, 2), (2, 3), (3, 5))
    ]
    check_noise_floor(pair, tokens, np.concatenate(parts, axis=1))


def test_quantised_key_value_caches(mlx_artifact: Artifact) -> None:
    model, _ = load(mlx_artifact("llama", "paper", None, hidden_size=256)[1])  # heads of 64
    tokens = mx.array(sequences(1, 20))
    full = np.array(model(tokens))
    cache = [layer.to_quantized(group_size=64, bits=8) for layer in model.make_cache()]
    model(tokens[:, :15], cache=cache)
    assert np.abs(
        np.array(model(tokens[:, 15:], cache=cache)) - full[:, 15:]
    ).max() < 0.05 * np.ptp(full)


@pytest.mark.parametrize("bits", [None, 8])
def test_a_prompt_cache_is_saved_and_continued(
    mlx_artifact: Artifact, tmp_path: Path, bits: int | None
) -> None:
    model, tokenizer = load(mlx_artifact("llama", "paper", bits, **TALKATIVE)[1])
    whole = mlx_lm.generate(model, tokenizer, prompt=PROMPT, max_tokens=6)
    cache = caches.make_prompt_cache(model)
    model(mx.array([PROMPT[:3]]), cache=cache)
    caches.save_prompt_cache(str(tmp_path / "prompt.safetensors"), cache)
    cache = caches.load_prompt_cache(str(tmp_path / "prompt.safetensors"))
    made = mlx_lm.generate(model, tokenizer, prompt=PROMPT[3:], max_tokens=6, prompt_cache=cache)
    assert made == whole


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("family", ["qwen3", "gemma3_text"])
def test_batches_of_different_lengths(
    mlx_artifact: Artifact, family: str, bits: int | None
) -> None:
    model, tokenizer = load(mlx_artifact(family, "paper", bits, **TALKATIVE)[1])
    prompts = [sequences(1, length)[0].tolist() for length in (3, 14, 1, 9)]
    made = mlx_lm.batch_generate(model, tokenizer, prompts, max_tokens=8).texts
    alone = [mlx_lm.stream_generate(model, tokenizer, p, max_tokens=8) for p in prompts]
    assert made == [tokenizer.decode([part.token for part in parts]) for parts in alone]
