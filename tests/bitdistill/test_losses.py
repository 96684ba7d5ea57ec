"""The losses against independent NumPy references and values derived by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from bitdistill import losses
from bitdistill.losses import cross_entropy_sum, logits_kl_sum, relation_sum, token_terms
from bitdistill.schema import LogitsLoss, RelationLoss


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    terms = np.zeros_like(p)
    real = p > 0
    terms[real] = p[real] * (np.log(p[real]) - np.log(q[real]))
    return terms.sum(-1)


def test_cross_entropy_by_hand() -> None:
    logits = torch.tensor([[0.0, math.log(3.0)], [0.0, 0.0]])
    # softmax is (1/4, 3/4) and (1/2, 1/2)
    value = float(cross_entropy_sum(logits, torch.tensor([1, 0])))
    assert value == pytest.approx(math.log(4 / 3) + math.log(2), rel=1e-6)


def test_logits_kl_by_hand_and_the_tau_switch() -> None:
    student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 2 * math.log(3.0)]])
    options = LogitsLoss(weight=1, temperature=2.0)
    # teacher softmax at tau 2 is (1/4, 3/4), student (1/2, 1/2)
    expected = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert float(logits_kl_sum(student, teacher, options)) == pytest.approx(expected, rel=1e-5)
    squared = options.model_copy(update={"tau_squared": True})
    assert float(logits_kl_sum(student, teacher, squared)) == pytest.approx(4 * expected, rel=1e-5)


def test_chunks_do_not_change_values_or_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    head, teacher_head = nn.Linear(8, 50), nn.Linear(8, 50)
    hidden, targets = torch.randn(23, 8), torch.randint(0, 50, (23,))
    teacher = torch.randn(23, 8)
    options = LogitsLoss(weight=1.0, temperature=3.0)

    def run(chunk: int) -> tuple[float, float, torch.Tensor]:
        monkeypatch.setattr(losses, "CHUNK_TOKENS", chunk)
        x = hidden.clone().requires_grad_()
        terms = token_terms(x, head, targets, options, teacher, teacher_head)
        (terms.ce + terms.kl).backward()
        assert x.grad is not None
        return terms.ce.item(), terms.kl.item(), x.grad

    whole, parts = run(1000), run(5)
    assert parts[0] == pytest.approx(whole[0], rel=1e-6)
    assert parts[1] == pytest.approx(whole[1], rel=1e-5)
    torch.testing.assert_close(parts[2], whole[2])


def numpy_relations(
    student: np.ndarray, teacher: np.ndarray, real: np.ndarray, options: RelationLoss
) -> float:
    """Sum over tokens of the KL between relations, loop by loop."""
    total = 0.0
    heads = options.split_heads
    for b in range(student.shape[0]):
        for t in range(student.shape[1]):
            if options.mask and not real[b, t]:
                continue
            for h in range(heads):
                rows = []
                for states in (teacher, student):
                    width = states.shape[2] // heads
                    a = states[b, :, h * width : (h + 1) * width]
                    if options.scaling == "normalised":
                        a = a / np.linalg.norm(a, axis=-1, keepdims=True)
                        scores = a[t] @ a.T / options.temperature
                    else:
                        scores = a[t] @ a.T / math.sqrt(width)
                    if options.mask:
                        scores = np.where((np.arange(len(a)) <= t) & real[b], scores, -np.inf)
                    rows.append(softmax(scores))
                total += float(kl(rows[0], rows[1])) / heads
    return total / heads if options.divide_by_heads else total


@pytest.mark.parametrize(
    "options",
    [
        RelationLoss(weight=1, split_heads=4),
        RelationLoss(weight=1, split_heads=2, mask=False),
        RelationLoss(weight=1, split_heads=4, scaling="normalised", temperature=0.5, mask=False),
        RelationLoss(weight=1, split_heads=4, divide_by_heads=True),
    ],
)
def test_relations_match_numpy(options: RelationLoss) -> None:
    generator = torch.Generator().manual_seed(3)
    # teacher and student differ in width, as they may
    student = [torch.randn(2, 5, 16, generator=generator) for _ in range(3)]
    teacher = [torch.randn(2, 5, 24, generator=generator) for _ in range(3)]
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    value = float(relation_sum(tuple(student), tuple(teacher), mask, options))
    expected = sum(
        numpy_relations(s.double().numpy(), t.double().numpy(), mask.numpy() > 0, options)
        for s, t in zip(student, teacher, strict=True)
    )
    assert value == pytest.approx(expected, rel=2e-5)


def test_relations_by_hand() -> None:
    """Two tokens, one head of width 1: the second token relates to both, the first to itself."""
    options = RelationLoss(weight=1, split_heads=1)
    student = torch.zeros(1, 2, 1)  # relations (1/2, 1/2)
    teacher = torch.tensor([[[3.0], [1.0]]])  # a2.a1 = 3, a2.a2 = 1
    p = np.exp([3.0, 1.0]) / np.exp([3.0, 1.0]).sum()
    expected = float((p * np.log(p / 0.5)).sum())
    mask = torch.ones(1, 2, dtype=torch.long)
    value = float(relation_sum((student,), (teacher,), mask, options))
    assert value == pytest.approx(expected, rel=1e-5)


def test_padding_does_not_change_relations() -> None:
    options = RelationLoss(weight=1, split_heads=2)
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(1, 4, 8, generator=generator) for _ in range(2))
    short = relation_sum((student,), (teacher,), torch.ones(1, 4, dtype=torch.long), options)
    padded = [torch.cat([x, 50 * torch.ones(1, 3, 8)], 1) for x in (student, teacher)]
    mask = torch.tensor([[1, 1, 1, 1, 0, 0, 0]])
    longer = relation_sum((padded[0],), (padded[1],), mask, options)
    torch.testing.assert_close(longer, short)


def test_split_heads_must_divide() -> None:
    x = torch.zeros(1, 2, 10)
    with pytest.raises(ValueError, match="split_heads = 4 does not divide the width 10"):
        relation_sum((x,), (x,), torch.ones(1, 2), RelationLoss(weight=1, split_heads=4))
