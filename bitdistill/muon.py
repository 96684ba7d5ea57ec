"""Muon: updates of whole matrices whose singular values are all about one.

The momentum of a matrix's gradient is orthogonalised by Newton-Schulz iterations (Jordan et al.,
2024) and scaled so that its entries are about as large as Adam's (0.2 root mean square; Liu et al.,
arXiv 2502.16982), which keeps Adam's learning rates. A ternary matrix moves where its master
weights cross a threshold: an update that is as large in every direction moves trits that a few
large gradients would drown.

Matrices of one shape are orthogonalised together, as one batch: a decoder has hundreds of
matrices and four or five shapes. Legend: S matrices of a shape, N rows, K columns, N <= K.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

MOMENTUM = 0.95
ITERATIONS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # quintic: singular values end in 0.7 to 1.2
ADAM_RMS = 0.2
EPS = 1e-7


def orthogonalised(matrices_SNK: Tensor) -> Tensor:
    """U V^T, roughly, of each matrix U S V^T; in bf16 on a GPU. Any N and K."""
    tall = matrices_SNK.shape[1] > matrices_SNK.shape[2]
    x_SNK = matrices_SNK.mT if tall else matrices_SNK
    x_SNK = x_SNK / (x_SNK.float().norm(dim=(1, 2), keepdim=True) + EPS).to(x_SNK.dtype)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram_SNN = x_SNK @ x_SNK.mT
        poly_SNN = torch.baddbmm(gram_SNN, gram_SNN, gram_SNN, beta=b, alpha=c)
        x_SNK = torch.baddbmm(x_SNK, poly_SNN, x_SNK, beta=a)
    return x_SNK.mT if tall else x_SNK


class Muon(torch.optim.Optimizer):
    """Muon with decoupled weight decay, for matrices alone; `lr` may be a tensor on their device.

    Nothing in a step asks the device for a value, so that it can be captured as a CUDA graph.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], lr: float | Tensor) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0})
        for group in self.param_groups:
            if any(p.ndim != 2 for p in group["params"]):
                raise ValueError("Muon updates matrices only; give other parameters to AdamW")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every matrix that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes[parameter.shape].append(parameter)
            for parameters in shapes.values():
                self._update(parameters, group["lr"], group["weight_decay"])

    def _update(self, matrices: list[Tensor], rate: float | Tensor, decay: float) -> None:
        for matrix in matrices:
            if not self.state[matrix]:
                self.state[matrix]["momentum"] = torch.zeros_like(matrix)
        momenta = [self.state[matrix]["momentum"] for matrix in matrices]
        gradients = [matrix.grad for matrix in matrices if matrix.grad is not None]
        torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
        ahead = torch._foreach_lerp(gradients, momenta, MOMENTUM)  # Nesterov's
        dtype = torch.bfloat16 if matrices[0].is_cuda else torch.float32
        update_SNK = orthogonalised(torch.stack(ahead).to(dtype)).float()
        update_SNK *= -rate * (ADAM_RMS * max(matrices[0].shape) ** 0.5)
        if decay:
            torch._foreach_mul_(matrices, torch.as_tensor(1 - rate * decay))
        torch._foreach_add_(matrices, update_SNK.unbind())


class Together(torch.optim.Optimizer):
    """Several optimizers, each with its own parameters, as one."""

    def __init__(self, parts: list[torch.optim.Optimizer]) -> None:
        # the parts' own groups, not copies: a learning rate set here is theirs
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.parts = parts
        self.state = parts[0].state
        for part in parts[1:]:
            part.state = self.state  # keyed by parameter, of which no two parts have one in common

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of all parts."""
        assert closure is None
        for part in self.parts:
            part.step()
