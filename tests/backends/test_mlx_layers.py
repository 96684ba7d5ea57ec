"""The parts of the MLX decoder alone: exact integer products, rounding, rotation."""

from __future__ import annotations

import platform
import resource

import mlx.core as mx
import numpy as np
import pytest
import torch

from bitdistill import packing, quantize
from bitdistill.backends import mlx_linear
from bitdistill.backends.mlx_architecture import Rotary
from bitdistill.backends.mlx_host import Workers, keep_freed_memory, move_product
from bitdistill.backends.mlx_layout import group_size
from bitdistill.backends.mlx_linear import TernaryLinear, apply_shared, quantize_activations


def ternary_layer(trits: np.ndarray, scale: float, bits: int | None = 8) -> TernaryLinear:
    rows, columns = trits.shape
    group = group_size(columns)
    linear = {"rows": rows, "columns": columns, "group": group, "bias": False, "norm": False}
    layer = TernaryLinear(linear, 0.0, bits is not None)
    scales = mx.full((rows, columns // group), scale)
    packed = mx.array(packing.pack_affine(trits.astype(np.int8)))
    layer.load_weights([("weight", packed), ("scales", scales), ("biases", -scales)])
    layer.prepare(mx.float32)
    return layer


def on_cpu(layer: TernaryLinear) -> TernaryLinear:
    """The same layer, its product computed by mlx_host.py from the same packed words."""
    move_product(layer, Workers(2))
    return layer


PRODUCTS = {"mlx": lambda layer: layer, "cpu": on_cpu}


@pytest.mark.parametrize("products", PRODUCTS)
@pytest.mark.parametrize("shape", [(1, 32), (7, 96), (33, 576), (16, 2560), (4, 9728)])
def test_integer_products_are_exact(shape: tuple[int, int], products: str) -> None:
    random = np.random.default_rng(shape[1])
    trits = random.integers(-1, 2, shape)
    trits[0] = 1  # the largest sum there is
    values = random.integers(-127, 128, (5, shape[1]))
    values[0], values[1] = 127, -127
    values[:, 0] = 127  # integers are then their own rounding, of a scale of 1
    layer = PRODUCTS[products](ternary_layer(trits, 1.0))
    product = np.array(layer(mx.array(values.astype(np.float32))))
    assert np.array_equal(product, values @ trits.T)


def test_integer_products_in_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Metal; with sums so small that MLX's CPU code, which sums in fp16, is exact too."""
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    random = np.random.default_rng(0)
    trits, values = random.integers(-1, 2, (24, 64)), random.integers(-8, 9, (5, 64))
    layer = ternary_layer(trits, 0.0123)
    layer.prepare(mx.float16)
    assert layer.half
    product = layer.multiply(mx.array(values.astype(np.float32)))
    assert product.dtype == mx.float32
    assert np.array_equal(np.array(product), values @ trits.T)


def test_float_products_of_both_agree() -> None:
    random = np.random.default_rng(0)
    trits = random.integers(-1, 2, (40, 192))
    x = mx.array(random.standard_normal((3, 5, 192)).astype(np.float32))
    first = np.array(ternary_layer(trits, 0.0123, None)(x))
    second = np.array(on_cpu(ternary_layer(trits, 0.0123, None))(x))
    assert first.shape == (3, 5, 40)
    assert np.abs(first - second).max() < 1e-6 * np.abs(first).max()


@pytest.mark.parametrize("products", PRODUCTS)
def test_layer_equals_bitlinear_bit_for_bit(products: str) -> None:
    torch.manual_seed(0)
    reference = quantize.BitLinear(96, 40)
    trits, scale = quantize.ternarize(reference.weight)
    layer = PRODUCTS[products](ternary_layer(trits.numpy(), float(scale)))
    x = torch.randn(64, 96) * torch.logspace(-6, 4, 64)[:, None]
    x[0] = 0
    with torch.no_grad():
        expected = reference(x).numpy()
    assert np.array_equal(np.array(layer(mx.array(x.numpy()))), expected)


def test_an_input_shared_by_three_linears_is_quantised_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []

    def count(x: mx.array) -> tuple[mx.array, mx.array]:
        calls.append(x.shape)
        return quantize_activations(x)

    random = np.random.default_rng(0)
    layers = [ternary_layer(random.integers(-1, 2, (rows, 64)), 0.5) for rows in (8, 4, 4)]
    x = mx.array(random.standard_normal((2, 64)).astype(np.float32))
    expected = [np.array(layer(x)) for layer in layers]
    monkeypatch.setattr(mlx_linear, "quantize_activations", count)
    found = apply_shared(layers, x)
    assert calls == [(2, 64)]
    assert all(np.array_equal(np.array(y), z) for y, z in zip(found, expected, strict=True))


def test_gradients_pass_straight_through_the_rounding() -> None:
    x = mx.array([[0.3, -1.2, 2.5]])
    up = 127.0 / (2.5 + mlx_linear.ACTIVATION_EPS)
    gradient = mx.grad(lambda x: quantize_activations(x)[0].sum())(x)
    assert np.allclose(np.array(gradient), up)


def test_activations_round_half_to_even() -> None:
    assert mlx_linear.ACTIVATION_EPS == quantize.ACTIVATION_EPS
    x = torch.randn(50, 33) * torch.logspace(-7, 3, 50)[:, None]
    # max 127 - eps gives a factor of exactly 1, so these stay on the halves
    x[0, :5] = torch.tensor([127.0 - 1e-5, 0.5, 1.5, -2.5, -0.5])
    x[0, 5:] = 0
    values, down = quantize.quantize_activations(x)
    assert values[0, :5].tolist() == [127, 0, 2, -2, 0]
    ours = quantize_activations(mx.array(x.numpy()))
    assert np.array_equal(np.array(ours[0]), values.numpy())
    assert np.array_equal(np.array(ours[1]), down.numpy())


def test_rotary_at_far_positions() -> None:
    """As close to the exact angles as fp32 angles are: 2 units in the last place of the angle."""
    frequencies = 1e6 ** -(np.arange(16) / 16)
    rounded = np.float32(frequencies)
    x = np.random.default_rng(0).standard_normal((1, 1, 1, 32)).astype(np.float32)
    position = 30_000
    angles = position * rounded.astype(np.float64)
    first, second = x[..., :16], x[..., 16:]
    cos, sin = np.cos(angles), np.sin(angles)
    exact = np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)
    bound = np.tile(angles * 2**-22 + 2**-22, 2) * np.abs(x).max() * 2
    assert (
        np.abs(np.array(Rotary(rounded.tolist(), 1.0)(mx.array(x), position)) - exact) <= bound
    ).all()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="asks glibc to keep memory")
def test_freed_blocks_are_kept() -> None:
    """Blocks that are freed and taken again are not faulted in a second time."""
    keep_freed_memory()

    def work() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        blocks = [np.ones(8 << 20, np.uint8) for _ in range(8)]
        del blocks
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    first = work()
    assert min(work() for _ in range(3)) < max(first, 2048) / 4  # 2048 pages are one block
