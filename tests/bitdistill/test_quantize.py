"""The quantiser against hand-derived values and an independent NumPy reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bitdistill.quantize import (
    ACTIVATION_EPS,
    BitLinear,
    RMSNorm,
    _IntegerProduct,
    cache_weights,
    forget_weights,
    quantize_activations,
    round_to_bf16,
    set_integer,
    share_anneal,
    ternarize,
    ternary_scale,
)


def bf16(x: float) -> float:
    """Round to the nearest bf16, ties to even, by integer arithmetic."""
    bits = int(np.float32(x).view(np.uint32))
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return float(np.uint32(bits).view(np.float32))


def numpy_linear(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """The specification, written again in float64 NumPy with integer sums."""
    scale = bf16(np.abs(weight).mean())
    trits = np.clip(np.rint(weight / np.float32(np.float32(scale) + np.float32(1e-6))), -1, 1)
    g = np.abs(x).max(-1, keepdims=True).astype(np.float32)
    q = np.clip(np.rint(x * (np.float32(127) / (g + np.float32(ACTIVATION_EPS)))), -128, 127)
    total = q.astype(np.int64) @ trits.T.astype(np.int64)
    return total * (g / np.float32(127)).astype(np.float64) * scale


def test_ternarize_by_hand() -> None:
    # mean |W| = 0.5 exactly; 0.25 / 0.5 is just below 1/2 because of eps, 0.26 is above
    weight = torch.tensor([[1.0, -0.74, 0.25, -0.26], [0.0, 0.75, -0.5, 0.5]])
    trits, scale = ternarize(weight)
    assert float(scale) == 0.5
    assert trits.tolist() == [[1, -1, 0, -1], [0, 1, -1, 1]]


def test_scale_is_the_nearest_bf16() -> None:
    weight = torch.randn(33, 65, generator=torch.Generator().manual_seed(1))
    mean = float(weight.abs().mean())
    assert float(ternary_scale(weight)) == bf16(mean)
    assert float(ternary_scale(weight).half()) == bf16(mean)  # every 16-bit format holds it


def test_rounding_to_bf16_is_that_of_the_type() -> None:
    high = torch.arange(1 << 16, dtype=torch.int32) << 16  # every bf16, infinities and NaN too
    for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        x = (high | low).view(torch.float32)
        assert torch.equal(round_to_bf16(x).nan_to_num(0.5), x.bfloat16().float().nan_to_num(0.5))
        assert torch.equal(round_to_bf16(x).isnan(), x.isnan())


def test_compiled_training_rounds_the_scale_that_is_saved() -> None:
    """Inductor drops a cast to bf16 and back; students would be trained with another D."""
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(1))
    assert float(weight.abs().mean()) != float(ternary_scale(weight))
    assert torch.equal(torch.compile(ternary_scale)(weight), ternary_scale(weight))


def test_zero_matrix_and_non_finite_weights() -> None:
    trits, scale = ternarize(torch.zeros(4, 4))
    assert float(scale) == 0.0
    assert not trits.any()
    with pytest.raises(ValueError, match="NaN or infinity"):
        ternarize(torch.tensor([[float("nan"), 1.0]]))


def test_activations_by_hand() -> None:
    # g = 2: up is 127 / 2.00001, so 1.0 -> 63.4997 -> 63, -2 -> -126.999 -> -127
    q, down = quantize_activations(torch.tensor([[2.0, 1.0, -2.0, 0.0]]))
    assert q.tolist() == [[127, 63, -127, 0]]
    assert float(down) == pytest.approx(2 / 127, rel=1e-7)


def test_rounding_is_half_to_even() -> None:
    g = 127.0 - ACTIVATION_EPS
    q, _ = quantize_activations(torch.tensor([[g, 0.5, 1.5, 2.5, -0.5]], dtype=torch.float64))
    assert q.tolist() == [[127, 0, 2, 2, 0]]


@pytest.mark.parametrize(("tokens", "k", "n"), [(1, 3, 5), (7, 64, 33), (4, 1000, 16)])
def test_layer_matches_numpy(tokens: int, k: int, n: int) -> None:
    torch.manual_seed(k)
    layer, x = BitLinear(k, n), torch.randn(tokens, k)
    expected = numpy_linear(x.numpy(), layer.weight.detach().numpy())
    np.testing.assert_allclose(layer(x).detach().numpy(), expected, rtol=3e-7, atol=1e-12)


def test_gradients_pass_straight_through() -> None:
    torch.manual_seed(0)
    layer, x = BitLinear(32, 8), torch.randn(5, 32, requires_grad=True)
    upstream = torch.randn(5, 8)
    (layer(x) * upstream).sum().backward()
    q, down = quantize_activations(x)
    trits, scale = ternarize(layer.weight)
    assert layer.weight.grad is not None
    assert x.grad is not None
    # as if the layer had been x_hat W_hat^T with both hats treated as their own inputs
    torch.testing.assert_close(layer.weight.grad, upstream.T @ (q * down), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(x.grad, upstream @ (trits * scale), rtol=1e-4, atol=1e-5)


def test_anneal_blends_from_full_precision() -> None:
    torch.manual_seed(0)
    layer, x = BitLinear(64, 16), torch.randn(3, 64)
    hard = layer(x)
    share_anneal(layer).fill_(0.0)
    exact = torch.nn.functional.linear(x, layer.weight)
    torch.testing.assert_close(layer(x), exact, rtol=1e-4, atol=1e-5)
    share_anneal(layer).fill_(0.5)
    assert (layer(x) - exact).norm() < (hard - exact).norm()
    share_anneal(layer).fill_(1.0)
    assert torch.equal(layer(x), hard)
    assert "anneal" not in layer.state_dict()


def test_freezing_changes_nothing_but_the_work() -> None:
    torch.manual_seed(0)
    layer, x = BitLinear(48, 16), torch.randn(3, 48)
    before, trits = layer(x), ternarize(layer.weight)[0]
    layer.freeze()
    assert torch.equal(layer(x), before)
    assert torch.equal(layer.weight, trits.float())


def test_norm_and_bias() -> None:
    torch.manual_seed(0)
    norm = RMSNorm(16, eps=1e-6)
    torch.nn.init.uniform_(norm.weight)
    layer = BitLinear(16, 8, bias=True, norm=norm)
    plain = BitLinear(16, 8)
    plain.weight = layer.weight
    x = torch.randn(2, 16)
    scaled = x / x.square().mean(-1, keepdim=True).add(1e-6).sqrt() * norm.weight
    torch.testing.assert_close(layer(x), plain(scaled) + layer.bias)


def test_widths_whose_sums_are_not_exact_are_refused() -> None:
    with pytest.raises(ValueError, match="too wide"):
        BitLinear(1 << 18, 1)


def trained_once(layer: BitLinear, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Output and gradients of x and of the master weights."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y = layer(x)
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    assert x.grad is not None
    assert layer.weight.grad is not None
    return y.detach(), x.grad, layer.weight.grad.clone()


@pytest.mark.parametrize("amount", [1.0, 0.4])
def test_cached_weights_are_the_same_weights(amount: float) -> None:
    torch.manual_seed(0)
    layer, x = BitLinear(48, 24, norm=RMSNorm(48, 1e-6)), torch.randn(3, 20, 48)
    share_anneal(layer).fill_(amount)
    anew = trained_once(layer, x)
    cache_weights(layer, torch.float32)
    with torch.no_grad():
        layer.weight.mul_(3)  # not seen until the cache is dropped
    torch.testing.assert_close(trained_once(layer, x), anew, rtol=0, atol=0)
    forget_weights(layer)
    assert not torch.equal(trained_once(layer, x)[0], anew[0])


def test_integer_product_is_the_fake_quantised_one() -> None:
    """The same integers, so the same output; the gradients differ by the order of sums."""
    torch.manual_seed(0)
    layer, x = BitLinear(64, 24, bias=True), torch.randn(3, 20, 64)
    fake = trained_once(layer, x)
    set_integer(layer, True)
    assert layer.integer
    integer = trained_once(layer, x)
    assert torch.equal(integer[0], fake[0])
    torch.testing.assert_close(integer[1:], fake[1:])
    odd = BitLinear(60, 24)
    set_integer(odd, True)
    assert not odd.integer  # int8 tensor cores take multiples of 8


def test_integer_product_of_values_a_rounding_away() -> None:
    """As compiled code may leave them: a truncating conversion would lose a unit of each."""
    random = torch.Generator().manual_seed(0)
    q = torch.randint(-128, 128, (32, 64), generator=random).float()
    t = torch.randint(-1, 2, (16, 64), generator=random).float()
    zero = torch.zeros(())
    for x, unit in (
        (q.nextafter(zero), t.nextafter(zero)),
        (q.nextafter(2 * q), t.nextafter(2 * t)),
    ):
        assert torch.equal(_IntegerProduct.apply(x, unit), q @ t.T)


@pytest.mark.parametrize("tokens", [1, 16, 17, 40])
def test_integer_products_of_few_rows(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As CUDA takes them, which refuses 16 rows and fewer."""
    product = torch._int_mm

    def as_on_cuda(q: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        assert len(q) > 16
        return product(q, t)

    torch.manual_seed(0)
    layer, x = BitLinear(64, 24), torch.randn(tokens, 64)
    fake = trained_once(layer, x)
    monkeypatch.setattr(torch, "_int_mm", as_on_cuda)
    set_integer(layer, True)
    integer = trained_once(layer, x)
    assert torch.equal(integer[0], fake[0])
    torch.testing.assert_close(integer[1:], fake[1:])
