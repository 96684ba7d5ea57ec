"""What an artifact stores in fewer bits, rounded in a PyTorch model: the artifact's reference."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from transformers import PreTrainedModel

from bitdistill import tables
from bitdistill.backends.torch_attention import TYPES as CACHE
from bitdistill.backends.torch_attention import round_cache
from bitdistill.names import suggest
from bitdistill.packing import stock_block
from bitdistill.quantize import BitLinear

STORAGE = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
QUANTISED = {"int8": 8, "int4": 4}  # embedding and head: bitdistill/tables.py
BLOCKS = "int8 blocks"  # rounding as ONNX Runtime's MatMulNBits does
ACTIVATIONS = ("int8", BLOCKS)
HEAD_ACTIVATIONS = ("int14", BLOCKS, "float32")  # of a quantised head
OWN_HEAD = {"int8": "int14", "int4": BLOCKS}  # what our own kernels round, for each table
HEAD_LEVELS = 63 * 128
BLOCK_LEVELS = 127.0
SMALLEST = 2.0**-100


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
            table = storage[part]
            _round_head(module, table, storage.get("head_activations", OWN_HEAD[table]))
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
