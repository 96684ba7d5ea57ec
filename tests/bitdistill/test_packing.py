"""Every layout is the inverse of itself, and is what its description says."""

from __future__ import annotations

import numpy as np
import pytest

from bitdistill import packing

SHAPES = [(1, 1), (3, 5), (32, 16), (33, 17), (64, 160), (5, 48)]


def random_trits(rows: int, columns: int) -> np.ndarray:
    return np.random.default_rng(rows * columns).integers(-1, 2, (rows, columns), dtype=np.int8)


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_round_trips(rows: int, columns: int) -> None:
    trits = random_trits(rows, columns)
    canonical = packing.pack_canonical(trits)
    assert canonical.shape == (rows, -(-columns // 4))
    assert np.array_equal(packing.unpack_canonical(canonical, columns), trits)
    kernel = packing.pack_kernel(trits)
    assert kernel.shape == packing.kernel_shape(rows, columns)
    assert kernel.flags.c_contiguous
    assert np.array_equal(packing.unpack_kernel(kernel, rows, columns), trits)
    base3 = packing.pack_base3(trits)
    assert base3.shape == packing.base3_shape(rows, columns)
    assert base3.flags.c_contiguous
    assert np.array_equal(packing.unpack_base3(base3, rows, columns), trits)
    if columns % 16 == 0:
        assert np.array_equal(packing.unpack_affine(packing.pack_affine(trits), columns), trits)


def test_canonical_by_hand() -> None:
    # codes 0 1 2 1 | 2, padded with 1 1 1: 0b01100100 = 100, 0b01010110 = 86
    trits = np.array([[-1, 0, 1, 0, 1]], np.int8)
    assert packing.pack_canonical(trits).tolist() == [[100, 86]]


def test_kernel_layout_element_by_element() -> None:
    trits = random_trits(40, 50)
    packed = packing.pack_kernel(trits)
    for n, k in [(0, 0), (31, 15), (32, 16), (39, 49), (7, 37)]:
        q, rest = divmod(k, 16)
        s, j = divmod(rest, 4)
        byte = packed[n // 32, q, n % 32, j]
        assert (byte >> (2 * s)) & 3 == trits[n, k] + 1
    assert (packed[1, 3, 8:, :] == 0b01010101).all()  # rows 40.. are padding: the trit 0


def test_base3_layout_element_by_element() -> None:
    trits = random_trits(40, 50)
    packed = packing.pack_base3(trits)
    for n, k in [(0, 0), (31, 19), (32, 20), (39, 49), (7, 37)]:
        q, rest = divmod(k, 20)
        s, j = divmod(rest, 4)
        byte = int(packed[n // 32, q, n % 32, j])
        assert 3 * (byte * 3**s % 256) >> 8 == trits[n, k] + 1
    assert (packed[1, 2, 8:, :] == 128).all()  # padding: the trit 0, (81 + 27 + 9 + 3 + 1) 256/243


def test_base3_holds_every_five_trits_in_a_byte_of_its_own() -> None:
    codes = np.indices((3, 3, 3, 3, 3)).reshape(5, 243)
    trits = np.zeros((243, 20), np.int8)
    trits[:, ::4] = codes.T - 1
    packed = packing.pack_base3(trits).transpose(0, 2, 1, 3).reshape(-1, 4)[:243]
    assert len(set(packed[:, 0].tolist())) == 243
    assert (packed[:, 1:] == 128).all()


def test_layouts_by_version() -> None:
    trits = random_trits(33, 41)
    for bits, layout in packing.LAYOUTS.items():
        packed = packing.pack_layout(trits, layout)
        assert np.array_equal(packing.unpack_layout(packed, 33, 41, layout), trits)
        large = packing.pack_layout(np.zeros((320, 320), np.int8), layout)
        assert 8 * large.nbytes / 320**2 == bits
    for call in (
        lambda: packing.pack_layout(trits, 3),
        lambda: packing.unpack_layout(packed, 33, 41, 3),
    ):
        with pytest.raises(ValueError, match="kernel layout 3 is not known"):
            call()


def test_affine_by_hand() -> None:
    trits = np.full((1, 16), -1, np.int8)
    trits[0, 1] = 1  # code 2 at bits 2-3
    trits[0, 15] = 0  # code 1 at bits 30-31
    assert packing.pack_affine(trits).tolist() == [[(2 << 2) | (1 << 30)]]


def test_refusals() -> None:
    with pytest.raises(ValueError, match="must be -1, 0 or"):
        packing.pack_canonical(np.array([[2]], np.int8))
    with pytest.raises(ValueError, match="2-D int8"):
        packing.pack_kernel(np.zeros((2, 2), np.float32))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not divisible by 16"):
        packing.pack_affine(np.zeros((1, 20), np.int8))
    with pytest.raises(ValueError, match="code 3"):
        packing.unpack_canonical(np.array([[255]], np.uint8), 4)
    with pytest.raises(ValueError, match="must be uint8"):
        packing.unpack_kernel(np.zeros((1, 1, 32, 3), np.uint8), 32, 16)
    with pytest.raises(ValueError, match="a byte that holds no five trits"):
        packing.unpack_base3(np.full((1, 1, 32, 4), 1, np.uint8), 32, 20)
