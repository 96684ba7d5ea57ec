"""Runs teachers and students in PyTorch, by their own transformers model: the reference.

Every other backend is compared with this one, so it runs the model as it was trained. With
`storage` it first rounds what an artifact stores in 16 bits, and then is that artifact's reference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel

from bitdistill import checkpoint
from bitdistill.backends.base import Floats, Integers, Runtime
from bitdistill.decoder import family_of
from bitdistill.names import suggest
from bitdistill.quantize import BitLinear, RMSNorm

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
STORAGE = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class TorchCache:
    """A transformers cache, which grows by itself, and the room promised to the caller."""

    def __init__(self, config: Any, capacity: int) -> None:
        self.length, self.capacity = 0, capacity
        self.cache = DynamicCache(config=config)


class TorchRuntime(Runtime):
    """A teacher or student directory, loaded on the CPU.

    `dtype`: "float32", "float64" or "bfloat16". `storage`: types to round through first, as in an
    artifact's manifest: {"embedding": "float16", "norms": "float32"}; "embedding" covers the head,
    "biases" are those of the ternary linears. `tables`: float32 arrays to take the place of
    embedding and head, by tensor name. `activation_bits`: 8 or None, instead of what the student
    was trained with. `threads` sets PyTorch's threads, which are the process's. ValueError for an
    unknown type or architecture.
    """

    name = "torch"

    def __init__(
        self,
        path: Path,
        manifest: dict[str, Any],
        *,
        threads: int | None = None,
        dtype: str = "float32",
        storage: Mapping[str, str] | None = None,
        tables: Mapping[str, Floats] | None = None,
        activation_bits: int | Literal["trained"] | None = "trained",
    ) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"unknown dtype {dtype!r}{suggest(dtype, DTYPES)}")
        if threads is not None:
            if threads < 1:
                raise ValueError(f"threads must be 1 or more, got {threads}")
            torch.set_num_threads(threads)
        self.path, self.manifest = path, manifest
        self.model = _load(path, manifest)
        if storage is not None:
            round_storage(self.model, storage)
        for name, table in (tables or {}).items():
            self.model.get_parameter(name).data = torch.from_numpy(table)
        cast(self.model, DTYPES[dtype])
        for module in self.model.modules():
            if isinstance(module, BitLinear):
                module.freeze()
                if activation_bits != "trained":
                    module.activation_bits = activation_bits
        self.vocabulary = int(self.model.config.vocab_size)
        self.context = int(self.model.config.max_position_embeddings)
        self.stop_tokens = _stop_tokens(self.model)

    def new_cache(self, capacity: int) -> TorchCache:
        """An empty cache for one sequence of up to `capacity` tokens."""
        self.check_capacity(capacity)
        return TorchCache(self.model.config, capacity)

    @torch.inference_mode()
    def step(self, tokens: Sequence[int], cache: TorchCache) -> Floats:
        """Feed tokens of one sequence; float32 (V,) logits of the last."""
        self.check_tokens(tokens, cache.capacity - cache.length)
        output = self.model(
            input_ids=torch.tensor([list(tokens)]),
            past_key_values=cache.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache.length += len(tokens)
        return _floats(output.logits[0, -1])

    @torch.inference_mode()
    def logits_at(self, tokens_BT: Integers, lengths_B: Integers, rows: Integers) -> Floats:
        """float32 (P, V) at rows (b, t); causal attention never looks at padding on the right."""
        hidden = self.model.model(input_ids=torch.from_numpy(tokens_BT), use_cache=False)[0]
        picked = torch.from_numpy(rows)
        return _floats(self.model.lm_head(hidden[picked[:, 0], picked[:, 1]]))


def _load(path: Path, manifest: dict[str, Any]) -> PreTrainedModel:
    """The fp32 model of a directory of ours, or of a Hugging Face one of a known family."""
    if manifest:
        return checkpoint.load(path)
    family_of(AutoConfig.from_pretrained(path).model_type)  # ValueError for an unknown one
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def cast(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Convert the parameters in place; not the buffers, because angles need fp32 frequencies.

    In 16 bits a BitLinear keeps its fp32 weights: trits are taken from those.
    """
    for module in model.modules():
        if dtype.itemsize < 4 and isinstance(module, BitLinear | RMSNorm):
            continue
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.to(dtype)


def round_storage(model: PreTrainedModel, storage: Mapping[str, str]) -> None:
    """Round embedding and head, norms and biases through the types an artifact stores."""
    known = ("embedding", "norms", "biases")
    for part, name in storage.items():
        if part not in known:
            raise ValueError(f"unknown storage part {part!r}{suggest(part, known)}")
        if name not in STORAGE:
            raise ValueError(f"unknown storage type {name!r}{suggest(name, STORAGE)}")
    for module in model.modules():
        part = _part(module)
        if part in storage:
            value = module.get_parameter("bias" if part == "biases" else "weight")
            value.data = value.data.to(STORAGE[storage[part]]).to(value.dtype)


def _part(module: nn.Module) -> str:
    """Which part of an artifact a module's own values are: one of three, or none ("")."""
    if isinstance(module, BitLinear):
        return "" if module.bias is None else "biases"
    if isinstance(module, nn.Embedding | nn.Linear):
        return "embedding"
    return "norms" if "RMSNorm" in type(module).__name__ else ""


def _stop_tokens(model: PreTrainedModel) -> list[int]:
    generation = getattr(model, "generation_config", None)
    stop = getattr(generation, "eos_token_id", None)
    stop = model.config.eos_token_id if stop is None else stop
    if stop is None:
        return []
    return [stop] if isinstance(stop, int) else list(stop)


def _floats(logits: torch.Tensor) -> Floats:
    return np.ascontiguousarray(logits.float().numpy())
