"""Metrics of predictions, each with n, a standard error and a bootstrap interval.

Percentages are on a scale of 0 to 100, as in the tables of the BitDistill paper (arXiv 2510.13998).
ROUGE is Google's `rouge-score`, BLEU is `sacrebleu`: what others report, not our own versions.

A `Metric` holds one row of statistics per example and a function of their sum, which is all that
bootstrapping and paired comparison need (resampling.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitdistill.evals.resampling import (
    Difference,
    Resamples,
    mcnemar,
    percentile_interval,
    sign_p_value,
    spread,
    standard_error,
)

ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")
BINS = 15
Floats = NDArray[np.float64]
Combine = Callable[[Floats, int], Floats]


@dataclass(frozen=True)
class Score:
    """One figure. `stderr` and `interval` (95 %) are None for a single example."""

    metric: str
    value: float
    unit: str
    n: int
    stderr: float | None
    interval: tuple[float, float] | None
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Metric:
    """`combine(sums (R, K), n)` gives R values from sums of the (n, K) `statistics`."""

    name: str
    statistics: Floats
    combine: Combine
    unit: str = "%"
    is_mean: bool = False
    details: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not len(self.statistics):
            raise ValueError(f"{self.name} of no examples; give at least one")

    @property
    def n(self) -> int:
        return len(self.statistics)

    @property
    def value(self) -> float:
        """The figure over all examples."""
        return float(self.combine(self.statistics.sum(0)[None], self.n)[0])

    def score(self, resamples: Resamples) -> Score:
        """The figure and its uncertainty; only the standard error of a mean needs no bootstrap."""
        stderr, interval = None, None
        if self.n > 1:
            values = self.combine(resamples.sums(self.statistics), self.n)
            interval = percentile_interval(values)
            stderr = standard_error(self.examples) if self.is_mean else spread(values)
        return Score(self.name, self.value, self.unit, self.n, stderr, interval, self.details)

    @property
    def examples(self) -> Floats:
        """The value of each example alone, (n,); meaningful for a mean."""
        return self.combine(self.statistics, 1)


def difference(first: Metric, second: Metric, resamples: Resamples) -> Difference:
    """`first` less `second` with interval and p values; ValueError unless n and name are equal."""
    if first.name != second.name:
        raise ValueError(f"{first.name} cannot be compared with {second.name}")
    _check_lengths(first.statistics, second.statistics)
    samples = [metric.combine(resamples.sums(metric.statistics), metric.n)
               for metric in (first, second)]  # fmt: skip
    pair: tuple[Any, Any, Any] = (None, None, None)
    if first.name == "accuracy":
        pair = mcnemar(*((metric.statistics[:, 0] > 0).tolist() for metric in (first, second)))
    return Difference(
        first.name,
        first.n,
        first.value - second.value,
        percentile_interval(samples[0] - samples[1]),
        sign_p_value(samples[0] - samples[1]),
        *pair,
    )


def _check_lengths(first: Sequence[Any] | Floats, second: Sequence[Any] | Floats) -> None:
    if len(first) != len(second):
        raise ValueError(
            f"{len(first)} predictions for {len(second)} references; score the same examples"
        )


def _percentage(sums_RK: Floats, n: int) -> Floats:
    return 100.0 * sums_RK[:, 0] / n


def _mean(name: str, values: Sequence[float], details: dict[str, Any] | None = None) -> Metric:
    """100 x the mean of values on 0..1."""
    statistics = np.asarray(values, dtype=np.float64).reshape(-1, 1)
    return Metric(name, statistics, _percentage, is_mean=True, details=details or {})


def accuracy(
    predictions: Sequence[int], labels: Sequence[int], names: Sequence[str] = ()
) -> Metric:
    """Percentage of predictions equal to the labels, with the confusion matrix in `details`.

    A prediction of -1 is none of the answers. ValueError for unequal lengths or none.
    """
    _check_lengths(predictions, labels)
    details = {"labels": list(names), "confusion": confusion(predictions, labels, len(names))}
    right = [p == y for p, y in zip(predictions, labels, strict=True)]
    return _mean("accuracy", right, details if names else None)


def confusion(predictions: Sequence[int], labels: Sequence[int], count: int) -> list[list[int]]:
    """Rows: true labels; columns: predicted ones, and a last column for none of the answers."""
    matrix = [[0] * (count + 1) for _ in range(count)]
    if count:
        for predicted, true in zip(predictions, labels, strict=True):
            matrix[true][predicted if predicted >= 0 else count] += 1
    return matrix


def agreement(predictions: Sequence[Any], reference: Sequence[Any]) -> Metric:
    """Percentage of examples on which two models predict the same label, or the same text."""
    _check_lengths(predictions, reference)
    return _mean("agreement", [p == r for p, r in zip(predictions, reference, strict=True)])


def calibration(scores: Sequence[Sequence[float]], labels: Sequence[int]) -> Metric:
    """Expected calibration error: confidence against accuracy in 15 equal bins (Guo et al., 2017,
    equation 3), in percent. Confidence is the softmax over the answers' log-likelihoods.
    """
    _check_lengths(scores, labels)
    log_likelihoods_NL = np.asarray(scores, np.float64)
    likelihoods_NL = np.exp(log_likelihoods_NL - log_likelihoods_NL.max(1, keepdims=True))
    confidence_N = likelihoods_NL.max(1) / likelihoods_NL.sum(1)
    right_N = likelihoods_NL.argmax(1) == np.asarray(labels)
    bin_N = np.minimum(BINS, np.ceil(confidence_N * BINS).astype(np.int64)) - 1
    statistics = np.zeros((len(scores), BINS))
    statistics[np.arange(len(scores)), bin_N] = right_N - confidence_N
    return Metric(
        "ece",
        statistics,
        lambda sums_RK, n: 100.0 * np.abs(sums_RK).sum(1) / n,
        details={"bins": BINS},
    )


def perplexity(log_likelihoods: Sequence[float], tokens: Sequence[int]) -> Metric:
    """exp(-sum of log-likelihoods / sum of tokens) of the right answers, given their prompts."""
    _check_lengths(log_likelihoods, tokens)
    statistics = np.array([log_likelihoods, tokens], np.float64).T
    return Metric(
        "perplexity",
        statistics,
        lambda sums_RK, n: np.exp(-sums_RK[:, 0] / sums_RK[:, 1]),
        unit="",
    )


def rouge(predictions: Sequence[str], references: Sequence[str]) -> list[Metric]:
    """ROUGE-1/2/L/Lsum, F-measure, Porter stemmer; means over examples.

    Lsum takes each line of a text as a sentence (the convention of `rouge-score`; CNN/DailyMail
    highlights come one a line).
    """
    from rouge_score.rouge_scorer import RougeScorer

    _check_lengths(predictions, references)
    scorer = RougeScorer(list(ROUGE), use_stemmer=True)
    scores = [scorer.score(r, p) for p, r in zip(predictions, references, strict=True)]
    return [_mean(name, [score[name].fmeasure for score in scores]) for name in ROUGE]


def bleu(predictions: Sequence[str], references: Sequence[str]) -> Metric:
    """Corpus BLEU (sacrebleu's defaults: 13a tokens, exponential smoothing).

    The statistics of an example are 4 n-gram matches, 4 n-gram totals, length, reference length.
    """
    from sacrebleu.metrics import BLEU

    _check_lengths(predictions, references)
    metric = BLEU(effective_order=True)  # the counts are the same; without it, a warning a line
    scores = [metric.sentence_score(p, [r]) for p, r in zip(predictions, references, strict=True)]
    counts = [[*s.counts, *s.totals, s.sys_len, s.ref_len] for s in scores]
    return Metric("bleu", np.array(counts, np.float64), _bleu)


def _bleu(sums_RK: Floats, n: int) -> Floats:
    from sacrebleu.metrics import BLEU

    rows = sums_RK.astype(np.int64).tolist()
    scores = (BLEU.compute_bleu(s[:4], s[4:8], s[8], s[9], smooth_method="exp") for s in rows)
    return np.array([score.score for score in scores])
