"""How sure a figure is: bootstrap intervals, and tests of the difference between two rows.

Every metric here is a function of sums over examples (metrics.py), so a resample of the examples is
a row of weights, and all resamples of all metrics are one matrix product. Two rows that saw the
same examples are compared on the same resamples: a paired bootstrap.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.random import default_rng  # NumPy itself imports it at its first use
from numpy.typing import NDArray

RESAMPLES = 1000
CONFIDENCE = 0.95
CHUNK = 100  # resamples drawn or multiplied at a time, which bounds memory


class Resamples:
    """Draws of n examples with replacement; equal n and seed give equal draws."""

    def __init__(self, n: int, seed: int = 0, count: int = RESAMPLES) -> None:
        self.n, self.seed, self.count = n, seed, count

    @cached_property
    def weights(self) -> NDArray[np.uint16]:
        """How often each example is drawn: (count, n)."""
        random = default_rng(self.seed)
        weights = np.empty((self.count, self.n), np.uint16)
        for start in range(0, self.count, CHUNK):
            part = weights[start : start + CHUNK]
            drawn = random.integers(0, self.n, part.shape)
            drawn += self.n * np.arange(len(part))[:, None]  # each row counts in places of its own
            part[:] = np.bincount(drawn.ravel(), minlength=part.size).reshape(part.shape)
        return weights

    def sums(self, statistics_NK: NDArray[np.float64]) -> NDArray[np.float64]:
        """Sums of an example's statistics over each resample: (count, K)."""
        parts = range(0, self.count, CHUNK)
        return np.concatenate([self.weights[i : i + CHUNK] @ statistics_NK for i in parts])


def percentile_interval(values: NDArray[np.float64]) -> tuple[float, float]:
    """The central CONFIDENCE share of bootstrap values (Efron's percentile interval)."""
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)


@dataclass(frozen=True)
class Difference:
    """First row less second, in the metric's unit, on the same n examples.

    `p_bootstrap` is two-sided: how often resampling changes the sign. For accuracy, `only_first`
    and `only_second` count examples that one row alone has right, and `p_mcnemar` tests them.
    """

    metric: str
    n: int
    value: float
    interval: tuple[float, float]
    p_bootstrap: float
    only_first: int | None = None
    only_second: int | None = None
    p_mcnemar: float | None = None


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> tuple[int, int, float]:
    """(right in the first alone, in the second alone, p): McNemar's exact two-sided test.

    Under the null hypothesis either is as likely: binomial(b + c, 1/2) (McNemar, 1947).
    """
    if len(first) != len(second):
        raise ValueError(f"{len(first)} and {len(second)} examples; compare the same examples")
    b = sum(bool(x and not y) for x, y in zip(first, second, strict=True))
    c = sum(bool(y and not x) for x, y in zip(first, second, strict=True))
    tail, term = 0, 1
    for k in range(min(b, c) + 1):
        tail += term
        term = term * (b + c - k) // (k + 1)
    return b, c, min(1.0, 2 * tail / 2 ** (b + c))


def sign_p_value(differences: NDArray[np.float64]) -> float:
    """Two-sided p of paired bootstrap differences, never 0: (1 + crossings) / (1 + resamples)."""
    crossings = min((differences <= 0).sum(), (differences >= 0).sum())
    return min(1.0, 2 * (1 + float(crossings)) / (1 + len(differences)))


def spread(values: NDArray[np.float64]) -> float:
    """Standard deviation over resamples: the bootstrap's standard error."""
    return float(values.std(ddof=1))


def standard_error(values: NDArray[np.float64]) -> float:
    """Of a mean: sample standard deviation / sqrt(n)."""
    return float(values.std(ddof=1)) / math.sqrt(len(values))
