"""Choosing the next token from logits: greedy, or temperature with top-k and top-p (NumPy only).

A vocabulary of 150,000 words takes 10 ms to sort, as long as a step of a small model. So nothing is
sorted but the few tokens around the edge of top-p, and a token is drawn in the vocabulary's order.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Logits = NDArray[np.float32]
Doubles = NDArray[np.float64]

BIN = 1 / 64  # of a logit over the temperature: how finely tokens are counted for top-p
BINS = 4096  # the last one holds all beyond e^-64 of the likeliest token's probability


class Sampler:
    """Draws token ids; the same seed and logits give the same tokens.

    `temperature` 0 is greedy. `top_k` keeps the k largest logits (0: all). `top_p` keeps the
    smallest set of tokens whose probability reaches p (Holtzman et al., arXiv 1904.09751). Of equal
    logits the lower ids are kept. Raises ValueError for a value out of range.
    """

    def __init__(
        self, temperature: float = 0.0, top_p: float = 1.0, top_k: int = 0, seed: int = 0
    ) -> None:
        if not 0.0 <= temperature < np.inf:
            raise ValueError(f"temperature must be 0 (greedy) or more, got {temperature}")
        if not 0.0 < top_p <= 1.0:
            raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")
        if top_k < 0:
            raise ValueError(f"top_k must be 0 (all tokens) or more, got {top_k}")
        self.temperature, self.top_p, self.top_k = temperature, top_p, top_k
        self.random = np.random.default_rng(seed)

    def __call__(self, logits_V: Logits) -> int:
        """The next token id from float32 (V,) logits.

        ValueError if they hold NaN, or if the largest is infinite and a token is to be drawn.
        """
        largest = checked_max(logits_V)
        if self.temperature == 0.0:
            return int(logits_V.argmax())
        if np.isinf(largest):
            raise ValueError("the largest logit is infinite; the model's weights are damaged")
        tokens, weights = self.candidates(logits_V)
        sums = np.cumsum(weights)
        # to the right of equal sums, so that a token of no weight is never drawn
        return int(tokens[np.searchsorted(sums, self.random.random() * sums[-1], side="right")])

    def candidates(self, logits_V: Logits) -> tuple[NDArray[np.intp], Doubles]:
        """Token ids (n,) that top-k and top-p leave, and what their probabilities are relative to
        the likeliest token's."""
        tokens = np.arange(len(logits_V))
        if 0 < self.top_k < len(logits_V):
            tokens = _largest(logits_V, self.top_k)
            logits_V = logits_V[tokens]
        with np.errstate(over="ignore"):  # a temperature near 0: infinitely far, no weight
            distances = np.subtract(logits_V.max(), logits_V, dtype=np.float64) / self.temperature
        weights = np.exp(-distances)
        if self.top_p < 1.0:
            keep = _nucleus(logits_V, distances, weights, self.top_p)
            tokens, weights = tokens[keep], weights[keep]
        return tokens, weights


def checked_max(logits: Logits) -> np.float32:
    """The largest of logits of any shape; ValueError if one is NaN, which no token is chosen by."""
    largest: np.float32 = logits.max()
    if np.isnan(largest):
        raise ValueError("the model's logits hold NaN; its weights or input are damaged")
    return largest


def _largest(logits_V: Logits, count: int) -> NDArray[np.intp]:
    """Ids of the `count` largest logits, ascending."""
    least = np.partition(logits_V, -count)[-count]
    tokens = np.flatnonzero(logits_V >= least)
    ties = np.flatnonzero(logits_V[tokens] == least)
    return np.delete(tokens, ties[len(ties) - (len(tokens) - count) :])


def _nucleus(
    logits_V: Logits, distances_V: Doubles, weights_V: Doubles, share: float
) -> NDArray[np.bool_]:
    """Which tokens have less than `share` of the weight before them, in falling order.

    Weights are summed by bins of distance, and only the bin in which the sum reaches the share is
    put in order.
    """
    bins = np.minimum(distances_V / BIN, BINS - 1).astype(np.intp)
    sums = np.cumsum(np.bincount(bins, weights_V, minlength=BINS))
    wanted = share * sums[-1]
    edge = int(np.searchsorted(sums, wanted))
    inside = np.flatnonzero(bins == edge)
    inside = inside[np.argsort(-logits_V[inside], kind="stable")]
    weights = weights_V[inside]
    before = (sums[edge - 1] if edge else 0.0) + (np.cumsum(weights) - weights)
    keep = bins < edge
    keep[inside[before < wanted]] = True
    return keep
