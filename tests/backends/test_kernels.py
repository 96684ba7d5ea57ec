"""The C++ kernels against an oracle written in NumPy from the specification, bit for bit."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from kernel_oracle import (
    F,
    float_oracle,
    lane_sum,
    normalised,
    oracle,
    quantized,
    random_trits,
    same,
)
from numpy.typing import NDArray

from bitdistill.backends.kernels.binding import Kernels, available_isas, built_isas, library
from bitdistill.packing import kernel_shape, pack_kernel

SHAPES = [
    (1, 1),
    (16, 32),
    (17, 33),
    (31, 5),
    (64, 64),
    (100, 75),
    (129, 31),
    (257, 96),
    (1000, 40),
    (160, 1000),
    (300, 3200),
    (75, 300),
]
TOKENS = [0, 1, 2, 3, 5, 17, 55, 64]
ISAS = available_isas()


def test_the_library_has_the_oracle_and_reports_its_best() -> None:
    assert built_isas()[-1] == "scalar"
    assert "scalar" in ISAS
    assert Kernels().isa == os.environ.get("BITDISTILL_ISA", ISAS[0])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", SHAPES)
def test_ternary_linear_equals_the_oracle(isa: str, shape: tuple[int, int]) -> None:
    k, n = shape
    rng = np.random.default_rng(k * 1000 + n)
    trits = random_trits(rng, n, k)
    scale, bias = rng.random(n, F), rng.standard_normal(n, F)
    weight = rng.standard_normal(k, F)
    for tokens in TOKENS:
        x = rng.standard_normal((tokens, k), F) * F(10.0 ** rng.integers(-6, 6))
        for w, b in ((None, None), (weight, bias)):
            y = Kernels(isa).ternary_linear(
                x, pack_kernel(trits), scale, norm_weight=w, epsilon=1e-6, bias=b
            )
            assert same(y, oracle(x, trits, scale, w, b)), (tokens, w is None)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("tokens", [1, 4, 13])
def test_every_remainder_of_columns(isa: str, tokens: int) -> None:
    rng = np.random.default_rng(tokens)
    for k in range(1, 68):
        for n in (31, 130):
            trits, scale = random_trits(rng, n, k), rng.random(n, F)
            x = rng.standard_normal((tokens, k), F)
            y = Kernels(isa).ternary_linear(x, pack_kernel(trits), scale)
            assert same(y, oracle(x, trits, scale, None, None)), (k, n)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-39, 1e-20, 3e38])
def test_extreme_scales(isa: str, value: float) -> None:
    rng = np.random.default_rng(5)
    trits, scale = random_trits(rng, 140, 65), np.full(140, value, F)
    for tokens in (1, 13):
        x = rng.standard_normal((tokens, 65), F) * F(100)
        y = Kernels(isa).ternary_linear(x, pack_kernel(trits), scale)
        assert same(y, oracle(x, trits, scale, None, None))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(
    "value", [0.0, -0.0, 1e-45, 1e-38, 1e-20, 1e19, 3.4e38, -3.4e38, np.inf, -np.inf, np.nan]
)
def test_extreme_tokens(isa: str, norm: bool, value: float) -> None:
    """Zeros, subnormals, huge, infinite and NaN tokens, beside one that must not be disturbed."""
    rng = np.random.default_rng(6)
    for k in (37, 64):
        trits, scale = random_trits(rng, 35, k), rng.random(35, F)
        weight = rng.standard_normal(k, F) if norm else None
        x = rng.standard_normal((4, k), F)
        x[1] = value
        x[2, k - 1] = value
        y = Kernels(isa).ternary_linear(
            x, pack_kernel(trits), scale, norm_weight=weight, epsilon=1e-6
        )
        assert same(y, oracle(x, trits, scale, weight, None))
        if not np.isfinite(value):
            assert np.isnan(y[1:3]).all()
            assert np.isfinite(y[[0, 3]]).all()


@pytest.mark.parametrize("isa", ISAS)
def test_rounding_is_half_to_even(isa: str) -> None:
    """g is chosen so that x * 127 / (g + 1e-5) is a half integer exactly."""
    g = F(127) - F(1e-5)
    x = np.array([[g, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 3.5, 126.5]], F)
    assert g + F(1e-5) == F(127)
    q, down, total = Kernels(isa).quantize(x)
    assert q[0, 1:].tolist() == [0, 2, 2, 0, -2, -2, 4, 126]
    assert down[0] == g / F(127)
    assert total[0] == q.sum()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("norm", [False, True])
def test_quantized_activations_equal_the_oracle(isa: str, norm: bool) -> None:
    rng = np.random.default_rng(7)
    for k in (1, 7, 8, 31, 33, 1000, 4096):
        x = rng.standard_normal((5, k), F)
        weight = rng.standard_normal(k, F) if norm else None
        q, down, total = Kernels(isa).quantize(x, weight, 1e-6)
        expected, expected_down = quantized(normalised(x, weight, 1e-6))
        assert np.array_equal(q, expected)
        assert same(down, expected_down)
        assert np.array_equal(total, expected.sum(1))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", SHAPES)
def test_fp32_activations_equal_the_oracle(isa: str, shape: tuple[int, int]) -> None:
    k, n = shape
    rng = np.random.default_rng(8)
    trits, scale, weight = random_trits(rng, n, k), rng.random(n, F), rng.standard_normal(k, F)
    for tokens in (0, 1, 2, 3, 4, 7):
        x = rng.standard_normal((tokens, k), F)
        y = Kernels(isa).ternary_linear(
            x, pack_kernel(trits), scale, norm_weight=weight, epsilon=1e-6, activation_bits=0
        )
        assert same(y, float_oracle(normalised(x, weight, 1e-6), trits, scale))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", [(1, 1), (15, 3), (16, 7), (33, 10), (128, 101)])
def test_head_equals_the_oracle(isa: str, shape: tuple[int, int]) -> None:
    k, n = shape
    rng = np.random.default_rng(9)
    table = (rng.standard_normal((n, k)) * 10.0 ** rng.integers(-8, 4, (n, k))).astype(np.float16)
    for tokens in (0, 1, 2, 3, 5):
        x = rng.standard_normal((tokens, k), F)
        expected = lane_sum(x[:, None, :] * table.astype(F), 32)
        assert same(Kernels(isa).head(x, table), expected)


@pytest.mark.parametrize("isa", ISAS)
def test_every_float16_is_read_exactly(isa: str) -> None:
    table = np.arange(1 << 16, dtype=np.uint16).view(np.float16)[:, None]
    y = Kernels(isa).head(np.ones((1, 1), F), table)
    assert same(y[0], table[:, 0].astype(F))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("tokens", [1, 5])
def test_unaligned_arrays(isa: str, tokens: int) -> None:
    """Mapped files put weights at any byte, and floats at any multiple of four."""
    rng = np.random.default_rng(10)
    trits, scale = random_trits(rng, 40, 100), rng.random(40, F)
    x = rng.standard_normal((tokens, 100), F)
    packed = pack_kernel(trits)
    expected = oracle(x, trits, scale, None, None)
    for offset in (1, 3, 17):
        raw = np.empty(packed.nbytes + 64, np.uint8)[offset : offset + packed.nbytes]
        moved = raw.reshape(packed.shape)
        moved[:] = packed
        shifted = np.empty(x.size + 1, F)[1:].reshape(x.shape)
        shifted[:] = x
        assert same(Kernels(isa).ternary_linear(shifted, moved, scale), expected)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("tokens", [1, 8])
def test_damaged_codes_are_harmless(isa: str, tokens: int) -> None:
    """Codes of 3, and rubbish in the padding: any result for the first, none for the second."""
    rng = np.random.default_rng(11)
    trits, scale = random_trits(rng, 33, 20), np.ones(33, F)
    x = rng.standard_normal((tokens, 20), F)
    packed = pack_kernel(trits)
    packed[1, :, 1:] = 255  # rows 33 and later
    packed[:, 1, :, 1:] |= 0xFC  # columns beyond 20 of the second group (k = 16 + 4 s + j, s > 0)
    assert same(Kernels(isa).ternary_linear(x, packed, scale)[:, 32], _row(x, trits)[:, 32])
    Kernels(isa).ternary_linear(x, np.full_like(packed, 255), scale)
    assert library().bd_has_code_3(packed.ctypes.data, packed.nbytes) == 1
    good = pack_kernel(trits)
    assert library().bd_has_code_3(good.ctypes.data, good.nbytes) == 0


def _row(x: NDArray, trits: NDArray) -> NDArray:
    return oracle(x, trits, np.ones(len(trits), F), None, None)


def test_instruction_sets_agree_at_model_sizes() -> None:
    """A layer of real size, where the NumPy oracle would be slow: all tables, the same bits."""
    rng = np.random.default_rng(12)
    trits, scale = random_trits(rng, 256, 2560), rng.random(256, F)
    packed, weight = pack_kernel(trits), rng.standard_normal(2560, F)
    x = rng.standard_normal((13, 2560), F)
    for bits in (8, 0):
        results = [
            Kernels(isa).ternary_linear(
                x, packed, scale, norm_weight=weight, epsilon=1e-6, activation_bits=bits
            )
            for isa in ISAS
        ]
        assert all(same(result, results[0]) for result in results)


@pytest.mark.parametrize("isa", ISAS)
def test_concurrent_calls_do_not_disturb_each_other(isa: str) -> None:
    rng = np.random.default_rng(13)
    trits, scale = random_trits(rng, 64, 256), rng.random(64, F)
    packed, xs = pack_kernel(trits), rng.standard_normal((32, 3, 256), F)
    kernels = Kernels(isa)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda x: kernels.ternary_linear(x, packed, scale), xs))
    for x, y in zip(xs, results, strict=True):
        assert same(y, oracle(x, trits, scale, None, None))


def test_pytorch_computes_the_same_bits() -> None:
    """BitLinear is the specification: without a norm, float order leaves no freedom."""
    torch = pytest.importorskip("torch")
    from bitdistill.quantize import BitLinear, ternarize

    torch.manual_seed(0)
    layer = BitLinear(300, 70, bias=True)
    trits, scale = ternarize(layer.weight)
    x = torch.randn(9, 300)
    with torch.no_grad():
        expected = layer(x).numpy()
    y = Kernels().ternary_linear(
        x.numpy(),
        pack_kernel(trits.numpy()),
        np.full(70, float(scale), F),
        bias=layer.bias.detach().numpy(),
    )
    assert same(y, expected)


def test_the_binding_refuses_what_does_not_fit() -> None:
    x, packed, scale = np.zeros((1, 20), F), pack_kernel(np.zeros((5, 20), np.int8)), np.ones(5, F)
    kernels = Kernels()
    with pytest.raises(ValueError, match="packed must be uint8"):
        kernels.ternary_linear(x, packed[:, :1], scale)
    with pytest.raises(ValueError, match="norm_weight must be contiguous float32"):
        kernels.ternary_linear(x, packed, scale, norm_weight=np.ones(19, F))
    with pytest.raises(ValueError, match="activation_bits 4"):
        kernels.ternary_linear(x, packed, scale, activation_bits=4)
    with pytest.raises(
        ValueError, match="not an instruction set of this bitdistill library; it has"
    ):
        Kernels("pentium")


def _choose(isa: str) -> subprocess.CompletedProcess[str]:
    code = "from bitdistill.backends.kernels.binding import Kernels; print(Kernels().isa)"
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "BITDISTILL_ISA": isa},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_the_environment_chooses_an_instruction_set() -> None:
    assert _choose("scalar").stdout.strip() == "scalar"
    assert _choose("").stdout.strip() == ISAS[0]
    refused = _choose("avx9")
    assert refused.returncode != 0
    assert "BITDISTILL_ISA=avx9 is not an instruction set" in refused.stderr


def test_kernel_shape_is_what_the_library_reads() -> None:
    for rows, columns in ((1, 1), (33, 17), (64, 32)):
        assert library().bd_packed_bytes(rows, columns) == np.prod(kernel_shape(rows, columns))
