"""Milliseconds that choosing a token takes, beside the definition of top-k and top-p by sorting.

    python benchmarks/sampling.py --vocabulary 151936 --out docs/results/onnx-sampling.jsonl

Both draw from the same logits, in turn: the median of `--rounds`, and the fastest. Logits are
normal with a spread of 2 and 5, whose likeliest token has 0.6 and 23 % of the probability (median).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from lines import put
from numpy.typing import NDArray

SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 1.0, "top_k": 50},
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 0.7, "top_k": 50, "top_p": 0.9},
    {"temperature": 1.0, "top_p": 0.999},
]
SPREADS = (2.0, 5.0)


def by_sorting(
    logits_V: NDArray[np.float32], temperature: float, top_k: int = 0, top_p: float = 1.0
) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """Token ids by falling probability, and their probabilities, after top-k and top-p."""
    order = np.argsort(-logits_V, kind="stable")
    order = order[: top_k or None]
    scaled = logits_V[order].astype(np.float64) / temperature
    weights = np.exp(scaled - scaled[0])
    if top_p < 1.0:
        before = np.cumsum(weights) - weights
        keep = before < top_p * weights.sum()  # the first is always kept: nothing is before it
        order, weights = order[keep], weights[keep]
    return order, weights / weights.sum()


def sorted_draw(setting: dict[str, Any]) -> Callable[[NDArray[np.float32]], int]:
    """A sampler that follows the definition."""
    random = np.random.default_rng(0)

    def draw(logits_V: NDArray[np.float32]) -> int:
        if np.isnan(logits_V).any() or setting["temperature"] == 0.0:
            return int(logits_V.argmax())
        tokens, probabilities = by_sorting(logits_V, **setting)
        return int(random.choice(tokens, p=probabilities))

    return draw


def lines(vocabulary: int, rounds: int) -> Iterator[dict[str, Any]]:
    """One line for each setting and spread."""
    from bitdistill.backends.sampling import Sampler
    from bitdistill.evals.environment import machine, versions

    where = {"machine": machine(), "versions": versions()}
    for spread in SPREADS:
        normal = np.random.default_rng(0).standard_normal((rounds, vocabulary), np.float32)
        for setting in SETTINGS:
            found: dict[str, list[float]] = {"sampler": [], "sorting": []}
            draws = {"sampler": Sampler(**setting), "sorting": sorted_draw(setting)}
            for logits_V in normal * np.float32(spread):
                for name, draw in draws.items():
                    start = time.perf_counter()
                    draw(logits_V)
                    found[name].append(time.perf_counter() - start)
            figures = {
                what: {name: round(1e3 * taken(times), 3) for name, times in found.items()}
                for what, taken in (("ms", statistics.median), ("fastest_ms", min))
            }
            line = {"setting": setting, "spread": spread, "vocabulary": vocabulary}
            yield line | figures | {"rounds": rounds} | where


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--out", type=Path, help="file to append to; stdout has the lines as well")
    arguments = parser.parse_args()
    for line in lines(arguments.vocabulary, arguments.rounds):
        put(line, arguments.out)


if __name__ == "__main__":
    main()
