"""The three terms of stage 3, L = L_CE + lambda L_LD + gamma L_AD (arXiv 2510.13998, eq. 8-14).

Every term is a sum over tokens divided by a count that the caller takes over the whole optimizer
step, so that no term's weight depends on gradient accumulation or on the number of devices.

Legend: B batch, T tokens, P counted tokens, C chunk, D hidden, V vocabulary, H split heads,
R = D / H.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from bitdistill.data import IGNORED
from bitdistill.quantize import wide
from bitdistill.schema import LogitsLoss, RelationLoss

# logits of one chunk. Fused on a GPU they and their gradient take 2 bytes each; there a chunk is
# large because the head's gradient, a whole matrix of each chunk, has to be added up.
CHUNK_ELEMENTS = {"fused": 5 << 28, "plain": 1 << 26}
REST_EPS = 1e-7  # fp32 knows no smaller share of 1


class HeadTerms(NamedTuple):
    """`loss` = sum of the weighted terms, with the gradient; each term's sum, without."""

    loss: Tensor
    ce: Tensor
    kl: Tensor


class Top(NamedTuple):
    """Of a teacher's row of logits the k largest, which tokens they are, and the sum over all.

    logits, ids (C, k); total (C): log sum exp(logits / temperature) over the whole vocabulary.
    """

    logits: Tensor
    ids: Tensor
    total: Tensor


def _compare(log_s_CV: Tensor, teacher_CV: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """KL (C) of the teacher's rows to the student's, and softmax(z / tau) - softmax(t / tau)."""
    log_t_CV = F.log_softmax(wide(teacher_CV) / tau, -1)
    t_CV = log_t_CV.exp()
    return (t_CV * (log_t_CV - log_s_CV)).sum(-1), log_s_CV.exp() - t_CV


def _compare_top(log_s_CV: Tensor, top: Top, tau: float) -> tuple[Tensor, Tensor]:
    """The same of k + 1 outcomes: the teacher's k tokens, and any other.

    At k = V that is the KL itself, else a lower bound, whose gradient is that of a teacher who
    spreads the rest as the student does: of the tokens that are not known only the sum is learnt.
    """
    s_CV, log_s_Ck = log_s_CV.exp(), log_s_CV.gather(-1, top.ids)
    log_t_Ck = wide(top.logits) / tau - top.total.unsqueeze(-1)
    s_Ck, t_Ck = log_s_Ck.exp(), log_t_Ck.exp()
    rest_t_C = (1 - t_Ck.sum(-1)).clamp_min(0)
    rest_s_C = (1 - s_Ck.sum(-1)).clamp_min(REST_EPS)
    rest_C = rest_t_C * (rest_t_C.clamp_min(REST_EPS) / rest_s_C).log()
    others_CV = s_CV * (1 - rest_t_C / rest_s_C).unsqueeze(-1)
    rows_C = (t_Ck * (log_t_Ck - log_s_Ck)).sum(-1) + rest_C
    return rows_C, others_CV.scatter(-1, top.ids, s_Ck - t_Ck)


def chunk_terms(
    student_CV: Tensor,
    targets_C: Tensor,
    teacher: Tensor | Top | None,
    ce_weight: Tensor,
    kl_weight: Tensor,
    options: LogitsLoss,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted cross-entropy and KL(teacher || student) summed over rows, and d/d logits (C, V).

    Rows of IGNORED count nothing, rows of UNLABELLED (any other negative target) in the KL alone.
    Closed forms: d CE = softmax(z) - onehot; d KL = (softmax(z / tau) - softmax(t / tau)) / tau,
    times tau^2 if asked for. fp32 inside; the gradient comes back in the logits' dtype. Elementwise
    and row reductions only, so that a compiler fuses it into a few passes over the logits.
    """
    z_CV = wide(student_CV)
    learnt_C, counted_C = targets_C >= 0, targets_C != IGNORED
    target_C1 = targets_C.clamp_min(0).unsqueeze(-1)
    log_p_CV = F.log_softmax(z_CV, -1)
    ce = -(log_p_CV.gather(-1, target_C1).squeeze(-1) * learnt_C).sum() * ce_weight
    onehot_CV = torch.arange(z_CV.shape[-1], device=z_CV.device) == target_C1
    gradient_CV = (log_p_CV.exp() - onehot_CV.to(z_CV.dtype)) * ce_weight
    gradient_CV = gradient_CV * learnt_C.unsqueeze(-1)
    kl = torch.zeros_like(ce)
    if teacher is not None:
        tau, factor = options.temperature, options.temperature**2 if options.tau_squared else 1.0
        log_s_CV = F.log_softmax(z_CV / tau, -1)
        if isinstance(teacher, Top):
            rows_C, apart_CV = _compare_top(log_s_CV, teacher, tau)
        else:
            rows_C, apart_CV = _compare(log_s_CV, teacher, tau)
        kl = (rows_C * counted_C).sum() * (kl_weight * factor)
        d_kl_CV = apart_CV * (kl_weight * (factor / tau))
        gradient_CV = gradient_CV + d_kl_CV * counted_C.unsqueeze(-1)
    return ce, kl, gradient_CV.to(student_CV.dtype)


def chunk_tokens(rows: int, vocabulary: int, fused: bool) -> int:
    """How many of `rows` rows' logits are computed at once.

    All of them, or a half, a quarter, ...: equal chunks are one shape for the compiler.
    """
    limit = CHUNK_ELEMENTS["fused" if fused else "plain"]
    while rows > 1 and rows * vocabulary > limit:
        rows = -(-rows // 2)
    return max(1, rows)


class _HeadLoss(torch.autograd.Function):
    """The LM head and its loss, whose gradient is taken chunk by chunk in the forward pass.

    Of (P, V) tensors one chunk exists at a time (all P rows where CHUNK_ELEMENTS has room for
    them), and no logits are computed twice: a chunk's logits become their own gradient at once,
    because the weights of the terms are known beforehand.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_PD: Tensor,
        weight_VD: Tensor,
        targets_P: Tensor,
        teacher_hidden_PD: Tensor | None,
        teacher_weight_VD: Tensor | None,
        top: Top | None,
        ce_weight: Tensor,
        kl_weight: Tensor,
        options: LogitsLoss,
        terms: Callable[..., tuple[Tensor, Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor, Tensor]:
        device = hidden_PD.device.type
        mixed = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if mixed else weight_VD.dtype
        w_VD, h_PD = weight_VD.to(dtype), hidden_PD.to(dtype)
        d_hidden = torch.empty_like(h_PD) if ctx.needs_input_grad[0] else None
        d_weight: Tensor | None = None
        ce = wide(hidden_PD.new_zeros(()))
        kl = ce.clone()
        fused = device == "cuda" and terms is not chunk_terms
        chunk = chunk_tokens(len(targets_P), len(weight_VD), fused)
        for start in range(0, len(targets_P), chunk):
            part = slice(start, start + chunk)
            teacher: Tensor | Top | None = None if top is None else Top(*(x[part] for x in top))
            if teacher_hidden_PD is not None and teacher_weight_VD is not None:
                rows_CD = teacher_hidden_PD[part].to(teacher_weight_VD.dtype)
                teacher = rows_CD @ teacher_weight_VD.T
            student_CV = h_PD[part] @ w_VD.T
            one_ce, one_kl, d_CV = terms(
                student_CV, targets_P[part], teacher, ce_weight, kl_weight, options
            )
            ce, kl = ce + one_ce, kl + one_kl
            if d_hidden is not None:
                d_hidden[part] = d_CV @ w_VD
            if ctx.needs_input_grad[1]:
                share = d_CV.T @ h_PD[part]
                d_weight = share.to(weight_VD.dtype) if d_weight is None else d_weight.add_(share)
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.hidden_dtype = hidden_PD.dtype
        ctx.mark_non_differentiable(ce, kl)
        return ce + kl, ce, kl

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        hidden = None if d_hidden is None else (d_hidden * d_loss).to(ctx.hidden_dtype)
        weight = None if d_weight is None else d_weight * d_loss
        return hidden, weight, *[None] * 8


def head_terms(
    hidden_PD: Tensor,
    weight_VD: Tensor,
    targets_P: Tensor,
    options: LogitsLoss,
    ce_weight: Tensor,
    kl_weight: Tensor,
    teacher_hidden_PD: Tensor | None = None,
    teacher_weight_VD: Tensor | None = None,
    terms: Callable[..., tuple[Tensor, Tensor, Tensor]] = chunk_terms,
    top: Top | None = None,
) -> HeadTerms:
    """Weighted cross-entropy and logits KL of rows of hidden states, counted as in `chunk_terms`.

    `ce_weight`, `kl_weight`: 0-d tensors, the terms' weights over their counts. `terms` is
    `chunk_terms` or its compiled form. The teacher is given by hidden states and a head, or by what
    is known of its logits. Memory is that of CHUNK_ELEMENTS logits at most, whatever P is.
    """
    return HeadTerms(
        *_HeadLoss.apply(
            hidden_PD,
            weight_VD,
            targets_P,
            teacher_hidden_PD,
            teacher_weight_VD,
            top,
            ce_weight,
            kl_weight,
            options,
            terms,
        )
    )


def relation_logits(states_BTD: Tensor, options: RelationLoss) -> Tensor:
    """(B, T, D) -> (B, H, T, T): A A^T / sqrt(R), or the temperature-scaled cosine of the paper."""
    batch, tokens, width = states_BTD.shape
    if width % options.split_heads:
        raise ValueError(
            f"relations.split_heads = {options.split_heads} does not divide the width {width} of "
            "Q, K or V; choose a divisor of the teacher's and of the student's"
        )
    a_BHTR = states_BTD.float().view(batch, tokens, options.split_heads, -1).transpose(1, 2)
    # products in 16 bits would be off by 2^-9 of logits in the tens
    with torch.autocast(a_BHTR.device.type, enabled=False):
        if options.scaling == "normalised":
            a_BHTR = F.normalize(a_BHTR, dim=-1)
            return a_BHTR @ a_BHTR.transpose(-1, -2) / options.temperature
        return a_BHTR @ a_BHTR.transpose(-1, -2) / math.sqrt(a_BHTR.shape[-1])


def relation_sum(
    student: tuple[Tensor, ...],
    teacher: tuple[Tensor, ...],
    attention_mask_BT: Tensor,
    options: RelationLoss,
    documents_BT: Tensor | None = None,
) -> Tensor:
    """Sum over real tokens of KL(teacher || student) of the relations, mean over heads, for Q+K+V.

    `student` and `teacher` hold Q, K and V of one layer each, (B, T, D) with D of their own; each
    side splits its own width into the same number of heads. With `mask`, a token relates to itself
    and to real earlier tokens only, and to those of its own document where `documents` numbers
    them, as in the model's own attention.
    """
    tokens = attention_mask_BT.shape[1]
    real_BT = attention_mask_BT.bool()
    causal = torch.ones(tokens, tokens, dtype=torch.bool, device=real_BT.device).tril()
    seen = causal & real_BT[:, None, None, :]
    if documents_BT is not None:
        seen = seen & (documents_BT[:, None, :, None] == documents_BT[:, None, None, :])
    total = attention_mask_BT.new_zeros((), dtype=torch.float32)
    for a_student, a_teacher in zip(student, teacher, strict=True):
        s_BHTT = relation_logits(a_student, options)
        t_BHTT = relation_logits(a_teacher, options)
        if options.mask:
            # a finite fill keeps 0 * log 0 out of the KL and out of its gradient
            s_BHTT = s_BHTT.masked_fill(~seen, -1e4)
            t_BHTT = t_BHTT.masked_fill(~seen, -1e4)
        kl_BHTT = F.kl_div(
            F.log_softmax(s_BHTT, -1), F.log_softmax(t_BHTT, -1), log_target=True, reduction="none"
        )
        per_token_BT = kl_BHTT.sum(-1).mean(1)
        total = total + (per_token_BT * real_BT if options.mask else per_token_BT).sum()
    return total / options.split_heads if options.divide_by_heads else total
