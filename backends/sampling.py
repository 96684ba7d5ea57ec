"""Choosing the next token from logits: greedy, or temperature with top-k and top-p (NumPy only)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Logits = NDArray[np.float32]


class Sampler:
    """Draws token ids; the same seed and logits give the same tokens.

    `temperature` 0 is greedy. `top_k` keeps the k largest logits (0: all). `top_p` keeps the
    smallest set of tokens whose probability reaches p (Holtzman et al., arXiv 1904.09751).
    Raises ValueError for a value out of range.
    """

    def __init__(
        self, temperature: float = 0.0, top_p: float = 1.0, top_k: int = 0, seed: int = 0
    ) -> None:
        if not temperature >= 0.0:
            raise ValueError(f"temperature must be 0 (greedy) or more, got {temperature}")
        if not 0.0 < top_p <= 1.0:
            raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")
        if top_k < 0:
            raise ValueError(f"top_k must be 0 (all tokens) or more, got {top_k}")
        self.temperature, self.top_p, self.top_k = temperature, top_p, top_k
        self.random = np.random.default_rng(seed)

    def __call__(self, logits_V: Logits) -> int:
        """The next token id from float32 (V,) logits; ValueError if they hold NaN."""
        if np.isnan(logits_V).any():
            raise ValueError("the model's logits hold NaN; its weights or input are damaged")
        if self.temperature == 0.0:
            return int(logits_V.argmax())
        tokens, probabilities = self._candidates(logits_V)
        return int(self.random.choice(tokens, p=probabilities))

    def _candidates(self, logits_V: Logits) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
        """Token ids by falling probability, and their probabilities, after top-k and top-p."""
        order = np.argsort(-logits_V, kind="stable")
        if self.top_k:
            order = order[: self.top_k]
        scaled = logits_V[order].astype(np.float64) / self.temperature
        weights = np.exp(scaled - scaled[0])
        probabilities = weights / weights.sum()
        before = np.cumsum(probabilities) - probabilities
        keep = before < self.top_p  # the first token is always kept: nothing is before it
        kept = probabilities[keep]
        return order[keep], kept / kept.sum()
