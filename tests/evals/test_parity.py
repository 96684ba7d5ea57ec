"""The parity verdict: noise like that of fp32 passes, real mistakes do not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from invented import Make

from bitdistill.evals.parity import compare, task_prompts
from bitdistill.evals.parity_logits import PROMPTS, make_sequences
from bitdistill.tasks import TASKS


def noisy(logits: list[Any], size: float, flips: float, seed: int) -> list[Any]:
    """Noise of `size` everywhere, and a thousand times that at a share `flips` of positions."""
    random = np.random.default_rng(seed)
    result = []
    for rows in logits:
        scale = np.where(random.random((len(rows), 1)) < flips, 1000 * size, size)
        result.append((rows + scale * random.normal(size=rows.shape)).astype(np.float32))
    return result


@pytest.fixture
def exact() -> list[Any]:
    random = np.random.default_rng(0)
    return [3 * random.normal(size=(32, 500)).astype(np.float32) for _ in range(12)]


@pytest.mark.parametrize("flips", [0.0, 0.1, 0.5, 0.95])
def test_noise_of_the_same_size_passes(exact: list[Any], flips: float) -> None:
    made = [noisy(exact, 1e-5, flips, seed) for seed in (1, 2, 3)]
    report = compare(*made, exact)
    assert report["failures"] == []
    assert report["passed"]
    assert report["artifact"]["positions"] == 12 * 32
    assert report["artifact_against_fp32"]["median"] > 0


def test_the_figures_are_relative_to_the_spread(exact: list[Any]) -> None:
    shifted = [rows + np.float32(0.03) for rows in exact]
    report = compare(shifted, exact, exact, exact)
    spread = float(np.mean([rows.std(-1).mean() for rows in exact]))
    assert report["artifact"]["median"] == pytest.approx(0.03 / spread, rel=0.05)
    assert report["artifact"]["top_token_agreement"] == 1.0
    assert report["floor"]["largest"] == 0.0
    assert report["failures"] == [
        f"whole sequences: median error {report['artifact']['median']:.2e}, allowed 1.00e-05"
    ]


@pytest.mark.parametrize("place", [0, 1])
def test_an_error_in_every_position_fails(exact: list[Any], place: int) -> None:
    made = [noisy(exact, 1e-5, 0.3, seed) for seed in (1, 2, 3)]
    made[place] = noisy(exact, 0.3, 0.0, 4)
    report = compare(*made, exact)
    assert not report["passed"]
    what = ("whole sequences", "cached decoding")[place]
    assert [text.split(":")[0] for text in report["failures"]] == [what, what]
    assert "median error" in report["failures"][0]
    assert "top token" in report["failures"][1]


def test_wrong_top_tokens_fail_even_where_most_positions_are_right(exact: list[Any]) -> None:
    wrong = [rows.copy() for rows in exact]
    for rows in wrong:
        rows[:4] = -rows[:4]
    report = compare(wrong, exact, exact, exact)
    assert [text[:40] for text in report["failures"]] == [
        "whole sequences: top token agrees at 0.8"
    ]


def test_logits_that_are_not_finite_fail(exact: list[Any]) -> None:
    broken = [rows.copy() for rows in exact]
    broken[3][0, 0] = np.nan
    report = compare(broken, exact, exact, exact)
    assert report["failures"] == ["whole sequences: the logits are not finite"]


def test_sequences_are_seeded_and_within_the_context(table_runtime: Any) -> None:
    runtime = table_runtime(context=20)
    prompts = ["a prompt that is longer than the context", "b"]
    sequences = make_sequences(runtime, prompts, seed=3)
    assert sequences == make_sequences(runtime, prompts, seed=3)
    assert sequences[:-2] != make_sequences(runtime, [], seed=4)
    assert max(map(len, sequences)) == 20
    assert runtime.tokenizer.decode(sequences[-2]) == prompts[0][-20:]


def test_prompts_are_those_at_hand(make: Make, data: Path, tmp_path: Path) -> None:
    """None where a student was trained without validation data, or it is not here."""
    assert task_prompts(make("student", validation=str(data)))[:2] == [
        "text 0\nMood:", "text 1\nMood:",
    ]  # fmt: skip
    assert len(task_prompts(make("tiny", task=TASKS["tiny"].to_json(), validation=None))) == PROMPTS
    assert task_prompts(make("own", validation=None)) == []
    assert task_prompts(make("hub", task=TASKS["sst2"].to_json(), validation=None)) == []
    assert task_prompts(make("moved", validation=str(tmp_path / "none.jsonl"))) == []
    assert task_prompts(make("none", task=None)) == []
