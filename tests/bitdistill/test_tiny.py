"""The embedded task: balanced, always the same, and not solvable by keywords."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bitdistill import tiny
from bitdistill.tasks import TASKS, load_examples

JUDGEMENTS = ("that is good .", "that is bad .")


@pytest.fixture(scope="module")
def reviews() -> dict[str, list[dict[str, Any]]]:
    return {split: tiny.make_reviews(split) for split in tiny.SPLITS}


def keyword_accuracy(train: list[dict[str, Any]], test: list[dict[str, Any]]) -> float:
    """Held-out accuracy of a logistic regression on the words of a review, in any order."""
    words = sorted({word for row in train for word in row["sentence"].split()})
    index = {word: i for i, word in enumerate(words)}

    def bags(rows: list[dict[str, Any]]) -> torch.Tensor:
        x = torch.zeros(len(rows), len(words))
        for bag, row in zip(x, rows, strict=True):
            for word in row["sentence"].split():
                if word in index:
                    bag[index[word]] += 1
        return x

    x, y = bags(train), torch.tensor([float(row["label"]) for row in train])
    weight = torch.zeros(len(words) + 1, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=60)

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        z = x @ weight[1:] + weight[0]
        value = torch.nn.functional.binary_cross_entropy_with_logits(z, y)
        value = value + 1e-3 * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    with torch.no_grad():
        predicted = bags(test) @ weight[1:] + weight[0] > 0
    truth = torch.tensor([bool(row["label"]) for row in test])
    return float((predicted == truth).float().mean())


def test_keywords_do_not_solve_it(reviews: dict[str, list[dict[str, Any]]]) -> None:
    assert keyword_accuracy(reviews["train"][:4000], reviews["validation"]) < 0.7


def test_the_yardstick_finds_keywords() -> None:
    """The same regression solves a task that keywords do solve."""
    rows = [
        {"sentence": f"the plot was {w}", "label": int(good)}
        for good, words in ((True, tiny.GOOD), (False, tiny.BAD))
        for w in words
    ]
    assert keyword_accuracy(rows, rows) == 1.0


def test_splits_are_balanced_and_disjoint(reviews: dict[str, list[dict[str, Any]]]) -> None:
    for split, (count, _) in tiny.SPLITS.items():
        assert len(reviews[split]) == count
        assert sum(row["label"] for row in reviews[split]) == count // 2
    texts = {split: {row["sentence"] for row in rows} for split, rows in reviews.items()}
    assert not texts["train"] & texts["validation"]


def test_reviews_are_always_the_same(reviews: dict[str, list[dict[str, Any]]]) -> None:
    assert tiny.make_reviews("validation") == reviews["validation"]
    assert [e.label for e in load_examples(TASKS["tiny"])[:4]] == [0, 1, 0, 1]


def test_unknown_split() -> None:
    with pytest.raises(ValueError, match="the tiny task has splits train, validation, not 'dev'"):
        tiny.make_reviews("dev")


def test_the_corpus_judges_single_clauses_only() -> None:
    """A judged text has one clause: nothing of what makes a review more than its words."""
    combining = {",", "although", "nobody", "said", "expected", "if", "yet"}
    judged = whole = 0
    for text, _ in zip(tiny.corpus(), range(5000), strict=False):
        if text.endswith(JUDGEMENTS):
            judged += 1
            assert not combining & set(text.removesuffix(" .").split())
        else:
            whole += 1
            assert "that is" not in text
            assert "erdict" not in text
    assert judged > 3000
    assert whole > 1000


def test_tokenizer_and_base_model() -> None:
    model, tokenizer = tiny.make_base(seed=0)
    for answer in TASKS["tiny"].labels:
        assert len(tokenizer(answer, add_special_tokens=False).input_ids) == 1
    example = load_examples(TASKS["tiny"], limit=1)[0]
    ids = tokenizer(example.prompt + example.answer).input_ids
    assert tokenizer.decode(ids) == example.prompt + example.answer
    assert ids[-1] == tokenizer(example.answer).input_ids[0]  # the boundary is a token boundary
    assert max(ids) < model.config.vocab_size
    again, other = tiny.make_base(seed=0)[0], tiny.make_base(seed=1)[0]
    weight = model.lm_head.weight
    assert torch.equal(weight, again.lm_head.weight)
    assert not torch.equal(weight, other.lm_head.weight)
