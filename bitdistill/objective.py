"""What a stage minimises: the terms of losses.py, weighted, for one micro-batch.

It reads what prepare.py made of the batch, and nothing in it depends on the data.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bitdistill.alignment import Alignment, alignment_sum
from bitdistill.capture import ATTENTION, Capture, related_layers
from bitdistill.data import Batch
from bitdistill.losses import HeadTerms, Top, chunk_terms, head_terms, relation_sum
from bitdistill.prepare import Counts, count_window, prepare
from bitdistill.schema import Distillation, Training
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


def document_mask(documents_BT: Tensor) -> Tensor:
    """Boolean (B, 1, T, T): a token sees itself and earlier tokens of its own document."""
    same = documents_BT.unsqueeze(-1) == documents_BT.unsqueeze(-2)
    return same.tril().unsqueeze(1)


def as_candidates(targets_P: Tensor, candidates_C: Tensor) -> Tensor:
    """Token ids as places among the candidates; what does not count stays as it is."""
    place_P = (targets_P.unsqueeze(-1) == candidates_C).int().argmax(-1)
    return torch.where(targets_P >= 0, place_P, targets_P)


class Objective(nn.Module):
    """Computes the loss of a prepared micro-batch, and its weighted terms for the log.

    Only the student is a submodule: the teacher's parameters are never trained, saved or sharded
    with it. `candidates` are the token ids that answers compete among; none: the vocabulary.
    `remembered` is the student's layer whose states batches bring a teacher's states for.
    """

    candidates: Tensor | None

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel | None,
        settings: Distillation,
        candidates: list[int] | None = None,
        remembered: int | None = None,
    ) -> None:
        super().__init__()
        self.student, self.settings = student, settings
        self._teacher = (teacher,)  # a tuple hides it from the module tree
        self.relations = settings.relations
        self.relation_weight = self.relations.weight
        self.chunk_terms: Callable[..., Any] = chunk_terms
        self.relation_sum: Callable[..., Tensor] = relation_sum
        chosen = None if candidates is None else torch.tensor(candidates)
        self.register_buffer("candidates", chosen, persistent=False)
        self._captures: tuple[Capture, ...] | None = None
        self._alignment: Alignment | None = None
        for model in filter(None, (student, teacher)):
            model.set_attn_implementation(ATTENTION)
        if teacher is not None and self.relations.active:
            mine, theirs = related_layers(self.relations, student, teacher)
            self._captures = (
                Capture(student, mine, self.relations),
                Capture(teacher, theirs, self.relations),
            )
        elif remembered is not None:
            self._captures = (Capture(student, remembered, self.relations),)
        if teacher is not None and settings.alignment.weight > 0:
            self._alignment = Alignment(student, teacher)

    @property
    def teacher(self) -> PreTrainedModel | None:
        return self._teacher[0]

    def release(self) -> None:
        """Give the models back as they were: stock attention, nothing captured."""
        for model in filter(None, (self.student, self.teacher)):
            model.set_attn_implementation("sdpa")
            for layer in layers_of(model):
                vars(layer).pop("forward", None)  # the compiled one
        for collector in (*(self._captures or ()), self._alignment):
            if collector is not None:
                collector.release()

    def compile_head(self, **options: Any) -> None:
        """The loss over the vocabulary alone, which takes many times the memory otherwise."""
        if self.chunk_terms is chunk_terms:
            self.chunk_terms = torch.compile(chunk_terms, **options)

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
        self.compile_head(**options)
        self.relation_sum = torch.compile(relation_sum, **options)
        if self._alignment is not None:
            self._alignment.distance = torch.compile(alignment_sum, **options)

    def _hidden(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        """Hidden states (B * T, D)."""
        mask = document_mask(batch["documents"]) if "documents" in batch else None
        output = model.model(
            input_ids=batch["input_ids"],
            attention_mask=mask,
            position_ids=batch.get("position_ids"),
            use_cache=False,
        )
        return output.last_hidden_state.flatten(0, 1)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a prepared batch, and its terms (without gradient), by name."""
        for collector in (*(self._captures or ()), self._alignment):
            if collector is not None:
                collector.clear()
        theirs = None
        if self.teacher is not None:
            with torch.no_grad():
                theirs = self._hidden(self.teacher, batch)
        mine = self._hidden(self.student, batch)
        per: Counts[Tensor] = Counts(*batch["scales"])
        answers = self._answers(mine, theirs, batch, per)
        loss, terms = answers.loss, {"ce": answers.ce}
        logits = self.settings.logits
        if (theirs is not None and logits.weight > 0) or "top_logits" in batch:
            terms["logits"] = answers.kl
        if theirs is not None and logits.prompt_weight > 0:
            weights = torch.zeros_like(per.prompt), logits.prompt_weight * per.prompt
            prompt = self._head(mine, theirs, batch["prompt_targets"].flatten(), weights, None)
            loss, terms["prompt"] = loss + prompt.loss, prompt.kl
        for name, term in self._states_terms(batch, per).items():
            loss, terms[name] = loss + term, term.detach()
        return loss, terms

    def _answers(
        self, mine: Tensor, theirs: Tensor | None, batch: Batch, per: Counts[Tensor]
    ) -> HeadTerms:
        """Cross-entropy and KL where something is to be answered."""
        kl_weight = self.settings.logits.weight
        rows_P, targets_P = batch["rows"], batch["targets"]
        if self.candidates is not None:
            targets_P = as_candidates(targets_P, self.candidates)
        teacher = theirs[rows_P] if theirs is not None and kl_weight > 0 else None
        weights = self.settings.ce * per.answers, kl_weight * per.compared
        top = None
        if "top_logits" in batch:
            top = Top(batch["top_logits"], batch["top_ids"], batch["top_total"])
        return self._head(mine[rows_P], teacher, targets_P, weights, self.candidates, top)

    def _head(
        self,
        mine: Tensor,
        theirs: Tensor | None,
        targets: Tensor,
        weights: tuple[Tensor, Tensor],
        candidates: Tensor | None,
        top: Top | None = None,
    ) -> HeadTerms:
        """The terms of rows of hidden states, over the vocabulary or over some of its tokens."""

        rows = len(self.student.lm_head.weight)

        def table(model: PreTrainedModel) -> Tensor:
            weight_VD = model.lm_head.weight
            if len(weight_VD) > rows:  # a larger teacher's head may be padded further
                weight_VD = weight_VD[:rows]
            return weight_VD if candidates is None else weight_VD[candidates]

        their_table = None
        if theirs is not None and self.teacher is not None:
            their_table = table(self.teacher)
        return head_terms(
            mine,
            table(self.student),
            targets,
            self.settings.logits,
            *weights,
            theirs,
            their_table,
            self.chunk_terms,
            top,
        )

    def _states_terms(self, batch: Batch, per: Counts[Tensor]) -> dict[str, Tensor]:
        """The weighted terms that compare states inside the models."""
        terms: dict[str, Tensor] = {}
        mask_BT = batch["attention_mask"]
        if self._captures is not None:
            mine, *rest = (capture.take() for capture in self._captures)
            theirs = rest[0] if rest else tuple(batch[f"teacher_{name}"] for name in "qkv")
            documents = batch.get("documents")
            relation = self.relation_sum(mine, theirs, mask_BT, self.relations, documents)
            terms["relations"] = self.relation_weight * per.related * relation
        if self._alignment is not None:
            weight = self.settings.alignment.weight
            terms["alignment"] = weight * per.real * self._alignment.sum(mask_BT)
        return terms

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
        counts = Counts(*total(list(count_window(batches, self.relations))))
        ce = relation = 0.0
        for batch in batches:
            _, terms = self(prepare(batch, counts))
            ce += float(terms["ce"])
            relation += float(terms["relations"])
        ce, relation = total([ce, relation])
        if not relation > 0.0:
            raise ValueError("the attention relations do not differ: target_ratio has no meaning")
        if ce == 0.0:
            raise ValueError(
                "the first step has no labelled example to find relations.target_ratio with; raise "
                "batch_size, or give relations.weight"
            )
        self.relation_weight = ratio * ce / relation


def make_objective(
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    settings: Training,
    candidates: list[int] | None = None,
    remembered: int | None = None,
) -> Objective:
    """The objective of a stage: plain cross-entropy, or distillation as its settings say."""
    if not isinstance(settings, Distillation):
        return Objective(student, None, Distillation(steps=1), candidates)
    used = teacher if settings.needs_teacher else None
    return Objective(student, used, settings, candidates, remembered)
