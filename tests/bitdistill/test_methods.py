"""The paper's method and the authors': their settings, and their losses against the equations.

The reference is NumPy in fp64, written from arXiv 2510.13998 (eq. 8-14, Algorithm 1) and from what
is known of the released code; gradients are its central differences. Nothing of ours is used in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bitdistill.config import ConfigError, load_config
from bitdistill.data import IGNORED
from bitdistill.losses import chunk_terms, relation_sum
from bitdistill.objective import count_window, make_objective, prepare
from bitdistill.optimizer import schedule
from bitdistill.quantize import RMSNorm, bit_linears
from bitdistill.schema import Config, Distillation
from bitdistill.student import make_student

Array = np.ndarray
# method -> lambda or beta, tau^2, gamma, over the split heads once more
PUBLISHED = {
    "paper": {"label": (10.0, 1.0, 1e5, 1.0), "summary": (1.0, 1.0, 1e3, 1.0)},
    "authors": {"label": (1.0, 25.0, 1e5, 32.0), "summary": (0.04, 25.0, 1e3, 32.0)},
}
TAU, SPLIT_HEADS = 5.0, 32
TASK_OF = {"label": "mnli", "summary": "cnn_dailymail"}


def settings(method: str, kind: str) -> Distillation:
    return load_config(f"qwen3-0.6b+{TASK_OF[kind]}+{method}").distill


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def cross_entropy(z_TV: Array, y_T: Array) -> float:
    """Eq. 14: the mean over answer tokens."""
    return -float(np.mean(np.log(softmax(z_TV)[np.arange(len(y_T)), y_T])))


def logits_term(z_TV: Array, t_TV: Array, tau_squared: float) -> float:
    """Eq. 8 and 9: KL(teacher || student) of softmax(z / tau), the mean over answer tokens."""
    p, q = softmax(t_TV / TAU), softmax(z_TV / TAU)
    return tau_squared * float(np.mean((p * np.log(p / q)).sum(-1)))


def relations_term(student: list[Array], teacher: list[Array], further: float) -> float:
    """Algorithm 1, temperature 1, over all positions: batchmean of the KL, summed over Q, K, V."""
    total = 0.0
    for mine, theirs in zip(student, teacher, strict=True):
        rows = []
        for states_BTD in (mine, theirs):
            batch, tokens, width = states_BTD.shape
            a = states_BTD.reshape(batch, tokens, SPLIT_HEADS, width // SPLIT_HEADS)
            a = a.transpose(0, 2, 1, 3)
            a = a / np.sqrt((a * a).sum(-1, keepdims=True))
            rows.append(softmax(a @ a.transpose(0, 1, 3, 2)).reshape(-1, tokens))
        q, p = rows
        total += float(np.mean((p * np.log(p / q)).sum(-1)))
    return total / further


def gradient(function: Callable[[Array], float], at: Array, step: float = 1e-5) -> Array:
    """Central differences."""
    found = np.zeros_like(at)
    for index in np.ndindex(*at.shape):
        sides = []
        for sign in (1, -1):
            moved = at.copy()
            moved[index] += sign * step
            sides.append(function(moved))
        found[index] = (sides[0] - sides[1]) / (2 * step)
    return found


@pytest.mark.parametrize("kind", ["label", "summary"])
@pytest.mark.parametrize("method", PUBLISHED)
def test_settings_are_those_published(method: str, kind: str) -> None:
    config: Config = load_config(f"qwen3-0.6b+{TASK_OF[kind]}+{method}")
    weight, tau_squared, gamma, further = PUBLISHED[method][kind]
    distill = config.distill
    assert config.method == f"bitdistill-{method}"
    assert (distill.ce, distill.logits.weight, distill.relations.weight) == (1.0, weight, gamma)
    assert distill.logits.temperature == TAU
    assert distill.logits.tau_squared == (tau_squared == 25)
    assert distill.relations.divide_by_heads == (further == 32)
    assert (distill.batch_size * distill.accumulate, distill.max_length) == (32, 512)
    assert (distill.schedule, distill.warmup, distill.weight_decay) == ("cosine", 0.05, 0.01)
    assert (config.student.calibrate, config.student.start, distill.anneal) == (False, "base", 0)
    assert config.student.norm_style == {"paper": "paper", "authors": "allnorm"}[method]
    assert not config.pretrain.needs_teacher
    assert config.pretrain.ce == 1.0
    tokens = config.pretrain.batch_size * config.pretrain.accumulate * 512
    assert config.pretrain.steps is not None
    tokens *= config.pretrain.steps
    assert tokens == pytest.approx(10e9, rel=1e-4)


@pytest.mark.parametrize("kind", ["label", "summary"])
@pytest.mark.parametrize("method", PUBLISHED)
def test_head_losses_and_their_gradients(method: str, kind: str) -> None:
    """lambda L_LD + L_CE over answer tokens; rows that do not count change nothing."""
    options = settings(method, kind)
    weight, tau_squared, _, _ = PUBLISHED[method][kind]
    rng = np.random.default_rng(0)
    z, t = (3 * rng.standard_normal((5, 7)) for _ in range(2))
    y = np.array([3, 0, 6, 1, 2])
    targets = torch.tensor([3, IGNORED, 0, 6, 1, 2])
    rows = [0, 2, 3, 4, 5]
    padded = [np.insert(x, 1, 9.0, axis=0) for x in (z, t)]
    student, teacher = (torch.tensor(x) for x in padded)
    scale = torch.tensor(1 / len(y), dtype=torch.float64)
    ce, kl, found = chunk_terms(
        student, targets, teacher, scale, options.logits.weight * scale, options.logits
    )

    def loss(logits: Array) -> float:
        return cross_entropy(logits, y) + weight * logits_term(logits, t, tau_squared)

    assert float(ce) == pytest.approx(cross_entropy(z, y), rel=1e-9)
    assert float(kl) == pytest.approx(weight * logits_term(z, t, tau_squared), rel=1e-9)
    np.testing.assert_allclose(found.numpy()[rows], gradient(loss, z), rtol=1e-6, atol=1e-8)
    assert not found[1].any()


@pytest.mark.parametrize("method", PUBLISHED)
def test_relations_and_their_gradient(method: str) -> None:
    options = settings(method, "label").relations
    further = PUBLISHED[method]["label"][3]
    rng = np.random.default_rng(1)
    student = [rng.standard_normal((2, 3, 64)) for _ in range(3)]
    teacher = [rng.standard_normal((2, 3, 96)) for _ in range(3)]
    mine = [torch.tensor(a, requires_grad=True) for a in student]
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])  # padding takes part, as it does there
    total = relation_sum(tuple(mine), tuple(map(torch.tensor, teacher)), mask, options)
    loss = total / mask.numel()
    loss.backward()
    assert loss.item() == pytest.approx(relations_term(student, teacher, further), rel=1e-5)
    for index in range(3):

        def one(a: Array, index: int = index) -> float:
            return relations_term([*student[:index], a, *student[index + 1 :]], teacher, further)

        found = mine[index].grad
        assert found is not None
        expected = gradient(one, student[index])
        np.testing.assert_allclose(found.numpy(), expected, atol=2e-5 * np.abs(expected).max())


def rotated(states_BTD: Array, head: int, theta: float) -> Array:
    """Rotary embedding of positions 0.. with half-split pairs, from its definition."""
    batch, tokens, width = states_BTD.shape
    x = states_BTD.reshape(batch, tokens, width // head, head)
    angle = np.arange(tokens)[:, None] * theta ** (-np.arange(0, head, 2) / head)
    cos, sin = np.cos(angle)[:, None, :], np.sin(angle)[:, None, :]
    first, second = x[..., : head // 2], x[..., head // 2 :]
    turned = np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)
    return turned.reshape(batch, tokens, width)


def attention_states(model: Any, layer: int, ids: torch.Tensor, method: str) -> list[Array]:
    """Q, K, V of a layer: as projected (paper), or after qk-norm and rotary embedding (authors)."""
    attention = model.model.layers[layer].self_attn
    seen: dict[str, Array] = {}
    handles = [
        getattr(attention, name).register_forward_hook(
            lambda _, args, out, name=name: seen.update({name: out.detach().double().numpy()})
        )
        for name in ("q_proj", "k_proj", "v_proj")
    ]
    with torch.no_grad():
        model(input_ids=ids)
    for handle in handles:
        handle.remove()
    q, k, v = (seen[name] for name in ("q_proj", "k_proj", "v_proj"))
    if method == "paper":
        return [q, k, v]
    head, theta = attention.head_dim, model.config.rope_parameters["rope_theta"]
    for name in ("q", "k"):
        norm = getattr(attention, f"{name}_norm")
        x = (q if name == "q" else k).reshape(*q.shape[:2], -1, head)
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + norm.variance_epsilon)
        x = (x * norm.weight.detach().double().numpy()).reshape(*q.shape[:2], -1)
        q, k = (rotated(x, head, theta), k) if name == "q" else (q, rotated(x, head, theta))
    return [q, k, v]


@pytest.mark.parametrize("method", PUBLISHED)
def test_the_whole_loss_of_a_model(make_teacher: Callable[..., Any], method: str) -> None:
    """L = L_CE + lambda L_LD + gamma L_AD of a student and a deeper, wider teacher."""
    options = settings(method, "label")
    weight, tau_squared, gamma, further = PUBLISHED[method]["label"]
    teacher = make_teacher("qwen3", num_hidden_layers=5, hidden_size=96, num_attention_heads=6)
    student = make_student(make_teacher("qwen3"), "none", None).eval()
    for linear in bit_linears(student):
        linear.anneal.fill_(0.0)  # a rounding that flips would hide the comparison
    ids = torch.randint(3, 200, (2, 6), generator=torch.Generator().manual_seed(0))
    labels = torch.full_like(ids, IGNORED)
    labels[:, 4:] = ids[:, 4:]
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    layers = 1, int(0.79 * 5)  # layer 3 of 0..4 is nearest to layer 1 of 0..1
    states = [
        attention_states(m, n, ids, method) for m, n in zip((student, teacher), layers, strict=True)
    ]
    with torch.no_grad():
        z, t = (
            m(input_ids=ids).logits[:, 3:5].flatten(0, 1).double().numpy()
            for m in (student, teacher)
        )
    y = ids[:, 4:].flatten().numpy()
    objective = make_objective(student, teacher, options)
    loss, terms = objective(prepare(batch, count_window([batch], options.relations)))
    expected = {
        "ce": cross_entropy(z, y),
        "logits": weight * logits_term(z, t, tau_squared),
        "relations": gamma * relations_term(*states, further),
    }
    assert {k: float(v) for k, v in terms.items()} == pytest.approx(expected, rel=1e-4)
    assert loss.item() == pytest.approx(sum(expected.values()), rel=1e-4)


def test_the_authors_norms(make_teacher: Callable[..., Any]) -> None:
    """RMSNorm before every projection, eps 1e-8: visible where the input is tiny."""
    config = load_config("qwen3-0.6b+mnli+authors")
    student = make_student(make_teacher("qwen3"), config.student.norm_style)
    norms = [linear.norm for linear in bit_linears(student)]
    assert len(norms) == 14
    x = 1e-4 * np.array([[1.0, -2.0, 3.0, 0.5]])
    for norm in norms:
        assert norm is not None
        assert norm.eps == 1e-8
    four = RMSNorm(4, norms[0].eps)  # type: ignore[union-attr]
    expected = x / np.sqrt((x * x).mean() + 1e-8)
    np.testing.assert_allclose(four(torch.tensor(x)).detach().numpy(), expected, rtol=1e-6)


def test_the_schedule() -> None:
    """Linear warm-up over 5 % of the steps, then half a cosine to zero."""
    options, total = settings("authors", "label"), 400
    for step in range(total):
        expected = (step + 1) / 20
        if step >= 20:
            expected = (1 + math.cos(math.pi * (step - 20) / 380)) / 2
        assert schedule(options, step, total) == pytest.approx(expected)


def test_a_method_is_laid_on_any_recipe(tmp_path: Path) -> None:
    below, paper = load_config("smollm2-135m-sst2"), load_config("smollm2-135m-sst2+paper")
    assert paper.name == "smollm2-135m-sst2+paper"
    assert (paper.distill.epochs, paper.distill.learning_rate) == (4, 2e-4)  # the recipe's
    assert paper.pretrain.enabled is below.pretrain.enabled is False
    assert paper.teacher == below.teacher
    assert (paper.distill.logits.weight, paper.distill.anneal) == (10, 0)
    (tmp_path / "own.yaml").write_text("extends: smollm2-135m-sst2\nname: own\nseed: 3\n")
    own = load_config(f"{tmp_path}/own.yaml+paper", ["distill.logits.weight=7"])
    assert (own.name, own.seed, own.method) == ("own+paper", 3, "bitdistill-paper")
    assert own.distill.logits.weight == 7


def test_weights_follow_the_kind_of_task(tmp_path: Path) -> None:
    """Also where the task stands in the file that extends the method, and the file's own win."""
    own = "{name: s, kind: summary, prompt: '{t}', inputs: [t], target: u}"
    text = f"extends: qwen3-0.6b+paper\nname: s\ntask: {own}\n"
    (tmp_path / "s.yaml").write_text(text)
    assert load_config(str(tmp_path / "s.yaml")).distill.logits.weight == 1
    (tmp_path / "s.yaml").write_text(text + "distill: {logits: {weight: 3}}\n")
    config = load_config(str(tmp_path / "s.yaml"))
    assert (config.distill.logits.weight, config.distill.relations.weight) == (3, 1e3)


def test_a_plus_in_a_path_is_not_a_join(tmp_path: Path) -> None:
    file = tmp_path / "a+b.yaml"
    file.write_text("extends: tiny\nname: own\n")
    assert load_config(str(file)).name == "own"


def test_unknown_parts() -> None:
    with pytest.raises(ConfigError, match="unknown recipe 'papr'; did you mean 'paper'"):
        load_config("tiny+papr")
    with pytest.raises(ConfigError, match="teacher: Field required"):
        load_config("paper")
