"""Speed of a runtime on one sequence: time to the first token, then one token after another.

Random tokens, a warm-up, then repeats of "feed the prompt, then one token at a time". Figures are
medians over repeats, the spread beside them; per-token times are over all tokens of all repeats. A
budget in seconds bounds the work: a slow model decodes fewer tokens and is repeated less, never
below FEWEST tokens and one repeat, so that a large model on a small machine still gives a figure.
What was fed is part of the result. alternate.py repeats several rows in turn.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from bitdistill.backends.base import Runtime

FEWEST = 4


@dataclass(frozen=True)
class Plan:
    """What to time. `budget` is in seconds for each row, warm-up excluded."""

    prefill_tokens: int = 128
    decode_tokens: int = 32
    repeats: int = 5
    budget: float = 6.0


@dataclass(frozen=True)
class Repeat:
    """Seconds of one repeat: from the prompt's ids to the first new token, and each step after."""

    first: float
    steps: list[float]


@dataclass(frozen=True)
class Speed:
    """Tokens per second and milliseconds; medians over repeats, ranges are (slowest, fastest).

    `rounds` are tokens per second of each repeat, (prefill, decode), for paired ratios.
    """

    prefill_tokens: int
    decode_tokens: int
    prefill: float
    decode: float
    first_token_ms: float
    token_p50_ms: float
    token_p95_ms: float
    prefill_range: tuple[float, float]
    decode_range: tuple[float, float]
    rounds: list[tuple[float, float]]


class Bench:
    """A runtime and the tokens it is timed on, after a warm-up.

    ValueError when the context holds less than 2 tokens.
    """

    def __init__(self, runtime: Runtime, plan: Plan, seed: int = 0) -> None:
        if runtime.context < 2:
            raise ValueError(f"a context of {runtime.context} tokens cannot be timed; it needs 2")
        decode = max(1, min(plan.decode_tokens, runtime.context // 4))
        self.runtime = runtime
        self.prefill_tokens = max(1, min(plan.prefill_tokens, runtime.context - decode))
        total = self.prefill_tokens + decode
        drawn = np.random.default_rng(seed).integers(0, runtime.vocabulary, total).tolist()
        warm = min(2, decode)
        seconds = self._feed(drawn[: self.prefill_tokens + warm]).steps
        affordable = max(FEWEST, int(0.5 * plan.budget * warm / max(sum(seconds), 1e-9)))
        self.decode_tokens = min(decode, affordable)
        self.tokens = drawn[: self.prefill_tokens + self.decode_tokens]

    def warm(self) -> None:
        """The prompt and a token, not timed: caches and threads as back-to-back repeats find them.

        For a row that has slept while others ran; llama-bench, too, does this before it times.
        """
        self._feed(self.tokens[: self.prefill_tokens + 1])

    def repeat(self) -> Repeat:
        """Time the sequence once more."""
        return self._feed(self.tokens)

    def _feed(self, tokens: list[int]) -> Repeat:
        """`step` returns when logits are there; choosing the next token counts."""
        cache: Any = self.runtime.new_cache(len(tokens))
        moments = [time.perf_counter()]
        self.runtime.step(tokens[: self.prefill_tokens], cache).argmax()
        moments.append(time.perf_counter())
        for token in tokens[self.prefill_tokens :]:
            self.runtime.step([token], cache).argmax()
            moments.append(time.perf_counter())
        first, *steps = np.diff(moments).tolist()
        return Repeat(first, steps)


def speed_of(repeats: Sequence[Repeat], prefill_tokens: int) -> Speed:
    """The figures of a row from its repeats."""
    prefill = [prefill_tokens / repeat.first for repeat in repeats]
    decode = [len(repeat.steps) / sum(repeat.steps) for repeat in repeats]
    steps = 1000.0 * np.array([step for repeat in repeats for step in repeat.steps])
    return Speed(
        prefill_tokens=prefill_tokens,
        decode_tokens=len(repeats[0].steps),
        prefill=statistics.median(prefill),
        decode=statistics.median(decode),
        first_token_ms=1000.0 * statistics.median(repeat.first for repeat in repeats),
        token_p50_ms=float(np.quantile(steps, 0.5)),
        token_p95_ms=float(np.quantile(steps, 0.95)),
        prefill_range=(min(prefill), max(prefill)),
        decode_range=(min(decode), max(decode)),
        rounds=list(zip(prefill, decode, strict=True)),
    )


def measure(runtime: Runtime, plan: Plan | None = None, seed: int = 0) -> Speed:
    """Time one runtime in this process."""
    plan = plan or Plan()
    bench = Bench(runtime, plan, seed)
    repeats: list[Repeat] = []
    start = time.perf_counter()
    while len(repeats) < plan.repeats and (
        not repeats or time.perf_counter() - start < plan.budget
    ):
        repeats.append(bench.repeat())
    return speed_of(repeats, bench.prefill_tokens)


def ratio(speeds: Sequence[dict[str, Any]], what: str) -> dict[str, float]:
    """How many times faster the first row is than the second: `prefill` or `decode`.

    The median over rounds that both took part in, and the range; the rows were timed in turn, so a
    machine that is slow for a while slows both.
    """
    place = 0 if what == "prefill" else 1
    pairs = zip(speeds[0]["rounds"], speeds[1]["rounds"], strict=False)
    ratios = [first[place] / second[place] for first, second in pairs]
    return {"value": statistics.median(ratios), "slowest": min(ratios), "fastest": max(ratios)}


def to_json(speed: Speed) -> dict[str, Any]:
    """Plain JSON values, the same before they are written and after they are read."""
    value: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(speed)))
    return value
