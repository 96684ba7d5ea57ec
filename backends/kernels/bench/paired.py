"""Rounds of samples that take turns, and ratios within a round.

A host with other guests slows a core or the memory for seconds at a time: a figure over a ceiling
that was taken at another moment says little. Here each round samples the ceilings and the row
within a fraction of a second, and a ratio is the median over rounds of the ratios in each.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from time import perf_counter

LEAST_ROUNDS = 3
Quartiles = tuple[float, float, float]
Sample = Callable[[], float]  # a rate
Rounds = dict[str, list[float]]  # name of a sample -> its value in each round


def take_turns(samples: Mapping[str, Sample], seconds: float) -> Rounds:
    """Rounds that begin within `seconds`, and LEAST_ROUNDS at least; each takes every sample once,
    in order."""
    rounds: Rounds = {name: [] for name in samples}
    count, end = 0, perf_counter() + seconds
    while count < LEAST_ROUNDS or perf_counter() < end:
        for name, sample in samples.items():
            rounds[name].append(sample())
        count += 1
    return rounds


def fastest(ways: Sequence[list[float]]) -> list[float]:
    """The rates of the way whose median is the greatest: one for all rounds, as the fastest of each
    round would owe something to chance that a row, sampled once a round, does not."""
    return max(ways, key=statistics.median)


def ratios(rates: Sequence[float], others: Sequence[float], factor: float = 1.0) -> Quartiles:
    """Lower quartile, median and upper quartile of factor * rate / other, round by round."""
    values = [factor * a / b for a, b in zip(rates, others, strict=True)]
    low, middle, high = statistics.quantiles(values, method="inclusive")
    return round(low, 3), round(middle, 3), round(high, 3)
