"""The parts of the MLX decoder alone: exact integer products, rounding, rotation."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
import torch

from bitdistill import packing, quantize
from bitdistill.backends import mlx_linear
from bitdistill.backends.mlx_layout import group_size
from bitdistill.backends.mlx_linear import Precision, TernaryLinear, quantize_activations
from bitdistill.backends.mlx_model import Rotary
from bitdistill.decoder import RotarySpec


def ternary_layer(
    trits: np.ndarray, scale: float, dequantize: bool, bits: int | None = 8
) -> TernaryLinear:
    rows, columns = trits.shape
    layer = TernaryLinear((rows, columns), bias=False, norm_eps=None, activation_bits=bits)
    scales = mx.full((rows, columns // group_size(columns)), scale)
    packed = mx.array(packing.pack_affine(trits.astype(np.int8)))
    layer.load_weights([("weight", packed), ("scales", scales), ("biases", -scales)])
    layer.prepare(Precision(mx.float32, dequantize))
    return layer


@pytest.mark.parametrize("dequantize", [True, False])
@pytest.mark.parametrize("shape", [(1, 32), (7, 96), (33, 576), (16, 2560), (4, 9728)])
def test_integer_products_are_exact(shape: tuple[int, int], dequantize: bool) -> None:
    random = np.random.default_rng(shape[1])
    trits = random.integers(-1, 2, shape)
    trits[0] = 1  # the largest sum there is
    values = random.integers(-128, 128, (5, shape[1]))
    values[0], values[1] = 127, -128
    layer = ternary_layer(trits, 0.0123, dequantize)
    product = np.array(layer._sum(mx.array(values.astype(np.float32))))
    assert np.array_equal(product, values @ trits.T)


@pytest.mark.parametrize("dequantize", [True, False])
def test_layer_equals_bitlinear_bit_for_bit(dequantize: bool) -> None:
    torch.manual_seed(0)
    reference = quantize.BitLinear(96, 40)
    trits, scale = quantize.ternarize(reference.weight)
    layer = ternary_layer(trits.numpy(), float(scale), dequantize)
    x = torch.randn(64, 96) * torch.logspace(-6, 4, 64)[:, None]
    x[0] = 0
    with torch.no_grad():
        expected = reference(x).numpy()
    assert np.array_equal(np.array(layer(mx.array(x.numpy()))), expected)


def test_activations_round_half_to_even() -> None:
    assert mlx_linear.ACTIVATION_EPS == quantize.ACTIVATION_EPS
    x = torch.randn(50, 33) * torch.logspace(-7, 3, 50)[:, None]
    # max 127 - eps gives a factor of exactly 1, so these stay on the halves
    x[0, :5] = torch.tensor([127.0 - 1e-5, 0.5, 1.5, -2.5, -0.5])
    x[0, 5:] = 0
    values, down = quantize.quantize_activations(x)
    assert values[0, :5].tolist() == [127, 0, 2, -2, 0]
    ours = quantize_activations(mx.array(x.numpy()))
    assert np.array_equal(np.array(ours.values), values.numpy())
    assert np.array_equal(np.array(ours.down), down.numpy())


def test_rotary_at_far_positions() -> None:
    """As close to the exact angles as fp32 angles are: 2 units in the last place of the angle."""
    frequencies = 1e6 ** -(np.arange(16) / 16)
    spec = RotarySpec(tuple(np.float32(frequencies).tolist()), 1.0)
    x = np.random.default_rng(0).standard_normal((1, 1, 1, 32)).astype(np.float32)
    position = 30_000
    angles = position * np.array(spec.frequencies, np.float64)
    first, second = x[..., :16], x[..., 16:]
    cos, sin = np.cos(angles), np.sin(angles)
    exact = np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)
    bound = np.tile(angles * 2**-22 + 2**-22, 2) * np.abs(x).max() * 2
    assert (np.abs(np.array(Rotary(spec)(mx.array(x), position)) - exact) <= bound).all()
