"""What the machine can do: lines without a layer (K = N = M = 0)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bitdistill.backends.kernels.bench.direct import bench_library
from bitdistill.backends.kernels.bench.figures import (
    STREAMED_BYTES,
    Figure,
    median_pass,
    small_pages,
)
from bitdistill.backends.kernels.pool import Pool


def _line(name: str, isa: str, threads: int, rate: float, *, of_bytes: bool = False) -> Figure:
    gops, gbytes = (0.0, round(rate * 1e-9, 3)) if of_bytes else (round(rate * 1e-9, 2), 0.0)
    return Figure(name, isa, threads, 0, 0, 0, 0.0, gops, gbytes)


def ceilings(threads: int, seconds: float, isas: Sequence[str] = ()) -> Iterator[Figure]:
    """ceiling-read once, ceiling-fma and ceiling-int8 for each of `isas` that has them."""
    data = small_pages(2 * STREAMED_BYTES)
    data[:] = 1
    library = bench_library()
    with Pool(threads) as pool:
        time = median_pass(
            lambda: library.bd_time_read(data.ctypes.data, data.nbytes, pool.handle), seconds
        )
        yield _line("ceiling-read", "-", threads, data.nbytes / time, of_bytes=True)
        for isa in isas:
            for name, rate in (
                ("ceiling-fma", library.bd_rate_fma(isa.encode(), pool.handle)),
                ("ceiling-int8", library.bd_rate_int8(isa.encode(), pool.handle)),
            ):
                if rate:
                    yield _line(name, isa, threads, rate)
