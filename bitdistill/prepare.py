"""What the objective reads of a window of micro-batches, made ready on the CPU.

All that depends on the data (which positions are learnt, the counts that terms are divided by) is
found here, so that the objective itself is a fixed sequence of kernels for each shape: it can be
compiled, and captured as a CUDA graph.

The counts are taken over the whole optimizer step, and every micro-batch contributes sums: the
gradient is the same however the step is cut into batches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from bitdistill.data import IGNORED, UNLABELLED, Batch
from bitdistill.schema import RelationLoss

# what batches bring of a teacher that is not there (teacher_cache.py)
REMEMBERED_ANSWERS = {"top_logits", "top_ids", "top_total"}
REMEMBERED_STATES = {"teacher_q", "teacher_k", "teacher_v"}
Number = TypeVar("Number", float, Tensor)


class Counts(NamedTuple, Generic[Number]):
    """What the terms of one optimizer step are divided by, in tokens."""

    answers: Number  # with a label: cross-entropy
    compared: Number  # those, and answers that only the teacher gives: KL
    prompt: Number  # whose next token belongs to the prompt: the prompt's KL
    related: Number  # relations
    real: Number  # alignment


def count_window(window: list[Batch], relations: RelationLoss) -> Counts[float]:
    """The counts of a window of micro-batches."""

    def total(count: Callable[[Batch], Tensor]) -> float:
        return float(sum(int(count(batch).sum()) for batch in window))

    real = total(lambda b: b["attention_mask"])
    return Counts(
        answers=total(lambda b: b["labels"][:, 1:] >= 0),
        compared=total(lambda b: b["labels"][:, 1:] != IGNORED),
        prompt=total(lambda b: prompt_targets(b) == UNLABELLED),
        related=real if relations.mask else sum(b["attention_mask"].numel() for b in window),
        real=real,
    )


def prompt_targets(batch: Batch) -> Tensor:
    """(B, T): UNLABELLED where the next token is a real one of the prompt, else IGNORED."""
    targets_BT = torch.full_like(batch["labels"], IGNORED)
    inside = batch["attention_mask"][:, 1:].bool() & (batch["labels"][:, 1:] == IGNORED)
    targets_BT[:, :-1][inside] = UNLABELLED
    return targets_BT


def _rounded(count: int) -> int:
    """`count`, rounded up by less than a quarter, so that few different sizes occur."""
    step = 1 << max(0, count.bit_length() - 3)
    return max(1, -(-count // step) * step)


def prepare(batch: Batch, counts: Counts[float]) -> Batch:
    """What the objective reads of a micro-batch, on the batch's device.

    rows_P: flat positions b * T + t whose next token is learnt; targets_P: that token; both filled
    up to a round number with targets that do not count. prompt_targets_BT, and scales, one over
    each of the counts (0 where nothing is counted). `documents` (B, T), where given, says which
    tokens belong together; what a cache remembers of a teacher's answers is filled like the rows.
    """
    labels_BT = batch["labels"]
    next_BT = torch.full_like(labels_BT, IGNORED)
    next_BT[:, :-1] = labels_BT[:, 1:]
    learnt = (next_BT.flatten() != IGNORED).nonzero().squeeze(-1)
    size = _rounded(len(learnt))
    rows_P = labels_BT.new_zeros(size)
    targets_P = labels_BT.new_full((size,), IGNORED)
    rows_P[: len(learnt)] = learnt
    targets_P[: len(learnt)] = next_BT.flatten()[learnt]
    scales = torch.tensor([1 / count if count else 0.0 for count in counts])
    prepared = {key: batch[key] for key in ("input_ids", "attention_mask")}
    prepared |= {"rows": rows_P, "targets": targets_P, "scales": scales.to(labels_BT.device)}
    prepared["prompt_targets"] = prompt_targets(batch)
    for key in REMEMBERED_STATES & batch.keys():
        prepared[key] = batch[key]
    for key in REMEMBERED_ANSWERS & batch.keys():  # a row for each learnt position
        rest = (0, 0) * (batch[key].ndim - 1)
        prepared[key] = F.pad(batch[key], (*rest, 0, size - len(learnt)))
    if "documents" in batch:
        prepared |= {"documents": batch["documents"], "position_ids": batch["position_ids"]}
    return prepared
