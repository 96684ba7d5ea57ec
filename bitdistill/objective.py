"""What a stage minimises: the terms of losses.py, weighted, for one micro-batch.

The counts that normalise the terms are taken over the whole optimizer step (`count_window`), and
every micro-batch contributes sums: the gradient is the same however the step is cut into batches.

`prepare` does on the CPU all that depends on the data (which positions are learnt, the counts), so
that the objective itself is a fixed sequence of kernels for each shape: it can be compiled, and
captured as a CUDA graph.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bitdistill.capture import ATTENTION, Capture, related_layers
from bitdistill.data import IGNORED, Batch
from bitdistill.losses import chunk_terms, head_terms, relation_sum
from bitdistill.schema import Distillation, LogitsLoss, RelationLoss, Training
from bitdistill.student import layers_of


def recompute_activations(model: PreTrainedModel, on: bool) -> None:
    """Keep only the layers' inputs for the backward pass, and compute the rest of them again."""
    # transformers is renaming these methods
    prefix = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if not on:
        getattr(model, f"{prefix}_checkpointing_disable")()
        return
    # nothing here is random, and asking for a random state would break the capture of a graph
    options = {"use_reentrant": False, "preserve_rng_state": False}
    getattr(model, f"{prefix}_checkpointing_enable")(options)


@dataclass(frozen=True)
class Counts:
    """What the terms of one optimizer step are divided by."""

    answers: float
    related: float


def count_window(window: list[Batch], relations: RelationLoss) -> Counts:
    """Learnt tokens, and tokens that take part in the relations, over a window of micro-batches."""
    answers = sum(int((b["labels"][:, 1:] != IGNORED).sum()) for b in window)
    if relations.mask:
        related = sum(int(b["attention_mask"].sum()) for b in window)
    else:
        related = sum(b["attention_mask"].numel() for b in window)
    return Counts(max(answers, 1), max(related, 1))


def _rounded(count: int) -> int:
    """`count`, rounded up by less than a quarter, so that few different sizes occur."""
    step = 1 << max(0, count.bit_length() - 3)
    return max(1, -(-count // step) * step)


def prepare(batch: Batch, counts: Counts) -> Batch:
    """What the objective reads of a micro-batch, on the batch's device.

    rows_P: flat positions b * T + t whose next token is learnt; targets_P: that token; both filled
    up to a round number with targets that do not count. scales: 1 / answers, 1 / related.
    document_mask (B, 1, T, T), where `documents` (B, T) says which tokens belong together.
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
    scales = torch.tensor([1 / counts.answers, 1 / counts.related])
    prepared = {key: batch[key] for key in ("input_ids", "attention_mask")}
    prepared |= {"rows": rows_P, "targets": targets_P, "scales": scales.to(labels_BT.device)}
    if "documents" in batch:
        prepared |= {"documents": batch["documents"], "position_ids": batch["position_ids"]}
    return prepared


def document_mask(documents_BT: Tensor) -> Tensor:
    """Boolean (B, 1, T, T): a token sees itself and earlier tokens of its own document."""
    same = documents_BT.unsqueeze(-1) == documents_BT.unsqueeze(-2)
    return same.tril().unsqueeze(1)


class Objective(nn.Module):
    """Computes the loss of a prepared micro-batch, and its weighted terms for the log.

    Only the student is a submodule: the teacher's parameters are never trained, saved or sharded
    with it.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel | None,
        ce: float = 1.0,
        logits: LogitsLoss | None = None,
        relations: RelationLoss | None = None,
    ) -> None:
        super().__init__()
        self.student = student
        self._teacher = (teacher,)  # a tuple hides it from the module tree
        self.ce = ce
        self.logits = LogitsLoss() if logits is None else logits
        self.relations = RelationLoss() if relations is None else relations
        self.relation_weight = self.relations.weight
        self.chunk_terms: Callable[..., Any] = chunk_terms
        self.relation_sum: Callable[..., Tensor] = relation_sum
        self._captures: tuple[Capture, Capture] | None = None
        for model in filter(None, (student, teacher)):
            model.set_attn_implementation(ATTENTION)
        if teacher is not None and self.relations.active:
            mine, theirs = related_layers(self.relations, student, teacher)
            self._captures = (
                Capture(student, mine, self.relations),
                Capture(teacher, theirs, self.relations),
            )

    @property
    def teacher(self) -> PreTrainedModel | None:
        return self._teacher[0]

    def release(self) -> None:
        """Give the models back as they were: stock attention, nothing captured."""
        for model in filter(None, (self.student, self.teacher)):
            model.set_attn_implementation("sdpa")
            for layer in layers_of(model):
                vars(layer).pop("forward", None)  # the compiled one
        for capture in self._captures or ():
            capture.release()

    def compile(self, **options: Any) -> None:
        """Regional compilation: each decoder layer alone, and the losses.

        Layers of one model share their code, so one of them is compiled and the others reuse it:
        this starts up several times faster than compiling the whole model.
        """
        settings = torch._dynamo.config
        # else the code compiled for a layer without hooks would serve the captured layer as well
        settings.skip_nnmodule_hook_guards = False
        # teacher and student, captured or not, with and without gradient: several variants each
        settings.recompile_limit = max(64, settings.recompile_limit)
        warnings.filterwarnings("ignore", "\\s*Online softmax is disabled", UserWarning)
        for model in filter(None, (self.student, self.teacher)):
            for layer in layers_of(model):
                # not the call: hooks of FSDP2 stay outside
                layer.forward = torch.compile(layer.forward, **options)
        self.chunk_terms = torch.compile(chunk_terms, **options)
        self.relation_sum = torch.compile(relation_sum, **options)

    def _hidden(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        """Hidden states (P, D) of the learnt rows."""
        mask = document_mask(batch["documents"]) if "documents" in batch else None
        output = model.model(
            input_ids=batch["input_ids"],
            attention_mask=mask,
            position_ids=batch.get("position_ids"),
            use_cache=False,
        )
        return output.last_hidden_state.flatten(0, 1)[batch["rows"]]

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a prepared batch, and its terms (without gradient): ce, logits, relations."""
        teacher_hidden = teacher_weight = None
        for capture in self._captures or ():
            capture.clear()
        if self.teacher is not None:
            with torch.no_grad():
                teacher_hidden = self._hidden(self.teacher, batch)
            if self.logits.weight > 0:
                teacher_weight = self.teacher.lm_head.weight
        per_answer, per_related = batch["scales"]
        head = head_terms(
            self._hidden(self.student, batch),
            self.student.lm_head.weight,
            batch["targets"],
            self.logits,
            self.ce * per_answer,
            self.logits.weight * per_answer,
            teacher_hidden,
            teacher_weight,
            self.chunk_terms,
        )
        loss, terms = head.loss, {"ce": head.ce}
        if teacher_weight is not None:
            terms["logits"] = head.kl
        if self._captures is not None:
            mine, theirs = (capture.take() for capture in self._captures)
            relation = self.relation_sum(mine, theirs, batch["attention_mask"], self.relations)
            relation = self.relation_weight * per_related * relation
            loss, terms["relations"] = loss + relation, relation.detach()
        return loss, terms

    @torch.no_grad()
    def fit_relation_weight(
        self, batches: list[Batch], total: Callable[[list[float]], list[float]] = list
    ) -> None:
        """Set the relations' weight so that the term is `target_ratio` times the cross-entropy.

        `total` sums numbers over all devices.
        """
        ratio = self.relations.target_ratio
        if ratio is None or self._captures is None:
            return
        self.relation_weight = 1.0
        ce = relation = 0.0
        for batch in batches:
            _, terms = self(prepare(batch, count_window([batch], self.relations)))
            ce += float(terms["ce"])
            relation += float(terms["relations"])
        ce, relation = total([ce, relation])
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
