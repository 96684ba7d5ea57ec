"""Sizes of real models, for benchmarks on random weights: configurations of transformers."""

from __future__ import annotations

from typing import Any


def qwen3(hidden: int, mlp: int, layers: int, heads: int) -> dict[str, Any]:
    """The parts of a Qwen3 configuration that differ between sizes."""
    sizes = {"hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers}
    attention = {"num_attention_heads": heads, "num_key_value_heads": 8, "head_dim": 128}
    rest = {"model_type": "qwen3", "vocab_size": 151936, "max_position_embeddings": 40960}
    return sizes | attention | rest | {"tie_word_embeddings": True}


SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "qwen3-0.6b": qwen3(1024, 3072, 28, 16),
    "qwen3-1.7b": qwen3(2048, 6144, 28, 16),
    "qwen3-4b": qwen3(2560, 9728, 36, 32),
}
