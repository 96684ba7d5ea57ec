"""The whole objective: accumulation, captured states, target ratio, relative layers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bitdistill.capture import ATTENTION, Capture, layer_index, related_layers
from bitdistill.data import IGNORED, UNLABELLED, Batch
from bitdistill.objective import make_objective
from bitdistill.prepare import Counts, count_window, prepare
from bitdistill.schema import Distillation, RelationLoss
from bitdistill.student import make_student

SETTINGS = Distillation(
    steps=1,
    logits={"weight": 2.0, "temperature": 5.0, "prompt_weight": 0.5},  # type: ignore[arg-type]
    relations={"weight": 3.0, "layer": 0.5, "split_heads": 4},  # type: ignore[arg-type]
    alignment={"weight": 1.5},  # type: ignore[arg-type]
)


def make_batch(rows: int, lengths: list[int], seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 200, (rows, max(lengths)), generator=generator)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    labels = torch.where(mask.bool(), ids, IGNORED)
    labels[:, :2] = IGNORED
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_terms_do_not_depend_on_accumulation(make_teacher: Callable[..., Any], family: str) -> None:
    """One batch of four rows, or four of one with unequal counts: one loss, one gradient."""
    teacher = make_teacher(family)
    whole = make_batch(4, [9, 4, 7, 5])
    parts = [{key: value[i : i + 1] for key, value in whole.items()} for i in range(4)]

    def run(window: list[Batch]) -> tuple[dict[str, float], torch.Tensor]:
        student = make_student(teacher).train()
        objective = make_objective(student, teacher, SETTINGS)
        counts = count_window(window, SETTINGS.relations)
        sums: dict[str, float] = {}
        for batch in window:
            loss, terms = objective(prepare(batch, counts))
            loss.backward()
            for key, value in terms.items():
                sums[key] = sums.get(key, 0.0) + value.item()
        gradient = student.model.layers[0].mlp.up_proj.weight.grad
        assert gradient is not None
        return sums, gradient

    (one, gradient), (four, accumulated) = run([whole]), run(parts)
    assert set(one) == {"ce", "logits", "prompt", "relations", "alignment"}
    for key, value in one.items():
        assert value > 0
        assert four[key] == pytest.approx(value, rel=2e-4)
    error = (gradient - accumulated).norm() / gradient.norm()
    assert float(error) < 2e-3  # an int8 rounding may flip between batch shapes


def test_a_student_equal_to_its_teacher_has_no_distillation_loss(
    make_teacher: Callable[..., Any],
) -> None:
    teacher = make_teacher("qwen3")
    objective = make_objective(copy.deepcopy(teacher), teacher, SETTINGS)
    window = [make_batch(2, [6, 5])]
    _, terms = objective(prepare(window[0], count_window(window, SETTINGS.relations)))
    assert terms["logits"].item() == pytest.approx(0.0, abs=1e-5)
    assert terms["relations"].item() == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3_text"])
def test_captured_states(make_teacher: Callable[..., Any], family: str) -> None:
    """`projection` is what the projections give; `attention` is after rotary embedding."""
    model = make_teacher(family)
    attention = model.model.layers[1].self_attn
    outputs: dict[str, torch.Tensor] = {}
    for name in ("q_proj", "k_proj", "v_proj"):
        getattr(attention, name).register_forward_hook(
            lambda _, args, output, key=name: outputs.__setitem__(key, output)
        )
    before = Capture(model, 1, RelationLoss(weight=1))
    batch = make_batch(2, [7, 6])
    model.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    for mine, name in zip(before.take(), outputs, strict=True):
        assert torch.equal(mine, outputs[name])
    reference = model(**{k: batch[k] for k in ("input_ids", "attention_mask")}).logits
    model.set_attn_implementation(ATTENTION)
    after = Capture(model, 1, RelationLoss(weight=1, states="attention"))
    output = model(**{k: batch[k] for k in ("input_ids", "attention_mask")}).logits
    # right padding needs no mask: real tokens come out the same, and capturing changes nothing
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(output[real], reference[real])
    q, k, v = after.take()
    assert q.shape == outputs["q_proj"].shape
    assert k.shape == outputs["k_proj"].shape  # before key and value heads are repeated
    torch.testing.assert_close(v, outputs["v_proj"])  # nothing rotates values
    assert not torch.allclose(k[:, 1:], outputs["k_proj"][:, 1:])


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_packed_documents_do_not_see_each_other(
    make_teacher: Callable[..., Any], family: str
) -> None:
    """Two documents in one row give the loss of the two in rows of their own."""
    model = make_teacher(family)
    objective = make_objective(model, None, Distillation(steps=1))
    batch = make_batch(2, [6, 6])
    batch["labels"] = batch["input_ids"].clone()
    batch["labels"][:, 0] = IGNORED
    packed = {key: value.reshape(1, 12) for key, value in batch.items()}
    packed["documents"] = torch.tensor([[0] * 6 + [1] * 6])
    packed["position_ids"] = torch.arange(6).repeat(2)[None]
    counts = Counts(10, 10, 1, 12, 12)
    apart, _ = objective(prepare(batch, counts))
    together, _ = objective(prepare(packed, counts))
    torch.testing.assert_close(together, apart)
    del packed["documents"]
    mixed, _ = objective(prepare(packed, counts))
    assert not torch.allclose(mixed, apart)


@pytest.mark.parametrize("states", ["projection", "attention"])
def test_compiling_changes_nothing(make_teacher: Callable[..., Any], states: str) -> None:
    """Layers share compiled code; the captured one must keep its capture, at every length."""
    relations = SETTINGS.relations.model_copy(update={"states": states})
    settings = SETTINGS.model_copy(update={"relations": relations})
    student, teacher = make_student(make_teacher("llama")), make_teacher("llama")
    objective = make_objective(student, teacher, settings)
    batches = [make_batch(2, [length, 5]) for length in (8, 12)]

    def run(batch: Batch) -> tuple[dict[str, torch.Tensor], list[torch.Tensor | None]]:
        student.zero_grad()
        loss, terms = objective(prepare(batch, count_window([batch], relations)))
        loss.backward()
        return terms, [parameter.grad for parameter in student.parameters()]

    plain = [run(batch) for batch in batches]
    objective.compile(backend="aot_eager")
    for (terms, gradients), batch in zip(plain, batches, strict=True):
        compiled_terms, compiled_gradients = run(batch)
        assert compiled_terms["relations"] > 0
        torch.testing.assert_close(compiled_terms, terms)
        torch.testing.assert_close(compiled_gradients, gradients)


def test_weight_by_target_ratio(make_teacher: Callable[..., Any]) -> None:
    settings = SETTINGS.model_copy(
        update={"relations": RelationLoss(target_ratio=0.25, layer=1, split_heads=4)}
    )
    teacher = make_teacher("qwen3")
    objective = make_objective(make_student(teacher), teacher, settings)
    batch = make_batch(3, [8, 8, 6])
    objective.fit_relation_weight([batch])
    _, terms = objective(prepare(batch, count_window([batch], settings.relations)))
    assert (terms["relations"] / terms["ce"]).item() == pytest.approx(0.25, rel=1e-4)
    found = objective.relation_weight
    parts = [{key: value[i : i + 1] for key, value in batch.items()} for i in range(3)]
    objective.fit_relation_weight(parts)
    assert objective.relation_weight == pytest.approx(found, rel=1e-3)
    parts[1]["labels"] = parts[1]["labels"].where(parts[1]["labels"] < 0, UNLABELLED)
    objective.fit_relation_weight(parts)
    terms = [objective(prepare(p, count_window(parts, settings.relations)))[1] for p in parts]
    sums = [float(sum(t[name] for t in terms)) for name in ("relations", "ce")]
    assert sums[0] / sums[1] == pytest.approx(0.25, rel=1e-4)
    batch["labels"][batch["labels"] >= 0] = UNLABELLED
    with pytest.raises(ValueError, match="no labelled example"):
        objective.fit_relation_weight([batch])


def test_layers_by_index_and_by_depth() -> None:
    assert layer_index(0.75, 28) == 21
    assert layer_index(1.0, 28) == 27
    assert layer_index(-1, 28) == 27
    with pytest.raises(ValueError, match=r"layers 0\.\.3"):
        layer_index(4, 4)


def test_relative_depth(make_teacher: Callable[..., Any]) -> None:
    deep, shallow = make_teacher("llama", num_hidden_layers=5), make_teacher("llama")
    assert related_layers(RelationLoss(layer=2), shallow, deep) == (round(2 / 4), 2)
    assert related_layers(RelationLoss(layer=4), shallow, deep) == (1, 4)
    assert related_layers(RelationLoss(layer=0.75), deep, deep) == (3, 3)
