"""ONNX artifacts in use: batches of growing sequences, a warm start, memory over a long time."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx_contract import flat, sequences

from bitdistill import backends, exporters
from bitdistill.backends import onnx_runtime
from bitdistill.backends.base import pad

Pair = Callable[..., tuple[Path, Path]]


@pytest.mark.parametrize("bits", [32, 16, 8])
def test_rows_of_a_batch_are_decoded_as_each_alone(onnx_pair: Pair, bits: int) -> None:
    """Prompts of different lengths, then tokens for each, and a batch that is cut down."""
    options = {"kv_bits": bits}
    runtime = backends.load(onnx_pair("gemma3_text", "paper", 8, options=options)[1])
    prompts = sequences()
    logits, rows = runtime.start_rows(prompts, 4)
    single = [runtime.new_cache(len(prompt) + 4) for prompt in prompts]
    alone = [runtime.step(p, cache) for p, cache in zip(prompts, single, strict=True)]
    np.testing.assert_array_equal(logits, np.stack(alone))
    for keep in ([0, 1, 2, 3], [2, 0, 0]):
        rows, single = runtime.select_rows(rows, keep), [copy.copy(single[i]) for i in keep]
        if keep == [2, 0, 0]:
            single[2] = single[1].select([0])
        tokens = list(range(5, 5 + len(keep)))
        logits = runtime.step_rows(tokens, rows)
        alone = [runtime.step([t], cache) for t, cache in zip(tokens, single, strict=True)]
        np.testing.assert_array_equal(logits, np.stack(alone))


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([4, 4, 4, 4], [(0, 3), (3, 4)]),
        ([13, 1, 2, 5], [(0, 1), (1, 3), (3, 4)]),
        ([1, 1, 13, 12], [(0, 2), (2, 3), (3, 4)]),
        ([12], [(0, 1)]),
    ],
)
def test_parts_of_a_batch(
    monkeypatch: pytest.MonkeyPatch, lengths: list[int], expected: list[tuple[int, int]]
) -> None:
    monkeypatch.setattr(onnx_runtime, "FORWARD_TOKENS", 12)
    parts = list(onnx_runtime.parts(lengths))
    assert [(part.start, part.stop) for part in parts] == expected


@pytest.mark.parametrize("ops", ["custom", "integer"])
def test_a_batch_is_run_in_parts(
    onnx_pair: Pair, monkeypatch: pytest.MonkeyPatch, ops: str
) -> None:
    """Forwards are bounded by tokens, and every operation gives what one forward gives."""
    runtime = backends.load(onnx_pair("gemma3_text", "paper", 8, options={"ops": ops})[1])
    fed = [sequences()[0][i : i + n] for i, n in enumerate((9, 11, 3, 2))]
    tokens, lengths = pad(fed), np.array([9, 11, 3, 2])
    rows = np.array([[3, 1], [0, 8], [3, 0], [1, 4], [0, 2]])  # none of the third
    scored = [(prompt[:-1], prompt[-1:]) for prompt in fed]
    shapes: list[tuple[int, int]] = []
    inputs = runtime.inputs

    def noted(tokens_BT: Any, *arguments: Any) -> Any:
        shapes.append(tokens_BT.shape)
        return inputs(tokens_BT, *arguments)

    monkeypatch.setattr(runtime, "inputs", noted)
    monkeypatch.setattr(runtime, "prefill_chunk", 5)

    def results() -> Any:
        shapes.clear()
        first, cache = runtime.start_rows(fed, 2)
        second = runtime.step_rows([5, 6, 7, 8], runtime.select_rows(cache, [3, 2, 1, 0]))
        scores = np.array(runtime.score(scored))
        return first, second, scores, runtime.logits_at(tokens, lengths, rows)

    whole = results()
    assert shapes == [(4, 11), (4, 1), (4, 10), (4, 11)]
    monkeypatch.setattr(onnx_runtime, "FORWARD_TOKENS", 8)
    parts = results()
    started = [(1, 5), (1, 4), (1, 5), (1, 5), (1, 1), (2, 3)]
    assert shapes == [*started, (4, 1), (2, 2), (1, 8), (1, 10), (1, 9), (1, 11), (2, 3)]
    for one, other in zip(parts, whole, strict=True):
        if ops == "custom":
            np.testing.assert_array_equal(one, other)
        else:
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-4 * float(whole[0].std()))


def test_a_warm_start_runs_a_prompt_and_a_step(
    onnx_pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact, fed = onnx_pair("qwen3", "paper", 8)[1], []
    exact = onnx_runtime.OnnxCache.feed

    def feed(cache: Any, tokens: Any, counts: Any) -> Any:
        fed.append(tokens.shape)
        return exact(cache, tokens, counts)

    monkeypatch.setattr(onnx_runtime.OnnxCache, "feed", feed)
    cold = backends.load(artifact)
    assert fed == []
    warm = backends.load(artifact, warm=True)
    assert fed == [(1, min(onnx_runtime.CHUNK, warm.context - 1)), (1, 1)]
    np.testing.assert_array_equal(flat(warm, sequences()), flat(cold, sequences()))


@pytest.mark.parametrize(("bits", "tokens"), [(16, 128), (8, 128), (4, 64)])
def test_a_4_bit_table_is_fed_fewer_tokens_at_once(onnx_pair: Pair, bits: int, tokens: int) -> None:
    options = {"embed_bits": bits}
    runtime = backends.load(onnx_pair("qwen3", "paper", 8, options=options)[1])
    assert runtime.prefill_chunk == tokens


@pytest.mark.parametrize("ops", ["custom", "portable", "integer"])
@pytest.mark.parametrize("bits", [16, 4])
def test_the_head_is_left_out_of_all_chunks_but_the_last(
    onnx_pair: Pair, monkeypatch: pytest.MonkeyPatch, ops: str, bits: int
) -> None:
    options = {"ops": ops, "embed_bits": bits}
    runtime = backends.load(onnx_pair("qwen3", "paper", 8, options=options)[1])
    monkeypatch.setattr(runtime, "prefill_chunk", 4)
    prompt, asked = sequences()[1][:10], []
    inputs = runtime.inputs

    def noted(*arguments: Any) -> Any:
        given = inputs(*arguments)
        asked.append((given["input_ids"].shape[1], given["logit_rows"].tolist()))
        return given

    monkeypatch.setattr(runtime, "inputs", noted)
    cache, stepped = runtime.new_cache(10), runtime.new_cache(10)
    logits = runtime.prefill(prompt, cache)
    assert asked == [(4, []), (4, []), (2, [1])]
    assert cache.length == 10
    for start in (0, 4, 8):
        expected = runtime.step(prompt[start : start + 4], stepped)
    np.testing.assert_array_equal(logits, expected)
    with pytest.raises(ValueError, match="do not fit"):
        runtime.prefill(prompt, cache)


LOAD = """
import sys

from bitdistill import backends

runtime = backends.load(sys.argv[1], verify=False)
runtime.step([5], runtime.new_cache(1))
print(sorted({"hashlib", "shutil", "logging", "difflib"} & set(sys.modules)))
"""


def test_loading_without_verification_brings_no_libraries_of_its_own(onnx_pair: Pair) -> None:
    """They would be 5 MB of a process that serves a model of 200."""
    command = [sys.executable, "-c", LOAD, str(onnx_pair("qwen3", "paper", 8)[1])]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (answer.returncode, answer.stdout) == (0, "[]\n"), answer.stderr


GENERATE = """
import sys

from bitdistill import backends


def resident():
    with open("/proc/self/status") as stream:
        return next(int(line.split()[1]) for line in stream if line.startswith("VmRSS:"))


runtime = backends.load(sys.argv[1], threads=2, verify=False)
sizes = []
for turn in range(40):  # prompts of 40 lengths, and generations of 250 tokens
    prompt = [3 + (turn * 7 + i) % 250 for i in range(1 + 5 * turn)]
    assert len(list(runtime.generate(prompt, max_new_tokens=250, stop=()))) == 250
    sizes.append(resident())
print(sizes[9], sizes[-1])
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs Linux")
def test_memory_does_not_grow_over_ten_thousand_tokens(
    student_dir: Callable[..., Path], tmp_path: Path
) -> None:
    student = student_dir("qwen3", max_position_embeddings=512)
    artifact = exporters.export(student, "onnx", tmp_path / "out")
    command = [sys.executable, "-c", GENERATE, str(artifact)]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert answer.returncode == 0, answer.stderr
    early, late = map(int, answer.stdout.split())
    assert late - early < 1024  # KiB; the last prompts are longer than those before
