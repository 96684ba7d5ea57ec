"""Surgery, gains, and exact save and reload."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from bitdistill import checkpoint, exporters, manifest
from bitdistill.decoder import LINEARS, DecoderSpec, config_class
from bitdistill.quantize import BitLinear, bit_linears, ternarize
from bitdistill.student import (
    cast,
    make_student,
    measure_gains,
    model_class,
    round_tables,
    set_gains,
)

FAMILIES = ("llama", "qwen2", "qwen3", "gemma3_text")
NORMS = {"paper": 2, "allnorm": 7, "none": 0}


def tokens() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 200, (3, 12), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("style", NORMS)
def test_every_linear_of_a_block_is_ternary_and_nothing_else(
    make_teacher: Callable[..., Any], family: str, style: Any
) -> None:
    student = make_student(make_teacher(family), style)
    found = [n for n, m in student.named_modules() if isinstance(m, BitLinear)]
    expected = [f"model.layers.{i}.{name}" for i in range(2) for name in LINEARS]
    assert sorted(found) == sorted(expected)
    assert not isinstance(student.lm_head, BitLinear)
    normed = [n for n in found if student.get_submodule(n).norm is not None]
    assert len(normed) == 2 * NORMS[style]


@pytest.mark.parametrize("family", FAMILIES)
def test_unquantised_student_without_norms_is_its_teacher(
    make_teacher: Callable[..., Any], family: str
) -> None:
    teacher = make_teacher(family)
    student = make_student(teacher, "none", None).eval()
    for module in student.modules():
        if isinstance(module, BitLinear):
            module.anneal.fill_(0.0)
    batch = tokens()
    torch.testing.assert_close(
        student(**batch).logits, teacher(**batch).logits, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])  # gemma3 norms a block's output
def test_calibrated_gain_keeps_the_teacher(make_teacher: Callable[..., Any], family: str) -> None:
    """With its gains a full-precision SubLN student is closer to the teacher than with ones."""
    teacher, batch = make_teacher(family), tokens()
    with torch.no_grad():
        for layer in teacher.model.layers:  # real models' inner activations are far from rms 1
            layer.self_attn.v_proj.weight.mul_(4.0)
            layer.mlp.up_proj.weight.mul_(0.1)
    reference = teacher(**batch).logits
    errors = []
    for calibrated in (False, True):
        student = make_student(teacher, "paper", None).eval()
        if calibrated:
            set_gains(student, measure_gains(teacher, "paper", [batch]))
        for module in student.modules():
            if isinstance(module, BitLinear):
                module.anneal.fill_(0.0)
        errors.append(float((student(**batch).logits - reference).norm() / reference.norm()))
    assert errors[1] < 0.7 * errors[0]


def test_gain_is_the_mean_rms_over_real_tokens(make_teacher: Callable[..., Any]) -> None:
    teacher, batch = make_teacher("llama"), tokens()
    batch["attention_mask"][1, 5:] = 0
    seen: list[torch.Tensor] = []
    down = teacher.model.layers[1].mlp.down_proj
    handle = down.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    gains = measure_gains(teacher, "paper", [batch])
    handle.remove()
    real = batch["attention_mask"].bool()
    expected = float(seen[0].square().mean(-1).sqrt()[real].mean())
    assert gains["model.layers.1.mlp.down_proj"] == pytest.approx(expected, rel=1e-5)
    assert len(gains) == 4


def test_a_norm_without_a_gain_is_refused(make_teacher: Callable[..., Any]) -> None:
    student = make_student(make_teacher("llama"), "paper")
    with pytest.raises(ValueError, match="no gain was measured for"):
        set_gains(student, {})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("style", NORMS)
def test_save_and_reload_is_exact(
    student_dir: Callable[..., Path], family: str, style: str
) -> None:
    path = student_dir(family, style)
    model, again = checkpoint.load(path), checkpoint.load(path)
    files = checkpoint.open_student(path)
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
        if name in files.names:
            assert torch.equal(value, files.tensor(name))
    gains = [n for n in files.names if n.endswith("_proj.norm.weight")]
    assert len(gains) == 2 * NORMS[style]
    assert all((files.tensor(name) != 1.0).all() for name in gains)  # not lost on the way
    spec = files.spec
    assert DecoderSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_loading_draws_no_weights(
    student_dir: Callable[..., Path], family: str, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would take longer than reading them; what no file holds is as in any other model."""
    path = student_dir(family, tie_word_embeddings=tied)
    config = config_class(family).from_pretrained(path)
    expected = dict(model_class(family)(config).named_buffers())
    monkeypatch.setattr(PreTrainedModel, "initialize_weights", None)  # calling it is an error
    before = torch.get_rng_state()
    model = checkpoint.load(path)
    assert torch.equal(torch.get_rng_state(), before)
    found = dict(model.named_buffers())
    assert found.keys() == expected.keys()
    assert any("inv_freq" in name for name in found)
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_what_ends_an_answer_in_training_ends_a_generation(
    make_teacher: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    model = make_teacher("llama")
    other = 7
    model.generation_config.eos_token_id = other
    checkpoint.save(tmp_path / "a", model, tokenizer, "teacher", {}, "# A teacher\n")
    config = json.loads((tmp_path / "a" / "config.json").read_text("utf-8"))
    assert checkpoint.stop_tokens(tmp_path / "a", config) == sorted({tokenizer.eos_token_id, other})


GAIN = "model.layers.0.mlp.down_proj.norm.weight"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({}, "does not hold exactly the tensors"),
        ({GAIN: torch.ones(95)}, r"as \(95,\) of torch.float32, its config describes \(96,\)"),
        ({GAIN: torch.ones(96, dtype=torch.int8)}, r"as \(96,\) of torch.int8"),
    ],
)
def test_a_lost_or_altered_gain_is_an_error(
    student_dir: Callable[..., Path],
    tmp_path: Path,
    changed: dict[str, torch.Tensor],
    message: str,
) -> None:
    from safetensors.torch import load_file, save_file

    path = student_dir("qwen3", "paper")
    tensors = load_file(path / "model.safetensors")
    del tensors[GAIN]
    tensors |= changed
    for file in path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    save_file(tensors, tmp_path / "model.safetensors")
    content = json.loads((tmp_path / manifest.MANIFEST).read_text())
    manifest.write_manifest(tmp_path, "student", content)
    with pytest.raises(manifest.FormatError, match=message):
        checkpoint.load(tmp_path)


def test_weights_that_the_manifest_does_not_list_are_ignored(
    student_dir: Callable[..., Path], tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    path = shutil.copytree(student_dir("qwen3", "paper"), tmp_path / "copy")
    gain = checkpoint.open_student(path).tensor(GAIN)
    save_file({GAIN: torch.zeros(96)}, path / "zzz.safetensors")
    assert torch.equal(checkpoint.load(path).get_parameter(GAIN), gain)
    assert torch.equal(checkpoint.open_student(path).tensor(GAIN), gain)


def test_an_artifact_is_no_pytorch_model(student_dir: Callable[..., Path], tmp_path: Path) -> None:
    path = exporters.export(student_dir("qwen3"), "mlx", tmp_path / "artifact")
    with pytest.raises(manifest.FormatError, match=r"holds an artifact, .*backends\.load"):
        checkpoint.load(path)


def test_truncated_weights_and_other_versions_are_refused(
    student_dir: Callable[..., Path], tmp_path: Path
) -> None:
    path = student_dir("llama", "paper")
    for file in path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(manifest.FormatError, match="truncated or altered"):
        checkpoint.load(tmp_path)
    content = json.loads((tmp_path / manifest.MANIFEST).read_text())
    (tmp_path / manifest.MANIFEST).write_text(json.dumps(content | {"format_version": 99}))
    with pytest.raises(manifest.FormatError, match="format version 99"):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("attn_logit_softcapping", 50.0),
        ("final_logit_softcapping", 30.0),
        ("use_bidirectional_attention", True),
    ],
)
def test_what_no_decoder_of_ours_computes_is_refused(
    student_dir: Callable[..., Path], setting: str, value: Any
) -> None:
    files = checkpoint.open_student(student_dir("gemma3_text", "paper", **{setting: value}))
    with pytest.raises(ValueError, match=f"{setting} is not supported"):
        _ = files.spec


def test_unknown_architectures_are_refused() -> None:
    import transformers as hf

    config = hf.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=16)
    with pytest.raises(ValueError, match="'gpt2' is not supported; known: llama"):
        make_student(hf.GPT2LMHeadModel(config))


@pytest.mark.parametrize("order", ["transformers first", "bitdistill first"])
def test_auto_classes_know_students(student_dir: Callable[..., Path], order: str) -> None:
    """In a fresh process, in both import orders; and bitdistill alone imports neither."""
    first = "import transformers\nfrom transformers import AutoConfig\n" if "tr" in order else ""
    program = f"""{first}
import sys, bitdistill
assert {bool(first)} or not {{"torch", "transformers"}} & set(sys.modules)
from transformers import AutoModelForCausalLM
print(type(AutoModelForCausalLM.from_pretrained({str(student_dir("qwen3"))!r})).__name__)
"""
    done = subprocess.run(
        [sys.executable, "-P", "-c", program], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "BitdistillQwen3ForCausalLM", done.stderr[-2000:]


def test_stock_transformers_fails_loudly(student_dir: Callable[..., Path]) -> None:
    program = (
        "from transformers import AutoModelForCausalLM\n"
        f"AutoModelForCausalLM.from_pretrained({str(student_dir('qwen3'))!r})"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "bitdistill_qwen3" in done.stderr


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text"])
def test_the_auto_classes_load_what_was_saved(
    student_dir: Callable[..., Path], family: str
) -> None:
    """Also what is in no file: transformers allocates it without filling it."""
    from transformers import AutoModelForCausalLM

    import bitdistill  # noqa: F401  (registers the students)

    tokens = torch.tensor([[1, 40, 50, 60, 70]])
    scratch = [torch.full((10_000,), torch.nan) for _ in range(50)]
    del scratch  # the allocator hands this memory out again
    model = AutoModelForCausalLM.from_pretrained(student_dir(family))
    expected = checkpoint.load(student_dir(family))
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, expected(tokens).logits)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_tables_are_rounded_to_what_artifacts_store(
    make_teacher: Callable[..., Any], family: str, tied: bool
) -> None:
    student = make_student(make_teacher(family, tie_word_embeddings=tied))
    table, head = student.model.embed_tokens.weight, student.lm_head.weight
    assert (table is head) == tied
    with torch.no_grad():
        table[0, :3] = torch.tensor([1e5, 3e-8, 1 + 2**-10])
    before = {name: value.clone() for name, value in student.state_dict().items()}
    round_tables(student)
    ours = ["model.embed_tokens.weight", "lm_head.weight"]
    for name, value in student.state_dict().items():
        assert torch.equal(value, before[name]) == (name not in ours), name
    last = 1.0 if family == "gemma3_text" else 1 + 2**-10  # bfloat16 has 8 bits
    assert table[0, :3].tolist() == [1e5, 2**-24, last]
    for weight in (table[1:], head[1:]):
        assert torch.equal(weight.half().float(), weight)
        if family == "gemma3_text":
            assert torch.equal(weight.bfloat16().float(), weight)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_sixteen_bits_keep_angles_and_what_trits_are_taken_from(
    make_teacher: Callable[..., Any], family: str
) -> None:
    teacher = make_teacher(family)
    student = make_student(teacher)
    before = {name: value.clone() for name, value in teacher.named_buffers()}
    assert any("inv_freq" in name for name in before)
    cast(teacher, torch.bfloat16)
    assert {p.dtype for p in teacher.parameters()} == {torch.bfloat16}
    for name, value in teacher.named_buffers():
        assert value.dtype == before[name].dtype
        assert torch.equal(value, before[name])
    trits = [ternarize(layer.weight)[0] for layer in bit_linears(student)]
    for layer, expected in zip(bit_linears(cast(student, torch.bfloat16)), trits, strict=True):
        assert torch.equal(ternarize(layer.weight)[0], expected)
    assert student.lm_head.weight.dtype == torch.bfloat16


def test_a_setting_that_qwen2_ignores_adds_no_bias(student_dir: Callable[..., Path]) -> None:
    files = checkpoint.open_student(student_dir("qwen2", attention_bias=True))
    for linear in LINEARS:
        assert files.spec.has_bias(linear) == (f"model.layers.0.{linear}.bias" in files.names)
    assert files.spec.has_bias("self_attn.q_proj")


def test_rotary_tables_of_another_head_size_are_refused(student_dir: Callable[..., Path]) -> None:
    value = checkpoint.open_student(student_dir("llama")).spec.to_json()
    value["rotary"][0]["frequencies"] = value["rotary"][0]["frequencies"][:-1]
    with pytest.raises(ValueError, match=r"not of half the head size 16, .* export the student"):
        DecoderSpec.from_json(value)
