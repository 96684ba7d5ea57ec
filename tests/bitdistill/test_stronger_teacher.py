"""A teacher that is another model: deeper, wider, of more heads, of another family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from short_runs import log_of

from bitdistill import checkpoint, manifest
from bitdistill.capture import related_layers
from bitdistill.config import ConfigError, load_config
from bitdistill.data import IGNORED
from bitdistill.dry_run import dry_run
from bitdistill.hardware import TrainingError
from bitdistill.objective import make_objective
from bitdistill.prepare import count_window, prepare
from bitdistill.recipe import train
from bitdistill.schema import Config, Distillation, RelationLoss
from bitdistill.student import layers_of, make_student
from bitdistill.teacher import ModelError
from bitdistill.tokenizing import train_tokenizer

BIG: dict[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
}
STAGES = ["pretrain.enabled=true", "student.start=base", "distill.relations.split_heads=4"]


@pytest.fixture
def big(make_teacher: Callable[..., Any], tokenizer: Any, tmp_path: Path) -> Callable[..., str]:
    """`big(family)`: a setting that names a deeper, wider teacher with the same tokenizer."""

    def make(family: str = "llama", words: Any = None, **overrides: Any) -> str:
        path = tmp_path / f"big-{family}"
        make_teacher(family, **(BIG | overrides)).save_pretrained(path)
        (words or tokenizer).save_pretrained(path)
        return f"teacher_model.source={path}"

    return make


@pytest.mark.parametrize("family", ["llama", pytest.param("qwen3", marks=pytest.mark.slow)])
def test_a_recipe_with_a_larger_teacher(
    recipe: Callable[..., Config], big: Callable[..., str], tmp_path: Path, family: str
) -> None:
    """Every stage; the student is of the base model's shape, the teacher of its own."""
    out = tmp_path / "run"
    student = checkpoint.load(train(recipe(big(family), *STAGES), out, quiet=True))
    teacher = checkpoint.load(out / "teacher")
    assert (len(layers_of(student)), len(layers_of(teacher))) == (2, 5)
    assert (student.config.hidden_size, teacher.config.hidden_size) == (64, 96)
    assert student.config.model_type == "bitdistill_qwen3"
    names = {
        stage: manifest.read_manifest(out / stage)["base_model"] for stage in ("teacher", "student")
    }
    assert names == {"teacher": f"big-{family}", "student": "model"}
    terms = {r["stage"]: set(r) & {"ce", "logits", "relations"} for r in log_of(out)}
    assert terms["pretrained"] == {"ce", "logits"}  # it teaches stage 2 as well
    assert terms["student"] == {"ce", "logits", "relations"}


def test_another_teacher_is_another_run(
    recipe: Callable[..., Config], big: Callable[..., str], tmp_path: Path
) -> None:
    setting = big()
    train(recipe(setting, *STAGES), tmp_path / "run", quiet=True)
    with pytest.raises(TrainingError, match="teacher was made with another configuration"):
        train(recipe(*STAGES), tmp_path / "run", quiet=True)


def test_layers_correspond_by_relative_depth(make_teacher: Callable[..., Any]) -> None:
    """The relations are those of the layers at the same share of each model's depth."""
    student, teacher = make_teacher("qwen3", num_hidden_layers=3), make_teacher("llama", **BIG)
    options = RelationLoss(weight=1.0, layer=0.5, split_heads=4)
    assert related_layers(options, student, teacher) == (1, 2)
    objective = make_objective(student, teacher, Distillation(steps=1, relations=options))
    ids = torch.randint(3, 200, (2, 6), generator=torch.Generator().manual_seed(0))
    labels = torch.where(torch.arange(6) > 3, ids, IGNORED)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    prepared = prepare(batch, count_window([batch], options))

    def relations() -> float:
        return objective(prepared)[1]["relations"].item()

    before = relations()
    assert before > 0
    with torch.no_grad():  # what other layers project cannot matter
        for model, related in ((student, 1), (teacher, 2)):
            for layer in list(layers_of(model))[related + 1 :]:
                layer.self_attn.q_proj.weight.zero_()
    assert relations() == before
    for model, related in ((student, 1), (teacher, 2)):
        with torch.no_grad():
            layers_of(model)[related].self_attn.q_proj.weight.mul_(2.0)
        assert relations() != before
        before = relations()


def test_rows_that_pad_the_teachers_head_are_left_out(make_teacher: Callable[..., Any]) -> None:
    small = make_teacher("llama")
    student = make_student(small)
    wide = make_teacher("llama", vocab_size=small.config.vocab_size + 28, **BIG)
    cut = make_teacher("llama", **BIG)
    cut.load_state_dict(
        {k: v[: small.config.vocab_size] if "embed" in k or "lm_head" in k else v
         for k, v in wide.state_dict().items()}
    )  # fmt: skip
    ids = torch.randint(3, 200, (2, 6), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    options = Distillation(steps=1, logits={"weight": 1.0})  # type: ignore[arg-type]
    prepared = prepare(batch, count_window([batch], options.relations))
    found = [make_objective(student, t, options)(prepared)[1]["logits"] for t in (wide, cut)]
    assert torch.equal(*found)


def test_another_vocabulary_is_refused_before_anything_is_trained(
    recipe: Callable[..., Config], big: Callable[..., str], tmp_path: Path
) -> None:
    words = train_tokenizer(["entirely other words in another order"] * 4, vocabulary=300)
    config = recipe(big(words=words), *STAGES)
    message = (
        r"teacher_model .*big-llama has another vocabulary than model .*: their logits cannot be "
        "compared; choose a teacher with the same tokenizer"
    )
    for attempt in (lambda: train(config, tmp_path / "run", quiet=True), lambda: dry_run(config)):
        with pytest.raises(ModelError, match=message):
            attempt()
    assert not list((tmp_path / "run").glob("*/bitdistill.json"))


@pytest.mark.parametrize("stages", [["distill"], ["pretrain", "distill"]])
def test_alignment_with_a_wider_teacher_is_refused_before_anything_is_trained(
    recipe: Callable[..., Config], big: Callable[..., str], tmp_path: Path, stages: list[str]
) -> None:
    weights = [f"{stage}.alignment.weight=1" for stage in stages]
    config = recipe(big(), *STAGES, *weights)
    remedy = " and ".join(f"{stage}.alignment.weight" for stage in stages)
    message = (
        "alignment compares residual streams of one width; teacher_model .*big-llama has 96, "
        f"model .*model 64: set {remedy} to 0$"
    )
    for attempt in (lambda: train(config, tmp_path / "run", quiet=True), lambda: dry_run(config)):
        with pytest.raises(ModelError, match=message):
            attempt()
    assert not list((tmp_path / "run").glob("*/bitdistill.json"))


def test_alignment_with_a_deeper_teacher_of_the_same_width(
    recipe: Callable[..., Config], big: Callable[..., str], tmp_path: Path
) -> None:
    setting = big(hidden_size=64, num_attention_heads=4, num_key_value_heads=2)
    train(recipe(setting, *STAGES, "distill.alignment.weight=1"), tmp_path / "run", quiet=True)
    (step, *_) = [r for r in log_of(tmp_path / "run") if r["stage"] == "student"]
    assert step["alignment"] > 0


def test_a_head_with_too_few_rows_is_refused(
    recipe: Callable[..., Config], big: Callable[..., str], tmp_path: Path, tokenizer: Any
) -> None:
    setting = big(vocab_size=len(tokenizer) - 1)
    with pytest.raises(ModelError, match=f"in {len(tokenizer) - 1} rows, "):
        train(recipe(setting, *STAGES), tmp_path / "run", quiet=True)


def test_a_dry_run_takes_the_larger_teacher(
    recipe: Callable[..., Config], big: Callable[..., str]
) -> None:
    assert "relations " in dry_run(recipe(big(), *STAGES))


def test_the_student_cannot_start_from_another_model() -> None:
    with pytest.raises(ConfigError, match=r"start: the teacher is another model .* start from"):
        load_config("tiny", ["teacher_model.source=elsewhere", "student.start=teacher"])
