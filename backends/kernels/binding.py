"""ctypes binding to the kernels' C interface (bitdistill_kernels.h), for tests and benchmarks.

    kernels = Kernels()                 # the best instruction set here, or BITDISTILL_ISA
    y = kernels.ternary_linear(x, pack_kernel(trits), scale, norm_weight=w, epsilon=1e-6)

Arrays are float32 unless said otherwise, C-contiguous, and may start at any address.
"""

from __future__ import annotations

import ctypes as c
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from bitdistill.backends.kernels import library_path
from bitdistill.backends.kernels.binding_gate import GATE
from bitdistill.backends.kernels.binding_tables import (
    HalfTable,
    HeadTable,
    declare,
    gather_rows,
    quantized_head,
)
from bitdistill.packing import BASE3_LAYOUT_VERSION, base3_shape, kernel_shape
from bitdistill.tables import Table

MAX_COLUMNS = 1 << 17
Floats = NDArray[np.float32]


class Ternary(c.Structure):
    _fields_ = (
        ("packed", c.c_void_p),
        ("scale", c.c_void_p),
        ("bias", c.c_void_p),
        ("rows", c.c_int64),
        ("columns", c.c_int64),
        ("base3", c.c_int),
        ("update", c.c_int),
    )


class Input(c.Structure):
    _fields_ = (
        ("x", c.c_void_p),
        ("norm_weight", c.c_void_p),
        ("epsilon", c.c_float),
        ("tokens", c.c_int64),
        ("columns", c.c_int64),
    )


class Tokens(c.Structure):
    _fields_ = (
        ("q", c.c_void_p),
        ("down", c.c_void_p),
        ("sum", c.c_void_p),
        ("values", c.c_void_p),
        ("tokens", c.c_int64),
        ("columns", c.c_int64),
        ("stride", c.c_int64),
    )


_PREPARE = c.CFUNCTYPE(None, c.POINTER(Input), c.POINTER(Tokens), c.c_int64, c.c_int64)
_PRODUCT = c.CFUNCTYPE(
    None, c.POINTER(Ternary), c.POINTER(Tokens), c.c_void_p, c.c_int64, c.c_int64
)
_UNPACK = c.CFUNCTYPE(None, c.POINTER(Ternary), c.c_void_p, c.c_int64, c.c_int64)


class KernelTable(c.Structure):
    _fields_ = (
        ("name", c.c_char_p),
        ("supported", c.CFUNCTYPE(c.c_int)),
        ("quantize", _PREPARE),
        ("normalize", _PREPARE),
        ("gate", GATE),
        ("ternary", _PRODUCT),
        ("ternary_float", _PRODUCT),
        ("ternary_base3", _PRODUCT),
        ("unpack_base3", _UNPACK),
        ("head", c.POINTER(HeadTable)),
        ("attention", c.c_void_p),
        ("by_tokens", c.c_int),
    )


BODY = c.CFUNCTYPE(None, c.c_void_p, c.c_int64, c.c_int64)


@lru_cache(maxsize=1)
def library() -> c.CDLL:
    """The loaded library with its signatures; FileNotFoundError when it was not built."""
    lib = c.CDLL(str(library_path()))
    lib.bd_kernels.restype = c.POINTER(KernelTable)
    lib.bd_kernels.argtypes = [c.c_char_p]
    lib.bd_kernels_error.restype = c.c_char_p
    lib.bd_kernels_error.argtypes = [c.c_char_p]
    lib.bd_isa_name.restype = c.c_char_p
    lib.bd_isa_name.argtypes = [c.c_int]
    lib.bd_packed_bytes.restype = c.c_int64
    lib.bd_packed_bytes.argtypes = [c.c_int64, c.c_int64]
    lib.bd_base3_bytes.restype = c.c_int64
    lib.bd_base3_bytes.argtypes = [c.c_int64, c.c_int64]
    lib.bd_has_no_trits.argtypes = [c.c_void_p, c.c_size_t]
    lib.bd_scratch_bytes.restype = c.c_size_t
    lib.bd_scratch_bytes.argtypes = [c.c_int64, c.c_int64, c.c_int]
    lib.bd_tokens.restype = Tokens
    lib.bd_tokens.argtypes = [c.c_void_p, c.c_int64, c.c_int64, c.c_int]
    lib.bd_ternary_linear.restype = None
    lib.bd_ternary_linear.argtypes = [
        c.POINTER(KernelTable), c.POINTER(Ternary), c.POINTER(Input), c.c_int,
        c.c_void_p, c.c_void_p,
    ]  # fmt: skip
    lib.bd_pool_create.restype = c.c_void_p
    lib.bd_pool_create.argtypes = [c.c_int]
    lib.bd_pool_destroy.restype = None
    lib.bd_pool_destroy.argtypes = [c.c_void_p]
    lib.bd_pool_threads.argtypes = [c.c_void_p]
    lib.bd_pool_run.restype = None
    lib.bd_pool_run.argtypes = [c.c_void_p, c.c_int64, BODY, c.c_void_p]
    lib.bd_ternary_layers.restype = None
    lib.bd_ternary_layers.argtypes = [
        c.POINTER(KernelTable), c.POINTER(Ternary), c.c_int, c.POINTER(Input), c.c_int, c.c_void_p,
        c.c_void_p, c.POINTER(c.c_void_p),
    ]  # fmt: skip
    declare(lib)
    lib.bd_has_code_3.argtypes = [c.c_void_p, c.c_size_t]
    lib.bd_attention.argtypes = [c.POINTER(KernelTable), c.c_void_p, c.c_int64]
    return lib


def built_isas() -> list[str]:
    """Instruction sets compiled into the library, best first."""
    names: list[str] = []
    while (name := library().bd_isa_name(len(names))) is not None:
        names.append(name.decode())
    return names


def available_isas() -> list[str]:
    """Those of `built_isas` that this CPU can run."""
    return [name for name in built_isas() if library().bd_kernels(name.encode())]


def _float_array(name: str, value: NDArray, shape: tuple[int, ...]) -> Floats:
    if value.dtype != np.float32 or value.shape != shape or not value.flags.c_contiguous:
        raise ValueError(
            f"{name} must be contiguous float32 {shape}, got {value.dtype} {value.shape}"
        )
    return value


class Kernels:
    """The kernels of one instruction set; None takes the best one, or BITDISTILL_ISA.

    Raises ValueError, with the names there are, for one that is unknown or that this CPU lacks.
    """

    def __init__(self, isa: str | None = None) -> None:
        name = None if isa is None else isa.encode()
        self._table = library().bd_kernels(name)
        if not self._table:
            raise ValueError(library().bd_kernels_error(name).decode())
        self.table: KernelTable = self._table.contents
        self.isa: str = self.table.name.decode()

    def ternary_linear(
        self,
        x: Floats,
        packed: NDArray[np.uint8],
        scale: Floats,
        *,
        norm_weight: Floats | None = None,
        epsilon: float = 0.0,
        bias: Floats | None = None,
        activation_bits: int = 8,
    ) -> Floats:
        """x (M, K), packed in the kernel layout, scale (N,) -> y (M, N), on this thread.

        Raises ValueError for shapes or types that do not fit.
        """
        (tokens, columns), rows = x.shape, scale.shape[0]
        if activation_bits not in (0, 8) or not 0 < columns <= MAX_COLUMNS:
            raise ValueError(f"activation_bits {activation_bits}, K = {columns}: not supported")
        if packed.dtype != np.uint8 or packed.shape != kernel_shape(rows, columns):
            raise ValueError(f"packed must be uint8 {kernel_shape(rows, columns)}")
        optional = [
            None if value is None else _float_array(name, value, (size,)).ctypes.data
            for name, value, size in (("norm_weight", norm_weight, columns), ("bias", bias, rows))
        ]
        packed = np.ascontiguousarray(packed)
        scale = _float_array("scale", scale, (rows,))
        w = Ternary(packed.ctypes.data, scale.ctypes.data, optional[1], rows, columns)
        x = _float_array("x", x, (tokens, columns))
        source = Input(x.ctypes.data, optional[0], epsilon, tokens, columns)
        scratch = np.empty(
            library().bd_scratch_bytes(tokens, columns, activation_bits) // 8 + 1, np.uint64
        )
        y = np.empty((tokens, rows), np.float32)
        library().bd_ternary_linear(
            self._table, w, source, activation_bits, scratch.ctypes.data, y.ctypes.data
        )
        return y

    def quantize(
        self, x: Floats, norm_weight: Floats | None = None, epsilon: float = 0.0
    ) -> tuple[NDArray[np.int8], Floats, NDArray[np.int32]]:
        """x (M, K) -> q int8 (M, K), g / 127 of each token (M,), sum of q (M,)."""
        tokens, columns = x.shape
        x = _float_array("x", x, (tokens, columns))
        weight = None
        if norm_weight is not None:
            weight = _float_array("norm_weight", norm_weight, (columns,)).ctypes.data
        out = library().bd_tokens(None, tokens, columns, 8)
        q = np.full((tokens, out.stride), 99, np.int8)
        down, total = np.empty(tokens, np.float32), np.empty(tokens, np.int32)
        out.q, out.down, out.sum = q.ctypes.data, down.ctypes.data, total.ctypes.data
        source = Input(x.ctypes.data, weight, epsilon, tokens, columns)
        self.table.quantize(source, out, 0, tokens)
        if q[:, columns:].any():
            raise RuntimeError("the kernel left padding that is not zero")
        return q[:, :columns], down, total

    def ternary_dots(
        self, q: NDArray[np.int8], packed: NDArray[np.uint8], rows: int, layout: int = 1
    ) -> NDArray[np.float32]:
        """Integer products of q int8 (M, K), all of -128..127, with trits (N, K): (M, N).

        `packed` is in the kernel layout of version `layout`.
        """
        tokens, columns = q.shape
        out = library().bd_tokens(None, tokens, columns, 8)
        padded = np.zeros((tokens, out.stride), np.int8)
        padded[:, :columns] = q
        ones = np.ones(max(tokens, rows), np.float32)
        total = q.sum(1, dtype=np.int32)
        out.q, out.down, out.sum = padded.ctypes.data, ones.ctypes.data, total.ctypes.data
        return self._product(out, packed, ones[:rows], layout)

    def base3_linear(self, x: Floats, packed: NDArray[np.uint8], scale: Floats) -> Floats:
        """x (M, K), packed in base 3, scale (N,) -> y (M, N), on this thread."""
        tokens, columns = x.shape
        x = _float_array("x", x, (tokens, columns))
        scratch = np.empty(library().bd_scratch_bytes(tokens, columns, 8) // 8 + 1, np.uint64)
        prepared = library().bd_tokens(scratch.ctypes.data, tokens, columns, 8)
        self.table.quantize(Input(x.ctypes.data, None, 0.0, tokens, columns), prepared, 0, tokens)
        return self._product(prepared, packed, scale, BASE3_LAYOUT_VERSION)

    def _product(
        self, tokens: Tokens, packed: NDArray[np.uint8], scale: Floats, layout: int
    ) -> Floats:
        base3, rows = layout == BASE3_LAYOUT_VERSION, len(scale)
        shape = (base3_shape if base3 else kernel_shape)(rows, tokens.columns)
        if packed.dtype != np.uint8 or packed.shape != shape or not packed.flags.c_contiguous:
            raise ValueError(f"packed must be uint8 {shape}")
        w = Ternary(packed.ctypes.data, scale.ctypes.data, None, rows, tokens.columns)
        y = np.empty((tokens.tokens, rows), np.float32)
        product = self.table.ternary_base3 if base3 else self.table.ternary
        product(w, tokens, y.ctypes.data, 0, len(packed))
        return y

    def attention(self, call: c.Structure, tokens: int) -> None:
        """`keep` and `attend` of binding_attention.AttentionCall, on this thread."""
        if not library().bd_attention(self._table, c.addressof(call), tokens):
            raise MemoryError("no memory for attention")

    def head(self, x: Floats, table: NDArray[np.float16]) -> Floats:
        """x (M, K), table float16 (N, K) -> (M, N), on this thread."""
        if table.dtype != np.float16 or not table.flags.c_contiguous:
            raise ValueError(f"table must be contiguous float16, got {table.dtype}")
        rows, columns = table.shape
        tokens = x.shape[0]
        x = _float_array("x", x, (tokens, columns))
        y = np.empty((tokens, rows), np.float32)
        weights = HalfTable(table.ctypes.data, rows, columns)
        self.table.head.contents.half(weights, x.ctypes.data, tokens, y.ctypes.data, 0, rows)
        return y

    def quantized_head(self, x: Floats, table: Table) -> Floats:
        """x (M, K), a table (N, K) of 8 or 4 bits -> (M, N), on this thread."""
        x = _float_array("x", x, (x.shape[0], table.columns))
        return quantized_head(library(), self.table.head.contents, x, table)


def gather(table: Table, ids: NDArray[np.int64]) -> Floats:
    """Rows (n, K) of a table; ids (n,). IndexError for an id without a row."""
    return gather_rows(library(), table, ids)
