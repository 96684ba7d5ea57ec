"""GPTQ and AWQ on whole students: what each layer sees, what stays exact, what survives."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from short_runs import settings, task_batches

from bitdistill.awq import product_error, search
from bitdistill.calibration import LayerWalk
from bitdistill.initialise import initialise
from bitdistill.objective import make_objective
from bitdistill.progress import Reporter
from bitdistill.quantize import BitLinear, bit_linears, ternarize
from bitdistill.recipe import train
from bitdistill.schema import Config, Machine
from bitdistill.student import make_student, measure_gains, set_gains
from bitdistill.training import Fit

FAMILIES = ("llama", "qwen2", "qwen3", "gemma3_text")
KINDS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
CPU = Machine(device="cpu", precision="float32")


def batches(count: int = 3) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for index in range(count):
        ids = torch.randint(3, 200, (4, 12), generator=generator)
        mask = torch.ones_like(ids)
        mask[1, 7 + index :] = 0
        made.append({"input_ids": ids, "attention_mask": mask})
    return made


def student_of(make_teacher: Callable[..., Any], family: str, style: Any, bits: Any = 8) -> Any:
    """A student whose channels are of unlike size, as in real models."""
    teacher = make_teacher(family)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in teacher.named_parameters():
            if name.endswith(("input_layernorm.weight", "feedforward_layernorm.weight")) or (
                family != "gemma3_text" and name.endswith("post_attention_layernorm.weight")
            ):
                parameter.mul_(torch.exp(torch.randn(parameter.shape, generator=generator)))
    student = make_student(teacher, style, bits).eval()
    if style != "none":
        set_gains(student, measure_gains(teacher, style, batches()))
    return student


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_sees_what_it_sees_in_the_model(
    make_teacher: Callable[..., Any], family: str
) -> None:
    student = student_of(make_teacher, family, "paper")
    seen: list[torch.Tensor] = []
    down = student.model.layers[1].mlp.down_proj
    walk = LayerWalk(student, batches())
    with torch.no_grad():
        student.model.layers[0].mlp.up_proj.weight.mul_(-2.0)  # after the walk has begun
    walk.step()
    walk.visit("mlp.down_proj", seen.append)
    handle = down.register_forward_pre_hook(lambda _, args: expected.append(args[0]))
    for index, batch in enumerate(batches()):
        expected: list[torch.Tensor] = []
        with torch.no_grad():
            student(**batch)
            x = down.norm(expected[0])[batch["attention_mask"].bool()]
        torch.testing.assert_close(seen[index], x, rtol=1e-5, atol=1e-5)
    handle.remove()


@pytest.mark.parametrize(
    ("family", "style"), [("llama", "paper"), ("gemma3_text", "allnorm"), ("qwen3", "none")]
)
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_every_kind_of_linear_errs_less(
    make_teacher: Callable[..., Any], family: str, style: str, method: Any
) -> None:
    student = student_of(make_teacher, family, style)
    before = copy.deepcopy(student.state_dict())
    errors = initialise(student, method, batches())
    assert set(errors) == KINDS
    alone = {"o_proj", "down_proj"} if (style, method) == ("none", "awq") else set()
    for kind, error in errors.items():
        # nothing comes before these in which AWQ could fold
        better = error[method] == error["absmean"] if kind in alone else None
        assert better or error[method] < 0.97 * error["absmean"], (kind, error)
    assert {n: v.shape for n, v in student.state_dict().items()} == {
        n: v.shape for n, v in before.items()
    }


@pytest.mark.parametrize(
    ("family", "style"),
    [("llama", "paper"), ("qwen2", "allnorm"), ("qwen3", "none"), ("gemma3_text", "paper")],
)
def test_awq_changes_nothing_in_full_precision(
    make_teacher: Callable[..., Any], family: str, style: str
) -> None:
    student = student_of(make_teacher, family, style, None).double()
    for linear in bit_linears(student):
        linear.anneal.fill_(0.0)
    batch = batches()[0]
    with torch.no_grad():
        before = student(**batch).logits
        weight = student.model.layers[0].mlp.up_proj.weight.clone()
        initialise(student, "awq", batches())
        after = student(**batch).logits
    assert not torch.equal(weight, student.model.layers[0].mlp.up_proj.weight)
    # norms and the quotient weight / D are in fp32 whatever the model's type
    assert float((after - before).norm() / before.norm()) < 5e-6


def test_awq_scales_loud_channels() -> None:
    """Ternary weights are cut off at D, so a loud channel wants smaller ones, not larger."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 32, generator=generator)
    x[:, :3] *= 30
    linear = BitLinear(32, 16)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(16, 32, generator=generator))
    exact = x @ linear.weight.detach().T
    scales, least, plain = search(x, [linear])
    assert least < 0.8 * plain
    assert float(scales[:3].max()) < float(scales[3:].min())
    total = float(exact.square().sum())
    assert product_error(x, linear, exact, scales) / total == pytest.approx(least)
    assert product_error(x, linear, exact) / total == pytest.approx(plain)
    folded = copy.deepcopy(linear)
    with torch.no_grad():
        folded.weight *= scales
        y = folded(x / scales)
    assert float((y - exact).square().sum()) / total == pytest.approx(least, rel=1e-4)


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_training_begins_where_the_initialiser_left(
    make_teacher: Callable[..., Any], tmp_path: Path, method: Any
) -> None:
    """A first step at a usual learning rate moves almost no trit."""
    teacher = make_teacher("qwen3")
    student = student_of(make_teacher, "qwen3", "paper")
    initialise(student, method, batches())
    start = [ternarize(linear.weight) for linear in bit_linears(student)]
    options = settings(steps=4, warmup=0.0, learning_rate=1e-4, anneal=0.0)
    fit = Fit(
        "student",
        make_objective(student, teacher, options),
        task_batches(),
        options,
        CPU,
        Reporter(quiet=True),
        tmp_path / "state",
    )
    fit.fit_relation_weight()
    fit.optimize(fit.batches.window(0))
    moved = weights = 0
    for linear, (trits, scale) in zip(bit_linears(student), start, strict=True):
        now, after = ternarize(linear.weight)
        moved += int((now != trits).sum())
        weights += trits.numel()
        assert float(after) == pytest.approx(float(scale), rel=2e-2)
    assert moved / weights < (1e-3 if method == "gptq" else 5e-3)


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_a_recipe_starts_from_it(
    recipe: Callable[..., Config], tmp_path: Path, method: str
) -> None:
    config = recipe(f"student.initialise={method}", "distill.anneal=0")
    student = train(config, tmp_path / "run", quiet=True)
    content = json.loads((student.parent / "refined" / "bitdistill.json").read_text())
    errors = content["metrics"]["initialisation"]
    assert set(errors) == KINDS
    assert all(error[method] <= error["absmean"] for error in errors.values())


def test_no_batches(make_teacher: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"no calibration batches; raise student.calibration_b"):
        initialise(make_student(make_teacher("llama")), "gptq", [])
