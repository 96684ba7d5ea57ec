"""Intervals and tests against closed forms, scipy where it is installed, and plain resampling."""

from __future__ import annotations

import math

import numpy as np
import pytest

from bitdistill.evals import metrics
from bitdistill.evals.resampling import Resamples, mcnemar


def test_resamples_are_draws_with_replacement() -> None:
    weights = Resamples(50, seed=3).weights
    assert weights.shape == (1000, 50)
    assert (weights.sum(1) == 50).all()
    assert weights.mean() == 1.0
    assert np.array_equal(weights, Resamples(50, seed=3).weights)
    assert not np.array_equal(weights, Resamples(50, seed=4).weights)
    assert weights.var() == pytest.approx(1 - 1 / 50, abs=0.02)  # of a binomial(50, 1/50)


def test_sums_are_those_of_the_drawn_examples() -> None:
    resamples = Resamples(7, seed=1, count=150)
    statistics = np.random.default_rng(0).normal(size=(7, 3))
    for row, weights in zip(resamples.sums(statistics), resamples.weights, strict=True):
        drawn = np.repeat(statistics, weights, axis=0)
        np.testing.assert_allclose(row, drawn.sum(0), atol=1e-12)


def test_the_interval_of_an_accuracy_is_near_the_normal_one() -> None:
    score = metrics.accuracy([1] * 300 + [0] * 100, [1] * 400).score(Resamples(400))
    assert score.interval is not None
    half = 1.96 * 100 * math.sqrt(0.75 * 0.25 / 400)
    assert score.interval == (pytest.approx(75 - half, abs=0.5), pytest.approx(75 + half, abs=0.5))


def binomial_p(b: int, c: int) -> float:
    """Two-sided, from the definition: the probability of what is as unlikely or more so."""
    chances = [math.comb(b + c, k) / 2 ** (b + c) for k in range(b + c + 1)]
    return sum(p for p in chances if p <= chances[b] * (1 + 1e-9))


@pytest.mark.parametrize(("b", "c"), [(0, 0), (1, 0), (3, 9), (9, 3), (5, 5), (20, 41), (0, 12)])
def test_mcnemar_is_the_exact_binomial_test(b: int, c: int) -> None:
    first = [True] * b + [False] * c + [True, False, True]
    second = [False] * b + [True] * c + [True, False, True]
    assert mcnemar(first, second) == (b, c, pytest.approx(binomial_p(b, c), abs=1e-12))


def test_mcnemar_is_that_of_scipy() -> None:
    stats = pytest.importorskip("scipy.stats", reason="scipy comes with lm-eval")
    for b, c in ((400, 481), (2, 30), (1500, 1400)):
        first = [True] * b + [False] * c
        p = mcnemar(first, [not right for right in first])[2]
        assert p == pytest.approx(stats.binomtest(b, b + c).pvalue, abs=1e-9)


def test_a_difference_is_paired() -> None:
    """Two rows that err on nearly the same examples differ more surely than their intervals say."""
    labels = [1] * 400
    first = metrics.accuracy([0] * 100 + [1] * 300, labels)
    second = metrics.accuracy([0] * 112 + [1] * 288, labels)
    found = metrics.difference(first, second, Resamples(400))
    assert (found.metric, found.n, found.value) == ("accuracy", 400, pytest.approx(3.0))
    assert (found.only_first, found.only_second) == (12, 0)
    assert found.p_mcnemar == pytest.approx(2 / 2**12)
    assert 0 < found.p_bootstrap < 0.01
    half = 1.96 * 100 * math.sqrt(0.03 * 0.97 / 400)
    assert found.interval[0] == pytest.approx(3 - half, abs=0.35)
    assert found.interval[1] == pytest.approx(3 + half, abs=0.35)


def test_a_paired_bootstrap_equals_plain_resampling() -> None:
    references = [f"the cat {i} sat on the mat today" for i in range(25)]
    texts = [[r.replace(" sat", " is" * (i % k)) for i, r in enumerate(references)] for k in (2, 5)]
    first, second = (metrics.bleu(t, references) for t in texts)
    resamples = Resamples(25, seed=2, count=40)
    found = metrics.difference(first, second, resamples)
    values = []
    for weights in resamples.weights:
        drawn = np.repeat(np.arange(25), weights)
        pair = [
            metrics.bleu([t[i] for i in drawn], [references[i] for i in drawn]).value for t in texts
        ]
        values.append(pair[0] - pair[1])
    assert found.interval == pytest.approx(tuple(np.quantile(values, [0.025, 0.975])), abs=1e-9)
    assert found.p_mcnemar is None


def test_only_like_things_are_compared() -> None:
    one, two = metrics.accuracy([1, 0], [1, 1]), metrics.agreement([1, 0], [1, 1])
    with pytest.raises(ValueError, match="accuracy cannot be compared with agreement"):
        metrics.difference(one, two, Resamples(2))
    with pytest.raises(ValueError, match="score the same examples"):
        metrics.difference(one, metrics.accuracy([1], [1]), Resamples(2))
    with pytest.raises(ValueError, match="compare the same examples"):
        mcnemar([True], [])
