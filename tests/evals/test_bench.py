"""The benchmark's shape: how much it feeds, how often, and that it stops (no time is judged)."""

from __future__ import annotations

from typing import Any

import pytest

from bitdistill.evals.bench import measure


def test_it_feeds_the_prompt_and_then_one_token_at_a_time(table_runtime: Any) -> None:
    runtime = table_runtime(context=256)
    speed = measure(runtime, prefill_tokens=20, decode_tokens=4, repeats=3, budget=60.0)
    assert runtime.fed == [20, 1, 1] + [20, 1, 1, 1, 1] * 3  # warm-up, then three repeats
    assert (speed.prefill_tokens, speed.decode_tokens, speed.repeats) == (20, 4, 3)
    assert speed.prefill_range[0] <= speed.prefill <= speed.prefill_range[1]
    assert speed.decode_range[0] <= speed.decode <= speed.decode_range[1]


def test_a_short_context_shortens_both(table_runtime: Any) -> None:
    speed = measure(table_runtime(context=40), budget=60.0, repeats=1)
    assert (speed.prefill_tokens, speed.decode_tokens) == (30, 10)


def test_without_time_one_short_repeat_is_made(table_runtime: Any) -> None:
    speed = measure(table_runtime(context=256), budget=0.0)
    assert (speed.repeats, speed.prefill_tokens, speed.decode_tokens) == (1, 128, 4)


def test_no_context_is_refused(table_runtime: Any) -> None:
    with pytest.raises(ValueError, match="a context of 1 tokens cannot be timed"):
        measure(table_runtime(context=1))
