"""The heads through the C interface on our own threads.

Each thread takes its part of every copy in turn. The loop over copies is Python's: two or three
microseconds a copy, beside a head's milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from bitdistill import tables
from bitdistill.backends.kernels.bench.figures import (
    Case,
    Pass,
    copies_of,
    small_pages,
)
from bitdistill.backends.kernels.binding import Kernels, library
from bitdistill.backends.kernels.binding_tables import HalfTable, quantized_table
from bitdistill.backends.kernels.pool import Pool

HEADS = ((1024, 151_936), (576, 49_152))
BITS = {"head-int8": 8, "head-int4": 4}
Part = Callable[[int, int], None]  # units [first, last) of every copy


def _filled(shape: tuple[int, ...], values: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """uint8 of a shape in small pages, which repeats `values`."""
    memory = small_pages(int(np.prod(shape)))
    memory[:] = np.resize(values, memory.shape)
    return memory.reshape(shape)


def _random_bytes() -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, 1 << 20, np.uint8)


def _pass(
    copies: int, weight_bytes: int, units: int, prepare: Callable[[], None], part: Part
) -> Pass:
    """`prepare` (activations, once a pass and copy) and the parts of all copies."""

    def run(pool: Pool) -> float:
        start = perf_counter()
        for _ in range(copies):
            prepare()
        pool.run(units, part)
        return perf_counter() - start

    return Pass(run, copies, weight_bytes)


@contextmanager
def head(case: Case) -> Iterator[Pass]:
    """head-int8 and head-int4: quantising included, group and row scales in the bytes."""
    bits = BITS[case.implementation]
    table = Kernels(case.isa).table.head.contents
    shapes = tables.shapes(case.N, case.K, bits)
    weight_bytes = int(np.prod(shapes["codes"])) + 4 * case.N
    weight_bytes += int(np.prod(shapes.get("group_scale", (0,))))
    count, some = copies_of(case, weight_bytes), _random_bytes()
    scale, y = np.full(case.N, 0.02, np.float32), np.empty((case.M, case.N), np.float32)
    copies = []
    for _ in range(count):
        groups = _filled(shapes["group_scale"], some).view(np.int8) if bits == 4 else None
        codes = _filled(shapes["codes"], some)
        copies.append(tables.Table(bits, case.N, case.K, codes, scale, groups))
    weights = [quantized_table(copy) for copy in copies]
    x = np.random.default_rng(1).standard_normal((case.M, case.K), np.float32)
    lib = library()
    scratch = np.empty(lib.bd_head_scratch_bytes(case.M, case.K, bits) // 8 + 1, np.uint64)
    tokens = lib.bd_head_tokens(scratch.ctypes.data, case.M, case.K, bits)

    def part(first: int, last: int) -> None:
        for w in weights:
            (table.int8 if bits == 8 else table.int4)(w, tokens, y.ctypes.data, first, last)

    yield _pass(
        count, weight_bytes, case.N if bits == 8 else len(copies[0].codes),
        lambda: lib.bd_head_quantize(x.ctypes.data, tokens, 0, case.M), part,
    )  # fmt: skip


@contextmanager
def half(case: Case) -> Iterator[Pass]:
    """head-16bit."""
    table, weight_bytes = Kernels(case.isa).table.head.contents, 2 * case.N * case.K
    some = np.random.default_rng(0).standard_normal(1 << 19).astype(np.float16).view(np.uint8)
    shape = (copies_of(case, weight_bytes), case.N, 2 * case.K)
    memory = _filled(shape, some)
    copies = [HalfTable(w.ctypes.data, case.N, case.K) for w in memory]
    x = np.random.default_rng(1).standard_normal((case.M, case.K), np.float32)
    y = np.empty((case.M, case.N), np.float32)

    def part(first: int, last: int) -> None:
        for w in copies:
            table.half(w, x.ctypes.data, case.M, y.ctypes.data, first, last)

    yield _pass(len(memory), weight_bytes, case.N, lambda: None, part)
