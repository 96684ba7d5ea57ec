"""A teacher whose linear layers are kept in int8, one scale a row: half the memory of 16 bits.

The product is taken in the arithmetic of the run, with integers that 16 bits hold exactly; the
scale multiplies its result. Only a teacher's weights are rounded: nothing is trained through them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from bitdistill.student import layers_of


class Int8Linear(nn.Module):
    """x (..., K) -> (..., N), with weights int8 (N, K) and scales bf16 (N): max |row| / 127."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight_NK = linear.weight.detach().float()
        scale_N = (weight_NK.abs().amax(1) / 127).clamp_min(1e-12).bfloat16()
        rounded_NK = (weight_NK / scale_N.float().unsqueeze(1)).round().clamp(-127, 127)
        self.weight = nn.Parameter(rounded_NK.to(torch.int8), requires_grad=False)
        self.scale = nn.Parameter(scale_N, requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight.to(x.dtype)) * self.scale.to(x.dtype)
        return y if self.bias is None else y + self.bias


def weights_to_int8(teacher: PreTrainedModel) -> None:
    """Replace every linear layer of the blocks, in place; embedding and head stay as they are."""
    for layer in layers_of(teacher):
        linears = [(n, m) for n, m in layer.named_modules() if isinstance(m, nn.Linear)]
        for name, linear in linears:
            layer.set_submodule(name, Int8Linear(linear))
