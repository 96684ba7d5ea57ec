"""What the machine can do: samples of its rates, which rows take beside their own."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import lru_cache, partial

from bitdistill.backends.kernels.bench import figures
from bitdistill.backends.kernels.bench.direct import bench_library
from bitdistill.backends.kernels.bench.paired import Rounds, Sample, fastest, take_turns
from bitdistill.backends.kernels.pool import Pool

# Ways to read memory: places read in turn, and bytes fetched ahead of them (0: left to the
# processor). Which is the fastest depends on the processor and on other guests of its host.
READS = {"read": (4, 0), "read ahead": (4, 256)}


class Machine:
    """Memory to read, in small pages as the weights are, and more than caches hold."""

    def __init__(self) -> None:
        self._data = figures.small_pages(figures.STREAMED_BYTES)
        self._data[:] = 1

    def reads(self, pool: Pool) -> dict[str, Sample]:
        """Bytes a second that a pool reads, in each of READS."""

        def sample(streams: int, ahead: int) -> float:
            address, size = self._data.ctypes.data, self._data.nbytes
            return size / bench_library().bd_time_read(address, size, streams, ahead, pool.handle)

        return {name: partial(sample, *way) for name, way in READS.items()}


@lru_cache
def loops(isa: str) -> tuple[str, ...]:
    """Those of "fma" and "int8" that `isa` has."""
    return tuple(name for name, rate in _rates().items() if rate(isa.encode(), None))


def products(pool: Pool, isa: str) -> dict[str, Sample]:
    """Operations a second of a pool in each of `loops`."""
    return {name: partial(_rates()[name], isa.encode(), pool.handle) for name in loops(isa)}


def _rates() -> dict[str, Callable[[bytes, int | None], float]]:
    library = bench_library()
    return {"fma": library.bd_rate_fma, "int8": library.bd_rate_int8}


def read_of(rounds: Rounds) -> list[float]:
    """Bytes a second in each round, of the fastest of READS."""
    return fastest([rounds[name] for name in READS])


def read_rate(threads: int, seconds: float = 0.5) -> float:
    """Bytes a second that `threads` threads read from memory, the median over `seconds`."""
    with Pool(threads) as pool:
        return statistics.median(read_of(take_turns(Machine().reads(pool), seconds)))
