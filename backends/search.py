"""How to generate: said by whoever asks, so NumPy is not imported for it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Search:
    """How to generate. `beams` 1 is greedy; ValueError for a number out of range.

    Of finished beams the one with the largest log-likelihood / length^`length_penalty` wins, the
    stop token counted, as in transformers' beam search (without early stopping).
    """

    max_new_tokens: int = 128
    min_new_tokens: int = 0
    beams: int = 1
    length_penalty: float = 1.0

    def __post_init__(self) -> None:
        if self.beams < 1:
            raise ValueError(f"beams must be 1 (greedy) or more, got {self.beams}")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens {self.min_new_tokens} is not between 0 and max_new_tokens "
                f"{self.max_new_tokens}"
            )
