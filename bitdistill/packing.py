"""Trits <-> bytes: the storage specification that every exporter and kernel obeys (NumPy only).

Five layouts of one ternary matrix W = D * t, t in {-1, 0, +1}, shape (N, K) = (out, in):

canonical   uint8 (N, ceil(K/4)). Row-major; byte j of a row holds the codes t+1 of k = 4j .. 4j+3,
            the first in the lowest two bits. Padding codes are 1 (the trit 0). For exchange.
kernel v1   uint8 (ceil(N/32), ceil(K/16), 32, 4). A block of 32 rows and 16 columns is 128 bytes:
            byte j of row r holds codes t+1 of k = 16q + 4s + j at bits 2s, s = 0..3. Every SIMD
            lane is an output row, so a matrix-vector product needs no horizontal sums, and the file
            bytes are what the kernel reads: nothing is copied at load. Padding codes are 1.
kernel v2   uint8 (ceil(N/32), ceil(K/20), 32, 4). The same with five trits a byte, 1.6 bits a
            weight: byte j of row r holds codes c_s of k = 20q + 4s + j, s = 0..4, as
            ceil(x 256/243) of x = c_0 81 + c_1 27 + c_2 9 + c_3 3 + c_4. Times 3 the byte carries
            the first code beyond its 8 bits, and keeps the others. A fifth less memory than v1, and
            up to twice its arithmetic for one token, as fast where memory is slow.
stock       uint8 (N, blocks, block/4): ONNX Runtime's 2-bit `MatMulNBits` layout, codes t+2 least
            significant first, in blocks of 128, 64 or 32 columns. Padding codes are 2 (the trit 0).
affine      uint32 (N, K/16): MLX's 2-bit affine `QuantizedLinear` layout, codes t+1 least
            significant first; w = scale * code + bias with scale = D and bias = -D is exact.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

KERNEL_LAYOUT_VERSION = 1
BASE3_LAYOUT_VERSION = 2
LAYOUTS = {2.0: KERNEL_LAYOUT_VERSION, 1.6: BASE3_LAYOUT_VERSION}  # by bits a weight
BLOCK_ROWS = 32
BLOCK_COLUMNS = 16
BASE3_COLUMNS = 20
POWERS = np.array([81, 27, 9, 3, 1], np.uint16)
SHIFTS = np.array([0, 2, 4, 6], np.uint8)
STOCK_BLOCKS = (128, 64, 32)  # other blocks take a slow path in ONNX Runtime

Trits = NDArray[np.int8]
Bytes = NDArray[np.uint8]


def _codes(trits: Trits) -> Bytes:
    """Codes 0, 1, 2 of a 2-D trit matrix; ValueError for anything that is not ternary."""
    trits = np.asarray(trits)
    if trits.ndim != 2 or trits.dtype != np.int8:
        raise ValueError(f"trits must be a 2-D int8 matrix, got {trits.dtype} {trits.shape}")
    if trits.size and (trits.min() < -1 or trits.max() > 1):
        raise ValueError("trits must be -1, 0 or +1; ternarise the tensor before packing it")
    return (trits + 1).astype(np.uint8)


def _trits(codes: Bytes) -> Trits:
    if codes.size and codes.max() > 2:
        raise ValueError("code 3 found: these bytes are not a ternary matrix")
    return codes.astype(np.int8) - np.int8(1)


def _check_packed(packed: NDArray, shape: tuple[int, ...], dtype: type) -> None:
    if packed.shape != shape or packed.dtype != dtype:
        raise ValueError(
            f"packed weights must be {np.dtype(dtype)} {shape}, got {packed.dtype} {packed.shape}"
        )


def _pad(codes: Bytes, rows: int, columns: int) -> Bytes:
    n, k = codes.shape
    return np.pad(codes, ((0, -n % rows), (0, -k % columns)), constant_values=1)


def pack_canonical(trits_NK: Trits) -> Bytes:
    """int8 (N, K) -> uint8 (N, ceil(K/4))."""
    codes = _pad(_codes(trits_NK), 1, 4)
    quads = codes.reshape(codes.shape[0], -1, 4)
    return np.bitwise_or.reduce(quads << SHIFTS, axis=-1)


def unpack_canonical(packed: Bytes, columns: int) -> Trits:
    """uint8 (N, ceil(K/4)) -> int8 (N, K); ValueError on a wrong size or a code 3."""
    _check_packed(packed, (packed.shape[0], -(-columns // 4)), np.uint8)
    codes = (packed[..., None] >> SHIFTS) & np.uint8(3)
    return _trits(codes.reshape(packed.shape[0], -1)[:, :columns])


def kernel_shape(rows: int, columns: int) -> tuple[int, int, int, int]:
    """Shape of the kernel layout of an (N, K) matrix."""
    return (-(-rows // BLOCK_ROWS), -(-columns // BLOCK_COLUMNS), BLOCK_ROWS, 4)


def pack_kernel(trits_NK: Trits) -> Bytes:
    """int8 (N, K) -> uint8 (ceil(N/32), ceil(K/16), 32, 4), the kernel layout, version 1."""
    blocks, groups, *_ = kernel_shape(*trits_NK.shape)
    codes = _pad(_codes(trits_NK), BLOCK_ROWS, BLOCK_COLUMNS)
    # (block, row, group, s, j) -> (block, group, row, s, j)
    codes = codes.reshape(blocks, BLOCK_ROWS, groups, 4, 4).transpose(0, 2, 1, 3, 4)
    packed = np.bitwise_or.reduce(codes << SHIFTS[:, None], axis=-2)
    return np.ascontiguousarray(packed)


def unpack_kernel(packed: Bytes, rows: int, columns: int) -> Trits:
    """Kernel layout -> int8 (N, K); ValueError on a wrong size or a code 3."""
    _check_packed(packed, kernel_shape(rows, columns), np.uint8)
    codes = (packed[..., None, :] >> SHIFTS[:, None]) & np.uint8(3)
    blocks, groups = packed.shape[:2]
    codes = codes.transpose(0, 2, 1, 3, 4).reshape(blocks * BLOCK_ROWS, groups * BLOCK_COLUMNS)
    return _trits(codes[:rows, :columns])


def base3_shape(rows: int, columns: int) -> tuple[int, int, int, int]:
    """Shape of the base-3 kernel layout of an (N, K) matrix."""
    return (-(-rows // BLOCK_ROWS), -(-columns // BASE3_COLUMNS), BLOCK_ROWS, 4)


def pack_base3(trits_NK: Trits) -> Bytes:
    """int8 (N, K) -> uint8 (ceil(N/32), ceil(K/20), 32, 4), the kernel layout, version 2."""
    blocks, groups, *_ = base3_shape(*trits_NK.shape)
    codes = _pad(_codes(trits_NK), BLOCK_ROWS, BASE3_COLUMNS)
    codes = codes.reshape(blocks, BLOCK_ROWS, groups, 5, 4).transpose(0, 2, 1, 3, 4)
    numbers = np.einsum("bgrsj,s->bgrj", codes, POWERS, dtype=np.uint16)
    packed = ((numbers * np.uint16(256) + np.uint16(242)) // np.uint16(243)).astype(np.uint8)
    return np.ascontiguousarray(packed)


def unpack_base3(packed: Bytes, rows: int, columns: int) -> Trits:
    """Base-3 kernel layout -> int8 (N, K); ValueError on a wrong size or a byte that is not one of
    the 243."""
    _check_packed(packed, base3_shape(rows, columns), np.uint8)
    numbers = (packed.astype(np.uint16) * np.uint16(243)) >> np.uint16(8)
    if np.any((numbers * np.uint16(256) + np.uint16(242)) // np.uint16(243) != packed):
        raise ValueError("a byte that holds no five trits found: these are not ternary weights")
    codes = (numbers[..., None, :] // POWERS[:, None] % np.uint16(3)).astype(np.uint8)
    blocks, groups = packed.shape[:2]
    codes = codes.transpose(0, 2, 1, 3, 4).reshape(blocks * BLOCK_ROWS, groups * BASE3_COLUMNS)
    return _trits(codes[:rows, :columns])


def pack_layout(trits_NK: Trits, layout: int) -> Bytes:
    """A kernel layout by its version; ValueError for an unknown one."""
    if layout == KERNEL_LAYOUT_VERSION:
        return pack_kernel(trits_NK)
    if layout == BASE3_LAYOUT_VERSION:
        return pack_base3(trits_NK)
    raise ValueError(f"kernel layout {layout} is not known; export the model again")


def unpack_layout(packed: Bytes, rows: int, columns: int, layout: int) -> Trits:
    """The inverse of `pack_layout`."""
    if layout == KERNEL_LAYOUT_VERSION:
        return unpack_kernel(packed, rows, columns)
    if layout == BASE3_LAYOUT_VERSION:
        return unpack_base3(packed, rows, columns)
    raise ValueError(f"kernel layout {layout} is not known; export the model again")


def stock_block(columns: int) -> int:
    """Columns of a MatMulNBits block: the most that divide K, for fewest scales; 32 if none do."""
    return next((block for block in STOCK_BLOCKS if columns % block == 0), STOCK_BLOCKS[-1])


def pack_stock(trits_NK: Trits) -> Bytes:
    """int8 (N, K) -> uint8 (N, ceil(K/block), block/4), codes t+2 for MatMulNBits."""
    rows, columns = trits_NK.shape
    block = stock_block(columns)
    codes = _pad(_codes(trits_NK), 1, block) + np.uint8(1)
    quads = codes.reshape(rows, -1, block // 4, 4)
    return np.bitwise_or.reduce(quads << SHIFTS, axis=-1)


def unpack_stock(packed: Bytes, rows: int, columns: int) -> Trits:
    """uint8 (N, ceil(K/block), block/4) -> int8 (N, K); ValueError on a wrong size or a code 0."""
    block = stock_block(columns)
    _check_packed(packed, (rows, -(-columns // block), block // 4), np.uint8)
    codes = ((packed[..., None] >> SHIFTS) & np.uint8(3)).reshape(rows, -1)[:, :columns]
    return _trits(codes - np.uint8(1))  # a code 0 becomes 255 and is refused


def pack_affine(trits_NK: Trits) -> NDArray[np.uint32]:
    """int8 (N, K) -> uint32 (N, K/16), MLX's 2-bit affine codes; K must be divisible by 16."""
    codes = _codes(trits_NK)
    if codes.shape[1] % 16:
        raise ValueError(f"MLX packs 16 codes a word: K = {codes.shape[1]} is not divisible by 16")
    words = codes.reshape(codes.shape[0], -1, 16).astype(np.uint32)
    return np.bitwise_or.reduce(words << (2 * np.arange(16, dtype=np.uint32)), axis=-1)


def unpack_affine(packed: NDArray[np.uint32], columns: int) -> Trits:
    """uint32 (N, K/16) -> int8 (N, K); ValueError on a wrong size or a code 3."""
    _check_packed(packed, (packed.shape[0], columns // 16), np.uint32)
    codes = (packed[..., None] >> (2 * np.arange(16, dtype=np.uint32))) & 3
    return _trits(codes.reshape(packed.shape[0], columns).astype(np.uint8))
