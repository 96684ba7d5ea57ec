"""Speed of a runtime on one sequence: prefill and decode, in tokens per second.

Random tokens, a warm-up, then repeats of "feed the prompt, then one token at a time"; the figure is
the median over repeats, and the spread is reported with it. A budget in seconds bounds the work: a
slow model decodes fewer tokens and is repeated less, never below FEWEST tokens and one repeat, so
that a large model on a small machine still gives a figure. What was fed is part of the result.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from bitdistill.backends.base import Runtime


FEWEST = 4


@dataclass(frozen=True)
class Speed:
    """Medians over `repeats`, in tokens per second; the ranges are (slowest, fastest)."""

    prefill_tokens: int
    decode_tokens: int
    prefill: float
    decode: float
    repeats: int
    prefill_range: tuple[float, float]
    decode_range: tuple[float, float]


def measure(
    runtime: Runtime,
    prefill_tokens: int = 128,
    decode_tokens: int = 32,
    repeats: int = 5,
    budget: float = 6.0,
    seed: int = 0,
) -> Speed:
    """Time a prompt of `prefill_tokens` and `decode_tokens` after it (fewer in a short context).

    `budget` is in seconds, warm-up excluded. ValueError when the context holds less than 2 tokens.
    """
    if runtime.context < 2:
        raise ValueError(f"a context of {runtime.context} tokens cannot be timed; it needs 2")
    decode_tokens = max(1, min(decode_tokens, runtime.context // 4))
    prefill_tokens = max(1, min(prefill_tokens, runtime.context - decode_tokens))
    total = prefill_tokens + decode_tokens
    tokens = np.random.default_rng(seed).integers(0, runtime.vocabulary, total).tolist()
    warm = min(2, decode_tokens)
    _, seconds = _once(runtime, tokens[: prefill_tokens + warm], prefill_tokens)
    affordable = max(FEWEST, int(0.5 * budget * warm / max(seconds, 1e-9)))
    decode_tokens = min(decode_tokens, affordable)
    tokens = tokens[: prefill_tokens + decode_tokens]
    times: list[tuple[float, float]] = []
    start = time.perf_counter()
    while len(times) < repeats and (not times or time.perf_counter() - start < budget):
        times.append(_once(runtime, tokens, prefill_tokens))
    prefill = [prefill_tokens / first for first, _ in times]
    decode = [decode_tokens / second for _, second in times]
    return Speed(
        prefill_tokens,
        decode_tokens,
        statistics.median(prefill),
        statistics.median(decode),
        len(times),
        (min(prefill), max(prefill)),
        (min(decode), max(decode)),
    )


def _once(runtime: Runtime, tokens: list[int], prefill_tokens: int) -> tuple[float, float]:
    """Seconds for the prompt and for the tokens after it. `step` returns when logits are there."""
    cache: Any = runtime.new_cache(len(tokens))
    start = time.perf_counter()
    runtime.step(tokens[:prefill_tokens], cache)
    middle = time.perf_counter()
    for token in tokens[prefill_tokens:]:
        runtime.step([token], cache)
    return middle - start, time.perf_counter() - middle
