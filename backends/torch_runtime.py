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
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel

from bitdistill import checkpoint, tables
from bitdistill.backends.base import Floats, Integers, Runtime
from bitdistill.backends.torch_attention import TYPES as CACHE
from bitdistill.backends.torch_attention import round_cache
from bitdistill.decoder import family_of
from bitdistill.names import suggest
from bitdistill.packing import stock_block
from bitdistill.quantize import BitLinear, RMSNorm, bit_linears

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
STORAGE = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
QUANTISED = {"int8": 8, "int4": 4}  # embedding and head: bitdistill/tables.py
BLOCKS = "int8 blocks"  # rounding as ONNX Runtime's MatMulNBits does
ACTIVATIONS = ("int8", BLOCKS)
HEAD_ACTIVATIONS = ("int14", BLOCKS, "float32")  # of a quantised head
HEAD_LEVELS = 63 * 128
BLOCK_LEVELS = 127.0
SMALLEST = 2.0**-100


class TorchCache:
    """A transformers cache, which grows by itself, and the room promised to the caller."""

    def __init__(self, config: Any, capacity: int) -> None:
        self.length, self.capacity = 0, capacity
        self.cache = DynamicCache(config=config)


class TorchRows:
    """Keys and values of R sequences, padded on the left, so that windows count real tokens."""

    def __init__(self, config: Any, lengths: Sequence[int]) -> None:
        self.cache = DynamicCache(config=config)
        self.lengths_R = torch.tensor(lengths)
        ends = torch.arange(max(lengths), 0, -1)
        self.mask_RT = (ends[None] <= self.lengths_R[:, None]).long()

    def advance(self) -> None:
        """Make room for one more token in each row."""
        self.lengths_R = self.lengths_R + 1
        self.mask_RT = torch.cat([self.mask_RT, torch.ones_like(self.mask_RT[:, :1])], 1)


class TorchRuntime(Runtime):
    """A teacher or student directory, loaded on the CPU.

    `dtype`: "float32", "float64" or "bfloat16". `storage`: types to round through first, as in an
    artifact's manifest: {"embedding": "float16", "norms": "float32"}; "embedding" covers the head
    and may be "int8" or "int4", "biases" are those of the ternary linears; "activations" and
    "head_activations" (of a quantised head) say how an artifact rounds them where that is not as in
    training; "cache" is the type of keys and values. `tables`: float32 arrays to take the place of
    embedding and head, by tensor name.
    `activation_bits`: 8 or None, instead of what the student was trained with. `threads` sets
    PyTorch's threads, which are the process's. ValueError for an unknown type or architecture.
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
    def start_rows(self, prompts: Sequence[Sequence[int]], room: int) -> tuple[Floats, TorchRows]:
        """Feed all prompts in one padded forward: float32 (R, V), and their cache."""
        rows = TorchRows(self.model.config, [len(prompt) for prompt in prompts])
        tokens_RT = torch.zeros_like(rows.mask_RT)
        tokens_RT[rows.mask_RT.bool()] = torch.tensor([t for p in prompts for t in p])
        positions_RT = (rows.mask_RT.cumsum(1) - 1).clamp(min=0)
        return self._feed_rows(tokens_RT, positions_RT, rows), rows

    @torch.inference_mode()
    def step_rows(self, tokens: Sequence[int], rows: TorchRows) -> Floats:
        """Feed one token to each row; float32 (R, V)."""
        positions_R = rows.lengths_R
        rows.advance()
        return self._feed_rows(torch.tensor(tokens)[:, None], positions_R[:, None], rows)

    def _feed_rows(self, tokens_RT: torch.Tensor, at_RT: torch.Tensor, rows: TorchRows) -> Floats:
        output = self.model(
            input_ids=tokens_RT,
            attention_mask=rows.mask_RT,
            position_ids=at_RT,
            past_key_values=rows.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return _floats(output.logits[:, -1])

    def select_rows(self, rows: TorchRows, keep: Sequence[int]) -> TorchRows:
        """Rows dropped, repeated and reordered."""
        chosen = torch.tensor(keep)
        rows.cache.batch_select_indices(chosen)
        rows.lengths_R, rows.mask_RT = rows.lengths_R[chosen], rows.mask_RT[chosen]
        return rows

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
    """Round what an artifact rounds: embedding, head, norms, biases, and activations its way.

    A quantised head reads rounded activations, and so does this model's then.
    """
    _check_storage(storage)
    round_cache(model, storage.get("cache", "float32"))
    rounded: set[int] = set()  # a tied table is one parameter of two modules
    for module in model.modules():
        part = _part(module)
        if isinstance(module, BitLinear) and storage.get("activations") == BLOCKS:
            _round_by_block(module)
        if part not in storage:
            continue
        if storage[part] in QUANTISED and isinstance(module, nn.Linear):
            _round_head(module, storage[part], storage.get("head_activations", "int14"))
        value = module.get_parameter("bias" if part == "biases" else "weight")
        if id(value) not in rounded:
            value.data = _round(value.data, storage[part])
            rounded.add(id(value))


def _check_storage(storage: Mapping[str, str]) -> None:
    types = {
        "embedding": tuple(STORAGE | QUANTISED),
        "norms": tuple(STORAGE),
        "biases": tuple(STORAGE),
        "activations": ACTIVATIONS,
        "head_activations": HEAD_ACTIVATIONS,
        "cache": CACHE,
    }
    for part, name in storage.items():
        if part not in types:
            raise ValueError(f"unknown storage part {part!r}{suggest(part, types)}")
        if name not in types[part]:
            raise ValueError(f"unknown storage type {name!r}{suggest(name, types[part])}")


class _BlockRounding(nn.Module):
    """What a BitLinear's norm gives, in 8 bits with a scale for each block of columns."""

    def __init__(self, norm: nn.Module | None, block: int) -> None:
        super().__init__()
        self.block = block
        self.inner = norm if norm is not None else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return round_blocks(self.inner(x), self.block)


def _round_by_block(module: BitLinear) -> None:
    if module.activation_bits is not None:
        module.activation_bits = None
        block = stock_block(module.in_features)
        module.norm = _BlockRounding(module.norm, block)  # type: ignore[assignment]


def round_blocks(x: torch.Tensor, block: int) -> torch.Tensor:
    """x (..., K) rounded to 8 bits with a scale for each `block` columns."""
    wide = x if x.dtype == torch.float64 else x.float()
    columns = wide.shape[-1]
    padded = torch.nn.functional.pad(wide, (0, -columns % block)).unflatten(-1, (-1, block))
    step = padded.abs().amax(-1, keepdim=True) / BLOCK_LEVELS
    up = torch.where(step > 0, 1.0 / step, 0.0)
    rounded = torch.round(padded * up) * step
    return rounded.flatten(-2)[..., :columns].to(x.dtype)


def _round_head(head: nn.Linear, table: str, activations: str) -> None:
    if activations == "int14":
        head.register_forward_pre_hook(_round_head_input)
    if activations == BLOCKS:
        block = tables.BLOCK_COLUMNS if table == "int4" else stock_block(head.in_features)
        head.register_forward_pre_hook(lambda _, inputs: (round_blocks(inputs[0], block),))


def _round(weight: torch.Tensor, name: str) -> torch.Tensor:
    if name not in QUANTISED:
        return weight.to(STORAGE[name]).to(weight.dtype)
    stored = tables.quantize(weight.float().numpy(), QUANTISED[name])
    return torch.from_numpy(tables.dequantize(stored)).to(weight.dtype)


def _round_head_input(module: nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    """x (..., K) in 14 bits a token, as bitdistill_kernels.h says."""
    x = inputs[0] if inputs[0].dtype == torch.float64 else inputs[0].float()
    g = x.abs().amax(-1, keepdim=True)
    up = torch.where(g < SMALLEST, 0.0, HEAD_LEVELS / g)
    return ((torch.round(x * up) * (g / HEAD_LEVELS)).to(inputs[0].dtype),)


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
