"""The alignment loss: the student's residual stream follows the teacher's, layer by layer.

What is compared is what the next layer reads: the stream behind the teacher's own norm. A few
channels of a residual stream are hundreds of times larger than the others, and the next norm's
small gain for them says how little they matter; without it they would be all that is learnt.

Legend: B batch, T tokens, D hidden, L layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bitdistill.quantize import wide
from bitdistill.student import layers_of

EPS = 1e-6


def alignment_sum(
    student_BTD: Tensor, teacher_BTD: Tensor, gain_D: Tensor, mask_BT: Tensor
) -> Tensor:
    """Sum over real tokens of |n(s) - n(t)|^2 / |n(t)|^2, where n(x) = gain x / rms(x); fp32."""
    s_BTD, t_BTD = (_normed(x, gain_D) for x in (student_BTD, teacher_BTD))
    distance_BT = (s_BTD - t_BTD).square().mean(-1) / (t_BTD.square().mean(-1) + EPS)
    return (distance_BT * mask_BT).sum()


def _normed(x_BTD: Tensor, gain_D: Tensor) -> Tensor:
    x_BTD = wide(x_BTD)
    return x_BTD * torch.rsqrt(x_BTD.square().mean(-1, keepdim=True) + EPS) * gain_D


class Streams:
    """The output (B, T, D) of every decoder layer, filled by each forward pass of the model."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.outputs: list[Tensor] = []
        self._handles = [layer.register_forward_hook(self._hook) for layer in layers_of(model)]

    def _hook(self, layer: nn.Module, args: Any, output: Tensor) -> None:
        self.outputs.append(output)

    def take(self) -> list[Tensor]:
        """The outputs of the last forward pass, which are then forgotten."""
        outputs, self.outputs = self.outputs, []
        return outputs

    def release(self) -> None:
        """Collect no more."""
        for handle in self._handles:
            handle.remove()


class Alignment:
    """Pairs of layers at the same relative depth, and the mean of their distances.

    ValueError for models of different width.
    """

    def __init__(self, student: PreTrainedModel, teacher: PreTrainedModel) -> None:
        widths = student.config.hidden_size, teacher.config.hidden_size
        if widths[0] != widths[1]:
            raise ValueError(
                f"alignment compares residual streams of one width; the student's is {widths[0]}, "
                f"the teacher's {widths[1]}: set alignment.weight to 0"
            )
        self.teacher = teacher
        self.streams = Streams(student), Streams(teacher)
        mine, theirs = len(layers_of(student)), len(layers_of(teacher))
        # a teacher less than half as deep has none before its first
        self.pairs = [(i, max(round((i + 1) * theirs / mine) - 1, 0)) for i in range(mine)]
        self.distance = alignment_sum

    def clear(self) -> None:
        """Forget what a recomputation in the backward pass may have added."""
        for streams in self.streams:
            streams.take()

    def gain(self, index: int) -> Tensor:
        """The gain (D) of the norm that reads the teacher's layer `index`."""
        layers = layers_of(self.teacher)
        last = index + 1 == len(layers)
        norm: Any = self.teacher.model.norm if last else layers[index + 1].input_layernorm
        # families store it as w or as 1 + w: of ones, the norm makes the gain itself
        return norm(torch.ones_like(norm.weight)).float()

    def sum(self, mask_BT: Tensor) -> Tensor:
        """Distances of the last forward passes, summed over real tokens, mean over layers."""
        mine, theirs = (streams.take() for streams in self.streams)
        total = mask_BT.new_zeros((), dtype=torch.float32)
        for i, j in self.pairs:
            with torch.no_grad():
                gain_D = self.gain(j)
            total = total + self.distance(mine[i], theirs[j], gain_D, mask_BT)
        return total / len(self.pairs)

    def release(self) -> None:
        """Collect no more."""
        for streams in self.streams:
            streams.release()
