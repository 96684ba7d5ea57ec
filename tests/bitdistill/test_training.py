"""The loop: schedule, learning, exact resumption, and what is refused rather than written."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bitdistill import manifest
from bitdistill.config import Distillation, Machine, Training
from bitdistill.data import Batches, Encoded, PackedBatches, TaskBatches, TextStream
from bitdistill.objective import make_objective
from bitdistill.progress import Reporter
from bitdistill.quantize import BitLinear
from bitdistill.student import make_student
from bitdistill.training import Fit, Hardware, TrainingError, discard_state, schedule, total_steps

CPU = Machine(device="cpu", precision="float32")
TEXTS = [f"the film {i} is not {w} but very {v}" for i, w in enumerate("good bad dull".split())
         for v in ("bright", "good")]  # fmt: skip


def settings(**values: Any) -> Distillation:
    """A distillation with every term, annealing and weight decay that ends halfway."""
    return Distillation.model_validate(
        {
            "steps": 8,
            "batch_size": 2,
            "learning_rate": 3e-3,
            "warmup": 0.25,
            "weight_decay": 0.1,
            "decay_until": 0.5,
            "anneal": 0.75,
            "logits": {"weight": 1.0, "temperature": 2.0},
            "relations": {"target_ratio": 0.5, "split_heads": 4},
        }
        | values
    )


def task_batches(size: int = 2, accumulate: int = 1) -> TaskBatches:
    generator = torch.Generator().manual_seed(0)
    rows = [
        Encoded(torch.randint(3, 200, (6 + i % 5,), generator=generator).tolist(), 1 + i % 3)
        for i in range(16)
    ]
    return TaskBatches(rows, 0, size, accumulate)


@pytest.fixture
def start(make_teacher: Callable[..., Any], tokenizer: Any, tmp_path: Path) -> Callable[..., Fit]:
    """`start(settings, data, name)`: a Fit of a fresh tiny student; `data`: task or packed."""

    def make(options: Training, data: str | Batches = "task", name: str = "student") -> Fit:
        teacher = make_teacher("qwen3")
        torch.manual_seed(1)
        if data == "packed":
            streams = [TextStream(TEXTS), TextStream(TEXTS[::-1])]
            data = PackedBatches(streams, tokenizer, 8, options.batch_size, options.accumulate)
        elif data == "task":
            data = task_batches(options.batch_size, options.accumulate)
        assert not isinstance(data, str)
        return Fit(
            name,
            make_objective(make_student(teacher), teacher, options),
            data,
            options,
            CPU,
            Reporter(tmp_path / "log.jsonl", quiet=True),
            tmp_path / f"{name}.training",
        )

    return make


def advance(fit: Fit, steps: int) -> list[dict[str, float]]:
    """Steps as `run` takes them, with each one's terms."""
    terms = []
    for _ in range(steps):
        sums: dict[str, torch.Tensor] = {}
        fit.optimize(fit.batches.window(fit.step), sums)
        fit.step += 1
        terms.append({key: float(value) for key, value in sums.items()})
    return terms


def weights(fit: Fit) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in fit.model.named_parameters()}


def anneal_of(fit: Fit) -> set[float]:
    return {float(m.anneal) for m in fit.model.modules() if isinstance(m, BitLinear)}


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
        total_steps(Training(epochs=1), PackedBatches([TextStream(TEXTS)], tokenizer, 8, 2))


# --- learning -------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", ["task", "packed"])
def test_the_loss_falls(start: Callable[..., Fit], data: str, tmp_path: Path) -> None:
    fit = start(settings(steps=40, anneal=0.0, batch_size=4), data)
    last = fit.run()
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [10, 20, 30, 40]
    assert {"ce", "logits", "relations", "learning_rate", "tokens_per_second"} <= set(records[0])
    assert last == {key: records[-1][key] for key in ("ce", "logits", "relations")}
    assert sum(last.values()) < 0.5 * sum(records[0][key] for key in last)
    assert not fit.model.training


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
    order = [[i for batch in parts.batches._batches(0)[2 * s : 2 * s + 2] for i in batch]  # type: ignore[attr-defined]
             for s in range(4)]  # fmt: skip
    whole.batches._epoch, whole.batches._order = 0, order  # type: ignore[attr-defined]
    for fit in (whole, parts):
        for module in fit.model.modules():
            if isinstance(module, BitLinear):
                module.activation_bits = None
    for one, two in zip(advance(whole, 4), advance(parts, 4), strict=True):
        assert two == pytest.approx(one, rel=1e-4)


def test_the_teacher_does_not_move(start: Callable[..., Fit]) -> None:
    fit = start(settings())
    assert fit.objective.teacher is not None
    before = {k: v.clone() for k, v in fit.objective.teacher.state_dict().items()}
    advance(fit, 2)
    for key, value in fit.objective.teacher.state_dict().items():
        assert torch.equal(value, before[key])
        assert not fit.objective.teacher.training


# --- checkpoints ----------------------------------------------------------------------------------


@pytest.mark.parametrize("data", ["task", "packed"])
@pytest.mark.parametrize("stop", [3, 7])
def test_a_resumed_run_is_the_uninterrupted_one(
    start: Callable[..., Fit], data: str, stop: int
) -> None:
    """Bit for bit: weights, optimizer, data, annealing, relation weight and random state."""
    options = settings()
    whole, part = start(options, data), start(options, data)
    for fit in (whole, part):
        fit.objective.fit_relation_weight(fit.batches.window(0))
    expected = advance(whole, 8)
    advance(part, stop)
    random = torch.get_rng_state()
    part.save()
    torch.manual_seed(99)
    rest = start(options, data)
    rest.restore()
    assert torch.equal(torch.get_rng_state(), random)
    assert rest.step == stop
    assert rest.objective.relation_weight == part.objective.relation_weight
    assert advance(rest, 8 - stop) == expected[stop:]
    final = weights(whole)
    for name, value in weights(rest).items():
        assert torch.equal(value, final[name]), name
    assert anneal_of(rest) == anneal_of(whole)


def test_run_continues_where_it_was_saved(
    start: Callable[..., Fit], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through `run` itself: its own saves, the relation weight not fitted again."""
    options = settings(steps=20)
    whole = start(options, "packed")
    terms = whole.run()
    part = start(options, "packed")
    part.machine = Machine(device="cpu", save_minutes=1e-9)
    optimize = Fit.optimize

    def interrupted(self: Fit, window: Any, sums: Any) -> None:
        if self.step == 14:
            raise KeyboardInterrupt
        optimize(self, window, sums)

    monkeypatch.setattr(Fit, "optimize", interrupted)
    with pytest.raises(KeyboardInterrupt):
        part.run()
    monkeypatch.undo()
    rest = start(options, "packed")
    rest.restore()
    assert rest.step == 10
    assert rest.run() == terms
    final = weights(whole)
    assert all(torch.equal(value, final[name]) for name, value in weights(rest).items())


def test_a_state_of_the_last_step_is_complete(start: Callable[..., Fit]) -> None:
    fit = start(settings(steps=4))
    advance(fit, 4)
    fit.save()
    again = start(settings(steps=4))
    again.restore()
    assert again.run() == {}
    assert not again.model.training


def test_an_interrupted_save_leaves_the_old_state(
    start: Callable[..., Fit], monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = start(settings())
    advance(fit, 2)
    fit.save()
    kept = weights(fit)
    advance(fit, 1)

    def full(*args: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(manifest, "write_json", full)
    with pytest.raises(OSError, match="no space left"):
        fit.save()
    monkeypatch.undo()
    assert [p.name for p in fit.state_dir.parent.glob("*.partial")] == []
    again = start(settings())
    again.restore()
    assert again.step == 2
    assert all(torch.equal(value, kept[name]) for name, value in weights(again).items())


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "position.json"])
@pytest.mark.parametrize("damage", ["truncated", "altered", "removed"])
def test_a_damaged_state_is_refused(start: Callable[..., Fit], file: str, damage: str) -> None:
    fit = start(settings())
    advance(fit, 1)
    fit.save()
    path = fit.state_dir / file
    content = path.read_bytes()
    if damage == "removed":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(content[:-5])
    else:
        path.write_bytes(content[:-5] + bytes([content[-5] ^ 1]) + content[-4:])
    with pytest.raises(manifest.FormatError, match=file):
        start(settings()).restore()
    assert fit.state_dir.is_dir()


def test_the_state_of_another_run_is_refused(start: Callable[..., Fit]) -> None:
    fit = start(settings())
    advance(fit, 1)
    fit.save()
    with pytest.raises(TrainingError, match=r"state of another run \(total differ\); continue"):
        start(settings(steps=9)).restore()
    other = start(settings())
    other.fingerprint = "changed"
    with pytest.raises(TrainingError, match=r"\(fingerprint differ\).*or remove it to start stage"):
        other.restore()
    content = json.loads((fit.state_dir / manifest.MANIFEST).read_text())
    (fit.state_dir / manifest.MANIFEST).write_text(json.dumps(content | {"format_version": 0}))
    with pytest.raises(manifest.FormatError, match="format version 0, this bitdistill reads 1"):
        start(settings()).restore()


def test_discarding_a_state_twice_is_harmless(start: Callable[..., Fit]) -> None:
    fit = start(settings())
    advance(fit, 1)
    fit.save()
    discard_state(fit.state_dir)
    assert not fit.state_dir.exists()
    discard_state(fit.state_dir)


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


def test_bfloat16_arithmetic_keeps_fp32_weights(start: Callable[..., Fit]) -> None:
    fit = start(settings())
    fit.hardware = Hardware.resolve(Machine(device="cpu", precision="bfloat16"))
    terms = advance(fit, 1)[0]
    assert all(math.isfinite(value) for value in terms.values())
    assert {p.dtype for p in fit.model.parameters()} == {torch.float32}
