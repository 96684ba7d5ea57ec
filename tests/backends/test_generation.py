"""Batched greedy and beam decoding: against one sequence at a time, and against transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bitdistill import backends
from bitdistill.backends.generation import generate_batch
from bitdistill.backends.search import Search
from bitdistill.exporters.base import export

PROMPTS = [[1, 40, 50, 60, 41], [1, 33], [1, 70, 71, 72, 73, 74, 75, 76, 90, 91, 92], [1, 45, 46]]
Make = Callable[[str, str], backends.Runtime]


@pytest.fixture
def runtime(student_dir: Callable[..., Path], tmp_path: Path) -> Make:
    """`runtime(backend, family)`: a random student in that runtime."""

    def make(backend: str, family: str) -> backends.Runtime:
        student = student_dir(family, "paper")
        if backend == "torch":
            return backends.load(student)
        return backends.load(export(student, backend, tmp_path / f"{family}-{backend}"))

    return make


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text"])
@pytest.mark.parametrize("backend", ["torch", "onnx", "mlx"])
def test_rows_of_a_batch_are_the_single_sequences(runtime: Make, backend: str, family: str) -> None:
    model = runtime(backend, family)
    single = [list(model.generate(p, max_new_tokens=12)) for p in PROMPTS]
    assert generate_batch(model, PROMPTS, Search(12)) == single
    stop = [single[0][3], single[2][5]]
    ended = [list(model.generate(p, max_new_tokens=12, stop=stop)) for p in PROMPTS]
    assert len({len(text) for text in ended}) > 1
    assert generate_batch(model, PROMPTS, Search(12), stop, batch_size=3) == ended


@pytest.mark.parametrize("backend", ["torch", "onnx", "mlx"])
def test_logits_of_selected_rows(runtime: Make, backend: str) -> None:
    model = runtime(backend, "gemma3_text")  # its window is shorter than the longest prompt
    logits, rows = model.start_rows(PROMPTS, 3)
    rows = model.select_rows(rows, [2, 0, 2])
    first = model.step_rows([5, 6, 7], rows)
    second = model.step_rows([8, 9, 10], model.select_rows(rows, [0, 1, 2]))
    fed = [[*PROMPTS[2], 5, 8], [*PROMPTS[0], 6, 9], [*PROMPTS[2], 7, 10]]
    whole = [model.logits([tokens])[0] for tokens in fed]
    assert np.allclose(logits[2], whole[0][len(PROMPTS[2]) - 1], rtol=0, atol=1e-5)
    for row, expected in enumerate(whole):
        assert np.allclose(first[row], expected[-2], rtol=0, atol=1e-5)
        assert np.allclose(second[row], expected[-1], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("beams", "penalty", "least"), [(2, 1.0, 0), (4, 1.0, 0), (4, 2.0, 0), (3, 0.0, 0), (3, 1.0, 6)]
)
def test_beams_are_those_of_transformers(
    make_teacher: Callable[..., Any], tokenizer: Any, tmp_path: Path, beams: int, penalty: float,
    least: int,
) -> None:  # fmt: skip
    make_teacher("qwen3", initializer_range=0.05).save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    model = backends.load(tmp_path / "m")
    stop = list(range(20, 60))  # often likely, so that beams end at different lengths
    found = generate_batch(model, PROMPTS, Search(14, least, beams, penalty), stop)
    for prompt, text in zip(PROMPTS, found, strict=True):
        expected = model.model.generate(  # type: ignore[attr-defined]
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=14,
            min_new_tokens=least or None,
            num_beams=beams,
            length_penalty=penalty,
            eos_token_id=stop,
            pad_token_id=0,
            do_sample=False,
        )[0, len(prompt) :].tolist()
        while expected and expected[-1] in (0, *stop):
            expected.pop()
        assert text == expected
        assert len(text) >= least


def test_many_beams_find_a_likelier_text(runtime: Make) -> None:
    model = runtime("onnx", "qwen3")
    texts = [generate_batch(model, PROMPTS, Search(6, 6, k), ()) for k in (1, 8)]
    greedy, beam = (
        np.array(model.score(list(zip(PROMPTS, found, strict=True)))) for found in texts
    )
    assert (beam >= greedy - 1e-3).all()
    assert (beam > greedy + 1e-3).any()


def test_a_full_context_ends_a_row(runtime: Make) -> None:
    model = runtime("onnx", "qwen3")
    prompts = [list(range(3, 128)), [1, 40]]
    found = generate_batch(model, prompts, Search(12), ())
    assert [len(text) for text in found] == [4, 12]
    assert found == [list(model.generate(p, max_new_tokens=12, stop=())) for p in prompts]


def test_limits_are_checked() -> None:
    with pytest.raises(ValueError, match="beams must be 1"):
        Search(beams=0)
    with pytest.raises(ValueError, match="min_new_tokens 5 is not between 0 and max_new_tokens 4"):
        Search(4, 5)


@pytest.mark.parametrize("beams", [1, 3])
def test_logits_that_are_no_numbers_are_no_text(
    runtime: Make, monkeypatch: pytest.MonkeyPatch, beams: int
) -> None:
    model = runtime("onnx", "qwen3")
    step = type(model).step_rows
    nan = np.float32(np.nan)
    monkeypatch.setattr(model, "step_rows", lambda *given: step(model, *given) * nan)
    with pytest.raises(ValueError, match="logits hold NaN; its weights or input are damaged"):
        generate_batch(model, PROMPTS, Search(4, beams=beams), ())
