"""`RECIPE+paper` and `+authors` are the published methods, whatever the recipe below them does.

The showcase recipes add terms and data of ours; none may be left when a method is laid on top.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bitdistill.config import load_config, recipe_names

SHOWCASE = [name for name in recipe_names() if name.startswith("showcase/")]
SUMMARIES = {"showcase/summary-bbc", "showcase/summary-debian"}

_OPTIMISATION = {
    "schedule": "cosine",
    "warmup": 0.05,
    "weight_decay": 0.01,
    "decay_until": 1.0,
    "anneal": 0.0,
    "ce": 1.0,
    "alignment.weight": 0.0,
    "relations.target_ratio": None,
    "logits.prompt_weight": 0.0,
}
PRETRAIN = _OPTIMISATION | {"logits.weight": 0.0, "relations.weight": 0.0}
DISTILL = _OPTIMISATION | {
    "candidates": "vocabulary",
    "mixtures": 0,
    "cache": 0,
    "logits.weight": 10.0,
    "logits.temperature": 5.0,
    "logits.tau_squared": False,
    "relations.weight": 1e5,
    "relations.layer": 0.79,
    "relations.split_heads": 32,
    "relations.states": "projection",
    "relations.scaling": "normalised",
    "relations.temperature": 1.0,
    "relations.mask": False,
    "relations.divide_by_heads": False,
}
STUDENT = {
    "norm_style": "paper",
    "activation_bits": 8,
    "calibrate": False,
    "start": "base",
    "initialise": "absmean",
}
# what differs: of each method, and of its weights for summaries
METHODS: dict[str, dict[str, dict[str, Any]]] = {
    "paper": {"student": {}, "distill": {}, "summary": {"logits.weight": 1.0}},
    "authors": {
        "student": {"norm_style": "allnorm"},
        "distill": {
            "logits.weight": 1.0,
            "logits.tau_squared": True,
            "relations.states": "attention",
            "relations.divide_by_heads": True,
        },
        "summary": {"logits.weight": 0.04},
    },
}
# of every setting above another value, which a method must replace
CONTRARY = """
extends: smollm2-135m-sst2
name: contrary
student:
  {norm_style: none, activation_bits: null, calibrate: true, start: teacher, initialise: gptq}
pretrain: &all
  steps: 10
  schedule: linear
  warmup: 0.5
  weight_decay: 0.5
  decay_until: 0.5
  anneal: 0.5
  ce: 0.5
  logits: {weight: 0.5, prompt_weight: 0.5, temperature: 2.0, tau_squared: true}
  alignment: {weight: 0.5}
  relations:
    weight: 0.5
    target_ratio: 0.5
    layer: 0.5
    split_heads: 3
    states: attention
    scaling: sqrt
    temperature: 2.0
    mask: true
    divide_by_heads: true
distill:
  <<: *all
  epochs: null
  candidates: labels
  mixtures: 3
"""
# the authors' part sets again what the paper's does; here the paper's values lie below it
CONTRARY_TO_AUTHORS = """
extends: smollm2-135m-sst2
name: contrary
student: {norm_style: paper}
distill:
  logits: {weight: 10.0, tau_squared: false}
  relations: {states: projection, divide_by_heads: false}
"""


def found(section: Any, names: dict[str, Any]) -> dict[str, Any]:
    """Those settings of a section, by their dotted names."""
    values = {}
    for name in names:
        value = section
        for part in name.split("."):
            value = getattr(value, part)
        values[name] = value
    return values


def check(recipe: str, method: str, summary: bool) -> None:
    config, own = load_config(f"{recipe}+{method}"), METHODS[method]
    distill = DISTILL | own["distill"]
    if summary:
        distill |= {"relations.weight": 1e3} | own["summary"]
    student = STUDENT | own["student"]
    assert config.method == f"bitdistill-{method}"
    assert found(config.student, student) == student
    assert found(config.pretrain, PRETRAIN) == PRETRAIN
    assert not config.pretrain.needs_teacher
    assert found(config.distill, distill) == distill


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("recipe", SHOWCASE)
def test_nothing_of_ours_is_left_in_a_showcase_recipe(recipe: str, method: str) -> None:
    below, above = load_config(recipe), load_config(f"{recipe}+{method}")
    assert below.distill.mixtures > 0 < below.distill.alignment.weight  # else it would show nothing
    check(recipe, method, recipe in SUMMARIES)
    assert above.name == f"{below.name}+{method}"
    same = ("teacher", "bitnet_sft", "task", "corpus", "model", "shared")
    assert all(getattr(above, name) == getattr(below, name) for name in same)
    for name in ("steps", "epochs", "batch_size", "max_length", "learning_rate"):
        assert getattr(above.distill, name) == getattr(below.distill, name)


def test_there_are_five() -> None:
    assert len(SHOWCASE) == 5
    assert set(SHOWCASE) > SUMMARIES


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("text", [CONTRARY, CONTRARY_TO_AUTHORS])
def test_every_setting_of_the_method_replaces_the_recipes(
    tmp_path: Path, method: str, text: str
) -> None:
    file = tmp_path / "contrary.yaml"
    file.write_text(text)
    check(str(file), method, summary=False)
