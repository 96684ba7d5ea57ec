"""What is the same for all backends: scoring, generation, tokenizer, loading."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from bitdistill import backends, manifest
from bitdistill.backends import base, registry
from bitdistill.backends.tokenizer import Tokenizer

VOCABULARY = 11


class SumRuntime(base.Runtime):
    """Logits depend on the sum of all tokens so far, so any wrong position or cut shows."""

    name = "sum"

    def __init__(self, context: int = 12) -> None:
        self.vocabulary, self.context, self.stop_tokens = VOCABULARY, context, [3]
        self.table = np.random.default_rng(0).normal(size=(97, VOCABULARY)).astype(np.float32)
        self.batches: list[tuple[int, int]] = []
        self.steps: list[int] = []

    def new_cache(self, capacity: int) -> Any:
        self.check_capacity(capacity)
        return SimpleNamespace(length=0, capacity=capacity, total=0)

    def step(self, tokens: Any, cache: Any) -> Any:
        self.check_tokens(tokens, cache.capacity - cache.length)
        self.steps.append(len(tokens))
        cache.length += len(tokens)
        cache.total += sum(tokens)
        return self.table[cache.total % 97]

    def logits_at(self, tokens_BT: Any, lengths_B: Any, rows: Any) -> Any:
        assert (rows[:, 1] < lengths_B[rows[:, 0]]).all()
        self.batches.append(tokens_BT.shape)
        return self.table[np.cumsum(tokens_BT, 1)[rows[:, 0], rows[:, 1]] % 97]

    def expected(self, prompt: list[int], continuation: list[int]) -> float:
        total = 0.0
        for index, token in enumerate(continuation):
            row = self.table[sum(prompt + continuation[:index]) % 97].astype(np.float64)
            total += row[token] - np.log(np.exp(row).sum())
        return float(total)


REQUESTS = [
    ([1, 2, 3], [4]),
    ([5], [6, 7, 8]),
    ([1, 2, 3], [9]),
    ([2, 2, 2, 2, 2], [10, 1]),
    ([2, 2, 2, 2, 2], [10, 2]),
    ([1, 2], [3, 4]),
]


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_score_equals_the_definition_in_any_batching(batch_size: int) -> None:
    runtime = SumRuntime()
    expected = [runtime.expected(*request) for request in REQUESTS]
    np.testing.assert_allclose(runtime.score(REQUESTS, batch_size), expected, rtol=1e-12)


def test_score_shares_forwards_of_answers_that_differ_in_one_token() -> None:
    runtime = SumRuntime()
    runtime.score(REQUESTS, batch_size=1)
    # ([1,2,3],[4]) and ([1,2,3],[9]) share one; ([1,2],[3,4]) is fed the same tokens, but its
    # first logits are needed one position earlier, so it does not.
    assert sorted(runtime.batches) == [(1, 3), (1, 3), (1, 3), (1, 6)]


def test_score_bounds_the_logits_of_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "MAX_LOGITS", 4 * VOCABULARY)
    runtime = SumRuntime()
    expected = [runtime.expected(*request) for request in REQUESTS]
    np.testing.assert_allclose(runtime.score(REQUESTS), expected, rtol=1e-12)
    assert len(runtime.batches) > 1


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (([], [1]), "request 0 has an empty prompt or continuation"),
        (([1], []), "request 0 has an empty prompt or continuation"),
        (([1], [VOCABULARY]), "outside the vocabulary of 11; encode the text"),
        (([-1], [1]), "outside the vocabulary of 11; encode the text"),
        (([1] * 13, [1]), "13 tokens do not fit, there is room for 12"),
    ],
)
def test_score_refuses_bad_requests(request_: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SumRuntime().score([request_])


def test_logits_of_padded_sequences() -> None:
    runtime = SumRuntime()
    sequences = [[1, 2, 3, 4], [5], [6, 7]]
    for sequence, logits in zip(sequences, runtime.logits(sequences), strict=True):
        np.testing.assert_array_equal(logits, runtime.table[np.cumsum(sequence) % 97])


def test_no_sequences_have_no_logits() -> None:
    assert SumRuntime().logits([]) == []


def greedy(runtime: SumRuntime, prompt: list[int], count: int) -> list[int]:
    tokens: list[int] = []
    for _ in range(count):
        tokens.append(int(runtime.table[sum(prompt + tokens) % 97].argmax()))
    return tokens


def test_generate_is_greedy_and_chunks_the_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base.Runtime, "prefill_chunk", 3)
    runtime = SumRuntime()
    prompt = [1, 2, 4, 5, 6, 7, 8]
    tokens = list(runtime.generate(prompt, max_new_tokens=4, stop=()))
    assert tokens == greedy(runtime, prompt, 4)
    assert runtime.steps == [3, 3, 1, 1, 1, 1]


def test_generate_ends_before_a_stop_token() -> None:
    runtime = SumRuntime()
    free = greedy(runtime, [1, 2], 8)
    stop = free[4]
    assert list(runtime.generate([1, 2], max_new_tokens=8, stop=[stop])) == free[: free.index(stop)]
    runtime.stop_tokens = [stop]
    assert list(runtime.generate([1, 2], max_new_tokens=8)) == free[: free.index(stop)]


def test_generate_fills_the_context_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    runtime = SumRuntime(context=12)
    with caplog.at_level(logging.WARNING):
        tokens = list(runtime.generate([1] * 10, max_new_tokens=50, stop=()))
    # Two tokens fit after the prompt, and the logits after the last of them give a third.
    assert tokens == greedy(runtime, [1] * 10, 3)
    assert "the context of 12 tokens is full" in caplog.text


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "no tokens were given"),
        ([1] * 13, {}, "13 tokens do not fit"),
        ([1], {"max_new_tokens": -1}, "max_new_tokens must be 0 or more"),
        ([1], {"temperature": -1.0}, "temperature must be 0"),
        ([1], {"temperature": np.inf}, "temperature must be 0"),
        ([1], {"top_p": 0.0}, "top_p must be above 0"),
        ([1], {"top_k": -1}, "top_k must be 0"),
    ],
)
def test_generate_checks_its_arguments_at_the_call(
    prompt: list[int], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        SumRuntime().generate(prompt, **options)


@pytest.fixture
def text_tokenizer(tmp_path: Path, tokenizer: Any) -> Tokenizer:
    tokenizer.save_pretrained(tmp_path)
    return Tokenizer(tmp_path)


def test_tokenizer_equals_transformers(text_tokenizer: Tokenizer, tokenizer: Any) -> None:
    texts = ("the film is not good", " a plot", "naïve Überfilm 漢字 🎬", "")
    for text in texts:
        ids = text_tokenizer.encode(text)
        assert ids == tokenizer(text)["input_ids"]
        assert text_tokenizer.decode(ids) == text
    assert text_tokenizer.encode_all(texts) == [text_tokenizer.encode(text) for text in texts]
    assert text_tokenizer.decode([1, *text_tokenizer.encode("good"), 2]) == "good"


def test_streamed_pieces_are_whole_characters_and_add_up(text_tokenizer: Tokenizer) -> None:
    text = "naïve 漢字 🎬 film"
    pieces = list(text_tokenizer.stream(text_tokenizer.encode(text)))
    assert "".join(pieces) == text
    assert len(pieces) > 5
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    # A character cut off by the end is shown, as decode shows it.
    cut = text_tokenizer.encode("a🎬")[:-1]
    assert "".join(text_tokenizer.stream(cut)) == text_tokenizer.decode(cut)


def test_tokenizer_errors_name_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(manifest.FormatError, match=r"tokenizer.json is missing; .*AutoTokenizer"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(manifest.FormatError, match=r"cannot be read .*; copy it again"):
        Tokenizer(tmp_path)


def test_load_refuses_what_it_cannot_run(tmp_path: Path) -> None:
    with pytest.raises(manifest.FormatError, match="does not exist; check the path"):
        backends.load(tmp_path / "absent")
    with pytest.raises(manifest.FormatError, match=r"has no bitdistill.json; give a directory"):
        backends.load(tmp_path)
    manifest.write_manifest(tmp_path, "artifact", {"target": "onnx"})
    with pytest.raises(ValueError, match="unknown backend 'onxx'; did you mean 'onnx'"):
        backends.load(tmp_path, "onxx")
    with pytest.raises(ValueError, match="is made for onnx, not torch; leave the backend out"):
        backends.load(tmp_path, "torch")
    content = json.loads((tmp_path / "bitdistill.json").read_text())
    (tmp_path / "bitdistill.json").write_text(json.dumps(content | {"format_version": 99}))
    with pytest.raises(manifest.FormatError, match="format version 99, this bitdistill reads 1"):
        backends.load(tmp_path)


def test_a_directory_is_found_from_wherever_the_process_is_later(
    student_dir: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = student_dir("qwen3")
    monkeypatch.chdir(student.parent)
    model = backends.load(student.name)
    monkeypatch.chdir(tmp_path)
    assert model.tokenizer.decode(model.tokenizer.encode("the film")) == "the film"


def test_a_missing_package_is_named_with_its_pip_command(tmp_path: Path) -> None:
    (tmp_path / "needs_absent.py").write_text("import absent_package\n")
    sys.path.insert(0, str(tmp_path))
    try:
        with pytest.raises(
            ImportError, match=r"package absent_package, .*run: pip install absent-p"
        ):
            registry.resolve({"x": "needs_absent:Thing"}, "x", "backend")
    finally:
        sys.path.remove(str(tmp_path))


def test_importing_the_packages_imports_no_runtime() -> None:
    code = (
        "import sys, bitdistill.backends, bitdistill.exporters; "
        "print([m for m in ('torch', 'transformers', 'onnx', 'onnx_ir', 'onnxruntime', 'mlx') "
        "if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert result.stdout.strip() == "[]"


def test_threads_must_be_positive(student_dir: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match="threads must be 1 or more, got 0"):
        backends.load(student_dir(), threads=0)
