"""The kernels' own threads: every part once, concurrent callers, layers of one input."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from kernel_oracle import F, oracle, random_trits, same

from bitdistill.backends.kernels.binding import Kernels, available_isas
from bitdistill.backends.kernels.pool import Layer, Pool, ternary_layers
from bitdistill.packing import pack_kernel

ISAS = available_isas()


def marked(pool: Pool, total: int) -> list[int]:
    """How often each index of range(total) was handed out."""
    counts = [0] * total
    lock = threading.Lock()

    def body(first: int, last: int) -> None:
        with lock:
            for i in range(first, last):
                counts[i] += 1

    pool.run(total, body)
    return counts


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_every_index_is_handed_out_once(threads: int) -> None:
    with Pool(threads) as pool:
        assert pool.threads == threads
        for total in (0, 1, 2, threads, 5, 100):
            for _ in range(20):
                assert marked(pool, total) == [1] * total


def test_sleeping_workers_wake_up() -> None:
    with Pool(3) as pool:
        for pause in (0.0, 0.02, 0.02):
            threading.Event().wait(pause)  # longer than workers stay awake
            assert marked(pool, 30) == [1] * 30


def test_callers_at_the_same_time_and_calls_inside_calls_finish() -> None:
    with Pool(2) as pool, ThreadPoolExecutor(4) as callers:
        results = list(callers.map(lambda total: marked(pool, total), [3, 50, 7, 20] * 10))
        assert all(set(counts) == {1} for counts in results)
        inner: list[list[int]] = []
        pool.run(2, lambda first, last: inner.append(marked(pool, 9)))
        assert inner
        assert all(counts == [1] * 9 for counts in inner)


def test_a_pool_refuses_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="at least 1 thread, got 0"):
        Pool(0)
    pool = Pool(2)
    pool.close()
    with pytest.raises(RuntimeError, match="closed"):
        pool.run(1, lambda first, last: None)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", [8, 0])
def test_layers_of_one_input_equal_single_layers(isa: str, bits: int) -> None:
    rng = np.random.default_rng(20)
    kernels, k = Kernels(isa), 200
    layers = [
        Layer(pack_kernel(random_trits(rng, n, k)), rng.random(n, F), rng.standard_normal(n, F))
        for n in (64, 33, 1, 300, 545)  # the last one's end goes in short parts, at 48 tokens
    ]
    weight = rng.standard_normal(k, F)
    with Pool(3) as pool:
        for tokens in (0, 1, 5, 40, 48, 90):
            x = rng.standard_normal((tokens, k), F)
            for threads in (None, pool):
                ys = ternary_layers(
                    kernels, x, layers, pool=threads, norm_weight=weight, epsilon=1e-6,
                    activation_bits=bits,
                )  # fmt: skip
                for layer, y in zip(layers, ys, strict=True):
                    alone = kernels.ternary_linear(
                        x, layer.packed, layer.scale, norm_weight=weight, epsilon=1e-6,
                        bias=layer.bias, activation_bits=bits,
                    )  # fmt: skip
                    assert same(y, alone)


@pytest.mark.parametrize("isa", ISAS)
def test_concurrent_layers_on_one_pool(isa: str) -> None:
    rng = np.random.default_rng(21)
    trits, scale = random_trits(rng, 300, 128), rng.random(300, F)
    layer, xs = Layer(pack_kernel(trits), scale), rng.standard_normal((24, 19, 128), F)
    with Pool(2) as pool, ThreadPoolExecutor(3) as callers:
        results = callers.map(lambda x: ternary_layers(Kernels(isa), x, [layer], pool=pool)[0], xs)
        for x, y in zip(xs, results, strict=True):
            assert same(y, oracle(x, trits, scale, None, None))
