"""How a student starts: absmean (its weights as they are), GPTQ or AWQ on calibration batches.

Both go through the decoder layer by layer and, within a layer, linear by linear in the order of the
data, so that each sees the inputs that the ternary layers before it produce. Both leave an ordinary
student, with one scale a matrix, which every later step rounds by absmean as ever. They are meant
for hard quantisation: while annealing is below one, a step starts from the master weights, which
GPTQ has moved.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bitdistill.awq import fold, search
from bitdistill.calibration import LayerWalk
from bitdistill.decoder import FAMILIES, LINEARS, Family, family_of
from bitdistill.gptq import gptq, latent_weights, output_error
from bitdistill.quantize import ternarize

Initialiser = Literal["absmean", "gptq", "awq"]
# linears that read the same input, in the order of the data
GROUPS = (LINEARS[:3], LINEARS[3:4], LINEARS[4:6], LINEARS[6:7])
MAX_TOKENS = 4096  # of AWQ's search, a layer
Errors = dict[str, dict[str, float]]


def initialise(
    student: PreTrainedModel, method: Initialiser, batches: Iterable[dict[str, Tensor]]
) -> Errors:
    """Change the student's weights in place; by kind of linear, the mean relative output error
    |W x - Q(W) x|^2 / |W x|^2 of absmean rounding and of the method, on the calibration tokens.

    `batches` hold input_ids and attention_mask, on the student's device. The student is in fp32.
    """
    if method == "absmean":
        return {}
    found: dict[str, list[tuple[float, float]]] = {}
    walk = LayerWalk(student.eval(), batches)
    row = FAMILIES[family_of(student.config.model_type)]
    for _ in walk:
        for group in GROUPS:
            pairs = _gptq_group(walk, group) if method == "gptq" else _awq_group(walk, group, row)
            for name, pair in pairs.items():
                found.setdefault(name.rsplit(".", 1)[-1], []).append(pair)
    means = {kind: torch.tensor(pairs).mean(0).tolist() for kind, pairs in found.items()}
    return {kind: {"absmean": one, method: two} for kind, (one, two) in means.items()}


class Hessian:
    """H = X X^T (K, K) in fp32, summed over what `add` is given."""

    def __init__(self) -> None:
        self.sum: Tensor | None = None

    def add(self, x_MK: Tensor) -> None:
        part = x_MK.float().T @ x_MK.float()
        self.sum = part if self.sum is None else self.sum + part


@torch.no_grad()
def _gptq_group(walk: LayerWalk, names: tuple[str, ...]) -> dict[str, tuple[float, float]]:
    """Round the linears of a group; the relative errors before and after."""
    errors = {}
    hessians: dict[bool, Tensor] = {}
    for name in names:
        linear = walk.linear(name)
        own = linear.norm is not None  # else the group shares its input
        if own or False not in hessians:
            hessian = Hessian()
            walk.visit(name, hessian.add)
            assert hessian.sum is not None
            hessians[own] = hessian.sum
        h, weight = hessians[own], linear.weight.detach().float()
        trits, scale = ternarize(weight)
        before = output_error(weight - scale * trits, h)
        rounded = gptq(weight, h)
        total = max(output_error(weight, h), 1e-30)
        linear.weight.copy_(latent_weights(rounded))
        errors[name] = before / total, rounded.error / total
    return errors


@torch.no_grad()
def _awq_group(
    walk: LayerWalk, names: tuple[str, ...], row: Family
) -> dict[str, tuple[float, float]]:
    """Scale the linears of a group, or each on its own where each has a norm of its own."""
    errors: dict[str, tuple[float, float]] = {}
    own = walk.linear(names[0]).norm is not None
    for part in [(name,) for name in names] if own else [names]:
        linears = [walk.linear(name) for name in part]
        x = _tokens(walk, part[0])
        scales, least, plain = search(x, linears)
        norm, offset = linears[0].norm, 0.0
        before: nn.Module | None = norm if norm is not None else _block_norm(walk, part, row)
        if norm is None:
            offset = row.norm_offset
        if before is None:
            least = plain
        else:
            fold(scales, linears, before, offset)
        errors |= {name: (plain, least) for name in part}
    return errors


def _tokens(walk: LayerWalk, name: str) -> Tensor:
    """The first tokens (M, K) of what a linear multiplies, MAX_TOKENS at most."""
    rows: list[Tensor] = []

    def keep(x_MK: Tensor) -> None:
        rows.append(x_MK[: MAX_TOKENS - sum(map(len, rows))])

    walk.visit(name, keep)
    return torch.cat(rows)


def _block_norm(walk: LayerWalk, names: tuple[str, ...], row: Family) -> nn.Module | None:
    """The block's norm whose output is what the linears read, and nothing else does."""
    where = {GROUPS[0]: row.input_norm, GROUPS[2]: row.mlp_norm}.get(names)
    return None if where is None else walk.layer.get_submodule(where)
