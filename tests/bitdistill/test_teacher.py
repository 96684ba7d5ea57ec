"""Off-the-shelf models: directories, GGUF, and everything that can be wrong with them."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bitdistill.schema_data import Model
from bitdistill.student import make_student
from bitdistill.teacher import ModelError, licence_of, load_model, name_of

FAMILIES = ("llama", "qwen2", "qwen3", "gemma3_text")


@pytest.fixture
def model_dir(make_teacher: Callable[..., Any], tokenizer: Any, tmp_path: Path) -> Path:
    """A random llama with its tokenizer, as Hugging Face saves it."""
    path = tmp_path / "model"
    make_teacher("llama").save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.mark.parametrize("family", FAMILIES)
def test_local_directories(
    make_teacher: Callable[..., Any], tokenizer: Any, family: str, tmp_path: Path
) -> None:
    original = make_teacher(family).to(torch.bfloat16)
    original.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, words = load_model(Model(source=str(tmp_path)))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    for name, value in original.state_dict().items():
        assert torch.equal(model.state_dict()[name], value.float()), name
    assert words("the film").input_ids == tokenizer("the film").input_ids


def test_home_is_expanded(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(model_dir.parent))
    (model_dir / "README.md").write_text("---\nlicense: mit\n---\n")
    model, _ = load_model(Model(source="~/model"))
    assert model.config.model_type == "llama"
    assert licence_of(Model(source="~/model")) == "mit"


def test_a_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model directory .*/none does not exist; check model.so"):
        load_model(Model(source=str(tmp_path / "none")))


def test_a_directory_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config.json; it is not a Hugging Face model"):
        load_model(Model(source=str(tmp_path)))


def test_a_hub_name_without_network() -> None:
    with pytest.raises(ModelError, match=r"model nobody/nothing cannot be had .* give a complete"):
        load_model(Model(source="nobody/nothing"))


def _drop(path: Path, *names: str) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(path / "model.safetensors")
    for name in names:
        del tensors[name]
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


def _resize(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))


def _truncate(path: Path) -> None:
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def _without_tokenizer(path: Path) -> None:
    for file in path.glob("tokenizer*"):
        file.unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: (p / "config.json").write_text("{"), "AutoConfig: .*not a valid JSON file"),
        (lambda p: (p / "config.json").write_text("{}"), "AutoConfig: Unrecognized model"),
        (lambda p: (p / "model.safetensors").unlink(), "AutoModelForCausalLM: .*no file named"),
        (_truncate, "AutoModelForCausalLM: Error while deserializing header"),
        (_resize, "AutoModelForCausalLM: "),
        (_without_tokenizer, "AutoTokenizer: "),
        (
            lambda p: _drop(p, "model.layers.0.mlp.up_proj.weight"),
            "lacks 1 tensors, e.g. model.layers.0.mlp.up_proj.weight; fetch or copy it again",
        ),
    ],
)
def test_damaged_directories_are_one_sentence(
    model_dir: Path, damage: Callable[[Path], Any], message: str
) -> None:
    """A lost tensor too, which transformers would replace by random numbers."""
    damage(model_dir)
    with pytest.raises(ModelError, match=message) as caught:
        load_model(Model(source=str(model_dir)))
    assert "\n" not in str(caught.value)
    assert str(model_dir) in str(caught.value)


def test_an_architecture_that_is_not_known(tokenizer: Any, tmp_path: Path) -> None:
    import transformers as hf

    config = hf.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=len(tokenizer))
    hf.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"'gpt2' is not supported; known: llama, qwen2, qwen3, ge"
    ):
        load_model(Model(source=str(tmp_path)))


def test_a_student_is_no_base_model(student_dir: Callable[..., Path]) -> None:
    """A ternary model would be called fp16-sft, and its student agree with it."""
    with pytest.raises(ModelError, match="is a ternary student, not a base model or teacher; give"):
        load_model(Model(source=str(student_dir())))


def test_remote_code_is_never_run(model_dir: Path, tmp_path: Path) -> None:
    config = json.loads((model_dir / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}}
    (model_dir / "config.json").write_text(json.dumps(config))
    (model_dir / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    with pytest.raises(ModelError):
        load_model(Model(source=str(model_dir)))
    assert not (tmp_path / "ran").exists()


# --- GGUF -----------------------------------------------------------------------------------------


def write_gguf(file: Path, model: Any, tokenizer: Any) -> None:
    """A llama in GGUF; llama.cpp stores the rows of Q and K in pairs for its rotary embedding."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(len(tokenizer))
    vocabulary = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary)
    writer.add_token_types(
        [gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(vocabulary) - 3)
    )
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, value in model.state_dict().items():
        if name == "lm_head.weight":
            continue  # tied
        stem, _, suffix = name.rpartition(".")
        array = value.float().numpy()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        if count := heads.get(stem.rpartition(".")[2]):
            array = array.reshape(count, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(f"{names.get_name(stem)}.{suffix}", np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf(make_teacher: Callable[..., Any], tokenizer: Any, tmp_path: Path) -> None:
    original = make_teacher("llama")
    write_gguf(tmp_path / "tiny.gguf", original, tokenizer)
    model, words = load_model(Model(source=str(tmp_path), gguf_file="tiny.gguf"))
    for name, value in original.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert words.decode(words("the film is").input_ids, skip_special_tokens=True) == "the film is"
    ids = torch.tensor([[5, 6, 7, 8]])
    torch.testing.assert_close(model.eval()(ids).logits, original(ids).logits)
    assert "quantization_config" not in model.config.to_dict()
    assert words.eos_token_id == model.config.eos_token_id == 2
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").is_file()
    make_student(model)


def test_a_missing_gguf_file(model_dir: Path) -> None:
    with pytest.raises(
        ModelError, match=r"has no x.gguf; it is not a Hugging Face model directory"
    ):
        load_model(Model(source=str(model_dir), gguf_file="x.gguf"))


@pytest.mark.parametrize("package", ["gguf", "accelerate"])
def test_gguf_without_its_packages(
    model_dir: Path, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == package else found(name, *a)
    )
    with pytest.raises(ModelError) as caught:
        load_model(Model(source=str(model_dir), gguf_file="x.gguf"))
    assert str(caught.value) == (
        f"reading GGUF needs the package {package}: pip install 'bitdistill[gguf]'"
    )


# --- licences -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("card", "configured", "licence"),
    [
        ("---\nlicense: apache-2.0\ntags: [x]\n---\n", None, "apache-2.0"),
        ("---\nlicense: 'mit'\n---\n", None, "mit"),
        ("---\nlicense: mit\n---\n", "gemma", "gemma"),
        ("# A model\n", None, "unknown"),
        (None, "llama3.2", "llama3.2"),
        (None, None, "unknown"),
    ],
)
def test_licence(card: str | None, configured: str | None, licence: str, tmp_path: Path) -> None:
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert licence_of(Model(source=str(tmp_path), licence=configured)) == licence


def test_name_of_a_model(tmp_path: Path) -> None:
    directory = tmp_path / "my-model"
    directory.mkdir()
    assert name_of(Model(source=str(directory))) == "my-model"
    (directory / "README.md").write_text("---\nbase_model: org/Model-1B\n---\n")
    assert name_of(Model(source=str(directory))) == "org/Model-1B"
    assert name_of(Model(source="org/on-the-hub")) == "org/on-the-hub"


def test_licence_of_the_embedded_model() -> None:
    assert licence_of(Model(source="tiny")) == "apache-2.0"


def test_a_directory_is_only_read(model_dir: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(model_dir, copy)
    load_model(Model(source=str(copy)))
    assert {p.name: p.read_bytes() for p in copy.iterdir()} == {
        p.name: p.read_bytes() for p in model_dir.iterdir()
    }


def test_sampling_settings_that_transformers_will_not_save(model_dir: Path, tmp_path: Path) -> None:
    """It loads them with a warning; a stage must not end in an error when it is saved."""
    file = model_dir / "generation_config.json"
    file.write_text('{"temperature": 0.9, "top_p": 0.6}')
    model, _ = load_model(Model(source=str(model_dir)))
    model.save_pretrained(tmp_path / "saved")
    assert model.generation_config.top_p == 0.6
    file.write_text('{"length_penalty": 0.5}')
    with pytest.raises(ModelError, match=r"that transformers will not save .*mend or remove"):
        load_model(Model(source=str(model_dir)))
