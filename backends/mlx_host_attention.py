"""Attention of an MLX artifact on a CPU without Metal, by the kernels; see mlx_host.py.

Shapes: B sequences, T tokens, N columns of a projection, D head size, S positions of a cache.
"""

from __future__ import annotations

import ctypes as c
from typing import Any

import numpy as np

from bitdistill.backends.kernels.binding import library
from bitdistill.backends.kernels.binding_attention import AttentionCall, address
from bitdistill.backends.mlx_architecture import Attention, Model
from bitdistill.backends.mlx_host import (
    Floats,
    HostGate,
    HostHead,
    HostNorm,
    Workers,
    dense_table,
    floats,
    keep_freed_memory,
    like,
    move_product,
)
from bitdistill.backends.mlx_linear import Norm, TernaryLinear
from bitdistill.decoder import DecoderSpec, RotarySpec

FLOAT_BYTES = 4
HEAD_MULTIPLE, MAX_HEAD_SIZE = 16, 1024  # of bitdistill_attention.h


class RotaryTables:
    """cos and sin of the positions that were needed so far, and of as many more."""

    def __init__(self, spec: RotarySpec) -> None:
        self.spec, self.tables = spec, spec.tables(0)

    def __call__(self, positions: int) -> tuple[Floats, Floats]:
        """float32 (at least `positions`, D / 2) each."""
        tables = self.tables  # another thread may put others there
        if len(tables[0]) < positions:
            tables = self.spec.tables(2 * positions)
            if len(tables[0]) > len(self.tables[0]):
                self.tables = tables
        return tables


class HostCache:
    """A layer's keys and values, float32 (2, B, heads, S, D), of `offset` tokens so far."""

    arrays: tuple[()] = ()  # none of MLX's, to be evaluated

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.offset, self.held = 0, np.empty((2, *shape), np.float32)

    def make_mask(self, length: int, return_array: bool, window_size: int | None) -> None:
        """The kernels need none."""


class HostAttention:
    """What a layer's attention does between its projections, over at most `window` positions.

    Raises ValueError for heads of a size that the kernels do not take.
    """

    def __init__(
        self, layer: Attention, rotary: RotaryTables, window: int | None, workers: Workers
    ) -> None:
        if layer.head_dim % HEAD_MULTIPLE or layer.head_dim > MAX_HEAD_SIZE:
            raise ValueError(
                f"attention heads of {layer.head_dim} are not a multiple of {HEAD_MULTIPLE} up to "
                f"{MAX_HEAD_SIZE}, as the CPU kernels need them; load with products='mlx'"
            )
        self.rotary, self.window, self.workers = rotary, window or 0, workers
        self.norms: list[Floats | None] = [None, None]
        self.epsilon = 0.0
        if "q_norm" in layer:
            self.norms = [floats(layer.q_norm.gain), floats(layer.k_norm.gain)]
            self.epsilon = layer.q_norm.eps

    def __call__(
        self, layer: Attention, q: Any, k: Any, v: Any, rotary: Any, mask: Any, cache: Any
    ) -> Any:
        """(B, T, N) -> (B, T, query heads * D), behind what a cache holds."""
        queries, keys, values = floats(q), floats(k), floats(v)
        (batch, tokens, width), narrow = queries.shape, keys.shape[2]
        size = layer.head_dim
        heads, group = narrow // size, width // narrow
        held = cache or HostCache((batch, heads, tokens, size))
        past, positions = held.offset, held.held.shape[3]
        held.offset += tokens
        y = np.empty_like(queries)
        rotations = self.rotary(past + tokens)
        constants = (*map(address, (*rotations, *self.norms)), self.epsilon, layer.scale)
        sizes = (past, group, size, self.window, 8 * FLOAT_BYTES)
        starts = [array.ctypes.data for array in (queries, keys, values, y, *held.held)]
        whole = np.zeros(batch * heads, bool)

        def attend(first: int, last: int) -> None:
            for index in range(first, last):
                sequence, head = divmod(index, heads)
                wide = sequence * tokens * width + head * group * size
                thin = sequence * tokens * narrow + head * size
                row = index * positions * size
                offsets = (wide, thin, thin, wide, row, row)
                at = [s + FLOAT_BYTES * offset for s, offset in zip(starts, offsets, strict=True)]
                call = AttentionCall(
                    *at[:4], width, narrow, narrow, width, *at[4:], *constants, *sizes
                )
                whole[index] = library().bd_attention(
                    self.workers.kernels.table, c.addressof(call), tokens
                )

        self.workers.share(tokens, batch * heads, attend)
        if not whole.all():
            raise MemoryError("no memory for attention")
        return like(y, q)


def move_to_host(model: Model, spec: DecoderSpec, threads: int) -> HostHead:
    """Replace the leaves of a loaded model by those that run here; returns its head.

    Packed weights are dropped from the model.
    """
    keep_freed_memory()
    workers = Workers(threads)
    tables = [RotaryTables(rotary) for rotary in spec.rotary]
    for block, layer in zip(model.layers, spec.layers, strict=True):
        attention = block.self_attn
        attention.mix = HostAttention(attention, tables[layer.rotary], layer.window, workers)
        block.mlp.combine = HostGate(spec.activation, workers)
    for module in model.modules():
        if isinstance(module, TernaryLinear):
            move_product(module, workers)
        elif isinstance(module, Norm):
            module.normalize = HostNorm(module)
    return HostHead(dense_table(model.head))
