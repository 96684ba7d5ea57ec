"""Muon: orthogonal updates of the size of Adam's, of the layers' matrices and nothing else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from short_runs import advance, settings, weights

from bitdistill.muon import ADAM_RMS, MOMENTUM, Muon, Together, orthogonalised
from bitdistill.student import layers_of
from bitdistill.training import Fit


@pytest.mark.parametrize("shape", [(3, 16, 48), (2, 48, 16), (1, 32, 32)])
def test_singular_values_become_about_one(shape: tuple[int, int, int]) -> None:
    """And the singular vectors stay: U V^T of an exact decomposition points the same way."""
    generator = torch.Generator().manual_seed(0)
    matrices = torch.randn(shape, generator=generator) * 1e-3
    found = orthogonalised(matrices)
    values = torch.linalg.svdvals(found)
    assert float(values.min()) > 0.5
    assert float(values.max()) < 1.3
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    cosine = torch.nn.functional.cosine_similarity(found.flatten(1), (u @ v).flatten(1))
    assert float(cosine.min()) > 0.95


def test_a_step_is_the_published_one() -> None:
    """Two steps against the formulas, one matrix at a time; the learning rate is a tensor."""
    torch.manual_seed(0)
    matrices = [torch.nn.Parameter(torch.randn(8, 24)) for _ in range(2)]
    expected = [m.detach().clone() for m in matrices]
    rate = torch.tensor(0.02)
    optimizer = Muon([{"params": matrices, "weight_decay": 0.1}], rate)
    momenta = [torch.zeros(8, 24) for _ in matrices]
    for _ in range(2):
        for index, matrix in enumerate(matrices):
            matrix.grad = torch.randn(8, 24)
            momenta[index] = MOMENTUM * momenta[index] + (1 - MOMENTUM) * matrix.grad
            ahead = MOMENTUM * momenta[index] + (1 - MOMENTUM) * matrix.grad
            update = ADAM_RMS * 24**0.5 * orthogonalised(ahead.unsqueeze(0))[0]
            expected[index] = expected[index] * (1 - 0.02 * 0.1) - 0.02 * update
        optimizer.step()
    for matrix, value in zip(matrices, expected, strict=True):
        torch.testing.assert_close(matrix.detach(), value, rtol=1e-5, atol=1e-6)


def test_vectors_are_refused() -> None:
    with pytest.raises(ValueError, match="matrices only; give other parameters to AdamW"):
        Muon([{"params": [torch.nn.Parameter(torch.ones(3))]}], 0.1)


def test_muon_moves_the_layers_matrices_and_adamw_the_rest(start: Callable[..., Fit]) -> None:
    """Every parameter has exactly one group, and all of them move."""
    fit = start(settings(optimizer="muon", anneal=0.0), "task")
    assert isinstance(fit.optimizer, Together)
    grouped = [id(p) for group in fit.optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in fit.model.parameters())
    groups = [group for part in fit.optimizer.parts for group in part.param_groups]
    assert all(a is b for a, b in zip(fit.optimizer.param_groups, groups, strict=True))
    inner = {id(p) for p in layers_of(fit.model).parameters() if p.ndim > 1}
    assert {id(p) for p in fit.optimizer.parts[1].param_groups[0]["params"]} == inner
    before = weights(fit)
    advance(fit, 2)
    still = [name for name, value in weights(fit).items() if torch.equal(value, before[name])]
    assert still == []
    state = fit.optimizer.state
    assert {"momentum"} == {key for p in state if id(p) in inner for key in state[p]}
