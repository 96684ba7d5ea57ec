"""The loop: schedule, learning, weight decay, accumulation, and a loss that is not finite."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from short_runs import TEXTS, advance, anneal_of, packed_batches, settings, task_batches, weights

from bitdistill import quantize
from bitdistill.data import UNLABELLED, Batch, TaskBatches
from bitdistill.hardware import Hardware, TrainingError, start_compilers
from bitdistill.prepare import count_window, prepare
from bitdistill.quantize import BitLinear, bit_linears, ternary_scale
from bitdistill.schema import Machine, Training
from bitdistill.training import Fit, schedule, total_steps

# --- schedule and steps ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("cosine", [0.5, 1.0, 1.0, (2 + math.sqrt(2)) / 4, 0.5, (2 - math.sqrt(2)) / 4]),
        ("linear", [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]),
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_schedule_by_hand(form: Any, expected: list[float]) -> None:
    options = Training(steps=6, warmup=1 / 3, schedule=form)
    assert [schedule(options, step, 6) for step in range(6)] == pytest.approx(expected)


def test_a_schedule_never_starts_or_ends_at_nothing() -> None:
    for total in (1, 2, 100):
        rates = [schedule(Training(steps=total), step, total) for step in range(total)]
        assert all(0 < rate <= 1 for rate in rates)


@pytest.mark.parametrize(("epochs", "steps"), [(1.0, 8), (0.5, 4), (1.1, 9), (0.01, 1)])
def test_epochs_become_steps(epochs: float, steps: int) -> None:
    assert total_steps(Training(epochs=epochs), task_batches()) == steps


def test_a_corpus_has_no_epochs(tokenizer: Any) -> None:
    with pytest.raises(TrainingError, match="a corpus has no epochs: give the stage's steps"):
        total_steps(Training(epochs=1), packed_batches([TEXTS], tokenizer, 8, 2))


# --- learning -------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", ["task", "packed"])
def test_the_loss_falls(start: Callable[..., Fit], data: str, tmp_path: Path) -> None:
    fit = start(settings(steps=40, anneal=0.0, batch_size=4), data)
    last = fit.run()
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [10, 20, 30, 40]
    assert {"ce", "logits", "relations", "learning_rate", "tokens_per_second"} <= set(records[0])
    assert all(0 <= record["data_wait"] < 1 for record in records)
    seconds = [record["seconds"] for record in records]
    assert seconds[0] > 0
    assert seconds == sorted(seconds)
    terms = ("ce", "logits", "relations")
    assert last == {key: records[-1][key] for key in (*terms, "gradient_norm")}
    assert sum(last[key] for key in terms) < 0.5 * sum(records[0][key] for key in terms)
    assert not fit.model.training


def test_waiting_for_data_is_measured(
    start: Callable[..., Fit], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """As a share of all time, in the log and, where it is worth it, for the person."""

    class Slow(TaskBatches):
        def window(self, step: int) -> list[Batch]:
            time.sleep(0.2)
            return super().window(step)

    slow = Slow(task_batches().rows, 0, 2)
    fit = start(settings(steps=10), slow)
    fit.reporter.console.quiet = False
    begun = time.perf_counter()
    fit.run()
    elapsed = time.perf_counter() - begun
    (record,) = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert 2.0 / elapsed <= record["data_wait"] < 1
    assert "waiting for data" in capfd.readouterr().err


def test_annealing_reaches_one_and_stays(start: Callable[..., Fit]) -> None:
    fit, blends = start(settings()), []
    for _ in range(8):
        advance(fit, 1)
        blends.append(anneal_of(fit).pop())
    assert blends == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1.0, 1.0, 1.0])
    fit = start(settings(steps=3, anneal=1.0))
    fit.run()
    assert anneal_of(fit) == {1.0}


def test_without_annealing_quantisation_is_hard_at_once(start: Callable[..., Fit]) -> None:
    fit = start(settings(anneal=0.0))
    advance(fit, 1)
    assert anneal_of(fit) == {1.0}


def test_matrices_decay_and_vectors_do_not(start: Callable[..., Fit]) -> None:
    fit = start(settings())
    matrices, vectors = fit.optimizer.param_groups
    assert all(p.ndim > 1 for p in matrices["params"])
    assert all(p.ndim == 1 for p in vectors["params"])
    names = {id(p): name for name, p in fit.model.named_parameters()}
    grouped = [names[id(p)] for group in (matrices, vectors) for p in group["params"]]
    assert sorted(grouped) == sorted(names.values())
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.1, 0.0)
    advance(fit, 4)
    assert matrices["weight_decay"] == 0.1
    advance(fit, 1)  # decay_until = 0.5 of 8 steps
    assert matrices["weight_decay"] == 0.0


def test_accumulation_is_the_same_training(start: Callable[..., Fit]) -> None:
    """2 x 2 sequences or 4 at once: one loss curve, where rounding is not in the way."""
    same = {"learning_rate": 1e-4, "warmup": 0.0, "relations": {"weight": 0.5, "split_heads": 4}}
    whole = start(settings(batch_size=4, **same))
    parts = start(settings(batch_size=2, accumulate=2, **same), task_batches(2, 2))
    order = [
        [i for batch in parts.batches._batches(0)[2 * s : 2 * s + 2] for i in batch]  # type: ignore[attr-defined]
        for s in range(4)
    ]
    whole.batches._epoch, whole.batches._order = 0, order  # type: ignore[attr-defined]
    for fit in (whole, parts):
        for module in fit.model.modules():
            if isinstance(module, BitLinear):
                module.activation_bits = None
    for one, two in zip(advance(whole, 4), advance(parts, 4), strict=True):
        assert two == pytest.approx(one, rel=1e-4)


def test_weights_are_rounded_once_a_step(
    start: Callable[..., Fit], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not by each of its micro-batches."""
    rounded: list[torch.Tensor] = []

    def counting(weight: torch.Tensor) -> torch.Tensor:
        rounded.append(weight)
        return ternary_scale(weight)

    fit = start(settings(accumulate=3), task_batches(2, 3))
    monkeypatch.setattr(quantize, "ternary_scale", counting)
    advance(fit, 2)
    assert len(rounded) == 2 * len(bit_linears(fit.model))


def test_the_teacher_does_not_move(start: Callable[..., Fit]) -> None:
    fit = start(settings())
    assert fit.objective.teacher is not None
    before = {k: v.clone() for k, v in fit.objective.teacher.state_dict().items()}
    advance(fit, 2)
    for key, value in fit.objective.teacher.state_dict().items():
        assert torch.equal(value, before[key])
        assert not fit.objective.teacher.training


# --- what cannot go on ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "key"), [("student", "distill"), ("pretrained", "pretrain"), ("teacher", "teacher")]
)
def test_a_loss_that_is_not_finite(start: Callable[..., Fit], stage: str, key: str) -> None:
    fit = start(settings(steps=10), name=stage)
    with torch.no_grad():
        fit.model.model.norm.weight.fill_(float("inf"))
    with pytest.raises(TrainingError) as caught:
        fit.run()
    message = str(caught.value)
    assert message.startswith(f"stage {stage}: the loss is not finite (ce nan")
    assert message.endswith(f"at step 10; lower {key}.learning_rate or raise {key}.warmup")


def test_weights_that_are_not_finite_never_replace_a_state(start: Callable[..., Fit]) -> None:
    """The loss of a step can be finite and its gradients not: the next loss would tell."""
    fit = start(settings())
    advance(fit, 2)
    fit.save()
    advance(fit, 1)
    with torch.no_grad():
        fit.model.model.norm.weight[0] = float("nan")
    with pytest.raises(
        TrainingError, match="the weights are not finite at step 3; lower"
    ) as caught:
        fit.save()
    assert f"the state of an earlier step is kept in {fit.state_dir}" in str(caught.value)
    again = start(settings())
    again.restore()
    assert again.step == 2
    fit.step = fit.total
    with pytest.raises(TrainingError, match="the weights are not finite"):
        fit.run()


def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(TrainingError, match=r"machine.device is cuda, but torch sees no GPU; use"):
        Hardware.resolve(Machine(device="cuda"))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(TrainingError, match=r"machine.device is mps, but torch has no Metal; use"):
        Hardware.resolve(Machine(device="mps"))
    assert Hardware.resolve(Machine()) == Hardware(torch.device("cpu"), torch.float32)


def test_compilers_start_where_something_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor.async_compile import AsyncCompile

    started: list[str] = []
    monkeypatch.setattr(AsyncCompile, "warm_pool", lambda: started.append("pool"))
    monkeypatch.setattr(AsyncCompile, "use_process_pool", lambda: started.append("workers"))
    start_compilers(Machine(device="cpu"))
    assert started == []
    start_compilers(Machine(device="cpu", compile=True))
    assert started == ["pool", "workers"]


def test_bfloat16_arithmetic_keeps_fp32_weights(start: Callable[..., Fit]) -> None:
    fit = start(settings())
    fit.hardware = Hardware.resolve(Machine(device="cpu", precision="bfloat16"))
    terms = advance(fit, 1)[0]
    assert all(math.isfinite(value) for value in terms.values())
    assert {p.dtype for p in fit.model.parameters()} == {torch.float32}


# --- what the machine's switches may not change ---------------------------------------------------


@pytest.mark.parametrize("states", ["projection", "attention"])
def test_recomputing_activations_changes_nothing(start: Callable[..., Fit], states: str) -> None:
    options = settings(relations={"weight": 1.0, "split_heads": 4, "states": states})
    plain, recomputed = start(options), start(options, recompute=True)
    assert advance(plain, 3) == advance(recomputed, 3)
    for name, value in weights(plain).items():
        assert torch.equal(weights(recomputed)[name], value), name


def test_integer_products_begin_when_annealing_ends(start: Callable[..., Fit]) -> None:
    def integer(fit: Fit) -> set[bool]:
        return {m.integer for m in fit.model.modules() if isinstance(m, BitLinear)}

    fit, plain = start(settings(anneal=0.5), integer_forward=True), start(settings(anneal=0.5))
    states = []
    for _ in range(5):
        advance(fit, 1)
        states.append(integer(fit))
    assert states == [{False}] * 3 + [{True}] * 2  # whole at step 4 of 8
    advance(plain, 5)
    for (name, a), b in zip(weights(fit).items(), weights(plain).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5, msg=name)
    fit.run()
    assert integer(fit) == {False}  # nothing of the training stays on the model


def test_a_teacher_in_16_bits_keeps_its_angles(start: Callable[..., Fit]) -> None:
    """bf16 frequencies would turn a position of hundreds by half a radian."""
    fit = start(settings(), precision="bfloat16")
    assert fit.objective.teacher is not None
    rotary = fit.objective.teacher.model.rotary_emb.inv_freq
    assert rotary.dtype == torch.float32
    assert torch.equal(rotary, fit.objective.student.model.rotary_emb.inv_freq)
    assert fit.objective.teacher.lm_head.weight.dtype == torch.bfloat16


def test_micro_batches_without_labels_do_not_dilute_the_labels(start: Callable[..., Fit]) -> None:
    """Devices that hold none add nothing to what cross-entropy is divided by."""
    fit = start(settings(relations={"weight": 0.0}))
    (batch,) = fit.batches.window(0)
    none = batch | {"labels": batch["labels"].where(batch["labels"] < 0, UNLABELLED)}
    counted = fit._counts([batch])
    assert fit._counts([batch, none]).answers == counted.answers
    alone = count_window([none], fit.objective.relations)
    assert alone.answers == 0
    assert alone.compared == counted.compared
    assert prepare(none, alone)["scales"][0] == 0
