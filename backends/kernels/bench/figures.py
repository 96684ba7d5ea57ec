"""What is measured, and a measured line."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bitdistill.backends.kernels.pool import Pool

STREAMED_BYTES = 160 << 20  # more than the last-level cache of most machines
OPERATIONS = 20_000_000_000
SLOWER = {"scalar": 64, "-": 2}  # as kernels of ours, or so: the oracle, and ONNX Runtime's
MOST_COPIES = 1024


@dataclass(frozen=True)
class Case:
    """One layer (K -> N) for M tokens on `threads` threads; isa is "-" where it is not ours."""

    implementation: str
    isa: str
    threads: int
    K: int
    N: int
    M: int


@dataclass(frozen=True)
class Figure:
    """One measured line."""

    implementation: str
    isa: str
    threads: int
    K: int
    N: int
    M: int
    microseconds: float
    gops: float
    gbytes_per_s: float


class Pass(NamedTuple):
    """run(pool) -> seconds of a pass over `copies` of a layer, each of `weight_bytes`. Operators of
    ONNX Runtime have threads of their own, as many, and leave the pool alone."""

    run: Callable[[Pool], float]
    copies: int
    weight_bytes: int


def figure_of(case: Case, seconds: float, weight_bytes: int) -> Figure:
    """The line of a layer that took `seconds` and read `weight_bytes`."""
    return Figure(
        case.implementation, case.isa, case.threads, case.K, case.N, case.M,
        round(seconds * 1e6, 2), round(2e-9 * case.M * case.K * case.N / seconds, 2),
        round(1e-9 * weight_bytes / seconds, 3),
    )  # fmt: skip


def copies_of(case: Case, weight_bytes: int) -> int:
    """Copies of a layer: more than the caches hold, or about a tenth of a second of arithmetic."""
    operations = OPERATIONS // SLOWER.get(case.isa, 1)
    enough = operations // (2 * max(case.M, 1) * case.K * case.N)
    return int(max(2, min(STREAMED_BYTES // weight_bytes, enough, MOST_COPIES)))


def small_pages(size: int) -> NDArray[np.uint8]:
    """Anonymous memory without huge pages (NumPy asks for them), as weights of a mapped file."""
    memory = mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, np.uint8)
