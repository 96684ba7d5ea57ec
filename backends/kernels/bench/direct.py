"""Our kernels through their C interface, on their own threads: the loop over copies runs in C."""

from __future__ import annotations

import ctypes as c
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from bitdistill.backends.kernels.bench.figures import (
    Case,
    Pass,
    copies_of,
    small_pages,
)
from bitdistill.backends.kernels.binding import Input, Kernels, KernelTable, Ternary, library
from bitdistill.backends.kernels.pool import Pool
from bitdistill.packing import base3_shape, kernel_shape

# The bytes in which every 2-bit code is 0, 1 or 2.
VALID_BYTES = np.array([b for b in range(256) if not b & b >> 1 & 0x55], np.uint8)
# The bytes that hold five trits.
BASE3_BYTES = np.array([-(-x * 256 // 243) for x in range(243)], np.uint8)


@lru_cache(maxsize=1)
def bench_library() -> c.CDLL:
    """The kernel library with the signatures of bitdistill_bench.h."""
    lib = library()
    lib.bd_time_ternary.restype = c.c_double
    lib.bd_time_ternary.argtypes = [
        c.POINTER(KernelTable), c.POINTER(Ternary), c.c_int, c.POINTER(Input), c.c_void_p,
        c.c_void_p, c.c_void_p,
    ]  # fmt: skip
    lib.bd_time_read.restype = c.c_double
    lib.bd_time_read.argtypes = [c.c_void_p, *[c.c_int64] * 3, c.c_void_p]
    for name in ("bd_rate_fma", "bd_rate_int8"):
        getattr(lib, name).restype = c.c_double
        getattr(lib, name).argtypes = [c.c_char_p, c.c_void_p]
    return lib


def packed_copies(N: int, K: int, copies: int, base3: bool = False) -> NDArray[np.uint8]:
    """uint8 (copies, *shape of a layout): random trits, the copies repeating one megabyte."""
    shape = (copies, *(base3_shape if base3 else kernel_shape)(N, K))
    valid = BASE3_BYTES if base3 else VALID_BYTES
    chosen = np.random.default_rng(0).integers(0, len(valid), 1 << 20, np.uint8)
    packed = small_pages(int(np.prod(shape)))
    packed[:] = np.resize(valid[chosen], packed.shape)
    return packed.reshape(shape)


@contextmanager
def ternary_pass(case: Case) -> Iterator[Pass]:
    """ternary-2bit and ternary-base3: RMSNorm left out, quantising and unpacking included."""
    base3 = case.implementation == "ternary-base3"
    weight_bytes = int(np.prod((base3_shape if base3 else kernel_shape)(case.N, case.K)))
    packed = packed_copies(case.N, case.K, copies_of(case, weight_bytes), base3)
    scales = np.full((len(packed), case.N), 0.02, np.float32)
    copies = (Ternary * len(packed))(
        *(
            Ternary(w.ctypes.data, scale.ctypes.data, None, case.N, case.K, base3)
            for w, scale in zip(packed, scales, strict=True)
        )
    )
    x = np.random.default_rng(1).standard_normal((case.M, case.K), np.float32)
    y = np.empty((case.M, case.N), np.float32)
    scratch = np.empty(library().bd_scratch_bytes(case.M, case.K, 8) // 8 + 1, np.uint64)
    source, kernels = Input(x.ctypes.data, None, 0.0, case.M, case.K), Kernels(case.isa)

    def run(pool: Pool) -> float:
        return bench_library().bd_time_ternary(
            kernels.table, copies, len(packed), source, scratch.ctypes.data, pool.handle,
            y.ctypes.data,
        )  # fmt: skip

    yield Pass(run, len(packed), weight_bytes)
