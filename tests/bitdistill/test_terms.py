"""The terms beyond the paper's: candidates, prompts, unlabelled answers, alignment, mixtures."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from bitdistill.alignment import EPS, Alignment, Streams, alignment_sum
from bitdistill.data import IGNORED, UNLABELLED, Batch, TaskBatches, collate
from bitdistill.encoding import Encoded
from bitdistill.feeds import candidates
from bitdistill.mixtures import Mixtures, mixtures
from bitdistill.objective import make_objective
from bitdistill.prepare import count_window, prepare
from bitdistill.schema import Config, Distillation, RelationLoss, Training
from bitdistill.student import layers_of, make_student
from bitdistill.tasks import TASKS, Example

NO_RELATIONS = RelationLoss()


def make_batch() -> Batch:
    """A labelled and an unlabelled example of 6 and 4 tokens, one answer token each."""
    rows = [Encoded([5, 6, 7, 8, 9, 11], 1), Encoded([4, 3, 2, 12], 1, labelled=False)]
    return collate(rows, pad=1, multiple=8)


def terms_and_logits(
    make_teacher: Callable[..., Any], settings: dict[str, Any], chosen: list[int] | None = None
) -> tuple[dict[str, float], torch.Tensor, torch.Tensor]:
    """The objective's terms, and both models' logits (B, T, V) of the same batch."""
    student, teacher = make_student(make_teacher("qwen3", seed=1)), make_teacher("qwen3")
    options = Distillation.model_validate({"steps": 1} | settings)
    objective = make_objective(student, teacher, options, chosen)
    batch = make_batch()
    _, terms = objective(prepare(batch, count_window([batch], NO_RELATIONS)))
    objective.release()
    with torch.no_grad():
        logits = [
            m(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            for m in (student, teacher)
        ]
    return {name: float(value) for name, value in terms.items()}, *logits


def kl(teacher: torch.Tensor, student: torch.Tensor, tau: float) -> float:
    p, q = ((x.double() / tau).log_softmax(-1) for x in (teacher, student))
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_unlabelled_answers_are_compared_but_not_learnt(make_teacher: Callable[..., Any]) -> None:
    logits = {"logits": {"weight": 2.0, "temperature": 3.0}}
    terms, mine, theirs = terms_and_logits(make_teacher, logits)
    assert terms["ce"] == pytest.approx(F.cross_entropy(mine[0, 4], torch.tensor(11)).item(), 1e-4)
    # the rows before the answers: the labelled one's fifth token, the other's third
    rows = [0, 1], [4, 2]
    assert terms["logits"] == pytest.approx(2 * kl(theirs[rows], mine[rows], 3.0), rel=1e-3)


def test_candidates_compete_among_themselves(make_teacher: Callable[..., Any]) -> None:
    chosen = [12, 11, 40]
    logits = {"logits": {"weight": 1.0, "temperature": 2.0}}
    terms, mine, theirs = terms_and_logits(make_teacher, logits, chosen)
    expected = F.cross_entropy(mine[0, 4, chosen], torch.tensor(1)).item()
    assert terms["ce"] == pytest.approx(expected, rel=1e-4)
    rows = [0, 1], [4, 2]
    student, teacher = mine[rows][:, chosen], theirs[rows][:, chosen]
    assert terms["logits"] == pytest.approx(kl(teacher, student, 2.0), rel=1e-3)


def test_the_prompts_own_tokens(make_teacher: Callable[..., Any]) -> None:
    logits = {"logits": {"prompt_weight": 0.5, "temperature": 2.0}}
    terms, mine, theirs = terms_and_logits(make_teacher, logits)
    # all but those before an answer, before padding, and the padding
    rows = [0] * 4 + [1] * 2, [0, 1, 2, 3, 0, 1]
    assert terms["prompt"] == pytest.approx(0.5 * kl(theirs[rows], mine[rows], 2.0), rel=1e-3)
    assert "logits" not in terms


def test_alignment_by_hand() -> None:
    generator = np.random.default_rng(0)
    s, t = generator.standard_normal((2, 2, 3, 4)).astype(np.float32)
    gain = np.array([1.0, 0.0, 2.0, 0.5], np.float32)
    mask = np.array([[1, 1, 0], [1, 0, 0]])
    total = 0.0
    for b, k in ((0, 0), (0, 1), (1, 0)):
        mine, theirs = (gain * x[b, k] / np.sqrt((x[b, k] ** 2).mean() + EPS) for x in (s, t))
        total += ((mine - theirs) ** 2).mean() / ((theirs**2).mean() + EPS)
    found = alignment_sum(*map(torch.from_numpy, (s, t, gain, mask)))
    assert float(found) == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text"])
def test_alignment_sees_what_the_next_layer_reads(
    make_teacher: Callable[..., Any], family: str
) -> None:
    """The gains are those with which the teacher's own norms answer."""
    teacher = make_teacher(family)
    alignment = Alignment(make_student(teacher), teacher)
    x = torch.randn(1, 2, teacher.config.hidden_size)
    for index in range(len(layers_of(teacher))):
        last = index + 1 == len(layers_of(teacher))
        norm = teacher.model.norm if last else layers_of(teacher)[index + 1].input_layernorm
        plain = x / x.square().mean(-1, keepdim=True).sqrt()
        torch.testing.assert_close(plain * alignment.gain(index), norm(x), rtol=1e-4, atol=1e-5)
    alignment.release()


def test_alignment_of_equal_models_is_zero_and_falls_in_training(
    make_teacher: Callable[..., Any],
) -> None:
    teacher = make_teacher("llama")
    student = make_student(teacher)
    options = Distillation.model_validate({"steps": 1, "ce": 0.0, "alignment": {"weight": 1.0}})
    objective = make_objective(student, teacher, options)
    batch = make_batch()
    ready = prepare(batch, count_window([batch], NO_RELATIONS))
    optimizer = torch.optim.Adam(student.parameters(), 1e-3)
    seen = []
    for _ in range(8):
        loss, terms = objective(ready)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(float(terms["alignment"]))
    assert 0 < seen[-1] < 0.7 * seen[0]
    equal = make_objective(make_teacher("llama"), teacher, options)
    assert float(equal(ready)[1]["alignment"]) == 0.0


@pytest.mark.parametrize(
    ("mine", "theirs", "pairs"),
    [
        (2, 5, [(0, 1), (1, 4)]),
        (3, 2, [(0, 0), (1, 0), (2, 1)]),
        (5, 2, [(0, 0), (1, 0), (2, 0), (3, 1), (4, 1)]),
    ],
)
def test_alignment_pairs_layers_at_the_same_share_of_the_depth(
    make_teacher: Callable[..., Any], mine: int, theirs: int, pairs: list[tuple[int, int]]
) -> None:
    student = make_teacher("llama", num_hidden_layers=mine)
    teacher = make_teacher("llama", num_hidden_layers=theirs, seed=1)
    alignment = Alignment(student, teacher)
    assert alignment.pairs == pairs
    streams = Streams(student), Streams(teacher)
    mask = torch.ones(1, 4)
    with torch.no_grad():
        for model in (student, teacher):
            model(input_ids=torch.tensor([[5, 6, 7, 8]]))
        found = alignment.sum(mask)
        s, t = (stream.take() for stream in streams)
        each = [alignment_sum(s[i], t[j], alignment.gain(j), mask) for i, j in pairs]
    torch.testing.assert_close(found, sum(each) / mine)


def test_alignment_needs_one_width(make_teacher: Callable[..., Any]) -> None:
    options = Distillation.model_validate({"steps": 1, "alignment": {"weight": 1.0}})
    wide = make_teacher("llama", hidden_size=128)
    with pytest.raises(ValueError, match="of one width"):
        make_objective(make_student(make_teacher("llama")), wide, options)


EXAMPLES = [Example(i, "", " yes", 0, (f"q{i} what is it", f"s{i} a b c d e")) for i in range(40)]


def test_mixtures_are_made_of_the_examples_words() -> None:
    made = mixtures(EXAMPLES, "0")
    words = {word for example in EXAMPLES for text in example.inputs for word in text.split()}
    assert len(made) == len(EXAMPLES)
    assert {word for inputs in made for text in inputs for word in text.split()} <= words
    changed = sum(inputs != e.inputs for inputs, e in zip(made, EXAMPLES, strict=True))
    assert changed > 30
    assert all(all(text for text in inputs) for inputs in made)
    assert mixtures(EXAMPLES, "0") == made != mixtures(EXAMPLES, "1")


def test_mixtures_are_unlabelled_rows_of_an_epoch(tokenizer: Any) -> None:
    task = TASKS["qnli"]
    fresh = Mixtures(task, EXAMPLES, tokenizer, 64, times=2)
    labelled = [Encoded([1000 + i], 1) for i in range(len(EXAMPLES))]
    batches = TaskBatches(labelled, 0, 8, multiple=1, fresh=fresh)
    assert batches.steps_per_epoch() == 15
    suffix = tokenizer(task.suffix, add_special_tokens=False).input_ids
    for row in fresh.rows(0):
        assert not row.labelled
        assert row.ids[-len(suffix) - row.answer : -row.answer] == suffix
    for epoch in range(2):
        seen = [batches.window(epoch * 15 + step)[0] for step in range(15)]
        assert sum(int((b["labels"] == UNLABELLED).any(-1).sum()) for b in seen) == 80
        first = [int(b["input_ids"][i, 0]) for b in seen for i in range(8)]
        assert sorted(i for i in first if i >= 1000) == [row.ids[0] for row in labelled]
        assert all(bool((b["labels"] != IGNORED).any(-1).all()) for b in seen)
    assert fresh.rows(0) != fresh.rows(1)


def test_mixtures_of_the_next_epoch_are_made_ahead(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []

    def noted(examples: list[Example], seed: str) -> list[tuple[str, ...]]:
        made.append(seed)
        return mixtures(examples, seed)

    monkeypatch.setattr("bitdistill.mixtures.mixtures", noted)
    fresh = Mixtures(TASKS["qnli"], EXAMPLES, tokenizer, 64, times=1)
    first = fresh.rows(0)
    second = fresh.rows(1)
    assert made[:2] == ["0-0-0", "0-1-0"]  # the thread made the second, once
    assert made.count("0-1-0") == 1
    assert fresh.rows(7) != first  # where a run is resumed
    fresh.close()
    again = Mixtures(TASKS["qnli"], EXAMPLES, tokenizer, 64, times=1)
    assert (again.rows(1), again.rows(0)) == (second, first)
    again.close()


def test_summaries_cannot_be_mixed(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="no labels to ask the teacher for"):
        Mixtures(TASKS["cnn_dailymail"], EXAMPLES, tokenizer, 64, times=1)
    with pytest.raises(ValueError, match="they need logits"):
        Distillation(steps=1, mixtures=1)


def test_candidates_are_the_labels_tokens(tokenizer: Any) -> None:
    single = [tokenizer.decode([i]) for i in (294, 288)]
    task = dataclasses.replace(TASKS["tiny"], labels=tuple(single))
    among = Training(steps=1, candidates="labels")
    assert candidates(Training(steps=1), task, tokenizer) is None
    found = candidates(among, task, tokenizer)
    assert found == [294, 288]
    with pytest.raises(ValueError, match="one token each"):
        candidates(among, TASKS["cnn_dailymail"], tokenizer)


def test_a_recipe_with_mixtures(recipe: Callable[..., Config], tmp_path: Path) -> None:
    import bitdistill

    settings = ["distill.mixtures=1", "distill.alignment.weight=1", "distill.steps=4"]
    out = tmp_path / "run"
    bitdistill.train(recipe(*settings, "distill.logits.prompt_weight=0.5"), out, quiet=True)
    assert (out / "student" / "bitdistill.json").is_file()
