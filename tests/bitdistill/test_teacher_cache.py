"""What a teacher said, from the disk: the loss it defines, and that nothing is asked twice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from short_runs import log_of, settings, task_batches
from torch.nn import functional as F

from bitdistill import losses, teacher_cache
from bitdistill.config import ConfigError
from bitdistill.data import IGNORED, Batch
from bitdistill.distributed import World
from bitdistill.hardware import Hardware
from bitdistill.losses import Top, head_terms
from bitdistill.objective import make_objective
from bitdistill.prepare import count_window, prepare
from bitdistill.recipe import train
from bitdistill.schema import Config, Distillation, LogitsLoss
from bitdistill.student import make_student
from bitdistill.teacher_cache import Questions, Remembering, TeacherCache, remember

TAU = 3.0
OPTIONS = LogitsLoss(weight=1.0, temperature=TAU, tau_squared=True)
TARGETS = torch.tensor([3, 0, IGNORED, 49, 7])
CPU = Hardware(torch.device("cpu"), torch.float32)


def top_of(logits: torch.Tensor, k: int) -> Top:
    top = logits.topk(k)
    return Top(top.values, top.indices, (logits / TAU).logsumexp(-1))


def random_head(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = (5, 8), (50, 8)
    return tuple(torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)  # type: ignore[return-value]


def coarse_loss(logits: torch.Tensor, teacher: torch.Tensor, k: int) -> torch.Tensor:
    """0.3 CE + 0.2 tau^2 KL of the teacher's k largest and the rest, written plainly."""
    kept = TARGETS != IGNORED
    ce = F.cross_entropy(logits[kept], TARGETS[kept], reduction="sum")
    kl = logits.new_zeros(())
    for z, t in zip(logits[kept], teacher[kept], strict=True):
        s, p = F.softmax(z / TAU, -1), F.softmax(t / TAU, -1)
        known = t.topk(k).indices
        other = torch.ones_like(p, dtype=torch.bool).index_fill(0, known, False)
        groups = [(p[i], s[i]) for i in known]
        groups += [(p[other].sum(), s[other].sum())] if k < len(p) else []
        kl = kl + sum((a * (a / b).log() for a, b in groups), logits.new_zeros(()))
    return 0.3 * ce + 0.2 * TAU**2 * kl


@pytest.mark.parametrize("k", [1, 4, 50])
def test_top_and_rest_against_autograd(k: int) -> None:
    """The loss and both gradients; with the whole vocabulary it is the full KL."""
    teacher = torch.mm(*(x if i == 0 else x.T for i, x in enumerate(random_head(1))))
    mine, plain = ([x.clone().requires_grad_() for x in random_head(0)] for _ in range(2))
    weights = torch.tensor(0.3), torch.tensor(0.2)
    terms = head_terms(*mine, TARGETS, OPTIONS, *weights, top=top_of(teacher, k))
    expected = coarse_loss(plain[0] @ plain[1].T, teacher, k)
    terms.loss.backward()
    expected.backward()
    torch.testing.assert_close(terms.loss.detach(), expected.detach(), rtol=1e-6, atol=1e-7)
    for a, b in zip(mine, plain, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=1e-7)
    full = head_terms(*random_head(0), TARGETS, OPTIONS, *weights, *random_head(1))
    if k == 50:
        torch.testing.assert_close(terms.kl, full.kl, rtol=1e-6, atol=1e-9)
    else:
        assert 0 < float(terms.kl) < float(full.kl)


def test_rows_that_pad_the_teachers_head_are_not_remembered(
    make_teacher: Callable[..., Any], tmp_path: Path
) -> None:
    student = make_student(make_teacher("qwen3"))
    rows = len(student.lm_head.weight)
    wide = make_teacher("qwen3", seed=1, vocab_size=rows + 28)
    with torch.no_grad():
        wide.lm_head.weight[rows:] = 5 * wide.lm_head.weight[:28]  # they would be the likeliest
    options = settings(cache=8, relations={"weight": 0.0})
    batches, _ = remember(
        tmp_path, "teacher", (student, wide), task_batches(), options, None, CPU, World()
    )
    (batch,) = batches.window(0)
    assert int(batch["top_ids"].max()) < rows
    assert bool((batch["top_logits"].logsumexp(-1) > 0).any())


def cached(
    make_teacher: Callable[..., Any], path: Path, options: Distillation
) -> tuple[Any, Remembering, int | None]:
    teacher = make_teacher("qwen3", seed=1)
    student = make_student(make_teacher("qwen3"))
    found = remember(
        path, "teacher", (student, teacher), task_batches(), options, None, CPU, World()
    )
    return student, *found


def terms_of(objective: Any, batch: Batch) -> tuple[dict[str, float], torch.Tensor]:
    counts = count_window([batch], objective.relations)
    loss, terms = objective(prepare(batch, counts))
    loss.backward()
    gradient = objective.student.model.layers[0].mlp.up_proj.weight.grad
    return {name: float(term) for name, term in terms.items()}, gradient


@pytest.mark.parametrize("states", ["projection", "attention"])
def test_a_remembered_teacher_is_the_teacher(
    make_teacher: Callable[..., Any],
    tmp_path: Path,
    states: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    relations = {"weight": 1.0, "split_heads": 4, "states": states}
    options = settings(cache=10_000, relations=relations)
    monkeypatch.setitem(losses.CHUNK_ELEMENTS, "plain", 2000)  # logits of a few tokens at once
    student, batches, layer = cached(make_teacher, tmp_path, options)
    (batch,) = batches.window(0)
    remembering = make_objective(student, None, options, None, layer)
    terms, gradient = terms_of(remembering, batch)
    (plain,) = task_batches().window(0)
    assert plain.keys() < batch.keys()
    other = make_student(make_teacher("qwen3"))
    live = make_objective(other, make_teacher("qwen3", seed=1), options)
    expected, live_gradient = terms_of(live, plain)
    assert terms == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(gradient, live_gradient, rtol=1e-4, atol=1e-6)
    student.zero_grad()
    remembering.compile(backend="aot_eager")
    compiled, _ = terms_of(remembering, batch)
    assert compiled == pytest.approx(terms, rel=1e-5)


def test_only_what_is_missing_is_asked(
    make_teacher: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a run that was killed, after damage, and with nothing to do."""
    monkeypatch.setattr(teacher_cache, "SHARD", 3)
    asked: list[int] = []
    ask = Questions.ask

    def counting(self: Questions, rows: Any, pad: int) -> Any:
        asked.append(len(rows))
        if len(asked) == stop:
            raise KeyboardInterrupt
        return ask(self, rows, pad)

    monkeypatch.setattr(Questions, "ask", counting)
    options, stop = settings(cache=4), 4
    with pytest.raises(KeyboardInterrupt):
        cached(make_teacher, tmp_path, options)
    assert asked == [3, 3, 3, 3]  # of 16 examples; the last three are not on the disk
    asked.clear()
    stop = 0
    _, batches, _ = cached(make_teacher, tmp_path, options)
    assert sum(asked) == 16 - 9
    first = batches.window(0)[0]
    asked.clear()
    (damaged, *_) = sorted(tmp_path.glob("*/*.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:200])
    _, batches, _ = cached(make_teacher, tmp_path, options)
    assert asked == [3]
    again = batches.window(0)[0]
    assert first.keys() == again.keys()
    for name, value in first.items():
        torch.testing.assert_close(again[name], value)
    asked.clear()
    cached(make_teacher, tmp_path, options)
    assert asked == []
    cached(make_teacher, tmp_path, settings(cache=5))  # another question: another directory
    assert sum(asked) == 16


def test_devices_share_the_questions(
    make_teacher: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each writes every other shard of one list; together they hold every example once."""
    monkeypatch.setattr(teacher_cache, "SHARD", 3)
    rows, teacher = task_batches().rows, make_teacher("qwen3")
    caches = [TeacherCache(tmp_path) for _ in range(2)]
    questions = Questions(teacher, None, settings(cache=4), None, CPU, 10**6)

    class Waiting(World):
        def gather(self, value: Any) -> list[Any]:
            if self.rank == 0:  # the other device looks before this one writes
                caches[1].fill(rows, 0, questions, Waiting(1, 2))
            return [value] * 2

        def any(self, flag: bool) -> bool:
            return flag

    assert caches[0].fill(rows, 0, questions, Waiting(0, 2)) == 16
    names = sorted(file.name for file in tmp_path.glob("*.safetensors"))
    assert names == [f"shard-{number:05d}.safetensors" for number in range(6)]
    whole = TeacherCache(tmp_path)
    assert whole.fill(rows, 0, questions, World()) == 0


def test_a_recipe_with_a_cache(recipe: Callable[..., Config], tmp_path: Path) -> None:
    """The losses of the run that asks its teacher in every step, for three epochs."""
    options = ["distill.steps=18", "distill.learning_rate=1e-5", "distill.anneal=0"]
    train(recipe(*options), tmp_path / "live", quiet=True)
    train(recipe(*options, "distill.cache=400"), tmp_path / "kept", quiet=True)
    assert list((tmp_path / "kept" / "teacher-cache").glob("*/shard-00000.safetensors"))
    live, kept = (log_of(tmp_path / name) for name in ("live", "kept"))
    assert len(live) == len(kept)
    for one, two in zip(live, kept, strict=True):
        for term in ("ce", "logits", "relations") if one["stage"] == "student" else ("ce",):
            assert two[term] == pytest.approx(one[term], rel=2e-3, abs=1e-7)


def test_what_cannot_be_remembered(recipe: Callable[..., Config]) -> None:
    message = "cache must be 0 for a corpus, mixtures, prompt_weight and alignment"
    with pytest.raises(ValidationError, match=message):
        settings(cache=4, mixtures=1)
    with pytest.raises(ConfigError, match=message):
        recipe("pretrain.cache=4")
