"""Trits of five a byte: the kernels and the operator, bit for bit against the oracle."""

from __future__ import annotations

import numpy as np
import pytest
from kernel_oracle import F, oracle, random_trits, same
from op_models import ATTRIBUTES, model, session

from bitdistill.backends.kernels.binding import Kernels, Ternary, available_isas, library
from bitdistill.backends.kernels.pool import Layer, Pool, ternary_layers
from bitdistill.packing import base3_shape, kernel_shape, pack_base3, pack_kernel, unpack_kernel

ISAS = available_isas()
SHAPES = [(1, 1), (20, 32), (21, 33), (39, 5), (100, 75), (129, 31), (260, 64), (1001, 40)]
STREAMED = [(1001, 128), (250, 161), (481, 300)]  # rows enough for several streams, K for chunks


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", [*SHAPES, *STREAMED])
def test_the_product_equals_the_oracle(isa: str, shape: tuple[int, int]) -> None:
    k, n = shape
    rng = np.random.default_rng(k)
    trits, scale = random_trits(rng, n, k), rng.random(n, F)
    for tokens in (0, 1, 2, 3, 4, 5, 6, 7, 19):
        x = rng.standard_normal((tokens, k), F)
        y = Kernels(isa).base3_linear(x, pack_base3(trits), scale)
        assert same(y, oracle(x, trits, scale, None, None)), tokens


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("k", [20 * 12 * 4, 65_536, 1 << 17])
@pytest.mark.parametrize("tokens", [1, 4])
def test_sums_are_exact_at_their_bounds(isa: str, k: int, tokens: int) -> None:
    trits = np.ones((34, k), np.int8)
    trits[::2] = -1
    trits[3] = 0
    packed = pack_base3(trits)
    for value in (-128, 127):
        q = np.full((tokens, k), value, np.int8)
        expected = q.astype(np.float64) @ trits.T.astype(np.float64)
        assert np.array_equal(Kernels(isa).ternary_dots(q, packed, 34, layout=2), expected)


@pytest.mark.parametrize("isa", ISAS)
def test_every_byte_is_read_as_specified(isa: str) -> None:
    """Three times a byte carries its first code; the 13 bytes that hold none count as some."""
    packed = np.zeros((8, 1, 32, 4), np.uint8)
    packed.reshape(256, 4)[:, 0] = np.arange(256)
    codes = np.zeros((256, 20))
    byte = np.arange(256)
    for s in range(5):
        codes[:, 4 * s] = 3 * byte >> 8
        byte = 3 * byte & 255
    q = np.random.default_rng(0).integers(-127, 128, (3, 20)).astype(np.int8)
    expected = q.astype(float) @ codes.T - q.sum(1, dtype=int)[:, None]
    assert np.array_equal(Kernels(isa).ternary_dots(q, packed, 256, layout=2), expected)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", [*SHAPES, (80, 64), (96, 32), (112, 33), (1024, 32)])
def test_unpacked_they_are_layout_1(isa: str, shape: tuple[int, int]) -> None:
    k, n = shape
    trits = random_trits(np.random.default_rng(k), n, k)
    first = pack_base3(trits)
    any_bytes = np.random.default_rng(n).integers(0, 256, first.shape, np.uint8)
    for packed in (first, any_bytes):
        results = []
        for one in (isa, "scalar"):
            out = np.full((*kernel_shape(n, k), 2), 255, np.uint8)  # and as much behind it
            w = Ternary(packed.ctypes.data, None, None, n, k)
            blocks = len(packed)
            Kernels(one).table.unpack_base3(w, out.ctypes.data, blocks // 2, blocks)
            Kernels(one).table.unpack_base3(w, out.ctypes.data, 0, blocks // 2)
            flat = out.reshape(2, *kernel_shape(n, k))
            assert (flat[1] == 255).all()
            results.append(flat[0].copy())
        assert np.array_equal(*results)
        if packed is first:
            assert np.array_equal(unpack_kernel(results[0], n, k), trits)


def test_bytes_without_trits_are_found() -> None:
    lib = library()
    numbers = np.array([-(-x * 256 // 243) for x in range(243)], np.uint8)
    good = set(numbers.tolist())
    for byte in range(256):
        raw = np.array([0, byte, 128], np.uint8)
        assert lib.bd_has_no_trits(raw.ctypes.data, 3) == (byte not in good)
    for rows, columns in ((1, 1), (33, 21), (64, 40)):
        assert lib.bd_base3_bytes(rows, columns) == np.prod(base3_shape(rows, columns))


@pytest.mark.parametrize("tokens", [1, 7, 9, 64])
def test_a_session_equals_layout_1(tokens: int) -> None:
    rng = np.random.default_rng(1)
    trits, scale = random_trits(rng, 75, 100), rng.random(75, F)
    rest = {"norm_weight": rng.standard_normal(100, F), "bias": rng.standard_normal(75, F)}
    x = rng.standard_normal((tokens, 100), F)
    results = []
    for layout, pack in ((1, pack_kernel), (2, pack_base3)):
        inputs = {"W": pack(trits), "scale": scale, **rest}
        attributes = {"N": 75, "K": 100, **ATTRIBUTES, "layout": layout}
        results.append(session(model("TernaryLinear", ["t", 100], inputs, **attributes)))
    first, second = (run.run(None, {"x": x})[0] for run in results)
    assert same(first, second)


def test_bytes_without_trits_are_refused_by_the_session() -> None:
    packed = pack_base3(np.zeros((75, 100), np.int8))
    packed[1, 2, 3, 1] = 1
    inputs = {"W": packed, "scale": np.ones(75, F)}
    attributes = {"N": 75, "K": 100, **ATTRIBUTES, "layout": 2}
    with pytest.raises(Exception, match="'layer 7': W holds a byte without five trits"):
        session(model("TernaryLinear", ["t", 100], inputs, **attributes))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("tokens", [0, 1, 7, 8, 48])
def test_layers_on_a_pool(isa: str, tokens: int) -> None:
    """Through the C interface: few tokens as stored, many unpacked; beside a layer of two bits."""
    rng = np.random.default_rng(tokens)
    trits, other = random_trits(rng, 161, 250), random_trits(rng, 33, 250)
    scale, bias, weight = rng.random(161, F), rng.standard_normal(161, F), rng.random(250, F)
    layers = [
        Layer(pack_base3(trits), scale, bias, base3=True),
        Layer(pack_kernel(other), scale[:33]),
    ]
    x = rng.standard_normal((tokens, 250), F)
    with Pool(2) as pool:
        found = ternary_layers(Kernels(isa), x, layers, pool=pool, norm_weight=weight, epsilon=1e-6)
    assert same(found[0], oracle(x, trits, scale, weight, bias))
    assert same(found[1], oracle(x, other, scale[:33], weight, None))


def test_layers_without_rounding_are_refused() -> None:
    layer = Layer(pack_base3(np.ones((4, 20), np.int8)), np.ones(4, F), base3=True)
    with pytest.raises(ValueError, match="need 8 activation bits"):
        ternary_layers(Kernels(), np.ones((1, 20), F), [layer], activation_bits=0)
    with pytest.raises(ValueError, match="packed must be"):
        Layer(layer.packed, layer.scale).pointers(20)
