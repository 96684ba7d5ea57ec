"""The leaves of an MLX decoder on a CPU, each against MLX's own operation."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_parity import sequences

from bitdistill import backends
from bitdistill.backends import mlx_architecture
from bitdistill.backends.kernels import binding
from bitdistill.backends.mlx_architecture import Attention, Rotary, attention_mask
from bitdistill.backends.mlx_host import HostGate, HostHead, HostNorm, Workers
from bitdistill.backends.mlx_host_attention import HostAttention, HostCache, RotaryTables
from bitdistill.backends.mlx_linear import Norm, TernaryLinear
from bitdistill.decoder import RotarySpec

Artifact = Callable[..., tuple[Path, Path]]
SIZE, HEADS, KEY_HEADS = 32, 6, 2
TASKS = Path("/proc/self/task")


def random_floats(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def norm_of(size: int, offset: float) -> Norm:
    norm = Norm(size, 1e-3, offset)
    norm.weight = mx.array(random_floats(size))
    norm.prepare(mx.float32)
    return norm


def attention_of(qk_norm: bool) -> Attention:
    spec = {"head_dim": SIZE, "attention_scale": 0.2, "qk_norm": False}
    linear = {"rows": 32, "columns": 32, "group": 32, "bias": False, "norm": False}
    layer = Attention(spec, lambda _: TernaryLinear(linear, 0.0, True))
    if qk_norm:
        layer.q_norm, layer.k_norm = norm_of(SIZE, 1.0), norm_of(SIZE, 0.0)
    return layer


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_attention_equals_mlxs(window: int | None, qk_norm: bool) -> None:
    """A batch whole, and one sequence behind a cache, in chunks and token by token."""
    frequencies, scale = tuple(1e4 ** -(np.arange(SIZE // 2) / SIZE)), 1.25
    layer, rotary = attention_of(qk_norm), Rotary(frequencies, scale)
    host = HostAttention(layer, RotaryTables(RotarySpec(frequencies, scale)), window, Workers(2))
    q, k, v = (random_floats(3, 12, heads * SIZE) for heads in (HEADS, KEY_HEADS, KEY_HEADS))
    mask = attention_mask(12, None, window)
    expected = np.array(mlx_architecture.mix(layer, *map(mx.array, (q, k, v)), rotary, mask, None))
    found = host(layer, q, k, v, rotary, mask, None)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    cache, start = HostCache((1, KEY_HEADS, 12, SIZE)), 0
    for length in (4, 1, 1, 5, 1):
        part = slice(start, start + length)
        found = host(layer, q[1:2, part], k[1:2, part], v[1:2, part], rotary, None, cache)
        np.testing.assert_allclose(found[0], expected[1, part], rtol=1e-4, atol=1e-5)
        start += length
        assert cache.offset == start


def test_heads_that_the_kernels_do_not_take_are_refused() -> None:
    layer, rotary = attention_of(False), RotaryTables(RotarySpec((0.5,), 1.0))
    layer.head_dim = 24
    with pytest.raises(ValueError, match=r"heads of 24 are not a multiple of 16 .* products='mlx'"):
        HostAttention(layer, rotary, None, Workers(1))


def test_attention_without_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, rotary = attention_of(False), RotaryTables(RotarySpec((0.5,) * (SIZE // 2), 1.0))
    host = HostAttention(layer, rotary, None, Workers(2))
    monkeypatch.setattr(binding.library(), "bd_attention", lambda *_: 0)
    parts = (random_floats(1, 3, heads * SIZE) for heads in (HEADS, KEY_HEADS, KEY_HEADS))
    with pytest.raises(MemoryError, match="no memory for attention"):
        host(layer, *parts, None, None, None)


@pytest.mark.parametrize("shape", [(1, 1, 96), (2, 7, 96)])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gate_equals_mlxs(activation: str, shape: tuple[int, ...]) -> None:
    plain = {"silu": mlx_architecture.silu_product, "gelu_tanh": mlx_architecture.gelu_product}
    gate, up = 4 * random_floats(*shape), 2 - random_floats(*shape)
    expected = np.array(plain[activation](mx.array(gate), mx.array(up)))
    found = HostGate(activation, Workers(2))(gate, up)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_norm_equals_mlxs() -> None:
    norm, x = norm_of(96, 1.0), random_floats(2, 5, 96) * 1e-2
    np.testing.assert_allclose(HostNorm(norm)(norm, x), np.array(norm(mx.array(x))), rtol=2e-6)


@pytest.mark.parametrize("rows", [1, 5])
def test_head_is_a_product(rows: int) -> None:
    matrix, x = random_floats(70, 48), random_floats(rows, 48)
    expected = x.astype(np.float64) @ matrix.T
    np.testing.assert_allclose(HostHead(matrix)(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_activations_have_the_type_asked_for(mlx_artifact: Artifact, dtype: str) -> None:
    model: Any = backends.load(mlx_artifact("llama")[1], dtype=dtype, products="cpu").model
    hidden = model.hidden(mx.array(sequences(1, 4).astype(np.int32)))
    assert str(hidden.dtype) == f"mlx.core.{dtype}"


@pytest.mark.skipif(not TASKS.is_dir(), reason="counts threads in /proc")
def test_threads_end_with_their_runtime(mlx_artifact: Artifact) -> None:
    def count() -> int:
        return len(list(TASKS.iterdir()))

    path = mlx_artifact("llama")[1]
    backends.load(path, threads=1)
    before = count()
    runtime = backends.load(path, threads=3)
    assert count() == before + 2
    del runtime
    gc.collect()
    assert count() == before


def test_rotary_tables_never_shrink_under_another_thread() -> None:
    """While one thread makes a table, another makes a longer one."""
    rotary = RotaryTables(RotarySpec((1.0, 0.1), 1.0))

    class Interrupted(RotarySpec):
        def tables(self, positions: int) -> Any:
            if positions == 8:
                rotary(100)
            return super().tables(positions)

    rotary.spec = Interrupted((1.0, 0.1), 1.0)
    assert len(rotary(4)[0]) >= 4
    assert len(rotary.tables[0]) >= 100
