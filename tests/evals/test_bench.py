"""The benchmark's shape: how much it feeds, how often, and that it stops (no time is judged)."""

from __future__ import annotations

from typing import Any

import pytest

from bitdistill.evals.bench import Bench, Plan, Repeat, measure, ratio, speed_of, to_json


def test_it_feeds_the_prompt_and_then_one_token_at_a_time(table_runtime: Any) -> None:
    runtime = table_runtime(context=256)
    plan = Plan(prefill_tokens=20, decode_tokens=4, repeats=3, budget=60.0)
    speed = measure(runtime, plan)
    assert runtime.fed == [20, 1, 1] + [20, 1, 1, 1, 1] * 3  # warm-up, then three repeats
    assert (speed.prefill_tokens, speed.decode_tokens, len(speed.rounds)) == (20, 4, 3)
    assert speed.prefill_range[0] <= speed.prefill <= speed.prefill_range[1]
    assert speed.decode_range[0] <= speed.decode <= speed.decode_range[1]
    assert 0 < speed.token_p50_ms <= speed.token_p95_ms


def test_warming_up_again_is_the_prompt_and_a_token(table_runtime: Any) -> None:
    runtime = table_runtime(context=256)
    bench = Bench(runtime, Plan(prefill_tokens=20, decode_tokens=4, budget=60.0))
    runtime.fed.clear()
    bench.warm()
    assert runtime.fed == [20, 1]


def test_a_short_context_shortens_both(table_runtime: Any) -> None:
    speed = measure(table_runtime(context=40), Plan(repeats=1, budget=60.0))
    assert (speed.prefill_tokens, speed.decode_tokens) == (30, 10)


def test_without_time_one_short_repeat_is_made(table_runtime: Any) -> None:
    speed = measure(table_runtime(context=256), Plan(budget=0.0))
    assert (len(speed.rounds), speed.prefill_tokens, speed.decode_tokens) == (1, 128, 4)


def test_no_context_is_refused(table_runtime: Any) -> None:
    with pytest.raises(ValueError, match="a context of 1 tokens cannot be timed"):
        Bench(table_runtime(context=1), Plan())


def test_figures_by_hand() -> None:
    repeats = [Repeat(0.5, [0.1, 0.3]), Repeat(1.0, [0.2, 0.2]), Repeat(0.25, [0.1, 0.1])]
    speed = speed_of(repeats, prefill_tokens=10)
    assert (speed.prefill, speed.prefill_range) == (20.0, (10.0, 40.0))
    assert speed.decode == pytest.approx(5.0)
    assert speed.decode_range == (pytest.approx(5.0), pytest.approx(10.0))
    assert speed.first_token_ms == pytest.approx(500.0)
    assert speed.token_p50_ms == pytest.approx(150.0)
    assert speed.token_p95_ms == pytest.approx(275.0)  # between 200 and 300, three quarters up


def test_ratios_are_taken_within_a_round() -> None:
    """A round in which the machine was slow slows both rows, and the ratio stays."""
    fast = to_json(speed_of([Repeat(0.1, [0.01]), Repeat(0.4, [0.04]), Repeat(0.1, [0.02])], 10))
    slow = to_json(speed_of([Repeat(0.2, [0.05]), Repeat(0.8, [0.20])], 10))
    assert ratio([fast, slow], "prefill")["value"] == pytest.approx(2.0)
    found = ratio([fast, slow], "decode")
    assert (found["value"], found["slowest"]) == (pytest.approx(5.0), pytest.approx(5.0))
