"""Models of known shapes with random weights, and batches of random tokens."""

from __future__ import annotations

from typing import Any

import shapes
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from bitdistill.data import IGNORED, Batch

SHAPES = shapes.SHAPES | {
    "tiny": {
        "model_type": "llama",
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
    },
}


class Synthetic:
    """Random tokens: `length` is one length (text, every token learnt) or several (a task)."""

    def __init__(self, vocabulary: int, batch: int, lengths: list[int], accumulate: int) -> None:
        self.batches = []
        for length in lengths:
            ids = torch.randint(0, vocabulary, (batch, length))
            labels = ids.clone()
            if len(lengths) > 1:
                labels[:, :-1] = IGNORED
            ones = torch.ones_like(ids)
            self.batches.append({"input_ids": ids, "attention_mask": ones, "labels": labels})
        self.accumulate = accumulate

    def window(self, step: int) -> list[Batch]:
        return [self.batches[step % len(self.batches)]] * self.accumulate

    def steps_per_epoch(self) -> int | None:
        return 1 << 30 if len(self.batches) > 1 else None

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        pass


def make_model(
    shape: str, device: torch.device, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """Random weights, made on the device that is to compute with them."""
    config = AutoConfig.for_model(**SHAPES[shape] | {"max_position_embeddings": 4096})
    torch.manual_seed(0)  # the same on every device
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=dtype)
