"""What a stage minimises: the terms of losses.py, weighted, for one micro-batch.

The counts that normalise the terms are taken over the whole optimizer step (`count_window`), and
every micro-batch contributes sums: the gradient is the same however the step is cut into batches.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from bitdistill.data import IGNORED, Batch
from bitdistill.losses import relation_sum, token_terms
from bitdistill.schema import Distillation, LogitsLoss, RelationLoss, Training
from bitdistill.student import layers_of

CAPTURING = "bitdistill_capturing"
_STATE_PROJECTIONS = ("q_proj", "k_proj", "v_proj")


def _capturing_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """SDPA that hands Q, K, V (B, heads, T, R), after rotary embedding, to the module's capture."""
    capture = getattr(module, "bitdistill_capture", None)
    if capture is not None:
        capture.states = [x.transpose(1, 2).flatten(2) for x in (query, key, value)]
    return sdpa_attention_forward(module, query, key, value, *args, **kwargs)


AttentionInterface.register(CAPTURING, _capturing_attention)
AttentionMaskInterface.register(CAPTURING, sdpa_mask)


def layer_index(layer: int | float, depth: int) -> int:
    """An index, or a share of the depth (0.75 of 28 layers is layer 21), as an index.

    Raises ValueError when there is no such layer.
    """
    index = layer if isinstance(layer, int) else min(int(layer * depth), depth - 1)
    if not -depth <= index < depth:
        raise ValueError(f"relations.layer = {layer}: the model has layers 0..{depth - 1}")
    return index % depth


def related_layers(
    options: RelationLoss, student: PreTrainedModel, teacher: PreTrainedModel
) -> tuple[int, int]:
    """The student's and the teacher's layer of the relation loss, at the same relative depth."""
    mine, theirs = len(layers_of(student)), len(layers_of(teacher))
    index = layer_index(options.layer, theirs)
    return round(index / max(theirs - 1, 1) * (mine - 1)), index


class Capture:
    """Q, K and V (B, T, D) of one layer, filled by each forward pass of the model."""

    def __init__(self, model: PreTrainedModel, index: int, options: RelationLoss) -> None:
        self.states: list[Tensor] = []
        self.layer = layers_of(model)[index]
        attention: Any = self.layer.self_attn
        if options.states == "attention":
            model.set_attn_implementation(CAPTURING)
            attention.bitdistill_capture = self
            return
        for name in _STATE_PROJECTIONS:
            getattr(attention, name).register_forward_hook(self._hook)

    def _hook(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.states.append(output)

    def take(self) -> tuple[Tensor, ...]:
        """The states of the last forward pass, which are then forgotten."""
        states, self.states = tuple(self.states), []
        return states


@dataclass
class Counts:
    """What the terms of one optimizer step are divided by."""

    answers: int
    related: int


def count_window(window: list[Batch], relations: RelationLoss) -> Counts:
    """Learnt tokens, and tokens that take part in the relations, over a window of micro-batches."""
    answers = sum(int((b["labels"][:, 1:] != IGNORED).sum()) for b in window)
    if relations.mask:
        related = sum(int(b["attention_mask"].sum()) for b in window)
    else:
        related = sum(b["attention_mask"].numel() for b in window)
    return Counts(max(answers, 1), max(related, 1))


@dataclass
class Objective:
    """Computes the weighted terms of a micro-batch; their sum is the loss."""

    student: PreTrainedModel
    teacher: PreTrainedModel | None
    ce: float = 1.0
    logits: LogitsLoss = field(default_factory=LogitsLoss)
    relations: RelationLoss = field(default_factory=RelationLoss)
    relation_weight: float = 0.0
    _captures: tuple[Capture, Capture] | None = None

    def __post_init__(self) -> None:
        self.relation_weight = self.relations.weight
        if self.teacher is not None and self.relations.active:
            mine, theirs = related_layers(self.relations, self.student, self.teacher)
            self._captures = (
                Capture(self.student, mine, self.relations),
                Capture(self.teacher, theirs, self.relations),
            )

    @property
    def captured_layers(self) -> list[nn.Module]:
        """The layers whose states are read; they must not be compiled."""
        return [capture.layer for capture in self._captures or ()]

    def _hidden(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        output = model.model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
        )
        return output.last_hidden_state

    def __call__(self, batch: Batch, counts: Counts) -> dict[str, Tensor]:
        """Weighted, normalised terms: ce, and where asked for logits and relations."""
        learnt = batch["labels"][:, 1:] != IGNORED
        targets = batch["labels"][:, 1:][learnt]
        teacher_hidden = teacher_head = None
        if self.teacher is not None:
            with torch.no_grad():
                teacher_hidden = self._hidden(self.teacher, batch)[:, :-1][learnt]
            teacher_head = self.teacher.lm_head
        hidden = self._hidden(self.student, batch)[:, :-1][learnt]
        sums = token_terms(
            hidden, self.student.lm_head, targets, self.logits, teacher_hidden, teacher_head
        )
        terms = {"ce": self.ce * sums.ce / counts.answers}
        if self.logits.weight > 0:
            terms["logits"] = self.logits.weight * sums.kl / counts.answers
        if self._captures is not None:
            mine, theirs = (capture.take() for capture in self._captures)
            relation = relation_sum(mine, theirs, batch["attention_mask"], self.relations)
            terms["relations"] = self.relation_weight * relation / counts.related
        return terms

    @torch.no_grad()
    def fit_relation_weight(self, batches: list[Batch]) -> None:
        """Set the relations' weight so that the term is `target_ratio` times the cross-entropy."""
        ratio = self.relations.target_ratio
        if ratio is None or self._captures is None:
            return
        self.relation_weight = 1.0
        ce = relation = 0.0
        for batch in batches:
            terms = self(batch, count_window([batch], self.relations))
            ce += float(terms["ce"])
            relation += float(terms["relations"])
        if not relation > 0.0:
            raise ValueError("the attention relations do not differ: target_ratio has no meaning")
        self.relation_weight = ratio * ce / relation


def make_objective(
    student: PreTrainedModel, teacher: PreTrainedModel | None, settings: Training
) -> Objective:
    """The objective of a stage: plain cross-entropy, or distillation as its settings say."""
    if not isinstance(settings, Distillation):
        return Objective(student, None)
    used = teacher if settings.needs_teacher else None
    return Objective(student, used, settings.ce, settings.logits, settings.relations)
