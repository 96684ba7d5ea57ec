"""ONNX artifacts against PyTorch, by the numerical contract (onnx_contract.py), and against
themselves."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx_contract import TIGHT, error, flat, reference, sequences, violations

from bitdistill import backends, exporters, manifest
from bitdistill.backends import onnx_runtime, onnx_session
from bitdistill.backends.onnx_session import InstallationError

WIDE = {"kv_bits": 32}  # nothing of the cache is rounded
Pair = Callable[..., tuple[Path, Path]]
CASES = [
    ("llama", "paper", {}),
    ("qwen2", "paper", {}),
    ("qwen3", "paper", {}),
    ("gemma3_text", "paper", {}),
    ("qwen3", "allnorm", {}),
    ("gemma3_text", "allnorm", {}),
    ("qwen2", "allnorm", {"tie_word_embeddings": False}),
    ("llama", "none", {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}),
    ("qwen3", "none", {"intermediate_size": 100}),
]
IDS = ["-".join([family, style, *config]) for family, style, config in CASES]
INT8_CASES = [CASES[0], CASES[3], CASES[4], CASES[6]]
INT8_IDS = [IDS[0], IDS[3], IDS[4], IDS[6]]


@pytest.mark.parametrize(("family", "style", "config"), CASES, ids=IDS)
def test_equals_pytorch_without_activation_rounding(
    onnx_pair: Pair, family: str, style: str, config: dict[str, Any]
) -> None:
    student, artifact = onnx_pair(family, style, None, options=WIDE, **config)
    runtime, tokens = backends.load(artifact), sequences()
    logits = flat(runtime, tokens)
    expected = flat(reference(student, artifact), tokens)
    assert expected.std() > 0.1
    assert error(logits, expected).max() < TIGHT
    assert_steps_are_the_whole(runtime, tokens[0], logits[:40])


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize(("family", "style", "config"), INT8_CASES, ids=INT8_IDS)
def test_a_narrow_cache_equals_pytorch_that_rounds_keys_and_values(
    onnx_pair: Pair, family: str, style: str, config: dict[str, Any], bits: int
) -> None:
    """A key on a rounding boundary flips between two orders of summation, as in fp64 PyTorch.

    How many do, and where, is chance; so what is compared is the position in the middle, and with
    what rounding does there at all, which is the most that flips can do.
    """
    student, artifact = onnx_pair(family, style, None, options={"kv_bits": bits}, **config)
    runtime, tokens = backends.load(artifact), sequences()
    logits = flat(runtime, tokens)
    fp32 = flat(reference(student, artifact), tokens)
    found = error(logits, fp32)
    floor = error(flat(reference(student, artifact, "float64"), tokens), fp32)
    unrounded = flat(backends.load(student, storage={"embedding": "float16"}), tokens)
    rounding = error(unrounded, fp32)
    assert np.median(found) < 3 * np.median(floor) + 1e-5
    assert np.median(found) < np.median(rounding) / 10
    assert found.max() < rounding.max() / 3
    assert_steps_are_the_whole(runtime, tokens[0], logits[:40])


def assert_steps_are_the_whole(
    runtime: backends.Runtime, tokens: list[int], whole: NDArray[np.float32]
) -> None:
    """A prompt in two pieces, then token by token, gives the bits of the full forward."""
    cache = runtime.new_cache(64)
    steps = [runtime.step(tokens[:7], cache), runtime.step(tokens[7:20], cache)]
    steps += [runtime.step([token], cache) for token in tokens[20:]]
    np.testing.assert_array_equal(np.array(steps), whole[[6, *range(19, 40)]])


@pytest.mark.parametrize(("family", "style", "config"), INT8_CASES, ids=INT8_IDS)
def test_equals_pytorch_by_the_contract_with_int8_activations(
    onnx_pair: Pair, family: str, style: str, config: dict[str, Any]
) -> None:
    student, artifact = onnx_pair(family, style, 8, **config)
    runtime, tokens = backends.load(artifact), sequences()
    fp32 = flat(reference(student, artifact), tokens)
    fp64 = flat(reference(student, artifact, "float64"), tokens)
    assert violations(flat(runtime, tokens), fp32, fp64) == []
    cache = runtime.new_cache(40)
    steps = np.array([runtime.step([token], cache) for token in tokens[0]])
    assert violations(steps, fp32[:40], fp64[:40]) == []


def test_the_contract_notices_missing_activation_rounding(onnx_pair: Pair) -> None:
    student, artifact = onnx_pair("llama", "paper", 8)
    unrounded = backends.load(onnx_pair("llama", "paper", None)[1])
    tokens = sequences()
    fp32 = flat(reference(student, artifact), tokens)
    fp64 = flat(reference(student, artifact, "float64"), tokens)
    assert "most positions differ" in violations(flat(unrounded, tokens), fp32, fp64)


def test_a_window_that_is_off_by_one_is_noticed(onnx_pair: Pair, tmp_path: Path) -> None:
    student, artifact = onnx_pair("gemma3_text", "paper", None, options=WIDE)
    tokens = sequences(1)
    expected = flat(reference(student, artifact), tokens)
    for window in (7, 9):
        changed = shutil.copytree(artifact, tmp_path / str(window))
        edit(changed, lambda node, w=window: set_attribute(node, "local_window_size", w))
        logits = flat(backends.load(changed, verify=False), tokens)
        assert error(logits, expected).max() > 1e-2
        assert error(logits, expected)[:7].max() < TIGHT  # nothing has left the window yet


def edit(artifact: Path, change: Callable[[onnx.NodeProto], None]) -> None:
    """Change nodes of model.onnx, keeping its size."""
    model = onnx.load(artifact / "model.onnx", load_external_data=False)
    for node in model.graph.node:
        change(node)
    (artifact / "model.onnx").write_bytes(model.SerializeToString())


def set_attribute(node: onnx.NodeProto, name: str, value: int) -> None:
    for attribute in node.attribute:
        if attribute.name == name:
            attribute.i = value


def test_batches_with_padding_equal_single_sequences(onnx_pair: Pair) -> None:
    runtime = backends.load(onnx_pair("gemma3_text", "paper", None)[1])
    tokens = sequences()
    single = np.concatenate([runtime.logits([sequence])[0] for sequence in tokens])
    assert error(flat(runtime, tokens), single).max() < TIGHT


def test_only_asked_positions_are_computed(onnx_pair: Pair) -> None:
    runtime = backends.load(onnx_pair("qwen3", "paper", None)[1])
    tokens_BT = np.array([sequences(1)[0][:9], [5] * 9], np.int64)
    rows = np.array([[1, 3], [0, 8], [1, 0]], np.int64)
    logits = runtime.logits_at(tokens_BT, np.array([9, 4]), rows)
    full = runtime.logits([tokens_BT[0].tolist(), [5] * 4])
    assert logits.shape == (3, runtime.vocabulary)
    expected = np.stack([full[1][3], full[0][8], full[1][0]])
    assert error(logits, expected).max() < TIGHT


def test_the_cache_is_written_in_place(onnx_pair: Pair) -> None:
    runtime = backends.load(onnx_pair("qwen3", "paper", 8)[1])
    assert isinstance(runtime, onnx_runtime.OnnxRuntime)
    cache = runtime.new_cache(16)
    runtime.step([5, 6, 7], cache)
    runtime.step([8], cache)
    assert cache.length == 4
    for memory in cache.memory:
        written = np.abs(memory).sum(axis=(0, 1, 3)) > 0
        assert written.tolist() == [True] * 4 + [False] * 12


def test_logits_of_a_step_survive_the_next(onnx_pair: Pair) -> None:
    runtime = backends.load(onnx_pair("qwen3", "paper", 8)[1])
    cache = runtime.new_cache(8)
    first = runtime.step([5], cache)
    copy = first.copy()
    runtime.step([6], cache)
    np.testing.assert_array_equal(first, copy)


@pytest.mark.parametrize("threads", [1, 2])
def test_generates_what_pytorch_generates(onnx_pair: Pair, threads: int) -> None:
    student, artifact = onnx_pair("gemma3_text", "paper", None)
    prompt = sequences()[1]
    tokens = list(backends.load(artifact, threads=threads).generate(prompt, max_new_tokens=12))
    assert tokens == list(reference(student, artifact).generate(prompt, max_new_tokens=12))
    assert len(tokens) > 3


def test_a_32_bit_embedding_equals_the_unrounded_student(onnx_pair: Pair, tmp_path: Path) -> None:
    student, half = onnx_pair("llama", "paper", None, options=WIDE)
    full = exporters.export(student, "onnx", tmp_path / "full", embed_bits=32, **WIDE)
    tokens = sequences()
    expected = flat(backends.load(student), tokens)
    assert error(flat(backends.load(full), tokens), expected).max() < TIGHT
    assert error(flat(backends.load(half), tokens), expected).max() > TIGHT


def test_the_context_is_a_limit(onnx_pair: Pair, tmp_path: Path) -> None:
    student, _ = onnx_pair("llama", "paper", 8)
    artifact = exporters.export(student, "onnx", tmp_path / "short", context=10)
    runtime = backends.load(artifact)
    assert runtime.context == 10
    assert len(list(runtime.generate([5] * 8, max_new_tokens=50, stop=()))) == 3
    with pytest.raises(ValueError, match="cache capacity 11 is not between 1 and 10"):
        runtime.new_cache(11)
    with pytest.raises(ValueError, match="11 tokens do not fit, there is room for 10"):
        runtime.logits([[5] * 11])
    cache = runtime.new_cache(2)
    runtime.step([5, 6], cache)
    with pytest.raises(ValueError, match="1 tokens do not fit, there is room for 0"):
        runtime.step([7], cache)


def test_a_context_of_one_token_is_warmed_up(onnx_pair: Pair, tmp_path: Path) -> None:
    student, _ = onnx_pair("llama", "paper", 8)
    artifact = exporters.export(student, "onnx", tmp_path / "short", context=1)
    model = backends.load(artifact, warm=True)
    assert len(list(model.generate([5], max_new_tokens=3, stop=()))) == 1


@pytest.fixture
def damaged(onnx_pair: Pair, tmp_path: Path) -> Path:
    """A copy of an artifact, to be damaged."""
    return shutil.copytree(onnx_pair("qwen3", "paper", 8)[1], tmp_path / "copy")


def test_a_truncated_data_file_is_refused(damaged: Path) -> None:
    data = damaged / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:-100])
    for verify in (True, False):
        with pytest.raises(manifest.FormatError, match="truncated or altered; make or copy"):
            backends.load(damaged, verify=verify)
    with pytest.raises(manifest.FormatError, match=r"model.onnx cannot be loaded: damaged"):
        onnx_session.open_session(damaged / "model.onnx", None)


def test_an_altered_byte_is_refused(damaged: Path) -> None:
    data = damaged / "model.onnx.data"
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(bytes(content))
    with pytest.raises(manifest.FormatError, match="does not match the hash in its manifest"):
        backends.load(damaged)


def test_packed_weights_that_are_not_ternary_are_refused_by_the_operator(damaged: Path) -> None:
    model = onnx.load(damaged / "model.onnx", load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.name.endswith("qkv_proj.weight"))
    place = {entry.key: entry.value for entry in tensor.external_data}
    with (damaged / "model.onnx.data").open("r+b") as stream:
        stream.seek(int(place["offset"]))
        stream.write(b"\xff")
    with pytest.raises(manifest.FormatError, match=r"cannot be loaded: .*export it again"):
        backends.load(damaged, verify=False)


def test_an_operator_of_another_version_is_explained(damaged: Path) -> None:
    def rename(node: onnx.NodeProto) -> None:
        node.op_type = node.op_type.replace("DecoderLayer", "DecoderBlock")

    edit(damaged, rename)
    with pytest.raises(InstallationError, match="uses an operator that this installation lacks"):
        backends.load(damaged, verify=False)


def test_a_library_that_cannot_be_loaded_is_explained(
    damaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = tmp_path / "libbitdistill_ops.so"
    library.write_bytes(b"not a library")
    monkeypatch.setattr(onnx_session, "library_path", lambda: library)
    with pytest.raises(InstallationError, match=r"cannot be loaded .*reinstall bitdistill"):
        backends.load(damaged)


def test_an_instruction_set_that_is_not_here_is_to_be_unset(damaged: Path) -> None:
    """In a process of its own, which asks for the environment once."""
    code = f"from bitdistill import backends; backends.load({str(damaged)!r})"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"BITDISTILL_ISA": "neon9"},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    message = done.stderr.splitlines()[-1]
    assert "InstallationError: the custom operators in " in message
    assert "BITDISTILL_ISA=neon9 is not an instruction set" in message
    assert message.endswith("; change or unset that")


def test_an_old_onnxruntime_is_refused_where_windows_would_be_wrong(
    onnx_pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_runtime.ort, "__version__", "1.23.2")
    with pytest.raises(InstallationError, match=r"pip install -U 'onnxruntime>=1.24'"):
        backends.load(onnx_pair("gemma3_text", "paper", 8)[1])
    assert backends.load(onnx_pair("qwen3", "paper", 8)[1]).context == 128
