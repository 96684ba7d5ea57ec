"""The three terms of stage 3, L = L_CE + lambda L_LD + gamma L_AD (arXiv 2510.13998, eq. 8-14).

Every term is a sum over tokens divided by a count that the caller takes over the whole optimizer
step, so that no term's weight depends on gradient accumulation or on the number of devices.

Legend: B batch, T tokens, P counted tokens, C chunk, D hidden, V vocabulary, H split heads,
R = D / H.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from bitdistill.schema import LogitsLoss, RelationLoss

CHUNK_TOKENS = 1024


@dataclass(frozen=True)
class TokenTerms:
    """Summed cross-entropy and summed (unweighted) logits KL over the counted tokens."""

    ce: Tensor
    kl: Tensor


def cross_entropy_sum(logits_CV: Tensor, targets_C: Tensor) -> Tensor:
    """Sum of -log softmax(z)[target], in fp32."""
    return F.cross_entropy(logits_CV.float(), targets_C, reduction="sum")


def logits_kl_sum(student_CV: Tensor, teacher_CV: Tensor, options: LogitsLoss) -> Tensor:
    """Sum over tokens of KL(teacher || student) of softmax(z / tau), times tau^2 if asked for."""
    tau = options.temperature
    student = F.log_softmax(student_CV.float() / tau, dim=-1)
    teacher = F.log_softmax(teacher_CV.float() / tau, dim=-1)
    kl = F.kl_div(student, teacher, log_target=True, reduction="sum")
    return kl * tau**2 if options.tau_squared else kl


def _chunk_terms(
    hidden_CD: Tensor,
    head: nn.Module,
    targets_C: Tensor,
    teacher_hidden_CD: Tensor | None,
    teacher_head: nn.Module | None,
    options: LogitsLoss,
) -> tuple[Tensor, Tensor]:
    logits_CV = head(hidden_CD)
    ce = cross_entropy_sum(logits_CV, targets_C)
    if teacher_head is None or teacher_hidden_CD is None:
        return ce, ce.new_zeros(())
    with torch.no_grad():
        teacher_CV = teacher_head(teacher_hidden_CD)
    return ce, logits_kl_sum(logits_CV, teacher_CV, options)


def token_terms(
    hidden_PD: Tensor,
    head: nn.Module,
    targets_P: Tensor,
    options: LogitsLoss,
    teacher_hidden_PD: Tensor | None = None,
    teacher_head: nn.Module | None = None,
) -> TokenTerms:
    """Cross-entropy and logits KL of the counted tokens, in chunks that are recomputed backward.

    No (P, V) tensor is kept: memory is one chunk of CHUNK_TOKENS x V, whatever P is.
    """
    ce = hidden_PD.new_zeros((), dtype=torch.float32)
    kl = ce.clone()
    for start in range(0, len(targets_P), CHUNK_TOKENS):
        part = slice(start, start + CHUNK_TOKENS)
        teacher_part = None if teacher_hidden_PD is None else teacher_hidden_PD[part]
        arguments = (hidden_PD[part], head, targets_P[part], teacher_part, teacher_head, options)
        if len(targets_P) > CHUNK_TOKENS:
            chunk_ce, chunk_kl = checkpoint(_chunk_terms, *arguments, use_reentrant=False)
        else:
            chunk_ce, chunk_kl = _chunk_terms(*arguments)
        ce, kl = ce + chunk_ce, kl + chunk_kl
    return TokenTerms(ce, kl)


def relation_logits(states_BTD: Tensor, options: RelationLoss) -> Tensor:
    """(B, T, D) -> (B, H, T, T): A A^T / sqrt(R), or the temperature-scaled cosine of the paper."""
    batch, tokens, width = states_BTD.shape
    if width % options.split_heads:
        raise ValueError(
            f"relations.split_heads = {options.split_heads} does not divide the width {width} of "
            "Q, K or V; choose a divisor of the teacher's and of the student's"
        )
    a_BHTR = states_BTD.float().view(batch, tokens, options.split_heads, -1).transpose(1, 2)
    if options.scaling == "normalised":
        a_BHTR = F.normalize(a_BHTR, dim=-1)
        return a_BHTR @ a_BHTR.transpose(-1, -2) / options.temperature
    return a_BHTR @ a_BHTR.transpose(-1, -2) / math.sqrt(a_BHTR.shape[-1])


def relation_sum(
    student: tuple[Tensor, ...],
    teacher: tuple[Tensor, ...],
    attention_mask_BT: Tensor,
    options: RelationLoss,
) -> Tensor:
    """Sum over real tokens of KL(teacher || student) of the relations, mean over heads, for Q+K+V.

    `student` and `teacher` hold Q, K and V of one layer each, (B, T, D) with D of their own; each
    side splits its own width into the same number of heads. With `mask`, a token relates to itself
    and to real earlier tokens only, as in the model's own attention.
    """
    tokens = attention_mask_BT.shape[1]
    real_BT = attention_mask_BT.bool()
    total = attention_mask_BT.new_zeros((), dtype=torch.float32)
    for a_student, a_teacher in zip(student, teacher, strict=True):
        s_BHTT = relation_logits(a_student, options)
        t_BHTT = relation_logits(a_teacher, options)
        if options.mask:
            causal = torch.ones(tokens, tokens, dtype=torch.bool, device=s_BHTT.device).tril()
            hidden = ~(causal & real_BT[:, None, None, :])
            # a finite fill keeps 0 * log 0 out of the KL and out of its gradient
            s_BHTT = s_BHTT.masked_fill(hidden, -1e4)
            t_BHTT = t_BHTT.masked_fill(hidden, -1e4)
        kl_BHTT = F.kl_div(
            F.log_softmax(s_BHTT, -1), F.log_softmax(t_BHTT, -1), log_target=True, reduction="none"
        )
        per_token_BT = kl_BHTT.sum(-1).mean(1)
        total = total + (per_token_BT * real_BT if options.mask else per_token_BT).sum()
    return total / options.split_heads if options.divide_by_heads else total
