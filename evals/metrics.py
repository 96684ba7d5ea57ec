"""Metrics of predictions, each with the number of examples and a standard error.

All values are on a scale of 0 to 100, as in the tables of the BitDistill paper (arXiv 2510.13998).
ROUGE is Google's `rouge-score`, BLEU is `sacrebleu`: what others report, not our own versions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")
RESAMPLES = 1000


@dataclass(frozen=True)
class Score:
    """One metric: `value` and `stderr` are on 0..100; `stderr` is None where n is too small."""

    metric: str
    value: float
    n: int
    stderr: float | None


def _mean(metric: str, values: Sequence[float]) -> Score:
    """100 x mean, with the standard error of the mean (sample standard deviation / sqrt(n))."""
    x = 100.0 * np.asarray(values, dtype=np.float64)
    if x.size == 0:
        raise ValueError(f"{metric} of no examples; give at least one")
    stderr = float(x.std(ddof=1) / math.sqrt(x.size)) if x.size > 1 else None
    return Score(metric, float(x.mean()), int(x.size), stderr)


def _check_lengths(first: Sequence[Any], second: Sequence[Any]) -> None:
    if len(first) != len(second):
        raise ValueError(
            f"{len(first)} predictions for {len(second)} references; score the same examples"
        )


def accuracy(predictions: Sequence[int], labels: Sequence[int]) -> Score:
    """Percentage of predictions equal to the labels; ValueError for unequal lengths or none."""
    _check_lengths(predictions, labels)
    return _mean("accuracy", [p == y for p, y in zip(predictions, labels, strict=True)])


def agreement(predictions: Sequence[Any], reference: Sequence[Any]) -> Score:
    """Percentage of examples on which two models predict the same label, or the same text."""
    _check_lengths(predictions, reference)
    return _mean("agreement", [p == r for p, r in zip(predictions, reference, strict=True)])


def rouge(predictions: Sequence[str], references: Sequence[str]) -> list[Score]:
    """ROUGE-1/2/L/Lsum, F-measure, Porter stemmer; the mean over examples and its standard error.

    Lsum takes each line of a text as a sentence (the convention of `rouge-score`; CNN/DailyMail
    highlights come one a line).
    """
    from rouge_score.rouge_scorer import RougeScorer

    _check_lengths(predictions, references)
    scorer = RougeScorer(list(ROUGE), use_stemmer=True)
    scores = [scorer.score(r, p) for p, r in zip(predictions, references, strict=True)]
    return [_mean(name, [score[name].fmeasure for score in scores]) for name in ROUGE]


def bleu(predictions: Sequence[str], references: Sequence[str], seed: int = 0) -> Score:
    """Corpus BLEU (sacrebleu's defaults: 13a tokens, exponential smoothing).

    A corpus score has no per-example mean, so its standard error is the standard deviation over
    1,000 bootstrap resamples of the examples, drawn with `seed`.
    """
    from sacrebleu.metrics import BLEU

    _check_lengths(predictions, references)
    if not predictions:
        raise ValueError("bleu of no examples; give at least one")
    value = float(BLEU().corpus_score(list(predictions), [list(references)]).score)
    n = len(predictions)
    stderr = _bootstrap(_statistics(predictions, references), seed) if n > 1 else None
    return Score("bleu", value, n, stderr)


def _statistics(predictions: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """(n, 10) integers: 4 n-gram matches, 4 n-gram totals, length, reference length."""
    from sacrebleu.metrics import BLEU

    metric = BLEU(effective_order=True)  # the counts are the same; without it, a warning a line
    scores = (metric.sentence_score(p, [r]) for p, r in zip(predictions, references, strict=True))
    return np.array([[*s.counts, *s.totals, s.sys_len, s.ref_len] for s in scores], dtype=np.int64)


def _bootstrap(statistics: np.ndarray, seed: int) -> float:
    from sacrebleu.metrics import BLEU

    n = len(statistics)
    weights = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=RESAMPLES)
    sums = (weights @ statistics).tolist()
    scores = [BLEU.compute_bleu(s[:4], s[4:8], s[8], s[9], smooth_method="exp").score for s in sums]
    return float(np.std(scores, ddof=1))
