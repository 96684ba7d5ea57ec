"""What is measured, and a measured line."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

STREAMED_BYTES = 160 << 20  # more than the last-level cache of most machines
OPERATIONS = 20_000_000_000
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


def figure_of(case: Case, seconds: float, weight_bytes: int) -> Figure:
    """The line of a layer that took `seconds` and read `weight_bytes`."""
    return Figure(
        case.implementation, case.isa, case.threads, case.K, case.N, case.M,
        round(seconds * 1e6, 2), round(2e-9 * case.M * case.K * case.N / seconds, 2),
        round(1e-9 * weight_bytes / seconds, 3),
    )  # fmt: skip


def copies_of(case: Case, weight_bytes: int) -> int:
    """Copies of a layer: more than the caches hold, or about a tenth of a second of arithmetic."""
    enough = OPERATIONS // (2 * max(case.M, 1) * case.K * case.N)
    return int(max(2, min(STREAMED_BYTES // weight_bytes, enough, MOST_COPIES)))


def small_pages(size: int) -> NDArray[np.uint8]:
    """Anonymous memory without huge pages (NumPy asks for them), as weights of a mapped file."""
    memory = mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, np.uint8)


def median_pass(run: Callable[[], float], seconds: float) -> float:
    """Median of run() -> seconds of a pass, over passes that last `seconds` (five at least, but
    not beyond five times that), after one that warms up."""
    run()
    times: list[float] = []
    while sum(times) < 5 * seconds and (len(times) < 5 or sum(times) < seconds):
        times.append(run())
    return float(np.median(times))
