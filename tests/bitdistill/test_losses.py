"""The losses against independent NumPy references and values derived by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from bitdistill import losses
from bitdistill.data import IGNORED
from bitdistill.losses import chunk_terms, chunk_tokens, head_terms, relation_sum
from bitdistill.schema import LogitsLoss, RelationLoss


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    terms = np.zeros_like(p)
    real = p > 0
    terms[real] = p[real] * (np.log(p[real]) - np.log(q[real]))
    return terms.sum(-1)


ONE = torch.ones(())


def terms_of(
    student: torch.Tensor,
    targets: torch.Tensor,
    teacher: torch.Tensor | None = None,
    options: LogitsLoss | None = None,
) -> tuple[float, float]:
    """Unweighted cross-entropy and KL of logits given as they are."""
    ce, kl, _ = chunk_terms(student, targets, teacher, ONE, ONE, options or LogitsLoss())
    return float(ce), float(kl)


def test_cross_entropy_by_hand() -> None:
    logits = torch.tensor([[0.0, math.log(3.0)], [0.0, 0.0], [5.0, 1.0]])
    # softmax is (1/4, 3/4) and (1/2, 1/2); the third row does not count
    value, kl_value = terms_of(logits, torch.tensor([1, 0, IGNORED]))
    assert value == pytest.approx(math.log(4 / 3) + math.log(2), rel=1e-6)
    assert kl_value == 0


def test_logits_kl_by_hand_and_the_tau_switch() -> None:
    student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 2 * math.log(3.0)]])
    options = LogitsLoss(weight=1, temperature=2.0)
    # teacher softmax at tau 2 is (1/4, 3/4), student (1/2, 1/2)
    expected = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    target = torch.tensor([0])
    assert terms_of(student, target, teacher, options)[1] == pytest.approx(expected, rel=1e-5)
    squared = options.model_copy(update={"tau_squared": True})
    assert terms_of(student, target, teacher, squared)[1] == pytest.approx(4 * expected, rel=1e-5)


def autograd_loss(
    hidden: torch.Tensor, head: torch.Tensor, teacher_logits: torch.Tensor, options: LogitsLoss
) -> torch.Tensor:
    """0.3 CE + 0.2 KL of the rows that count, written plainly for autograd."""
    logits, kept = hidden @ head.T, TARGETS != IGNORED
    ce = F.cross_entropy(logits[kept], TARGETS[kept], reduction="sum")
    tau = options.temperature
    kl_sum = F.kl_div(
        F.log_softmax(logits[kept] / tau, -1),
        F.softmax(teacher_logits[kept] / tau, -1),
        reduction="sum",
    )
    return 0.3 * ce + 0.2 * kl_sum * (tau**2 if options.tau_squared else 1)


TARGETS = torch.tensor([3, 0, IGNORED, 49, 7, IGNORED, 11, 12, 13, 14, 15])


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("elements", [1, 5 * 50, 1000 * 50])
def test_head_loss_equals_autograd_for_every_chunk(
    monkeypatch: pytest.MonkeyPatch, elements: int, squared: bool
) -> None:
    monkeypatch.setitem(losses.CHUNK_ELEMENTS, "plain", elements)
    generator = torch.Generator().manual_seed(0)
    hidden, head, teacher, teacher_head = (
        torch.randn(rows, 8, generator=generator, dtype=torch.float64) for rows in (11, 50, 11, 50)
    )
    options = LogitsLoss(weight=1.0, temperature=3.0, tau_squared=squared)
    mine, plain = ([x.clone().requires_grad_() for x in (hidden, head)] for _ in range(2))
    weights = torch.tensor(0.3), torch.tensor(0.2)
    terms = head_terms(*mine, TARGETS, options, *weights, teacher, teacher_head)
    expected = autograd_loss(*plain, teacher @ teacher_head.T, options)
    (2 * terms.loss).backward()  # the upstream factor must arrive
    (2 * expected).backward()
    torch.testing.assert_close(terms.loss.detach(), expected.detach(), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(terms.ce + terms.kl, terms.loss.detach())
    for a, b in zip(mine, plain, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=1e-9)


class Largest(TorchDispatchMode):
    """The most elements that any tensor had which an operation gave."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = func(*args, **(kwargs or {}))
        for tensor in given if isinstance(given, tuple | list) else (given,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return given


@pytest.mark.parametrize(("elements", "largest"), [(5 * 500, 4 * 500), (1 << 20, 16 * 500)])
def test_no_tensor_is_larger_than_a_chunk(
    monkeypatch: pytest.MonkeyPatch, elements: int, largest: int
) -> None:
    """Of 16 rows: a quarter of their logits at a time, or all where there is room."""
    monkeypatch.setitem(losses.CHUNK_ELEMENTS, "plain", elements)
    hidden, head = (torch.randn(rows, 2, requires_grad=True) for rows in (16, 500))
    teacher = torch.randn(16, 3), torch.randn(500, 3)
    with Largest() as seen:
        options = LogitsLoss(weight=1.0)
        head_terms(hidden, head, torch.arange(16), options, ONE, ONE, *teacher).loss.backward()
    assert seen.elements == largest


@pytest.mark.parametrize(
    ("rows", "vocabulary", "fused", "expected"),
    [
        (16384, 151936, True, 8192),  # 32 x 512 tokens of Qwen3
        (16384, 151936, False, 256),
        (32, 49152, True, 32),
        (11, 1 << 26, False, 1),
        (0, 50, False, 1),
    ],
)
def test_chunks_are_equal(rows: int, vocabulary: int, fused: bool, expected: int) -> None:
    assert chunk_tokens(rows, vocabulary, fused) == expected


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


def test_relations_stay_within_a_document() -> None:
    """Two documents in one row give what they give in rows of their own."""
    options = RelationLoss(weight=1, split_heads=2)
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 4, 8, generator=generator) for _ in range(2))
    apart = relation_sum((student,), (teacher,), torch.ones(2, 4, dtype=torch.long), options)
    packed, ones = [x.view(1, 8, 8) for x in (student, teacher)], torch.ones(1, 8)
    documents = torch.tensor([[0] * 4 + [1] * 4])
    within = relation_sum((packed[0],), (packed[1],), ones, options, documents)
    torch.testing.assert_close(within, apart)
    across = relation_sum((packed[0],), (packed[1],), ones, options)
    assert not torch.allclose(across, apart)


def test_split_heads_must_divide() -> None:
    x = torch.zeros(1, 2, 10)
    with pytest.raises(ValueError, match="split_heads = 4 does not divide the width 10"):
        relation_sum((x,), (x,), torch.ones(1, 2), RelationLoss(weight=1, split_heads=4))


def test_relations_are_compared_in_fp32_in_mixed_precision() -> None:
    torch.manual_seed(0)
    states = 4 * torch.randn(2, 12, 48)
    for options in (RelationLoss(split_heads=3), RelationLoss(split_heads=3, scaling="normalised")):
        exact = losses.relation_logits(states, options)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert (states @ states.mT).dtype == torch.bfloat16
            assert torch.equal(losses.relation_logits(states, options), exact)
