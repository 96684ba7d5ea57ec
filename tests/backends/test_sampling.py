"""Sampling: what is drawn, and that it is what sorting the whole vocabulary would give."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from bitdistill.backends.sampling import Sampler

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks/sampling.py"
WORDS = 3000

LOGITS = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))


def draws(count: int = 4000, **options: Any) -> np.ndarray:
    sampler = Sampler(seed=1, **options)
    return np.bincount([sampler(LOGITS) for _ in range(count)], minlength=4) / count


def test_sampling_follows_the_probabilities() -> None:
    np.testing.assert_allclose(draws(temperature=1.0), [0.5, 0.3, 0.15, 0.05], atol=0.03)
    squared = np.array([0.25, 0.09, 0.0225, 0.0025])
    np.testing.assert_allclose(draws(temperature=0.5), squared / squared.sum(), atol=0.03)


def test_top_k_and_top_p_cut_the_tail() -> None:
    np.testing.assert_allclose(draws(temperature=1.0, top_k=2), [0.625, 0.375, 0, 0], atol=0.03)
    # 0.5 + 0.3 does not reach 0.81, so the third token stays; it would not at 0.79.
    assert (draws(temperature=1.0, top_p=0.81) > 0).tolist() == [True, True, True, False]
    assert (draws(temperature=1.0, top_p=0.79) > 0).tolist() == [True, True, False, False]


def test_sampling_is_reproducible_and_refuses_nan() -> None:
    first, second = Sampler(1.0, seed=7), Sampler(1.0, seed=7)
    assert [first(LOGITS) for _ in range(20)] == [second(LOGITS) for _ in range(20)]
    with pytest.raises(ValueError, match="logits hold NaN"):
        Sampler()(np.array([0.0, np.nan], np.float32))


@pytest.fixture(scope="module")
def by_sorting(load_script: Callable[[Path], ModuleType]) -> Callable[..., Any]:
    """The definition, which the benchmark times."""
    return load_script(BENCHMARK).by_sorting  # type: ignore[no-any-return]


def made_logits(kind: str) -> np.ndarray:
    random = np.random.default_rng(3)
    logits = random.normal(scale=4, size=WORDS).astype(np.float32)
    if kind == "ties":
        logits = np.round(logits)
    if kind == "equal":
        logits[:] = -2.5
    if kind == "a label's":  # what a classifier gives: minus infinity but for some
        logits[random.permutation(WORDS)[3:]] = -np.inf
    return logits


@pytest.mark.parametrize("kind", ["normal", "ties", "equal", "a label's"])
@pytest.mark.parametrize("temperature", [1e-2, 1.0, 20.0, 1e6])
@pytest.mark.parametrize("top_k", [0, 1, 500, WORDS, WORDS + 1])
def test_candidates_are_those_of_sorting(
    by_sorting: Callable[..., Any], kind: str, temperature: float, top_k: int
) -> None:
    logits = made_logits(kind)
    for top_p in (1e-9, 0.1, 0.5, 0.9, 0.999, 1 - 1e-7, 1.0):
        tokens, weights = Sampler(temperature, top_p, top_k).candidates(logits)
        found = dense(tokens, weights / weights.sum(), WORDS)
        expected = dense(*by_sorting(logits, temperature, top_k, top_p), WORDS)
        np.testing.assert_array_equal(found > 0, expected > 0)
        np.testing.assert_allclose(found, expected, rtol=1e-10)


def dense(tokens: np.ndarray, probabilities: np.ndarray, words: int) -> np.ndarray:
    """Probabilities of all words: a token may be left out, or be there with none."""
    result = np.zeros(words)
    result[tokens] = probabilities
    return result


@pytest.mark.parametrize("options", [{}, {"top_k": 9}, {"top_p": 0.8}, {"top_k": 9, "top_p": 0.8}])
def test_draws_follow_the_definition(by_sorting: Callable[..., Any], options: Any) -> None:
    logits, count = made_logits("normal")[:40], 20_000
    sampler = Sampler(1.5, seed=5, **options)
    found = np.bincount([sampler(logits) for _ in range(count)], minlength=40) / count
    expected = dense(*by_sorting(logits, 1.5, **options), 40)
    assert (found[expected == 0] == 0).all()
    errors = np.sqrt(expected * (1 - expected) / count)
    assert (np.abs(found - expected) < 4.5 * errors + 1e-12).all()


def test_a_temperature_near_zero_draws_the_likeliest_alone() -> None:
    logits = np.array([-np.inf, 3.0, 2.9, 3.0, -np.inf], np.float32)
    for top_p in (1.0, 0.9):
        sampler = Sampler(1e-310, top_p)
        assert {sampler(logits) for _ in range(50)} == {1, 3}


def test_tokens_of_no_weight_are_never_drawn() -> None:
    class Ends:
        """The least and the greatest that a generator gives."""

        values = (0.0, 1 - 2**-53)

        def random(self) -> float:
            return self.values[0]

    sampler = Sampler(1.0)
    sampler.random = Ends()  # type: ignore[assignment]
    logits = np.array([-np.inf, 0.1, 0.2, 0.7, -np.inf], np.float32)
    assert sampler(logits) == 1
    Ends.values = Ends.values[::-1]
    assert sampler(logits) == 3


def test_infinite_logits_are_refused() -> None:
    for logits in ([np.inf, 0.0], [-np.inf, -np.inf]):
        with pytest.raises(ValueError, match="largest logit is infinite"):
            Sampler(1.0)(np.array(logits, np.float32))
