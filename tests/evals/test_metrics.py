"""Metrics against values derived by hand and against plain reference implementations."""

from __future__ import annotations

import math
import random
from collections import Counter

import numpy as np
import pytest

from bitdistill.evals import metrics
from bitdistill.evals.metrics import Metric, Score
from bitdistill.evals.resampling import Resamples

WORDS = ["dog", "cat", "mat", "sun", "red", "big", "top", "box"]  # the stemmer leaves them alone


def sentences(seed: int, count: int) -> list[str]:
    source = random.Random(seed)
    return [" ".join(source.choices(WORDS, k=source.randint(4, 12))) for _ in range(count)]


def grams(words: list[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def f_measure(hits: int, predicted: int, wanted: int) -> float:
    return 2 * hits / (predicted + wanted) if hits else 0.0


def longest_common(a: list[str], b: list[str]) -> int:
    """Length of the longest common subsequence, by the textbook table."""
    above = [0] * (len(b) + 1)
    for x in a:
        row = [0]
        for j, y in enumerate(b):
            row.append(above[j] + 1 if x == y else max(row[j], above[j + 1]))
        above = row
    return above[-1]


def reference_bleu(predictions: list[str], references: list[str]) -> float:
    """Papineni et al. 2002, one reference, no smoothing."""
    hits, totals, predicted, wanted = [0] * 4, [0] * 4, 0, 0
    for p, r in zip(predictions, references, strict=True):
        a, b = p.split(), r.split()
        predicted, wanted = predicted + len(a), wanted + len(b)
        for n in range(1, 5):
            hits[n - 1] += sum((grams(a, n) & grams(b, n)).values())
            totals[n - 1] += max(0, len(a) - n + 1)
    brevity = min(1.0, math.exp(1 - wanted / predicted))
    return (
        100
        * brevity
        * math.exp(sum(math.log(h / t) for h, t in zip(hits, totals, strict=True)) / 4)
    )


def score_of(metric: Metric, seed: int = 0) -> Score:
    return metric.score(Resamples(metric.n, seed))


def test_accuracy_by_hand() -> None:
    score = score_of(metrics.accuracy([1, 0, 1, 1], [1, 1, 1, 1]))
    assert (score.metric, score.value, score.n) == ("accuracy", 75.0, 4)
    assert score.stderr == pytest.approx(100 * math.sqrt(0.75 * 0.25 / 3))  # p(1-p)/(n-1)


def test_one_example_has_no_standard_error() -> None:
    assert score_of(metrics.accuracy([1], [1])) == Score("accuracy", 100.0, "%", 1, None, None)


def test_confusion_by_hand() -> None:
    details = metrics.accuracy([0, 2, 1, -1, 2], [0, 2, 2, 1, 2], ["a", "b", "c"]).details
    assert details == {
        "labels": ["a", "b", "c"],
        "confusion": [[1, 0, 0, 0], [0, 0, 0, 1], [0, 1, 2, 0]],
    }


def test_confusion_is_that_of_scikit_learn() -> None:
    sklearn = pytest.importorskip("sklearn.metrics", reason="scikit-learn comes with lm-eval")
    labels, predictions = np.random.default_rng(0).integers(0, 4, (2, 300))
    found = np.array(metrics.confusion(predictions.tolist(), labels.tolist(), 4))
    assert found[:, 4].sum() == 0
    np.testing.assert_array_equal(found[:, :4], sklearn.confusion_matrix(labels, predictions))


def test_calibration_by_hand() -> None:
    # confidences 0.9 and 0.92 (bin 14 of 15), 0.6 (bin 9): |1 - .9 + 0 - .92| and |1 - .6|
    scores = [[math.log(0.9), math.log(0.1)], [math.log(0.08), math.log(0.92)]]
    scores.append([math.log(0.6) - 3, math.log(0.4) - 3])  # a common factor does not count
    metric = metrics.calibration(scores, [0, 0, 0])
    assert metric.value == pytest.approx(100 * (abs(1 - 0.9 - 0.92) + 0.4) / 3, abs=1e-9)


def test_calibration_equals_a_plain_loop() -> None:
    random_ = np.random.default_rng(1)
    scores = random_.normal(size=(500, 3)) * 2
    labels = random_.integers(0, 3, 500)
    probabilities = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    expected = 0.0
    for k in range(15):
        inside = (confidence > k / 15) & (confidence <= (k + 1) / 15)
        if inside.any():
            gap = abs(right[inside].mean() - confidence[inside].mean())
            expected += 100 * inside.mean() * gap
    metric = metrics.calibration(scores.tolist(), labels.tolist())
    assert metric.value == pytest.approx(expected, abs=1e-9)


def test_perplexity_by_hand() -> None:
    metric = metrics.perplexity([-2.0, -3.0, -1.0], [1, 3, 2])
    assert metric.value == pytest.approx(math.exp(6 / 6))
    assert (metric.unit, metric.n) == ("", 3)


def test_perplexity_is_that_of_pytorch() -> None:
    import torch

    torch.manual_seed(0)
    logits, targets = torch.randn(9, 5, dtype=torch.float64), torch.randint(0, 5, (9,))
    rows = logits.log_softmax(-1)[torch.arange(9), targets].tolist()
    metric = metrics.perplexity([sum(rows[:4]), sum(rows[4:])], [4, 5])
    expected = torch.nn.functional.cross_entropy(logits, targets).exp()
    assert metric.value == pytest.approx(float(expected), abs=1e-9)


def test_agreement_counts_equal_predictions() -> None:
    assert metrics.agreement(["a", "b", "c"], ["a", "x", "c"]).value == pytest.approx(200 / 3)


@pytest.mark.parametrize(
    "metric", [metrics.accuracy, metrics.agreement, metrics.rouge, metrics.bleu]
)
def test_unequal_lengths_and_no_examples_are_refused(metric) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match="2 predictions for 1 references; score the same examples"):
        metric(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="of no examples; give at least one"):
        metric([], [])


def test_rouge_by_hand() -> None:
    r1, r2, rl, _ = map(score_of, metrics.rouge(["the cat on the mat"], ["the cat sat on the mat"]))
    assert r1.value == pytest.approx(100 * 2 * (5 / 5) * (5 / 6) / (5 / 5 + 5 / 6))
    assert r2.value == pytest.approx(100 * 2 * (3 / 4) * (3 / 5) / (3 / 4 + 3 / 5))
    assert rl.value == pytest.approx(100 * 10 / 11)
    assert r1.stderr is None


def test_rouge_lsum_takes_lines_as_sentences() -> None:
    scores = metrics.rouge(["red box\nbig dog"], ["big dog\nred box"])
    values = {score.name: score.value for score in scores}
    assert values["rougeL"] == pytest.approx(50.0)  # one of the two lines, in order
    assert values["rougeLsum"] == pytest.approx(100.0)  # both lines, each on its own


def test_rouge_equals_a_plain_implementation() -> None:
    predictions, references = sentences(1, 40), sentences(2, 40)
    got = {metric.name: score_of(metric) for metric in metrics.rouge(predictions, references)}
    for name, n in (("rouge1", 1), ("rouge2", 2), ("rougeL", 0)):
        values = []
        for p, r in zip(predictions, references, strict=True):
            a, b = p.split(), r.split()
            if n:
                hits = sum((grams(a, n) & grams(b, n)).values())
                values.append(f_measure(hits, len(a) - n + 1, len(b) - n + 1))
            else:
                values.append(f_measure(longest_common(a, b), len(a), len(b)))
        mean = sum(values) / 40
        variance = sum((v - mean) ** 2 for v in values) / 39
        assert got[name].value == pytest.approx(100 * mean, abs=1e-9)
        assert got[name].stderr == pytest.approx(100 * math.sqrt(variance / 40), abs=1e-9)
        assert got[name].n == 40


def test_bleu_by_hand() -> None:
    # 5/6, 3/5 and 1/4 of the n-grams match; 0 of 3 is smoothed to 1 of 2 x 3
    score = metrics.bleu(["the cat is on the mat"], ["the cat sat on the mat"])
    assert score.value == pytest.approx(100 * (5 / 6 * 3 / 5 * 1 / 4 * 1 / 2 / 3) ** 0.25)


def test_bleu_equals_a_plain_implementation() -> None:
    references = sentences(3, 40)
    predictions = [" ".join([*r.split()[:-1], "top", "cat"]) for r in references]
    score = metrics.bleu(predictions, references)
    assert score.value == pytest.approx(reference_bleu(predictions, references), abs=1e-9)


def test_bleu_and_rouge_are_those_of_their_packages() -> None:
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics import BLEU

    references = [
        f"{a} , {b} .\n{c}" for a, b, c in zip(*(sentences(i, 30) for i in (5, 6, 7)), strict=True)
    ]
    predictions = [r.replace("cat", "dogs")[: 20 + i] for i, r in enumerate(references)]
    expected = BLEU().corpus_score(predictions, [references]).score
    assert metrics.bleu(predictions, references).value == pytest.approx(expected, abs=1e-9)
    scorer = RougeScorer(list(metrics.ROUGE), use_stemmer=True)
    scores = [scorer.score(r, p) for p, r in zip(predictions, references, strict=True)]
    for metric in metrics.rouge(predictions, references):
        mean = np.mean([score[metric.name].fmeasure for score in scores])
        assert metric.value == pytest.approx(100 * mean, abs=1e-9)


def test_bleu_bootstrap_is_seeded_and_zero_without_variation() -> None:
    references = sentences(4, 30)
    predictions = [r if i % 2 else sentences(i, 1)[0] for i, r in enumerate(references)]
    first, again = (score_of(metrics.bleu(predictions, references), seed=7) for _ in range(2))
    assert first == again
    assert first.stderr is not None
    assert 1.0 < first.stderr < 20.0
    same = score_of(metrics.bleu([references[0]] * 20, [references[0]] * 20))
    assert (same.value, same.stderr) == (pytest.approx(100.0), pytest.approx(0.0, abs=1e-9))


def test_bleu_takes_empty_predictions() -> None:
    assert metrics.bleu(["", "the cat"], ["the dog", "the cat"]).n == 2
