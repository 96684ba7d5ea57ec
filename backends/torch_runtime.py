"""Runs teachers and students in PyTorch, by their own transformers model: the reference.

Every other backend is compared with this one, so it runs the model as it was trained. With
`storage` it first rounds what an artifact stores in fewer bits, and then is that artifact's
reference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import AutoConfig, DynamicCache, PreTrainedModel

from bitdistill import checkpoint
from bitdistill.backends.base import Floats, Integers, Runtime
from bitdistill.backends.torch_storage import round_storage
from bitdistill.decoder import family_of
from bitdistill.names import suggest
from bitdistill.quantize import bit_linears
from bitdistill.student import cast

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
DEVICES = ("cpu", "cuda")


class TorchCache:
    """A transformers cache, which grows by itself, and the room promised to the caller."""

    def __init__(self, config: Any, capacity: int) -> None:
        self.length, self.capacity = 0, capacity
        self.cache = DynamicCache(config=config)


class TorchRows:
    """Keys and values of R sequences, padded on the left, so that windows count real tokens."""

    def __init__(self, config: Any, lengths: Sequence[int], device: torch.device) -> None:
        self.cache = DynamicCache(config=config)
        self.lengths_R = torch.tensor(lengths, device=device)
        ends = torch.arange(max(lengths), 0, -1, device=device)
        self.mask_RT = (ends[None] <= self.lengths_R[:, None]).long()

    def advance(self) -> None:
        """Make room for one more token in each row."""
        self.lengths_R = self.lengths_R + 1
        self.mask_RT = torch.cat([self.mask_RT, torch.ones_like(self.mask_RT[:, :1])], 1)


class TorchRuntime(Runtime):
    """A teacher or student directory.

    `device`: "cpu", or "cuda" for a GPU. `dtype`: "float32", "float64" or "bfloat16". `storage`:
    types to round through first, as in an artifact's manifest: {"embedding": "float16", "norms":
    "float32"}; "embedding" covers the head and may be "int8" or "int4", "biases" are those of the
    ternary linears; "activations" and "head_activations" (of a quantised head) say how an artifact
    rounds them where that is not as in training; "cache" is the type of keys and values. `tables`:
    float32 arrays to take the place of embedding and head, by tensor name.
    `activation_bits`: 8 or None, instead of what the student was trained with. `threads` sets
    PyTorch's threads, which are the process's. ValueError for an unknown type or architecture, or a
    device that is not there.
    """

    name = "torch"

    def __init__(
        self,
        path: Path,
        manifest: dict[str, Any],
        *,
        threads: int | None = None,
        device: str = "cpu",
        dtype: str = "float32",
        storage: Mapping[str, str] | None = None,
        tables: Mapping[str, Floats] | None = None,
        activation_bits: int | Literal["trained"] | None = "trained",
    ) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"unknown dtype {dtype!r}{suggest(dtype, DTYPES)}")
        self.device = _device(device)
        if threads is not None:
            if threads < 1:
                raise ValueError(f"threads must be 1 or more, got {threads}")
            torch.set_num_threads(threads)
        self.path, self.manifest = path, manifest
        self.model = _load(path, manifest)
        for layer in bit_linears(self.model):
            if activation_bits != "trained":
                layer.activation_bits = activation_bits
        if storage is not None:  # an artifact may round activations its own way
            round_storage(self.model, storage)
        for name, table in (tables or {}).items():
            self.model.get_parameter(name).data = torch.from_numpy(table)
        cast(self.model, DTYPES[dtype])
        for layer in bit_linears(self.model):
            layer.freeze()
        self.model.to(self.device)
        self.vocabulary = int(self.model.config.vocab_size)
        self.context = int(self.model.config.max_position_embeddings)
        self.stop_tokens = checkpoint.stop_tokens(path, self.model.config.to_dict())

    def new_cache(self, capacity: int) -> TorchCache:
        """An empty cache for one sequence of up to `capacity` tokens."""
        self.check_capacity(capacity)
        return TorchCache(self.model.config, capacity)

    @torch.inference_mode()
    def step(self, tokens: Sequence[int], cache: TorchCache) -> Floats:
        """Feed tokens of one sequence; float32 (V,) logits of the last."""
        self.check_tokens(tokens, cache.capacity - cache.length)
        output = self.model(  # by place: transformers changes the name of its cache
            torch.tensor([list(tokens)], device=self.device),
            None,
            None,
            cache.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache.length += len(tokens)
        return _floats(output.logits[0, -1])

    @torch.inference_mode()
    def start_rows(self, prompts: Sequence[Sequence[int]], room: int) -> tuple[Floats, TorchRows]:
        """Feed all prompts in one padded forward: float32 (R, V), and their cache."""
        rows = TorchRows(self.model.config, [len(prompt) for prompt in prompts], self.device)
        tokens_RT = torch.zeros_like(rows.mask_RT)
        flat = torch.tensor([t for p in prompts for t in p], device=self.device)
        tokens_RT[rows.mask_RT.bool()] = flat
        positions_RT = (rows.mask_RT.cumsum(1) - 1).clamp(min=0)
        return self._feed_rows(tokens_RT, positions_RT, rows), rows

    @torch.inference_mode()
    def step_rows(self, tokens: Sequence[int], rows: TorchRows) -> Floats:
        """Feed one token to each row; float32 (R, V)."""
        positions_R = rows.lengths_R
        rows.advance()
        tokens_R = torch.tensor(tokens, device=self.device)
        return self._feed_rows(tokens_R[:, None], positions_R[:, None], rows)

    def _feed_rows(self, tokens_RT: torch.Tensor, at_RT: torch.Tensor, rows: TorchRows) -> Floats:
        output = self.model(
            tokens_RT,
            rows.mask_RT,
            at_RT,
            rows.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return _floats(output.logits[:, -1])

    def select_rows(self, rows: TorchRows, keep: Sequence[int]) -> TorchRows:
        """Rows dropped, repeated and reordered."""
        chosen = torch.tensor(keep, device=self.device)
        rows.cache.batch_select_indices(chosen)
        rows.lengths_R, rows.mask_RT = rows.lengths_R[chosen], rows.mask_RT[chosen]
        return rows

    @torch.inference_mode()
    def logits_at(self, tokens_BT: Integers, lengths_B: Integers, rows: Integers) -> Floats:
        """float32 (P, V) at rows (b, t); causal attention never looks at padding on the right."""
        ids_BT = torch.from_numpy(tokens_BT).to(self.device)
        hidden = self.model.model(input_ids=ids_BT, use_cache=False)[0]
        picked = torch.from_numpy(rows).to(self.device)
        return _floats(self.model.lm_head(hidden[picked[:, 0], picked[:, 1]]))


def _device(name: str) -> torch.device:
    if name not in DEVICES:
        raise ValueError(f"unknown device {name!r}{suggest(name, DEVICES)}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("PyTorch sees no CUDA device; leave the device out to run on the CPU")
    return torch.device(name)


def _load(path: Path, manifest: dict[str, Any]) -> PreTrainedModel:
    """The fp32 model of a directory of ours, or of a Hugging Face one of a known family."""
    if manifest:
        return checkpoint.load(path)
    family_of(AutoConfig.from_pretrained(path).model_type)  # ValueError for an unknown one
    return checkpoint.load_plain(path, torch.float32)


def _floats(logits: torch.Tensor) -> Floats:
    return np.ascontiguousarray(logits.float().cpu().numpy())
