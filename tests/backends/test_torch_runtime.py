"""The PyTorch backend: the reference must be the model as it was trained."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from bitdistill import backends, checkpoint, manifest
from bitdistill.backends.torch_runtime import TorchRuntime
from bitdistill.quantize import BitLinear, ternarize

TOKENS = [[5, 90, 13, 201, 44, 7, 8, 9, 120, 33, 4, 6], [17, 18, 19]]


@pytest.fixture(scope="module")
def plain_dir(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: Any, make_teacher: Callable[..., Any]
) -> Path:
    """A Hugging Face directory that bitdistill did not write."""
    path = tmp_path_factory.mktemp("plain") / "teacher"
    make_teacher("qwen3").save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def whole(model: Any, tokens: list[int]) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].float().numpy()


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_student_runs_as_it_was_trained(student_dir: Callable[..., Path], family: str) -> None:
    path = student_dir(family, "paper", None)
    runtime = backends.load(path)
    model = checkpoint.load(path)
    for tokens, logits in zip(TOKENS, runtime.logits(TOKENS), strict=True):
        np.testing.assert_allclose(logits, whole(model, tokens), atol=1e-4)
    assert runtime.name == "torch"
    assert runtime.stop_tokens == [2]
    assert runtime.context == 128


@pytest.mark.filterwarnings("error::FutureWarning")
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3_text"])
def test_generation_says_nothing_of_what_transformers_will_rename(
    student_dir: Callable[..., Path], family: str
) -> None:
    runtime = backends.load(student_dir(family, "paper", None))
    assert len(list(runtime.generate(TOKENS[0], max_new_tokens=3, stop=()))) == 3
    _, rows = runtime.start_rows(TOKENS, 1)
    assert runtime.step_rows([5, 6], rows).shape == (2, runtime.vocabulary)


def test_decoding_with_the_cache_is_the_full_forward(student_dir: Callable[..., Path]) -> None:
    runtime = backends.load(student_dir("gemma3_text", "paper", None))
    full = runtime.logits(TOKENS[:1])[0]
    cache = runtime.new_cache(len(full))
    steps = [runtime.step(TOKENS[0][:3], cache)]
    steps += [runtime.step([token], cache) for token in TOKENS[0][3:]]
    np.testing.assert_allclose(steps, full[2:], atol=1e-4 * full.std())
    with pytest.raises(ValueError, match="1 tokens do not fit, there is room for 0"):
        runtime.step([5], cache)


def test_a_plain_hugging_face_directory_is_a_teacher(plain_dir: Path) -> None:
    runtime = backends.load(plain_dir)
    assert runtime.manifest == {}
    from transformers import AutoModelForCausalLM

    expected = whole(AutoModelForCausalLM.from_pretrained(plain_dir), TOKENS[0])
    np.testing.assert_allclose(runtime.logits(TOKENS)[0], expected, atol=1e-4)
    prompt = runtime.tokenizer.encode("the film is good")
    assert len(list(runtime.generate(prompt, max_new_tokens=3, stop=()))) == 3


def test_a_teacher_directory_of_ours(
    tmp_path: Path, tokenizer: Any, make_teacher: Callable[..., Any]
) -> None:
    model = make_teacher("llama")
    checkpoint.save(tmp_path / "teacher", model, tokenizer, "teacher", {}, "card")
    logits = backends.load(tmp_path / "teacher").logits(TOKENS)[0]
    np.testing.assert_allclose(logits, whole(model, TOKENS[0]), atol=1e-4)


def test_pickled_weights_are_not_read(plain_dir: Path, tmp_path: Path) -> None:
    path = shutil.copytree(plain_dir, tmp_path / "pickled")
    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()
    with pytest.raises(manifest.FormatError, match=r"has no model\.safetensors, .* not read"):
        backends.load(path)
    manifest.write_manifest(path, "teacher", {})
    with pytest.raises(manifest.FormatError, match=r"has no model\.safetensors, .* not read"):
        checkpoint.load(path)


def test_a_teachers_weights_are_those_that_its_manifest_lists(
    plain_dir: Path, tmp_path: Path
) -> None:
    """transformers takes model.safetensors before the shards of an index."""
    path = shutil.copytree(plain_dir, tmp_path / "shards")
    (path / "model.safetensors").rename(path / "model-00001-of-00001.safetensors")
    (path / "model.safetensors.index.json").write_text("{}")
    manifest.write_manifest(path, "teacher", {})
    shutil.copy(plain_dir / "model.safetensors", path)
    with pytest.raises(manifest.FormatError, match="its manifest does not list; remove it"):
        backends.load(path)


def test_storage_rounds_embedding_and_norms_and_nothing_else(
    student_dir: Callable[..., Path],
) -> None:
    path = student_dir("qwen3", "paper", 8, tie_word_embeddings=False)
    storage = {"embedding": "float16", "norms": "bfloat16"}
    rounded = backends.load(path, storage=storage)
    assert isinstance(rounded, TorchRuntime)
    types = {"embed_tokens.weight": torch.float16, "lm_head.weight": torch.float16}
    changed = 0
    model = checkpoint.load(path)
    ternary = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, BitLinear)}
    assert len(ternary) == 14
    for name, weight in model.state_dict().items():
        if name in ternary:  # trits, of the weights as they were stored
            trits = ternarize(weight)[0].float()
            assert torch.equal(rounded.model.state_dict()[name], trits), name
            continue
        kind = torch.bfloat16 if "norm" in name else torch.float32
        kind = next((types[key] for key in types if name.endswith(key)), kind)
        expected = weight.to(kind).float()
        changed += not torch.equal(expected, weight)
        assert torch.equal(rounded.model.state_dict()[name], expected), name
    assert changed >= 10


def test_float64_is_the_same_model_and_more_exact(student_dir: Callable[..., Path]) -> None:
    path = student_dir("llama", "paper", None)
    wide = backends.load(path, dtype="float64")
    assert isinstance(wide, TorchRuntime)
    assert {p.dtype for p in wide.model.parameters()} == {torch.float64}
    narrow, exact = backends.load(path).logits(TOKENS)[0], wide.logits(TOKENS)[0]
    difference = np.abs(narrow - exact).max()
    assert 0 < difference < 1e-4 * exact.std()


def test_bfloat16_keeps_trits_and_rotation(student_dir: Callable[..., Path]) -> None:
    path = student_dir("llama", "paper", 8)
    half, full = backends.load(path, dtype="bfloat16"), backends.load(path)
    assert isinstance(half, TorchRuntime)
    assert isinstance(full, TorchRuntime)
    assert half.model.model.embed_tokens.weight.dtype == torch.bfloat16
    assert half.model.model.rotary_emb.inv_freq.dtype == torch.float32
    for a, b in zip(half.model.modules(), full.model.modules(), strict=True):
        if isinstance(a, BitLinear):
            assert torch.equal(ternarize(a.weight)[0], ternarize(b.weight)[0])
    x, y = half.logits(TOKENS)[0], full.logits(TOKENS)[0]
    assert np.corrcoef(x.ravel(), y.ravel())[0, 1] > 0.98


def test_options_are_checked(student_dir: Callable[..., Path], plain_dir: Path) -> None:
    path = student_dir()
    with pytest.raises(ValueError, match="unknown dtype 'float33'; did you mean 'float32'"):
        backends.load(path, dtype="float33")
    with pytest.raises(ValueError, match="unknown device 'cudaa'; did you mean 'cuda'"):
        backends.load(path, device="cudaa")
    with pytest.raises(ValueError, match="unknown storage part 'norm'; did you mean 'norms'"):
        backends.load(path, storage={"norm": "float16"})
    with pytest.raises(ValueError, match="unknown storage type 'int8'"):
        backends.load(path, storage={"norms": "int8"})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_gpu_that_is_not_there_is_refused(student_dir: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match="PyTorch sees no CUDA device"):
        backends.load(student_dir(), device="cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_gpu_gives_what_the_processor_gives(student_dir: Callable[..., Path], dtype: str) -> None:
    """Scoring, a cache, and rows of it; without 8-bit rounding, which tells any two sums apart."""
    path = student_dir("qwen3", "paper", None)
    here, there = (backends.load(path, device=name, dtype=dtype) for name in ("cpu", "cuda"))
    for mine, theirs in zip(here.logits(TOKENS), there.logits(TOKENS), strict=True):
        np.testing.assert_allclose(theirs, mine, atol=1e-4)
    cache = there.new_cache(16)
    np.testing.assert_allclose(
        there.step(TOKENS[0], cache), here.step(TOKENS[0], here.new_cache(16)), atol=1e-4
    )
    logits, rows = there.start_rows(TOKENS, 4)
    expected, own = here.start_rows(TOKENS, 4)
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    rows, own = there.select_rows(rows, [1, 0]), here.select_rows(own, [1, 0])
    tokens = [3, 4]
    np.testing.assert_allclose(
        there.step_rows(tokens, rows), here.step_rows(tokens, own), atol=1e-4
    )


def test_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    from transformers import GPT2Config

    GPT2Config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="architecture 'gpt2' is not supported; known: llama"):
        backends.load(tmp_path)
