"""How long, how fast, and by which rule the weights move."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from bitdistill.data import Batches
from bitdistill.hardware import Hardware, TrainingError
from bitdistill.schema import Training

BETAS = (0.9, 0.98)


def schedule(settings: Training, step: int, total: int) -> float:
    """The learning rate's factor at a step: linear warm-up, then cosine, linear or constant."""
    warmup = max(1, round(settings.warmup * total))
    if step < warmup:
        return (step + 1) / warmup
    share = (step - warmup) / max(1, total - warmup)
    if settings.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * share))
    return 1 - share if settings.schedule == "linear" else 1.0


def total_steps(settings: Training, batches: Batches) -> int:
    """Optimizer steps of a stage; TrainingError where `epochs` is asked of a stream."""
    if settings.steps is not None:
        return settings.steps
    per_epoch = batches.steps_per_epoch()
    if per_epoch is None or settings.epochs is None:
        raise TrainingError("a corpus has no epochs: give the stage's steps instead")
    return max(1, math.ceil(settings.epochs * per_epoch))


def make_optimizer(
    parameters: Iterable[Tensor], settings: Training, hardware: Hardware, *, graphs: bool
) -> torch.optim.AdamW:
    """AdamW; matrices decay, vectors (norms, biases) do not.

    With `graphs` the learning rate is a tensor, which a captured step reads from the device.
    """
    parameters = list(parameters)
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    rate: float | Tensor = settings.learning_rate
    if graphs:
        rate = torch.tensor(rate, device=hardware.device)
    fused = True if hardware.cuda else None
    return torch.optim.AdamW(groups, lr=rate, betas=BETAS, fused=fused, capturable=graphs)
