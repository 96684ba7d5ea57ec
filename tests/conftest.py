"""Shared fixtures: tiny random models of every family, made on the fly; nothing is downloaded."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny matrices: threads only get in each other's way

import pytest

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
FAMILIES = ("llama", "qwen2", "qwen3", "gemma3_text")
WORDS = [
    "the",
    "film",
    "is",
    "not",
    "good",
    "bad",
    "but",
    "very",
    "dull",
    "bright",
    "and",
    "we",
    "liked",
    "it",
    "a",
    "plot",
]


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """A byte-level BPE tokenizer (about 300 entries) in Hugging Face form."""
    from bitdistill.tokenizing import train_tokenizer

    return train_tokenizer([" ".join(WORDS)] * 4, vocabulary=300)


def random_teacher(family: str, vocabulary: int, **overrides: Any) -> Any:
    """A two-layer random causal LM of a family, weights large enough that logits differ."""
    import torch
    import transformers as hf

    sizes = dict(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    make: dict[str, Callable[..., Any]] = {
        "llama": lambda **kw: hf.LlamaForCausalLM(hf.LlamaConfig(**kw)),
        "qwen2": lambda **kw: hf.Qwen2ForCausalLM(hf.Qwen2Config(**kw)),
        "qwen3": lambda **kw: hf.Qwen3ForCausalLM(hf.Qwen3Config(head_dim=32, **kw)),
        "gemma3_text": lambda **kw: hf.Gemma3ForCausalLM(
            hf.Gemma3TextConfig(
                head_dim=32,
                sliding_window=8,
                query_pre_attn_scalar=32,
                **({"layer_types": ["sliding_attention", "full_attention"]} | kw),
            )
        ),
    }
    torch.manual_seed(0)
    model = make[family](**(sizes | overrides)).eval()
    with torch.no_grad():  # norms and biases that are all ones or zeros would hide mistakes
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="session")
def make_teacher(tokenizer: Any) -> Callable[..., Any]:
    """`make_teacher(family, **config)`: a random causal LM with the vocabulary of `tokenizer`."""
    return lambda family, **overrides: random_teacher(family, len(tokenizer), **overrides)


@pytest.fixture(scope="session")
def load_script() -> Callable[[Path], ModuleType]:
    """`load_script(path)`: a script as a module; it finds its neighbours, as when it is run."""

    def load(path: Path) -> ModuleType:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(path.parent)
            patch.setitem(sys.modules, path.stem, module)  # data classes look their module up
            spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def student_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Callable[..., Path]:
    """`student_dir(family, norm_style, **config)`: a saved random student; made once each."""
    import torch

    from bitdistill import checkpoint, student

    root = tmp_path_factory.mktemp("students")
    made: dict[str, Path] = {}

    def make(
        family: str = "qwen3",
        norm_style: str = "paper",
        activation_bits: int | None = 8,
        task: dict[str, Any] | None = None,
        **overrides: Any,
    ) -> Path:
        key = f"{family}-{norm_style}-{activation_bits}-{overrides}-{task}"
        if key not in made:
            teacher = random_teacher(family, len(tokenizer), **overrides)
            model = student.make_student(teacher, norm_style, activation_bits)  # type: ignore[arg-type]
            drawn = torch.Generator().manual_seed(0)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if name.endswith("_proj.norm.weight"):
                        parameter.uniform_(0.5, 1.5, generator=drawn)
            path = root / str(len(made))
            content = {
                "stage": "student",
                "method": "bitdistill",
                "base_model": "random",
                "family": family,
                "licence": "apache-2.0",
                "norm_style": norm_style,
                "activation_bits": activation_bits,
                "task": task,
                "recipe": "test",
                "parent": None,
                "metrics": {},
            }
            checkpoint.save(path, model, tokenizer, "student", content, "# A random student\n")
            made[key] = path
        return made[key]

    return make
